//! `dilt export`: each form holds what it should, and the way back leads to the same bytes. And `models/convert.py`.

use std::path::Path;
use std::process::Command;

use dilt::device::Device;
use dilt::nn::compact::Compaction;
use dilt::nn::config::ModelConfig;
use dilt::nn::model::Model;
use dilt::nn::network::{Mode, Network};
use dilt::nn::plan::Use;
use dilt::nn::weights::Weights;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::command::{SMALL, fails, json, keys, output};

/// A trained network in `w`, and of it a ticket of a third of the weights with some metadata.
fn ticket(folder: &Path) -> Weights {
    json(folder, &[&["train", "--out", "w"], SMALL].concat());
    json(folder, &["prune", "--weights", "w/weights.safetensors", "--sparsity", "0.6667", "--out", "t"]);
    let mut ticket = Weights::load(&folder.join("t")).unwrap();
    ticket.metadata.insert("note".into(), "kept".into());
    ticket.save(&folder.join("t")).unwrap();
    ticket
}

fn export(folder: &Path, from: &str, form: &str, out: &str, more: &[&str]) -> Value {
    json(folder, &[&["export", "--weights", from, "--form", form, "--out", out], more].concat())
}

fn bytes(folder: &Path, name: &str) -> Vec<u8> {
    std::fs::read(folder.join(name)).unwrap()
}

#[test]
fn forms_lead_back_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let ticket = ticket(folder);
    let compact = export(folder, "t", "compact", "compact", &[]);
    assert_eq!(keys(&compact), ["bytes", "density", "dtype", "form", "kept", "out", "tensors", "total"]);
    let (kept, total) = (
        ticket.masks.values().map(|m| m.count()).sum::<usize>(),
        ticket.masks.values().map(|m| m.len()).sum::<usize>(),
    );
    assert_eq!((compact["kept"].as_u64(), compact["total"].as_u64()), (Some(kept as u64), Some(total as u64)));
    assert_eq!(compact["density"].as_f64(), Some(kept as f64 / total as f64));
    assert_eq!(compact["tensors"].as_u64(), Some(ticket.tensors.len() as u64));
    assert_eq!(compact["bytes"].as_u64(), Some(bytes(folder, "compact").len() as u64));
    assert_eq!((&compact["form"], &compact["dtype"]), (&"compact".into(), &"f32".into()));
    assert_eq!(Weights::load(&folder.join("compact")).unwrap(), ticket, "metadata and pruned weights too");
    assert!(bytes(folder, "compact").len() + total / 8 * 7 < bytes(folder, "t").len() + 4096, "a bit for a byte");
    export(folder, "compact", "pruning", "back", &[]);
    assert_eq!(bytes(folder, "back"), bytes(folder, "t"));
    export(folder, "back", "compact", "again", &[]);
    assert_eq!(bytes(folder, "again"), bytes(folder, "compact"));
    let text = output(folder, &["export", "--weights", "t", "--form", "compact", "--out", "text"]);
    assert!(["density", "compact", &kept.to_string(), "text"].iter().all(|part| text.contains(part)), "{text}");
}

