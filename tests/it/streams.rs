//! Trainings side by side: the same bytes with any number of them, also after a kill, and one error for all.

use std::path::Path;
use std::time::Instant;

use crate::command::{SMALL, assert_same_files, dilt, fails, files, json, output, run_folder};
use crate::resume::kill_after;

/// Two seeds, two searches on parts, controls, structured tickets and a rewound start: every kind of training.
const FIND: &[&str] =
    &["find", "--levels", "2", "--seeds", "2", "--rewind", "2", "--structure", "refill", "--no-similarity"];

fn find(streams: &str) -> Vec<&str> {
    [FIND, SMALL, &["--streams", streams]].concat()
}

#[test]
fn any_number_of_trainings_at_a_time_gives_the_same_run_folder() {
    let folders = [find("1"), find("2"), find("3"), [find("3"), vec!["--array"]].concat()].map(|find| {
        let folder = tempfile::tempdir().unwrap();
        (output(folder.path(), &[find, vec!["--json"]].concat()), folder)
    });
    for (text, folder) in &folders[1..] {
        assert_eq!(*text, folders[0].0);
        assert_same_files(folder.path(), folders[0].1.path());
    }
    assert!(files(folders[0].1.path()).len() > 100, "nothing was compared");
}

#[test]
fn a_single_thread_of_the_host_device_serves_several_trainings() {
    let (one, three) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let lth = |streams| [&["find", "--method", "lth", "--levels", "1"], SMALL, &["--streams", streams]].concat();
    output(one.path(), &lth("1"));
    dilt(three.path(), &lth("3")).env("RAYON_NUM_THREADS", "1").assert().success();
    assert_same_files(three.path(), one.path());
}

#[test]
fn a_find_killed_with_three_trainings_at_a_time_goes_on_with_one() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let more = |streams| {
        let long = ["--set", "widths=[4,8,16]", "--limit", "160", "--epochs", "3", "--batch", "32", "-q"];
        [FIND, &long, &["--streams", streams]].concat()
    };
    let begin = Instant::now();
    let expected = json(whole.path(), &more("3"));
    let whole_run = begin.elapsed();
    for (percent, streams, array) in [(5, "3", true), (25, "3", false), (35, "2", true), (50, "3", true)] {
        let array = if array { vec!["--array"] } else { Vec::new() };
        kill_after(broken.path(), &[more(streams), array].concat(), whole_run * percent / 100);
    }
    assert_eq!(json(broken.path(), &more("1")), expected);
    assert_same_files(broken.path(), whole.path());
}

#[test]
fn tickets_are_assembled_and_transferred_side_by_side() {
    let folder = tempfile::tempdir().unwrap();
    output(folder.path(), &[&["find", "--levels", "1", "--seeds", "1", "--no-similarity"], SMALL].concat());
    let tickets = run_folder(folder.path()).join("seed_0/tickets");
    let file = |name: &str| tickets.join(name).join("ticket.safetensors").to_str().unwrap().to_owned();
    let (core, first, second) =
        (file("core"), format!("1={}", file("specialist-1")), format!("2={}", file("specialist-2")));
    let assemble = ["assemble", "--core", &core, "--specialist", &first, "--specialist", &second, "--mode"];
    let commands = [
        [&assemble[..], &["retrain"]].concat(),
        [&assemble[..], &["merge"]].concat(),
        vec!["transfer", "--ticket", &core, "--levels", "1"],
    ];
    for command in commands {
        let runs = ["1", "3"].map(|streams| {
            let run = tempfile::tempdir().unwrap();
            let text = output(run.path(), &[&command, SMALL, &["--streams", streams, "--json"]].concat());
            (text, run)
        });
        assert_eq!(runs[0].0, runs[1].0);
        assert_same_files(runs[0].1.path(), runs[1].1.path());
    }
}

#[test]
fn a_wrong_number_of_trainings_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for (streams, got) in [("0", "got 0"), ("33", "got 33"), ("two", "two"), ("-1", "-1")] {
        fails(folder.path(), &find(streams), 2, &["--streams", got]);
    }
    fails(folder.path(), &[find("2"), vec!["--tune"]].concat(), 2, &["--streams", "--tune", "got 2"]);
    fails(folder.path(), &[find("1"), vec!["--array"]].concat(), 2, &["--array: expected --streams of at least 2"]);
    assert!(!folder.path().join("runs").exists());
}

/// What stderr says, without the command's success.
fn error(folder: &Path, args: &[&str]) -> String {
    let output = dilt(folder, args).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_training_that_fails_is_named_once_and_stops_the_others() {
    for how in [vec!["1"], vec!["3"], vec!["3", "--array"]] {
        let folder = tempfile::tempdir().unwrap();
        let diverges = ["--lr", "1e30", "--clip-norm", "1e38"];
        let said = error(folder.path(), &[find(how[0]), how[1..].to_vec(), diverges.to_vec()].concat());
        assert_eq!(said.matches("diverged").count(), 1, "{said}");
        assert!(said.contains("error: seed_") && said.contains("/search/"), "{said}");
        assert!(!said.contains("stopped") && !said.contains("panicked"), "{said}");
    }
}

#[test]
fn memory_that_runs_out_says_for_which_training_and_how_many_share_it() {
    let folder = tempfile::tempdir().unwrap();
    // A terabyte of activations, and few weights.
    let deep = ["--set", "stages=[500,1,1]", "--set", "widths=[64,64,64]"];
    let large = [&["find", "--batch", "32767", "--epochs", "1", "--streams", "2", "-q"][..], &deep].concat();
    fails(folder.path(), &large, 1, &["error: seed_", "out of memory", "--batch", "--streams 2"]);
}

#[test]
fn trainings_beside_one_that_fails_end_and_go_on_later() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let args = |streams| {
        let long = ["--set", "widths=[4,8,16]", "--limit", "160", "--epochs", "40", "--batch", "32", "-q"];
        let lth = ["find", "--method", "lth", "--levels", "1", "--seeds", "2", "--no-similarity"];
        [&lth[..], &long, &["--streams", streams]].concat()
    };
    output(whole.path(), &args("1"));
    // A folder where a file must be fails one training, at its beginning.
    let run = broken.path().join("runs").join(run_folder(whole.path()).file_name().unwrap());
    let blocked = run.join("seed_1/search/lth/level-1/metrics.csv");
    std::fs::create_dir_all(&blocked).unwrap();
    let said = error(broken.path(), &args("2"));
    assert!(said.matches("error:").count() == 1 && said.contains("seed_1/search/lth/level-1/metrics.csv"), "{said}");
    assert!(!run.join("seed_0/tickets/lth/score.json").exists(), "the other seed went on");
    std::fs::remove_dir(&blocked).unwrap();
    output(broken.path(), &args("2"));
    assert_same_files(broken.path(), whole.path());
}
