//! `dilt similarity`, `dilt report` and the end of `dilt find` as a user calls them, and numbers computed again here in the
//! plainest way.

use std::path::Path;
use std::time::{Duration, Instant};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::command::{assert_same_files, dilt, failed, fails, json, keys, output};
use crate::resume::kill_after;

/// A tensor to be written: name, type, shape, bytes.
type Written = (&'static str, Dtype, Vec<usize>, Vec<u8>);

/// Values of `n` probes that differ, `d` each, that every float type holds exactly: multiples of 1/8 up to 8.
fn features(n: usize, d: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 16) % 128) as f32 / 8.0 - 8.0
    };
    (0..n * d).map(|_| next()).collect()
}

fn f32s(name: &'static str, shape: &[usize], values: &[f32]) -> Written {
    (name, Dtype::F32, shape.to_vec(), values.iter().flat_map(|value| value.to_le_bytes()).collect())
}

fn write(path: &Path, tensors: &[Written]) {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// Matrices of three layers, 12 probes.
fn three(folder: &Path, name: &str) {
    let layers = [("a", 5, 1), ("b", 9, 2), ("c", 3, 3)];
    let tensors: Vec<_> = layers.iter().map(|&(name, d, seed)| f32s(name, &[12, d], &features(12, d, seed))).collect();
    write(&folder.join(name), &tensors);
}

/// Trains a small network into a folder.
fn train(folder: &Path, out: &str, seed: &str) -> String {
    let net = ["--set", "widths=[4,8,16]", "--limit", "200", "--epochs", "1", "--batch", "64", "-q"];
    output(folder, &[&["train", "--out", out, "--seed", seed], &net[..]].concat());
    format!("{out}/weights.safetensors")
}

/// Compares the first probes of digits.
fn similarity(folder: &Path, args: &[&str]) -> Value {
    json(folder, &[&["similarity", "--set", "widths=[4,8,16]", "-q"], args].concat())
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn names(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect()
}

fn at(matrix: &Value, i: usize, j: usize) -> &Value {
    &matrix[i][j]
}

/// What holds of every result.
fn check_matrices(result: &Value) {
    let layers = result["layers"].as_array().unwrap().len();
    assert_eq!(result["clusters"].as_array().unwrap().len(), layers);
    for key in ["gw", "cka", "identity"] {
        let rows = result[key].as_array().unwrap();
        assert_eq!(rows.len(), layers);
        for (i, row) in rows.iter().enumerate() {
            assert_eq!(row.as_array().unwrap().len(), layers);
            (0..layers).for_each(|j| assert_eq!(row[j], rows[j][i], "{key} is symmetric"));
        }
    }
    for i in 0..layers {
        assert_eq!(number(at(&result["gw"], i, i)), 0.0, "no layer differs from itself");
        for j in 0..layers {
            let gw = number(at(&result["gw"], i, j));
            assert!(gw >= 0.0, "{gw}");
            if let Some(identity) = at(&result["identity"], i, j).as_f64() {
                assert!(gw <= identity + 1e-12, "the identity coupling is one of all: {gw} > {identity}");
            }
        }
    }
}

/// Distances of rows, divided by the largest.
fn distances(values: &[f32], n: usize) -> Vec<f64> {
    let d = values.len() / n;
    let row = |i: usize| values[i * d..][..d].iter().map(|&value| f64::from(value));
    let distance = |i: usize, j: usize| row(i).zip(row(j)).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt();
    let all: Vec<f64> = (0..n * n).map(|at| distance(at / n, at % n)).collect();
    let most = all.iter().copied().fold(0.0, f64::max);
    all.iter().map(|distance| distance / most).collect()
}

/// Linear CKA from features, as Kornblith et al. write it.
fn cka(x: &[f32], y: &[f32], n: usize) -> f64 {
    let centred = |values: &[f32]| {
        let d = values.len() / n;
        let mean = |j: usize| (0..n).map(|i| f64::from(values[i * d + j])).sum::<f64>() / n as f64;
        let means: Vec<f64> = (0..d).map(mean).collect();
        (values.iter().enumerate().map(|(at, &v)| f64::from(v) - means[at % d]).collect::<Vec<f64>>(), d)
    };
    let ((x, p), (y, q)) = (centred(x), centred(y));
    let cross = |a: &[f64], p: usize, b: &[f64], q: usize| {
        let element = |j: usize, k: usize| (0..n).map(|i| a[i * p + j] * b[i * q + k]).sum::<f64>();
        (0..p).flat_map(|j| (0..q).map(move |k| (j, k))).map(|(j, k)| element(j, k).powi(2)).sum::<f64>()
    };
    cross(&x, p, &y, q) / (cross(&x, p, &x, p) * cross(&y, q, &y, q)).sqrt()
}

#[test]
fn layers_of_a_network_are_compared_and_the_files_hold_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let weights = train(folder.path(), "dense", "0");
    let args = ["--weights", &weights, "--probes", "24", "--out", "sim", "--save-distances"];
    let result = similarity(folder.path(), &args);
    for key in ["layers", "gw", "cka", "identity", "clusters"] {
        assert!(keys(&result).contains(&key), "{key}");
    }
    assert_eq!(names(&result["layers"]), ["bn1", "layer1.0", "layer2.0", "layer3.0", "linear"]);
    assert_eq!(result["probes"], json!([24, 24, 24, 24, 24]));
    check_matrices(&result);
    assert_eq!(similarity(folder.path(), &args), result, "again, the same");

    let sim = folder.path().join("sim");
    let written: Value = serde_json::from_slice(&std::fs::read(sim.join("similarity.json")).unwrap()).unwrap();
    assert!(keys(&written).iter().all(|key| written[key] == result[key]));
    let bytes = std::fs::read(sim.join("similarity.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let gw = file.tensor("gw").unwrap();
    assert_eq!((gw.dtype(), gw.shape()), (Dtype::F64, &[5, 5][..]));
    let values: Vec<f64> = gw.data().as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
    assert_eq!(values[1], number(at(&result["gw"], 0, 1)));
    assert_eq!(file.tensor("distances/layer2.0").unwrap().shape(), [24, 24]);
    let page = std::fs::read_to_string(sim.join("similarity.html")).unwrap();
    assert!(page.matches("<svg").count() == 3 && page.contains("layer3.0") && page.contains("</html>"));
    for map in ["heatmap-gw.svg", "heatmap-cka.svg", "heatmap-identity.svg"] {
        assert!(std::fs::read_to_string(sim.join(map)).unwrap().ends_with("</svg>\n"), "{map}");
    }
    let text = output(folder.path(), &[&["similarity", "--set", "widths=[4,8,16]", "-q"], &args[..]].concat());
    assert!(["Modules", "nearest", "layer3.0", "similarity.html"].iter().all(|part| text.contains(part)), "{text}");
}

#[test]
fn what_a_layer_says_is_what_evaluation_says() {
    let folder = tempfile::tempdir().unwrap();
    let weights = train(folder.path(), "dense", "0");
    let eval = ["eval", "--weights", &weights, "--set", "widths=[4,8,16]", "--limit", "20", "--logits", "logits", "-q"];
    output(folder.path(), &eval);
    let result = similarity(
        folder.path(),
        &[
            "--weights",
            &weights,
            "--representations",
            "logits",
            "--layers",
            "linear",
            "--layers",
            "logits",
            "--probes",
            "20",
        ],
    );
    let layers = names(&result["layers"]);
    let [network, file] =
        ["weights/linear", "logits/logits"].map(|name| layers.iter().position(|l| *l == name).unwrap());
    assert!(number(at(&result["gw"], network, file)) < 1e-10);
    assert!(number(at(&result["cka"], network, file)) > 1.0 - 1e-6);
}

#[test]
fn two_networks_are_compared_layer_by_layer_under_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (train(folder.path(), "a", "0"), train(folder.path(), "b", "7"));
    let args = ["--weights", &a, "--weights", &b, "--probes", "16", "--layers", "layer?.0", "--out", "sim"];
    let result = similarity(folder.path(), &args);
    let expected = ["a/layer1.0", "a/layer2.0", "a/layer3.0", "b/layer1.0", "b/layer2.0", "b/layer3.0"];
    assert_eq!(names(&result["layers"]), expected);
    check_matrices(&result);
    let differences = result["differences"].as_array().unwrap();
    assert_eq!(differences.len(), 3);
    for (place, difference) in differences.iter().enumerate() {
        assert_eq!(difference["networks"], json!(["a", "b"]));
        let layer = expected.iter().position(|name| name.ends_with(difference["layer"].as_str().unwrap())).unwrap();
        assert_eq!(difference["gw"], *at(&result["gw"], layer, layer + 3));
        assert!(place == 0 || number(&differences[place - 1]["gw"]) >= number(&difference["gw"]), "the largest first");
    }
    for map in ["heatmap-gw-a.svg", "heatmap-gw-b.svg", "heatmap-gw-a-b.svg"] {
        assert!(folder.path().join("sim").join(map).is_file(), "{map}");
    }
    let same = similarity(folder.path(), &["--weights", &a, "--weights", &a, "--probes", "16"]);
    assert_eq!(names(&same["layers"])[5], "2/bn1");
    assert!((0..5).all(|i| number(at(&same["gw"], i, i + 5)) == 0.0), "a network is like itself");
    assert_eq!(same["differences"][0]["gw"], 0.0);
}

#[test]
fn files_of_every_float_type_say_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (features(12, 6, 1), features(12, 4, 2));
    let as_type = |name, dtype, shape: &[usize], values: &[f32]| -> Written {
        let bytes = values.iter().flat_map(|&value| match dtype {
            Dtype::F64 => f64::from(value).to_le_bytes().to_vec(),
            Dtype::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
            Dtype::BF16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
            _ => value.to_le_bytes().to_vec(),
        });
        (name, dtype, shape.to_vec(), bytes.collect())
    };
    let mut results = Vec::new();
    for dtype in [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::BF16] {
        // [n, 2, 3] is flattened after the first axis.
        let tensors = [as_type("a", dtype, &[12, 2, 3], &a), as_type("b", dtype, &[12, 4], &b)];
        write(&folder.path().join("r"), &tensors);
        results.push(json(folder.path(), &["similarity", "--representations", "r", "-q"]));
    }
    assert!(results.iter().all(|result| *result == results[0]));
    let result = &results[0];
    check_matrices(result);
    let (c1, c2) = (distances(&a, 12), distances(&b, 12));
    let identity = c1.iter().zip(&c2).map(|(x, y)| (x - y) * (x - y)).sum::<f64>() / 144.0;
    assert!((number(at(&result["identity"], 0, 1)) - identity).abs() < 1e-6);
    assert!((number(at(&result["cka"], 0, 1)) - cka(&a, &b, 12)).abs() < 1e-6);
}

#[test]
fn a_probe_pushed_to_another_place_costs_gromov_wasserstein_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let a = features(10, 4, 5);
    let shifted: Vec<f32> = a[4..].iter().chain(&a[..4]).map(|value| 3.0 * value).collect();
    write(&folder.path().join("r"), &[f32s("a", &[10, 4], &a), f32s("b", &[10, 4], &shifted)]);
    let result = json(folder.path(), &["similarity", "--representations", "r", "-q"]);
    assert!(number(at(&result["gw"], 0, 1)) < 1e-9, "{}", result["gw"]);
    assert!(number(at(&result["identity"], 0, 1)) > 1e-3 && number(at(&result["cka"], 0, 1)) < 0.9);
}