#[test]
fn plain_weights_have_the_mask_in_them_and_evaluate_alike() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let ticket = ticket(folder);
    export(folder, "t", "plain", "plain", &[]);
    let plain = Weights::load(&folder.join("plain")).unwrap();
    assert!(plain.masks.is_empty());
    assert_eq!(plain.metadata, ticket.metadata);
    for (name, tensor) in &ticket.tensors {
        let mask = ticket.masks.get(name);
        let masked = |(i, &w): (usize, &f32)| if mask.is_none_or(|mask| mask.get(i)) { w.to_bits() } else { 0 };
        let expected: Vec<u32> = tensor.iter().enumerate().map(masked).collect();
        assert_eq!(plain.tensors[name].iter().map(|w| w.to_bits()).collect::<Vec<_>>(), expected, "{name}");
    }
    let file = bytes(folder, "plain");
    let names = SafeTensors::deserialize(&file).unwrap().names().into_iter().map(str::to_owned).collect::<Vec<_>>();
    assert!(names.len() == ticket.tensors.len() && !names.iter().any(|n| n.ends_with("_orig") || n.ends_with("_mask")));
    let eval = |file| json(folder, &["eval", "--set", "widths=[4,8,16]", "--limit", "200", "--weights", file]);
    let (plain, ticket) = (eval("plain"), eval("t"));
    assert_eq!((&plain["loss"], &plain["top1"]), (&ticket["loss"], &ticket["top1"]));
    export(folder, "w/weights.safetensors", "plain", "dense", &[]);
    assert_eq!(bytes(folder, "dense"), bytes(folder, "w/weights.safetensors"));
}

#[test]
fn half_types_halve_the_weights_and_refuse_what_overflows() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut ticket = ticket(folder);
    let sizes = ["f32", "f16", "bf16"].map(|dtype| {
        let exported = export(folder, "t", "compact", dtype, &["--dtype", dtype]);
        assert_eq!(exported["dtype"], dtype);
        let back = Weights::load(&folder.join(dtype)).unwrap();
        assert_eq!(back.masks, ticket.masks);
        // Rounding of 11 and of 8 bits, beside what is below the smallest normal half.
        let error = match dtype {
            "f32" => 0.0,
            "f16" => 2f32.powi(-11),
            _ => 2f32.powi(-8),
        };
        for (name, tensor) in &ticket.tensors {
            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= error * a.abs().max(2f32.powi(-14));
            assert!(tensor.iter().zip(&back.tensors[name]).all(close), "{dtype}: {name}");
        }
        bytes(folder, dtype).len()
    });
    assert!(sizes[1] * 10 < sizes[0] * 6 && sizes[1].abs_diff(sizes[2]) < 4096, "{sizes:?}");
    let weight = ticket.masks["conv1.weight"].iter().position(|kept| !kept).unwrap();
    ticket.tensors.get_mut("conv1.weight").unwrap().iter_mut().nth(weight).into_iter().for_each(|w| *w = 1e5);
    ticket.save(&folder.join("t")).unwrap();
    let pruning = ["export", "--weights", "t", "--form", "pruning", "--dtype", "f16", "--out", "large"];
    fails(folder, &pruning, 1, &["large", "\"conv1.weight\"", "1e5 at [", "too large for F16", "--dtype f32"]);
    assert!(!folder.join("large").exists());
    export(folder, "t", "plain", "large", &["--dtype", "f16"]); // it is pruned
    let dense = ["export", "--weights", "w/weights.safetensors", "--form", "compact", "--out", "x"];
    fails(folder, &dense, 1, &["has no masks", "--form plain"]);
    fails(folder, &["export", "--weights", "t", "--form", "zip", "--out", "x"], 2, &["zip", "possible values"]);
    fails(
        folder,
        &["export", "--weights", "t", "--form", "plain", "--out", "none/x"],
        1,
        &["create that folder first"],
    );
}

