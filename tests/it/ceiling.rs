//! What ceilings are measured with: that the work is done which is counted, and what is made of the times.

use dilt::device::{Device, Precision, Slice, SliceMut};
use dilt::nn::roofline::Ceilings;
use dilt::nn::traffic::{LayerWork, Work};
use dilt::ops::ceiling::{
    BOXES, CHAINS, STEPS, TILE, WARPS, ceiling_copy, multiply_add, multiply_boxes, multiply_tiles,
};
use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::support::{by_wgmma, on_devices, read, unwritten};

fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

#[test]
fn every_element_is_copied() {
    // Not a multiple of the blocks, nor of the threads.
    let x = numbers(1, 20_016);
    on_devices(|device, label| {
        let (from, mut to) = (device.upload(&x).unwrap(), unwritten(device, x.len()));
        ceiling_copy(device, from.view(), to.view_mut()).unwrap();
        let to = read(device, to.view());
        assert_eq!(to, x, "{label}");
        vec![to]
    });
}

#[test]
fn every_chain_takes_every_step() {
    let x = numbers(2, 2096);
    let [factor, addend] = [-0.99f32, 0.5];
    on_devices(|device, label| {
        [0, 1, 3]
            .map(|rounds| {
                let (from, mut y) = (device.upload(&x).unwrap(), unwritten(device, x.len()));
                multiply_add(device, rounds, [factor, addend], from.view(), y.view_mut()).unwrap();
                let y = read(device, y.view());
                for (x, &y) in x.iter().zip(&y) {
                    let chain = |number: usize| {
                        let step = |v: f64, _| v * f64::from(factor) + f64::from(addend);
                        (0..rounds as usize * STEPS).fold(f64::from(*x) + number as f64, step)
                    };
                    let want: f64 = (0..CHAINS).map(chain).sum();
                    // Each step rounds once or twice, and the errors shrink with their values.
                    assert!((f64::from(y) - want).abs() < 1e-4, "{label}, {rounds} rounds of {x}: {want}, got {y}");
                }
                y
            })
            .into()
    });
}

/// `multiply`, of two blocks with sums of `each` products.
fn products_are_right(
    device: &Device,
    label: &str,
    [rows, columns, depth]: [usize; 3],
    each: usize,
    multiply: impl Fn(&Device, i32, Slice<bf16>, Slice<bf16>, SliceMut<f32>) -> dilt::Result<()>,
) -> Vec<Vec<f32>> {
    let tile = |seed, len| -> Vec<bf16> { numbers(seed, len).into_iter().map(bf16::from_f32).collect() };
    let (left, right) = (tile(3, rows * depth), tile(4, columns * depth));
    let rounds = 3;
    let (l, r) = (device.upload(&left).unwrap(), device.upload(&right).unwrap());
    let mut sum = unwritten(device, 2 * each * rows * columns);
    multiply(device, rounds, l.view(), r.view(), sum.view_mut()).unwrap();
    let sum = read(device, sum.view());
    for (place, got) in sum.iter().enumerate() {
        let (row, column) = (place / columns % rows, place % columns);
        let product = |step: usize| left[row * depth + step].to_f64() * right[column * depth + step].to_f64();
        let want = f64::from(rounds) * (0..depth).map(product).sum::<f64>();
        assert!((f64::from(*got) - want).abs() < 1e-4, "{label}: sum[{place}]: {want}, got {got}");
    }
    vec![sum]
}

#[test]
fn every_warp_multiplies_its_tiles_in_every_round() {
    on_devices(|device, label| products_are_right(device, label, TILE, WARPS, multiply_tiles));
}

#[test]
fn every_block_multiplies_its_boxes_in_every_round() {
    on_devices(|device, label| {
        let Some(device) = by_wgmma(device) else { return Vec::new() };
        products_are_right(&device, label, BOXES, 1, multiply_boxes)
    });
}

#[test]
fn sizes_that_no_kernel_takes_are_refused() {
    let device = Device::open("host").unwrap();
    let (x, mut y, mut short) = (unwritten(&device, 48), unwritten(&device, 48), unwritten(&device, 32));
    let says = |result: dilt::Result<()>, words: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    says(ceiling_copy(&device, x.view(), short.view_mut()), "elements of to");
    says(multiply_add(&device, 1, [1.0, 0.0], x.slice(0..40), y.slice_mut(0..40)), "a multiple of 16");
    let tiles = |len| device.alloc::<bf16>(len).unwrap();
    let [rows, columns, depth] = TILE;
    let (left, right) = (tiles(rows * depth), tiles(columns * depth));
    says(multiply_tiles(&device, 1, right.view(), right.view(), y.view_mut()), "elements of left");
    says(multiply_tiles(&device, 1, left.view(), left.view(), y.view_mut()), "elements of right");
    says(multiply_tiles(&device, 1, left.view(), right.view(), y.view_mut()), "elements of sum");
    says(multiply_boxes(&device, 1, left.view(), right.view(), y.view_mut()), "elements of left");
}

#[test]
fn the_roofline_takes_the_longer_of_operations_and_bytes_in_each_pass() {
    let ceilings = Ceilings { flop_per_second: 100.0, bytes_per_second: 10.0, products: "" };
    let work = |flop, read, written| Work { flop, read, written };
    // 2 s of operations, 3 s of bytes; 5 s of operations, 1 s of bytes; 4 s of bytes.
    let first =
        LayerWork { name: "a".into(), forward: work(200, 20, 10), backward: work(500, 0, 10), update: work(0, 40, 0) };
    let second = LayerWork { forward: Work::default(), update: Work::default(), ..first.clone() };
    assert_eq!(ceilings.roofline([&first, &second]), 3.0 + 5.0 + 4.0 + 5.0);
    assert_eq!(ceilings.share(first.total().flop, 14.0), 0.5);
}

#[test]
fn what_is_measured_is_not_beyond_what_there_can_be() {
    let device = Device::open("host").unwrap();
    let Ceilings { flop_per_second, bytes_per_second, products } = Ceilings::measure(&device, Precision::F32).unwrap();
    assert_eq!(products, "multiply-adds in registers");
    // From a thousandth of a core of 2010 to a thousand of cores of 64 operations a cycle.
    assert!((1e6..1e15).contains(&flop_per_second), "{flop_per_second}");
    assert!((1e6..1e14).contains(&bytes_per_second), "{bytes_per_second}");
}
