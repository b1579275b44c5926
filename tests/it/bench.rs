//! `dilt bench` and `--tune`: the plan of a ticket, and the times that it is chosen by.

use serde_json::Value;

use crate::command::{SMALL, dilt, failed, fails, json, keys, output};

const BENCH: [&str; 9] = ["bench", "--ticket", "t", "--set", "widths=[4,8,16]", "--batch", "8", "--runs", "1"];

const ROW: [&str; 7] = ["flop", "images_per_second", "ms", "name", "networks", "share_of_ceiling", "share_of_roofline"];

/// Demands that the share of the ceiling is that of so many operations, and that of the roofline no smaller.
fn shares_are_of_the_ceilings(result: &Value, row: &Value, flop: f64) {
    let seconds = row["ms"].as_f64().unwrap() / 1e3;
    let share = flop / seconds / result["ceilings"]["flop_per_second"].as_f64().unwrap();
    let got = row.get("share_of_ceiling").map_or(0.0, |share| share.as_f64().unwrap());
    assert!((got - share).abs() <= 1e-9 * share, "{row}: {share}");
    assert!(row["share_of_roofline"].as_f64().unwrap() >= share * (1.0 - 1e-9), "{row}");
}

#[test]
fn a_ticket_s_plan_and_its_gain_are_shown_and_times_are_taken_once() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    json(folder, &[&["train", "--out", "w"], SMALL].concat());
    json(folder, &["prune", "--weights", "w/weights.safetensors", "--sparsity", "0.9", "--out", "t"]);

    let result = json(folder, &[&BENCH[..], &["--plan", "-q"]].concat());
    let expected =
        ["batch", "bytes", "ceilings", "density", "device", "layers", "model", "plan", "precision", "rows", "threads"];
    assert_eq!(keys(&result), expected);
    let layers = result["layers"].as_array().unwrap();
    assert!(layers.len() > 3, "{layers:?}");
    for layer in layers {
        assert_eq!(keys(layer), ["bytes", "chosen", "density", "name", "shape", "ways"]);
        let ways = layer["ways"].as_array().unwrap();
        assert_eq!(
            ways.iter().map(|way| way["way"].as_str().unwrap()).collect::<Vec<_>>(),
            ["dense", "groups", "direct"]
        );
        assert!(
            ways.iter().all(|way| way["measured_ms"].as_array().unwrap().iter().all(|ms| ms.as_f64().unwrap() > 0.0)),
            "{ways:?}"
        );
        let name = layer["name"].as_str().unwrap();
        assert!(name.ends_with(".weight"), "{name}");
    }
    let rows = result["rows"].as_array().unwrap();
    assert_eq!(
        rows.iter().map(|row| row["name"].as_str().unwrap()).collect::<Vec<_>>(),
        ["training step", "evaluation"]
    );
    for row in rows {
        assert_eq!(keys(row), [&["dense_ms"], &ROW[..]].concat());
        assert!(row.as_object().unwrap().values().all(|value| value.as_f64().is_none_or(|value| value > 0.0)), "{row}");
    }
    let text = output(folder, &[&BENCH[..], &["--plan", "-q"]].concat());
    assert!(
        ["predicted ms", "direct", "training step", "evaluation", "MiB"].iter().all(|part| text.contains(part)),
        "{text}"
    );
    assert!(json(folder, &[&BENCH[..], &["-q"]].concat()).get("layers").is_none(), "without --plan");

    // Tuned: the file decides, whatever it says, and is not written again.
    let tuned = || {
        let mut command = dilt(folder, &[&BENCH[..], &["--plan", "-q", "--tune", "--json"]].concat());
        command.env("DILT_CACHE", folder.join("cache"));
        command
    };
    let run = || -> serde_json::Value {
        let output = tuned().output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    run();
    let file = folder.join("cache/tuning.json");
    let mut times: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let training = times.as_object_mut().unwrap().iter_mut().filter(|(key, _)| key.contains("training"));
    for (_, ways) in training {
        // Forward alone in groups.
        ways["groups"] = serde_json::json!([1e-9, 1.0, 1.0]);
        ways["direct"] = serde_json::json!([1.0, 1e-9, 2.0]);
        ways["dense"] = serde_json::json!([1.0, 1.0, 1e-9]);
    }
    std::fs::write(&file, times.to_string()).unwrap();
    let second = run();
    let chosen = serde_json::json!(["groups", "direct", "dense"]);
    assert!(second["layers"].as_array().unwrap().iter().all(|layer| layer["chosen"] == chosen), "{second}");
    assert_ne!(second["plan"], result["plan"]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), times.to_string());
    std::fs::write(&file, "[").unwrap();
    failed(tuned(), "bench --tune", 1, &["tuning.json", "remove it"]);
}

