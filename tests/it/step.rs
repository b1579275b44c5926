//! The step counter on the device.

use dilt::device::Device;
use dilt::ops::step::{StepCurrent, StepTables, step_begin, step_end};

use crate::support::on_devices;

#[test]
fn one_captured_step_replays_with_the_settings_of_each_row() {
    on_devices(|device, label| {
        let (counts, rates) = (device.upload(&[8u32, 8, 3]).unwrap(), device.upload(&[0.5f32, 0.25, 0.125]).unwrap());
        let mut state = device.upload(&[0u32, 40]).unwrap();
        let correction_rows = device.upload(&[10.0f32, 31.0, 5.0, 22.0, 4.0, 18.0]).unwrap();
        let (mut count, mut rate) = (device.upload(&[77u32]).unwrap(), device.upload(&[7.0f32]).unwrap());
        let (mut corrections, mut now) = (device.upload(&[7.0f32; 2]).unwrap(), device.upload(&[77u32]).unwrap());
        let graph = device
            .capture(|| {
                let (count_rows, rate, corrections_now) = (counts.view(), rate.view_mut(), corrections.view_mut());
                let tables = StepTables { count: count_rows, rate: rates.view(), corrections: correction_rows.view() };
                let (count, step) = (count.view_mut(), now.view_mut());
                let current = StepCurrent { count, rate, corrections: corrections_now, step };
                step_begin(device, state.view(), tables, current)?;
                step_end(device, state.view_mut())
            })
            .unwrap();
        let rows = [(8, 0.5, [10.0, 31.0]), (8, 0.25, [5.0, 22.0]), (3, 0.125, [4.0, 18.0])];
        for (step, (samples, learning_rate, want)) in rows.into_iter().enumerate() {
            graph.replay().unwrap();
            let got = (device.read(count.view()).unwrap()[0], device.read(rate.view()).unwrap()[0]);
            assert_eq!(got, (samples, learning_rate), "{label}: step {step}");
            assert_eq!(device.read(corrections.view()).unwrap(), want, "{label}: step {step}");
            assert_eq!(device.read(now.view()).unwrap(), [step as u32 + 40], "{label}");
            assert_eq!(device.read(state.view()).unwrap(), [step as u32 + 1, step as u32 + 41], "{label}");
        }
        // Past the end of the tables, the mistake shows.
        graph.replay().unwrap();
        assert_eq!(device.read(count.view()).unwrap(), [0], "{label}");
        assert!(device.read(rate.view()).unwrap()[0].is_nan(), "{label}");
        assert!(device.read(corrections.view()).unwrap().iter().all(|value| value.is_nan()), "{label}");
        Vec::new()
    });
}

#[test]
fn tables_of_different_lengths_are_refused_by_name() {
    let device = Device::open("host").unwrap();
    let (counts, rates) = (device.alloc::<u32>(3).unwrap(), device.alloc::<f32>(6).unwrap());
    let mut state = device.alloc::<u32>(2).unwrap();
    let refused = |rate: usize, corrections: usize, current: usize, message: &str| {
        let (mut count, mut step) = (device.alloc::<u32>(1).unwrap(), device.alloc::<u32>(1).unwrap());
        let (mut rate_now, mut corrections_now) = (device.alloc(1).unwrap(), device.alloc(current).unwrap());
        let (rate, corrections) = (rates.slice(0..rate), rates.slice(0..corrections));
        let tables = StepTables { count: counts.view(), rate, corrections };
        let (rate, corrections) = (rate_now.view_mut(), corrections_now.view_mut());
        let current = StepCurrent { count: count.view_mut(), rate, corrections, step: step.view_mut() };
        let error = step_begin(&device, state.view(), tables, current).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    };
    refused(2, 6, 2, "elements of rate table: expected 3, got 2");
    refused(3, 3, 2, "elements of correction table: expected 6, got 3");
    refused(3, 6, 1, "elements of current corrections: expected 2, got 1");
    let error = step_end(&device, state.slice_mut(0..1)).unwrap_err().to_string();
    assert!(error.contains("elements of state: expected 2, got 1"), "{error}");
}