#[test]
fn cosine_distances_leave_cka_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    three(folder.path(), "r");
    let run = |more: &[&str]| json(folder.path(), &[&["similarity", "--representations", "r", "-q"], more].concat());
    let (plain, cosine) = (run(&[]), run(&["--distance", "cosine"]));
    assert_eq!((&plain["distance"], &cosine["distance"]), (&json!("euclidean"), &json!("cosine")));
    assert_eq!(plain["cka"], cosine["cka"]);
    assert_ne!(plain["gw"], cosine["gw"]);
    check_matrices(&cosine);
    let clustered = run(&["--clusters", "2", "--sigma", "0.05"]);
    assert_eq!(clustered["sigma"], 0.05);
    let clusters: Vec<u64> = clustered["clusters"].as_array().unwrap().iter().map(|c| c.as_u64().unwrap()).collect();
    assert!(clusters[0] == 0 && clusters.iter().max() == Some(&1), "{clusters:?}");
}

#[test]
fn pooling_averages_before_distances_are_taken() {
    let folder = tempfile::tempdir().unwrap();
    let weights = train(folder.path(), "dense", "0");
    let args = ["--weights", &weights, "--probes", "16", "--layers", "layer3.0", "--layers", "avgpool"];
    let (whole, pooled) =
        (similarity(folder.path(), &args), similarity(folder.path(), &[&args[..], &["--pool"]].concat()));
    assert_eq!(pooled["pooled"], true);
    assert!(number(at(&whole["identity"], 0, 1)) > 1e-6);
    assert!(number(at(&pooled["identity"], 0, 1)) < 1e-10, "the mean over pixels is what avgpool writes");
}

