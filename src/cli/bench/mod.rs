//! `dilt bench`: what a ticket gains over its dense network, and where.

mod op;
mod operations;
mod step;
mod tickets;
mod traffic;

use std::path::PathBuf;

use clap::Args;
use dilt::device::{Device, Event, Precision};
use dilt::mask::Mask;
use dilt::mask::set::MaskSet;
use dilt::nn::init;
use dilt::nn::layout::Layout;
use dilt::nn::model::{Layer, Model};
use dilt::nn::network::{Mode, Network};
use dilt::nn::paths::measure;
use dilt::nn::plan::Use;
use dilt::nn::roofline::Ceilings;
use dilt::nn::traffic::{LayerWork, evaluation, training_step};
use dilt::nn::ways::{Lists, MaskedLayer, Way};
use dilt::nn::weights::Weights;
use dilt::ops::kept::{Pass, group_rows};
use dilt::report::table::table;
use dilt::ticket::streams;
use dilt::train::{MOST_SAMPLES, Recipe};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use step::Trained;

use crate::cli::{Common, ModelAndData};

/// Measure a network, or a ticket beside its dense network: a training step, an evaluated batch, memory; with --plan
/// layer by layer; with --bytes what it has to compute and to move; with --op a single operation.
///
/// A step is forward pass, loss, backward pass and optimizer on random numbers, captured once and replayed, without loading
/// data. The ticket and its dense network take turns; times are medians.
///
/// Beside them stand two shares of what this device does at best, which is measured first, in a fraction of a second: the
/// operations of the work, of those that multiply-adds in registers (bf16 on a GPU: mma.sync) would do in its time; and the
/// least time of its layers, each by its operations or by its bytes at the speed of a copy, whichever is longer, of the time
/// that it takes. What caches keep moves faster than a copy, so the second may be above 1.
#[derive(Args)]
pub struct Bench {
    /// The ticket, or weights trained under one.
    #[arg(long, value_name = "FILE", alias = "weights")]
    ticket: Option<PathBuf>,
    /// Instead of a file: initial weights, of whose prunable tensors this share is pruned at random.
    #[arg(long, value_name = "SPARSITY", conflicts_with = "ticket")]
    random_ticket: Option<f64>,
    /// Show how each layer with a mask multiplies: the way that was chosen, what it is predicted and each way is measured to
    /// take for a step's three passes together; with --json pass by pass.
    #[arg(long)]
    plan: bool,
    /// Show the kernels of a training step, each with the number of its launches and their time.
    #[arg(long)]
    kernels: bool,
    /// Show what a training step has to compute and to move, in all and layer by layer, or what an operation has to, counted
    /// from shapes: nothing is measured.
    #[arg(long, conflicts_with_all = ["plan", "kernels"])]
    bytes: bool,
    /// Measure steps of so many such networks too, 2 to 32: side by side, each on a stream of its own, and together, what they
    /// launch alike as one launch; what --streams and --array of dilt find do.
    #[arg(long, value_name = "K", allow_negative_numbers = true, conflicts_with_all = ["bytes", "op"])]
    pub tickets: Option<usize>,
    /// Measure one operation by itself, on random numbers and with cold caches; list shows them all with their sizes.
    #[arg(long, value_name = "NAME", conflicts_with_all = [
        "ticket", "random_ticket", "plan", "kernels", "batch", "model", "set", "image_size", "data",
    ])]
    op: Option<String>,
    /// Sizes of the operation, each its own default if not given.
    #[arg(long, value_name = "KEY=SIZE,...", value_delimiter = ',', requires = "op")]
    shape: Vec<String>,
    /// Samples of a batch.
    #[arg(long, default_value_t = 128)]
    batch: usize,
    /// Steps of which the median is taken, 10 if not given; of an operation, 30.
    #[arg(long)]
    runs: Option<usize>,
    #[command(flatten)]
    target: ModelAndData,
    #[command(flatten)]
    common: Common,
}

#[derive(Serialize)]
struct Measured {
    /// The whole step first.
    rows: Vec<Row>,
    model: String,
    batch: usize,
    density: f64,
    precision: Precision,
    device: String,
    threads: usize,
    /// Of the choices: runs with other ones have other bits.
    plan: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    layers: Vec<LayerPlan>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    kernels: Vec<KernelTime>,
    bytes: Bytes,
    ceilings: Ceilings,
}

