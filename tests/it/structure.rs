//! Structured tickets: what they keep, that what they remove changes nothing, and `dilt structure`.

use std::collections::BTreeMap;

use dilt::device::Device;
use dilt::mask::Mask;
use dilt::mask::set::MaskSet;
use dilt::nn::config::ModelConfig;
use dilt::nn::init;
use dilt::nn::liveness::Liveness;
use dilt::nn::model::{Layer, Model};
use dilt::nn::network::{Mode, Network};
use dilt::nn::plan::{OptimizerKind, Use};
use dilt::nn::weights::Weights;
use dilt::ticket::structure::{Scores, Structure, Structured, Structuring};

use crate::command::{SMALL, fails, json, keys, output};

const REFILL: Structuring = Structuring { method: Structure::Refill, growth: 0.25, group: 4, threshold: 1.5 };

fn model(name: &str, set: &[&str]) -> Model {
    let set: Vec<String> = set.iter().map(|set| set.to_string()).collect();
    ModelConfig::load(name, &set).unwrap().build().unwrap()
}

fn residual() -> Model {
    model("resnet8", &["widths=[8,12,16]"])
}

fn transformer() -> Model {
    model("vit_digits", &["depth=2"])
}

/// Random masks that keep about `density` of each layer.
fn random(model: &Model, density: f64) -> MaskSet {
    let layers = model.prunable().enumerate().map(|(stream, parameter)| {
        // Knuth's multiplicative hash.
        let hash = |i: usize| ((i + 1) * (2 * stream + 1)).wrapping_mul(2_654_435_761) % (1 << 32);
        let most = (density * f64::from(u32::MAX)) as usize;
        (parameter.name.clone(), Mask::from_fn(&parameter.shape, |i| hash(i) < most))
    });
    MaskSet::new(layers.collect())
}

fn row(mask: &Mask, row: usize) -> impl Iterator<Item = usize> + '_ {
    let fan_in = mask.len() / mask.shape()[0];
    (0..fan_in).filter(move |i| mask.get(row * fan_in + i))
}

#[test]
fn refill_keeps_the_best_rows_and_fixes_the_norms_of_the_others() {
    let model = residual();
    let weights = init::draw(&model, 1);
    let masks = random(&model, 0.3);
    let Structured { masks: refilled, fixed, layers } =
        REFILL.apply(&model, &masks, &Scores::L1(&weights.tensors)).unwrap();
    for (name, mask) in masks.layers().iter().filter(|(name, _)| name.contains("conv")) {
        let rows = mask.shape()[0];
        let fan_in = mask.len() / rows;
        let values: Vec<f32> = weights.tensors[name].iter().copied().collect();
        let score = |r: usize| row(mask, r).map(|i| f64::from(values[r * fan_in + i].abs())).sum::<f64>();
        let mut best: Vec<usize> = (0..rows).collect();
        best.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
        best.truncate(mask.count() / fan_in);
        best.sort();
        let refilled = refilled.get(name).unwrap();
        let live: Vec<usize> = (0..rows).filter(|r| row(refilled, *r).next().is_some()).collect();
        assert_eq!(live, best, "{name}");
        // Rows are dense in what is not always zero, the same for all.
        assert!(live.iter().all(|r| row(refilled, *r).eq(row(refilled, live[0]))), "{name}");
        for vector in ["weight", "bias"] {
            let norm = &fixed[&name.replace("conv", "bn").replace("weight", vector)];
            assert_eq!((0..rows).filter(|r| norm.get(*r)).collect::<Vec<_>>(), best, "{name} {vector}");
        }
    }
    // The second convolution of a block reads what the first writes.
    let second = refilled.get("layer1.0.conv2.weight").unwrap();
    let first = &fixed["layer1.0.bn1.weight"];
    let columns: Vec<usize> = row(second, (0..8).find(|r| row(second, *r).next().is_some()).unwrap()).collect();
    assert!(columns.iter().all(|i| first.get(i / 9)));
    assert_eq!(columns.len(), 9 * first.count());
    for change in &layers {
        let (before, after) = (masks.get(&change.name).unwrap(), refilled.get(&change.name).unwrap());
        assert_eq!((change.before, change.after), (before.count(), after.count()), "{change:?}");
        assert_eq!(change.before + change.added - change.removed, change.after, "{change:?}");
    }
    let more = Structuring { method: Structure::RefillPlus, ..REFILL };
    let more = more.apply(&model, &masks, &Scores::Count).unwrap();
    // 8 rows at 30 %: 2, and a quarter of the other 6.
    assert_eq!([layers[0].rows, more.layers[0].rows], [2, 3]);
}

