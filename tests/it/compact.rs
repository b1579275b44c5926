//! Networks without the features that do not matter: the same losses, gradients and weights as masked dense ones.

use std::collections::BTreeMap;

use dilt::device::{Device, HostOptions, Policy};
use dilt::mask::Mask;
use dilt::mask::set::MaskSet;
use dilt::nn::compact::Compaction;
use dilt::nn::config::ModelConfig;
use dilt::nn::init;
use dilt::nn::liveness::Liveness;
use dilt::nn::model::{Layer, Model};
use dilt::nn::network::{Mode, Network};
use dilt::nn::paths::Planning;
use dilt::nn::plan::Use;
use dilt::nn::ways::Way;
use dilt::nn::weights::Weights;
use dilt::ticket::structure::{Scores, Structure, Structuring};
use dilt::train::{Checkpoint, Recipe};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::support::default_devices;
use crate::training::Descent;

const SAMPLES: usize = 12;
const STEPS: usize = 10;

fn model(name: &str, set: &[&str]) -> Model {
    let set: Vec<String> = set.iter().map(|text| (*text).into()).collect();
    ModelConfig::load(name, &set).unwrap().build().unwrap()
}

/// Networks of every kind of block and shortcut.
fn models() -> Vec<Model> {
    let small = ["classes=3", "image=[2,16,16]", "widths=[8,16]", "stages=[2,2]"];
    let vit = ["image=[3,16,16]", "patch=4", "dim=24", "depth=2", "heads=3", "classes=5"];
    vec![
        model("resnet20", &["image=[3,8,8]"]),
        model("resnet18", &small),
        model("resnet50", &small),
        model("vit", &vit),
        model("vit", &[&vit[..], &["dropout=0.1", "stochastic_depth=0.2", "layer_scale=0.5"]].concat()),
    ]
}

fn random(model: &Model, density: f64, rng: &mut ChaCha8Rng) -> MaskSet {
    let layers = model.prunable();
    let layers = layers.map(|p| (p.name.clone(), Mask::from_fn(&p.shape, |_| rng.random_bool(density))));
    MaskSet::new(layers.collect())
}

/// Weights with norms away from 1 and 0, under these masks.
fn weights(model: &Model, masks: BTreeMap<String, Mask>, rng: &mut ChaCha8Rng) -> Weights {
    let mut weights = init::draw(model, 5);
    let vectors = weights.tensors.iter_mut().filter(|(_, tensor)| tensor.ndim() == 1);
    vectors.for_each(|(_, tensor)| tensor.iter_mut().for_each(|w| *w += rng.random_range(0.0..0.4)));
    weights.masks = masks;
    weights
}

/// Tickets of a model: refilled ones, and random ones so sparse that features die of themselves.
pub fn tickets(model: &Model) -> Vec<(&'static str, Weights)> {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut refilled = |density: f64, method| {
        let masks = random(model, density, &mut rng);
        let how = Structuring { method, growth: 0.2, group: 8, threshold: 1.5 };
        let refilled = how.apply(model, &masks, &Scores::Count).unwrap();
        let mut masks = refilled.masks.to_file();
        masks.extend(refilled.fixed);
        weights(model, masks, &mut rng)
    };
    let (tenth, half) = (refilled(0.1, Structure::Refill), refilled(0.5, Structure::RefillPlus));
    // Removes every other input of each second layer too: what writes it has no use any more.
    let mut unread = half.clone();
    for (name, mask) in unread.masks.iter_mut().filter(|(name, _)| name.contains("conv2") || name.contains("fc2")) {
        let taps = mask.len() / mask.shape()[0] / mask.shape()[1];
        *mask = Mask::from_fn(mask.shape(), |i| mask.get(i) && i / taps % 2 == 0);
        assert!(mask.count() > 0, "{name}");
    }
    let sparse = random(model, 0.02, &mut rng).to_file();
    let nothing = random(model, 0.0, &mut rng).to_file();
    vec![
        ("refill at a tenth", tenth),
        ("inputs that nothing reads", unread),
        ("a fiftieth at random", weights(model, sparse, &mut rng)),
        ("nothing", weights(model, nothing, &mut rng)),
    ]
}