/// A share, for people.
fn share(share: f64) -> String {
    format!("{share:.3}")
}

/// A kernel of a training step, outside of a captured one, waited for after each launch.
#[derive(Serialize)]
struct KernelTime {
    name: &'static str,
    launches: usize,
    ms: f64,
}

/// What the network, or the ticket, takes, or several of it; and its dense network beside it.
#[derive(Serialize)]
struct Row {
    name: String,
    /// That are at work at a time.
    networks: usize,
    images_per_second: f64,
    ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    dense_ms: Option<f64>,
    /// Floating point operations that are multiplied, two a multiply-add; where a ticket multiplies all weights, with those
    /// that are zero.
    flop: usize,
    /// Of the arithmetic ceiling.
    share_of_ceiling: f64,
    /// The least time of all layers by both ceilings, of the time.
    share_of_roofline: f64,
}

/// Memory of training.
#[derive(Serialize)]
struct Bytes {
    #[serde(skip_serializing_if = "Option::is_none")]
    dense: Option<usize>,
    planned: usize,
    lists: usize,
}

/// A layer that multiplies under a mask.
#[derive(Serialize)]
struct LayerPlan {
    name: String,
    /// What is left of the layer without the features that do not matter.
    shape: String,
    density: f64,
    /// Of forward pass, input gradient and weight gradient.
    chosen: Vec<Way>,
    bytes: usize,
    ways: Vec<WayPlan>,
}

/// What a way takes for forward pass, input gradient and weight gradient.
#[derive(Serialize)]
struct WayPlan {
    way: Way,
    /// On one core, or on the GPU that the table was measured on.
    predicted_ms: Vec<f64>,
    measured_ms: Vec<f64>,
}

impl LayerPlan {
    /// The sum over the passes of what each takes in its way, of a kind of time.
    fn ms(&self, of: impl Fn(&WayPlan) -> &[f64], way: impl Fn(usize) -> Way) -> f64 {
        let ms = |pass: usize| {
            let way = way(pass);
            self.ways
                .iter()
                .find(|other| other.way == way)
                .and_then(|other| of(other).get(pass).copied())
                .unwrap_or(f64::NAN)
        };
        (0..self.chosen.len()).map(ms).sum()
    }
}