#[test]
fn a_random_ticket_and_a_dense_network_need_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let bench = ["bench", "--set", "widths=[4,8,16]", "--batch", "8", "--runs", "1", "-q"];
    let random = json(folder.path(), &[&bench[..], &["--random-ticket", "0.9"]].concat());
    let density = random["density"].as_f64().unwrap();
    assert!((0.05..0.2).contains(&density), "{density}");
    assert!(random["rows"][0]["dense_ms"].as_f64().unwrap() > 0.0);
    let dense = json(folder.path(), &bench);
    assert_eq!(keys(&dense["rows"][0]), ROW);
    assert_eq!(dense["density"], 1.0);
    for result in [&random, &dense] {
        assert_eq!(keys(&result["ceilings"]), ["bytes_per_second", "flop_per_second", "products"]);
        for row in result["rows"].as_array().unwrap() {
            shares_are_of_the_ceilings(result, row, row["flop"].as_f64().unwrap());
        }
    }
    // Of the training step's operations, a third and a little more are forward; of the ticket's, far fewer.
    let flop = |result: &Value, row: usize| result["rows"][row]["flop"].as_f64().unwrap();
    assert!((1.0 / 3.0..0.4).contains(&(flop(&dense, 1) / flop(&dense, 0))), "{dense}");
    assert!(flop(&random, 0) < 0.5 * flop(&dense, 0), "{random}");
    let text = output(folder.path(), &bench);
    let says = ["images/s", "of ceiling", "of roofline", "measured ceilings", "GFLOP/s", "GB/s copied"];
    assert!(says.iter().all(|part| text.contains(part)), "{text}");
}

