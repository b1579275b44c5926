//! `scripts/gpu-check.sh` with stand-ins for what needs a GPU or PyTorch: its sections, its results and its summary, and what
//! it does where something fails or takes too long. dilt is the real one, on the host device.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

use crate::command::program;

/// A step and two operations, small ones.
const JOBS: &str = r#"
{"name": "step resnet8, batch 8", "kind": "step", "model": "resnet8", "batch": 8, "flop": [1, 2]}
{"name": "linear 8 to 16 (2 samples)", "kind": "linear", "op": ["linear_forward"], "shape": {"c": 8, "k": 16, "t": 5, "n": 2}}
{"name": "prune little", "kind": "prune", "op": ["prune"], "shape": {"elements": 1000, "remove": 200}}
"#;

/// PyTorch's side: a second for each. One form of compiled steps fails.
const TORCH: &str = r#"
import sys
def say(job, op, precision, how, ms):
    print('{"job": "%s", "op": "%s", "precision": "%s", "how": "%s", "ms": %s}' % (job, op, precision, how, ms))
step, linear = "step resnet8, batch 8", "linear 8 to 16 (2 samples)"
print('{"torch": "2.99", "cuda": "13.0"}')
if "--compiled" in sys.argv:
    print('{"job": "%s", "op": "training step", "precision": "bf16", "how": "compiled graph", "error": "no capture"}' % step)
    say(step, "training step", "bf16", "compiled", 500.0)
    raise SystemExit(1)
if "--steps" in sys.argv:
    for how, ms in [("eager", 2000.0), ("graph", 1000.0)]:
        say(step, "training step", "f32", how, ms)
if "--layers" in sys.argv:
    for precision, ms in [("f32", 1000.0), ("bf16", 250.0), ("tf32", 500.0)]:
        say(linear, "linear_forward", precision, "contiguous", ms)
"#;

fn program_of(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Whether this machine has what the script is written in.
fn can_run() -> bool {
    let there = |name: &str| Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success());
    let can = ["bash", "python3", "tar", "timeout"].into_iter().all(there);
    if !can {
        eprintln!("skipped: gpu-check.sh needs bash, python3, tar and timeout");
    }
    can
}

/// A folder with what `gpu-pack.sh` packs, with stand-ins, where this machine can run it.
fn packed() -> Option<TempDir> {
    let folder = can_run().then(|| tempfile::tempdir().unwrap())?;
    pack(folder.path());
    Some(folder)
}

fn pack(folder: &Path) {
    program_of(&folder.join("gpu-check.sh"), include_str!("../../scripts/gpu-check.sh"));
    fs::write(folder.join("summary.py"), include_str!("../../scripts/summary.py")).unwrap();
    fs::create_dir(folder.join("peers")).unwrap();
    fs::write(folder.join("peers/dilt_jobs.py"), include_str!("../../benches/peers/dilt_jobs.py")).unwrap();
    fs::write(folder.join("peers/jobs.jsonl"), JOBS.trim_start()).unwrap();
    fs::write(folder.join("peers/torch_gpu.py"), TORCH).unwrap();
    fs::write(folder.join("commit"), "0123456\n").unwrap();
    // Times mean nothing here: one of each is enough. By wgmma the host device must be told to stage.
    let dilt = format!(
        "#!/usr/bin/env bash\nset -- \"${{@/#cuda/host}}\"\nset -- \"${{@/#20/1}}\"\n\
         [ -z \"${{DILT_WGMMA:-}}\" ] || export DILT_HOST_POLICY=staged\nexec '{}' \"$@\"\n",
        program().display()
    );
    program_of(&folder.join("bin/dilt"), &dilt);
    program_of(&folder.join("bin/tests"), "#!/bin/sh\necho 'test result: ok. 3 passed; 0 failed; 0 ignored'\n");
    program_of(&folder.join("bin/bench-step"), "#!/bin/sh\necho '{\"what\": \"step\"}'\n");
    // That of bf16 fails after it has written its file.
    program_of(
        &folder.join("bin/bench-crossover"),
        "#!/usr/bin/env bash\nname=crossover\n[[ \"$*\" != *bf16* ]] || name=crossover-bf16${DILT_WGMMA:+-wgmma}\n\
         echo layer >\"${*: -1}/$name.csv\"\n[ $name != crossover-bf16 ]\n",
    );
    let smi = "#!/bin/sh\ncase \"$1\" in --query-gpu=name) echo 'Stand-in GPU' ;; *compute_cap) echo 9.0 ;; --query-gpu=*) echo 1.0 ;; esac\n";
    program_of(&folder.join("path/nvidia-smi"), smi);
}

fn gpu_check(folder: &Path, arguments: &[&str]) -> Output {
    let path = format!("{}:{}", folder.join("path").display(), std::env::var("PATH").unwrap());
    let mut command = Command::new(folder.join("gpu-check.sh"));
    command.arg(folder.join("out")).args(arguments).env("PATH", path).env_remove("DILT_REQUIRE_CUDA");
    command.output().unwrap()
}