impl Bench {
    pub fn run(&self) -> anyhow::Result<()> {
        if !(1..=MOST_SAMPLES).contains(&self.batch) || self.runs == Some(0) {
            let (batch, runs) = (self.batch, self.runs());
            let message =
                format!("expected --batch from 1 to {MOST_SAMPLES} and --runs of at least 1, got {batch}, {runs}");
            return Err(dilt::Error::Usage(message).into());
        }
        if let Some(count) = self.tickets.filter(|count| !(2..=streams::MOST).contains(count)) {
            let message = format!("--tickets: expected a number from 2 to {}, got {count}", streams::MOST);
            return Err(dilt::Error::Usage(message).into());
        }
        if let Some(op) = &self.op {
            return op::run(op, &self.shape, self.runs.unwrap_or(30), self.bytes, &self.common);
        }
        let file = self.ticket.as_deref().map(Weights::load).transpose()?;
        let (config, _) = self.target.load(file.as_ref(), &self.common)?;
        let model = config.build()?;
        let recipe = Recipe::from_table(&config.train)?;
        let dense = init::draw(&model, self.common.seed);
        let weights = match (&self.ticket, file) {
            (Some(path), Some(file)) => self.target.fitted(path, file, &config, &model)?,
            _ => self.random(&model, dense.clone())?,
        };
        self.common.warn_of_empty_layers(&weights);
        let device = self.common.open()?;
        let (training, planning) = (Use::Train(recipe.optimizer), self.common.planning()?);
        let layout = |memory_for| Layout::new(&device, &model, &weights.masks, self.batch, memory_for, &planning);
        let clip = recipe.clip_norm.is_some();
        let step_work = training_step(&device, &layout(training)?, self.batch, training, clip)?;
        if self.bytes {
            return traffic::show(&step_work, &model, self.batch, &device, &self.common);
        }
        let evaluation_work = evaluation(&device, &layout(Use::Evaluate)?, self.batch)?;
        let ceilings = Ceilings::measure(&device, self.common.precision())?;
        // The network itself last; before it, of a ticket, its dense network.
        let tickets: Vec<&Weights> = if weights.masks.is_empty() { vec![&weights] } else { vec![&dense, &weights] };
        let to_train = |device: &Device, weights: &Weights| -> anyhow::Result<Trained> {
            Ok(Trained::new(self.network(device, &model, weights, training)?, &model, self.batch)?)
        };
        let mut trained: Vec<_> = tickets.iter().map(|weights| to_train(&device, weights)).collect::<Result<_, _>>()?;
        let network = &trained.last().expect("one at least").network;
        let layers = if self.plan { self.layers(&device, &model, network, &weights)? } else { Vec::new() };
        let plan = network.choices_hash();
        let bytes = Bytes {
            dense: (trained.len() > 1).then(|| trained[0].network.plan().bytes),
            planned: network.plan().bytes,
            lists: network.list_bytes(),
        };
        let train = |trained: &mut Trained| trained.step(&recipe);
        let step_work = step_work.iter().collect::<Vec<_>>();
        let step = self.row("training step", &device, &mut trained, train, &step_work, &ceilings)?;
        let last = trained.last_mut().expect("one at least");
        let kernels = if self.kernels { kernel_times(&device, || train(last))? } else { Vec::new() };
        drop(trained);
        let mut rows = vec![step];
        if let Some(count) = self.tickets {
            let open = |_| to_train(&device.with_policy(device.policy())?, &weights);
            let mut trained = (0..count).map(open).collect::<anyhow::Result<Vec<_>>>()?;
            let times = tickets::measure(&device, &mut trained, self.runs(), train)?;
            for (how, ms) in ["side by side", "together"].into_iter().zip(times) {
                rows.push(self.timed(format!("{count} steps {how}"), count, ms, &step_work, &ceilings));
            }
        }
        let evaluated = tickets.iter().map(|weights| self.network(&device, &model, weights, Use::Evaluate));
        let mut evaluated: Vec<_> = evaluated.collect::<Result<_, _>>()?;
        let forward = |network: &mut Network| network.forward(Mode::Evaluate);
        let evaluation_work = evaluation_work.iter().collect::<Vec<_>>();
        rows.push(self.row("evaluation", &device, &mut evaluated, forward, &evaluation_work, &ceilings)?);
        let masks = MaskSet::of_weights(&weights.masks);
        let result = Measured {
            rows,
            model: model.name.clone(),
            batch: self.batch,
            density: masks.density(),
            precision: self.common.precision(),
            device: device.description(),
            threads: rayon::current_num_threads(),
            plan,
            layers,
            kernels,
            bytes,
            ceilings,
        };
        self.common.print(&result, to_table)
    }

    fn runs(&self) -> usize {
        self.runs.unwrap_or(10)
    }

    /// Initial weights under random masks, if they are asked for.
    fn random(&self, model: &Model, mut weights: Weights) -> dilt::Result<Weights> {
        let Some(sparsity) = self.random_ticket else { return Ok(weights) };
        if !(0.0..=1.0).contains(&sparsity) {
            return Err(dilt::Error::Usage(format!("--random-ticket: expected a share from 0 to 1, got {sparsity}")));
        }
        let mut rng = ChaCha8Rng::seed_from_u64(self.common.seed);
        let mut mask = |shape: &[usize]| Mask::from_fn(shape, |_| !rng.random_bool(sparsity));
        weights.masks = model.prunable().map(|parameter| (parameter.name.clone(), mask(&parameter.shape))).collect();
        Ok(weights)
    }

