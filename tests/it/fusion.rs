//! What the products of networks do in their epilogues, beside kernels of their own: same values, same gradients.

use std::collections::BTreeMap;

use dilt::device::{Device, HostOptions, Policy, Precision};
use dilt::mask::Mask;
use dilt::nn::config::ModelConfig;
use dilt::nn::init;
use dilt::nn::model::{Layer, Model};
use dilt::nn::network::{Mode, Network};
use dilt::nn::paths::Planning;
use dilt::nn::plan::{OptimizerKind, Use};
use dilt::nn::ways::Way;
use dilt::nn::weights::Weights;
use dilt::ops::kept::Pass;
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::compact::tickets;
use crate::conv::gelu_of;
use crate::support::{Case, by_wgmma, default_devices};

const SAMPLES: usize = 61;
const PADDED: usize = 64;
const DEPTH: usize = 2;

fn model(precision: Precision) -> Model {
    let small = ["image=[3,16,16]", "patch=4", "dim=64", "heads=2", "classes=5", &format!("depth={DEPTH}")];
    let mut config = ModelConfig::load("vit", &small.map(String::from)).unwrap();
    config.precision = precision;
    config.build().unwrap()
}

/// Weights with norms and biases away from 1 and 0; of the layers in blocks half are kept, of neighbouring rows the same.
fn weights(model: &Model, masked: bool) -> Weights {
    let (mut weights, mut rng) = (init::draw(model, 5), ChaCha8Rng::seed_from_u64(11));
    let vectors = weights.tensors.iter_mut().filter(|(_, tensor)| tensor.ndim() == 1);
    vectors.for_each(|(_, tensor)| tensor.iter_mut().for_each(|w| *w += rng.random_range(-0.4..0.4)));
    if masked {
        let layers = model.prunable().filter(|parameter| parameter.name.starts_with("blocks"));
        let mask = |i: usize, columns: usize| (i / columns / 32 + i % columns).is_multiple_of(2);
        let of = |shape: &[usize]| Mask::from_fn(shape, |i| mask(i, shape[1]));
        weights.masks = layers.map(|parameter| (parameter.name.clone(), of(&parameter.shape))).collect();
    }
    weights
}

/// What a forward and a backward pass leave, and how many launches had each kernel.
struct Passes {
    /// By value.
    values: Vec<Vec<f32>>,
    gradients: BTreeMap<String, Vec<f32>>,
    launched: BTreeMap<&'static str, usize>,
    beginnings: [usize; 4],
}

impl Passes {
    fn launched(&self, name: &str) -> usize {
        self.launched.iter().filter(|(kernel, _)| kernel.starts_with(name)).map(|(_, count)| count).sum()
    }
}

fn network(device: &Device, model: &Model, weights: &Weights, memory: Use, way: Way) -> Network {
    let planning = Planning::Only(way);
    let mut network = Network::for_masks(device, model, &weights.masks, SAMPLES, memory, &planning).unwrap();
    network.load(weights).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut value = |i: usize| if i % PADDED < SAMPLES { rng.random_range(-1.0..1.0) } else { 0.0 };
    let x: Vec<f32> = (0..PADDED * model.image.iter().product::<usize>()).map(&mut value).collect();
    let into = network.batch();
    device.write_reals(&x, into.x).unwrap();
    device.write(&[SAMPLES as u32], into.current.count).unwrap();
    network
}

fn passes(device: &Device, model: &Model, weights: &Weights, way: Way) -> Passes {
    let mut network = network(device, model, weights, Use::Train(OptimizerKind::Adamw), way);
    let outputs: Vec<usize> = network.computed().layers.iter().map(Layer::output).collect();
    let mut values = vec![Vec::new(); network.computed().values.len()];
    let (launches, done) = device.trace(|| {
        network.forward_with(Mode::Train, |index, y| {
            values[outputs[index]] = device.read_reals(y)?;
            Ok(())
        })?;
        let mut rng = ChaCha8Rng::seed_from_u64(6);
        let mut value = |i: usize| if i % PADDED < SAMPLES { rng.random_range(-1.0..1.0) } else { 0.0 };
        let dlogits: Vec<f32> = (0..PADDED * model.classes).map(&mut value).collect();
        device.write_reals(&dlogits, network.head().gradient.unwrap())?;
        network.backward()
    });
    done.unwrap();
    let mut launched = BTreeMap::new();
    launches.iter().for_each(|launch| *launched.entry(launch.kernel).or_insert(0) += 1);
    let gradient = |name: &String| (name.clone(), network.parameter_gradient(name).unwrap().unwrap());
    let gradients = model.parameters.iter().map(|parameter| gradient(&parameter.name)).collect();
    Passes { values, gradients, launched, beginnings: beginnings(device, &network) }
}