#[test]
fn constant_layers_and_few_probes_have_defined_results() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = [f32s("still", &[12, 3], &[2.5; 36]), f32s("a", &[12, 4], &features(12, 4, 1))];
    write(&folder.path().join("r"), &[&tensors[..], &[f32s("zero", &[12, 2], &[0.0; 24])]].concat());
    let args = ["similarity", "--representations", "r", "-q"];
    let result = json(folder.path(), &args);
    check_matrices(&result);
    let layers = names(&result["layers"]);
    let [still, a, zero] = ["still", "a", "zero"].map(|name| layers.iter().position(|layer| *layer == name).unwrap());
    let mut constant = names(&result["constant"]);
    constant.sort_unstable();
    assert_eq!(constant, ["still", "zero"]);
    assert_eq!(number(at(&result["gw"], still, zero)), 0.0);
    let squares = distances(&features(12, 4, 1), 12).iter().map(|c| c * c).sum::<f64>() / 144.0;
    assert!((number(at(&result["gw"], still, a)) - squares).abs() < 1e-6, "every coupling has this value");
    assert!(at(&result["cka"], still, a).is_null() && at(&result["cka"], a, a).is_f64());
    assert!(output(folder.path(), &args).contains("All probes look alike"));

    for n in [1, 2] {
        write(
            &folder.path().join("few"),
            &[f32s("a", &[n, 3], &features(n, 3, 1)), f32s("b", &[n, 2], &features(n, 2, 2))],
        );
        let few = json(folder.path(), &["similarity", "--representations", "few", "-q"]);
        check_matrices(&few);
        assert!(number(at(&few["gw"], 0, 1)) < 1e-9, "{n} probes: one distance, divided by itself");
        assert_eq!(at(&few["cka"], 0, 1).is_null(), n == 1);
    }
    write(&folder.path().join("one"), &[f32s("a", &[5, 3], &features(5, 3, 1))]);
    let one = json(folder.path(), &["similarity", "--representations", "one", "-q"]);
    assert_eq!((&one["gw"], &one["clusters"]), (&json!([[0.0]]), &json!([0])));
}

