//! Whole networks against PyTorch in float64: torchvision's at 224, ten steps of ResNet-20, the published weights.

use std::path::{Path, PathBuf};

use dilt::mask::Mask;
use dilt::nn::config::ModelConfig;
use dilt::nn::model::Model;
use dilt::nn::network::{Mode, Network, Optimizer};
use dilt::nn::plan::Use;
use dilt::nn::weights::Weights;
use dilt::ops::optimizer::Sgd;
use ndarray::ArrayD;
use safetensors::SafeTensors;

use crate::command::{json, output};
use crate::support::{Golden, Tensor, default_devices};
use crate::training::Descent;

// ------------------------------------------------------------------ the formula of tests/golden/agreement.py

/// 24 bits for each element of a tensor: the top of SplitMix64 (Steele et al. 2014), begun at FNV-1a of the name.
pub fn bits(name: &str) -> impl Iterator<Item = u64> {
    let fnv = |key: u64, byte: u8| (key ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    let key = name.bytes().fold(0xcbf2_9ce4_8422_2325, fnv);
    (1u64..).map(move |i| {
        let z = key.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) >> 40
    })
}

/// Numbers from -1 to below 1.
pub fn unit(name: &str) -> impl Iterator<Item = f64> {
    bits(name).map(|bits| bits as f64 / f64::from(1 << 23) - 1.0)
}

/// Images `[n, channels, height, width]`.
fn images(name: &str, shape: &[usize]) -> Tensor {
    let data = unit(name).take(shape.iter().product()).map(|u| f64::from((1.75 * u) as f32)).collect();
    Tensor { shape: shape.to_vec(), data }
}

/// Images, samples last, and labels of each of some steps.
pub fn batches(name: &str, steps: usize, samples: usize, model: &Model) -> impl Fn(usize) -> (Vec<f32>, Vec<u32>) {
    let [channels, height, width] = model.image;
    let all = images(&format!("{name} x"), &[steps * samples, channels, height, width]).data;
    let label = |bits| (bits % model.classes as u64) as u32;
    let labels: Vec<u32> = bits(&format!("{name} labels")).take(steps * samples).map(label).collect();
    move |step| {
        let data = all.chunks(all.len() / steps).nth(step).unwrap().to_vec();
        let x = Tensor { shape: vec![samples, channels, height, width], data };
        (x.samples_last(), labels[step * samples..][..samples].to_vec())
    }
}

fn weights(model: &Model) -> Weights {
    let mut weights = Weights::default();
    for (name, shape) in model.file_tensors() {
        let fan_in = shape[1..].iter().product::<usize>() as f64;
        let value = |u: f64| match name.as_str() {
            _ if shape.len() > 1 => u * (6.0 / fan_in).sqrt(),
            name if name.ends_with("running_var") => 1.0 + 0.5 * u,
            name if name.ends_with(".weight") => 1.0 + 0.1 * u,
            _ => 0.1 * u,
        };
        let values = unit(&name).take(shape.iter().product()).map(|u| value(u) as f32).collect();
        weights.tensors.insert(name, ArrayD::from_shape_vec(shape, values).unwrap());
    }
    weights
}

fn model(name: &str) -> Model {
    ModelConfig::load(name, &[]).unwrap().build().unwrap()
}

// ------------------------------------------------------------------------------------------- without real files

/// PyTorch's own f32 run stays within 4.5e-7 of the largest logit and 2.7e-5 of the losses; the host device, with any
/// instruction set and policy, within 1.6e-6 and 4.8e-5.
const LOGITS: f64 = 1e-5;
const LOSSES: f64 = 3e-4;

