//! Which way each pass of a layer multiplies under its mask: from a table of measured rates, or from times taken on the
//! spot.
//!
//! The bits of a training depend on the choice, so it is a function of shape, mask and policy alone; where it comes from
//! times, these are kept in a file ([`Tuning`]) and taken from there ever after.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::ways::{Lists, MaskedLayer, Trial, Way};
use crate::device::{Device, Policy, Precision};
use crate::error::{Error, Result};
use crate::ops::kept::{KeptWeights, Pass};

/// What a way takes in each pass: of one core, or of a GPU.
struct Rate {
    way: Way,
    costs: [Cost; 3],
}

/// Picoseconds of each multiply-add, of each value that is written, of the launch, and of each step that has to wait for
/// the one before it: what an output row multiplies.
struct Cost {
    multiply_add: f64,
    written: f64,
    launch: f64,
    step: f64,
}

/// The costs of the three passes, each in the order of [`Cost`]'s fields.
const fn rate(way: Way, [forward, input, weight]: [[f64; 4]; 3]) -> Rate {
    const fn cost([multiply_add, written, launch, step]: [f64; 4]) -> Cost {
        Cost { multiply_add, written, launch, step }
    }
    Rate { way, costs: [cost(forward), cost(input), cost(weight)] }
}

/// The host's rates for filters of several taps: least squares of relative errors over benches/crossover.rs on one core
/// of a Xeon with AVX-512 (benches/results/crossover-host-2026-11-24.csv). Single layers are up to half off, but the
/// order of the ways is that of the measured times.
const FILTERS: [Rate; 3] = [
    rate(Way::Dense, [[17.3, 0.0, 0.0, 0.0], [18.3, 0.0, 0.0, 0.0], [18.9, 0.0, 0.0, 0.0]]),
    rate(Way::Groups, [[19.1, 370.0, 0.0, 0.0], [17.5, 370.0, 0.0, 0.0], [22.2, 0.0, 0.0, 0.0]]),
    rate(Way::Direct, [[42.3, 290.0, 0.0, 0.0], [44.2, 290.0, 0.0, 0.0], [55.9, 0.0, 0.0, 0.0]]),
];

/// The same for filters of one tap.
const LINEAR: [Rate; 3] = [
    rate(Way::Dense, [[13.6, 490.0, 0.0, 0.0], [13.3, 490.0, 0.0, 0.0], [15.8, 0.0, 0.0, 0.0]]),
    rate(Way::Groups, [[20.6, 340.0, 0.0, 0.0], [17.4, 340.0, 0.0, 0.0], [28.7, 0.0, 0.0, 0.0]]),
    rate(Way::Direct, [[36.8, 270.0, 0.0, 0.0], [41.0, 270.0, 0.0, 0.0], [60.0, 0.0, 0.0, 0.0]]),
];

/// The same in bf16 (`scripts/fit_rates.py benches/results/crossover-host-bf16-2026-11-27.csv`; the machine was busy with
/// other work), where groups are faster than dense products of as many weights. Of 831 passes there, four take a way that is
/// slower than the dense one, by 1 to 26 %.
const FILTERS_BF16: [Rate; 3] = [
    rate(Way::Dense, [[40.2, 0.0, 0.0, 0.0], [42.5, 0.0, 0.0, 0.0], [51.3, 0.0, 0.0, 0.0]]),
    rate(Way::Groups, [[28.0, 528.7, 0.0, 0.0], [26.4, 599.9, 0.0, 0.0], [53.0, 0.0, 0.0, 0.0]]),
    rate(Way::Direct, [[98.2, 264.8, 0.0, 0.0], [96.6, 324.9, 0.0, 0.0], [107.0, 0.0, 0.0, 0.0]]),
];
const LINEAR_BF16: [Rate; 3] = [
    rate(Way::Dense, [[51.2, 0.0, 0.0, 0.0], [51.3, 0.0, 0.0, 0.0], [50.8, 0.0, 0.0, 0.0]]),
    rate(Way::Groups, [[37.0, 580.2, 0.0, 0.0], [36.6, 703.9, 0.0, 0.0], [67.0, 0.0, 0.0, 0.0]]),
    rate(Way::Direct, [[122.6, 300.4, 0.0, 0.0], [130.2, 304.2, 0.0, 0.0], [143.5, 0.0, 0.0, 0.0]]),
];