#[test]
fn refill_keeps_whole_heads_and_hidden_features_and_every_row_of_what_is_added() {
    let model = transformer();
    let masks = random(&model, 0.55);
    let Structured { masks: refilled, fixed, layers } = REFILL.apply(&model, &masks, &Scores::Count).unwrap();
    let Some(&Layer::Attention { heads, qkv, .. }) = model.layers.iter().find(|l| matches!(l, Layer::Attention { .. }))
    else {
        panic!("no attention")
    };
    let qkv = &model.parameters[qkv];
    let (rows, features) = (qkv.shape[0], qkv.shape[0] / 3 / heads);
    let mask = refilled.get(&qkv.name).unwrap();
    let live: Vec<bool> = (0..rows).map(|r| row(mask, r).count() == qkv.shape[1]).collect();
    let head_live: Vec<bool> = (0..heads).map(|head| live[head * features]).collect();
    assert_eq!(head_live.iter().filter(|live| **live).count(), (0.55 * heads as f64) as usize);
    assert!((0..rows).all(|r| live[r] == head_live[r % (rows / 3) / features]));
    let bias = &fixed[&qkv.name.replace("weight", "bias")];
    assert!((0..rows).all(|r| bias.get(r) == live[r]));
    let rows_of = |name: &str| layers.iter().find(|layer| layer.name == name).unwrap().rows;
    let shape = |name: &str| model.parameters.iter().find(|p| p.name == name).unwrap().shape.clone();
    for name in ["blocks.0.mlp.fc2.weight", "blocks.1.attn.proj.weight", "head.weight"] {
        assert_eq!(rows_of(name), shape(name)[0], "{name}");
    }
    assert_eq!(rows_of("blocks.0.mlp.fc1.weight"), (0.55 * shape("blocks.0.mlp.fc1.weight")[0] as f64) as usize);
    assert!(fixed.contains_key("blocks.1.mlp.fc1.bias"));
}

#[test]
fn regroup_leaves_every_row_more_than_it_takes() {
    // Two kinds of rows, alternating; each keeps 8 of its kind's 10 columns and one of its own.
    let model = model("resnet8", &["widths=[16,16,16]"]);
    let name = "layer1.0.conv1.weight";
    let shape = [16, 16, 3, 3];
    let planted =
        |r: usize, c: usize| (c / 10 == r % 2 && c % 10 != r / 2 && c % 10 != (r / 2 + 3) % 10) || c == 100 + r;
    let mask = Mask::from_fn(&shape, |i| planted(i / 144, i % 144));
    let masks = MaskSet::new(vec![(name.into(), mask.clone())]);
    let regroup = Structuring { method: Structure::Regroup, group: 8, ..REFILL };
    let Structured { masks: regrouped, fixed, layers } = regroup.apply(&model, &masks, &Scores::Count).unwrap();
    assert!(fixed.is_empty());
    assert_eq!(layers[0].blocks, 2);
    let after = regrouped.get(name).unwrap();
    for r in 0..16 {
        let kept = row(&mask, r).filter(|c| row(after, r).any(|other| other == *c)).count();
        assert!(kept as f64 > 1.5 * (row(&mask, r).count() - kept) as f64, "row {r} keeps {kept}");
        assert!(row(after, r).eq(row(after, r % 2)), "row {r} is in the block of its kind");
        assert!(row(after, r).all(|c| c / 10 == r % 2), "a column of one row is no part of a block");
    }
}

