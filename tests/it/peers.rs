//! That dilt and its peers do the same jobs: each line of `benches/peers/jobs.jsonl`, which PyTorch's side counted and counts
//! again before it takes a time, beside dilt's own shapes, operations and parameters.

use std::collections::{BTreeMap, BTreeSet};

use dilt::device::Device;
use dilt::nn::config::ModelConfig;
use dilt::nn::layout::Layout;
use dilt::nn::model::{Layer, Model, Shape};
use dilt::nn::paths::Planning;
use dilt::nn::plan::Use;
use dilt::nn::traffic::{Work, training_step};
use dilt::ops::Columns;
use dilt::ops::conv::ConvShape;
use dilt::train::Recipe;
use serde_json::{Value, json};

use crate::command::json as output;

#[path = "../../benches/layers.rs"]
mod layers;

/// Models and batches of steps.
const STEPS: [(&str, usize); 5] = [
    ("resnet20", 128),
    ("resnet18_cifar", 128),
    ("resnet50", 128),
    ("vit_small_patch16_224", 64),
    ("deit_tiny_patch16_224", 16),
];
/// Heads, their features, tokens, samples.
const ATTENTION: [[usize; 4]; 4] = [[6, 64, 197, 64], [12, 64, 197, 64], [3, 64, 197, 16], [4, 32, 65, 128]];
/// Whose parameters are stepped and pruned.
const LARGE: [&str; 2] = ["resnet50", "vit_base_patch16_224"];

/// Layers whose representations are compared, and their features.
const REPRESENTATIONS: [(&str, usize); 8] = [
    ("classes", 10),
    ("classes_projected", 64),
    ("relu0", 48),
    ("relu1", 64),
    ("relu2", 40),
    ("relu3", 80),
    ("sphere", 8),
    ("sphere_projected", 30),
];
const PROBES: usize = 256;

fn jobs() -> BTreeMap<String, Value> {
    let lines = include_str!("../../benches/peers/jobs.jsonl").lines();
    let jobs = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
    let named: Vec<(String, Value)> = jobs.map(|job| (job["name"].as_str().unwrap().to_owned(), job)).collect();
    let count = named.len();
    let jobs: BTreeMap<String, Value> = named.into_iter().collect();
    assert_eq!(jobs.len(), count, "each name once");
    jobs
}

fn model_of(name: &str) -> (Model, Recipe) {
    let config = ModelConfig::load(name, &[]).unwrap();
    (config.build().unwrap(), Recipe::from_table(&config.train).unwrap())
}

/// dilt's own jobs, without their counts, by name: kind, shape and parameters.
fn own() -> BTreeMap<String, Value> {
    let mut own = BTreeMap::new();
    let mut job = |name: String, kind: &str, shape: Value, parameters: usize| {
        let job = json!({ "kind": kind, "shape": shape, "parameters": parameters });
        assert!(own.insert(name.clone(), job).is_none(), "{name}: twice");
    };
    for (model, batch) in STEPS {
        let (network, _) = model_of(model);
        let image = [&[batch], &network.image[..]].concat();
        let shape = json!({ "input": image, "output": [batch, network.classes] });
        job(format!("step {model}, batch {batch}"), "step", shape, network.parameter_count());
    }
    for (name, shape) in layers::layers().unwrap() {
        let kind = name.split(' ').next().unwrap().to_owned();
        job(name, &kind, json!(shape.to_string()), shape.weight_len());
    }
    for [heads, head_dim, t, n] in ATTENTION {
        let shape = json!({ "heads": heads, "head_dim": head_dim, "t": t, "n": n });
        job(format!("attention {heads} heads of {head_dim}, {t} tokens, {n} samples"), "attention", shape, 0);
    }
    for model in LARGE {
        let elements = model_of(model).0.parameter_count();
        for optimizer in ["sgd", "adamw"] {
            job(format!("{optimizer} {model}"), "optimizer", json!({ "elements": elements }), elements);
        }
        let shape = json!({ "elements": elements, "remove": elements / 5 });
        job(format!("prune {model}"), "prune", shape, elements);
    }
    let pairs = REPRESENTATIONS.len() * (REPRESENTATIONS.len() - 1) / 2;
    let features: BTreeMap<_, _> = REPRESENTATIONS.into();
    let shape = json!({ "probes": PROBES, "features": features, "pairs": pairs });
    job(format!("similarity of {} layers, {PROBES} probes", features.len()), "similarity", shape, 0);
    own
}

/// The shape of a peer's layer, as dilt writes its own.
fn layer_shape(shape: &Value) -> String {
    let size = |key: &str| shape[key].as_u64().unwrap_or_else(|| panic!("{key} of {shape}")) as usize;
    let [c, k, n] = ["c", "k", "n"].map(size);
    let shape = match shape.get("t") {
        Some(_) => ConvShape::new([c, 1, 1], k, [1, 1], 1, 0, Columns::tokens(n, size("t")).unwrap().len()),
        None => ConvShape::new([c, size("h"), size("w")], k, [size("r"), size("s")], size("stride"), size("pad"), n),
    };
    shape.unwrap().to_string()
}

