//! Steps of several trainings together: launches that are alike are one, and every bit is what it is alone.

use std::thread;

use dilt::data::{DataSet, Examples, Pixels};
use dilt::device::{Device, Graph, Precision, Recording};
use dilt::mask::Mask;
use dilt::nn::config::ModelConfig;
use dilt::nn::init;
use dilt::nn::model::Model;
use dilt::nn::network::{Mode, Network};
use dilt::nn::paths::Planning;
use dilt::nn::plan::Use;
use dilt::nn::ways::Way;
use dilt::nn::weights::Weights;
use dilt::ops::step::step_end;
use dilt::train::{Augmentation, Chunk, Images, Labelled, Observer, Recipe, TicketArray, Training};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::support::{Case, by_wgmma, devices};

const CLASSES: usize = 3;

fn model(name: &str, precision: Precision, set: &[&str]) -> Model {
    let set: Vec<String> = ["classes=3"].iter().chain(set).map(|text| (*text).into()).collect();
    let mut config = ModelConfig::load(name, &set).unwrap();
    config.precision = precision;
    config.build().unwrap()
}

fn resnet(precision: Precision) -> Model {
    model("resnet8", precision, &["image=[3,8,8]", "widths=[5,6,8]"])
}

fn transformer(precision: Precision) -> Model {
    model("vit_digits", precision, &["dim=24", "dropout=0.2", "stochastic_depth=0.2"])
}

/// Random images in the model's input's size.
fn data(model: &Model, examples: usize, seed: u64) -> DataSet {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let [channels, ..] = model.image;
    let pixels = examples * model.image.iter().product::<usize>();
    let train = Examples {
        images: Pixels::Bytes((0..pixels).map(|_| rng.random()).collect()),
        labels: (0..examples).map(|_| rng.random_range(0..CLASSES as u32)).collect(),
    };
    DataSet {
        name: "noise".into(),
        shape: model.image,
        stored: model.image,
        classes: CLASSES,
        scale: 255.0,
        mean: vec![0.4; channels],
        std: vec![0.2; channels],
        train,
        val: Examples::default(),
        test: Examples::default(),
    }
}

/// A training.
#[derive(Clone)]
struct Job {
    model: Model,
    way: Way,
    /// Share of the weights that random masks keep.
    density: f64,
    /// Of the masks.
    drawn: u64,
    /// Of weights and data.
    seed: u64,
    examples: usize,
    recipe: Recipe,
}

impl Job {
    fn new(model: &Model, seed: u64) -> Self {
        let recipe = Recipe { epochs: 2, batch: 8, lr: 0.05, augment: Augmentation::Crop, ..Recipe::default() };
        Job { model: model.clone(), way: Way::Dense, density: 0.6, drawn: 0, seed, examples: 21, recipe }
    }

    fn weights(&self) -> Weights {
        let mut rng = ChaCha8Rng::seed_from_u64(self.drawn);
        let mut weights = init::draw(&self.model, self.seed);
        let mut mask = |shape: &[usize]| Mask::from_fn(shape, |_| rng.random_bool(self.density));
        weights.masks = self.model.prunable().map(|weight| (weight.name.clone(), mask(&weight.shape))).collect();
        weights
    }

    fn network(&self, device: &Device) -> Network {
        let (weights, planning) = (self.weights(), Planning::Only(self.way));
        let memory = Use::Train(self.recipe.optimizer);
        let mut network =
            Network::for_masks(device, &self.model, &weights.masks, self.recipe.batch, memory, &planning).unwrap();
        network.load(&weights).unwrap();
        network
    }

    /// Bits of the losses, and of the weights in the end.
    fn train(&self, device: &Device, array: Option<&TicketArray>) -> dilt::Result<Vec<u32>> {
        let data = data(&self.model, self.examples, self.seed);
        let images = Images::new(device, &data, &data.train)?;
        let examples = Labelled::all(device, &images, &data.train, CLASSES)?;
        let mut network = self.network(device);
        let mut training = Training::new(&mut network, &examples, &self.recipe, self.seed)?;
        training.join(array);
        let mut bits = Losses(Vec::new());
        training.run(&mut network, 0, &mut bits)?;
        bits.0.extend(network.weights()?.tensors.values().flatten().map(|value| value.to_bits()));
        Ok(bits.0)
    }
}

struct Losses(Vec<u32>);