/// Logits of some samples, and the gradients that `dlogits` of ones, rising, give.
fn pass(device: &Device, model: &Model, weights: &Weights, mode: Mode) -> (Vec<f32>, BTreeMap<String, Vec<f32>>) {
    let mut network = Network::new(device, model, 8, Use::Train(OptimizerKind::Sgd)).unwrap();
    network.load(weights).unwrap();
    let batch = network.batch();
    let x: Vec<f32> = (0..batch.x.len()).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
    device.write_reals(&x, batch.x).unwrap();
    device.write(&[8], batch.current.count).unwrap();
    network.forward(mode).unwrap();
    let logits = device.read_reals(network.head().logits).unwrap();
    let rising: Vec<f32> = (0..logits.len()).map(|i| 1.0 + i as f32 / 8.0).collect();
    device.write_reals(&rising, network.head().gradient.unwrap()).unwrap();
    network.backward().unwrap();
    let gradient = |p: &dilt::nn::model::Parameter| network.parameter_gradient(&p.name).unwrap().unwrap();
    (logits, model.parameters.iter().map(|p| (p.name.clone(), gradient(p))).collect())
}

#[test]
fn what_does_not_matter_changes_nothing() {
    let device = Device::open("host").unwrap();
    for model in [residual(), transformer()] {
        let masks = random(&model, 0.5);
        let refilled = REFILL.apply(&model, &masks, &Scores::Count).unwrap();
        let mut weights = init::draw(&model, 2);
        for (i, tensor) in weights.tensors.values_mut().enumerate() {
            tensor.iter_mut().enumerate().for_each(|(j, w)| *w += 0.1 + ((i + j) % 7) as f32 / 40.0);
        }
        weights.masks = refilled.masks.to_file();
        weights.masks.extend(refilled.fixed);
        // Beside what refill removes: inputs that nothing reads any more.
        let thinned = |name: &String| name.contains("layer2.0.conv2") || name.contains("blocks.0.mlp.fc2");
        for (name, mask) in weights.masks.iter_mut().filter(|(name, _)| thinned(name)) {
            let (columns, taps) = (mask.shape()[1], mask.len() / mask.shape()[0] / mask.shape()[1]);
            *mask = Mask::from_fn(mask.shape(), |i| mask.get(i) && i / taps % columns % 2 == 0);
            assert!(mask.count() > 0, "{name}");
        }
        let liveness = Liveness::new(&model, &weights.masks);
        let mut moved = weights.clone();
        let mut dead = 0;
        for layer in &model.layers {
            let &Layer::Conv { weight, bias, output, .. } = layer else { continue };
            let features = model.values[output].features();
            let gone: Vec<usize> = (0..features).filter(|f| !liveness.used[output][*f]).collect();
            dead += gone.len();
            let name = &model.parameters[weight].name;
            for id in [Some(weight), bias].into_iter().flatten() {
                let tensor = moved.tensors.get_mut(&model.parameters[id].name).unwrap();
                let row = tensor.len() / features;
                tensor.iter_mut().enumerate().filter(|(i, _)| gone.contains(&(i / row))).for_each(|(_, w)| *w += 3.0);
            }
            for statistic in ["running_mean", "running_var"] {
                let norm = name.replace("conv", "bn").replace("weight", statistic);
                if let Some(tensor) = moved.tensors.get_mut(&norm).filter(|_| name.contains("conv")) {
                    tensor.iter_mut().enumerate().filter(|(i, _)| gone.contains(i)).for_each(|(_, w)| *w += 3.0);
                }
            }
        }
        assert!(dead > 10, "{}: {dead} features are not used", model.name);
        for mode in [Mode::Train, Mode::Evaluate] {
            let (logits, _) = pass(&device, &model, &weights, mode);
            assert!(logits.iter().any(|x| *x != logits[0]));
            assert_eq!(pass(&device, &model, &moved, mode).0, logits, "{} {mode:?}", model.name);
        }
        let (_, gradients) = pass(&device, &model, &weights, Mode::Train);
        for layer in &model.layers {
            let &Layer::Conv { weight, input, output, .. } = layer else { continue };
            let parameter = &model.parameters[weight];
            let (fan_in, taps) = (parameter.fan_in(), parameter.fan_in() / parameter.shape[1]);
            for (i, gradient) in gradients[&parameter.name].iter().enumerate() {
                let read = liveness.nonzero[input][i % fan_in / taps] && liveness.used[output][i / fan_in];
                assert!(read || *gradient == 0.0, "{} weight {i} has the gradient {gradient}", parameter.name);
            }
        }
    }
}