#[test]
fn both_sides_have_the_same_jobs_of_the_same_shapes() {
    let (jobs, own) = (jobs(), own());
    assert_eq!(jobs.keys().collect::<BTreeSet<_>>(), own.keys().collect::<BTreeSet<_>>());
    for (name, job) in &jobs {
        let own = &own[name];
        let shape = match job["kind"].as_str().unwrap() {
            "conv" | "linear" => json!(layer_shape(&job["shape"])),
            _ => job["shape"].clone(),
        };
        assert_eq!(
            (&job["kind"], &shape, &job["parameters"]),
            (&own["kind"], &own["shape"], &own["parameters"]),
            "{name}"
        );
    }
}

#[test]
fn operations_have_the_same_number_of_operations() {
    let folder = tempfile::tempdir().unwrap();
    for (name, job) in jobs() {
        if job["kind"] == "step" || job["kind"] == "similarity" {
            continue;
        }
        let sizes = job["shape"].as_object().unwrap().iter().map(|(key, size)| format!("{key}={size}"));
        let shape = sizes.collect::<Vec<_>>().join(",");
        let (ops, flop) = (job["op"].as_array().unwrap(), job["flop"].as_array().unwrap());
        assert!(ops.len() == flop.len() && !ops.is_empty(), "{name}");
        for (op, flop) in ops.iter().zip(flop) {
            let op = op.as_str().unwrap();
            let bench = ["bench", "--op", op, "--shape", &shape, "--bytes", "-q", "--device", "host"];
            let row = &output(folder.path(), &bench)["rows"][0];
            assert_eq!(&row["flop"], flop, "{name}: {op}");
            assert!(row["read_bytes"].as_u64().unwrap() > 0, "{name}: {op}");
        }
    }
}

/// A proximal step of all pairs of the layers is what `--op couplings` measures by itself.
#[test]
fn similarities_have_as_many_couplings_as_the_operation_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let list = output(folder.path(), &["bench", "--op", "list"]);
    let op = list["rows"].as_array().unwrap().iter().find(|op| op["name"] == "couplings").unwrap();
    let jobs = jobs();
    let shape = &jobs.values().find(|job| job["kind"] == "similarity").unwrap()["shape"];
    let expected = format!("probes={},count={},", shape["probes"], shape["pairs"]);
    assert!(op["shape"].as_str().unwrap().starts_with(&expected), "{expected} {op}");
}

/// The products of a model, as `jobs.py` names them, and how often each occurs.
fn products(model: &Model) -> BTreeMap<String, usize> {
    let mut products = BTreeMap::new();
    for layer in &model.layers {
        let name = match *layer {
            Layer::Conv { weight, stride, pad, input, .. } => {
                let weight = &model.parameters[weight].shape;
                match model.values[input].shape {
                    Shape::Image([c, h, w]) if [h, w] != [1, 1] => {
                        let [k, r, s] = [weight[0], weight[2], weight[3]];
                        format!("conv {c}x{h}x{w} to {k}, {r}x{s}, stride {stride}, pad {pad}")
                    }
                    _ => {
                        let (outputs, inputs) = (weight[0], weight[1..].iter().product::<usize>());
                        format!("linear {inputs} to {outputs}, {} tokens", model.true_tokens(input))
                    }
                }
            }
            Layer::Attention { heads, output, .. } => {
                let Shape::Tokens { features, tokens } = model.values[output].shape else {
                    panic!("attention of images")
                };
                format!("attention {heads} heads of {}, {tokens} tokens", features / heads)
            }
            _ => continue,
        };
        *products.entry(name).or_insert(0) += 1;
    }
    products
}

#[test]
fn steps_multiply_the_same_in_every_layer() {
    let device = Device::open("host").unwrap();
    for (name, job) in jobs() {
        let Some(model) = job["model"].as_str().filter(|_| job["kind"] == "step") else { continue };
        let batch = job["batch"].as_u64().unwrap() as usize;
        let (model, recipe) = model_of(model);
        assert_eq!(job["products"], json!(products(&model)), "{name}");
        assert_eq!(job["optimizer"], json!(recipe.optimizer), "{name}");
        assert_eq!(job["clip_norm"], json!(recipe.clip_norm), "{name}");
        let memory_for = Use::Train(recipe.optimizer);
        let layout = Layout::new(&device, &model, &BTreeMap::new(), batch, memory_for, &Planning::Table).unwrap();
        let step = training_step(&device, &layout, batch, memory_for, false).unwrap();
        let [forward, backward]: [Work; 2] =
            [step.iter().map(|layer| layer.forward).sum(), step.iter().map(|layer| layer.backward).sum()];
        assert_eq!(job["flop"], json!([forward.flop, backward.flop]), "{name}");
    }
}
