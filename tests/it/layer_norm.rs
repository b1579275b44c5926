//! Layer norm against float64 goldens, and against the plain formula on rows of many tiles.

use dilt::device::Device;
use dilt::ops::Columns;
use dilt::ops::layer_norm::{
    LayerNormAffine, LayerNormBackward, LayerNormShape, LayerNormStatistics, layer_norm_backward, layer_norm_forward,
};

use crate::support::{Golden, Storage, Tensor, judge_bf16, on_devices, read, refuses_precision, unwritten};

/// A few roundings of f32, 6e-8 each, of which the mean's counts a hundredfold where it is 100 standard deviations.
const TOLERANCE: f64 = 4e-6;

/// Random-looking values in -1..1, exact in f32.
fn values(seed: u32, len: usize) -> Vec<f32> {
    let hash = |i: u32| (i ^ seed).wrapping_mul(0x9E37_79B1).rotate_left(13).wrapping_mul(0x85EB_CA6B) >> 8;
    (0..len as u32).map(|i| hash(i.wrapping_mul(0xC2B2_AE35) ^ i) as f32 / (1 << 23) as f32 - 1.0).collect()
}

const NAMES: [&str; 6] = ["y", "mean", "invstd", "dx", "dgamma", "dbeta"];

/// Forward and backward: what [`NAMES`] says. dx is added to `held`, if anything is held.
fn run(
    device: &Device,
    shape: &LayerNormShape,
    [x, dy, gamma, beta]: [&[f32]; 4],
    epsilon: f32,
    count: usize,
    held: Option<&[f32]>,
    storage: Storage,
) -> [Vec<f32>; 6] {
    let (x, dy) = (storage.upload(device, x), storage.upload(device, dy));
    let (gamma, beta) = (device.upload(gamma).unwrap(), device.upload(beta).unwrap());
    let count = device.upload(&[count as u32]).unwrap();
    let column = || unwritten(device, shape.columns());
    let (mut y, mut mean, mut invstd) = (storage.unwritten(device, shape.len()), column(), column());
    let saved = LayerNormStatistics { mean: mean.view_mut(), invstd: invstd.view_mut() };
    let affine = LayerNormAffine { gamma: gamma.view(), beta: beta.view(), epsilon };
    layer_norm_forward(device, shape, x.view(), affine, count.view(), Some(saved), y.view_mut()).unwrap();
    let mut unsaved = storage.unwritten(device, shape.len());
    layer_norm_forward(device, shape, x.view(), affine, count.view(), None, unsaved.view_mut()).unwrap();
    let bits = |buffer| storage.read(device, buffer).into_iter().map(f32::to_bits).collect::<Vec<_>>();
    assert!(bits(&y) == bits(&unsaved), "without statistics y is another");

    let mut dx = held.map_or_else(|| storage.unwritten(device, shape.len()), |held| storage.upload(device, held));
    let (mut dgamma, mut dbeta) = (unwritten(device, gamma.len()), unwritten(device, gamma.len()));
    let mut scratch = unwritten(device, shape.scratch_len());
    let input = LayerNormBackward {
        x: x.view(),
        dy: dy.view(),
        gamma: gamma.view(),
        mean: mean.view(),
        invstd: invstd.view(),
        count: count.view(),
        accumulate: held.is_some(),
    };
    let (of_gamma, of_beta) = (dgamma.view_mut(), dbeta.view_mut());
    layer_norm_backward(device, shape, input, scratch.view_mut(), of_gamma, of_beta, dx.view_mut()).unwrap();
    let [y, dx] = [y, dx].map(|buffer| storage.read(device, &buffer));
    let [mean, invstd, dgamma, dbeta] = [mean, invstd, dgamma, dbeta].map(|buffer| read(device, buffer.view()));
    [y, mean, invstd, dx, dgamma, dbeta]
}