/// Evaluates two images by a model of which the golden file has a case.
pub fn logits_agree(golden: &Golden, model: &Model, weights: &Weights) {
    let (name, samples) = (&model.name, 2);
    let [channels, height, width] = model.image;
    let x = images(&format!("{name} x"), &[samples, channels, height, width]).samples_last();
    for case in default_devices() {
        let device = &case.device;
        let mut network = Network::new(device, model, samples, Use::Evaluate).unwrap();
        network.load(weights).unwrap();
        let batch = network.batch();
        device.write_reals(&x, batch.x).unwrap();
        device.write(&[samples as u32], batch.current.count).unwrap();
        network.forward(Mode::Evaluate).unwrap();
        let logits = device.read_reals(network.head().logits).unwrap();
        let (want, label) = (golden.get(name, "logits"), format!("{}: {name}", case.label));
        let error = want.check_samples_last(&logits, LOGITS, &label);
        eprintln!("{label}: logits differ by at most {error:.1e} of the largest");
    }
}

fn resnet_agrees(name: &str) {
    let model = model(name);
    logits_agree(&Golden::open("agreement"), &model, &weights(&model));
}

#[test]
fn resnet18_agrees_with_torchvision() {
    resnet_agrees("resnet18");
}

#[test]
#[cfg_attr(dilt_sanitize, ignore = "minutes, and the same kernels as in ResNet-18")]
fn resnet50_agrees_with_torchvision() {
    resnet_agrees("resnet50");
}

fn ten_steps_agree(case: &str, masked: bool) {
    let (golden, model) = (Golden::open("agreement"), model("resnet20"));
    let mut weights = weights(&model);
    for parameter in model.prunable().filter(|_| masked) {
        let keep: Vec<u64> = bits(&format!("{} mask", parameter.name)).take(parameter.elements()).collect();
        let mask = Mask::from_fn(&parameter.shape, |i| keep[i].is_multiple_of(10));
        weights.masks.insert(parameter.name.clone(), mask);
    }
    let setting = |key| golden.number(case, key) as f32;
    let (momentum, weight_decay) = (setting("momentum"), setting("weight_decay"));
    let optimizer = Optimizer::Sgd(Sgd { momentum, nesterov: false, weight_decay });
    let samples = golden.number(case, "batch") as usize;
    let steps = golden.get(case, "losses").data.len();
    let descent = Descent { model: &model, weights: &weights, samples, steps, rate: setting("lr"), optimizer };
    let batch = batches("resnet20", steps, samples, &model);
    for device in default_devices() {
        let (losses, _) = descent.run(&device.device, &batch, |_, _| {});
        each_agrees(&golden.get(case, "losses"), &losses, LOSSES, &format!("{}: {case}", device.label));
    }
}

/// Compares each loss with PyTorch's, relative to it.
pub fn each_agrees(want: &Tensor, got: &[f32], tolerance: f64, label: &str) {
    assert_eq!(got.len(), want.data.len(), "{label}: steps");
    let errors = got.iter().zip(&want.data).map(|(&got, &want)| (f64::from(got) - want).abs() / want);
    let (step, error) = errors.enumerate().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    eprintln!("{label}: losses differ by at most {error:.1e} of each");
    let (want, got) = (want.data[step], got[step]);
    assert!(error <= tolerance, "{label}: step {step}: expected {want}, got {got}: relative error {error:.1e}");
}

#[test]
#[cfg_attr(dilt_sanitize, ignore = "minutes, and the kernels are those of training::")]
fn ten_steps_of_resnet20_follow_pytorch() {
    ten_steps_agree("resnet20_dense", false);
}

#[test]
#[cfg_attr(dilt_sanitize, ignore = "minutes, and the kernels are those of training::")]
fn ten_steps_of_resnet20_under_a_mask_follow_pytorch() {
    ten_steps_agree("resnet20_masked", true);
}

// ---------------------------------------------------------------------------------------------- with real files

