//! GELU and its gradient against float64 goldens, digit by digit, and where they have no digits.

use dilt::device::Device;
use dilt::ops::gelu::{gelu_backward, gelu_forward};

use crate::support::{Golden, on_devices, read, unwritten};

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
        let (from, by) = (device.upload(&x.f32()).unwrap(), device.upload(&dy).unwrap());
        let (mut to, mut gradient) = (unwritten(device, x.data.len()), unwritten(device, x.data.len()));
        gelu_forward(device, from.view(), to.view_mut()).unwrap();
        gelu_backward(device, from.view(), by.view(), gradient.view_mut()).unwrap();
        let (to, gradient) = (read(device, to.view()), read(device, gradient.view()));
        for (i, &at) in x.data.iter().enumerate() {
            let error = (f64::from(to[i]) - y.data[i]).abs();
            assert!(error <= TOLERANCE * y.data[i].abs() + TINIEST, "{label}: y({at}) = {}: {}", y.data[i], to[i]);
            // The two terms cancel near -0.75, so errors are measured by them.
            let (got, want) = (f64::from(gradient[i]) / f64::from(dy[i]), dx.data[i]);
            let terms = if at == 0.0 { 0.5 } else { want.abs() + (y.data[i] / at).abs() };
            assert!((got - want).abs() <= TOLERANCE * terms + TINIEST, "{label}: dx({at}) = {want}: {got}");
        }
        vec![to, gradient]
    });
}

#[test]
fn zero_stays_zero_infinity_has_its_limits_and_nan_stays_nan() {
    let x = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN, f32::MIN_POSITIVE];
    on_devices(|device, label| {
        let (from, one) = (device.upload(&x).unwrap(), device.upload(&[1.0f32; 8]).unwrap());
        let (mut y, mut dx) = (unwritten(device, 8), unwritten(device, 8));
        gelu_forward(device, from.view(), y.view_mut()).unwrap();
        gelu_backward(device, from.view(), one.view(), dx.view_mut()).unwrap();
        let (y, dx) = (read(device, y.view()), read(device, dx.view()));
        assert!(y[4].is_nan() && dx[4].is_nan(), "{label}: {y:?} {dx:?}");
        let others = |values: &[f32]| [&values[..4], &values[5..]].concat();
        assert_eq!(others(&y), [0.0, 0.0, f32::INFINITY, 0.0, f32::MAX, 0.0, f32::MIN_POSITIVE / 2.0], "{label}");
        assert_eq!(others(&dx), [0.5, 0.5, 1.0, 0.0, 1.0, 0.0, 0.5], "{label}");
        vec![others(&y), others(&dx)]
    });
}

#[test]
fn tensors_of_the_wrong_size_are_refused_by_name() {
    let device = Device::open("host").unwrap();
    let (sixteen, mut eight) = (device.alloc(16).unwrap(), device.alloc(8).unwrap());
    let error = gelu_forward(&device, sixteen.view(), eight.view_mut()).unwrap_err().to_string();
    assert!(error.contains("gelu_forward: number of elements of y: expected 16, got 8"), "{error}");
    let (mut to, nine) = (device.alloc(9).unwrap(), device.alloc(9).unwrap());
    let error = gelu_backward(&device, nine.view(), nine.view(), to.view_mut()).unwrap_err().to_string();
    assert!(error.contains("elements of x: expected a multiple of 8, got 9"), "{error}");
    let mut to = device.alloc(16).unwrap();
    let error = gelu_backward(&device, sixteen.view(), eight.view(), to.view_mut()).unwrap_err().to_string();
    assert!(error.contains("elements of dy: expected 16, got 8"), "{error}");
}