#[test]
fn a_pruned_module_of_pytorch_converts() {
    let found = Command::new("/usr/bin/python3").args(["-c", "import torch"]).output();
    if !found.is_ok_and(|output| output.status.success()) {
        return eprintln!("skipped: /usr/bin/python3 has no PyTorch");
    }
    let folder = tempfile::tempdir().unwrap();
    let python = |args: &[&str]| {
        let output = Command::new("/usr/bin/python3").current_dir(folder.path()).args(args).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let make = "
import torch
from torch.nn.utils import prune
conv = torch.nn.Conv2d(3, 8, 3)
prune.l1_unstructured(conv, 'weight', amount=0.75)
both = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(8).half())
torch.save({'state_dict': torch.nn.DataParallel(both).state_dict(), 'epoch': 7}, 'pruned.pth')
torch.save({'state_dict': both.state_dict(), 'lr': 0.5}, 'number.pth')
torch.save([1, 2], 'list.pth')
";
    assert_eq!(python(&["-c", make]), (true, String::new()));
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/models/convert.py");
    assert_eq!(python(&[script, "pruned.pth", "pruned.safetensors"]), (true, String::new()));
    let weights = Weights::load(&folder.path().join("pruned.safetensors")).unwrap();
    let names: Vec<&str> = weights.tensors.keys().map(String::as_str).collect();
    assert_eq!(names, ["0.bias", "0.weight", "1.bias", "1.running_mean", "1.running_var", "1.weight"]);
    assert_eq!(weights.masks["0.weight"].count(), 54);
    assert!(weights.tensors["1.running_var"].iter().all(|&var| var == 1.0));
    let (fits, says) = python(&[script, "list.pth", "x"]);
    assert!(!fits && says.contains("expected a state_dict"), "{says}");
    // PyTorch 1.13 refuses the number; later versions take it.
    let (fits, says) = python(&[script, "number.pth", "x"]);
    assert!(fits || says.contains("--trust"), "{says}");
    assert_eq!(python(&[script, "--trust", "number.pth", "number.safetensors"]), (true, String::new()));
    assert_eq!(Weights::load(&folder.path().join("number.safetensors")).unwrap(), weights);
}

#[test]
fn a_structured_ticket_is_written_as_a_smaller_network_of_the_same_outputs() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let ticket = ticket(folder);
    let small = ["--set", "widths=[4,8,16]"];
    json(folder, &["structure", "--method", "refill", "--ticket", "t", "--out", "s", "-q", small[0], small[1]]);
    let compact =
        |from: &'static str| [&["export", "--compact", "--weights", from, "--out", "small"], &small[..]].concat();
    let report = json(folder, &compact("s"));
    assert_eq!(keys(&report), ["bytes", "layers", "model", "of", "out", "parameters"]);
    assert!(report["parameters"].as_u64() < report["of"].as_u64(), "{report}");
    assert!(!report["layers"].as_array().unwrap().is_empty());
    assert!(output(folder, &compact("s")).contains("left"));

    // The network of those shapes, without masks, has the ticket's outputs.
    let structured = Weights::load(&folder.join("s")).unwrap();
    let model = ModelConfig::load("resnet8", &[small[1].into()]).unwrap().build().unwrap();
    let (left, _) = Compaction::plain(&model, &structured.masks);
    let device = Device::open("host").unwrap();
    let logits = |model: &Model, weights: &Weights| {
        let mut network = Network::new(&device, model, 8, Use::Evaluate).unwrap();
        network.load(weights).unwrap();
        let batch = network.batch();
        let x: Vec<f32> = (0..batch.x.len()).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
        device.write_reals(&x, batch.x).unwrap();
        device.write(&[8], batch.current.count).unwrap();
        network.forward(Mode::Evaluate).unwrap();
        device.read_reals(network.head().logits).unwrap()
    };
    let exported = Weights::load(&folder.join("small")).unwrap();
    assert!(exported.masks.is_empty());
    let (got, want) = (logits(&left, &exported), logits(&model, &structured));
    let largest = want.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    let far = got.iter().zip(&want).find(|(got, want)| (**got - **want).abs() > 2e-6 * largest);
    assert_eq!(far, None, "the largest is {largest}");

    // A ticket of single weights has no smaller network; plain weights neither.
    assert!(ticket.masks.values().all(|mask| mask.count() > 0));
    fails(folder, &compact("w/weights.safetensors"), 1, &["no smaller network", "dilt structure"]);
    fails(folder, &["export", "--weights", "t", "--out", "x"], 2, &["--form"]);
    fails(
        folder,
        &["export", "--weights", "t", "--out", "x", "--form", "plain", "--model", "resnet8"],
        2,
        &["cannot be used with"],
    );
}
