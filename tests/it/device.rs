//! The device layer: argument layouts, memory, capture and replay, errors.

use dilt::device::{Device, HostOptions};
use dilt::ops;

use crate::support::devices;

#[test]
fn argument_structs_have_the_same_layout_in_rust_and_cpp() {
    let rust = ops::layouts();
    for case in devices() {
        let cpp = case.device.cpp_layouts().unwrap();
        for layout in &cpp {
            let twin = rust.iter().find(|twin| twin.name == layout.name);
            assert_eq!(twin, Some(layout), "{}: struct {}", case.label, layout.name);
        }
        assert_eq!(cpp.len(), rust.len(), "{}: every Rust struct has a C++ side", case.label);
    }
}

#[test]
fn memory_holds_what_is_written_and_is_zero_before() {
    for case in devices() {
        let device = case.device;
        let data: Vec<f32> = (0..1000).map(|i| i as f32).collect();
        let mut a = device.upload(&data).unwrap();
        let mut b = device.alloc::<f32>(300).unwrap();
        assert_eq!(device.read(b.view()).unwrap(), vec![0.0; 300]);
        device.copy(a.slice(100..400), b.view_mut()).unwrap();
        device.zero(a.slice_mut(0..999)).unwrap();
        assert_eq!(device.read(b.view()).unwrap(), data[100..400]);
        assert_eq!(device.read(a.slice(998..1000)).unwrap(), [0.0, 999.0]);
        let error = device.copy(a.slice(0..1), b.view_mut()).unwrap_err().to_string();
        assert!(error.contains("expected 300") && error.contains("got 1"), "{error}");
    }
}

#[test]
fn a_captured_step_is_not_done_until_it_is_replayed() {
    for case in devices() {
        let device = case.device;
        let a = device.upload(&[1.0f32, 2.0]).unwrap();
        let mut b = device.alloc::<f32>(2).unwrap();
        let graph = device.capture(|| device.copy(a.view(), b.view_mut())).unwrap();
        assert_eq!(device.read(b.view()).unwrap(), [0.0, 0.0], "{}", case.label);
        graph.replay().unwrap();
        assert_eq!(device.read(b.view()).unwrap(), [1.0, 2.0], "{}", case.label);
        // What the step uses stays alive while the step does.
        drop(a);
        device.zero(b.view_mut()).unwrap();
        graph.replay().unwrap();
        assert_eq!(device.read(b.view()).unwrap(), [1.0, 2.0], "{}", case.label);
    }
}

#[test]
fn reading_while_a_step_is_captured_is_refused() {
    let device = Device::host(HostOptions::default()).unwrap();
    let a = device.upload(&[1.0f32]).unwrap();
    let error = device.capture(|| device.read(a.view()).map(|_| ())).err().unwrap().to_string();
    assert!(error.contains("captured"), "{error}");
    assert_eq!(device.read(a.view()).unwrap(), [1.0], "a failed capture leaves the device usable");
}

#[test]
fn events_measure_time() {
    for case in devices() {
        let before = case.device.event().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(2));
        let ms = case.device.event().unwrap().elapsed_ms(&before).unwrap();
        assert!(ms > 0.0 && ms < 10_000.0, "{}: {ms}", case.label);
    }
}

#[test]
fn a_device_that_is_not_there_is_a_clear_error() {
    let error = Device::open("tpu").err().unwrap();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("'tpu'"));
    let error = Device::open("cuda:99").err().unwrap();
    assert_eq!(error.exit_code(), 1);
}
