//! Residual sums with layer scale against float64 goldens, and what dropout and stochastic depth leave out.

use std::cell::OnceCell;

use dilt::device::{Buffer, Device, Reals, RealsMut};
use dilt::ops::Columns;
use dilt::ops::dropout::{Draw, ResidualShape, dropout_backward, dropout_forward, residual_backward, residual_forward};

use crate::support::{Golden, Storage, Tensor, judge_bf16, on_devices, read, refuses_precision, unwritten};

/// Two roundings of f32 an element, and those of sums of up to 700.
const TOLERANCE: f64 = 2e-6;

/// What a training draws in a step.
#[derive(Clone, Copy)]
struct Setting {
    rate: f32,
    seed: u64,
    stream: u32,
    step: u32,
}

const SETTING: Setting = Setting { rate: 0.3, seed: 0x0123_4567_89ab_cdef, stream: 7, step: 1000 };

/// Settings that differ from [`SETTING`] in one thing each.
fn others() -> [Setting; 4] {
    [
        Setting { seed: SETTING.seed ^ 1 << 40, ..SETTING },
        Setting { seed: SETTING.seed + 1, ..SETTING },
        Setting { stream: 8, ..SETTING },
        Setting { step: 1001, ..SETTING },
    ]
}

/// dropout_forward or dropout_backward.
type Dropout = fn(&Device, Reals, Draw, RealsMut) -> dilt::Result<()>;

fn drop(device: &Device, direction: Dropout, from: &[f32], setting: Setting) -> Vec<f32> {
    drop_stored(device, direction, from, setting, Storage::F32)
}

fn drop_stored(device: &Device, direction: Dropout, from: &[f32], setting: Setting, storage: Storage) -> Vec<f32> {
    let Setting { rate, seed, stream, step } = setting;
    let mut to = storage.unwritten(device, from.len());
    let (from, step) = (storage.upload(device, from), device.upload(&[step]).unwrap());
    direction(device, from.view(), Draw { rate, seed, stream, step: step.view() }, to.view_mut()).unwrap();
    storage.read(device, &to)
}

/// The residual sum of x and a branch, dgamma and dbranch.
fn residual(
    device: &Device,
    shape: &ResidualShape,
    [x, branch, dy]: [&[f32]; 3],
    gamma: Option<&[f32]>,
    drop: Option<Setting>,
    storage: Storage,
) -> [Vec<f32>; 3] {
    let [x, branch, dy] = [x, branch, dy].map(|data| storage.upload(device, data));
    let gamma = gamma.map(|gamma| device.upload(gamma).unwrap());
    let step = device.upload(&[drop.map_or(0, |drop| drop.step)]).unwrap();
    let drop = drop.map(|Setting { rate, seed, stream, .. }| Draw { rate, seed, stream, step: step.view() });
    let (mut y, mut dbranch) = (storage.unwritten(device, shape.len()), storage.unwritten(device, shape.len()));
    let mut dgamma = gamma.as_ref().map(|gamma| unwritten(device, gamma.len()));
    let scale = gamma.as_ref().map(Buffer::view);
    residual_forward(device, shape, x.view(), branch.view(), scale, drop, y.view_mut()).unwrap();
    let of_gamma = dgamma.as_mut().map(Buffer::view_mut);
    residual_backward(device, shape, branch.view(), dy.view(), scale, drop, of_gamma, dbranch.view_mut()).unwrap();
    let dgamma = dgamma.map_or_else(Vec::new, |dgamma| read(device, dgamma.view()));
    [storage.read(device, &y), dgamma, storage.read(device, &dbranch)]
}

/// Demands that `count` of `of` trials of probability p is within five standard deviations.
fn check_binomial(count: usize, of: usize, p: f64, label: &str) {
    let (mean, deviation) = (of as f64 * p, (of as f64 * p * (1.0 - p)).sqrt());
    assert!((count as f64 - mean).abs() < 5.0 * deviation, "{label}: {count} of {of}, expected {mean} +- {deviation}");
}

/// Demands the same values of every device, whatever its vectors.
fn check_same(first: &OnceCell<Vec<f32>>, values: &[f32], label: &str) {
    assert!(first.get_or_init(|| values.to_vec()) == values, "{label}: other draws than on the first device");
}

