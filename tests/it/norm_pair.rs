//! The sum of two batch norms against float64, of rows of many chunks and of batches with few true samples.

use dilt::device::{Buffer, Device};
use dilt::ops::norm::{NormGradients, NormRunning, NormSaved, NormShape, Normalised};
use dilt::ops::norm_join::norm_statistics;
use dilt::ops::norm_pair::{NormPair, NormPairGradient, norm_pair_backward, norm_pair_forward};

use crate::norm::{TOLERANCE, plain, values};
use crate::support::{Judged, Storage, Tensor, judge_bf16, on_devices, read, unwritten};

const EPSILON: f32 = 1e-5;

/// What two norms are given, `[features, pixels, n]` and `[features]`.
struct Case {
    sizes: [usize; 3],
    count: usize,
    relu: bool,
    x: [Vec<f32>; 2],
    dy: Vec<f32>,
    gamma: [Vec<f32>; 2],
    beta: [Vec<f32>; 2],
}

impl Case {
    fn new(sizes: [usize; 3], count: usize, relu: bool) -> Self {
        let [features, pixels, n] = sizes;
        let len = features * pixels * n;
        let tensor = |seed: u32, drift: f32| -> Vec<f32> {
            let at = |(i, value): (usize, f32)| {
                if i % n < count { value + drift * (20.0 + (i / n % pixels) as f32 * 0.0078125) } else { 0.0 }
            };
            Storage::Bf16.rounded(values(seed, len).into_iter().enumerate().map(at).collect())
        };
        let x = [tensor(1, 0.1), tensor(2, -0.2)];
        let rows = |seed: u32| [values(seed, features), values(seed + 1, features)];
        Case { sizes, count, relu, x, dy: tensor(3, 0.0), gamma: rows(4), beta: rows(6) }
    }

    /// y, then of each norm dx, dgamma, dbeta, mean, inverse deviation and unbiased variance, in f64.
    fn want(&self) -> Vec<(&'static str, Vec<f64>)> {
        let of = |which: usize, residual: &[f64], relu: bool| {
            let affine = [&self.gamma[which][..], &self.beta[which]];
            plain(&self.x[which], residual, &self.dy, affine, self.sizes, self.count, relu)
        };
        let nothing = vec![0.0; self.dy.len()];
        let alone = [0, 1].map(|which| of(which, &nothing, false)[0].clone());
        let names = ["dx", "dgamma", "dbeta", "mean", "invstd", "running var"];
        let mut want = Vec::new();
        for which in [0, 1] {
            // What the other norm makes is a residual to this one.
            let [y, rest @ ..] = of(which, &alone[1 - which], self.relu);
            want.extend((which == 0).then_some(("y", y)));
            want.extend(names.into_iter().zip(rest));
        }
        want
    }

    /// The same by the device.
    fn got(&self, device: &Device, storage: Storage, label: &str) -> Vec<Vec<f32>> {
        let [features, pixels, n] = self.sizes;
        let shape = NormShape::new(features, pixels, n).unwrap();
        let upload = |values: &[f32]| storage.upload(device, values);
        let (x, dy, count) =
            (self.x.each_ref().map(|x| upload(x)), upload(&self.dy), device.upload(&[self.count as u32]).unwrap());
        let affine = [0, 1].map(|which| [&self.gamma[which], &self.beta[which]].map(|row| device.upload(row).unwrap()));
        let row = || unwritten(device, features);
        let mut scratch = unwritten(device, 2 * shape.scratch_len());
        let statistics = [0, 1].map(|which| {
            let [mut mean, mut invstd] = [row(), row()];
            let [mut running_mean, mut running_var] = [(); 2].map(|()| device.upload(&vec![0.0f32; features]).unwrap());
            let running = NormRunning { mean: running_mean.view_mut(), var: running_var.view_mut(), momentum: 1.0 };
            let saved = NormSaved { mean: mean.view_mut(), invstd: invstd.view_mut() };
            let (x, scratch) = (x[which].view(), scratch.view_mut());
            norm_statistics(device, &shape, x, count.view(), EPSILON, running, saved, scratch).unwrap();
            assert_eq!(read(device, running_mean.view()), read(device, mean.view()), "{label}: momentum 1");
            [mean, invstd, running_var]
        });
        let norms = [0, 1].map(|which| {
            let ([gamma, beta], [mean, invstd, _]) =
                (affine[which].each_ref().map(Buffer::view), statistics[which].each_ref().map(Buffer::view));
            Normalised { x: x[which].view(), gamma, beta, mean, invstd }
        });
        let pair = NormPair { norms, relu: self.relu, count: count.view() };
        let mut y = storage.unwritten(device, shape.len());
        norm_pair_forward(device, &shape, pair, y.view_mut()).unwrap();
        let y = storage.read(device, &y);

        let mut gradients = [(); 2].map(|()| (row(), row(), storage.unwritten(device, shape.len())));
        let mut backward = |gradient: NormPairGradient, scratch: &mut Buffer<f32>| {
            let to = gradients.each_mut().map(|(dgamma, dbeta, dx)| NormGradients {
                dgamma: dgamma.view_mut(),
                dbeta: dbeta.view_mut(),
                dx: dx.view_mut(),
            });
            norm_pair_backward(device, &shape, pair, gradient, scratch.view_mut(), to).unwrap();
            gradients.each_ref().map(|(_, _, dx)| storage.read(device, dx))
        };
        let whole = backward(NormPairGradient::Whole(dy.view()), &mut scratch);
        // What goes through ReLU, with the sums that are there by now, says the same.
        let through = |(dy, y): (&f32, &f32)| if self.relu && *y <= 0.0 { 0.0 } else { *dy };
        let dz = upload(&self.dy.iter().zip(&y).map(through).collect::<Vec<_>>());
        assert_eq!(backward(NormPairGradient::Summed(dz.view()), &mut scratch), whole, "{label}: of dz");

        let mut got = vec![y];
        for ((dgamma, dbeta, dx), statistics) in gradients.iter().zip(&statistics) {
            got.push(storage.read(device, dx));
            got.extend([dgamma, dbeta].into_iter().chain(statistics).map(|row| read(device, row.view())));
        }
        got
    }
}