/// Launches that begin the backward passes of batch norms: of what tensor cores have summed one for each norm, else one for a norm,
/// for two that are added, or for one that a max pool reads.
const BEGINNINGS: [&str; 4] =
    ["norm_join_gradient", "norm_backward_sums", "norm_pair_backward_sums", "norm_pool_backward_sums"];

/// How many there are of each: tensor cores sum for norms with a convolution as their first reader that multiplies on them.
fn beginnings(device: &Device, network: &Network) -> [usize; 4] {
    let (layers, values) = (&network.computed().layers, &network.computed().values);
    let summed = |output: usize| {
        let first = layers.iter().position(|layer| layer.inputs().any(|input| input == output)).unwrap();
        let choice = network.choices()[first].as_ref();
        let direct = choice.is_some_and(|choice| choice.ways[Pass::InputGradient as usize] == Way::Direct);
        device.policy() != Policy::Direct && matches!(layers[first], Layer::Conv { .. }) && !direct
    };
    // What a norm of a sum adds, if that is a norm and neither has fewer features than their sum.
    let added = |layer: &Layer| match *layer {
        Layer::Norm { input, residual: Some(residual), output, .. } => {
            let also = layers.iter().find(|layer| layer.output() == residual);
            let Some(&Layer::Norm { input: also, residual: None, relu: false, .. }) = also else { return None };
            let [first, second, both] = [input, also, output].map(|value| values[value].features());
            (first == both && second == both).then_some(residual)
        }
        _ => None,
    };
    let all_added: Vec<usize> = layers.iter().filter_map(added).collect();
    let pooled = |layer: &Layer| if let Layer::MaxPool { input, .. } = *layer { Some(input) } else { None };
    let pooled: Vec<usize> = layers.iter().filter_map(pooled).collect();
    let mut counts = [0; 4];
    for layer in layers.iter().filter(|layer| matches!(layer, Layer::Norm { .. })) {
        let is_pair = added(layer).is_some();
        match summed(layer.output()) {
            _ if all_added.contains(&layer.output()) => {}
            _ if pooled.contains(&layer.output()) => counts[3] += 1,
            true => counts[0] += 1 + usize::from(is_pair),
            false => counts[1 + usize::from(is_pair)] += 1,
        }
    }
    counts
}

/// Distance of two gradients, by the length of the second if it has one.
fn apart(got: &[f32], want: &[f32]) -> f64 {
    let length = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let want_length = length(&mut want.iter().copied());
    length(&mut got.iter().zip(want).map(|(got, want)| got - want)) / if want_length > 0.0 { want_length } else { 1.0 }
}

/// Passes in bf16 whose gradients err as much as those of kernels of their own: half as much again all together, `each` times as
/// much by itself. Models in f32 and in bf16.
fn judged(device: &Device, label: &str, models: &[Model; 2], weights: &Weights, way: Way, each: f64) -> Passes {
    let direct = Device::host(HostOptions { policy: Policy::Direct, ..HostOptions::default() }).unwrap();
    let [full, naive] = models.each_ref().map(|model| passes(&direct, model, weights, way));
    let got = passes(device, &models[1], weights, way);
    let mut squares = [0.0; 2];
    for (name, want) in &full.gradients {
        let errors = [&got, &naive].map(|passes| apart(&passes.gradients[name], want));
        squares = [0, 1].map(|which| squares[which] + errors[which] * errors[which]);
        let [error, most] = errors;
        assert!(error <= each * most + 1e-3, "{label}: {name}: {error:.2e} off, by kernels of their own {most:.2e}");
    }
    let [error, most] = squares.map(f64::sqrt);
    assert!(error <= 1.5 * most, "{label}: all gradients: {error:.2e} off, by kernels of their own {most:.2e}");
    got
}

/// GELU and residual sums are those of what their convolutions have stored.
fn agrees(device: &Device, label: &str, masked: bool, way: Way) -> Passes {
    let label = format!("{label}: {}, masked {masked}", way.name());
    let models = [Precision::F32, Precision::Bf16].map(model);
    let got = judged(device, &label, &models, &weights(&models[1], masked), way, 1.5);
    let model = &models[1];
    let (mut gelus, mut sums) = (0, 0);
    for layer in &model.layers {
        match *layer {
            Layer::Gelu { input, output } => {
                let [want, _] = gelu_of(&got.values[input], &got.values[input]);
                for (i, (&got, want)) in got.values[output].iter().zip(want).enumerate() {
                    assert!((got - want).abs() <= want.abs() / 200.0 + 1e-6, "{label}: GELU: {i}: {got} for {want}");
                }
                gelus += 1;
            }
            Layer::Residual { input, branch, output, .. } => {
                let sum =
                    got.values[input].iter().zip(&got.values[branch]).map(|(x, y)| bf16::from_f32(x + y).to_f32());
                assert!(sum.eq(got.values[output].iter().copied()), "{label}: sum");
                sums += 1;
            }
            _ => {}
        }
    }
    assert_eq!((gelus, sums), (DEPTH, 2 * DEPTH), "{label}");
    got
}

