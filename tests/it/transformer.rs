//! Vision transformers against timm: logits, gradients, steps of AdamW, positions, names; heads that are left out.

use std::path::Path;
use std::time::Duration;

use dilt::device::{Device, HostOptions};
use dilt::mask::Mask;
use dilt::nn::config::ModelConfig;
use dilt::nn::init;
use dilt::nn::model::Model;
use dilt::nn::network::{Mode, Network};
use dilt::nn::plan::{Group, OptimizerKind, Plan, Use};
use dilt::nn::positions::resample;
use dilt::nn::weights::Weights;
use dilt::train::Recipe;
use ndarray::{ArrayD, Axis};

use crate::agreement::{batches, bits, each_agrees, logits_agree, unit};
use crate::command::{assert_same_files, fails, json, output};
use crate::resume::kill_after;
use crate::support::{Golden, default_devices, on_devices};
use crate::training::Descent;

/// PyTorch's own f32 run stays within 1.5e-6 of each gradient's largest value, dilt's too (1.6e-6).
const GRADIENTS: f64 = 1e-5;
/// PyTorch's own f32 run stays within 1.8e-7 of each loss, dilt's within 3.1e-7.
const LOSSES: f64 = 1e-5;
/// Of the largest value: sums over kept weights alone have another order than those over all.
const ORDER: f32 = 2e-6;
/// timm resamples in f32, where places of up to 14 are rounded by 5e-7, and so are the weights; measured 1.6e-6.
const POSITIONS: f64 = 3e-6;

fn model(name: &str, set: &[&str]) -> Model {
    let set: Vec<String> = set.iter().map(|text| (*text).into()).collect();
    ModelConfig::load(name, &set).unwrap().build().unwrap()
}

/// The small network of tests/golden/transformer.py.
fn small(set: &[&str]) -> Model {
    let sizes = ["image=[3,16,16]", "patch=4", "dim=24", "depth=2", "heads=3", "mlp=1.5", "classes=7"];
    model("vit", &[&sizes, set].concat())
}

/// The formula of tests/golden/transformer.py.
fn weights(model: &Model) -> Weights {
    let mut weights = Weights::default();
    for (name, shape) in model.file_tensors() {
        let fan_in = shape[1..].iter().product::<usize>() as f64;
        let value = |u: f64| match name.as_str() {
            "cls_token" | "pos_embed" => 0.5 * u,
            _ if shape.len() > 1 => u * (3.0 / fan_in).sqrt(),
            name if name.ends_with(".weight") || name.ends_with(".gamma") => 1.0 + 0.3 * u,
            _ => 0.1 * u,
        };
        let values = unit(&name).take(shape.iter().product()).map(|u| value(u) as f32).collect();
        weights.tensors.insert(name, ArrayD::from_shape_vec(shape, values).unwrap());
    }
    weights
}

/// What a step computes.
struct Step {
    logits: Vec<f32>,
    loss: Vec<f32>,
    /// By parameter, in the model's order.
    gradients: Vec<(String, Vec<f32>)>,
}

/// A step on three samples; what it computes before its update.
fn step(device: &Device, model: &Model, weights: &Weights) -> Step {
    let samples = 3;
    let optimizer = Recipe::default().optimizer();
    let descent = Descent { model, weights, samples, steps: 1, rate: 0.0, optimizer };
    let (mut logits, mut gradients) = (Vec::new(), Vec::new());
    let (loss, _) = descent.run(device, batches("small", 1, samples, model), |_, network| {
        logits = device.read_reals(network.head().logits).unwrap();
        let gradient = |name: &str| network.parameter_gradient(name).unwrap().unwrap();
        gradients = model.parameters.iter().map(|p| (p.name.clone(), gradient(&p.name))).collect();
    });
    Step { logits, loss, gradients }
}

// ------------------------------------------------------------------------------------------------ agreement with timm

