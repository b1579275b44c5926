//! GELU and its gradient against float64 goldens, digit by digit, and where they have no digits.

use dilt::device::Device;
use dilt::ops::gelu::{gelu_backward, gelu_forward};

use crate::support::{Golden, Storage, judge_bf16, on_devices, refuses_precision};

/// y of x and dx of dy.
fn gelu(device: &Device, [x, dy]: [&[f32]; 2], storage: Storage) -> [Vec<f32>; 2] {
    let (from, mut dx) = (storage.upload(device, x), storage.upload(device, dy));
    let mut y = storage.unwritten(device, x.len());
    gelu_forward(device, from.view(), y.view_mut()).unwrap();
    gelu_backward(device, from.view(), dx.view_mut()).unwrap();
    [y, dx].map(|buffer| storage.read(device, &buffer))
}

/// Six roundings of f32, 6e-8 each: those of the bell, of t, of the polynomial and of the products.
const TOLERANCE: f64 = 4e-7;
/// Where the bell is below e^-86.64 it is 0.
const TINIEST: f64 = 1e-36;

#[test]
fn every_digit_agrees_with_pytorch_in_both_tails() {
    let golden = Golden::open("gelu");
    let [x, y, dx] = ["x", "y", "dx"].map(|name| golden.get("wide", name));
    assert!(x.data.len() % 16 == 8, "a vector of half the width is left");
    let dy: Vec<f32> = (0..x.data.len()).map(|i| if i % 3 == 0 { -2.0 } else { 0.5 }).collect();
    on_devices(|device, label| {
        let [to, gradient] = gelu(device, [&x.f32(), &dy], Storage::F32);
        for (i, &at) in x.data.iter().enumerate() {
            let error = (f64::from(to[i]) - y.data[i]).abs();
            assert!(error <= TOLERANCE * y.data[i].abs() + TINIEST, "{label}: y({at}) = {}: {}", y.data[i], to[i]);
            // The two terms cancel near -0.75, so errors are measured by them.
            let (got, want) = (f64::from(gradient[i]) / f64::from(dy[i]), dx.data[i]);
            let terms = if at == 0.0 { 0.5 } else { want.abs() + (y.data[i] / at).abs() };
            assert!((got - want).abs() <= TOLERANCE * terms + TINIEST, "{label}: dx({at}) = {want}: {got}");
        }
        let mut results = judge_bf16(&format!("{label}: bf16"), |storage| {
            let [to, gradient] = gelu(device, [&x.f32(), &dy], storage);
            let want = dx.f32().iter().zip(&dy).map(|(dx, dy)| dx * dy).collect();
            vec![("y", to, y.f32()), ("dx", gradient, want)]
        });
        results.extend([to, gradient]);
        results
    });
}

#[test]
fn zero_stays_zero_infinity_has_its_limits_and_nan_stays_nan() {
    let x = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN, f32::MIN_POSITIVE];
    on_devices(|device, label| {
        let [y, dx] = gelu(device, [&x, &[1.0; 8]], Storage::F32);
        assert!(y[4].is_nan() && dx[4].is_nan(), "{label}: {y:?} {dx:?}");
        let others = |values: &[f32]| [&values[..4], &values[5..]].concat();
        assert_eq!(others(&y), [0.0, 0.0, f32::INFINITY, 0.0, f32::MAX, 0.0, f32::MIN_POSITIVE / 2.0], "{label}");
        assert_eq!(others(&dx), [0.5, 0.5, 1.0, 0.0, 1.0, 0.0, 0.5], "{label}");
        let [low, dlow] = gelu(device, [&x, &[1.0; 8]], Storage::Bf16);
        // The largest f32 is rounded to infinity.
        assert!(low[4].is_nan() && dlow[4].is_nan() && low[5] == f32::INFINITY, "{label}: {low:?} {dlow:?}");
        assert_eq!((&low[..4], &dlow[..4], &dlow[5..]), (&y[..4], &dx[..4], &dx[5..]), "{label}: bf16");
        vec![others(&y), others(&dx)]
    });
}

#[test]
fn tensors_of_the_wrong_size_are_refused_by_name() {
    let device = Device::open("host").unwrap();
    let (sixteen, mut eight) = (device.alloc::<f32>(16).unwrap(), device.alloc::<f32>(8).unwrap());
    let error = gelu_forward(&device, sixteen.view().into(), eight.view_mut().into()).unwrap_err().to_string();
    assert!(error.contains("gelu_forward: number of elements of y: expected 16, got 8"), "{error}");
    let (nine, mut dx) = (device.alloc::<f32>(9).unwrap(), device.alloc::<f32>(9).unwrap());
    let error = gelu_backward(&device, nine.view().into(), dx.view_mut().into()).unwrap_err().to_string();
    assert!(error.contains("elements of x: expected a multiple of 8, got 9"), "{error}");
    let error = gelu_backward(&device, sixteen.view().into(), eight.view_mut().into()).unwrap_err().to_string();
    assert!(error.contains("elements of dy: expected 16, got 8"), "{error}");
    let (low, mut to) = (Storage::Bf16.upload(&device, &[0.0; 16]), Storage::F32.upload(&device, &[0.0; 16]));
    refuses_precision(gelu_forward(&device, low.view(), to.view_mut()), "gelu_forward", "y");
    refuses_precision(gelu_backward(&device, low.view(), to.view_mut()), "gelu_backward", "dy");
}