/// What the archive holds.
fn unpacked(folder: &Path) -> PathBuf {
    let to = folder.join("unpacked");
    fs::create_dir_all(&to).unwrap();
    let archive = folder.join("out/logs.tar.gz");
    assert!(Command::new("tar").arg("xzf").arg(archive).arg("-C").arg(&to).status().unwrap().success());
    to
}

fn results(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("out/results.json")).unwrap()).unwrap()
}

/// Whether each section passed, nothing if it was left out.
fn passed(results: &Value) -> Vec<(&str, Option<bool>)> {
    let checks = results["checks"].as_array().unwrap();
    checks.iter().map(|check| (check["name"].as_str().unwrap(), check["passed"].as_bool())).collect()
}

/// The cells of the only row of a table with these first cells.
fn row<'a>(text: &'a str, cells: &[&str]) -> Vec<&'a str> {
    let rows = text.lines().map(|line| line.trim_matches('|').split('|').map(str::trim).collect::<Vec<_>>());
    let mut rows = rows.filter(|row| row.starts_with(cells));
    let found = rows.next().unwrap_or_else(|| panic!("no row {cells:?} in\n{text}"));
    assert!(rows.next().is_none(), "more than one row {cells:?} in\n{text}");
    found
}

#[test]
fn both_sides_stand_beside_each_other_in_the_summary() {
    let Some(folder) = packed() else { return };
    let folder = folder.path();
    let sections = ["tests", "steps", "torch-steps", "ops", "torch-ops", "compiled", "tickets", "ops-f32"];
    let output = gpu_check(folder, &sections);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "compiled fails\n{stdout}\n{stderr}");
    let expected = sections.map(|section| (section, Some(section != "compiled")));
    assert_eq!(passed(&results(folder)), expected, "{stdout}\n{stderr}");

    let text = fs::read_to_string(folder.join("out/summary.md")).unwrap();
    assert!(stdout.ends_with(&text), "{stdout}");
    for part in
        ["GPU: Stand-in GPU", "commit: 0123456", "torch 2.99", "cuda 13.0", "ceilings, f32 on host", "GB/s copied"]
    {
        assert!(text.contains(part), "{part}\n{text}");
    }
    assert_eq!(row(&text, &["tests"])[1..2], ["passed"]);
    assert_eq!(row(&text, &["tests"])[3], "3 passed; 0 failed");
    assert_eq!(row(&text, &["compiled"])[1], "**failed**");
    assert_eq!(row(&text, &["steps"])[4], "1.0; 1.0", "clocks");
    assert!(text.contains("- step resnet8, batch 8, training step, bf16, compiled graph: no capture"), "{text}");

    // Numbers are those that both sides left: the fastest way of the peer, whose time is a whole number of seconds here.
    let archive = unpacked(folder);
    let lines = |name: &str| -> Vec<Value> {
        let text = fs::read_to_string(archive.join(name)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let number = |cell: &str| cell.replace(',', "").parse::<f64>().unwrap_or_else(|_| panic!("{cell}\n{text}"));
    let is = |cell: &str, value: f64, unit: f64| {
        assert!((number(cell) - value).abs() <= 0.51 * unit, "{cell}: {value}\n{text}")
    };
    let steps = lines("steps.jsonl");
    assert_eq!(steps.len(), 3, "f32, bf16, wgmma: {steps:?}");
    let tickets = lines("tickets.jsonl");
    assert_eq!(tickets.len(), 17, "of each precision 4 and 16 at a time and six tickets, bench-step's: {tickets:?}");
    for (precision, how, seconds) in [("f32", "graph", 1.0), ("bf16", "compiled", 0.5)] {
        let cells = row(&text, &["resnet8", "8", precision, "all", "training step"]);
        let own = steps.iter().find(|step| step["precision"] == precision && step["density"] == 1.0).unwrap();
        assert_eq!(row(&text, &["resnet8", "8", precision, "all", "16 steps together"])[8], "-");
        let own = &own["rows"][0];
        is(cells[5], own["images_per_second"].as_f64().unwrap(), 1.0);
        is(cells[6], own["share_of_ceiling"].as_f64().unwrap(), 0.001);
        is(cells[7], own["share_of_roofline"].as_f64().unwrap(), 0.001);
        assert_eq!(cells[8], format!("{precision} {how}"));
        is(cells[9], 8.0 / seconds, 1.0);
        is(cells[10], own["images_per_second"].as_f64().unwrap() * seconds / 8.0, 0.01);
    }
    assert_eq!(row(&text, &["resnet8", "8", "f32", "all", "evaluation"])[8..], ["-", "-", "-"]);
    assert_eq!(row(&text, &["resnet8", "8", "bf16, wgmma", "all", "training step"])[8], "bf16 compiled");
    assert_eq!(lines("ops.jsonl").len(), 2, "bf16, wgmma");
    let ops = lines("ops-f32.jsonl");
    assert_eq!(ops.len(), 2, "the layer, the selection: {ops:?}");
    let own = format!("{:.3}", ops[0]["ms"].as_f64().unwrap());
    let linear = |ms: &str, precision: &str| {
        let rows = text.lines().filter(|line| line.starts_with("| linear 8 to 16 (2 samples) | linear_forward |"));
        let mut rows = rows.filter(|line| line.contains(&format!("| {precision} contiguous | {ms} |")));
        let row = rows.next().unwrap_or_else(|| panic!("{precision}\n{text}"));
        row.trim_matches('|').split('|').map(str::trim).collect::<Vec<_>>()
    };
    assert_eq!(linear("500.000", "tf32")[2..4], ["f32", &own], "PyTorch's TF32 stands beside f32");
    assert_eq!(linear("250.000", "bf16")[2], "bf16");
    let cells = linear("1,000.000", "f32");
    is(cells[3], ops[0]["ms"].as_f64().unwrap(), 0.001);
    is(cells[5], ops[0]["share_of_roofline"].as_f64().unwrap(), 0.001);
    assert_eq!(cells[6..8], ["f32 contiguous", "1,000.000"]);
    is(cells[8], 1000.0 / ops[0]["ms"].as_f64().unwrap(), 0.01);
    assert_eq!(row(&text, &["prune little", "prune", "f32"])[4], "-", "has no products");
}

#[test]
fn a_run_of_some_sections_says_what_is_not_there() {
    let Some(folder) = packed() else { return };
    let summary = |section: &str| {
        let output = gpu_check(folder.path(), &[section]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fs::read_to_string(folder.path().join("out/summary.md")).unwrap()
    };
    let text = summary("tests");
    let missing = "Not there, so left out: steps.jsonl, tickets.jsonl, ops.jsonl, ops-f32.jsonl, torch-steps.jsonl,";
    assert!(text.contains(&format!("{missing} torch-ops.jsonl, compiled.jsonl, gw.json.")), "{text}");
    assert!(!text.contains("## Whole steps"), "{text}");
    summary("torch-ops");
    let text = summary("torch-steps");
    let missing =
        "Not there, so left out: steps.jsonl, tickets.jsonl, ops.jsonl, ops-f32.jsonl, compiled.jsonl, gw.json.";
    assert!(text.contains(missing), "goes on with what the runs before left\n{text}");
    let usage = gpu_check(folder.path(), &["no-such-section"]);
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn what_fails_is_recorded_and_ends_nothing_else() {
    let Some(folder) = packed() else { return };
    let folder = folder.path();
    let whole = folder.join("bin/dilt-whole");
    fs::rename(folder.join("bin/dilt"), &whole).unwrap();
    let refuses = "#!/bin/sh\ncase \"$*\" in *linear_forward*) echo 'error: refused' >&2; exit 1 ;; esac\n";
    program_of(&folder.join("bin/dilt"), &format!("{refuses}exec '{}' \"$@\"\n", whole.display()));
    let output = gpu_check(folder, &["ops-f32", "crossover", "torch-ops"]);
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    let results = results(folder);
    assert_eq!(results["passed"], false);
    let expected = [("ops-f32", Some(false)), ("crossover", Some(false)), ("torch-ops", Some(true))];
    assert_eq!(passed(&results), expected);
    let text = fs::read_to_string(folder.join("out/summary.md")).unwrap();
    let failed = "- linear 8 to 16 (2 samples), linear_forward, f32, `bench --op linear_forward ";
    let failed = text.lines().find(|line| line.starts_with(failed)).unwrap_or_else(|| panic!("{text}"));
    assert!(failed.ends_with(": error: refused"), "{failed}");
    assert_eq!(row(&text, &["prune little", "prune", "f32"])[4], "-", "the job after it");
    let archive = unpacked(folder);
    for name in ["crossover.csv", "crossover-bf16.csv", "crossover-bf16-wgmma.csv"] {
        assert!(archive.join(name).exists(), "{name}");
    }
}

#[test]
fn sections_end_with_the_time_for_all_and_those_after_it_are_left_out() {
    let Some(folder) = packed() else { return };
    let folder = folder.path();
    program_of(&folder.join("bin/tests"), "#!/bin/sh\nexec sleep 60\n");
    let output = gpu_check(folder, &["--seconds", "4", "tests", "torch-ops"]);
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    let results = results(folder);
    assert_eq!(passed(&results), [("tests", Some(false)), ("torch-ops", None)]);
    let why = |check: usize| results["checks"][check]["why"].as_str().unwrap();
    assert!(why(0).starts_with("stopped after "), "{results}");
    assert!(why(1).starts_with("left out: no time left, "), "{results}");
    let text = fs::read_to_string(folder.join("out/summary.md")).unwrap();
    assert_eq!(row(&text, &["torch-ops"])[1], why(1));
    let log = fs::read_to_string(unpacked(folder).join("tests.log")).unwrap();
    assert_eq!(log.trim(), why(0));
    let files = fs::read_dir(folder.join("out")).unwrap().count();
    assert_eq!(files, 3, "results.json, summary.md, logs.tar.gz: a lent machine gives few files back");
}