/// The same of an H200 (`scripts/fit_rates.py benches/results/gpu-2026-11-26/crossover.csv --gpu`). Of 831 passes there, eight
/// take a way that is slower than the dense one, by 3 to 25 %.
const GPU_FILTERS: [Rate; 3] = [
    rate(Way::Dense, [[0.0461, 7.936, 0.0, 26_150.0], [0.0511, 4.438, 5.27e6, 18_150.0], [0.0595, 0.0, 19.3e6, 694.0]]),
    rate(
        Way::Groups,
        [[0.0642, 0.903, 9.37e6, 79_630.0], [0.0592, 1.684, 4.17e6, 95_170.0], [0.1065, 0.0, 14.2e6, 0.0]],
    ),
    rate(
        Way::Direct,
        [[0.1822, 2.08, 9.65e6, 150_000.0], [0.172, 2.977, 4.32e6, 192_500.0], [0.4858, 0.0, 15.2e6, 0.0]],
    ),
];

/// The same for filters of one tap.
const GPU_LINEAR: [Rate; 3] = [
    rate(Way::Dense, [[0.0686, 0.0, 2.2e6, 31_420.0], [0.0726, 0.0, 3.2e6, 29_630.0], [0.0595, 0.0, 22.1e6, 0.0]]),
    rate(
        Way::Groups,
        [[0.0701, 1.171, 10.2e6, 112_500.0], [0.0752, 1.449, 6.05e6, 134_000.0], [0.1267, 0.0, 10.3e6, 2190.0]],
    ),
    rate(
        Way::Direct,
        [[0.2079, 1.862, 9.61e6, 194_200.0], [0.2385, 3.128, 5.94e6, 252_000.0], [0.5271, 0.0, 11.8e6, 0.0]],
    ),
];

/// A way is taken if its predicted time is below this share of the dense one's: on the host, where the table is closer,
/// and on a GPU.
const WORTH: f64 = 0.9;
const WORTH_ON_GPU: f64 = 0.85;

/// A way that the passes of a layer can take.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The way.
    pub way: Way,
    /// Seconds of each pass by the table, on one core or on the GPU that it was measured on; none if nobody has measured
    /// this precision on this kind of device.
    pub predicted: Vec<f64>,
    /// Seconds of each pass as they were measured here; none if they were not.
    pub measured: Vec<f64>,
}

/// How a layer multiplies.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The way of each pass, in the order of [`Pass::ALL`]; of evaluation, of the first alone.
    pub ways: Vec<Way>,
    /// What could be chosen, in the order of [`Way::ALL`].
    pub candidates: Vec<Candidate>,
}

impl Choice {
    /// Of each pass the best candidate: by measured times where there are any, else by predicted ones. Dense, unless
    /// another is known to be faster.
    fn among(candidates: Vec<Candidate>, passes: &[Pass], policy: Policy) -> Self {
        let worth = if policy == Policy::Staged { WORTH_ON_GPU } else { WORTH };
        let seconds = |candidate: &Candidate, pass: usize| match candidate.measured.get(pass) {
            Some(measured) => *measured,
            None => {
                let predicted = candidate.predicted.get(pass).copied().unwrap_or(f64::INFINITY);
                predicted * if candidate.way == Way::Dense { worth } else { 1.0 }
            }
        };
        let best = |pass: usize| {
            let faster = |best, other| if seconds(other, pass) < seconds(best, pass) { other } else { best };
            candidates.iter().reduce(faster).expect("dense is one").way
        };
        Choice { ways: (0..passes.len()).map(best).collect(), candidates }
    }

    /// Whether no pass multiplies all weights: their kept ones are all that memory needs to hold.
    pub fn needs_kept_alone(&self) -> bool {
        !self.ways.contains(&Way::Dense)
    }

    /// The ways as tables name them: of all passes, or one after the other.
    pub fn name(&self) -> String {
        let mut names: Vec<&str> = self.ways.iter().map(|way| way.name()).collect();
        if names.iter().all(|name| *name == names[0]) {
            names.truncate(1);
        }
        names.join(", ")
    }
}

/// A layer that multiplies under a mask, and how; memory holds its kept weights alone (`packed`) or all of them.
pub(super) struct PlannedLayer {
    pub(super) layer: MaskedLayer,
    pub(super) choice: Choice,
    pub(super) packed: bool,
}

impl PlannedLayer {
    /// The lists of its passes.
    pub(super) fn lists(&self, device: &Device) -> Result<Lists> {
        Lists::new(device, &self.layer, &self.choice.ways, self.packed)
    }
}

/// What layers choose by.
#[derive(Clone, Default)]
pub enum Planning {
    /// A table of rates that were measured once.
    #[default]
    Table,
    /// Times of this machine.
    Times(Tuning),
    /// Nothing: each layer takes this way where it can, else the dense one. What the other ways are compared with.
    Only(Way),
}