#[test]
fn logits_and_all_gradients_of_every_kind_agree_with_timm() {
    let golden = Golden::open("transformer");
    let kinds: [(&str, &[&str]); 7] = [
        ("class_token", &[]),
        ("no_class_token", &["class_token=false"]),
        ("class_token_mean", &["pool=mean"]),
        ("mean_before_norm", &["class_token=false", "fc_norm=false"]),
        ("pre_norm", &["pre_norm=true"]),
        ("layer_scale", &["layer_scale=0.1"]),
        ("no_qkv_bias", &["qkv_bias=false"]),
    ];
    let largest = std::cell::Cell::new(0.0);
    on_devices(|device, label| {
        let mut results = Vec::new();
        // ThreadSanitizer sees every kernel in the first.
        for (case, set) in &kinds[..if cfg!(dilt_sanitize = "thread") { 1 } else { kinds.len() }] {
            let model = small(set);
            let Step { logits, loss, gradients } = step(device, &model, &weights(&model));
            golden.get(case, "logits").check_samples_last(&logits, GRADIENTS, &format!("{label}: {case}: logits"));
            golden.get(case, "loss").check(&loss, GRADIENTS, &format!("{label}: {case}: loss"));
            for (name, gradient) in &gradients {
                let want = golden.get(case, &format!("grad/{name}"));
                let error = want.check(gradient, GRADIENTS, &format!("{label}: {case}: gradient of {name}"));
                largest.set(error.max(largest.get()));
            }
            results.extend([logits, loss]);
            results.extend(gradients.into_iter().map(|(_, gradient)| gradient));
        }
        results
    });
    eprintln!("gradients differ by at most {:.1e} of each tensor's largest", largest.get());
}

#[test]
#[cfg_attr(dilt_sanitize = "thread", ignore = "minutes, and the kernels are those of small networks")]
fn a_vit_for_cifar_agrees_with_timm() {
    let model = model("vit_tiny_cifar", &[]);
    logits_agree(&Golden::open("transformer"), &model, &weights(&model));
}

#[test]
#[cfg_attr(dilt_sanitize, ignore = "minutes, and the kernels are those of small networks")]
fn deit_tiny_agrees_with_timm() {
    let model = model("deit_tiny_patch16_224", &[]);
    logits_agree(&Golden::open("transformer"), &model, &weights(&model));
}

fn twenty_steps_agree(case: &str, masked: bool) {
    let (golden, model) = (Golden::open("transformer"), small(&[]));
    let mut weights = weights(&model);
    let pruned = [".attn.qkv.weight", ".attn.proj.weight", ".mlp.fc1.weight", ".mlp.fc2.weight"];
    let is_pruned = |name: &str| masked && pruned.iter().any(|ending| name.ends_with(ending));
    for parameter in model.parameters.iter().filter(|parameter| is_pruned(&parameter.name)) {
        let keep: Vec<u64> = bits(&format!("{} mask", parameter.name)).take(parameter.elements()).collect();
        weights.masks.insert(parameter.name.clone(), Mask::from_fn(&parameter.shape, |i| keep[i].is_multiple_of(4)));
    }
    assert_eq!(weights.masks.len(), if masked { 8 } else { 0 });
    let setting = |key| golden.number(case, key) as f32;
    let recipe = Recipe { optimizer: OptimizerKind::Adamw, weight_decay: setting("weight_decay"), ..Recipe::default() };
    let (optimizer, samples) = (recipe.optimizer(), golden.number(case, "batch") as usize);
    let want = golden.get(case, "losses");
    let steps = want.data.len();
    let descent = Descent { model: &model, weights: &weights, samples, steps, rate: setting("lr"), optimizer };
    let batch = batches("steps", steps, samples, &model);
    for device in default_devices() {
        let (losses, network) = descent.run(&device.device, &batch, |_, _| {});
        each_agrees(&want, &losses, LOSSES, &format!("{}: {case}", device.label));
        let after = network.weights().unwrap();
        for (name, mask) in &weights.masks {
            let pruned = after.tensors[name].iter().zip(mask.iter()).filter(|(_, kept)| !kept);
            assert!(pruned.map(|(w, _)| w).all(|w| w.to_bits() == 0), "a pruned weight of {name} is not exactly zero");
        }
    }
}

#[test]
fn twenty_steps_of_adamw_follow_pytorch() {
    twenty_steps_agree("steps_dense", false);
}

#[test]
fn twenty_steps_of_adamw_under_a_mask_follow_pytorch() {
    twenty_steps_agree("steps_masked", true);
}

#[test]
fn positions_are_resampled_as_timm_does() {
    let golden = Golden::open("transformer");
    let cases: Vec<String> = golden.cases().into_iter().filter(|case| case.starts_with("positions")).collect();
    assert_eq!(cases.len(), 8);
    let mut largest = 0.0f64;
    for case in cases {
        let grid = |key| {
            let text = golden.text(&case, key);
            let (rows, columns) = text.split_once('x').unwrap();
            [rows, columns].map(|size| size.parse().unwrap())
        };
        let (before, want) = (golden.get(&case, "before"), golden.get(&case, "after"));
        let before = ArrayD::from_shape_vec(before.shape.clone(), before.f32()).unwrap();
        let after = resample(&before, golden.number(&case, "prefix") as usize, grid("old"), grid("new"));
        assert_eq!(after.shape(), want.shape, "{case}");
        let after: Vec<f32> = after.iter().copied().collect();
        largest = largest.max(want.check(&after, POSITIONS, &case));
    }
    eprintln!("resampled positions differ by at most {largest:.1e} of the largest");
}