    /// A network with weights and a batch of random numbers.
    fn network(&self, device: &Device, model: &Model, weights: &Weights, memory_for: Use) -> anyhow::Result<Network> {
        let planning = self.common.planning()?;
        let mut network = Network::for_masks(device, model, &weights.masks, self.batch, memory_for, &planning)?;
        network.load(weights)?;
        let mut rng = ChaCha8Rng::seed_from_u64(self.common.seed);
        let mut random = |len: usize| (0..len).map(|_| rng.random_range(-1.0..1.0)).collect::<Vec<f32>>();
        let batch = network.batch();
        device.write(&[self.batch as u32], batch.current.count)?;
        device.write_reals(&random(batch.x.len()), batch.x)?;
        Ok(network)
    }

    /// Medians of what the networks take in turn for a piece of work, which is captured; `layers` is what the last of them
    /// has to do in it. All replays are under way before the first time is read: a GPU that waits for them would be measured
    /// with the launch.
    fn row<T>(
        &self,
        name: &'static str,
        device: &Device,
        networks: &mut [T],
        mut work: impl FnMut(&mut T) -> dilt::Result<()>,
        layers: &[&LayerWork],
        ceilings: &Ceilings,
    ) -> anyhow::Result<Row> {
        let mut graphs = Vec::new();
        for network in networks {
            // Once without capture, so that everything is loaded.
            work(network)?;
            graphs.push((device.capture(|| work(network))?, Vec::new()));
        }
        for _ in 0..=self.runs() {
            for (graph, taken) in &mut graphs {
                let begin = device.event()?;
                graph.replay()?;
                taken.push([begin, device.event()?]);
            }
        }
        // The first is for the caches.
        let ms = |[begin, end]: &[Event; 2]| end.elapsed_ms(begin);
        let medians =
            graphs.iter().map(|(_, taken)| Ok(median(taken[1..].iter().map(ms).collect::<dilt::Result<_>>()?)));
        let mut medians: Vec<f64> = medians.collect::<dilt::Result<_>>()?;
        let ms = medians.pop().expect("one network at least");
        Ok(Row { dense_ms: medians.pop(), ..self.timed(name.into(), 1, ms, layers, ceilings) })
    }

    /// What it means that `networks` of them took so long for what one of them has to do in `layers`.
    fn timed(&self, name: String, networks: usize, ms: f64, layers: &[&LayerWork], ceilings: &Ceilings) -> Row {
        let flop = networks * layers.iter().map(|layer| layer.total().flop).sum::<usize>();
        let roofline = networks as f64 * ceilings.roofline(layers.iter().copied());
        Row {
            name,
            networks,
            images_per_second: 1e3 * (networks * self.batch) as f64 / ms,
            ms,
            dense_ms: None,
            flop,
            share_of_ceiling: ceilings.share(flop, ms / 1e3),
            share_of_roofline: roofline / (ms / 1e3),
        }
    }

    fn layers(
        &self,
        device: &Device,
        model: &Model,
        network: &Network,
        weights: &Weights,
    ) -> anyhow::Result<Vec<LayerPlan>> {
        let progress = self.common.progress();
        let masked = network.choices().iter().flatten().count();
        let bar = progress.layers("ways to multiply", masked);
        let mut layers = Vec::new();
        for (layer, choice) in network.computed().layers.iter().zip(network.choices()) {
            let (Some(choice), Layer::Conv { weight, .. }) = (choice, layer) else { continue };
            let parameter = &network.computed().parameters[*weight];
            let mask = network.compaction().mask(*weight, &parameter.shape, &weights.masks[&parameter.name]);
            let shape = network.computed().conv_shape(layer, self.batch.next_multiple_of(8))?;
            let rows = group_rows(device, &shape, model.precision);
            let own = MaskedLayer::new(&shape, model.precision, &mask, rows);
            let measured = measure(device, &own, &Pass::ALL)?;
            let packed = choice.needs_kept_alone();
            let weight_bytes = 4 * if packed { mask.count() } else { mask.len() };
            let lists = Lists::new(device, &own, &choice.ways, packed)?;
            let ms = |seconds: &[f64]| seconds.iter().map(|seconds| 1e3 * seconds).collect();
            let ways = choice.candidates.iter().zip(measured).map(|(candidate, measured)| WayPlan {
                way: candidate.way,
                predicted_ms: ms(&candidate.predicted),
                measured_ms: ms(&measured),
            });
            layers.push(LayerPlan {
                name: model.parameters[*weight].name.clone(),
                shape: shape.to_string(),
                density: mask.density(),
                chosen: choice.ways.clone(),
                bytes: weight_bytes + lists.bytes(),
                ways: ways.collect(),
            });
            bar.show_count(layers.len());
        }
        Ok(layers)
    }
}

