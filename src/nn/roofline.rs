//! What a device does at best, measured on it, and how fast work can be by that: the roofline (Williams et al. 2009).
//!
//! Two ceilings: operations a second of multiply-adds in registers (f32, and bf16 on the host, which multiplies in f32) or
//! of products by mma.sync or, on a device that is told to use it, wgmma (bf16 on a GPU); and bytes a second, read and written,
//! of copies between buffers that are larger than caches. A piece of work takes at least the longer of its operations at the
//! first and its bytes at the second. Neither is a limit of physics: bytes that a cache keeps move faster, and a GPU that is
//! held back by its power does less in a long run than in these short ones. So a share may be above 1, where tensors fit in
//! caches.

use std::fmt;

use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::traffic::{LayerWork, Work};
use crate::device::{Device, Policy, Precision, Slice, SliceMut};
use crate::error::Result;
use crate::ops::ceiling::{
    BOXES, CHAINS, STEPS, TILE, WARPS, ceiling_copy, multiply_add, multiply_boxes, multiply_tiles,
};

/// Elements that are copied at once, 128 MiB: with what they are copied to more than the caches of today's GPUs, 126 MB.
const COPIED: usize = 32 << 20;
/// Blocks of products on a GPU: whole waves of the 132 multiprocessors of an H100 or H200, two on each or, by
/// wgmma, one.
const BLOCKS: usize = 2112;
/// A launch does so much that it takes as long as this at least.
const LAUNCH_MS: f64 = 4.0;
/// Launches are repeated as long as this, for a clock that has to rise first; the fastest counts.
const REPEATED_MS: f64 = 50.0;
const LEAST_REPEATS: usize = 5;

/// What a device does at best.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ceilings {
    /// Floating point operations a second, two a multiply-add, of the precision that was asked for.
    pub flop_per_second: f64,
    /// Bytes read and written a second.
    pub bytes_per_second: f64,
    /// What the operations are: `multiply-adds in registers`, `mma.sync` or `wgmma`.
    pub products: &'static str,
}

impl Ceilings {
    /// Measures a device that does nothing else, which takes about a fifth of a second, and for that time 264 MiB at
    /// most.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when memory runs out or the device fails.
    pub fn measure(device: &Device, precision: Precision) -> Result<Self> {
        // As products choose their kernels.
        let (products, flop_per_second) = match (precision, device.policy()) {
            (Precision::Bf16, Policy::Staged) if device.wgmma() => {
                ("wgmma", measure_products(device, BOXES, 1, multiply_boxes)?)
            }
            (Precision::Bf16, Policy::Staged) => ("mma.sync", measure_products(device, TILE, WARPS, multiply_tiles)?),
            _ => ("multiply-adds in registers", measure_multiply_adds(device)?),
        };
        Ok(Ceilings { flop_per_second, bytes_per_second: measure_copies(device)?, products })
    }

    /// Seconds that some work takes at least.
    pub fn seconds(&self, work: &Work) -> f64 {
        (work.flop as f64 / self.flop_per_second).max(work.bytes() as f64 / self.bytes_per_second)
    }

    /// Seconds that layers take at least: the sum over them and their passes, both gradients of a layer being one.
    pub fn roofline<'a>(&self, layers: impl IntoIterator<Item = &'a LayerWork>) -> f64 {
        let passes = layers.into_iter().flat_map(|layer| [layer.forward, layer.backward, layer.update]);
        passes.map(|work| self.seconds(&work)).sum()
    }

    /// The share of the arithmetic ceiling that so many operations in so many seconds are.
    pub fn share(&self, flop: usize, seconds: f64) -> f64 {
        flop as f64 / seconds / self.flop_per_second
    }
}

impl fmt::Display for Ceilings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (gflop, gb) = (self.flop_per_second / 1e9, self.bytes_per_second / 1e9);
        write!(f, "{gflop:.0} GFLOP/s of {}, {gb:.1} GB/s copied (read + written)", self.products)
    }
}

