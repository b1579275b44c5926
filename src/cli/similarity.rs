//! `dilt similarity`: how alike the layers of networks are.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, ValueEnum};
use dilt::device::Device;
use dilt::nn::config::ModelConfig;
use dilt::nn::model::Model;
use dilt::nn::network::Network;
use dilt::nn::plan::{Plan, Use};
use dilt::nn::weights::Weights;
use dilt::similarity::compare::{
    Comparing, EPSILON, ITERATIONS, MeasuredNetwork, Need, REFINE_UP_TO, STEPS, Similarity as Found, compare,
};
use dilt::similarity::distances::{Metric, measuring_bytes};
use dilt::similarity::gw::Options;
use dilt::similarity::output::Place;
use dilt::similarity::representations::{FileTensor, Measuring, Output, check_patterns, outputs, tensors_of};
use dilt::similarity::store::PairStore;
use dilt::train::{Images, Labelled, MOST_SAMPLES};
use serde::Serialize;

use super::eval::Split;
use super::{Common, ModelAndData};

/// Memory that pairs may take together without --limit-memory: more would only make a kill lose more of them.
const MOST_FOR_PAIRS: usize = 1 << 30;

/// Compare layers by how far apart they hold the same probe images: Gromov-Wasserstein between the distance matrices, and
/// beside it linear CKA and the value of the identity coupling; then group layers into modules.
///
/// Layers of networks (--weights, masks applied) all see the same probes: the first of the split in file order, of a folder
/// the first of each class in turn. Layers of files (--representations) come from any framework. Of several networks or
/// files, names begin with the file's: core/layer1.0.
///
/// A comparison that was stopped goes on when the same command is given again, if it has --out: finished pairs are kept
/// there.
#[derive(Args)]
pub struct Similarity {
    /// Weights or a ticket of a network; may be given several times.
    #[arg(long, value_name = "FILE", alias = "ticket", required_unless_present = "representations")]
    weights: Vec<PathBuf>,
    /// A safetensors file of matrices [probes, features], F32, F64, F16 or BF16, more axes flattened after the first; may be
    /// given several times.
    #[arg(long, value_name = "FILE")]
    representations: Vec<PathBuf>,
    /// Layers whose names match (* and ?); may be given several times. Without it, of networks what the first block reads,
    /// the output of each block (layer1.0, blocks.3) and the logits; of files everything. '*' is every output.
    #[arg(long, value_name = "PATTERN")]
    layers: Vec<String>,
    /// Probe images of networks.
    #[arg(long, value_name = "N", default_value_t = 512)]
    probes: usize,
    /// The split that they come from.
    #[arg(long, value_enum, default_value = "test")]
    split: Split,
    /// Average networks' outputs over pixels or tokens before distances are taken.
    #[arg(long, requires = "weights")]
    pool: bool,
    /// Distances between probes; CKA is always of Euclidean ones.
    #[arg(long, value_enum, default_value = "euclidean")]
    distance: Distance,
    /// Number of modules; chosen by the largest gap between eigenvalues if not given.
    #[arg(long, value_name = "K")]
    clusters: Option<usize>,
    /// Scale of the affinity exp(-GW / S); the median over pairs if not given.
    #[arg(long, value_name = "S", allow_negative_numbers = true)]
    sigma: Option<f64>,
    #[command(flatten)]
    solver: Solver,
    /// Folder for matrices, heat maps and a page that shows them, and for finished pairs; or, for matrices alone, a file
    /// that ends with .json or .safetensors.
    #[arg(long, value_name = "DIR|FILE", help_heading = "Output")]
    out: Option<PathBuf>,
    /// Write the distance matrix of each layer to the safetensors file too.
    #[arg(long, requires = "out", help_heading = "Output")]
    save_distances: bool,
    /// Refuse to take more memory, in MiB; what is free if not given.
    #[arg(long, value_name = "MIB", help_heading = "Computing")]
    limit_memory: Option<usize>,
    #[command(flatten)]
    target: ModelAndData,
    #[command(flatten)]
    common: Common,
}