fn median(mut taken: Vec<f64>) -> f64 {
    taken.sort_by(f64::total_cmp);
    taken[taken.len() / 2]
}

/// The kernels of some work, the longest first.
fn kernel_times(device: &Device, work: impl FnOnce() -> dilt::Result<()>) -> dilt::Result<Vec<KernelTime>> {
    let (traced, result) = device.trace(work);
    result?;
    let mut kernels: Vec<KernelTime> = Vec::new();
    for launch in traced {
        let ms = launch.ms.unwrap_or(0.0);
        match kernels.iter_mut().find(|kernel| kernel.name == launch.kernel) {
            Some(kernel) => (kernel.launches, kernel.ms) = (kernel.launches + 1, kernel.ms + ms),
            None => kernels.push(KernelTime { name: launch.kernel, launches: 1, ms }),
        }
    }
    kernels.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    Ok(kernels)
}

fn to_table(result: &Measured) -> String {
    let mut text = String::new();
    if !result.kernels.is_empty() {
        let row = |kernel: &KernelTime| {
            [kernel.name.to_owned(), kernel.launches.to_string(), format!("{:.3}", kernel.ms)].to_vec()
        };
        text += &format!("{}\n\n", table(&["kernel", "launches", "ms"], result.kernels.iter().map(row)));
    }
    if !result.layers.is_empty() {
        let number = |ms: f64| if ms.is_nan() { "-".into() } else { format!("{ms:.3}") };
        let rows = result.layers.iter().map(|layer| {
            let measured = |way: Way| layer.ms(|way| &way.measured_ms, |_| way);
            let own = layer.ms(|way| &way.measured_ms, |pass| layer.chosen[pass]);
            let predicted = layer.ms(|way| &way.predicted_ms, |pass| layer.chosen[pass]);
            let mut row = vec![layer.name.clone(), layer.shape.clone(), format!("{:.3}", layer.density)];
            row.extend(layer.chosen.iter().map(|way| way.name().to_owned()));
            row.extend([(layer.bytes / 1024).to_string(), number(predicted), number(own)]);
            row.push(format!("{:.2}", measured(Way::Dense) / own));
            row.extend(Way::ALL.map(|way| number(measured(way))));
            row
        });
        let columns = [
            "layer",
            "shape",
            "density",
            "forward",
            "dx",
            "dw",
            "KiB",
            "predicted ms",
            "measured ms",
            "gain",
            "dense ms",
            "groups ms",
            "direct ms",
        ];
        text += &format!("{}\n\n", table(&columns, rows));
    }
    let Bytes { dense, planned, lists } = result.bytes;
    let mib = |bytes: usize| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let rows = result.rows.iter().map(|row| {
        let numbers = [
            format!("{:.2}", row.ms),
            format!("{:.0}", row.images_per_second),
            share(row.share_of_ceiling),
            share(row.share_of_roofline),
        ];
        let beside = row.dense_ms.map(|dense| [format!("{dense:.2}"), format!("{:.2}", dense / row.ms)]);
        [row.name.clone()].into_iter().chain(numbers).chain(beside.into_iter().flatten()).collect::<Vec<_>>()
    });
    let mut columns = vec!["", "ms", "images/s", "of ceiling", "of roofline"];
    if dense.is_some() {
        columns.extend(["dense ms", "gain"]);
    }
    text += &table(&columns, rows);
    text += &format!(
        "\n\n{} at density {:.4}, batch {}, {} ({} threads);{}\nmeasured ceilings: {}\nmemory of training: {} and {} of lists",
        result.model,
        result.density,
        result.batch,
        result.device,
        result.threads,
        if result.device.starts_with("host") { " predictions are of one core" } else { "" },
        result.ceilings,
        mib(planned),
        mib(lists)
    );
    if let Some(dense) = dense {
        text += &format!(", dense {}", mib(dense));
    }
    text + &format!("; plan {}", &result.plan[..12])
}