#[test]
fn a_ticket_becomes_structured_and_trains() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    json(folder, &[&["train", "--out", "w"], SMALL].concat());
    json(folder, &["prune", "--weights", "w/weights.safetensors", "--sparsity", "0.8", "--out", "t"]);
    let structure = |more: &[&str]| json(folder, &[&["structure", "--ticket", "t"], more].concat());
    let small = |args: &[&str]| -> Vec<String> {
        let set = SMALL.iter().position(|arg| *arg == "--set");
        let own = set.map_or(Vec::new(), |_| {
            SMALL.windows(2).filter(|pair| pair[0] == "--set").flat_map(|pair| pair.to_vec()).collect()
        });
        args.iter().chain(&own).map(|arg| arg.to_string()).collect()
    };
    for (method, score) in [("refill", "l1"), ("refill+", "count"), ("regroup", "l1"), ("refill", "activation")] {
        let args = small(&["--method", method, "--score", score, "--out", "s"]);
        let report = structure(&args.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(keys(&report), ["after", "before", "density", "layers", "method", "out", "total"]);
        assert_eq!(report["method"], method);
        let structured = Weights::load(&folder.join("s")).unwrap();
        let masks = MaskSet::of_weights(&structured.masks);
        assert_eq!(report["after"].as_u64(), Some(masks.kept() as u64));
        assert_eq!(structured.metadata["method"], method);
        assert_eq!(structured.tensors, Weights::load(&folder.join("t")).unwrap().tensors, "weights stay");
        let trained = json(folder, &[&["train", "--ticket", "s", "--out", method], SMALL].concat());
        assert!(trained["loss"].as_f64().is_none_or(f64::is_finite));
        let trained = Weights::load(&folder.join(method).join("weights.safetensors")).unwrap();
        for (name, mask) in &structured.masks {
            let zero = trained.tensors[name].iter().zip(mask.iter()).filter(|(_, keep)| !keep).all(|(w, _)| *w == 0.0);
            assert!(zero, "{name}: what the ticket removes stays zero");
        }
        std::fs::remove_dir_all(folder.join(method)).unwrap();
    }
    let args = small(&["structure", "--ticket", "t", "--method", "refill", "--out", "s"]);
    let text = output(folder, &args.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(["added", "removed", "blocks", "linear.weight"].iter().all(|part| text.contains(part)), "{text}");
    let refused = |code: i32, more: &[&str], says: &[&str]| {
        let args = small(&[&["structure", "--method", "regroup", "--out", "n"], more].concat());
        fails(folder, &args.iter().map(String::as_str).collect::<Vec<_>>(), code, says);
        assert!(!folder.join("n").exists());
    };
    refused(1, &["--ticket", "w/weights.safetensors"], &["no masks", "ticket"]);
    refused(2, &["--ticket", "t", "--threshold", "0"], &["--threshold", "above 0"]);
    refused(2, &["--ticket", "t", "--group", "0"], &["--group", "at least 1"]);
    refused(2, &["--ticket", "t", "--growth", "1.5"], &["--growth", "at most 1"]);
}
