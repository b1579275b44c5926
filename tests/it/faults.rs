//! Sanitizer builds report what they are for. Each faulty kernel of `tests/faults/faults.cu` is launched in a process of
//! its own, whose report must name the faulty line; mistakes with barriers are errors of the host device itself.

use std::process::Command;

use dilt::device::{Device, HostOptions, Policy, kernel_files};
use dilt::ops::faults;

/// Names the kernel that the process launches.
const VARIABLE: &str = "DILT_FAULT";

/// `file:line` of each "FAULT" comment of this name.
fn lines(name: &str) -> Vec<String> {
    let text = include_str!("../faults/faults.cu").lines().enumerate();
    let lines: Vec<_> = text
        .filter(|(_, line)| line.split("// FAULT ").nth(1) == Some(name))
        .map(|(i, _)| format!("tests/faults/faults.cu:{}", i + 1))
        .collect();
    assert!(!lines.is_empty(), "faults.cu has no line 'FAULT {name}'");
    lines
}

/// The kernel that makes this mistake.
fn kernel(fault: &str) -> &'static str {
    let (_, kernels) = kernel_files().find(|(stem, _)| *stem == "faults").unwrap();
    kernels.iter().find(|kernel| kernel.strip_prefix("fault_") == Some(fault)).expect(fault)
}

fn device(schedule: Option<u64>) -> Device {
    Device::host(HostOptions { policy: Policy::Staged, schedule, ..HostOptions::default() }).unwrap()
}

#[test]
#[ignore = "not a test: the process that the others start, which launches a faulty kernel"]
fn process() {
    let name = std::env::var(VARIABLE).expect("set by the test that starts this process");
    let device = device(None);
    let kernel = kernel(if name == "red_zone" { "global_overflow" } else { &name });
    // Three pieces of one arena: what overflows the one in the middle stays within the allocation.
    let step = faults::COUNT + 64;
    let arena = device.alloc::<u32>(3 * step).unwrap();
    let mut pieces = arena.split(&[0, 1, 2].map(|i| (i * step, faults::COUNT)));
    let mut alone = device.alloc::<u32>(faults::COUNT).unwrap();
    let data = if name == "red_zone" { &mut pieces[1] } else { &mut alone };
    faults::launch(&device, kernel, data.view_mut()).unwrap();
    println!("the launch returned");
}

/// Launches a faulty kernel in a process of its own; what that printed, and whether it succeeded.
fn run(name: &str) -> (String, bool) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "faults::process", "--ignored", "--nocapture", "--test-threads=1"])
        .env(VARIABLE, name)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    (text, output.status.success())
}

fn assert_reported(name: &str, line_of: &str, message: &str) {
    let (text, success) = run(name);
    assert!(!success, "{name}: nothing was reported:\n{text}");
    assert!(text.contains(message), "{name}: expected '{message}' in\n{text}");
    for line in lines(line_of) {
        assert!(text.contains(&line), "{name}: expected {line} in\n{text}");
    }
}

#[test]
fn a_correct_kernel_is_not_reported() {
    let (text, success) = run("none");
    assert!(success && text.contains("the launch returned"), "{text}");
}

#[cfg(dilt_sanitize = "address")]
#[test]
fn reads_and_writes_out_of_bounds_are_reported() {
    assert_reported("shared_overflow", "shared_overflow", "heap-buffer-overflow");
    assert_reported("shared_index", "shared_index", "index 64 out of bounds");
    assert_reported("global_overflow", "global_overflow", "heap-buffer-overflow");
    assert_reported("red_zone", "global_overflow", "use-after-poison");
}

#[cfg(dilt_sanitize = "address")]
#[test]
fn undefined_arithmetic_is_reported() {
    assert_reported("signed_overflow", "signed_overflow", "signed integer overflow");
    assert_reported("shift", "shift", "shift exponent 32 is too large");
}

#[cfg(dilt_sanitize = "address")]
#[test]
fn a_vector_that_a_gpu_could_not_load_is_reported() {
    assert_reported("misaligned", "misaligned", "which requires 16 byte alignment");
}

#[cfg(dilt_sanitize = "thread")]
#[test]
fn races_within_a_block_are_reported() {
    for name in ["race_in_shared", "missing_barrier", "shuffle_as_barrier", "written_after_arrival"] {
        assert_reported(name, name, "WARNING: ThreadSanitizer: data race");
    }
}

#[cfg(dilt_sanitize = "thread")]
#[test]
fn races_between_blocks_are_reported() {
    assert_reported("race_between_blocks", "race_between_blocks", "WARNING: ThreadSanitizer: data race");
}

#[test]
fn threads_that_wait_wrongly_are_an_error_that_names_the_places() {
    for (name, message) in [
        ("different_barriers", "threads of a block wait at different barriers"),
        ("different_barriers_in_a_warp", "lanes of a warp wait at different places"),
        ("early_return", "others have returned"),
        ("lane_has_returned", "waits for has returned"),
        ("phase_in_vain", "threads wait for a phase that nothing completes"),
        ("barrier_in_barrier_free", "declared free of barriers, but waits at"),
    ] {
        for schedule in [None, Some(1), Some(2)] {
            let device = device(schedule);
            let mut data = device.alloc::<u32>(faults::COUNT).unwrap();
            let error = faults::launch(&device, kernel(name), data.view_mut()).unwrap_err().to_string();
            assert!(error.contains(message), "{name}: expected '{message}', got '{error}'");
            for line in lines(name) {
                assert!(error.contains(&line), "{name}: expected {line}, got '{error}'");
            }
            // The block's abandoned stacks are as good as new.
            faults::launch(&device, kernel("none"), data.view_mut()).unwrap();
        }
    }
}
