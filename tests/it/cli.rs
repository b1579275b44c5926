//! The commands as a user gives them: what they print, and that they understand each other's files.

use std::collections::BTreeMap;
use std::path::Path;

use dilt::nn::weights::Weights;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

use crate::command::{SMALL, dilt, fails, json, keys, output, run_folder};

const NET: &[&str] = &["--set", "widths=[4,8,16]", "--limit", "200", "-q"];

fn with<'a>(args: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [args, more].concat()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

/// A folder with a trained network in `dense/`, and the result of its training.
fn trained(folder: &Path) -> Value {
    json(folder, &with(&["train", "--out", "dense", "--epochs", "2", "--batch", "64"], NET))
}

const DENSE: &str = "dense/weights.safetensors";

#[test]
fn training_writes_a_row_per_step_and_evaluation_agrees() {
    let folder = tempfile::tempdir().unwrap();
    let result = trained(folder.path());
    assert_eq!(keys(&result), ["epochs", "images_per_second", "loss", "steps", "top1", "weights"]);
    let metrics = std::fs::read_to_string(folder.path().join("dense/metrics.csv")).unwrap();
    let rows: Vec<&str> = metrics.lines().collect();
    assert!(rows[0].starts_with("step,epoch,loss,lr"));
    // 200 examples in batches of 64: three whole ones and eight, in each of two epochs.
    let steps: Vec<(String, String)> = rows[1..]
        .iter()
        .map(|row| row.split(',').map(String::from))
        .map(|mut r| (r.next().unwrap(), r.next().unwrap()))
        .collect();
    let expected: Vec<_> = (0..8).map(|step: usize| (step.to_string(), (step / 4).to_string())).collect();
    assert_eq!(steps, expected);

    let eval = with(&["eval", "--weights", DENSE, "--split", "train", "--batch", "64"], NET);
    let first = json(folder.path(), &eval);
    let names = ["data", "density", "device", "examples", "loss", "model", "precision", "split", "top1", "top5"];
    assert_eq!(keys(&first), names);
    assert_eq!((&first["top1"], &first["loss"]), (&result["top1"], &result["loss"]));
    assert_eq!(json(folder.path(), &eval), first, "evaluating twice gives the same");
    assert_eq!((number(&first["density"]), number(&first["examples"])), (1.0, 200.0));

    let logits = with(&["eval", "--weights", DENSE, "--logits", "logits.safetensors"], NET);
    let score = json(folder.path(), &logits);
    let bytes = std::fs::read(folder.path().join("logits.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (logits, labels) = (file.tensor("logits").unwrap(), file.tensor("labels").unwrap());
    assert_eq!((logits.shape(), labels.shape()), (&[200, 10][..], &[200][..]));
    let logits: Vec<f32> = logits.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let labels: Vec<i64> = labels.data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
    let right = |(row, label): &(&[f32], &i64)| (0..10).all(|c| row[c] <= row[**label as usize]);
    let top1 = logits.chunks(10).zip(&labels).filter(right).count() as f64 / 200.0;
    assert_eq!(number(&score["top1"]), top1);
}

#[test]
fn a_dry_run_lists_every_parameter_and_sums_up() {
    let folder = tempfile::tempdir().unwrap();
    let plan = json(folder.path(), &with(&["train", "--dry-run"], NET));
    let tensors = plan["tensors"].as_array().unwrap();
    trained(folder.path());
    for name in Weights::load(&folder.path().join(DENSE)).unwrap().tensors.keys().filter(|n| !n.contains("running")) {
        assert!(tensors.iter().any(|tensor| tensor["name"] == **name), "{name} is not listed");
    }
    let sum: u64 = tensors.iter().map(|tensor| tensor["bytes"].as_u64().unwrap()).sum();
    let bytes = plan["bytes"].as_u64().unwrap();
    assert!(sum <= bytes && sum * 10 > bytes * 9, "{sum} of {bytes}");
    let text = output(folder.path(), &with(&["train", "--dry-run"], NET));
    assert!(text.contains("layer3.0.conv2.weight") && text.contains(&bytes.to_string()));
    assert!(!folder.path().join("runs").exists());
}

/// Magnitudes of a file, in the order of names, with the masks they are under.
fn magnitudes(weights: &Weights) -> Vec<(f32, String, usize)> {
    let pruned = weights.tensors.iter().filter(|(_, tensor)| tensor.ndim() >= 2);
    pruned.flat_map(|(n, t)| t.iter().enumerate().map(|(i, w)| (w.abs(), n.clone(), i)).collect::<Vec<_>>()).collect()
}

#[test]
fn pruning_removes_exactly_the_share_and_the_first_of_equals() {
    let folder = tempfile::tempdir().unwrap();
    trained(folder.path());
    let path = folder.path().join("ties.safetensors");
    let mut weights = Weights::load(&folder.path().join(DENSE)).unwrap();
    for (i, w) in weights.tensors.values_mut().filter(|t| t.ndim() >= 2).flatten().enumerate() {
        *w = [0.5, -0.5, 1.0, -0.25, 0.0, -0.0][i % 6];
    }
    weights.save(&path).unwrap();
    let prune = ["prune", "--weights", "ties.safetensors", "--sparsity", "0.4321", "--out", "t.safetensors"];
    let result = json(folder.path(), &prune);
    assert!(["total", "kept", "density", "threshold", "layers"].iter().all(|key| keys(&result).contains(key)));
    let mut all = magnitudes(&weights);
    let remove = (all.len() as f64 * 0.4321).round_ties_even() as usize;
    all.sort_by(|a, b| a.0.total_cmp(&b.0)); // stable: ties stay in order
    assert_eq!(number(&result["kept"]) as usize, all.len() - remove);
    assert_eq!(number(&result["threshold"]) as f32, all[remove - 1].0);
    let ticket = Weights::load(&folder.path().join("t.safetensors")).unwrap();
    assert!(all[..remove].iter().all(|(_, name, i)| !ticket.masks[name].get(*i)), "the smallest go");
    assert!(all[remove..].iter().all(|(_, name, i)| ticket.masks[name].get(*i)), "all others stay");
    assert_eq!(ticket.tensors, weights.tensors, "_orig is what was there");

    let by_layer = ["prune", "--weights", "ties.safetensors", "--sparsity", "0.4321", "--out", "l.safetensors"];
    let by_layer = with(&by_layer, &["--scope", "layer", "--exclude", "linear.*"]);
    for layer in json(folder.path(), &by_layer)["layers"].as_array().unwrap() {
        let total = number(&layer["total"]);
        assert_eq!(number(&layer["kept"]), total - (total * 0.4321).round_ties_even(), "{layer}");
    }
    // Of a ticket, the share is of what is left.
    let again = ["prune", "--weights", "t.safetensors", "--sparsity", "0.5", "--out", "u.safetensors"];
    let left = (all.len() - remove) as f64;
    assert_eq!(number(&json(folder.path(), &again)["kept"]), left - (left * 0.5).round_ties_even());
}

#[test]
fn mask_operations_are_those_of_sets() {
    let folder = tempfile::tempdir().unwrap();
    trained(folder.path());
    json(folder.path(), &with(&["train", "--out", "other", "--epochs", "1", "--seed", "7"], NET));
    let mut sets = Vec::new();
    for (name, from, share) in [("a", "dense", "0.3"), ("b", "other", "0.6"), ("c", "other", "0.8")] {
        let (from, out) = (format!("{from}/weights.safetensors"), format!("{name}.safetensors"));
        json(folder.path(), &["prune", "--weights", &from, "--sparsity", share, "--out", &out]);
        sets.push(Weights::load(&folder.path().join(out)).unwrap().masks);
    }
    type Votes<'a> = &'a dyn Fn([bool; 3]) -> bool;
    let cases: [(&str, &[&str], Votes); 5] = [
        ("and", &["c.safetensors"], &|[a, b, c]| a && b && c),
        ("or", &["c.safetensors"], &|[a, b, c]| a || b || c),
        ("minus", &["c.safetensors"], &|[a, b, c]| a && !b && !c),
        ("xor", &[], &|[a, b, _]| a != b),
        ("consensus", &["c.safetensors", "--at-least", "2"], &|keep| keep.iter().filter(|keep| **keep).count() >= 2),
    ];
    for (operation, more, expected) in cases {
        let args = with(&["mask", operation, "--out", "r.safetensors", "a.safetensors", "b.safetensors"], more);
        let result = json(folder.path(), &args);
        let written = Weights::load(&folder.path().join("r.safetensors")).unwrap();
        let mut kept = 0;
        for (name, mask) in &written.masks {
            for i in 0..mask.len() {
                let keep = expected([0, 1, 2].map(|set| sets[set][name].get(i)));
                assert_eq!(mask.get(i), keep, "{operation} {name} {i}");
                kept += usize::from(keep);
            }
        }
        assert_eq!(number(&result["kept"]) as usize, kept);
        assert!(["density", "jaccard", "chance_jaccard", "layers"].iter().all(|key| keys(&result).contains(key)));
        assert_eq!(written.tensors, Weights::load(&folder.path().join("a.safetensors")).unwrap().tensors);
    }
    let stats = json(folder.path(), &["mask", "stats", "a.safetensors"]);
    assert_eq!((number(&stats["jaccard"]), number(&stats["chance_jaccard"])), (1.0, 1.0));
    assert_eq!(stats["density"], json(folder.path(), &with(&["eval", "--ticket", "a.safetensors"], NET))["density"]);
}

/// Writes a file as PyTorch would: `_orig` and `_mask` in f32, counters of steps in i64.
fn as_pytorch(weights: &Weights, path: &Path) {
    let mut tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    for (name, tensor) in &weights.tensors {
        let data = bytes(tensor.as_slice().unwrap());
        let pruned = weights.masks.contains_key(name);
        let stored = if pruned { format!("{name}_orig") } else { name.clone() };
        tensors.insert(stored, (Dtype::F32, tensor.shape().to_vec(), data));
        if let Some(norm) = name.strip_suffix("running_mean") {
            tensors.insert(format!("{norm}num_batches_tracked"), (Dtype::I64, vec![], vec![3, 0, 0, 0, 0, 0, 0, 0]));
        }
    }
    for (name, mask) in &weights.masks {
        let mask_values: Vec<f32> = mask.iter().map(f32::from).collect();
        tensors.insert(format!("{name}_mask"), (Dtype::F32, mask.shape().to_vec(), bytes(&mask_values)));
    }
    let views = tensors.iter().map(|(n, (d, s, data))| (n, TensorView::new(*d, s.clone(), data).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

#[test]
fn a_state_dict_pruned_by_pytorch_trains_evaluates_and_prunes() {
    let folder = tempfile::tempdir().unwrap();
    trained(folder.path());
    json(folder.path(), &["prune", "--weights", DENSE, "--sparsity", "0.5", "--out", "t.safetensors"]);
    let ticket = Weights::load(&folder.path().join("t.safetensors")).unwrap();
    as_pytorch(&ticket, &folder.path().join("torch.safetensors"));
    let eval = |file| json(folder.path(), &with(&["eval", "--ticket", file], NET));
    assert_eq!(eval("torch.safetensors"), eval("t.safetensors"));
    for (file, out) in [("torch.safetensors", "p"), ("t.safetensors", "q")] {
        json(folder.path(), &with(&["train", "--ticket", file, "--epochs", "1", "--out", out], NET));
    }
    // A state dict says nothing of its model.
    let pruned = ["torch.safetensors", "t.safetensors"].map(|file| {
        json(folder.path(), &["prune", "--weights", file, "--sparsity", "0.5", "--out", "u.safetensors"]);
        let pruned = Weights::load(&folder.path().join("u.safetensors")).unwrap();
        (pruned.tensors, pruned.masks)
    });
    assert_eq!(pruned[0], pruned[1]);
    crate::command::assert_same_files(&folder.path().join("p"), &folder.path().join("q"));
    let trained = Weights::load(&folder.path().join("p/weights.safetensors")).unwrap();
    assert_eq!(trained.masks, ticket.masks);
    let zero = |name: &String| trained.tensors[name].iter().zip(ticket.masks[name].iter()).all(|(w, k)| k || *w == 0.0);
    assert!(ticket.masks.keys().all(zero));
}

#[test]
fn the_tickets_of_a_run_are_understood_by_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let result = json(folder.path(), &with(&["find", "--levels", "2", "--seeds", "1"], SMALL));
    assert_eq!(keys(&result), ["matrix", "overlap", "run", "similarity", "tickets"]);
    let row_keys = ["density", "files", "matched", "method", "name", "seeds", "top1", "top1_std"];
    for row in result["tickets"].as_array().unwrap() {
        assert_eq!(keys(row), row_keys);
        let weights = format!("{}/{}", result["run"].as_str().unwrap(), row["files"][0]["weights"].as_str().unwrap());
        let score = json(folder.path(), &with(&["eval", "--batch", "64", "--weights", &weights], NET));
        for key in ["top1", "density"] {
            assert_eq!(score[key], row[key], "{key} of {}", row["name"]);
        }
    }
    assert_eq!(result["matrix"]["rows"].as_array().unwrap().len(), result["tickets"].as_array().unwrap().len());
    let run = run_folder(folder.path());
    let ticket =
        |name: &str| run.join(format!("seed_0/tickets/{name}/ticket.safetensors")).to_str().unwrap().to_owned();
    let (core, one, two) = (ticket("core"), ticket("specialist-1"), ticket("specialist-2"));
    json(folder.path(), &with(&["train", "--ticket", &core, "--epochs", "1", "--out", "core"], NET));
    json(folder.path(), &["mask", "or", &core, &one, &two, "--out", "union.safetensors"]);
    let union = Weights::load(&folder.path().join("union.safetensors")).unwrap();
    assert_eq!(union.masks, Weights::load(ticket("union").as_ref()).unwrap().masks);

    let specialists = [format!("1={one}"), format!("2={two}")];
    for mode in ["retrain", "merge"] {
        let args = ["assemble", "--core", &core, "--specialist", &specialists[0], "--specialist", &specialists[1]];
        let args = with(&args, &["--mode", mode, "--seeds", "1", "--runs", mode]);
        let assembled = json(folder.path(), &with(&args, SMALL));
        let path = |row: &Value, which| {
            folder.path().join(assembled["run"].as_str().unwrap()).join(row["files"][0][which].as_str().unwrap())
        };
        let [core_row, row, random] = [0, 1, 2].map(|i| &assembled["tickets"][i]);
        assert_eq!([&core_row["name"], &row["name"], &random["name"]], ["core", "assembled", "core-random"]);
        assert_eq!(Weights::load(&path(row, "ticket")).unwrap().masks, union.masks);
        let control = Weights::load(&path(random, "ticket")).unwrap();
        let counts = |w: &Weights| w.masks.values().map(|mask| mask.count()).collect::<Vec<_>>();
        assert_eq!(counts(&control), counts(&union), "{mode}: as many random weights of each layer");
        let core_masks = Weights::load(core.as_ref()).unwrap().masks;
        for (name, mask) in &core_masks {
            assert!((0..mask.len()).all(|i| !mask.get(i) || control.masks[name].get(i)), "the core is in the control");
        }
        if mode == "merge" {
            let (frozen, merged) = (path(core_row, "weights"), path(row, "weights"));
            let [frozen, merged] = [frozen, merged].map(|path| Weights::load(&path).unwrap());
            for (name, mask) in &core_masks {
                let same = frozen.tensors[name].iter().zip(&merged.tensors[name]).zip(mask.iter());
                assert!(same.into_iter().all(|((a, b), keep)| !keep || a.to_bits() == b.to_bits()), "{name} is frozen");
            }
        }
        assert_eq!(json(folder.path(), &with(&args, SMALL)), assembled);
    }
}

#[test]
fn trained_weights_name_their_model_and_what_does_not_fit_is_told_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let short = ["--steps", "1", "--batch", "8", "--limit", "20", "-q"];
    json(folder.path(), &with(&["train", "--model", "vit_digits", "--out", "vit"], &short));
    let eval = ["eval", "--weights", "vit/weights.safetensors", "--limit", "20", "-q"];
    assert_eq!(json(folder.path(), &eval)["model"], "vit_digits");
    // And what was set of it, through every file that comes of them; but not of another model, nor how it was trained.
    let set = ["--set", "widths=[4,8,16]", "--set", "train.lr=0.02"];
    json(folder.path(), &with(&["train", "--out", "narrow"], &with(&set, &short)));
    let prune = ["prune", "--weights", "narrow/weights.safetensors", "--sparsity", "0.5", "--out", "t.safetensors"];
    json(folder.path(), &prune);
    let structure = ["structure", "--method", "refill", "--ticket", "t.safetensors", "--out", "s.safetensors", "-q"];
    json(folder.path(), &structure);
    for file in ["narrow/weights.safetensors", "t.safetensors", "s.safetensors"] {
        assert_eq!(Weights::load(&folder.path().join(file)).unwrap().metadata["set"], r#"["widths=[4,8,16]"]"#);
        json(folder.path(), &["eval", "--weights", file, "--limit", "20", "-q"]);
        let wider = ["eval", "--weights", file, "--set", "widths=[8,8,16]", "-q"];
        fails(folder.path(), &wider, 2, &[file, "as weights of model 'resnet8'", "wrong shape"]);
    }
    let other = with(&eval, &["--model", "resnet8"]);
    fails(folder.path(), &other, 2, &["vit/weights.safetensors, as weights of model 'resnet8'", "--model and --set"]);
}

#[test]
fn a_ticket_that_keeps_nothing_of_a_layer_is_warned_of() {
    let folder = tempfile::tempdir().unwrap();
    trained(folder.path());
    let warns = |args: &[&str]| {
        let output = dilt(folder.path(), args).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        stderr.contains("warning: nothing is kept of ")
    };
    let prune = |sparsity, out| ["prune", "--weights", DENSE, "--sparsity", sparsity, "--out", out];
    assert!(warns(&prune("0.999", "none.safetensors")) && !warns(&prune("0.1", "most.safetensors")));
    for (file, empty) in [("none.safetensors", true), ("most.safetensors", false)] {
        assert_eq!(warns(&with(&["eval", "--ticket", file], NET)), empty);
        assert_eq!(warns(&with(&["train", "--ticket", file, "--dry-run"], NET)), empty);
        assert_eq!(warns(&["bench", "--ticket", file, "--set", "widths=[4,8,16]", "--batch", "8", "--bytes"]), empty);
    }
}

#[test]
fn without_json_a_table_and_without_quiet_progress() {
    let folder = tempfile::tempdir().unwrap();
    let args: Vec<_> = with(&["find", "--levels", "1", "--seeds", "2"], SMALL);
    let args: Vec<_> = args.into_iter().filter(|arg| *arg != "-q").collect();
    let output = dilt(folder.path(), &args).output().unwrap();
    let (stdout, stderr) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    for name in [
        "dense",
        "colt",
        "core",
        "specialist-2",
        "union",
        "random at core",
        "magnitude at union",
        "chance",
        "run: runs/",
    ] {
        assert!(stdout.contains(name), "{stdout}\nlacks {name}");
    }
    assert!(stderr.contains("seed_0/tickets/core") && stderr.contains("seed_1/tickets/core"), "{stderr}");
}
