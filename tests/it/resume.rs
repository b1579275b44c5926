//! Runs that are killed and go on, run twice at a time, find damaged files, or move to another machine.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::command::{assert_same_files, dilt, failed, fails, files, json, output, program, run_folder};

const FIND: &[&str] = &["find", "--set", "widths=[4,8,16]", "--limit", "160", "--epochs", "3", "--levels", "2"];
const MORE: &[&str] = &["--seeds", "1", "--batch", "32", "--rewind", "3", "-q"];

fn find() -> Vec<&'static str> {
    [FIND, MORE].concat()
}

fn train(epochs: &str) -> Vec<&str> {
    vec!["train", "--out", "out", "--limit", "600", "--batch", "32", "-q", "--epochs", epochs]
}

/// Starts the program, which writes a checkpoint after each chunk of steps.
fn start(folder: &Path, args: &[&str]) -> Child {
    let mut command = Command::new(program());
    command.args(args).current_dir(folder).env("DILT_CHECKPOINT_SECONDS", "0");
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Starts a command that writes a checkpoint after each chunk of steps, and kills it after a while.
pub fn kill_after(folder: &Path, args: &[&str], moment: Duration) {
    let mut child = start(folder, args);
    std::thread::sleep(moment);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Waits until the program has written a file.
fn wait_for(path: &Path) {
    for _ in 0..2000 {
        if path.exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("{} never came", path.display());
}

#[test]
fn a_find_killed_at_any_moment_ends_with_the_same_bits() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let begin = Instant::now();
    let expected = json(whole.path(), &find());
    // Moments of the whole run, whose length depends on the device.
    let whole_run = begin.elapsed();
    for percent in [1, 5, 10, 20, 50, 25, 35, 60, 15, 70] {
        kill_after(broken.path(), &find(), whole_run * percent / 100);
    }
    std::fs::write(run_folder(broken.path()).join(".dilt-stale.tmp"), "half").unwrap();
    assert_eq!(json(broken.path(), &find()), expected);
    assert_same_files(&broken.path().join("runs"), &whole.path().join("runs"));
}

#[test]
fn a_training_killed_in_its_middle_goes_on_from_its_checkpoint() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    output(whole.path(), &train("40"));
    let mut child = start(broken.path(), &train("40"));
    wait_for(&broken.path().join("out/checkpoint.safetensors"));
    child.kill().unwrap();
    child.wait().unwrap();
    let rows = || std::fs::read_to_string(broken.path().join("out/metrics.csv")).unwrap().lines().count();
    assert!(rows() > 19 && rows() < 40 * 19, "killed in the middle: {} rows", rows());

    // What was written after the checkpoint goes, also half a row; another command does not go on from it.
    let mut metrics = std::fs::read_to_string(broken.path().join("out/metrics.csv")).unwrap();
    metrics += "99999,0,1,1,1\n77,";
    std::fs::write(broken.path().join("out/metrics.csv"), metrics).unwrap();
    let other = [train("40"), vec!["--lr", "0.05"]].concat();
    fails(broken.path(), &other, 1, &["checkpoint.safetensors", "other settings", "remove it"]);
    kill_after(broken.path(), &train("40"), Duration::from_millis(30));
    output(broken.path(), &train("40"));
    assert_same_files(&broken.path().join("out"), &whole.path().join("out"));
}

#[test]
fn a_finished_training_is_told_again_and_no_other_takes_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let first = json(folder.path(), &train("2"));
    let before = files(&folder.path().join("out"));
    let mut again = json(folder.path(), &train("2"));
    assert!(again["images_per_second"].is_null());
    again["images_per_second"] = first["images_per_second"].clone();
    assert_eq!(again, first);
    for other in [train("3"), [train("2"), vec!["--lr", "0.05"]].concat()] {
        fails(folder.path(), &other, 1, &["out/weights.safetensors", "other settings", "another folder"]);
    }
    assert_eq!(files(&folder.path().join("out")), before);
}