#[test]
fn names_order_and_shapes_of_parameters_are_those_of_timm() {
    let golden = Golden::open("transformer");
    for size in ["vit_tiny", "vit_small", "vit_base", "deit_tiny", "deit_small"] {
        let name = format!("{size}_patch16_224");
        let shape = |sizes: &[usize]| sizes.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
        let parameters = model(&name, &[]).parameters;
        let ours: Vec<String> = parameters.iter().map(|p| format!("{}:{}", p.name, shape(&p.shape))).collect();
        let theirs = golden.text(&format!("{name} parameters"), "table");
        assert_eq!(ours, theirs.split(';').collect::<Vec<_>>(), "{name}");
    }
}

// ------------------------------------------------------------------------------------------------------- by themselves

/// The same weights, zero where they are pruned, without masks.
fn zeroed(weights: &Weights) -> Weights {
    let mut zeroed = Weights { tensors: weights.tensors.clone(), ..Weights::default() };
    for (name, mask) in &weights.masks {
        let tensor = zeroed.tensors.get_mut(name).unwrap().iter_mut();
        tensor.zip(mask.iter()).filter(|(_, kept)| !kept).for_each(|(w, _)| *w = 0.0);
    }
    zeroed
}

#[test]
fn a_head_that_no_projection_reads_is_left_out_and_nothing_else_changes() {
    let model = small(&[]);
    let (dim, head) = (24, 8);
    // Head 1 of the first block, heads 0 and 2 of the second; of head 0 in the first all queries, which leaves it a mean.
    let is_pruned = |name: &str, i: usize| match name {
        "blocks.0.attn.proj.weight" => i % dim / head == 1,
        "blocks.1.attn.proj.weight" => i % dim / head != 1,
        "blocks.0.attn.qkv.weight" => i / dim < head,
        _ => false,
    };
    let mut weights = weights(&model);
    for parameter in &model.parameters {
        let mask = Mask::from_fn(&parameter.shape, |i| !is_pruned(&parameter.name, i));
        if mask.count() < mask.len() {
            weights.masks.insert(parameter.name.clone(), mask);
        }
    }
    assert_eq!(weights.masks.len(), 3);
    on_devices(|device, label| {
        let (masked, full) = (step(device, &model, &weights), step(device, &model, &zeroed(&weights)));
        let agrees = |masked: &[f32], full: &[f32], what: &str| {
            let largest = full.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            let differs = masked.iter().zip(full).find(|(a, b)| (**a - **b).abs() > ORDER * largest);
            assert_eq!(differs, None, "{label}: {what}: the largest is {largest}");
        };
        agrees(&masked.logits, &full.logits, "logits");
        for ((name, gradient), (_, full)) in masked.gradients.iter().zip(&full.gradients) {
            let both = || gradient.iter().zip(full).enumerate();
            let kept = |values: &[f32]| -> Vec<f32> {
                values.iter().enumerate().filter(|(i, _)| !is_pruned(name, *i)).map(|(_, value)| *value).collect()
            };
            agrees(&kept(gradient), &kept(full), name);
            let none = both().filter(|(i, _)| is_pruned(name, *i)).all(|(_, (a, _))| *a == 0.0);
            let some = both().filter(|(i, _)| is_pruned(name, *i)).any(|(_, (_, b))| *b != 0.0);
            if name.ends_with("attn.proj.weight") {
                assert!(none && some, "{label}: {name}: the heads have outputs, unless they are left out");
            }
        }
        vec![masked.logits]
    });
}

