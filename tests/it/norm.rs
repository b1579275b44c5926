//! Batch norm with residual and relu against float64 goldens, and against the plain formula on a row of many chunks.

use dilt::device::{Device, RealBuffer};
use dilt::ops::norm::{
    NormAffine, NormBackward, NormGradient, NormGradients, NormInput, NormRunning, NormSaved, NormShape, Normalised,
    Normed, norm_apply, norm_backward, norm_eval, norm_forward,
};

use crate::support::{Golden, Storage, Tensor, judge_bf16, on_devices, read, refuses_precision, unwritten};

/// A few roundings of f32, 6e-8 each, of which the mean's counts a hundredfold where it is 100 standard deviations.
pub const TOLERANCE: f64 = 4e-6;

/// Random-looking values in -1..1, exact in f32.
pub fn values(seed: u32, len: usize) -> Vec<f32> {
    let hash = |i: u32| (i ^ seed).wrapping_mul(0x9E37_79B1).rotate_left(13).wrapping_mul(0x85EB_CA6B) >> 8;
    (0..len as u32).map(|i| hash(i.wrapping_mul(0xC2B2_AE35) ^ i) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// The results of a golden case, forward and backward, and whether they are `[N, C, H, W]`.
fn pass(device: &Device, golden: &Golden, case: &str, storage: Storage) -> Vec<(&'static str, Vec<f32>, bool)> {
    let tensor = |name: &str| golden.get(case, name);
    let flag = |key: &str| golden.number(case, key) != 0.0;
    let number = |key: &str| golden.number(case, key) as f32;
    let [n, features, h, w] = tensor("x").shape[..] else { panic!() };
    let shape = NormShape::new(features, h * w, n).unwrap();
    let upload = |name: &str| storage.upload(device, &tensor(name).samples_last());
    let row = |name: &str| device.upload(&tensor(name).f32()).unwrap();
    let (x, mut dy, gamma, beta) = (upload("x"), upload("dy"), row("gamma"), row("beta"));
    let residual = flag("residual").then(|| upload("residual"));
    let (mut running_mean, mut running_var) = (row("running_mean"), row("running_var"));
    let count = device.upload(&[n as u32]).unwrap();
    let (relu, training) = (flag("relu"), flag("train"));
    let input = NormInput {
        x: x.view(),
        residual: residual.as_ref().map(RealBuffer::view),
        relu,
        map: None,
        count: count.view(),
    };
    let affine = NormAffine { gamma: gamma.view(), beta: beta.view(), epsilon: number("eps") };

    let mut scratch = unwritten(device, shape.scratch_len());
    let mut y = storage.unwritten(device, shape.len());
    let (mut mean, mut invstd) = (unwritten(device, features), unwritten(device, features));
    if training {
        let running =
            NormRunning { mean: running_mean.view_mut(), var: running_var.view_mut(), momentum: number("momentum") };
        let saved = NormSaved { mean: mean.view_mut(), invstd: invstd.view_mut() };
        norm_forward(device, &shape, input, affine, running, saved, scratch.view_mut(), y.view_mut()).unwrap();
        let mut again = storage.unwritten(device, shape.len());
        norm_apply(device, &shape, input, affine, mean.view(), invstd.view(), again.view_mut()).unwrap();
        assert_eq!(storage.read(device, &again), storage.read(device, &y), "{case}: by what was saved");
    } else {
        let (running_mean, running_var) = (running_mean.view(), running_var.view());
        norm_eval(device, &shape, input, affine, running_mean, running_var, y.view_mut()).unwrap();
        (mean, invstd) = (row("mean"), row("invstd"));
    }

    let (mut dgamma, mut dbeta) = (unwritten(device, features), unwritten(device, features));
    let mut dx = storage.unwritten(device, shape.len());
    let backward = NormBackward {
        normed: Normed {
            norm: Normalised {
                x: x.view(),
                gamma: gamma.view(),
                beta: beta.view(),
                mean: mean.view(),
                invstd: invstd.view(),
            },
            y: residual.as_ref().map(|_| y.view()),
            relu,
            map: None,
        },
        dy: match residual {
            Some(_) => NormGradient::OfResidual(dy.view_mut()),
            None => NormGradient::Kept(dy.view()),
        },
        training,
        count: count.view(),
    };
    let to = NormGradients { dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut(), dx: dx.view_mut() };
    norm_backward(device, &shape, backward, scratch.view_mut(), to).unwrap();

    let rows = [
        ("mean", mean),
        ("invstd", invstd),
        ("new_running_mean", running_mean),
        ("new_running_var", running_var),
        ("dgamma", dgamma),
        ("dbeta", dbeta),
    ];
    let tensors = [("y", Some(y)), ("dx", Some(dx)), ("dresidual", residual.map(|_| dy))];
    let rows = rows.iter().map(|(name, row)| (*name, read(device, row.view()), false));
    let tensors = tensors.iter().filter_map(|(name, of)| Some((*name, storage.read(device, of.as_ref()?), true)));
    rows.chain(tensors).collect()
}

#[test]
fn batch_norm_and_its_gradients_agree_with_pytorch() {
    let golden = Golden::open("norm");
    on_devices(|device, label| {
        let mut results = Vec::new();
        for case in golden.cases() {
            for (name, got, samples_last) in pass(device, &golden, &case, Storage::F32) {
                let (tensor, label) = (golden.get(&case, name), format!("{label}: {case}: {name}"));
                match samples_last {
                    true => tensor.check_samples_last(&got, TOLERANCE, &label),
                    false => tensor.check(&got, TOLERANCE, &label),
                };
                results.push(got);
            }
            results.extend(judge_bf16(&format!("{label}: {case}: bf16"), |storage| {
                let want = |name: &str, samples_last: bool| match samples_last {
                    true => golden.get(&case, name).samples_last(),
                    false => golden.get(&case, name).f32(),
                };
                let got = pass(device, &golden, &case, storage);
                got.into_iter().map(|(name, got, last)| (name, got, want(name, last))).collect()
            }));
        }
        results
    });
}

/// Forward and backward with a residual, and relu or not, in f64, over the true samples alone: y, dx, dgamma, dbeta, mean, invstd
/// and the unbiased variance. Tensors are `[features, pixels, n]`.
pub fn plain(
    x: &[f32],
    residual: &[f64],
    dy: &[f32],
    affine: [&[f32]; 2],
    sizes: [usize; 3],
    count: usize,
    relu: bool,
) -> [Vec<f64>; 7] {
    let [features, pixels, n] = sizes;
    let items = (pixels * count) as f64;
    let zeros = || vec![0.0; features * pixels * n];
    let (mut y, mut dx) = (zeros(), zeros());
    let mut rows = [(); 5].map(|()| Vec::new());
    for (f, (&gamma, &beta)) in affine[0].iter().zip(affine[1]).enumerate() {
        let at: Vec<usize> =
            (0..pixels).flat_map(|p| (0..count).map(move |sample| (f * pixels + p) * n + sample)).collect();
        let x = |i: usize| f64::from(x[i]);
        let mean = at.iter().map(|&i| x(i)).sum::<f64>() / items;
        let squares = at.iter().map(|&i| (x(i) - mean).powi(2)).sum::<f64>();
        let invstd = 1.0 / (squares / items + 1e-5).sqrt();
        let (gamma, beta) = (f64::from(gamma), f64::from(beta));
        let xhat = |i: usize| (x(i) - mean) * invstd;
        let least = if relu { 0.0 } else { f64::NEG_INFINITY };
        at.iter().for_each(|&i| y[i] = (gamma * xhat(i) + beta + residual[i]).max(least));
        let dz = |i: usize| if y[i] > least { f64::from(dy[i]) } else { 0.0 };
        let dbeta = at.iter().map(|&i| dz(i)).sum::<f64>();
        let dgamma = at.iter().map(|&i| dz(i) * xhat(i)).sum::<f64>();
        at.iter().for_each(|&i| dx[i] = gamma * invstd * (dz(i) - dbeta / items - xhat(i) * dgamma / items));
        let values = [dgamma, dbeta, mean, invstd, squares / (items - 1.0)];
        rows.iter_mut().zip(values).for_each(|(row, value)| row.push(value));
    }
    let [dgamma, dbeta, mean, invstd, unbiased] = rows;
    [y, dx, dgamma, dbeta, mean, invstd, unbiased]
}

#[test]
fn rows_of_many_chunks_and_batches_with_few_true_samples_follow_the_formula() {
    // Ragged chunks; a batch that leaves whole vectors of samples empty; the most chunks a row has.
    for (sizes @ [features, pixels, n], count) in [([3, 900, 40], 37), ([2, 400, 64], 21), ([1, 5000, 136], 131)] {
        let len = features * pixels * n;
        let true_samples = |mut data: Vec<f32>| {
            data.iter_mut().enumerate().filter(|(i, _)| i % n >= count).for_each(|(_, value)| *value = 0.0);
            data
        };
        let drift = |i: usize| 20.0 + (i / n % pixels) as f32 * 0.0078125;
        let x = values(1, len).iter().enumerate().map(|(i, value)| value + drift(i)).collect();
        let (x, residual, dy) = (true_samples(x), true_samples(values(2, len)), true_samples(values(3, len)));
        let (gamma, beta) = (values(4, features), values(5, features));
        let added: Vec<f64> = residual.iter().map(|&x| f64::from(x)).collect();
        let want = plain(&x, &added, &dy, [&gamma, &beta], sizes, count, true);
        let shape = NormShape::new(features, pixels, n).unwrap();
        assert_eq!(shape.len(), len);
        assert!(shape.scratch_len() > 4 * features, "several chunks a row");
        on_devices(|device, label| {
            let upload = |data: &[f32]| device.upload(data).unwrap();
            let (x, residual, dy) = (upload(&x), upload(&residual), upload(&dy));
            let (gamma, beta) = (upload(&gamma), upload(&beta));
            let (mut running_mean, mut running_var) = (upload(&vec![0.0; features]), upload(&vec![0.0; features]));
            let on_device = device.upload(&[count as u32]).unwrap();
            let row = || unwritten(device, features);
            let tensor = || unwritten(device, len);
            let (mut mean, mut invstd, mut dgamma, mut dbeta) = (row(), row(), row(), row());
            let (mut y, mut dx) = (tensor(), tensor());
            let mut dresidual = device.upload(&read(device, dy.view())).unwrap();
            let mut scratch = unwritten(device, shape.scratch_len());

            let input = NormInput {
                x: x.view().into(),
                residual: Some(residual.view().into()),
                relu: true,
                map: None,
                count: on_device.view(),
            };
            let affine = NormAffine { gamma: gamma.view(), beta: beta.view(), epsilon: 1e-5 };
            let running = NormRunning { mean: running_mean.view_mut(), var: running_var.view_mut(), momentum: 1.0 };
            let saved = NormSaved { mean: mean.view_mut(), invstd: invstd.view_mut() };
            norm_forward(device, &shape, input, affine, running, saved, scratch.view_mut(), y.view_mut().into())
                .unwrap();
            let backward = NormBackward {
                normed: Normed {
                    norm: Normalised {
                        x: x.view().into(),
                        gamma: gamma.view(),
                        beta: beta.view(),
                        mean: mean.view(),
                        invstd: invstd.view(),
                    },
                    y: Some(y.view().into()),
                    relu: true,
                    map: None,
                },
                dy: NormGradient::OfResidual(dresidual.view_mut().into()),
                training: true,
                count: on_device.view(),
            };
            let to = NormGradients { dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut(), dx: dx.view_mut().into() };
            norm_backward(device, &shape, backward, scratch.view_mut(), to).unwrap();

            let got = [&y, &dx, &dgamma, &dbeta, &mean, &invstd, &running_var].map(|b| read(device, b.view()));
            let names = ["y", "dx", "dgamma", "dbeta", "mean", "invstd", "running var"];
            for ((got, want), name) in got.iter().zip(&want).zip(names) {
                // Sums of random signs leave little of thousands of addends: their errors are measured by those.
                let scale = if name.starts_with('d') && name != "dx" { (len as f64).sqrt() } else { 0.0 };
                let scaled = |values: Vec<f64>| Tensor { shape: vec![], data: [values, vec![scale]].concat() };
                let got = [got.clone(), vec![scale as f32]].concat();
                scaled(want.clone()).check(&got, TOLERANCE, &format!("{label}: {sizes:?}: {name}"));
            }
            let [dx, y, dresidual] = [&dx, &y, &dresidual].map(|b| read(device, b.view()));
            let dy = read(device, dy.view());
            for i in 0..len {
                assert_eq!(dresidual[i], if y[i] > 0.0 { dy[i] } else { 0.0 }, "{label}: dresidual {i}");
            }
            let stray = |data: &[f32]| data.iter().enumerate().any(|(i, &value)| i % n >= count && value != 0.0);
            assert!(!stray(&y) && !stray(&dx), "{label}: a padded sample is not zero");
            assert_eq!(read(device, running_mean.view()), read(device, mean.view()), "{label}: momentum 1");
            got.to_vec()
        });
    }
}

#[test]
fn a_relu_does_not_hide_a_nan() {
    on_devices(|device, label| {
        let shape = NormShape::new(1, 1, 16).unwrap();
        let x = [[1.0; 10].as_slice(), &[f32::NAN; 2], &[f32::INFINITY], &[-1.0, -2.0, f32::NEG_INFINITY]].concat();
        let (one, zero) = (device.upload(&[1.0f32]).unwrap(), device.upload(&[0.0f32]).unwrap());
        let count = device.upload(&[16u32]).unwrap();
        let affine = NormAffine { gamma: one.view(), beta: zero.view(), epsilon: 0.0 };
        for storage in [Storage::F32, Storage::Bf16] {
            let (x, mut y) = (storage.upload(device, &x), storage.unwritten(device, 16));
            let input = NormInput { x: x.view(), residual: None, relu: true, map: None, count: count.view() };
            norm_eval(device, &shape, input, affine, zero.view(), one.view(), y.view_mut()).unwrap();
            let y = storage.read(device, &y);
            assert!(y[10..12].iter().all(|value| value.is_nan()), "{label}: {storage:?}: {y:?}");
            let rest = [[1.0; 10].as_slice(), &[f32::INFINITY], &[0.0; 3]].concat();
            assert_eq!([&y[..10], &y[12..]].concat(), rest, "{label}: {storage:?}");
        }
        vec![]
    });
}

#[test]
fn tensors_of_the_wrong_size_are_refused_by_name() {
    let device = Device::open("host").unwrap();
    let shape = NormShape::new(4, 9, 5).unwrap();
    let count = device.alloc::<u32>(1).unwrap();
    let (four, three) = (device.alloc::<f32>(4).unwrap(), device.alloc::<f32>(3).unwrap());
    let [x, mut y, low] =
        [Storage::F32, Storage::F32, Storage::Bf16].map(|storage| storage.upload(&device, &[0.0; 288]));
    let input = NormInput { x: x.view(), residual: None, relu: false, map: None, count: count.view() };
    let affine = NormAffine { gamma: four.view(), beta: three.view(), epsilon: 1e-5 };
    let error = norm_eval(&device, &shape, input, affine, four.view(), four.view(), y.view_mut()).unwrap_err();
    assert!(error.to_string().contains("elements of beta: expected 4, got 3"), "{error}");
    let input = NormInput { residual: Some(four.view().into()), ..input };
    let error = norm_eval(&device, &shape, input, affine, four.view(), four.view(), y.view_mut()).unwrap_err();
    assert!(error.to_string().contains("elements of residual: expected 288, got 4"), "{error}");
    let affine = NormAffine { beta: four.view(), ..affine };
    for (residual, tensor) in [(None, "y"), (Some(x.view()), "residual")] {
        let input = NormInput { x: low.view(), residual, ..input };
        let result = norm_eval(&device, &shape, input, affine, four.view(), four.view(), y.view_mut());
        refuses_precision(result, "norm_eval", tensor);
    }
    let input = NormBackward {
        normed: Normed {
            norm: Normalised {
                x: low.view(),
                gamma: four.view(),
                beta: four.view(),
                mean: four.view(),
                invstd: four.view(),
            },
            y: Some(low.view()),
            relu: true,
            map: None,
        },
        dy: NormGradient::Kept(x.view()),
        training: true,
        count: count.view(),
    };
    let [mut scratch, mut dgamma, mut dbeta] = [shape.scratch_len(), 4, 4].map(|len| device.alloc(len).unwrap());
    let to = NormGradients { dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut(), dx: y.view_mut() };
    let mixed = norm_backward(&device, &shape, input, scratch.view_mut(), to);
    refuses_precision(mixed, "norm_backward", "dy");
    assert!(NormShape::new(0, 9, 5).is_err() && NormShape::new(4, 1 << 20, 1 << 20).is_err());
    assert!(NormShape::new(4, 9, usize::MAX).is_err());
}
