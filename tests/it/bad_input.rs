//! Requests and files that cannot work: an exit code of 1 or 2, a message that says what to do, never a panic.

use std::path::Path;
use std::process::Command;

use dilt::nn::weights::Weights;

use crate::command::{SMALL, dilt, failed, fails, files, json, program};

fn with<'a>(args: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [args, more].concat()
}

fn trained(folder: &Path) {
    json(folder, &with(&["train", "--out", "w"], SMALL));
}

const FILE: &str = "w/weights.safetensors";

#[test]
fn damaged_and_hostile_weights() {
    let folder = tempfile::tempdir().unwrap();
    trained(folder.path());
    let bytes = std::fs::read(folder.path().join(FILE)).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let text = String::from_utf8(bytes[8..8 + header].to_vec()).unwrap();
    let edited = |from: &str, to: &str| {
        let text = text.replacen(from, to, 1);
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &bytes[8 + header..]].concat()
    };
    let mut nan = bytes.clone();
    nan[8 + header..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let cases: [(&str, Vec<u8>, &[&str]); 8] = [
        ("empty", vec![], &["empty"]),
        ("truncated", bytes[..bytes.len() / 2].to_vec(), &["cut short"]),
        ("header", [&u64::MAX.to_le_bytes()[..], &bytes[8..]].concat(), &["header of"]),
        ("nan", nan, &["finite", "NaN"]),
        ("dtype", edited("\"F32\"", "\"I32\""), &["expected F32", "bn1.bias"]),
        ("overlap", edited("\"data_offsets\":[0,", "\"data_offsets\":[4,"), &["bn1.bias", "offsets"]),
        ("name", edited("conv1.weight", "conv9.weight"), &["conv9.weight", "conv1.weight"]),
        ("text", b"this is no safetensors file".to_vec(), &["safetensors"]),
    ];
    for (name, content, says) in cases {
        let file = format!("{name}.safetensors");
        std::fs::write(folder.path().join(&file), content).unwrap();
        let code = if name == "name" { 2 } else { 1 };
        let says = with(says, &[&file]);
        fails(folder.path(), &with(&["eval", "--weights", &file], SMALL_NET), code, &says);
        fails(folder.path(), &with(&["train", "--weights", &file, "--out", "w"], SMALL), code, &says);
        if name != "name" {
            fails(folder.path(), &["prune", "--weights", &file, "--sparsity", "0.5", "--out", "x"], 1, &says);
            fails(folder.path(), &["mask", "stats", &file], 1, &says);
        }
    }
    assert_eq!(std::fs::read(folder.path().join(FILE)).unwrap(), bytes, "what was trained before is still there");
    fails(folder.path(), &["eval", "--weights", "none.safetensors"], 1, &["none.safetensors", "No such file"]);
    let other = ["eval", "--weights", FILE, "--model", "resnet8"];
    fails(folder.path(), &other, 2, &["wrong shape", "linear.weight", "--model"]);
    let classes = with(&["eval", "--weights", FILE, "--set", "classes=12"], SMALL_NET);
    fails(folder.path(), &classes, 2, &["linear.bias", "expected [12], got [10]"]);
    fails(folder.path(), &["mask", "stats", FILE], 1, &["has no masks", "expected a ticket"]);
    fails(folder.path(), &["assemble", "--core", FILE, "--specialist", "1=x"], 1, &["has no masks"]);

    let mut set = Weights::load(&folder.path().join(FILE)).unwrap();
    for (said, says) in
        [("x", "set: expected a list of texts"), (r#"["widths=[1000000000,1000000000,1000000000]"]"#, "at most")]
    {
        set.metadata.insert("set".into(), said.into());
        set.save(&folder.path().join("set.safetensors")).unwrap();
        fails(folder.path(), &["eval", "--weights", "set.safetensors"], 2, &[says]);
    }

    let mut huge = Weights::load(&folder.path().join(FILE)).unwrap();
    huge.tensors.values_mut().for_each(|tensor| tensor.fill(1e38));
    huge.save(&folder.path().join("huge.safetensors")).unwrap();
    let eval = with(&["eval", "--weights", "huge.safetensors"], SMALL_NET);
    fails(folder.path(), &eval, 1, &["finite mean loss"]);
}

const SMALL_NET: &[&str] = &["--set", "widths=[4,8,16]", "--limit", "200", "-q"];

#[test]
fn options_out_of_range() {
    let folder = tempfile::tempdir().unwrap();
    trained(folder.path());
    std::fs::write(folder.path().join("one"), "1\n2 3\n").unwrap();
    std::fs::write(folder.path().join("word"), "1 2\n3 x\n").unwrap();
    for sparsity in ["0", "1", "-1", "NaN", "1.5"] {
        let args = ["prune", "--weights", FILE, "--sparsity", sparsity, "--out", "x.safetensors"];
        fails(folder.path(), &args, 2, &["sparsity", "above 0 and below 1", sparsity]);
    }
    assert!(!folder.path().join("x.safetensors").exists());
    let find: &[(&[&str], &[&str])] = &[
        (&["--prune", "1"], &["--prune", "above 0 and below 1"]),
        (&["--prune", "-0.5"], &["--prune", "got -0.5"]),
        (&["--density", "nan"], &["--density", "got NaN"]),
        (&["--levels", "0"], &["--levels", "at least 1"]),
        (&["--levels", "10000000000000000000"], &["--levels", "at most 1000"]),
        (&["--seeds", "0"], &["--seeds", "at least 1"]),
        (&["--seed", "18446744073709551615"], &["--seed", "at most"]),
        (&["--parts", "1"], &["--parts", "at least 2"]),
        (&["--parts", "6"], &["at least two classes", "at most 5"]),
        (&["--parts", "1000000", "--partition", "random"], &["random parts of 200 examples"]),
        (&["--partition", "file=one"], &["part-1 has 1 classes", "at least two"]),
        (&["--partition", "file=word"], &["file=word", "line 2", "\"x\""]),
        (&["--partition", "file=none"], &["file=none", "No such file"]),
        (&["--partition", "fruit"], &["fruit", "classes, random or file=FILE"]),
        (&["--at-least", "3"], &["--at-least", "1 to 2"]),
        (&["--at-least", "1", "--method", "colt"], &["--at-least", "dilt"]),
        (&["--rewind", "soon"], &["--rewind", "init or a number", "soon"]),
        (&["--rewind", "5"], &["--rewind", "at most 4"]),
        (&["--exclude", "nothing"], &["--exclude 'nothing'", "conv1.weight"]),
        (&["--exclude", "*"], &["leaves no weights"]),
        (&["--method", "magic"], &["magic", "possible values"]),
        (&["--model", "vgg"], &["vgg", "resnet20"]),
        (&["--data", "mnist"], &["mnist", "digits"]),
        (&["--data", "cifar10"], &["cifar10=DIR"]),
        (&["--skip-broken"], &["--skip-broken", "image files"]),
        (&["--precision", "f16"], &["f16", "bf16", "f32"]),
        (&["--device", "tpu"], &["tpu", "host"]),
        (&["--batch", "0"], &["batch", "at least 1"]),
        (&["--batch", "18446744073709551615"], &["batch", "at most"]),
        (&["--lr", "NaN"], &["lr", "NaN"]),
        (&["--momentum", "1"], &["momentum", "less than 1"]),
        (&["--set", "widths=[4,8]"], &["as many widths as stages"]),
        (&["--set", "widths=[1000000000,1000000000,1000000000]"], &["widths", "at most"]),
        (&["--set", "widths=[60000,60000,60000]"], &["parameters", "smaller widths"]),
        (&["--set", "stages=[1000000000,1,1]"], &["blocks"]),
        (&["--set", "stages=[0,1,1]"], &["no stage without blocks"]),
        (&["--set", "widths=[16,8,4]"], &["widths never shrink"]),
        (&["--set", "colour=red"], &["colour"]),
        (&["--set", "classes=many"], &["invalid type"]),
        (&["--set", "widths"], &["key=value"]),
        (&["--set", "train.speed=9"], &["speed"]),
        (&["--mean", "1,2"], &["--mean", "1 numbers"]),
        (&["--std", "0"], &["--std", "above 0"]),
        (&["--limit", "0"], &["--limit", "at least 1"]),
        (&["--limit", "2", "--partition", "classes"], &["no examples"]),
    ];
    for (options, says) in find {
        // Options that are given twice would be refused for that.
        let base = SMALL.chunks(2).filter(|pair| pair[0] == "--set" || !options.contains(&pair[0])).flatten().copied();
        let args: Vec<&str> = ["find"].into_iter().chain(base).chain(options.iter().copied()).collect();
        fails(folder.path(), &args, 2, says);
    }
    for (options, says) in [
        (["--epochs", "18446744073709551615"], ["epochs", "at most"]),
        (["--steps", "0"], ["steps", "at least 1"]),
        (["--set", "image=[1,9,9]"], ["images", "--set image"]),
        (["--set", "classes=5"], ["5 classes", "--set classes=10"]),
        (["--set", "image=[1,0,8]"], ["image", "sizes of 0"]),
    ] {
        let args = with(&["train", "--out", "w", "--limit", "100"], &options);
        fails(folder.path(), &args, 2, &says);
    }
    let large = with(&["train", "--out", "w", "--batch", "10000000", "--epochs", "1"], SMALL_NET);
    fails(folder.path(), &large, 2, &["batch", "at most 32767", "got batch 10000000, epochs 1"]);
    let large = with(&["bench", "--batch", "10000000"], &["--set", "widths=[64,128,256]"]);
    fails(folder.path(), &large, 1, &["out of memory", "--batch"]);
    fails(folder.path(), &with(&["train", "--out", "w", "--lr", "-0.1"], SMALL), 2, &["lr", "at least 0, got -0.1"]);
}

#[test]
fn a_loss_that_is_no_number_stops_the_run() {
    let folder = tempfile::tempdir().unwrap();
    trained(folder.path());
    let diverges = with(&["train", "--out", "diverged", "--lr", "1e30"], SMALL);
    fails(folder.path(), &diverges, 1, &["diverged", "step 1", "layer", "--lr"]);
    let at_the_end: Vec<_> = diverges.iter().copied().filter(|arg| !["--epochs", "1"].contains(arg)).collect();
    fails(folder.path(), &with(&at_the_end, &["--steps", "1"]), 1, &["finite"]);
    assert!(!folder.path().join("diverged/weights.safetensors").exists());
    fails(folder.path(), &with(&["find", "--lr", "1e30"], SMALL), 1, &["diverged"]);
}

#[test]
fn places_that_cannot_be_written() {
    let folder = tempfile::tempdir().unwrap();
    trained(folder.path());
    let before = files(folder.path());
    let below = format!("{FILE}/below");
    fails(
        folder.path(),
        &with(&["find", "--runs", &below], SMALL),
        1,
        &[&below, "cannot be written", "choose another"],
    );
    fails(folder.path(), &with(&["train", "--out", &below], SMALL), 1, &[&below, "cannot be written"]);
    let prune = |out| ["prune", "--weights", FILE, "--sparsity", "0.5", "--out", out];
    fails(folder.path(), &prune(&below), 1, &[&below]);
    fails(folder.path(), &prune("none/t.safetensors"), 1, &["none", "create that folder first"]);
    fails(folder.path(), &prune("w"), 1, &["w", "folder or device"]);
    let pipe = folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    fails(folder.path(), &prune("pipe"), 1, &["pipe", "folder or device"]);
    std::fs::remove_file(pipe).unwrap();
    fails(folder.path(), &with(&["eval", "--weights", FILE, "--logits", "none/l"], SMALL_NET), 1, &["none/l"]);
    assert_eq!(files(folder.path()), before, "nothing was changed, nothing is left over");
}

#[test]
fn a_full_disk_and_a_closed_terminal() {
    let folder = tempfile::tempdir().unwrap();
    trained(folder.path());
    let before = files(folder.path());
    // A limit on the size of files, as a disk that fills up while a file is written.
    let program = program().to_string_lossy().into_owned();
    let shell = |script: &str| {
        let mut command = assert_cmd::Command::new("sh");
        command.current_dir(folder.path()).env("RUST_BACKTRACE", "1").args(["-c", script]);
        command
    };
    let eval = format!("{program} eval --set widths=[4,8,16] --weights {FILE}");
    let prune = format!("{program} prune --weights {FILE} --sparsity 0.5 --out {FILE}");
    failed(shell(&format!("trap '' XFSZ; ulimit -f 8; {prune}")), "prune, disk full", 1, &[FILE, "cannot write"]);
    assert_eq!(files(folder.path()), before, "the file that was to be replaced is as it was");
    if Path::new("/dev/full").exists() {
        failed(shell(&format!("{eval} > /dev/full")), "eval > /dev/full", 1, &["standard output", "cannot be written"]);
        let find = format!("{program} find --set widths=[4,8,16] --limit 200 --epochs 1 --levels 1 --seeds 1");
        shell(&format!("{find} 2> /dev/full")).assert().success();
    }
    shell(&format!("{eval} | true")).assert().success();
    // `find` on a full disk goes on once there is room again.
    let run = |limit: &str| {
        format!("trap '' XFSZ; ulimit -f {limit}; {program} find {} --levels 1 --runs r", SMALL.join(" "))
    };
    failed(shell(&run("8")), "find, disk full", 1, &["r/dilt-resnet8-digits"]);
    shell(&run("unlimited")).assert().success();
    dilt(folder.path(), &["--version"]).assert().success();
}