#[test]
fn layers_that_see_different_probes_have_gromov_wasserstein_alone() {
    let folder = tempfile::tempdir().unwrap();
    three(folder.path(), "r");
    write(&folder.path().join("s"), &[f32s("a", &[7, 5], &features(7, 5, 1))]);
    let args = ["similarity", "--representations", "r", "--representations", "s", "-q"];
    let result = json(folder.path(), &args);
    check_matrices(&result);
    assert_eq!(names(&result["layers"]), ["r/a", "r/b", "r/c", "s/a"]);
    assert_eq!(result["probes"], json!([12, 12, 12, 7]));
    assert!(at(&result["cka"], 0, 3).is_null() && at(&result["identity"], 0, 3).is_null());
    assert!(at(&result["cka"], 0, 1).is_f64() && at(&result["gw"], 0, 3).is_f64());
    let difference = &result["differences"][0];
    assert_eq!((&difference["layer"], &difference["cka"]), (&json!("a"), &Value::Null));
    assert!(output(folder.path(), &args).contains("7 to 12 probes"));
}

#[test]
fn what_cannot_be_compared_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    three(here, "good");
    let mut values = features(4, 3, 1);
    write(&here.join("int"), &[("labels", Dtype::I64, vec![4, 1], vec![0; 32]), f32s("a", &[4, 3], &values)]);
    values[7] = f32::NAN;
    write(&here.join("nan"), &[f32s("fine", &[4, 3], &features(4, 3, 2)), f32s("broken", &[4, 3], &values)]);
    write(&here.join("flat"), &[f32s("a", &[4], &features(4, 1, 1))]);
    write(&here.join("empty"), &[f32s("a", &[0, 3], &[])]);
    write(&here.join("nothing"), &[]);
    std::fs::write(here.join("text"), "no safetensors").unwrap();
    let with = |file: &'static str, more: &[&'static str]| [&["similarity", "--representations", file], more].concat();
    let refused: &[(Vec<&str>, i32, &[&str])] = &[
        (with("nan", &[]), 1, &["nan", "\"broken\"", "NaN", "[2, 1]"]),
        (with("int", &[]), 1, &["int", "\"labels\"", "F32, F16, BF16 or F64"]),
        (with("flat", &[]), 1, &["flat", "\"a\"", "[probes, features, ...]", "got [4]"]),
        (with("empty", &[]), 1, &["empty", "\"a\"", "got [0, 3]"]),
        (with("nothing", &[]), 1, &["nothing", "no tensors"]),
        (with("text", &[]), 1, &["text"]),
        (with("gone", &[]), 1, &["gone", "cannot read it"]),
        (with("good", &["--layers", "z"]), 2, &["good", "--layers 'z'", "a, b, c"]),
        (with("good", &["--layers", "a", "--layers", "z"]), 2, &["--layers 'z'", "no such layer"]),
        (with("good", &["--clusters", "0"]), 2, &["--clusters", "at least 1"]),
        (with("good", &["--clusters", "4"]), 2, &["--clusters", "3"]),
        (with("good", &["--sigma", "-1"]), 2, &["--sigma", "above 0", "-1"]),
        (with("good", &["--epsilon", "nan"]), 2, &["--epsilon", "above 0"]),
        (with("good", &["--steps", "0"]), 2, &["--steps", "at least 1"]),
        (with("good", &["--probes", "0"]), 2, &["--probes", "got 0"]),
        (with("good", &["--pool"]), 2, &["--weights"]),
        (with("good", &["--save-distances"]), 2, &["--out"]),
        (with("good", &["--limit-memory", "0"]), 2, &["--limit-memory", "MiB", "distances of 3 layers"]),
        (vec!["similarity"], 2, &["--weights"]),
        (vec!["similarity", "--weights", "gone"], 1, &["gone"]),
    ];
    for (args, code, says) in refused {
        fails(here, args, *code, says);
    }
    let selected = json(here, &with("int", &["--layers", "a", "-q"]));
    assert_eq!(names(&selected["layers"]), ["a"], "what is not chosen need not be of a float type");
    let text = dilt(here, &with("good", &[])).output().unwrap();
    assert!(String::from_utf8_lossy(&text.stderr).contains("memory: "), "stated before it starts");
}