/// Milliseconds of the fastest of several launches, after one that loads what is needed.
fn fastest(device: &Device, mut launch: impl FnMut() -> Result<()>) -> Result<f64> {
    let (mut least, mut all, mut repeats) = (f64::INFINITY, 0.0, 0);
    while repeats < LEAST_REPEATS || all < REPEATED_MS {
        let ms = timed(device, &mut launch)?;
        (least, all, repeats) = (least.min(ms), all + ms, repeats + 1);
    }
    Ok(least)
}

fn timed(device: &Device, mut launch: impl FnMut() -> Result<()>) -> Result<f64> {
    let begin = device.event()?;
    launch()?;
    device.event()?.elapsed_ms(&begin)
}

/// Twice as much until a launch is long enough; then operations a second, of those that `flop` says of so much.
fn fastest_of_long(
    device: &Device,
    most: usize,
    flop: impl Fn(usize) -> f64,
    mut launch: impl FnMut(usize) -> Result<()>,
) -> Result<f64> {
    let mut much = 1;
    launch(much)?;
    while much < most && timed(device, || launch(much))? < LAUNCH_MS {
        much = (2 * much).min(most);
    }
    Ok(1e3 * flop(much) / fastest(device, || launch(much))?)
}

fn measure_multiply_adds(device: &Device) -> Result<f64> {
    // On a GPU four elements for each thread of the most blocks; on the host what fits in any cache.
    let elements = match device.policy() {
        Policy::Staged => 4224 << 10,
        Policy::Direct => 1 << 16,
    };
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let x: Vec<f32> = (0..elements).map(|_| rng.random_range(-1.0..1.0)).collect();
    let (x, mut y) = (device.upload(&x)?, device.alloc::<f32>(elements)?);
    let flop = |rounds: usize| (2 * elements * CHAINS * STEPS) as f64 * rounds as f64;
    // Values keep changing, and their signs.
    fastest_of_long(device, 1 << 20, flop, |rounds| {
        multiply_add(device, rounds as i32, [-0.9999, 0.25], x.view(), y.view_mut())
    })
}

/// Of products of so many rows, columns and steps, `each` a block.
fn measure_products(
    device: &Device,
    [rows, columns, depth]: [usize; 3],
    each: usize,
    multiply: impl Fn(&Device, i32, Slice<bf16>, Slice<bf16>, SliceMut<f32>) -> Result<()>,
) -> Result<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut tile =
        |len: usize| -> Vec<bf16> { (0..len).map(|_| bf16::from_f32(rng.random_range(-1.0..1.0))).collect() };
    let (left, right) = (device.upload(&tile(rows * depth))?, device.upload(&tile(columns * depth))?);
    let own = each * rows * columns;
    let mut sum = device.alloc::<f32>(BLOCKS * own)?;
    // Blocks first, then rounds: the host's meaning of tensor cores takes long for one.
    let split = |much: usize| (much.min(BLOCKS), much.div_ceil(BLOCKS));
    let flop = |much: usize| {
        let (blocks, rounds) = split(much);
        (2 * blocks * own * depth) as f64 * rounds as f64
    };
    fastest_of_long(device, BLOCKS << 20, flop, |much| {
        let (blocks, rounds) = split(much);
        multiply(device, rounds as i32, left.view(), right.view(), sum.slice_mut(0..blocks * own))
    })
}

fn measure_copies(device: &Device) -> Result<f64> {
    let [mut one, mut other] = [device.alloc::<f32>(COPIED)?, device.alloc::<f32>(COPIED)?];
    // Both ways first: a host has no memory of its own for what nothing was written to.
    ceiling_copy(device, one.view(), other.view_mut())?;
    ceiling_copy(device, other.view(), one.view_mut())?;
    let ms = fastest(device, || ceiling_copy(device, one.view(), other.view_mut()))?;
    Ok(1e3 * (2 * size_of::<f32>() * COPIED) as f64 / ms)
}