#[test]
fn saved_and_loaded_a_network_computes_the_same_bits() {
    let model = small(&["layer_scale=0.1"]);
    let device = Device::host(HostOptions::default()).unwrap();
    let recipe = Recipe { optimizer: OptimizerKind::Adamw, ..Recipe::default() };
    let (weights, optimizer) = (weights(&model), recipe.optimizer());
    let descent = Descent { model: &model, weights: &weights, samples: 20, steps: 2, rate: 1e-3, optimizer };
    let (_, mut network) = descent.run(&device, batches("steps", 2, 20, &model), |_, _| {});
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    network.weights().unwrap().save(&path).unwrap();
    let mut loaded = Network::new(&device, &model, 20, Use::Evaluate).unwrap();
    loaded.load(&Weights::load(&path).unwrap()).unwrap();
    let (x, _) = batches("steps", 2, 20, &model)(0);
    let [before, after] = [&mut network, &mut loaded].map(|network| {
        let into = network.batch();
        device.write_reals(&x, into.x).unwrap();
        device.write(&[20], into.current.count).unwrap();
        network.forward(Mode::Evaluate).unwrap();
        device.read_reals(network.head().logits).unwrap().iter().map(|value| value.to_bits()).collect::<Vec<_>>()
    });
    assert_eq!(before, after);
}

#[test]
fn memory_grows_linearly_with_the_number_of_tokens() {
    let device = Device::host(HostOptions::default()).unwrap();
    let passes = [Group::Activations, Group::ActivationGradients, Group::Statistics, Group::Scratch];
    for memory_for in [Use::Train(OptimizerKind::Adamw), Use::Evaluate] {
        // 17, 65 and 257 tokens, padded to 24, 72 and 264.
        let [small, medium, large] = [16, 32, 64].map(|size| {
            let plan = Plan::new(&device, &small(&[&format!("image={size}")]), 8, memory_for).unwrap();
            passes.iter().map(|&group| plan.group_bytes(group)).sum::<usize>() as f64
        });
        let growth = (large - medium) / (medium - small);
        assert!(growth < 4.4, "{memory_for:?}: four times as many tokens more take {growth} times the memory");
        assert!(large / small < 16.0, "{memory_for:?}: from {small} to {large} bytes");
    }
}

// ---------------------------------------------------------------------------------------------------------- bad input

fn drawn(set: &[&str], path: &Path) {
    init::draw(&model("vit_digits", set), 0).save(path).unwrap();
}

#[test]
fn sizes_that_do_not_fit_say_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let train = |set| ["train", "--model", "vit_digits", "--set", set, "--steps", "1", "--out", "w"];
    fails(folder.path(), &train("heads=5"), 2, &["vit_digits", "expected heads that divide dim", "5 heads", "dim 48"]);
    let patch =
        ["vit_digits", "expected images", "multiples of the patch, 3", "got 8x8", "--image-size", "--set patch"];
    fails(folder.path(), &train("patch=3"), 2, &patch);
    fails(folder.path(), &train("dim=387"), 2, &["at most 128 features", "got 129", "choose more heads"]);
    let pool = ["expected class_token = true", "got false", "choose pool mean"];
    fails(folder.path(), &train("pool=token"), 2, &pool);
    assert!(!folder.path().join("w").exists());
}

#[test]
fn weights_of_other_tokens_say_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let file = "weights.safetensors";
    let path = folder.path().join(file);
    let eval = ["eval", "--model", "vit_digits", "--weights", file];
    drawn(&["class_token=true"], &path);
    let says = ["\"cls_token\", got [1, 1, 48]", "have a class token, the model has none", "--set class_token=true"];
    fails(folder.path(), &eval, 2, &says);
    let with_token = [&eval[..], &["--set", "class_token=true"]].concat();
    json(folder.path(), &with_token);
    drawn(&[], &path);
    let says = ["\"cls_token\", expected [1, 1, 48]", "the weights have none", "--set class_token=false"];
    fails(folder.path(), &with_token, 2, &says);

    drawn(&["image=[1,16,16]"], &path);
    let says = ["\"pos_embed\", expected [1, 4, 48], got [1, 16, 48]", "another size", "--image-size"];
    fails(folder.path(), &eval, 2, &says);
    json(folder.path(), &[&eval[..], &["--image-size", "8"]].concat());
    drawn(&["image=[1,8,20]"], &path);
    let says = ["pos_embed", "of a square", "got [1, 10, 48]", "class_token"];
    fails(folder.path(), &[&eval[..], &["--image-size", "8"]].concat(), 2, &says);
}

/// A network whose training takes a fraction of a second, and in which everything random is at work.
const QUICK: &[&str] = &[
    "--model",
    "vit_digits",
    "--set",
    "dim=24",
    "--set",
    "class_token=true",
    "--set",
    "dropout=0.1",
    "--set",
    "stochastic_depth=0.2",
    "--set",
    "layer_scale=0.1",
    "--limit",
    "160",
    "--epochs",
    "2",
    "--batch",
    "32",
    "-q",
];