/// The host as tensor cores are, whatever the order of threads, and as it is used, and the GPU where there is one.
fn cases() -> Vec<Case> {
    let staged = HostOptions { policy: Policy::Staged, schedule: Some(1), ..HostOptions::default() };
    let staged = Case { label: "host staged".into(), device: Device::host(staged).unwrap() };
    [staged].into_iter().chain(default_devices()).collect()
}

#[test]
#[cfg_attr(dilt_sanitize, ignore = "minutes, and the kernels are those of other tests")]
fn a_transformers_products_do_in_their_epilogues_what_kernels_of_their_own_do() {
    for case in cases() {
        let (device, label) = (&case.device, &case.label);
        for (masked, way) in [(false, Way::Dense), (true, Way::Dense), (true, Way::Groups), (true, Way::Direct)] {
            let got = agrees(device, label, masked, way);
            if device.policy() == Policy::Direct {
                continue;
            }
            // Rows by themselves are not multiplied on tensor cores, and groups leave the gradients of biases.
            let alone = if masked && way == Way::Direct { DEPTH } else { 0 };
            let biases = if masked && way != Way::Dense { 4 * DEPTH } else { 0 };
            let counts =
                ["gelu_forward", "gelu_backward", "residual_forward", "bias_gradient"].map(|k| got.launched(k));
            assert_eq!(counts, [alone, alone, 2 * alone, biases], "{label}: {}, masked {masked}", way.name());
        }
        if let Some(device) = by_wgmma(device) {
            let got = agrees(&device, &format!("{label}, wgmma"), false, Way::Dense);
            assert!(got.launched("conv_forward_wgmma") >= 4 * DEPTH, "{:?}", got.launched);
        }
    }
}

#[test]
#[cfg_attr(dilt_sanitize, ignore = "minutes, and the kernels are those of other tests")]
fn a_residual_networks_products_begin_the_backward_passes_of_its_norms() {
    let small = ["classes=3", "image=[2,16,16]", "widths=[8,16]", "stages=[2,2]"].map(String::from);
    for Case { label, device } in cases() {
        for name in ["resnet18", "resnet50", "resnet20"] {
            let models = [Precision::F32, Precision::Bf16].map(|precision| {
                let mut config = ModelConfig::load(name, &small).unwrap();
                config.precision = precision;
                config.build().unwrap()
            });
            let mut cases = tickets(&models[1]);
            cases.retain(|(ticket, _)| *ticket != "nothing");
            cases.push(("all", Weights { masks: BTreeMap::new(), ..cases[0].1.clone() }));
            for (ticket, weights) in cases {
                for way in Way::ALL {
                    let label = format!("{label}: {name}: {ticket}: {}", way.name());
                    // Norms have a few features: a rounding that falls otherwise decides about one.
                    let got = judged(&device, &label, &models, &weights, way, 3.0);
                    assert_eq!(BEGINNINGS.map(|kernel| got.launched(kernel)), got.beginnings, "{label}");
                    let [summed, _, of_pairs, of_pools] = got.beginnings;
                    let by_products = device.policy() != Policy::Direct && way != Way::Direct;
                    assert!(!by_products || summed >= 5, "{label}: {summed}");
                    let adds_norms = name != "resnet20" && weights.masks.is_empty();
                    assert!(!adds_norms || by_products || of_pairs > 0, "{label}: {of_pairs}");
                    assert_eq!(of_pools, usize::from(name != "resnet20"), "{label}");
                    if weights.masks.is_empty() {
                        break;
                    }
                }
            }
        }
    }
}

/// A network that is only evaluated uses memory of values again.
#[test]
fn evaluated_alone_a_transformer_has_the_logits_of_one_that_is_trained() {
    for case in cases() {
        let (device, model) = (&case.device, model(Precision::Bf16));
        let weights = weights(&model, false);
        let [trained, evaluated] = [Use::Train(OptimizerKind::Adamw), Use::Evaluate].map(|memory| {
            let mut network = network(device, &model, &weights, memory, Way::Dense);
            network.forward(Mode::Evaluate).unwrap();
            device.read_reals(network.head().logits).unwrap()
        });
        assert!(trained == evaluated && trained.iter().any(|&logit| logit != 0.0), "{}", case.label);
    }
}
