//! Whole training steps: ResNet-20 at batch 128 on images of 3x32x32, DeiT-Ti at batch 16 on 3x224x224, and ResNet-8 at
//! batch 64 on the digits; f32, each with its model file's optimizer. The first two also with random masks that keep a
//! tenth and a twentieth of each prunable tensor, and refilled ones of a tenth.
//!
//! `cargo bench --bench step`, on the device that `DILT_BENCH_DEVICE` names (auto, host, cuda; auto if not set). With
//! `-- --json` it prints one line of JSON instead, for scripts/bench-host.sh: median and best wall time, CPU time, and
//! the peak of resident memory beside what the plan holds.

mod cpu_time;

use std::time::Duration;

use cpu_time::cpu_time;
use criterion::{Criterion, Throughput};
use dilt::data::{DataSet, Examples, Pixels, Reading};
use dilt::device::Device;
use dilt::mask::Mask;
use dilt::mask::set::MaskSet;
use dilt::nn::config::ModelConfig;
use dilt::nn::init;
use dilt::nn::model::Model;
use dilt::nn::network::Network;
use dilt::nn::paths::Planning;
use dilt::nn::plan::Use;
use dilt::nn::weights::Weights;
use dilt::report::progress::{Progress, Verbosity};
use dilt::ticket::structure::{Scores, Structure, Structuring};
use dilt::train::{Augmentation, Chunk, Images, Labelled, Observer, Recipe, Training};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Steps of an epoch, which are done in one go.
const STEPS: usize = 4;

/// A model, its batch and the data that it steps over.
struct Case {
    name: &'static str,
    model: &'static str,
    batch: usize,
    data: DataSet,
    ticket: Ticket,
}

/// What is kept.
#[derive(Clone, Copy)]
enum Ticket {
    /// Everything.
    Dense,
    /// This share of each prunable tensor, at random.
    Random(f64),
    /// The rows that refill makes of such a ticket.
    Refilled(f64),
}

/// Random bytes as square images: the time of a step does not depend on what is in them.
fn random_images(batch: usize, size: usize, classes: usize) -> DataSet {
    let shape = [3, size, size];
    let mut state = 1u32;
    let mut byte = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let images = (0..batch * shape.iter().product::<usize>()).map(|_| byte()).collect();
    let train =
        Examples { images: Pixels::Bytes(images), labels: (0..batch as u32).map(|i| i % classes as u32).collect() };
    let (name, mean, std) = ("random".to_owned(), vec![0.5; 3], vec![0.25; 3]);
    let (test, val) = (train.clone(), Examples::default());
    DataSet { name, shape, stored: shape, classes, scale: 255.0, mean, std, train, val, test }
}

fn cases() -> Vec<Case> {
    let digits =
        dilt::data::load("digits", &Reading::default(), &Progress::new(Verbosity::Quiet)).expect("part of the program");
    let case = |name, model, batch, data: &DataSet, ticket| Case { name, model, batch, data: data.clone(), ticket };
    let (small, large) = (random_images(STEPS * 128, 32, 10), random_images(STEPS * 16, 224, 1000));
    let deit = "deit_tiny_patch16_224";
    vec![
        case("resnet20_batch128", "resnet20", 128, &small, Ticket::Dense),
        case("resnet20_batch128_tenth", "resnet20", 128, &small, Ticket::Random(0.1)),
        case("resnet20_batch128_twentieth", "resnet20", 128, &small, Ticket::Random(0.05)),
        case("resnet20_batch128_refill_tenth", "resnet20", 128, &small, Ticket::Refilled(0.1)),
        case("deit_tiny_batch16", deit, 16, &large, Ticket::Dense),
        case("deit_tiny_batch16_tenth", deit, 16, &large, Ticket::Random(0.1)),
        case("deit_tiny_batch16_twentieth", deit, 16, &large, Ticket::Random(0.05)),
        case("deit_tiny_batch16_refill_tenth", deit, 16, &large, Ticket::Refilled(0.1)),
        case("resnet8_digits_batch64", "resnet8", 64, &digits, Ticket::Dense),
    ]
}

impl Case {
    fn weights(&self, model: &Model) -> dilt::Result<Weights> {
        let mut weights = init::draw(model, 0);
        let (Ticket::Random(density) | Ticket::Refilled(density)) = self.ticket else { return Ok(weights) };
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let mut random = |shape: &[usize]| Mask::from_fn(shape, |_| rng.random_bool(density));
        let masks = MaskSet::new(model.prunable().map(|p| (p.name.clone(), random(&p.shape))).collect());
        weights.masks = masks.to_file();
        if let Ticket::Refilled(_) = self.ticket {
            let how = Structuring { method: Structure::Refill, growth: 0.1, group: 32, threshold: 1.5 };
            let refilled = how.apply(model, &masks, &Scores::L1(&weights.tensors))?;
            weights.masks = refilled.masks.to_file();
            weights.masks.extend(refilled.fixed);
        }
        Ok(weights)
    }