#[test]
fn a_second_process_on_one_folder_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let long = train("100000");
    let mut child = start(folder.path(), &long);
    wait_for(&folder.path().join("out/metrics.csv"));
    fails(folder.path(), &long, 1, &["out", "another process works on this run"]);
    child.kill().unwrap();
    child.wait().unwrap();

    let mut long = find();
    long[6] = "20000";
    let mut child = start(folder.path(), &long);
    wait_for(&folder.path().join("runs"));
    wait_for(&run_folder(folder.path()).join("machine.json"));
    fails(folder.path(), &long, 1, &["runs/dilt-resnet8-digits-", "another process works on this run"]);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn damaged_files_of_a_run_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let expected = json(folder.path(), &find());
    let run = run_folder(folder.path());
    let (result, score) = (run.join("result.json"), run.join("seed_0/tickets/core/score.json"));

    let whole = std::fs::read(&result).unwrap();
    std::fs::write(&result, &whole[..whole.len() / 2]).unwrap();
    fails(folder.path(), &find(), 1, &["result.json", "damaged", "remove it"]);
    std::fs::remove_file(&result).unwrap();
    assert_eq!(json(folder.path(), &find()), expected, "put together again from what is there");

    std::fs::remove_file(&result).unwrap();
    std::fs::write(&score, "{}").unwrap();
    fails(folder.path(), &find(), 1, &["core/score.json", "damaged", "remove it"]);
    std::fs::remove_file(&score).unwrap();
    let stage = run.join("seed_0/tickets/core");
    std::fs::remove_file(stage.join("weights.safetensors")).unwrap();
    std::fs::write(stage.join("checkpoint.safetensors"), "nothing of the kind").unwrap();
    fails(folder.path(), &find(), 1, &["checkpoint.safetensors", "not safetensors"]);
    std::fs::copy(run.join("seed_0/tickets/union/weights.safetensors"), stage.join("checkpoint.safetensors")).unwrap();
    fails(folder.path(), &find(), 1, &["checkpoint.safetensors", "not a checkpoint"]);
    std::fs::remove_file(stage.join("checkpoint.safetensors")).unwrap();
    assert_eq!(json(folder.path(), &find()), expected);
}

#[test]
fn another_machine_is_refused_unless_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let expected = json(folder.path(), &find());
    let run = run_folder(folder.path());
    let machine = std::fs::read_to_string(run.join("machine.json")).unwrap();
    std::fs::write(run.join("machine.json"), machine.replace("\"device\": \"", "\"device\": \"another ")).unwrap();
    assert_eq!(json(folder.path(), &find()), expected, "a finished run is shown on any machine");
    std::fs::remove_file(run.join("result.json")).unwrap();
    let before = files(&run);
    fails(folder.path(), &find(), 1, &["begun with", "another ", "--allow-device-change"]);
    assert_eq!(files(&run), before, "nothing was touched");
    let allowed = [find(), vec!["--allow-device-change"]].concat();
    assert_eq!(json(folder.path(), &allowed), expected);
    assert_eq!(std::fs::read_to_string(run.join("machine.json")).unwrap(), machine);
}

#[test]
fn another_instruction_set_is_another_machine() {
    let folder = tempfile::tempdir().unwrap();
    let training = |set: &str| {
        let mut command = dilt(folder.path(), &find());
        command.args(["--device", "host"]).env("DILT_HOST_ISA", set);
        command
    };
    training("base").assert().success();
    std::fs::remove_file(run_folder(folder.path()).join("result.json")).unwrap();
    if training("v3").args(["--runs", "other"]).output().unwrap().status.success() {
        failed(training("v3"), "find with v3", 1, &["host base", "host v3", "--allow-device-change"]);
    } else {
        eprintln!("skipped: this machine has no AVX2");
    }
}

#[test]
fn a_seed_gives_the_same_bytes_with_any_number_of_threads() {
    let folders = [1, 2].map(|threads| {
        let folder = tempfile::tempdir().unwrap();
        let threads = threads.to_string();
        dilt(folder.path(), &find()).env("RAYON_NUM_THREADS", &threads).assert().success();
        let train = train("3");
        dilt(folder.path(), &train)
            .args(["--augment", "standard"])
            .env("RAYON_NUM_THREADS", &threads)
            .assert()
            .success();
        folder
    });
    assert_same_files(folders[0].path(), folders[1].path());
    let seed = json(folders[0].path(), &[find(), vec!["--seed", "1"]].concat());
    assert_ne!(seed["tickets"], json(folders[0].path(), &find())["tickets"], "another seed, another result");
}