/// The choice for a layer.
pub(super) fn choose(device: &Device, layer: &MaskedLayer, passes: &[Pass], planning: &Planning) -> Result<Choice> {
    let candidate = |way| {
        let predicted = passes.iter().filter_map(|pass| predicted(device.policy(), layer, way, *pass)).collect();
        Candidate { way, predicted, measured: Vec::new() }
    };
    let only = match planning {
        _ if !KeptWeights::reach(layer.shape()) => Some(Way::Dense),
        Planning::Only(way) => Some(*way),
        _ => None,
    };
    if let Some(way) = only {
        return Ok(Choice::among(vec![candidate(way)], passes, device.policy()));
    }
    let mut candidates: Vec<Candidate> = Way::ALL.into_iter().map(candidate).collect();
    if let Planning::Times(tuning) = planning {
        for (candidate, seconds) in candidates.iter_mut().zip(tuning.seconds(device, layer, passes)?) {
            candidate.measured = seconds;
        }
    }
    Ok(Choice::among(candidates, passes, device.policy()))
}

/// Seconds of a pass of a layer, where there is a table.
fn predicted(policy: Policy, layer: &MaskedLayer, way: Way, pass: Pass) -> Option<f64> {
    let shape = layer.shape();
    let linear = shape.weight_len() == shape.filters() * shape.channels();
    let table = match (policy, layer.precision(), linear) {
        (Policy::Direct, Precision::F32, false) => &FILTERS,
        (Policy::Direct, Precision::F32, true) => &LINEAR,
        (Policy::Direct, Precision::Bf16, false) => &FILTERS_BF16,
        (Policy::Direct, Precision::Bf16, true) => &LINEAR_BF16,
        (Policy::Staged, Precision::F32, false) => &GPU_FILTERS,
        (Policy::Staged, Precision::F32, true) => &GPU_LINEAR,
        // Not measured yet.
        (Policy::Staged, Precision::Bf16, _) => return None,
    };
    let rate = table.iter().find(|rate| rate.way == way).expect("the table has every way");
    let columns = shape.multiply_adds() / shape.weight_len();
    let multiplied = layer.multiplied(way)[pass as usize];
    let (written, rows) = match pass {
        Pass::Forward => (shape.output_len(), shape.filters()),
        Pass::InputGradient => (shape.input_len(), shape.channels()),
        Pass::WeightGradient => (0, shape.filters()),
    };
    let Cost { multiply_add, written: value, launch, step } = rate.costs[pass as usize];
    let steps = multiplied as f64 / rows as f64;
    Some(1e-12 * ((multiplied * columns) as f64 * multiply_add + written as f64 * value + launch + steps * step))
}

/// Seconds of passes in each way, the least of several runs that alternate.
///
/// # Errors
/// [`Error::Device`] when memory runs out, [`Error::Launch`] if the device fails.
pub fn measure(device: &Device, layer: &MaskedLayer, passes: &[Pass]) -> Result<Vec<Vec<f64>>> {
    /// Runs at most, after one that is not counted.
    const RUNS: usize = 5;
    /// A layer that has taken so long has one run that counts, and no more.
    const LONG: Duration = Duration::from_millis(500);
    let mut trial = Trial::new(device, layer.shape(), layer.precision())?;
    let mut ways = Vec::new();
    for way in Way::ALL {
        ways.push((layer.lists(device, way, passes, false)?, vec![f64::INFINITY; passes.len()]));
    }
    let start = Instant::now();
    for run in 0..=RUNS {
        if run > 1 && start.elapsed() > LONG {
            break;
        }
        for (lists, least) in &mut ways {
            let seconds = trial.time(lists.as_mut(), passes)?;
            if run > 0 {
                least.iter_mut().zip(seconds).for_each(|(least, seconds)| *least = least.min(seconds));
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
    /// Seconds of each pass.
    taken: BTreeMap<String, BTreeMap<Way, Vec<f64>>>,
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
    fn seconds(&self, device: &Device, layer: &MaskedLayer, passes: &[Pass]) -> Result<Vec<Vec<f64>>> {
        let mut times = self.0.lock().expect("no thread has panicked with it");
        let key = key(device, layer, passes);
        if !times.taken.contains_key(&key) {
            let seconds = measure(device, layer, passes)?;
            times.taken.insert(key.clone(), Way::ALL.into_iter().zip(seconds).collect());
            times.save()?;
        }
        let taken = &times.taken[&key];
        let of = |way| taken.get(&way).filter(|seconds| seconds.len() == passes.len()).cloned();
        Way::ALL.map(of).into_iter().collect::<Option<Vec<_>>>().ok_or_else(|| {
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
fn key(device: &Device, layer: &MaskedLayer, passes: &[Pass]) -> String {
    let device = format!("{}, {:?}, {} threads", device.description(), device.policy(), rayon::current_num_threads());
    let mut hash = Sha256::new();
    layer.places().iter().for_each(|place| hash.update(place.to_le_bytes()));
    let mask: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let passes = if passes.len() > 1 { "training" } else { "evaluation" };
    // What f32 was called before there was another.
    let precision = if layer.precision().is_f32() { "" } else { ", bf16" };
    format!("{device}: {}{precision}, {passes}, mask {mask}", layer.shape())
}