#[test]
fn layer_norm_and_its_gradients_agree_with_pytorch() {
    let golden = Golden::open("layer_norm");
    on_devices(|device, label| {
        let mut results = Vec::new();
        for case in golden.cases() {
            let tensor = |name: &str| golden.get(&case, name);
            let [n, tokens, features] = tensor("x").shape[..] else { panic!() };
            let shape = LayerNormShape::new(features, Columns::tokens(n, tokens).unwrap()).unwrap();
            let (x, dy) = (tensor("x").tokens_last(), tensor("dy").tokens_last());
            let (gamma, beta) = (tensor("gamma").f32(), tensor("beta").f32());
            let epsilon = golden.number(&case, "eps") as f32;
            let got = run(device, &shape, [&x, &dy, &gamma, &beta], epsilon, n, None, Storage::F32);
            for (name, got) in NAMES.iter().zip(&got) {
                let label = format!("{label}: {case}: {name}");
                match *name {
                    "dgamma" | "dbeta" => _ = tensor(name).check(got, TOLERANCE, &label),
                    // Of a single feature it is the difference of two equal terms, by which errors are measured.
                    "dx" if features == 1 => {
                        let term = tensor("dy").data[0] * tensor("gamma").data[0] * tensor("invstd").data[0];
                        assert!(f64::from(got[0]).abs() <= TOLERANCE * term.abs(), "{label}: {} beside {term}", got[0]);
                    }
                    _ => tensor(name).check_tokens_last(got, TOLERANCE, &label),
                }
            }
            results.extend(got);
            // Of a single feature dx is the difference of two equal terms, in bf16 as in f32.
            results.extend(judge_bf16(&format!("{label}: {case}: bf16"), |storage| {
                let got = run(device, &shape, [&x, &dy, &gamma, &beta], epsilon, n, None, storage);
                let want = |name: &str| match name {
                    "dgamma" | "dbeta" => tensor(name).f32(),
                    _ => tensor(name).tokens_last(),
                };
                let all = NAMES.into_iter().zip(got).filter(|(name, _)| features > 1 || *name != "dx");
                all.map(|(name, got)| (name, got, want(name))).collect()
            }));
        }
        results
    });
}

/// Forward and backward in f64, of the columns in `live` alone.
fn plain([x, dy, gamma, beta]: [&[f32]; 4], live: &[bool], held: &[f32]) -> [Vec<f64>; 6] {
    let (columns, features) = (live.len(), gamma.len());
    let zeros = |len: usize| vec![0.0; len];
    let (mut y, mut dx) = (zeros(x.len()), zeros(x.len()));
    let (mut mean, mut invstd) = (zeros(columns), zeros(columns));
    let (mut dgamma, mut dbeta) = (zeros(features), zeros(features));
    for column in (0..columns).filter(|&column| live[column]) {
        let value = |data: &[f32], row: usize| f64::from(data[row * columns + column]);
        let average = |of: &dyn Fn(usize) -> f64| (0..features).map(of).sum::<f64>() / features as f64;
        let centre = average(&|row| value(x, row));
        let scale = 1.0 / (average(&|row| (value(x, row) - centre).powi(2)) + 1e-5).sqrt();
        let xhat = |row: usize| (value(x, row) - centre) * scale;
        let g = |row: usize| f64::from(gamma[row]) * value(dy, row);
        let (along, dot) = (average(&g), average(&|row| g(row) * xhat(row)));
        for row in 0..features {
            let at = row * columns + column;
            y[at] = f64::from(gamma[row]) * xhat(row) + f64::from(beta[row]);
            dx[at] = scale * (g(row) - along - xhat(row) * dot) + f64::from(held[at]);
            dgamma[row] += value(dy, row) * xhat(row);
            dbeta[row] += value(dy, row);
        }
        (mean[column], invstd[column]) = (centre, scale);
    }
    [y, mean, invstd, dx, dgamma, dbeta]
}

#[test]
fn rows_of_many_tiles_and_padded_columns_follow_the_formula() {
    let tokens = |n, tokens| Columns::tokens(n, tokens).unwrap();
    // Chunks and single rows; padded samples and tokens inside of vectors; rows of a power of two; a part of a tile.
    for (features, columns, n, row, true_tokens, count) in [
        (70, tokens(17, 20), 24, 24, 20, 17),
        (33, tokens(16, 61), 16, 64, 61, 11),
        (12, Columns::samples(74).unwrap(), 80, 1, 1, 74),
        (9, Columns::samples(5).unwrap(), 8, 1, 1, 5),
    ] {
        let shape = LayerNormShape::new(features, columns).unwrap();
        let len = features * n * row;
        assert_eq!((shape.len(), shape.columns()), (len, n * row));
        let live: Vec<bool> = (0..n * row).map(|column| column / row < count && column % row < true_tokens).collect();
        let draw = |seed: u32, drift: f32| -> Vec<f32> {
            let value = |(i, value): (usize, f32)| if live[i % live.len()] { value + drift } else { 0.0 };
            values(seed, len).into_iter().enumerate().map(value).collect()
        };
        let (x, dy, held) = (draw(1, 20.0), draw(2, 0.1), draw(3, 0.0));
        let (gamma, beta) = (values(4, features), values(5, features));
        let inputs = [&x, &dy, &gamma, &beta].map(|data| data.as_slice());
        let want = plain(inputs, &live, &held);
        on_devices(|device, label| {
            let got = run(device, &shape, inputs, 1e-5, count, Some(&held), Storage::F32);
            for ((got, want), name) in got.iter().zip(&want).zip(NAMES) {
                let label = format!("{label}: {features} features: {name}");
                // Sums of random signs leave little of their addends: errors are measured by those.
                let scale = if name.starts_with('d') && name != "dx" { (live.len() as f64).sqrt() } else { 0.0 };
                let want = Tensor { shape: vec![], data: [want.as_slice(), &[scale]].concat() };
                want.check(&[got.as_slice(), &[scale as f32]].concat(), TOLERANCE, &label);
                if ["y", "mean", "invstd", "dx"].contains(&name) {
                    let stray = got.iter().enumerate().find(|(i, value)| !live[i % live.len()] && **value != 0.0);
                    assert_eq!(stray, None, "{label}: a padded column is not zero");
                }
            }
            // bf16 that is added to is rounded like what is written.
            let as_f32 = |values: &Vec<f64>| values.iter().map(|&value| value as f32).collect();
            let low = judge_bf16(&format!("{label}: {features} features: bf16"), |storage| {
                let got = run(device, &shape, inputs, 1e-5, count, Some(&held), storage);
                NAMES.into_iter().zip(got).zip(&want).map(|((name, got), want)| (name, got, as_f32(want))).collect()
            });
            got.into_iter().chain(low).collect()
        });
    }
}