#[test]
fn single_operations_are_measured() {
    let folder = tempfile::tempdir().unwrap();
    let list = json(folder.path(), &["bench", "--op", "list"]);
    let small = [
        "c=3,h=5,w=5,k=4,n=9",
        "c=3,h=5,w=5,n=9",
        "c=3,k=4,t=5,n=9",
        "d=8,t=5,n=3",
        "heads=2,head_dim=8,t=5,n=3",
        "elements=1000",
    ];
    for op in list["rows"].as_array().unwrap() {
        let name = op["name"].as_str().unwrap();
        let keys_of = |shape: &str| -> Vec<String> {
            shape.split(',').map(|size| size.split('=').next().unwrap().to_owned()).collect()
        };
        let known = keys_of(op["shape"].as_str().unwrap());
        let shape = match name {
            "prune" => "elements=1000,remove=10",
            "couplings" => "probes=10,count=2,iterations=3",
            _ => small.iter().find(|shape| keys_of(shape).iter().all(|key| known.contains(key))).unwrap(),
        };
        let result = json(folder.path(), &["bench", "--op", name, "--shape", shape, "--runs", "3", "-q"]);
        assert_eq!(keys(&result), ["ceilings", "device", "flushed_bytes", "precision", "rows", "runs", "threads"]);
        let row = &result["rows"][0];
        assert_eq!(row["name"], name);
        let sizes: Vec<&str> = row["shape"].as_str().unwrap().split(',').collect();
        assert!(shape.split(',').all(|size| sizes.contains(&size)), "{row}");
        let [low, ms, high] = ["ms_p10", "ms", "ms_p90"].map(|key| row[key].as_f64().unwrap());
        assert!(0.0 < low && low <= ms && ms <= high, "{row}");
        let rates = ["gflop_per_second", "gb_per_second"].map(|key| row.get(key).map(|rate| rate.as_f64().unwrap()));
        assert!(rates.iter().flatten().count() > 0 && rates.iter().flatten().all(|&rate| rate > 0.0), "{row}");
        // The same numbers, counted alone.
        let counted = json(folder.path(), &["bench", "--op", name, "--shape", shape, "--bytes", "-q"]);
        assert_eq!(keys(&counted), ["device", "precision", "rows"]);
        let counted = &counted["rows"][0];
        assert_eq!((&counted["name"], &counted["shape"]), (&row["name"], &row["shape"]));
        let amounts = [&["flop"][..], &["read_bytes", "written_bytes"]]
            .map(|keys| keys.iter().map(|key| counted[key].as_f64().unwrap()).sum::<f64>());
        for (rate, amount) in rates.iter().zip(amounts) {
            assert!((rate.unwrap_or(0.0) - amount / ms / 1e6).abs() <= 1e-9 * amount / ms, "{row} {counted}");
        }
        shares_are_of_the_ceilings(&result, row, amounts[0]);
        assert_eq!(row.get("share_of_ceiling").is_some(), amounts[0] > 0.0, "{row}");
        // No share is below both of its parts: of operations and of bytes.
        let bytes = amounts[1] / (ms / 1e3) / result["ceilings"]["bytes_per_second"].as_f64().unwrap();
        let most = bytes.max(row.get("share_of_ceiling").map_or(0.0, |share| share.as_f64().unwrap()));
        assert!((row["share_of_roofline"].as_f64().unwrap() / most - 1.0).abs() < 1e-9, "{row}");
    }
    let text = output(folder.path(), &["bench", "--op", "norm_forward", "--shape", small[1], "--runs", "1"]);
    let says = ["c=3,h=5,w=5,n=9", "GB/s", "caches are cold", "of roofline", "measured ceilings"];
    assert!(says.iter().all(|part| text.contains(part)), "{text}");
    let text = output(folder.path(), &["bench", "--op", "norm_forward", "--shape", small[1], "--bytes"]);
    assert!(["c=3,h=5,w=5,n=9", "MB read", "counted from shapes"].iter().all(|part| text.contains(part)), "{text}");
}

/// What is not multiplied does not count: tokens and samples that fill a row up.
#[test]
fn padding_is_no_operation() {
    let folder = tempfile::tempdir().unwrap();
    let flop = |op: &str, shape: &str| {
        let counted = json(folder.path(), &["bench", "--op", op, "--shape", shape, "--bytes", "-q"]);
        counted["rows"][0]["flop"].as_u64().unwrap()
    };
    assert_eq!(flop("linear_forward", "c=3,k=5,t=9,n=2"), 2 * 3 * 5 * 9 * 2);
    assert_eq!(flop("conv_weight_gradient", "c=3,h=4,w=4,k=5,n=9"), 2 * 3 * 9 * 5 * 16 * 9);
    assert_eq!(flop("attention_backward", "heads=2,head_dim=8,t=5,n=3"), 5 * 2 * 16 * 25 * 3);
}