#[test]
fn residual_sums_and_their_gradients_agree_with_pytorch() {
    let golden = Golden::open("residual");
    on_devices(|device, label| {
        let mut results = Vec::new();
        for case in golden.cases() {
            let tensor = |name: &str| golden.get(&case, name);
            let [n, tokens, features] = tensor("x").shape[..] else { panic!() };
            let shape = ResidualShape::new(features, Columns::tokens(n, tokens).unwrap()).unwrap();
            let [x, branch, dy] = ["x", "branch", "dy"].map(|name| tensor(name).tokens_last());
            let gamma = golden.find(&case, "gamma").map(|gamma| gamma.f32());
            let [y, dgamma, dbranch] =
                residual(device, &shape, [&x, &branch, &dy], gamma.as_deref(), None, Storage::F32);
            let label = |name: &str| format!("{label}: {case}: {name}");
            tensor("y").check_tokens_last(&y, TOLERANCE, &label("y"));
            tensor("dbranch").check_tokens_last(&dbranch, TOLERANCE, &label("dbranch"));
            if gamma.is_some() {
                tensor("dgamma").check(&dgamma, TOLERANCE, &label("dgamma"));
            }
            results.extend([y, dgamma, dbranch]);
            results.extend(judge_bf16(&label("bf16"), |storage| {
                let [y, dgamma, dbranch] =
                    residual(device, &shape, [&x, &branch, &dy], gamma.as_deref(), None, storage);
                let of_gamma = gamma.as_ref().map(|_| ("dgamma", dgamma, tensor("dgamma").f32()));
                let tensors =
                    [("y", y, tensor("y").tokens_last()), ("dbranch", dbranch, tensor("dbranch").tokens_last())];
                tensors.into_iter().chain(of_gamma).collect()
            }));
        }
        results
    });
}

#[test]
fn dropout_leaves_out_its_rate_and_keeps_the_expectation() {
    const LEN: usize = 40_008;
    let ones = vec![1.0; LEN];
    let first = OnceCell::new();
    on_devices(|device, label| {
        for rate in [0.1, 0.5, 0.9] {
            let y = drop(device, dropout_forward, &ones, Setting { rate, ..SETTING });
            let kept = 1.0 / (1.0 - f64::from(rate));
            assert!(y.iter().all(|&value| value == 0.0 || value == kept as f32), "{label}");
            check_binomial(y.iter().filter(|&&value| value == 0.0).count(), LEN, f64::from(rate), label);
            let (mean, deviation) =
                (y.iter().map(|&y| f64::from(y)).sum::<f64>() / LEN as f64, ((kept - 1.0) / LEN as f64).sqrt());
            assert!((mean - 1.0).abs() < 5.0 * deviation, "{label}: rate {rate}: mean {mean}");
        }
        assert_eq!(drop(device, dropout_forward, &ones, Setting { rate: 0.0, ..SETTING }), ones, "{label}: rate 0");
        let y = drop(device, dropout_forward, &ones, SETTING);
        check_same(&first, &y, label);
        vec![y]
    });
}

#[test]
fn the_backward_pass_draws_the_same_again_and_other_steps_others() {
    const LEN: usize = 20_008;
    let x: Vec<f32> = (1..=LEN).map(|i| i as f32).collect();
    on_devices(|device, label| {
        let (y, dx) = (drop(device, dropout_forward, &x, SETTING), drop(device, dropout_backward, &x, SETTING));
        assert!(y == dx, "{label}: other draws in the backward pass");
        let low = drop_stored(device, dropout_forward, &x, SETTING, Storage::Bf16);
        assert!(y.iter().zip(&low).all(|(y, low)| (*y == 0.0) == (*low == 0.0)), "{label}: other draws in bf16");
        let p = f64::from(SETTING.rate);
        for other in others() {
            let other = drop(device, dropout_forward, &x, other);
            let same = y.iter().zip(&other).filter(|(a, b)| (**a == 0.0) == (**b == 0.0)).count();
            check_binomial(same, LEN, p * p + (1.0 - p) * (1.0 - p), label);
        }
        // Neighbours are drawn apart.
        for distance in 1..=8 {
            let both = y.windows(distance + 1).filter(|w| w[0] == 0.0 && w[distance] == 0.0).count();
            check_binomial(both, LEN - distance, p * p, &format!("{label}: distance {distance}"));
        }
        vec![y]
    });
}