#[test]
fn a_nan_stays_in_its_column() {
    let (features, column) = (11, 5);
    on_devices(|device, label| {
        let shape = LayerNormShape::new(features, Columns::tokens(8, 8).unwrap()).unwrap();
        let mut x = values(1, shape.len());
        let (dy, one) = (values(2, shape.len()), vec![1.0; features]);
        for (storage, bad) in [(Storage::F32, f32::NAN), (Storage::Bf16, f32::NAN), (Storage::Bf16, f32::INFINITY)] {
            x[3 * shape.columns() + column] = bad;
            let [y, _, _, dx, ..] = run(device, &shape, [&x, &dy, &one, &one], 1e-5, 8, None, storage);
            for (i, (y, dx)) in y.iter().zip(&dx).enumerate() {
                let expected = i % shape.columns() == column;
                assert_eq!((y.is_nan(), dx.is_nan()), (expected, expected), "{label}: {storage:?}: element {i}");
            }
        }
        Vec::new()
    });
}

#[test]
fn tensors_of_the_wrong_size_are_refused_by_name() {
    let device = Device::open("host").unwrap();
    let shape = LayerNormShape::new(4, Columns::tokens(5, 5).unwrap()).unwrap();
    let (x, count) = (Storage::F32.upload(&device, &[0.0; 256]), device.alloc::<u32>(1).unwrap());
    let (four, three) = (device.alloc::<f32>(4).unwrap(), device.alloc::<f32>(3).unwrap());
    let statistics = device.alloc(shape.columns()).unwrap();
    let (mut y, mut to_three, mut to_four) =
        (Storage::F32.upload(&device, &[0.0; 256]), device.alloc(3).unwrap(), device.alloc(4).unwrap());
    let affine = LayerNormAffine { gamma: four.view(), beta: three.view(), epsilon: 1e-5 };
    let error = layer_norm_forward(&device, &shape, x.view(), affine, count.view(), None, y.view_mut()).unwrap_err();
    assert!(error.to_string().contains("elements of beta: expected 4, got 3"), "{error}");
    let affine = LayerNormAffine { beta: four.view(), ..affine };
    let saved = Some(LayerNormStatistics { mean: to_three.view_mut(), invstd: to_four.view_mut() });
    let error = layer_norm_forward(&device, &shape, x.view(), affine, count.view(), saved, y.view_mut()).unwrap_err();
    assert!(error.to_string().contains("elements of saved mean: expected 64, got 3"), "{error}");
    let input = LayerNormBackward {
        x: x.view(),
        dy: x.view(),
        gamma: four.view(),
        mean: statistics.view(),
        invstd: statistics.view(),
        count: count.view(),
        accumulate: false,
    };
    let (mut dgamma, mut dbeta, mut short) =
        (device.alloc(4).unwrap(), device.alloc(4).unwrap(), device.alloc(shape.scratch_len() - 1).unwrap());
    let (of_gamma, of_beta) = (dgamma.view_mut(), dbeta.view_mut());
    let error = layer_norm_backward(&device, &shape, input, short.view_mut(), of_gamma, of_beta, y.view_mut());
    assert!(error.unwrap_err().to_string().contains("elements of scratch: expected 16, got 15"));
    let low = Storage::Bf16.upload(&device, &[0.0; 256]);
    let mixed = layer_norm_forward(&device, &shape, low.view(), affine, count.view(), None, y.view_mut());
    refuses_precision(mixed, "layer_norm_forward", "y");
    let (input, mut scratch) =
        (LayerNormBackward { x: low.view(), dy: x.view(), ..input }, device.alloc(shape.scratch_len()).unwrap());
    let (of_gamma, of_beta) = (dgamma.view_mut(), dbeta.view_mut());
    let mixed = layer_norm_backward(&device, &shape, input, scratch.view_mut(), of_gamma, of_beta, y.view_mut());
    refuses_precision(mixed, "layer_norm_backward", "dy");
    assert!(LayerNormShape::new(0, Columns::samples(8).unwrap()).is_err());
}