/// Kept / all weights of each head of a block, counted in PyTorch's terms.
fn densities(ticket: &Weights, block: &str, heads: usize) -> Vec<f64> {
    let mask = |name: &str| {
        let mask = &ticket.masks[&format!("{block}.{name}.weight")];
        ArrayD::from_shape_vec(mask.shape(), mask.iter().map(f64::from).collect()).unwrap()
    };
    let (qkv, projection) = (mask("qkv"), mask("proj"));
    let dim = projection.shape()[0];
    let head = dim / heads;
    let of_head = |h: usize| {
        let rows = (0..3 * dim).filter(|row| row % dim / head == h);
        let of_rows: f64 = rows.map(|row| qkv.index_axis(Axis(0), row).sum()).sum();
        let of_columns: f64 = (h * head..(h + 1) * head).map(|c| projection.index_axis(Axis(1), c).sum()).sum();
        (of_rows + of_columns) / (4 * head * dim) as f64
    };
    (0..heads).map(of_head).collect()
}

#[test]
fn tickets_of_transformers_are_found_and_say_what_is_kept_of_each_head() {
    let folder = tempfile::tempdir().unwrap();
    let find = [&["find", "--levels", "2", "--seeds", "1"], QUICK].concat();
    let found = json(folder.path(), &find);
    let core = found["tickets"].as_array().unwrap().iter().find(|ticket| ticket["name"] == "core").unwrap();
    let ticket = Weights::load(
        &folder.path().join(found["run"].as_str().unwrap()).join(core["files"][0]["ticket"].as_str().unwrap()),
    )
    .unwrap();
    let heads = core["seeds"][0]["heads"].as_array().unwrap();
    assert_eq!(heads.len(), 2);
    for layer in heads {
        let of_heads: Vec<f64> = layer["density"].as_array().unwrap().iter().map(|d| d.as_f64().unwrap()).collect();
        assert_eq!(of_heads, densities(&ticket, layer["layer"].as_str().unwrap(), 3));
    }
    let pruned: Vec<&str> = ticket.masks.keys().map(String::as_str).collect();
    let of_block = |i: usize| ["attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2"].map(|l| format!("blocks.{i}.{l}.weight"));
    assert_eq!(pruned, [of_block(0), of_block(1)].concat());
    assert!(output(folder.path(), &find).contains("head 2"));

    let more = [&find[..], &["--include", "pos_embed", "--exclude", "blocks.0.*"]].concat();
    let found = json(folder.path(), &more);
    let core = found["tickets"].as_array().unwrap().iter().find(|ticket| ticket["name"] == "core").unwrap();
    let path = folder.path().join(found["run"].as_str().unwrap()).join(core["files"][0]["ticket"].as_str().unwrap());
    let pruned: Vec<String> = Weights::load(&path).unwrap().masks.into_keys().collect();
    assert_eq!(pruned, [&of_block(1)[..], &["pos_embed".into()]].concat());
    fails(folder.path(), &[&find[..], &["--include", "norm.weight"]].concat(), 2, &["--include 'norm.weight'"]);
}

#[test]
fn a_killed_training_with_adamw_and_dropout_ends_with_the_same_bits() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let train = [&["train", "--out", "out"], QUICK, &["--steps", "400"]].concat();
    let train: Vec<&str> = train.into_iter().filter(|&word| word != "--epochs" && word != "2").collect();
    output(whole.path(), &train);
    for moment in [150, 250] {
        kill_after(broken.path(), &train, Duration::from_millis(moment));
    }
    output(broken.path(), &train);
    assert_same_files(&broken.path().join("out"), &whole.path().join("out"));
}

#[test]
fn pruning_a_file_leaves_tokens_positions_and_patches_alone() {
    let folder = tempfile::tempdir().unwrap();
    drawn(&["class_token=true"], &folder.path().join("weights.safetensors"));
    let prune = ["prune", "--weights", "weights.safetensors", "--sparsity", "0.5", "--out", "ticket.safetensors"];
    let names = |args: &[&str]| -> Vec<String> {
        let layers = json(folder.path(), args)["layers"].as_array().unwrap().clone();
        layers.iter().map(|layer| layer["name"].as_str().unwrap().to_owned()).collect()
    };
    let pruned = names(&prune);
    assert!(pruned.len() == 9 && pruned.iter().all(|name| name.starts_with("blocks.") || name == "head.weight"));
    let included = names(&[&prune[..], &["--include", "patch_embed.*"]].concat());
    assert!(included.len() == 10 && included.contains(&"patch_embed.proj.weight".to_owned()), "{included:?}");
}
