//! What `--precision bf16` does to whole commands.

use std::path::Path;

use serde_json::Value;

use crate::command::{SMALL, fails, json};

/// Losses on test data after a training with each of three seeds.
fn losses(folder: &Path, model: &[&str], precision: &str) -> Vec<f64> {
    let train = |seed: usize| {
        let (seed, out) = (seed.to_string(), format!("{precision}-{seed}"));
        let train = ["train", "--seed", &seed, "--precision", precision, "--out", &out, "-q"];
        json(folder, &[&train[..], model].concat())["loss"].as_f64().unwrap()
    };
    (0..3).map(train).collect()
}

fn trains_as_f32_does(model: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let [full, half] = ["f32", "bf16"].map(|precision| losses(folder.path(), model, precision));
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let most = full.iter().copied().fold(0.0, f64::max);
    let spread = most - full.iter().copied().fold(f64::INFINITY, f64::min);
    let apart = (mean(&half) - mean(&full)).abs();
    assert!(apart <= spread, "means {apart} apart, seeds {spread}: f32 {full:?}, bf16 {half:?}");
    assert!(full != half, "bf16 has the bits of f32");
}

#[test]
fn resnet20_trains_in_bf16_as_in_f32_within_the_spread_of_seeds() {
    let gentle = ["--epochs", "4", "--lr", "0.02", "--batch", "64"];
    trains_as_f32_does(&[&["--model", "resnet20", "--set", "image=[1,8,8]"][..], &gentle].concat());
}

#[test]
fn a_vision_transformer_trains_in_bf16_as_in_f32_within_the_spread_of_seeds() {
    trains_as_f32_does(&["--model", "vit_digits", "--epochs", "3"]);
}

#[test]
fn tickets_are_found_in_bf16_in_a_run_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let find = |precision: &str| -> Value {
        let find = ["find", "--model", "resnet8", "--levels", "2", "--no-similarity", "--precision", precision];
        json(folder.path(), &[&find[..], SMALL].concat())
    };
    let (full, half) = (find("f32"), find("bf16"));
    assert_ne!(full["run"], half["run"]);
    assert_eq!(find("bf16"), half, "a finished run prints the same again");
    let names = |result: &Value| -> Vec<Value> {
        result["tickets"].as_array().unwrap().iter().map(|ticket| ticket["name"].clone()).collect()
    };
    assert_eq!(names(&full), names(&half));
    let run = folder.path().join(half["run"].as_str().unwrap());
    let dense = half["tickets"].as_array().unwrap().iter().find(|ticket| ticket["name"] == "dense").unwrap();
    let weights = run.join(dense["files"][0]["weights"].as_str().unwrap());
    let weights = weights.to_str().unwrap();
    // Weights are f32 whatever trained them, and either precision evaluates them.
    let eval = |precision: &str| {
        let eval =
            ["eval", "--model", "resnet8", SMALL[0], SMALL[1], "--weights", weights, "-q", "--precision", precision];
        json(folder.path(), &eval)
    };
    let (full, half) = (eval("f32"), eval("bf16"));
    assert_eq!((full["precision"].as_str(), half["precision"].as_str()), (Some("f32"), Some("bf16")));
    let [full, half] = [full, half].map(|result| result["loss"].as_f64().unwrap());
    assert!(full != half && (full - half).abs() < 0.02 * full, "f32 {full}, bf16 {half}");
}

#[test]
fn another_precision_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    fails(folder.path(), &["train", "--precision", "f16"], 2, &["f16", "f32", "bf16"]);
}
