//! Which way each layer multiplies under its mask: from a table of measured rates, or from times taken on the spot.
//!
//! The bits of a training depend on the choice, so it is a function of shape, mask and policy alone; where it comes from
//! times, these are kept in a file ([`Tuning`]) and taken from there ever after.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::ways::{MaskedLayer, Trial, Way};
use crate::device::{Device, Policy};
use crate::error::{Error, Result};
use crate::ops::conv_sparse::KeptWeights;

/// What a way takes of one core.
struct Rate {
    way: Way,
    /// Picoseconds of a multiply-add: forward, input gradient, weight gradient.
    multiply_adds: [f64; 3],
    /// Picoseconds of a value that a forward pass or an input gradient writes.
    written: f64,
}

impl Rate {
    const fn new(way: Way, multiply_adds: [f64; 3], written: f64) -> Self {
        Rate { way, multiply_adds, written }
    }
}

/// The host's rates for filters of several taps: least squares of relative errors over benches/crossover.rs on one core
/// of a Xeon with AVX-512 (benches/results/crossover-host-2026-11-24.csv). Single layers are up to half off, but the
/// order of the ways is that of the measured times.
const FILTERS: [Rate; 3] = [
    Rate::new(Way::Dense, [17.3, 18.3, 18.9], 0.0),
    Rate::new(Way::Groups, [19.1, 17.5, 22.2], 370.0),
    Rate::new(Way::Direct, [42.3, 44.2, 55.9], 290.0),
];

/// The same for filters of one tap.
const LINEAR: [Rate; 3] = [
    Rate::new(Way::Dense, [13.6, 13.3, 15.8], 490.0),
    Rate::new(Way::Groups, [20.6, 17.4, 28.7], 340.0),
    Rate::new(Way::Direct, [36.8, 41.0, 60.0], 270.0),
];

/// A way is not taken for less than a tenth of the dense one's predicted time.
const WORTH: f64 = 0.9;

/// A way that a layer can take.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// The way.
    pub way: Way,
    /// Seconds of all passes by the table, on one core; none on a GPU, where none have been measured.
    pub predicted: Option<f64>,
    /// Seconds of all passes as they were measured here.
    pub measured: Option<f64>,
}

/// How a layer multiplies.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The way that was chosen.
    pub way: Way,
    /// All ways, in the order of [`Way::ALL`].
    pub candidates: Vec<Candidate>,
}

impl Choice {
    /// The best candidate: by measured times where there are any, else by predicted ones. Dense, unless another is
    /// faster.
    fn among(candidates: Vec<Candidate>) -> Self {
        let seconds = |candidate: &Candidate| match (candidate.measured, candidate.predicted) {
            (Some(measured), _) => measured,
            (None, Some(predicted)) => predicted * if candidate.way == Way::Dense { WORTH } else { 1.0 },
            (None, None) => f64::INFINITY,
        };
        let faster = |best, other| if seconds(other) < seconds(best) { other } else { best };
        let best = candidates.iter().reduce(faster).expect("dense is one");
        Choice { way: best.way, candidates }
    }
}

/// The choice for a layer, by the table or by times of this machine.
pub(super) fn choose(device: &Device, layer: &MaskedLayer, train: bool, tuning: Option<&Tuning>) -> Result<Choice> {
    let candidate = |way| Candidate { way, predicted: predicted(device.policy(), layer, way, train), measured: None };
    if !KeptWeights::reach(layer.shape()) {
        return Ok(Choice::among(vec![candidate(Way::Dense)]));
    }
    let mut candidates: Vec<Candidate> = Way::ALL.into_iter().map(candidate).collect();
    if let Some(tuning) = tuning {
        for (candidate, seconds) in candidates.iter_mut().zip(tuning.seconds(device, layer, train)?) {
            candidate.measured = Some(seconds);
        }
    }
    Ok(Choice::among(candidates))
}

/// Seconds of one core for the passes of a layer.
fn predicted(policy: Policy, layer: &MaskedLayer, way: Way, train: bool) -> Option<f64> {
    if policy == Policy::Staged {
        return None;
    }
    let shape = layer.shape();
    let table = if shape.weight_len() == shape.filters() * shape.channels() { &LINEAR } else { &FILTERS };
    let rate = table.iter().find(|rate| rate.way == way)?;
    let columns = shape.multiply_adds() / shape.weight_len();
    let written = [shape.output_len(), shape.input_len(), 0];
    let pass = |pass: usize| {
        let multiply_adds = (layer.multiplied(way)[pass] * columns) as f64;
        1e-12 * (multiply_adds * rate.multiply_adds[pass] + written[pass] as f64 * rate.written)
    };
    Some((0..if train { 3 } else { 1 }).map(pass).sum())
}