/// How pairs are solved.
#[derive(Args)]
struct Solver {
    /// Regularisation of the proximal steps.
    #[arg(long, default_value_t = EPSILON, allow_negative_numbers = true, help_heading = "Solver")]
    epsilon: f64,
    /// Proximal steps, at most.
    #[arg(long, default_value_t = STEPS, help_heading = "Solver")]
    steps: usize,
    /// Sinkhorn iterations of a step, at most.
    #[arg(long, default_value_t = ITERATIONS, help_heading = "Solver")]
    iterations: usize,
    /// Refine couplings exactly where both layers see at most N probes; 0 for none.
    #[arg(long, value_name = "N", default_value_t = REFINE_UP_TO, help_heading = "Solver")]
    refine_up_to: usize,
}

/// Distances between probes.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Distance {
    /// Length of the difference, divided by the largest.
    Euclidean,
    /// 1 - cosine, divided by the largest.
    Cosine,
}

/// A network before it has memory.
struct Planned {
    name: String,
    config: ModelConfig,
    model: Model,
    weights: Weights,
    outputs: Vec<Output>,
}

/// A file of representations.
struct File<'a> {
    name: String,
    path: &'a Path,
    tensors: Vec<FileTensor>,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    found: Found,
    device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    out: Option<String>,
}

impl Similarity {
    pub fn run(&self) -> anyhow::Result<()> {
        self.check()?;
        let progress = self.common.progress();
        let paths: Vec<&Path> = self.weights.iter().chain(&self.representations).map(PathBuf::as_path).collect();
        let names = names_of(&paths);
        let (of_weights, of_files) = names.split_at(self.weights.len());
        let networks = self.weights.iter().zip(of_weights).map(|(path, name)| self.plan(path, name));
        let networks = networks.collect::<anyhow::Result<Vec<_>>>()?;
        let files = self.representations.iter().zip(of_files).map(|(path, name)| {
            let tensors = tensors_of(path, &self.layers)?;
            Ok(File { name: name.clone(), path, tensors })
        });
        let files = files.collect::<dilt::Result<Vec<_>>>()?;
        let of_networks = networks.iter().flat_map(|network| network.outputs.iter().map(|output| output.name.as_str()));
        let of_files = files.iter().flat_map(|file| file.tensors.iter().map(|tensor| tensor.name.as_str()));
        check_patterns(&self.layers, of_networks.chain(of_files))?;
        let data = match networks.first() {
            Some(first) => Some(self.target.data(&first.config, Some(self.probes), &progress)?),
            None => None,
        };
        let n = data.as_ref().map_or(0, |data| self.split.of(data).len());
        if let Some(data) = data.as_ref().filter(|_| n < self.probes) {
            progress.say(&format!("{n} probes: all that the split {} of {} has", self.split.name(), data.name));
        }
        let images = data.as_ref().map_or(0, |data| n * data.stored.iter().product::<usize>());
        let device = self.common.open()?;
        let sizes: Vec<usize> = networks.iter().flat_map(|network| network.outputs.iter().map(|_| n)).collect();
        let sizes =
            [sizes, files.iter().flat_map(|file| file.tensors.iter().map(|tensor| tensor.n)).collect()].concat();
        if let Some(k) = self.clusters.filter(|&k| k > sizes.len()) {
            let layers = sizes.len();
            let message = format!("--clusters: expected at most {layers}, the number of layers, got {k}");
            return Err(dilt::Error::Usage(message).into());
        }
        let for_pairs =
            self.check_memory(&device, Self::measuring_bytes(&device, &networks, &files, images, n)?, &sizes)?;
        // Opened before anything is computed: if it cannot be, nothing is lost.
        let place = self.out.as_deref().map(Place::new);
        let mut store = place.as_ref().map(open_store).transpose()?;

        let measuring = Measuring { metric: self.distance.metric(), pooled: self.pool };
        let mut measured = Vec::new();
        if let Some(data) = &data {
            let split = self.split.of(data);
            let images = Images::new(&device, data, split)?;
            // Labels play no role: a network may have other outputs than the data has classes.
            let probes = Labelled::all(&device, &images, split, 0)?;
            for Planned { name, model, weights, outputs, .. } in &networks {
                let mut network = Network::new(&device, model, n, Use::Evaluate)?;
                network.load(weights)?;
                let title = format!("distances of {name}");
                let layers = measuring.network(&mut network, outputs, &probes, &progress, &title);
                measured.push(MeasuredNetwork { name: name.clone(), layers: layers.with_context(|| name.clone())? });
            }
        }
        for File { name, path, tensors } in &files {
            let layers = measuring.file(&device, path, tensors, &progress, &format!("distances of {name}"));
            measured.push(MeasuredNetwork { name: name.clone(), layers: layers.with_context(|| name.clone())? });
        }
        let solver = self.solver.options(for_pairs);
        let comparing =
            Comparing { measuring, solver, clusters: self.clusters, sigma: self.sigma, seed: self.common.seed };
        let found = compare(&device, &measured, &comparing, store.as_mut(), &progress, "pairs of layers")?;
        if let Some(place) = &place {
            place.write(&found, self.save_distances.then_some(&measured[..]))?;
        }
        let out = self.out.as_ref().map(|out| out.to_string_lossy().into_owned());
        let report = Report { found, device: device.description(), out };
        self.common.print(&report, |report| {
            let table = report.found.to_table();
            match &place {
                Some(place) => format!("{table}\n\n{}", place.shown().display()),
                None => table,
            }
        })
    }