/// Whether each of `n` samples was dropped, by a residual sum of ones and zeros.
fn dropped(device: &Device, columns: Columns, n: usize, setting: Setting) -> Vec<bool> {
    let shape = ResidualShape::new(1, columns).unwrap();
    let (ones, zeros) = (vec![1.0; shape.len()], vec![0.0; shape.len()]);
    let [y, _, dbranch] = residual(device, &shape, [&zeros, &ones, &ones], None, Some(setting), Storage::F32);
    assert!(y == dbranch, "other draws in the backward pass");
    let kept = (1.0 / (1.0 - f64::from(setting.rate))) as f32;
    let row = shape.len() / n;
    let all = |sample: &[f32], value: f32| sample.iter().all(|&y| y == value);
    y.chunks(row)
        .map(|sample| {
            assert!(all(sample, 0.0) || all(sample, kept), "a sample's branch is dropped as a whole: {sample:?}");
            sample[0] == 0.0
        })
        .collect()
}

#[test]
fn stochastic_depth_drops_whole_branches_at_its_rate_anew_in_each_step() {
    const N: usize = 64;
    const STEPS: usize = 100;
    let p = f64::from(SETTING.rate);
    let first = OnceCell::new();
    on_devices(|device, label| {
        let columns = Columns::samples(N).unwrap();
        let step = |step: usize| Setting { step: step as u32, ..SETTING };
        let steps: Vec<_> = (0..STEPS).map(|i| dropped(device, columns, N, step(i))).collect();
        let count = steps.iter().flatten().filter(|&&dropped| dropped).count();
        check_binomial(count, N * STEPS, p, label);
        let both = |a: &[bool], b: &[bool]| a.iter().zip(b).filter(|(a, b)| **a && **b).count();
        let again = steps.windows(2).map(|pair| both(&pair[0], &pair[1])).sum();
        check_binomial(again, N * (STEPS - 1), p * p, &format!("{label}: neighbouring steps"));

        let own = dropped(device, columns, N, SETTING);
        for (i, other) in others().into_iter().enumerate() {
            assert!(dropped(device, columns, N, other) != own, "{label}: setting {i} draws the same");
        }
        // A sample's draw depends on neither the tokens nor the width of vectors, which straddle samples of 24 columns.
        for tokens in [5, 20, 65] {
            let tokens = Columns::tokens(N, tokens).unwrap();
            assert_eq!(dropped(device, tokens, N, SETTING), own, "{label}");
        }
        let elements = drop(device, dropout_forward, &[1.0; 4 * N], SETTING);
        let firsts: Vec<bool> = elements.iter().step_by(4).map(|&value| value == 0.0).collect();
        assert!(firsts != own, "{label}: samples and elements share their draws");
        let drawn: Vec<f32> = own.iter().map(|&dropped| f32::from(u8::from(dropped))).collect();
        check_same(&first, &drawn, label);
        vec![drawn]
    });
}

#[test]
fn layer_scale_and_its_gradient_count_what_is_kept() {
    // Rows longer than a block's step with staged policy; an odd number of features.
    for (features, n, tokens) in [(3, 11, 20), (5, 64, 129)] {
        let columns = Columns::tokens(n, tokens).unwrap();
        let shape = ResidualShape::new(features, columns).unwrap();
        let (row, len) = (tokens.next_multiple_of(8), shape.len() / features);
        let live = |i: usize| i % len / row < n && i % row < tokens;
        let tensor = |period: usize| -> Vec<f32> {
            let value = |i: usize| if live(i) { (i % period) as f32 / period as f32 - 0.4 } else { 0.0 };
            (0..shape.len()).map(value).collect()
        };
        let (x, branch, dy) = (tensor(97), tensor(89), tensor(83));
        let gamma: Vec<f32> = (0..features).map(|i| 0.5 - i as f32).collect();
        on_devices(|device, label| {
            let gone = dropped(device, columns, n.next_multiple_of(8), SETTING);
            let keep = |i: usize| if gone[i % len / row] { 0.0 } else { 1.0 / (1.0 - f64::from(SETTING.rate)) };
            let got = residual(device, &shape, [&x, &branch, &dy], Some(&gamma), Some(SETTING), Storage::F32);
            let each = |of: &dyn Fn(usize) -> f64| (0..shape.len()).map(of).collect::<Vec<_>>();
            let product = each(&|i| keep(i) * f64::from(dy[i]) * f64::from(branch[i]));
            let wanted = || {
                [
                    each(&|i| f64::from(x[i]) + keep(i) * f64::from(gamma[i / len]) * f64::from(branch[i])),
                    product.chunks(len).map(|row| row.iter().sum()).collect(),
                    each(&|i| keep(i) * f64::from(gamma[i / len]) * f64::from(dy[i])),
                ]
            };
            for ((got, data), name) in got.iter().zip(wanted()).zip(["y", "dgamma", "dbranch"]) {
                Tensor { shape: vec![], data }.check(got, TOLERANCE, &format!("{label}: {name}"));
            }
            let stray = |data: &[f32]| data.iter().enumerate().any(|(i, &value)| !live(i) && value != 0.0);
            assert!(!stray(&got[0]) && !stray(&got[2]), "{label}: a padded column is not zero");
            let low = judge_bf16(&format!("{label}: bf16"), |storage| {
                let got = residual(device, &shape, [&x, &branch, &dy], Some(&gamma), Some(SETTING), storage);
                ["y", "dgamma", "dbranch"]
                    .into_iter()
                    .zip(got)
                    .zip(wanted())
                    .map(|((name, got), want)| (name, got, want.iter().map(|&value| value as f32).collect()))
                    .collect()
            });
            got.into_iter().chain(low).collect()
        });
    }
}