impl Observer for Losses {
    fn chunk(&mut self, chunk: &Chunk, _: &Network, _: usize, _: usize) -> dilt::Result<()> {
        self.0.extend(chunk.loss.iter().map(|loss| loss.to_bits()));
        Ok(())
    }
}

/// The host's ways to cut kernels, and the GPU where there is one: what instruction sets differ in is nothing here.
fn ways_to_cut() -> Vec<Case> {
    let wanted = ["host", "host staged", "host, schedule 3", "cuda"];
    devices().into_iter().filter(|case| wanted.contains(&&*case.label)).collect()
}

fn again(device: &Device) -> Device {
    device.with_policy(device.policy()).unwrap()
}

/// What each job ends with, all of them at a time and their steps together.
fn together(device: &Device, jobs: &[Job]) -> Vec<dilt::Result<Vec<u32>>> {
    let array = TicketArray::new(again(device));
    thread::scope(|scope| {
        let train = |job: &Job| job.train(&again(device), Some(&array));
        let threads: Vec<_> = jobs.iter().map(|job| scope.spawn(move || train(job))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn trains_as_alone(device: &Device, jobs: &[Job], label: &str) {
    for (place, (job, got)) in jobs.iter().zip(together(device, jobs)).enumerate() {
        assert!(got.unwrap() == job.train(&again(device), None).unwrap(), "{label}: training {place}");
    }
}

#[test]
fn trainings_whose_steps_are_done_together_have_the_bits_of_each_alone() {
    for case in ways_to_cut() {
        for precision in [Precision::F32, Precision::Bf16] {
            let label = format!("{}, {}", case.label, precision.name());
            let own = resnet(precision);
            let mut jobs: Vec<Job> = (0..3).map(|seed| Job::new(&own, seed)).collect();
            // Epochs of another length, another end, another batch, and another network, which fits none of the others.
            jobs[1].examples = 30;
            jobs[2].recipe.epochs = 3;
            jobs[2].drawn = 1;
            jobs.push(Job { recipe: Recipe { batch: 16, ..jobs[0].recipe.clone() }, ..jobs[0].clone() });
            jobs.push(Job::new(
                &model("resnet8", precision, &["image=[3,8,8]", "widths=[5,7,8]", "stages=[1,1,2]"]),
                3,
            ));
            trains_as_alone(&case.device, &jobs, &label);
            let mut jobs: Vec<Job> = (0..2).map(|seed| Job::new(&transformer(precision), seed)).collect();
            jobs.iter_mut().for_each(|job| job.recipe.clip_norm = Some(0.1));
            trains_as_alone(&case.device, &jobs, &format!("{label}, transformer"));
        }
    }
}

#[test]
fn kept_weights_alone_and_drawn_boxes_go_together_too() {
    for case in ways_to_cut() {
        for (precision, way) in
            [Precision::F32, Precision::Bf16].into_iter().flat_map(|p| [Way::Groups, Way::Direct].map(|way| (p, way)))
        {
            let mut jobs: Vec<Job> = (0..3).map(|seed| Job { way, ..Job::new(&resnet(precision), seed) }).collect();
            jobs[2].density = 0.2;
            // Of two steps the second is replayed.
            let steps = Some(2);
            let drawn = Recipe { augment: Augmentation::ResizedCrop, jitter: 0.3, steps, ..jobs[0].recipe.clone() };
            jobs.iter_mut().for_each(|job| job.recipe = drawn.clone());
            trains_as_alone(&case.device, &jobs, &format!("{}, {} {}", case.label, precision.name(), way.name()));
        }
    }
}

#[test]
fn products_by_wgmma_go_together_too() {
    let wide = model("resnet8", Precision::Bf16, &["image=[3,4,4]", "widths=[64,64,64]"]);
    for case in ways_to_cut() {
        let Some(device) = by_wgmma(&case.device) else { continue };
        for way in [Way::Dense, Way::Groups] {
            let mut jobs: Vec<Job> = (0..2).map(|seed| Job { way, examples: 64, ..Job::new(&wide, seed) }).collect();
            jobs.iter_mut().for_each(|job| (job.recipe.batch, job.recipe.epochs) = (64, 2));
            trains_as_alone(&device, &jobs, &format!("{}, {}", case.label, way.name()));
        }
    }
}

/// The steps of some jobs on random numbers, recorded.
fn steps(device: &Device, jobs: &[Job]) -> (Vec<Network>, Vec<Recording>) {
    let mut networks: Vec<Network> = jobs.iter().map(|job| job.network(device)).collect();
    let step = |network: &mut Network, job: &Job| {
        network.forward(Mode::Train)?;
        network.backward()?;
        network.update(&job.recipe.optimizer(), None)
    };
    let record = |(network, job): (&mut Network, &Job)| device.record(|| step(network, job)).unwrap();
    let recorded = networks.iter_mut().zip(jobs).map(record).collect();
    (networks, recorded)
}

fn kernels(graph: &Graph) -> Vec<&'static str> {
    graph.launches().iter().map(|(kernel, _)| *kernel).collect()
}

#[test]
fn what_is_launched_alike_is_one_launch() {
    for case in devices() {
        for own in [Precision::F32, Precision::Bf16].into_iter().flat_map(|p| [resnet(p), transformer(p)]) {
            let label = format!("{}, {} {}", case.label, own.name, own.precision.name());
            let mut jobs: Vec<Job> = (0..3).map(|seed| Job::new(&own, seed)).collect();
            let (_networks, steps) = steps(&case.device, &jobs);
            let alone = case.device.together(&[&steps[0]]).unwrap();
            let all = case.device.together(&steps.iter().collect::<Vec<_>>()).unwrap();
            assert!(alone.launches().len() > 30 && alone.launches().iter().all(|(_, steps)| *steps == 1), "{label}");
            assert_eq!(kernels(&all), kernels(&alone), "{label}");
            assert!(all.launches().iter().all(|(_, steps)| *steps == 3), "{label}: {:?}", all.launches());
            // One of another batch is cut into other blocks, if not everywhere: the two others still go together.
            jobs[1].recipe.batch = 512;
            let (_networks, steps) = self::steps(&case.device, &jobs);
            let other = case.device.together(&[&steps[1]]).unwrap();
            let mixed = case.device.together(&steps.iter().collect::<Vec<_>>()).unwrap();
            let of = |count| mixed.launches().iter().filter(|(_, steps)| *steps == count).count();
            assert_eq!(of(2) + of(3), alone.launches().len(), "{label}");
            assert_eq!(of(1) + of(3), other.launches().len(), "{label}");
            assert!(of(1) > 0, "{label}: {:?}", mixed.launches());
        }
    }
}

#[test]
fn more_tickets_than_a_launch_takes_are_several() {
    for case in devices() {
        let (device, label) = (case.device, case.label);
        let states: Vec<[u32; 2]> = (0..40).map(|state| [state, 2 * state]).collect();
        let mut buffers: Vec<_> = states.iter().map(|state| device.upload(state).unwrap()).collect();
        let record =
            |buffer: &mut dilt::device::Buffer<u32>| device.record(|| step_end(&device, buffer.view_mut())).unwrap();
        let recorded: Vec<Recording> = buffers.iter_mut().map(record).collect();
        let graph = device.together(&recorded.iter().collect::<Vec<_>>()).unwrap();
        assert_eq!(graph.launches(), [("step_end", 16), ("step_end", 16), ("step_end", 8)], "{label}");
        graph.replay().unwrap();
        for (buffer, [row, step]) in buffers.iter().zip(states) {
            assert_eq!(device.read(buffer.view()).unwrap(), [row + 1, step + 1], "{label}");
        }
    }
}

#[test]
fn memory_of_a_step_stays_while_a_graph_of_another_handle_has_it() {
    for case in devices() {
        let (one, other) = (again(&case.device), again(&case.device));
        let mut state = one.upload(&[1u32, 1]).unwrap();
        let mut watched = other.upload(&[2u32, 2]).unwrap();
        let step = one.record(|| step_end(&one, state.view_mut())).unwrap();
        let beside = other.record(|| step_end(&other, watched.view_mut())).unwrap();
        let graph = other.together(&[&step, &beside]).unwrap();
        drop((step, beside, state));
        graph.replay().unwrap();
        assert_eq!(other.read(watched.view()).unwrap(), [3, 3], "{}", case.label);
    }
}

#[test]
fn a_training_that_diverges_leaves_the_others_alone() {
    let device = Device::open("host").unwrap();
    let mut jobs: Vec<Job> = (0..3).map(|seed| Job::new(&resnet(Precision::F32), seed)).collect();
    jobs[1].recipe.lr = 1e30;
    let mut ended = together(&device, &jobs);
    let error = ended.remove(1).unwrap_err().to_string();
    assert!(error.contains("diverged"), "{error}");
    for (job, got) in [&jobs[0], &jobs[2]].into_iter().zip(ended) {
        assert!(got.unwrap() == job.train(&device, None).unwrap());
    }
}