#[test]
fn an_operation_without_sense_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |op: &str, shape: &str, says: &[&str]| {
        fails(folder.path(), &["bench", "--device", "host", "--op", op, "--shape", shape], 2, says);
    };
    refused("conv", "c=3", &["--op", "conv_forward, conv_input_gradient", "got 'conv'"]);
    refused("conv_forward", "c=3,q=5", &["--shape of conv_forward", "c, h, w, k, r, s, stride, pad, n", "got 'q'"]);
    refused("conv_forward", "stride=x", &["stride", "whole number", "got 'x'"]);
    refused("conv_forward", "k=0", &["k: expected", "from 1 to", "got '0'"]);
    refused("conv_forward", "r=99", &["--shape c=64", "filter"]);
    refused("prune", "elements=10,remove=11", &["remove", "at most elements, 10, got 11"]);
    refused("couplings", "probes=3000", &["probes", "2048", "3000"]);
    fails(folder.path(), &["bench", "--op", "prune", "--batch", "8"], 2, &["cannot be used with"]);
    fails(folder.path(), &["bench", "--shape", "c=3"], 2, &["--op"]);
    let beyond = ["bench", "--device", "host", "--op", "attention_forward", "--shape", "heads=60000,t=65536"];
    fails(folder.path(), &beyond, 1, &["MiB"]);
}

#[test]
fn what_a_step_moves_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let result = json(folder.path(), &["bench", "--bytes", "--model", "resnet20", "--batch", "128", "-q"]);
    assert_eq!(keys(&result), ["batch", "device", "model", "parameters", "rows"]);
    assert_eq!(result["parameters"], 269_722, "as He et al. count: 0.27 M");
    let rows = result["rows"].as_array().unwrap();
    assert_eq!(rows[0]["name"], "training step");
    for key in ["gflop", "forward_mb", "backward_mb", "update_mb", "mb"] {
        let numbers: Vec<f64> = rows.iter().map(|row| row[key].as_f64().unwrap()).collect();
        let sum: f64 = numbers[1..].iter().sum();
        assert!((numbers[0] - sum).abs() < 1e-9 * sum, "{key}: {} of {sum}", numbers[0]);
    }
    let text = output(folder.path(), &["bench", "--bytes", "-q"]);
    assert!(["layer1.0.conv1", "optimizer", "GFLOP per image"].iter().all(|part| text.contains(part)), "{text}");
    fails(folder.path(), &["bench", "--bytes", "--kernels"], 2, &["cannot be used with"]);
}

#[test]
fn several_tickets_are_measured_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let command = ["bench", "--tickets", "3", "--random-ticket", "0.5", "--batch", "8", "--runs", "2", "-q"];
    let result = json(folder.path(), &command);
    let rows = result["rows"].as_array().unwrap();
    let number = |row: usize, key: &str| rows[row][key].as_f64().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["training step", "3 steps side by side", "3 steps together", "evaluation"]);
    for row in [1, 2] {
        assert_eq!((number(row, "networks"), number(0, "networks")), (3.0, 1.0));
        assert_eq!(number(row, "flop"), 3.0 * number(0, "flop"));
        assert!((number(row, "images_per_second") - 3e3 * 8.0 / number(row, "ms")).abs() < 1e-6);
    }
    assert!(output(folder.path(), &command).contains("3 steps together"));
}

#[test]
fn a_bench_without_sense_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    fails(folder.path(), &["bench", "--random-ticket", "1.5"], 2, &["--random-ticket", "1.5"]);
    fails(folder.path(), &["bench", "--ticket", "t", "--random-ticket", "0.5"], 2, &["cannot be used with"]);
    fails(folder.path(), &["bench", "--ticket", "t", "--runs", "0"], 2, &["--runs of at least 1"]);
    fails(folder.path(), &["bench", "--ticket", "t", "--batch", "0"], 2, &["--batch from 1"]);
    fails(folder.path(), &["bench", "--ticket", "t"], 1, &["t:"]);
    for tickets in ["1", "33"] {
        fails(
            folder.path(),
            &["bench", "--tickets", tickets],
            2,
            &["--tickets: expected a number from 2 to 32", tickets],
        );
    }
    fails(folder.path(), &["bench", "--bytes", "--tickets", "2"], 2, &["cannot be used with"]);
}