/// Seconds of all passes in each way, the least of several runs that alternate.
///
/// # Errors
/// [`Error::Device`] when memory runs out, [`Error::Launch`] if the device fails.
pub fn measure(device: &Device, layer: &MaskedLayer, train: bool) -> Result<Vec<f64>> {
    /// Runs at most, after one that is not counted.
    const RUNS: usize = 5;
    /// A layer that has taken so long has one run that counts, and no more.
    const LONG: Duration = Duration::from_millis(500);
    let mut trial = Trial::new(device, layer.shape())?;
    let mut ways = Vec::new();
    for way in Way::ALL {
        ways.push((layer.lists(device, way, train)?, f64::INFINITY));
    }
    let start = Instant::now();
    for run in 0..=RUNS {
        if run > 1 && start.elapsed() > LONG {
            break;
        }
        for (lists, least) in &mut ways {
            let seconds = trial.time(lists.as_mut(), train)?.iter().sum::<f64>();
            if run > 0 {
                *least = least.min(seconds);
            }
        }
    }
    Ok(ways.into_iter().map(|(_, seconds)| seconds).collect())
}

/// Times that were taken, in a file: they are taken once for each device, layer and mask.
#[derive(Clone)]
pub struct Tuning(Arc<Mutex<Times>>);

struct Times {
    path: PathBuf,
    taken: BTreeMap<String, BTreeMap<Way, f64>>,
}

impl Tuning {
    /// The file for this user: `tuning.json` in `$DILT_CACHE`, or else in `dilt` of the folder for caches.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is no such folder; as [`Tuning::open`].
    pub fn of_user() -> Result<Self> {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let caches = || set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
        let folder = set("DILT_CACHE").or_else(|| Some(caches()?.join("dilt")));
        let folder = folder.ok_or_else(|| {
            Error::Usage("times are kept in a file, but neither DILT_CACHE nor HOME is set; set one to a folder".into())
        })?;
        Self::open(&folder.join("tuning.json"))
    }

    /// A file, which need not exist.
    ///
    /// # Errors
    /// [`Error::File`] if it is there but cannot be read, or holds something else.
    pub fn open(path: &Path) -> Result<Self> {
        let damaged = |problem: String| Error::file(path, format!("{problem}; remove it to take the times again"));
        let taken = match std::fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(Error::file(path, error)),
        };
        Ok(Tuning(Arc::new(Mutex::new(Times { path: path.to_owned(), taken }))))
    }

    /// The times of a layer, taken now if they are not in the file.
    fn seconds(&self, device: &Device, layer: &MaskedLayer, train: bool) -> Result<Vec<f64>> {
        let mut times = self.0.lock().expect("no thread has panicked with it");
        let key = key(device, layer, train);
        if !times.taken.contains_key(&key) {
            let seconds = measure(device, layer, train)?;
            times.taken.insert(key.clone(), Way::ALL.into_iter().zip(seconds).collect());
            times.save()?;
        }
        let taken = &times.taken[&key];
        Way::ALL.map(|way| taken.get(&way).copied()).into_iter().collect::<Option<Vec<f64>>>().ok_or_else(|| {
            Error::file(&times.path, format!("{key}: a way has no time; remove the file to take the times again"))
        })
    }
}

impl Times {
    fn save(&self) -> Result<()> {
        let failed = |error: std::io::Error| Error::file(&self.path, error);
        let folder = self.path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(failed)?;
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
        serde_json::to_writer_pretty(&mut file, &self.taken).map_err(|error| Error::file(&self.path, error))?;
        file.persist(&self.path).map_err(|error| failed(error.error))?;
        Ok(())
    }
}

/// What times depend on: the device and its threads, the layer, the passes, and a hash of the mask.
fn key(device: &Device, layer: &MaskedLayer, train: bool) -> String {
    let device = format!("{}, {:?}, {} threads", device.description(), device.policy(), rayon::current_num_threads());
    let mut hash = Sha256::new();
    layer.places().iter().for_each(|place| hash.update(place.to_le_bytes()));
    let mask: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let passes = if train { "training" } else { "evaluation" };
    format!("{device}: {}, {passes}, mask {mask}", layer.shape())
}