#[test]
fn a_network_that_says_nan_is_named_with_its_layer() {
    let folder = tempfile::tempdir().unwrap();
    let weights = train(folder.path(), "dense", "0");
    let path = folder.path().join(&weights);
    let mut broken = dilt::nn::weights::Weights::load(&path).unwrap();
    // A variance below zero is finite, its root is not a number.
    broken.tensors.get_mut("layer2.0.bn1.running_var").unwrap().fill(-1.0);
    broken.save(&path).unwrap();
    let args = ["similarity", "--set", "widths=[4,8,16]", "--probes", "16", "--weights", &weights];
    fails(folder.path(), &args, 1, &["layer2.0", "weights"]);
    let args = [&args[..], &["--weights", &weights, "--image-size", "16"]].concat();
    fails(folder.path(), &args, 2, &["[1, 16, 16]"]);
}

#[test]
fn finished_pairs_are_not_solved_again() {
    let folder = tempfile::tempdir().unwrap();
    three(folder.path(), "r");
    let args = ["similarity", "--representations", "r", "--out", "sim", "-q"];
    let expected = json(folder.path(), &args);
    let pairs = folder.path().join("sim/pairs.jsonl");
    let whole = std::fs::read_to_string(&pairs).unwrap();
    assert_eq!(whole.lines().count(), 3);
    // Killed in the middle of the second line.
    let first = whole.lines().next().unwrap();
    std::fs::write(&pairs, &whole[..first.len() + 9]).unwrap();
    assert_eq!(json(folder.path(), &args), expected);
    assert_eq!(std::fs::read_to_string(&pairs).unwrap(), whole, "the same bits");

    let mut other: Value = serde_json::from_str(first).unwrap();
    other["value"] = json!(0.125);
    std::fs::write(&pairs, other.to_string() + "\n").unwrap();
    assert_eq!(*at(&json(folder.path(), &args)["gw"], 0, 1), json!(0.125), "what is known is believed");
    let finer = json(folder.path(), &[&args[..], &["--epsilon", "0.02"]].concat());
    assert_ne!(*at(&finer["gw"], 0, 1), json!(0.125), "with other options it is another pair");
    std::fs::write(&pairs, "nonsense\n").unwrap();
    fails(folder.path(), &args, 1, &["pairs.jsonl", "line 1", "remove"]);
    std::fs::write(folder.path().join("file"), "").unwrap();
    fails(folder.path(), &["similarity", "--representations", "r", "--out", "file"], 1, &["file", "--out"]);
}