/// The folder that `DILT_DATA` names, if it holds these files; else says what was skipped.
fn real_data(needs: &[&str]) -> Option<PathBuf> {
    let Some(folder) = std::env::var_os("DILT_DATA").map(PathBuf::from) else {
        eprintln!("skipped: DILT_DATA does not name the folder of the real files");
        return None;
    };
    match needs.iter().map(|file| folder.join(file)).find(|file| !file.is_file()) {
        None => Some(folder),
        Some(lacks) => {
            eprintln!("skipped: DILT_DATA has no {}", lacks.display());
            None
        }
    }
}

/// What the published weights were trained with.
const NORMALISED: &[&str] = &["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225", "-q"];

fn published(data: &Path, name: &str) -> String {
    data.join("weights").join(name).to_string_lossy().into_owned()
}

fn cifar10(data: &Path) -> String {
    format!("cifar10={}", data.join("cifar10").display())
}

fn logits(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.tensor("logits").unwrap().data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Evaluates published weights on all test images of CIFAR-10.
fn published_accuracy(model: &str, top1: f64) {
    let (weights, theirs) = (format!("{model}_cifar10.safetensors"), format!("{model}_cifar10.logits.safetensors"));
    let needs = [&format!("weights/{weights}"), &format!("weights/{theirs}"), "cifar10/test_batch.bin"];
    let Some(data) = real_data(&needs.map(|need| need as &str)) else { return };
    let folder = tempfile::tempdir().unwrap();
    let (weights, set) = (published(&data, &weights), cifar10(&data));
    let eval = ["eval", "--model", model, "--weights", &weights, "--data", &set, "--logits", "logits.safetensors"];
    let result = json(folder.path(), &[&eval, NORMALISED].concat());
    assert_eq!(result["examples"], 10_000);
    assert_eq!(result["top1"].as_f64(), Some(top1));
    let ours = logits(&folder.path().join("logits.safetensors"));
    let theirs = logits(Path::new(&published(&data, &theirs)));
    assert_eq!(ours.len(), theirs.len());
    let largest = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
    eprintln!("{model}: logits of 10,000 images differ by at most {largest:.1e} from PyTorch's");
    assert!(largest <= 1e-3, "{model}: logits differ by {largest}");
}

#[test]
fn the_published_resnet20_has_its_published_accuracy() {
    published_accuracy("resnet20", 0.9173);
}

#[test]
fn the_published_resnet32_has_its_published_accuracy() {
    published_accuracy("resnet32", 0.9263);
}

#[test]
fn ten_steps_from_the_published_weights_follow_pytorch() {
    let needs = ["weights/resnet20_cifar10.safetensors", "cifar10/data_batch_1.bin", "cifar10/test_batch.bin"];
    let Some(data) = real_data(&needs) else { return };
    let golden = Golden::open("real_resnet20");
    let folder = tempfile::tempdir().unwrap();
    let (weights, set) = (published(&data, "resnet20_cifar10.safetensors"), cifar10(&data));
    output(folder.path(), &["prune", "--weights", &weights, "--sparsity", "0.9", "--out", "t.safetensors", "-q"]);
    for (case, weights) in [("dense", weights.as_str()), ("masked", "t.safetensors")] {
        let batch = golden.text(case, "batch");
        let train = ["train", "--model", "resnet20", "--weights", weights, "--data", &set, "--limit", "640"];
        let recipe = ["--steps", "10", "--batch", &batch, "--shuffle", "false", "--augment", "none"];
        let rates = ["--schedule", "constant", "--lr", "0.002", "--momentum", "0.9", "--weight-decay", "0.1"];
        output(folder.path(), &[&train, NORMALISED, &recipe, &rates, &["--out", case]].concat());
        let metrics = std::fs::read_to_string(folder.path().join(case).join("metrics.csv")).unwrap();
        let losses: Vec<f32> =
            metrics.lines().skip(1).map(|row| row.split(',').nth(2).unwrap().parse().unwrap()).collect();
        each_agrees(&golden.get(case, "losses"), &losses, 1e-3, &format!("published resnet20, {case}"));
    }
}