    fn check(&self) -> dilt::Result<()> {
        let Solver { epsilon, steps, iterations, .. } = self.solver;
        let refuse = |text: String| Err(dilt::Error::Usage(text));
        if !(1..=MOST_SAMPLES).contains(&self.probes) {
            return refuse(format!("--probes: expected 1 to {MOST_SAMPLES}, got {}", self.probes));
        }
        if self.clusters == Some(0) {
            return refuse("--clusters: expected at least 1, got 0".into());
        }
        if self.save_distances && self.out.as_deref().is_some_and(|out| out.extension() == Some("json".as_ref())) {
            return refuse(
                "--save-distances: expected a folder or a .safetensors file as --out, got a .json file".into(),
            );
        }
        let positive = [("--sigma", self.sigma.unwrap_or(1.0)), ("--epsilon", epsilon)];
        if let Some((option, got)) = positive.iter().find(|(_, value)| !(value.is_finite() && *value > 0.0)) {
            return refuse(format!("{option}: expected a number above 0, got {got}"));
        }
        if steps == 0 || iterations == 0 {
            let got = format!("{steps} and {iterations}");
            return refuse(format!("--steps and --iterations: expected at least 1 of each, got {got}"));
        }
        Ok(())
    }

    /// Reads a network's weights and chooses its layers.
    fn plan(&self, path: &Path, name: &str) -> anyhow::Result<Planned> {
        let weights = Weights::load(path)?;
        let config = self.target.config(Some(&weights), &self.common)?;
        let model = config.build()?;
        let weights = self.target.fitted(path, weights, &config, &model)?;
        let outputs = outputs(&model, &self.layers).with_context(|| path.display().to_string())?;
        Ok(Planned { name: name.into(), config, model, weights, outputs })
    }

    /// Bytes while layers are measured, of the largest network or tensor.
    fn measuring_bytes(
        device: &Device,
        networks: &[Planned],
        files: &[File],
        images: usize,
        n: usize,
    ) -> dilt::Result<usize> {
        let mut most = 0;
        for Planned { model, outputs, .. } in networks {
            // As if each were copied, padding too: at most that.
            let scratch = |output: &Output| {
                let elements = model.values[model.layers[output.layer].output()].elements(n);
                size_of::<f32>() * elements + measuring_bytes(elements / n, n)
            };
            let scratch = outputs.iter().map(scratch).max().unwrap_or(0);
            most = most.max(Plan::new(device, model, n, Use::Evaluate)?.bytes + images + scratch);
        }
        for FileTensor { n, features, .. } in files.iter().flat_map(|file| &file.tensors) {
            // As it is read, in the order of the device, and there.
            most = most.max(3 * size_of::<f32>() * n * features + measuring_bytes(*features, *n));
        }
        Ok(most)
    }