/// Which elements of each parameter are kept, and make a difference.
fn matter(model: &Model, masks: &BTreeMap<String, Mask>) -> BTreeMap<String, Vec<bool>> {
    let liveness = Liveness::new(model, masks);
    let mut matter: BTreeMap<String, Vec<bool>> =
        model.parameters.iter().map(|p| (p.name.clone(), vec![true; p.elements()])).collect();
    for layer in &model.layers {
        match *layer {
            Layer::Conv { weight, bias, input, output, .. } => {
                let parameter = &model.parameters[weight];
                let (fan_in, taps) = (parameter.fan_in(), parameter.fan_in() / parameter.shape[1]);
                let of = matter.get_mut(&parameter.name).unwrap();
                of.iter_mut().enumerate().for_each(|(i, matters)| {
                    *matters = liveness.nonzero[input][i % fan_in / taps] && liveness.used[output][i / fan_in];
                });
                if let Some(bias) = bias {
                    matter.insert(model.parameters[bias].name.clone(), liveness.used[output].clone());
                }
            }
            Layer::Norm { scale, shift, output, .. } => {
                for id in [scale, shift] {
                    matter.insert(model.parameters[id].name.clone(), liveness.used[output].clone());
                }
            }
            _ => {}
        }
    }
    for (name, mask) in masks {
        matter.get_mut(name).unwrap().iter_mut().zip(mask.iter()).for_each(|(matters, kept)| *matters &= kept);
    }
    matter
}

fn assert_close(got: f32, want: f32, scale: f32, tolerance: f32, what: &str) {
    assert!((got - want).abs() <= tolerance * scale.max(1e-3), "{what}: {got}, expected {want} (of {scale})");
}

fn largest(values: impl Iterator<Item = f32>) -> f32 {
    values.fold(0.0, |most, value| most.max(value.abs()))
}

type Gradients = BTreeMap<String, Vec<f32>>;