#[test]
fn wrong_sizes_and_rates_are_refused_by_name() {
    let device = Device::open("host").unwrap();
    let shape = ResidualShape::new(3, Columns::tokens(5, 5).unwrap()).unwrap();
    let [x, mut y] = [192, 192].map(|len| Storage::F32.upload(&device, &vec![0.0; len]));
    let (three, two, mut to_two) =
        (device.alloc::<f32>(3).unwrap(), device.alloc(2).unwrap(), device.alloc(2).unwrap());
    let (steps, no_step) = (device.upload(&[0u32]).unwrap(), device.upload(&[0u32; 2]).unwrap());
    let draw = Draw { rate: 0.5, seed: 0, stream: 0, step: steps.view() };
    let error = residual_forward(&device, &shape, x.view(), three.view().into(), None, None, y.view_mut()).unwrap_err();
    assert!(error.to_string().contains("elements of branch: expected 192, got 3"), "{error}");
    let gamma = Some(two.view());
    let error = residual_forward(&device, &shape, x.view(), x.view(), gamma, None, y.view_mut()).unwrap_err();
    assert!(error.to_string().contains("elements of gamma: expected 3, got 2"), "{error}");
    let (gamma, dgamma) = (Some(three.view()), Some(to_two.view_mut()));
    let error = residual_backward(&device, &shape, x.view(), x.view(), gamma, None, dgamma, y.view_mut()).unwrap_err();
    assert!(error.to_string().contains("elements of dgamma: expected 3, got 2"), "{error}");
    for rate in [1.0, -0.1, f32::NAN] {
        let error = dropout_forward(&device, x.view(), Draw { rate, ..draw }, y.view_mut()).unwrap_err().to_string();
        assert!(error.contains("dropout_forward: rate: expected from 0 to below 1"), "{error}");
    }
    let wrong = Draw { step: no_step.view(), ..draw };
    let error = dropout_backward(&device, x.view(), wrong, y.view_mut()).unwrap_err().to_string();
    assert!(error.contains("elements of step: expected 1, got 2"), "{error}");
    let error = dropout_forward(&device, three.view().into(), draw, y.view_mut()).unwrap_err().to_string();
    assert!(error.contains("elements of x: expected a multiple of 8, got 3"), "{error}");
    let low = Storage::Bf16.upload(&device, &[0.0; 192]);
    refuses_precision(dropout_forward(&device, low.view(), draw, y.view_mut()), "dropout_forward", "y");
    refuses_precision(dropout_backward(&device, low.view(), draw, y.view_mut()), "dropout_backward", "dx");
    let mixed = residual_forward(&device, &shape, low.view(), x.view(), None, None, y.view_mut());
    refuses_precision(mixed, "residual_forward", "branch");
    let mixed = residual_backward(&device, &shape, low.view(), low.view(), None, None, None, y.view_mut());
    refuses_precision(mixed, "residual_backward", "dbranch");
    assert!(ResidualShape::new(0, Columns::samples(8).unwrap()).is_err());
}