#[test]
fn the_sum_of_two_norms_and_its_gradients_follow_the_formula() {
    for (sizes, count, relu) in [([3, 900, 40], 37, true), ([2, 400, 64], 21, false), ([5, 4, 8], 8, true)] {
        let case = Case::new(sizes, count, relu);
        let want = case.want();
        let len = case.dy.len();
        on_devices(|device, label| {
            let label = format!("{label}: {sizes:?}");
            let got = case.got(device, Storage::F32, &label);
            for ((name, want), got) in want.iter().zip(&got) {
                // Sums of random signs leave little of thousands of addends: their errors are measured by those.
                let scale = if ["dgamma", "dbeta"].contains(name) { (len as f64).sqrt() } else { 0.0 };
                let want = Tensor { shape: vec![], data: [&want[..], &[scale]].concat() };
                want.check(&[&got[..], &[scale as f32]].concat(), TOLERANCE, &format!("{label}: {name}"));
                let stray = got.len() == len && got.iter().enumerate().any(|(i, &x)| i % sizes[2] >= count && x != 0.0);
                assert!(!stray, "{label}: {name}: a padded sample is not zero");
            }
            let judged = judge_bf16(&format!("{label}: bf16"), |storage| -> Vec<Judged> {
                let got = case.got(device, storage, &label);
                let of = |((name, want), got): (&(&'static str, Vec<f64>), Vec<f32>)| {
                    (*name, got, want.iter().map(|&x| x as f32).collect())
                };
                want.iter().zip(got).map(of).collect()
            });
            [got, judged].concat()
        });
    }
}

#[test]
fn tensors_of_the_wrong_size_or_precision_are_refused_by_name() {
    let device = Device::open("host").unwrap();
    let shape = NormShape::new(4, 9, 5).unwrap();
    let count = device.alloc::<u32>(1).unwrap();
    let (four, three) = (device.alloc::<f32>(4).unwrap(), device.alloc::<f32>(3).unwrap());
    let [x, low, short] = [(Storage::F32, 288), (Storage::Bf16, 288), (Storage::F32, 280)]
        .map(|(storage, len)| storage.upload(&device, &vec![0.0; len]));
    let row = four.view();
    let norm = Normalised { x: x.view(), gamma: row, beta: row, mean: row, invstd: row };
    let forward = |second: Normalised| {
        let pair = NormPair { norms: [norm, second], relu: true, count: count.view() };
        norm_pair_forward(&device, &shape, pair, Storage::F32.upload(&device, &[0.0; 288]).view_mut())
    };
    let refused = |result: dilt::Result<()>| result.unwrap_err().to_string();
    let error = refused(forward(Normalised { beta: three.view(), ..norm }));
    assert!(error.contains("norm_pair_forward: number of elements of beta: expected 4, got 3"), "{error}");
    let error = refused(forward(Normalised { x: short.view(), ..norm }));
    assert!(error.contains("elements of x of the norm: expected 288, got 280"), "{error}");
    let error = refused(forward(Normalised { x: low.view(), ..norm }));
    assert!(error.contains("precision of x of the norm: expected f32, got bf16"), "{error}");

    let backward = |scratch: usize, dx: usize, dgamma: usize| {
        let pair = NormPair { norms: [norm, norm], relu: true, count: count.view() };
        let mut tensors = [(4, 288), (dgamma, dx)].map(|(features, len)| {
            let row = || device.alloc::<f32>(features).unwrap();
            (row(), row(), Storage::F32.upload(&device, &vec![0.0; len]))
        });
        let to = tensors.each_mut().map(|(dgamma, dbeta, dx)| NormGradients {
            dgamma: dgamma.view_mut(),
            dbeta: dbeta.view_mut(),
            dx: dx.view_mut(),
        });
        let mut scratch = device.alloc::<f32>(scratch).unwrap();
        let dy = NormPairGradient::Whole(x.view());
        refused(norm_pair_backward(&device, &shape, pair, dy, scratch.view_mut(), to))
    };
    let needed = 2 * shape.scratch_len();
    for (scratch, dx, dgamma, expected) in [
        (needed - 1, 288, 4, format!("elements of scratch: expected {needed}, got {}", needed - 1)),
        (needed, 280, 4, "elements of dx: expected 288, got 280".into()),
        (needed, 288, 3, "elements of dgamma: expected 4, got 3".into()),
    ] {
        let error = backward(scratch, dx, dgamma);
        assert!(error.contains(&expected), "{error}");
    }
}