#[test]
fn numbers_alone_go_to_a_file() {
    let folder = tempfile::tempdir().unwrap();
    three(folder.path(), "r");
    let args = ["similarity", "--representations", "r", "-q", "--out"];
    let told = json(folder.path(), &[&args[..], &["new/sim.json"]].concat());
    let written: Value = serde_json::from_slice(&std::fs::read(folder.path().join("new/sim.json")).unwrap()).unwrap();
    assert_eq!((&written["gw"], &written["layers"]), (&told["gw"], &told["layers"]));
    json(folder.path(), &[&args[..], &["sim.safetensors", "--save-distances"]].concat());
    let bytes = std::fs::read(folder.path().join("sim.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("gw").unwrap().shape(), [3, 3]);
    assert_eq!(file.names().iter().filter(|name| name.starts_with("distances/")).count(), 3);
    let mut files: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["new", "r", "sim.pairs.jsonl", "sim.safetensors"]);
    fails(folder.path(), &[&args[..], &["sim.json", "--save-distances"]].concat(), 2, &["--save-distances", ".json"]);
}

#[test]
fn a_comparison_killed_at_any_moment_ends_with_the_same_files() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let tensors = || names.iter().zip(1..).map(|(name, seed)| f32s(name, &[96, 6], &features(96, 6, seed)));
    for folder in [&whole, &broken] {
        write(&folder.path().join("r"), &tensors().collect::<Vec<_>>());
    }
    let args = ["similarity", "--representations", "r", "--out", "sim", "-q"];
    let begin = Instant::now();
    let expected = json(whole.path(), &args);
    let whole_run = begin.elapsed();
    for percent in [30, 60, 90, 45, 75] {
        kill_after(broken.path(), &args, (whole_run * percent / 100).max(Duration::from_millis(1)));
    }
    assert_eq!(json(broken.path(), &args), expected);
    assert_same_files(&broken.path().join("sim"), &whole.path().join("sim"));
    let threads = || {
        let mut command = dilt(broken.path(), &args);
        command.env("RAYON_NUM_THREADS", "1").args(["--out", "one", "--json"]);
        command
    };
    failed(threads(), "--out twice", 2, &["--out"]);
}

#[test]
fn find_ends_with_the_similarity_of_its_tickets_and_a_page() {
    let folder = tempfile::tempdir().unwrap();
    let find = ["find", "--set", "widths=[4,8,16]", "--limit", "160", "--epochs", "1", "--batch", "64", "-q"];
    let find = [&find[..], &["--levels", "1", "--seeds", "2"]].concat();
    let result = json(folder.path(), &find);
    let similarity = &result["similarity"];
    check_matrices(similarity);
    let networks: Vec<&str> =
        similarity["networks"].as_array().unwrap().iter().map(|network| network["name"].as_str().unwrap()).collect();
    assert_eq!(networks, ["dense", "colt", "core", "specialist-1", "specialist-2", "union"]);
    assert_eq!(similarity["probes"][0], 64);
    let run = folder.path().join(result["run"].as_str().unwrap());
    assert!(
        !run.join("seed_0/similarity/pairs.jsonl").exists() && run.join("seed_0/similarity/similarity.json").exists()
    );
    let page = std::fs::read_to_string(run.join("report.html")).unwrap();
    for part in ["Tickets", "union-pruned at core", "Jaccard of masks", "specialist-1/layer3.0", "Settings"] {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains(folder.path().to_str().unwrap()), "no path of this machine");

    std::fs::remove_file(run.join("report.html")).unwrap();
    let report = json(folder.path(), &["report", result["run"].as_str().unwrap()]);
    assert_eq!(keys(&report), ["report"]);
    assert_eq!(std::fs::read_to_string(folder.path().join(report["report"].as_str().unwrap())).unwrap(), page);
    let text = output(folder.path(), &find);
    assert!(text.contains("Modules") && text.contains("report.html"), "{text}");
    fails(folder.path(), &["report", "runs"], 1, &["runs", "no run folder"]);
    std::fs::remove_file(run.join("result.json")).unwrap();
    fails(folder.path(), &["report", result["run"].as_str().unwrap()], 1, &["not finished"]);

    let without = json(folder.path(), &[&find[..], &["--no-similarity", "--runs", "other"]].concat());
    assert_eq!(keys(&without), ["matrix", "overlap", "run", "tickets"]);
    assert_eq!(without["tickets"], result["tickets"]);
}
