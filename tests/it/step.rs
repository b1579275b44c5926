//! The step counter on the device.

use dilt::device::Device;
use dilt::ops::step::{StepCurrent, StepTables, step_begin, step_end};

use crate::support::on_devices;

#[test]
fn one_captured_step_replays_with_the_settings_of_each_row() {
    on_devices(|device, label| {
        let (counts, rates) = (device.upload(&[8u32, 8, 3]).unwrap(), device.upload(&[0.5f32, 0.25, 0.125]).unwrap());
        let mut state = device.upload(&[0u32, 40]).unwrap();
        let (mut count, mut rate) = (device.upload(&[77u32]).unwrap(), device.upload(&[7.0f32]).unwrap());
        let graph = device
            .capture(|| {
                let tables = StepTables { count: counts.view(), rate: rates.view() };
                let current = StepCurrent { count: count.view_mut(), rate: rate.view_mut() };
                step_begin(device, state.view(), tables, current)?;
                step_end(device, state.view_mut())
            })
            .unwrap();
        for (step, want) in [(8, 0.5), (8, 0.25), (3, 0.125)].into_iter().enumerate() {
            graph.replay().unwrap();
            let got = (device.read(count.view()).unwrap()[0], device.read(rate.view()).unwrap()[0]);
            assert_eq!(got, want, "{label}: step {step}");
            assert_eq!(device.read(state.view()).unwrap(), [step as u32 + 1, step as u32 + 41], "{label}");
        }
        // Past the end of the tables, the mistake shows.
        graph.replay().unwrap();
        assert_eq!(device.read(count.view()).unwrap(), [0], "{label}");
        assert!(device.read(rate.view()).unwrap()[0].is_nan(), "{label}");
        Vec::new()
    });
}

#[test]
fn tables_of_different_lengths_are_refused_by_name() {
    let device = Device::open("host").unwrap();
    let (counts, rates) = (device.alloc::<u32>(3).unwrap(), device.alloc::<f32>(2).unwrap());
    let mut state = device.alloc::<u32>(2).unwrap();
    let (mut count, mut rate) = (device.alloc::<u32>(1).unwrap(), device.alloc::<f32>(1).unwrap());
    let tables = StepTables { count: counts.view(), rate: rates.view() };
    let current = StepCurrent { count: count.view_mut(), rate: rate.view_mut() };
    let error = step_begin(&device, state.view(), tables, current).unwrap_err().to_string();
    assert!(error.contains("elements of rate table: expected 3, got 2"), "{error}");
    let error = step_end(&device, state.slice_mut(0..1)).unwrap_err().to_string();
    assert!(error.contains("elements of state: expected 2, got 1"), "{error}");
}