    /// Gives `work` a function that does so many epochs, and the bytes that the plan holds.
    fn run(&self, device: &Device, work: impl FnOnce(&mut dyn FnMut(usize) -> Duration, usize)) -> dilt::Result<()> {
        let config = ModelConfig::load(self.model, &[])?;
        let model = config.build()?;
        let (steps, lr, augment) = (Some(1 << 31), 1e-3, Augmentation::None);
        let recipe = Recipe { batch: self.batch, steps, lr, augment, ..Recipe::from_table(&config.train)? };
        let weights = self.weights(&model)?;
        let memory_for = Use::Train(recipe.optimizer);
        let mut network = Network::for_masks(device, &model, &weights.masks, self.batch, memory_for, &Planning::Table)?;
        network.load(&weights)?;
        let mut examples = self.data.train.clone();
        examples.truncate(STEPS * self.batch, self.data.shape.iter().product());
        let images = Images::new(device, &self.data, &examples)?;
        let labelled = Labelled::all(device, &images, &examples, self.data.classes)?;
        let bytes = network.plan().bytes;
        let mut training = Training::new(&mut network, &labelled, &recipe, 0)?;
        let mut from = 0;
        let mut epochs = |count: usize| {
            let mut clock = Clock { begin: None, epochs: count, device: device.clone(), time: Duration::ZERO };
            // The first epoch is let go by: the clock starts at its end. Stopping is an error of the observer.
            let stopped = training.run(&mut network, from, &mut clock);
            assert!(clock.epochs == 0, "{:?}", stopped.err());
            from += (count + 1) * STEPS;
            clock.time
        };
        epochs(1);
        work(&mut epochs, bytes);
        Ok(())
    }
}

/// Stops a training after some epochs, and measures them.
struct Clock {
    begin: Option<dilt::device::Event>,
    epochs: usize,
    device: Device,
    time: Duration,
}

impl Observer for Clock {
    fn chunk(&mut self, _: &Chunk, _: &Network, _: usize, _: usize) -> dilt::Result<()> {
        let now = self.device.event()?;
        let Some(begin) = &self.begin else {
            self.begin = Some(now);
            return Ok(());
        };
        self.epochs -= 1;
        if self.epochs > 0 {
            return Ok(());
        }
        self.time = Duration::from_secs_f64(now.elapsed_ms(begin)? / 1e3);
        Err(dilt::Error::Run("measured".into()))
    }
}

/// A line of /proc/self/status in MiB; 0 where there is none.
fn resident_mib(line: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let value = status.lines().find_map(|text| text.strip_prefix(line)?.trim().split(' ').next()?.parse::<f64>().ok());
    value.unwrap_or(0.0) / 1024.0
}

fn json(device: &Device) -> dilt::Result<()> {
    for case in cases() {
        // Linux: the peak of the case before is forgotten.
        let _ = std::fs::write("/proc/self/clear_refs", "5");
        let before = resident_mib("VmRSS:");
        case.run(device, |epochs, planned| {
            let repeats = if case.model == "resnet8" { 50 } else { 6 };
            let mut wall = Vec::new();
            let mut cpu = f64::INFINITY;
            for _ in 0..repeats {
                let begin = cpu_time();
                wall.push(epochs(1).as_secs_f64() * 1e3 / STEPS as f64);
                cpu = cpu.min((cpu_time() - begin).as_secs_f64() * 1e3 / (2 * STEPS) as f64);
            }
            wall.sort_by(f64::total_cmp);
            let planned = planned as f64 / 1048576.0;
            let peak = resident_mib("VmHWM:");
            let line = serde_json::json!({
                "what": case.name, "device": device.description(), "batch": case.batch,
                "threads": rayon::current_num_threads(), "median_ms": wall[repeats / 2], "min_ms": wall[0],
                "min_cpu_ms": cpu, "images_per_s": case.batch as f64 / wall[repeats / 2] * 1e3,
                "planned_mib": planned, "resident_before_mib": before, "peak_rss_mib": peak,
                "peak_to_planned": peak / planned,
            });
            println!("{line}");
        })?;
    }
    Ok(())
}

fn main() {
    // As the program does.
    rayon::ThreadPoolBuilder::new().use_current_thread().build_global().expect("nothing has run yet");
    let name = std::env::var("DILT_BENCH_DEVICE").unwrap_or_else(|_| "auto".into());
    let device = Device::open(&name).unwrap_or_else(|error| panic!("DILT_BENCH_DEVICE: {error}"));
    if std::env::args().any(|argument| argument == "--json") {
        return json(&device).expect("the steps run");
    }
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(5))
        .configure_from_args();
    let mut group = criterion.benchmark_group(format!("step, {}", device.description()));
    for case in cases() {
        let _ = std::fs::write("/proc/self/clear_refs", "5");
        case.run(&device, |epochs, planned| {
            group.throughput(Throughput::Elements(case.batch as u64));
            group.bench_function(case.name, |bencher| {
                bencher.iter_custom(|count| epochs(count as usize) / STEPS as u32)
            });
            let planned = planned as f64 / 1048576.0;
            let peak = resident_mib("VmHWM:");
            println!("{}: planned {planned:.1} MiB, peak of the process {peak:.1} MiB", case.name);
        })
        .expect("the steps run");
    }
    group.finish();
    criterion.final_summary();
}