#[test]
#[cfg_attr(dilt_sanitize, ignore = "minutes, and the kernels are those of other tests")]
fn ten_steps_without_what_does_not_matter_are_those_of_the_masked_dense_network() {
    let staged = Device::host(HostOptions { policy: Policy::Staged, ..HostOptions::default() }).unwrap();
    for model in models() {
        for (name, weights) in tickets(&model) {
            let name = format!("{} {:?}, {name}", model.name, model.layers.len());
            let mut rng = ChaCha8Rng::seed_from_u64(17);
            let pixels = model.image.iter().product::<usize>();
            let mut batch = || -> (Vec<f32>, Vec<u32>) {
                let value =
                    |i: usize, rng: &mut ChaCha8Rng| if i % 16 < SAMPLES { rng.random_range(-1.0..1.0) } else { 0.0 };
                let x = (0..pixels * 16).map(|i| value(i, &mut rng)).collect();
                (x, (0..SAMPLES as u32).map(|i| i % model.classes as u32).collect())
            };
            let batches: Vec<_> = (0..STEPS).map(|_| batch()).collect();
            let optimizer = Recipe::default().optimizer();
            let descent =
                Descent { model: &model, weights: &weights, samples: SAMPLES, steps: STEPS, rate: 0.02, optimizer };
            let run = |network: Network| {
                let mut gradients: Gradients = BTreeMap::new();
                let (losses, mut network) = descent.run_in(
                    network,
                    |step| batches[step].clone(),
                    |step, network| {
                        for parameter in model.parameters.iter().filter(|_| step == 0) {
                            let gradient = network.parameter_gradient(&parameter.name).unwrap().unwrap();
                            gradients.insert(parameter.name.clone(), gradient);
                        }
                    },
                );
                network.forward(Mode::Evaluate).unwrap();
                let logits = network.device().clone().read_reals(network.head().logits).unwrap();
                (losses, gradients, logits, network)
            };
            let (losses, gradients, logits, dense) = run(Network::for_masks(
                &staged,
                &model,
                &BTreeMap::new(),
                SAMPLES,
                descent.memory(),
                &Planning::Only(Way::Dense),
            )
            .unwrap());
            let trained = dense.weights().unwrap();
            let matter = matter(&model, &weights.masks);
            for case in default_devices() {
                let name = format!("{name} on {}", case.label);
                let network = Network::for_masks(
                    &case.device,
                    &model,
                    &weights.masks,
                    SAMPLES,
                    descent.memory(),
                    &Planning::Table,
                )
                .unwrap();
                // Where features are dropped at random all are computed, but for heads.
                let dropout = model.layers.iter().any(|layer| matches!(layer, Layer::Dropout { .. }));
                assert!(dropout || !network.compaction().is_whole(), "{name}: everything is computed");
                assert!(dropout || network.plan().bytes < dense.plan().bytes, "{name}");
                let (got, first, evaluated, network) = run(network);
                for (step, (got, want)) in got.iter().zip(&losses).enumerate() {
                    assert_close(*got, *want, want.abs(), 2e-5, &format!("{name}: loss of step {step}"));
                }
                let scale = largest(logits.iter().copied());
                for (got, want) in evaluated.iter().zip(&logits) {
                    assert_close(*got, *want, scale, 1e-3, &format!("{name}: logits"));
                }
                let whole = network.weights().unwrap();
                assert_eq!(whole.masks, weights.masks, "{name}");
                for (parameter, matters) in &matter {
                    let (got, want) = (&first[parameter], &gradients[parameter]);
                    let scale = largest(want.iter().copied());
                    let (after, expected) = (&whole.tensors[parameter], &trained.tensors[parameter]);
                    let weight = largest(expected.iter().copied());
                    let (after, expected) = (after.as_slice().unwrap(), expected.as_slice().unwrap());
                    for i in 0..matters.len() {
                        if matters[i] {
                            // The norms of few samples make much of the order of sums.
                            assert_close(got[i], want[i], scale, 1e-3, &format!("{name}: gradient of {parameter}"));
                            assert_close(after[i], expected[i], weight, 1e-3, &format!("{name}: {parameter}"));
                        } else {
                            let kept = weights.masks.get(parameter).is_none_or(|mask| mask.get(i));
                            let start = weights.tensors[parameter].as_slice().unwrap()[i];
                            let decayed = if kept { start.abs() } else { 0.0 };
                            assert!(after[i].abs() <= decayed, "{name}: {parameter} {i} is {}", after[i]);
                            assert!(kept || after[i].to_bits() == 0, "{name}: {parameter} {i} is pruned");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_refilled_network_is_as_small_as_its_rows() {
    let model = model("resnet20", &[]);
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let masks = random(&model, 0.25, &mut rng);
    let how = Structuring { method: Structure::Refill, growth: 0.2, group: 8, threshold: 1.5 };
    let refilled = how.apply(&model, &masks, &Scores::Count).unwrap();
    let mut file = refilled.masks.to_file();
    file.extend(refilled.fixed.clone());
    let (small, compaction) = Compaction::new(&model, &file);
    for layer in &model.layers {
        let &Layer::Conv { weight, output, .. } = layer else { continue };
        let name = &model.parameters[weight].name;
        let rows = refilled.layers.iter().find(|layer| &layer.name == name).unwrap().rows;
        assert_eq!(small.parameters[weight].shape[0], rows, "{name}");
        assert_eq!(compaction.features(output).len(), rows, "{name}");
        assert_eq!(small.parameters[weight].elements(), small.parameters[weight].shape.iter().product::<usize>());
    }
    // Nothing that is left is pruned: each layer is dense but for streams that some blocks have not written yet.
    let inner = |name: &str| small.parameters.iter().position(|p| p.name == name).unwrap();
    let second = inner("layer2.1.conv2.weight");
    assert_eq!(small.parameters[second].elements(), refilled.masks.get("layer2.1.conv2.weight").unwrap().count());
    let dense = Compaction::new(&model, &BTreeMap::new());
    assert!(dense.1.is_whole());
}

#[test]
fn a_compact_network_refuses_other_masks_and_keeps_its_state() {
    let device = Device::open("host").unwrap();
    let model = model("resnet8", &[]);
    let (_, weights) = tickets(&model).swap_remove(1);
    let memory = Use::Train(dilt::nn::plan::OptimizerKind::Sgd);
    let mut network = Network::for_masks(&device, &model, &weights.masks, 8, memory, &Planning::Table).unwrap();
    network.load(&weights).unwrap();
    let mut other = weights.clone();
    other.masks.clear();
    let error = network.load(&other).unwrap_err().to_string();
    assert!(error.contains("made for"), "{error}");
    // What is loaded comes back, what does not matter too, and a checkpoint is whole.
    let back = network.weights().unwrap();
    for (name, tensor) in &weights.tensors {
        let mask = weights.masks.get(name);
        for (i, (got, want)) in back.tensors[name].iter().zip(tensor).enumerate() {
            let want = if mask.is_none_or(|mask| mask.get(i)) { *want } else { 0.0 };
            assert_eq!(*got, want, "{name} {i}");
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint");
    Checkpoint::take(&network, 3, "x").unwrap().save(&path).unwrap();
    let mut again = Network::for_masks(&device, &model, &weights.masks, 8, memory, &Planning::Table).unwrap();
    Checkpoint::load(&path).unwrap().restore(&mut again).unwrap();
    assert_eq!(again.weights().unwrap(), back);
    assert_eq!(again.moments().unwrap()[0].tensors["conv1.weight"].shape(), &model.parameters[0].shape[..]);
}
