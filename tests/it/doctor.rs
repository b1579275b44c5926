//! `dilt doctor` and the self-test behind it.

use std::process::Output;

use dilt::device::{embedded_images, kernel_files};
use dilt::selftest;
use serde_json::Value;

use crate::command::program;
use crate::support::devices;

fn doctor(arguments: &[&str]) -> Output {
    std::process::Command::new(program()).arg("doctor").args(arguments).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A kernel that no check launches has a problem too, so this proves that every kernel is tested. A self-test has both policies,
/// one beside the other, whichever its device has; that no order of threads changes bits is for other tests.
#[test]
fn every_kernel_passes_its_self_test() {
    for case in devices().iter().filter(|case| !case.label.contains("staged") && !case.label.contains("schedule")) {
        let instruction_set = case.label.contains(' ');
        for seed in 0..if instruction_set { 1 } else { 2 } {
            let outcomes = selftest::run(&case.device, seed).unwrap();
            let tested: Vec<_> = outcomes.iter().map(|outcome| outcome.kernel).collect();
            assert_eq!(tested, selftest::kernels(&case.device).collect::<Vec<_>>());
            let all = kernel_files().map(|(_, kernels)| kernels.len()).sum::<usize>();
            assert!(tested.len() == all || case.label == "cuda", "the host launches all {all}");
            for outcome in outcomes {
                assert_eq!(outcome.problem, None, "{}, seed {seed}: {}", case.label, outcome.kernel);
                let most = match outcome.kernel.ends_with("_bf16") {
                    true => selftest::BF16_TOLERANCE,
                    false => selftest::TOLERANCE,
                };
                assert!(outcome.error <= most && outcome.ms.is_some(), "{outcome:?}");
            }
        }
    }
}

#[test]
fn doctor_reports_the_machine_and_every_kernel() {
    let output = doctor(&["--json", "--device", "host"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = report["rows"].as_array().unwrap();
    let value = |check: &str| {
        let row = rows.iter().find(|row| row["check"] == check).unwrap_or_else(|| panic!("no row {check}"));
        assert_eq!(row["ok"], true, "{row}");
        row["value"].as_str().unwrap()
    };
    assert!(value("device under test").starts_with("host "));
    assert!(value("host instruction set").contains("base"));
    assert!(value("host threads").parse::<usize>().unwrap() > 0);
    assert!(!value("driver").is_empty());
    for precision in ["f32", "bf16"] {
        let ceilings = value(&format!("measured ceilings, {precision}"));
        assert!(
            ceilings.contains("GFLOP/s of multiply-adds in registers, ") && ceilings.contains("GB/s copied"),
            "{ceilings}"
        );
    }
    for (stem, image) in embedded_images() {
        assert!(value(&format!("kernels/{stem}.cu")).contains(&image.len().to_string()));
    }
    for kernel in kernel_files().flat_map(|(_, kernels)| kernels) {
        assert!(value(kernel).starts_with("ok, error "), "{kernel}");
    }
}

#[test]
fn dump_writes_the_embedded_images_or_says_that_there_are_none() {
    let folder = tempfile::tempdir().unwrap();
    let output = doctor(&["--device", "host", "--dump", folder.path().to_str().unwrap()]);
    if embedded_images().next().is_none() {
        assert_eq!(output.status.code(), Some(2));
        assert!(stderr(&output).contains("built without nvcc"), "{}", stderr(&output));
        return;
    }
    for (stem, image) in embedded_images() {
        assert_eq!(std::fs::read(folder.path().join(format!("{stem}.fatbin"))).unwrap(), image);
    }
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let output = doctor(&["--device", "host", "--dump", file.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("file: cannot be made"), "{}", stderr(&output));
}

#[test]
fn an_unknown_device_is_a_usage_error() {
    let output = doctor(&["--device", "tpu"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("expected auto, cuda, cuda:INDEX or host, got 'tpu'"), "{}", stderr(&output));
}
