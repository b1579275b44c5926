//! Whole networks: gradients against differences of the loss, the optimizer's path through a training, schedules.

use dilt::data::{DataSet, Examples, Pixels};
use dilt::device::{Device, HostOptions};
use dilt::nn::config::ModelConfig;
use dilt::nn::init;
use dilt::nn::model::Model;
use dilt::nn::network::{Mode, Network};
use dilt::nn::plan::{OptimizerKind, Use};
use dilt::nn::weights::Weights;
use dilt::ops::loss::{LossInput, LossShape, LossTables, cross_entropy};
use dilt::train::{Chunk, Images, Labelled, Observer, Recipe, Schedule, Training, evaluate};

const SAMPLES: usize = 13;
const PADDED: usize = 16;
const CLASSES: usize = 3;

fn host() -> Device {
    Device::host(HostOptions::default()).unwrap()
}

fn model(name: &str, set: &[&str]) -> Model {
    let set: Vec<String> = set.iter().map(|text| (*text).into()).collect();
    ModelConfig::load(name, &set).unwrap().build().unwrap()
}

/// Numbers in [-1, 1) that look random.
fn noise(i: usize) -> f32 {
    let bits = (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    ((bits ^ bits >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// A batch in the network's input, and its forward pass; logits `[class][sample]`.
fn forward(device: &Device, network: &mut Network, weights: &Weights) -> Vec<f32> {
    network.load(weights).unwrap();
    let features: usize = network.model().image.iter().product();
    let x: Vec<f32> = (0..features * PADDED).map(|i| if i % PADDED < SAMPLES { noise(i) } else { 0.0 }).collect();
    let labels: Vec<u32> = (0..PADDED).map(|i| (i % CLASSES) as u32).collect();
    let into = network.batch();
    device.write_reals(&x, into.x).unwrap();
    device.write(&labels, into.labels).unwrap();
    device.write(&[SAMPLES as u32], into.current.count).unwrap();
    device.write(&[0.0f32], into.current.rate).unwrap();
    network.forward(Mode::Train).unwrap();
    device.read_reals(network.head().logits).unwrap()
}

/// Mean cross entropy with label smoothing, in f64.
fn loss(logits: &[f32], smoothing: f64) -> f64 {
    let of = |sample: usize| {
        let z: Vec<f64> = (0..CLASSES).map(|class| f64::from(logits[class * PADDED + sample])).collect();
        let log_sum = z.iter().map(|z| z.exp()).sum::<f64>().ln();
        let uniform = z.iter().map(|z| log_sum - z).sum::<f64>() / CLASSES as f64;
        (1.0 - smoothing) * (log_sum - z[sample % CLASSES]) + smoothing * uniform
    };
    (0..SAMPLES).map(of).sum::<f64>() / SAMPLES as f64
}

/// Moves each parameter a little along its gradient and along noise: the loss must change as the gradient says.
fn check_gradients(model: &Model, smoothing: f32) {
    let device = host();
    let mut network = Network::new(&device, model, SAMPLES, Use::Train(OptimizerKind::Sgd)).unwrap();
    let mut weights = init::draw(model, 3);
    for (name, tensor) in weights.tensors.iter_mut().filter(|(name, _)| !name.contains("running")) {
        // Norms away from 1 and 0, so that every term of their gradients shows.
        tensor
            .iter_mut()
            .enumerate()
            .filter(|_| name.contains("bn"))
            .for_each(|(i, w)| *w += 0.3 * noise(i + name.len()));
    }
    forward(&device, &mut network, &weights);
    let state = device.upload(&[0u32]).unwrap();
    let (mut mean, mut top1, mut top5) = (device.alloc(1).unwrap(), device.alloc(1).unwrap(), device.alloc(1).unwrap());
    let head = network.head();
    let input =
        LossInput { logits: head.logits, labels: head.labels, count: head.count, step: state.view(), smoothing };
    let tables = LossTables { loss: mean.view_mut(), top1: top1.view_mut(), top5: top5.view_mut() };
    cross_entropy(&device, &LossShape::new(CLASSES, SAMPLES).unwrap(), input, tables, head.gradient).unwrap();
    network.backward().unwrap();
    let gradients: Vec<Vec<f32>> =
        model.parameters.iter().map(|p| network.parameter_gradient(&p.name).unwrap().unwrap()).collect();

    for (parameter, gradient) in model.parameters.iter().zip(&gradients) {
        let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!(norm > 1e-5, "{}: the gradient is {norm}", parameter.name);
        let along: Vec<f64> = gradient.iter().map(|g| f64::from(*g) / norm).collect();
        let mixed: Vec<f64> =
            along.iter().enumerate().map(|(i, g)| g + f64::from(noise(7 * i)) / (along.len() as f64).sqrt()).collect();
        for direction in [along, mixed] {
            let slope: f64 = direction.iter().zip(gradient).map(|(d, g)| d * f64::from(*g)).sum();
            let step = 1e-3;
            let mut at = |sign: f64| {
                let mut moved = weights.clone();
                let tensor = moved.tensors.get_mut(&parameter.name).unwrap();
                tensor.iter_mut().zip(&direction).for_each(|(w, d)| *w += (sign * step * d) as f32);
                loss(&forward(&device, &mut network, &moved), f64::from(smoothing))
            };
            let difference = (at(1.0) - at(-1.0)) / (2.0 * step);
            let error = (difference - slope).abs() / (slope.abs() + norm);
            assert!(error < 0.03, "{}: gradient says {slope:.5}, the loss {difference:.5}", parameter.name);
        }
    }
}

const TINY: &[&str] = &["classes=3", "image=[2,8,8]"];

#[test]
fn gradients_of_a_cifar_network_are_those_of_its_loss() {
    check_gradients(&model("resnet8", &[TINY, &["widths=[3,5,8]", "stages=[1,2,1]"]].concat()), 0.0);
}

#[test]
fn gradients_of_a_torchvision_network_are_those_of_its_loss() {
    let small = ["classes=3", "image=[2,17,15]", "widths=[3,4,5,6]", "stages=[1,1,1,1]"];
    check_gradients(&model("resnet18", &small), 0.1);
}

#[test]
fn gradients_of_a_bottleneck_network_are_those_of_its_loss() {
    let small = ["classes=3", "image=[2,16,16]", "widths=[2,3]", "stages=[1,1]"];
    check_gradients(&model("resnet50", &small), 0.0);
}

fn data(examples: usize) -> DataSet {
    let make = |n: usize| Examples {
        images: Pixels::Bytes((0..n * 128).map(|i| (noise(i) * 100.0 + 100.0) as u8).collect()),
        labels: (0..n).map(|i| (i % CLASSES) as u32).collect(),
    };
    let (mean, std) = (vec![0.4, 0.4], vec![0.2, 0.3]);
    DataSet {
        name: "noise".into(),
        shape: [2, 8, 8],
        stored: [2, 8, 8],
        classes: CLASSES,
        scale: 255.0,
        mean,
        std,
        train: make(examples),
        val: Examples::default(),
        test: make(5),
    }
}

/// Keeps what it is told.
#[derive(Default)]
struct Seen {
    loss: Vec<f32>,
    count: Vec<u32>,
    rate: Vec<f32>,
}

impl Observer for Seen {
    fn chunk(&mut self, chunk: &Chunk, _: &Network, _: usize, _: usize) -> dilt::Result<()> {
        self.loss.extend(&chunk.loss);
        self.count.extend(&chunk.count);
        self.rate.extend(&chunk.rate);
        Ok(())
    }
}

/// Trains a small network on noise.
fn train(examples: usize, recipe: &Recipe, seed: u64) -> (Network, Seen) {
    let device = host();
    let data = data(examples);
    let model = model("resnet8", &[TINY, &["widths=[3,5,8]"]].concat());
    let images = Images::new(&device, &data, &data.train).unwrap();
    let labelled = Labelled::all(&device, &images, &data.train, CLASSES).unwrap();
    let mut network = Network::new(&device, &model, recipe.batch, Use::Train(OptimizerKind::Sgd)).unwrap();
    network.load(&init::draw(&model, 0)).unwrap();
    let mut seen = Seen::default();
    Training::new(&mut network, &labelled, recipe, seed).unwrap().run(&mut network, 0, &mut seen).unwrap();
    (network, seen)
}

#[test]
fn a_step_is_pytorchs_nesterov_with_a_clipped_gradient() {
    for (clip_norm, decay_norms) in [(None, true), (Some(0.05f32), true), (Some(1e6), false)] {
        let recipe = Recipe {
            steps: Some(1),
            batch: 16,
            lr: 0.1,
            nesterov: true,
            weight_decay: 0.01,
            clip_norm,
            decay_norms,
            schedule: Schedule::Constant,
            ..Recipe::default()
        };
        let (network, _) = train(16, &recipe, 0);
        let (start, after) = (init::draw(network.model(), 0), network.weights().unwrap());
        let parameters = network.model().parameters.clone();
        let gradient = |name: &str| network.parameter_gradient(name).unwrap().unwrap();
        let squares = parameters.iter().flat_map(|p| gradient(&p.name)).map(|g| f64::from(g).powi(2)).sum::<f64>();
        // torch.nn.utils.clip_grad_norm_
        let scale = clip_norm.map_or(1.0, |most| (f64::from(most) / (squares.sqrt() + 1e-6)).min(1.0));
        assert_eq!(scale < 1.0, clip_norm == Some(0.05), "norm {}", squares.sqrt());
        for parameter in &parameters {
            let name = &parameter.name;
            let decay = if decay_norms || parameter.shape.len() > 1 { 0.01 } else { 0.0 };
            for ((w0, w1), g) in start.tensors[name].iter().zip(&after.tensors[name]).zip(gradient(name)) {
                let g = scale * f64::from(g) + decay * f64::from(*w0);
                let expected = f64::from(*w0) - 0.1 * (g + 0.9 * g);
                assert!((f64::from(*w1) - expected).abs() < 1e-6, "{name}: {w1}, expected {expected}");
            }
        }
    }
}

#[test]
fn learning_rates_are_those_of_hand() {
    let base = Recipe { epochs: 4, batch: 10, lr: 0.8, warmup: 1.0, ..Recipe::default() };
    let rates = |recipe: &Recipe, examples| {
        (0..recipe.total_steps(examples)).map(|s| recipe.rate(s, examples)).collect::<Vec<_>>()
    };
    let close = |got: Vec<f64>, want: &[f64]| {
        assert_eq!(got.len(), want.len());
        got.iter().zip(want).for_each(|(g, w)| assert!((g - w).abs() < 1e-12, "{got:?}\n{want:?}"));
    };
    // 20 examples: two steps an epoch; the warm-up takes the first epoch's.
    let multistep = Recipe { schedule: Schedule::Multistep, milestones: vec![2.0, 3.0], gamma: 0.5, ..base.clone() };
    close(rates(&multistep, 20), &[0.4, 0.8, 0.8, 0.8, 0.4, 0.4, 0.2, 0.2]);
    let cosine = Recipe { schedule: Schedule::Cosine, epochs: 3, ..base.clone() };
    let half = 0.5f64.sqrt();
    close(rates(&cosine, 20), &[0.4, 0.8, 0.8, 0.4 * (1.0 + half), 0.4, 0.4 * (1.0 - half)]);
    let constant = Recipe { schedule: Schedule::Constant, steps: Some(3), ..base };
    close(rates(&constant, 20), &[0.4, 0.8, 0.8]);
    assert_eq!([19, 20, 21, 22].map(|n| constant.steps_per_epoch(n)), [2, 2, 2, 3], "no batch of one sample");
}

#[test]
fn a_training_sees_whole_batches_then_the_rest_and_uses_the_rates_it_shows() {
    let recipe = Recipe { epochs: 2, batch: 8, lr: 0.01, warmup: 1.0, ..Recipe::default() };
    let (_, seen) = train(21, &recipe, 1);
    assert_eq!(seen.count, [8, 8, 5, 8, 8, 5]);
    let rates: Vec<f32> = (0..6).map(|step| recipe.rate(step, 21) as f32).collect();
    assert_eq!(seen.rate, rates);
}

#[test]
fn without_shuffling_every_epoch_has_file_order_whatever_the_seed() {
    let still = Recipe { epochs: 2, batch: 8, lr: 0.0, shuffle: false, ..Recipe::default() };
    let (_, seen) = train(20, &still, 1);
    assert_eq!(seen.loss[..3], seen.loss[3..], "nothing is learnt, and each epoch is the same");
    assert_eq!(train(20, &still, 2).1.loss, seen.loss);
    let shuffled = Recipe { shuffle: true, ..still };
    let (_, other) = train(20, &shuffled, 1);
    assert_ne!(other.loss[..3], other.loss[3..], "a new order each epoch");
    assert_ne!(train(20, &shuffled, 2).1.loss, other.loss, "of its own for each seed");
}

#[test]
fn a_training_that_stops_early_is_the_beginning_of_the_whole() {
    let recipe = Recipe { epochs: 2, batch: 8, ..Recipe::default() };
    let (_, whole) = train(20, &recipe, 0);
    let device = host();
    let data = data(20);
    let model = model("resnet8", &[TINY, &["widths=[3,5,8]"]].concat());
    let images = Images::new(&device, &data, &data.train).unwrap();
    let labelled = Labelled::all(&device, &images, &data.train, CLASSES).unwrap();
    let mut network = Network::new(&device, &model, 8, Use::Train(OptimizerKind::Sgd)).unwrap();
    network.load(&init::draw(&model, 0)).unwrap();
    let mut training = Training::new(&mut network, &labelled, &recipe, 0).unwrap();
    training.stop_after(4);
    let mut seen = Seen::default();
    training.run(&mut network, 0, &mut seen).unwrap();
    assert_eq!((seen.rate[..].to_vec(), seen.loss[..].to_vec()), (whole.rate[..4].to_vec(), whole.loss[..4].to_vec()));
    let [a, b] = [8, 20].map(|batch| {
        let mut network2 = Network::new(&device, &model, batch, Use::Evaluate).unwrap();
        network2.load(&network.weights().unwrap()).unwrap();
        evaluate(&mut network2, &labelled, batch, false).unwrap()
    });
    assert!((a.loss - b.loss).abs() < 1e-5 && a.top1 == b.top1, "whatever the batch");
}