    /// Says what memory is needed, and refuses what does not fit; returns what pairs may take.
    fn check_memory(&self, device: &Device, measuring: usize, sizes: &[usize]) -> dilt::Result<usize> {
        let per_layer = if self.distance == Distance::Cosine { 2 } else { 1 };
        let need = Need::new(sizes, per_layer, measuring);
        let mib = |bytes: usize| bytes.div_ceil(1 << 20);
        let [total, measuring, distances, pairs] = [need.total(), need.measuring, need.distances, need.pairs].map(mib);
        let said = format!(
            "{total} MiB: {distances} for the distances of {} layers, beside them first {measuring} while they are \
             measured, then at least {pairs} for pairs",
            sizes.len()
        );
        let limit = self.limit_memory.map(|mib| mib.saturating_mul(1 << 20)).or_else(|| device.free_memory());
        if let Some(limit) = limit.filter(|limit| need.total() > *limit) {
            let which = if self.limit_memory.is_some() { "--limit-memory allows" } else { "are free" };
            return Err(dilt::Error::Usage(format!(
                "not enough memory: expected at most {} MiB, which {which}, needed {said}; take fewer --probes or \
                 --layers, or raise --limit-memory",
                limit >> 20
            )));
        }
        self.common.progress().say(&format!("memory: {said}"));
        let left = limit.map_or(MOST_FOR_PAIRS, |limit| limit - need.distances);
        Ok(if self.limit_memory.is_some() { left } else { left.min(MOST_FOR_PAIRS).max(need.pairs) })
    }
}

impl Solver {
    fn options(&self, memory: usize) -> Options {
        let &Solver { epsilon, steps, iterations, refine_up_to } = self;
        Options { epsilon, steps, iterations, refine_up_to, memory }
    }
}

impl Distance {
    fn metric(self) -> Metric {
        match self {
            Distance::Euclidean => Metric::Euclidean,
            Distance::Cosine => Metric::Cosine,
        }
    }
}

/// Makes the folder, and opens the pairs in it, for this process alone.
fn open_store(place: &Place) -> dilt::Result<PairStore> {
    place.make_folder()?;
    let pairs = PairStore::open(&place.pairs())?;
    place.clean();
    Ok(pairs)
}

/// Short names for files: the first part of their paths, from the end, in which all differ, without ending; numbers if
/// there is none.
fn names_of(paths: &[&Path]) -> Vec<String> {
    let part = |path: &Path, from_end: usize| match from_end {
        0 => path.file_stem().map(|stem| stem.to_string_lossy().into_owned()),
        _ => path.iter().rev().nth(from_end).map(|part| part.to_string_lossy().into_owned()),
    };
    let deepest = paths.iter().map(|path| path.iter().count()).max().unwrap_or(0);
    for from_end in 0..deepest {
        let names: Vec<String> = paths.iter().filter_map(|path| part(path, from_end)).collect();
        let unique: std::collections::BTreeSet<&String> = names.iter().collect();
        if unique.len() == paths.len() {
            return names;
        }
    }
    (1..=paths.len()).map(|number| number.to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_called_by_what_tells_them_apart() {
        let names = |paths: &[&str]| names_of(&paths.iter().map(Path::new).collect::<Vec<_>>());
        assert_eq!(names(&["a/x.safetensors"]), ["x"]);
        assert_eq!(names(&["a/x.safetensors", "b/y.safetensors"]), ["x", "y"]);
        let run = ["r/seed_0/core/weights.safetensors", "r/seed_0/union/weights.safetensors"];
        assert_eq!(names(&run), ["core", "union"]);
        assert_eq!(names(&["x", "x"]), ["1", "2"]);
    }
}
