//! Fused attention against the explicit softmax formula in float64, and what it does with heads that are left out.

use dilt::device::Device;
use dilt::ops::attention::{AttentionInput, AttentionSaved, AttentionShape, attention_backward, attention_forward};

use crate::support::{Golden, Storage, Tensor, judge_bf16_unpadded, on_devices, read, refuses_precision, unwritten};

/// Scores of up to 128 products, sums over up to 257 keys, and exponentials of them: a few roundings of f32, 6e-8 each,
/// of which the scores' count as often as the largest of them is large.
const TOLERANCE: f64 = 3e-6;
/// Scores of up to 60.
const TOLERANCE_OF_LARGE_SCORES: f64 = 3e-5;

/// `[rows, N, T]` to rows of padded samples of padded tokens, zeros in the padding.
fn padded(values: &[f32], n: usize, tokens: usize) -> Vec<f32> {
    let row = tokens.next_multiple_of(8);
    let mut out = vec![0.0; values.len() / n / tokens * n.next_multiple_of(8) * row];
    for (i, &value) in values.iter().enumerate() {
        let (feature, sample, token) = (i / tokens / n, i / tokens % n, i % tokens);
        out[(feature * n.next_multiple_of(8) + sample) * row + token] = value;
    }
    out
}

/// The true columns of padded rows; the others must be 0 if `zero`.
fn true_columns(values: &[f32], n: usize, tokens: usize, zero: bool, label: &str) -> Vec<f32> {
    let (samples, row) = (n.next_multiple_of(8), tokens.next_multiple_of(8));
    let is_true = |i: usize| i / row % samples < n && i % row < tokens;
    let stray = (0..values.len()).find(|&i| zero && !is_true(i) && values[i] != 0.0);
    assert_eq!(stray.map(|i| values[i]), None, "{label}: padding that is not zero");
    (0..values.len()).filter(|&i| is_true(i)).map(|i| values[i]).collect()
}

/// Random-looking values in -1..1.
fn values(seed: u32, len: usize) -> Vec<f32> {
    let hash = |i: u32| (i ^ seed).wrapping_mul(0x9E37_79B1).rotate_left(13).wrapping_mul(0x85EB_CA6B) >> 8;
    (0..len as u32).map(|i| hash(i.wrapping_mul(0xC2B2_AE35) ^ i) as f32 / (1 << 23) as f32 - 1.0).collect()
}

struct Results {
    y: Vec<f32>,
    lse: Vec<f32>,
    dqkv: Vec<f32>,
}

/// Forward and backward; outputs are NaN before. qkv and dy are padded.
fn attend(device: &Device, shape: &AttentionShape, qkv: &[f32], dy: &[f32], live: &[u32], count: usize) -> Results {
    attend_stored(device, shape, [qkv, dy], live, count, Storage::F32)
}

fn attend_stored(
    device: &Device,
    shape: &AttentionShape,
    [qkv, dy]: [&[f32]; 2],
    live: &[u32],
    count: usize,
    storage: Storage,
) -> Results {
    let (qkv, dy) = (storage.upload(device, qkv), storage.upload(device, dy));
    let (live, count) = (device.upload(live).unwrap(), device.upload(&[count as u32]).unwrap());
    let input = AttentionInput { qkv: qkv.view(), live: live.view(), count: count.view() };
    let (mut y, mut lse) = (storage.unwritten(device, shape.output_len()), unwritten(device, shape.statistic_len()));
    attention_forward(device, shape, input, Some(lse.view_mut()), y.view_mut()).unwrap();
    let (mut delta, mut dqkv) = (unwritten(device, shape.statistic_len()), storage.unwritten(device, shape.qkv_len()));
    let saved = AttentionSaved { y: y.view(), lse: lse.view() };
    attention_backward(device, shape, input, saved, dy.view(), delta.view_mut(), dqkv.view_mut()).unwrap();
    Results { y: storage.read(device, &y), lse: read(device, lse.view()), dqkv: storage.read(device, &dqkv) }
}

#[test]
fn attention_and_its_gradients_agree_with_the_explicit_formula() {
    let golden = Golden::open("attention");
    on_devices(|device, label| {
        let mut results = Vec::new();
        for case in golden.cases() {
            let tensor = |name: &str| golden.get(&case, name);
            let [_, heads, head_dim, n, tokens] = tensor("qkv").shape[..] else { panic!("{case}: five dimensions") };
            // ThreadSanitizer sees in small launches what it would see in large ones.
            if cfg!(dilt_sanitize = "thread") && (tokens > 100 || heads * n > 6) {
                continue;
            }
            let shape = AttentionShape::new(heads, head_dim, tokens, n).unwrap();
            let (qkv, dy) = (padded(&tensor("qkv").f32(), n, tokens), padded(&tensor("dy").f32(), n, tokens));
            let got = attend(device, &shape, &qkv, &dy, &vec![1; heads], n);
            let tolerance = if case == "large_scores" { TOLERANCE_OF_LARGE_SCORES } else { TOLERANCE };
            for (name, values, zero) in [("y", &got.y, true), ("lse", &got.lse, false), ("dqkv", &got.dqkv, true)] {
                let label = format!("{label}: {case}: {name}");
                tensor(name).check(&true_columns(values, n, tokens, zero, &label), tolerance, &label);
            }
            // The statistics of padded samples are nobody's.
            results.extend([got.y, got.dqkv]);
            let label = format!("{label}: {case}: bf16");
            let live = vec![1; heads];
            let low = judge_bf16_unpadded(&label, |storage| {
                let Results { y, lse, dqkv } = attend_stored(device, &shape, [&qkv, &dy], &live, n, storage);
                let of = |values: &[f32], zero: bool| true_columns(values, n, tokens, zero, &label);
                vec![
                    ("y", of(&y, true), tensor("y").f32()),
                    ("lse", of(&lse, false), tensor("lse").f32()),
                    ("dqkv", of(&dqkv, true), tensor("dqkv").f32()),
                ]
            });
            results.extend(low);
        }
        results
    });
}

#[test]
fn a_head_that_is_left_out_is_one_whose_output_has_no_use() {
    let (heads, head_dim, tokens, n) = (3, 12, 19, 2);
    let shape = AttentionShape::new(heads, head_dim, tokens, n).unwrap();
    let qkv = padded(&values(1, 3 * heads * head_dim * n * tokens), n, tokens);
    let mut dy = padded(&values(2, heads * head_dim * n * tokens), n, tokens);
    let head = dy.len() / heads;
    dy[head..2 * head].fill(0.0);
    on_devices(|device, label| {
        let whole = attend(device, &shape, &qkv, &dy, &[1, 1, 1], n);
        let without = attend(device, &shape, &qkv, &dy, &[1, 0, 1], n);
        // Equal as numbers: 0 and -0 are.
        assert_eq!(whole.dqkv, without.dqkv, "{label}");
        assert_eq!(without.y[head..2 * head], vec![0.0; head], "{label}");
        assert!(whole.y[head..2 * head].iter().any(|&y| y != 0.0), "{label}");
        assert_eq!((&whole.y[..head], &whole.y[2 * head..]), (&without.y[..head], &without.y[2 * head..]), "{label}");
        vec![without.y, without.dqkv]
    });
}

#[test]
fn a_head_without_queries_attends_uniformly() {
    let (head_dim, tokens) = (5, 21);
    let shape = AttentionShape::new(1, head_dim, tokens, 1).unwrap();
    let mut qkv = values(3, 3 * head_dim * tokens);
    qkv[..head_dim * tokens].fill(0.0);
    let means = qkv[2 * head_dim * tokens..].chunks(tokens).map(|row| row.iter().map(|&v| f64::from(v)).sum::<f64>());
    let want: Vec<f64> = means.flat_map(|sum| vec![sum / tokens as f64; tokens]).collect();
    let (qkv, dy) = (padded(&qkv, 1, tokens), vec![0.0; shape.output_len()]);
    on_devices(|device, label| {
        let got = attend(device, &shape, &qkv, &dy, &[1], 1);
        let y = true_columns(&got.y, 1, tokens, true, label);
        Tensor { shape: vec![], data: want.clone() }.check(&y, 1e-6, label);
        vec![got.y]
    });
}

#[test]
fn scores_far_from_zero_on_one_side_stay_finite() {
    // Every score is about -400, or 400: e to that power is no float, nor is e to minus a query's lse.
    let (head_dim, tokens) = (16, 13);
    for sign in [1.0, -1.0] {
        let shape = AttentionShape::new(1, head_dim, tokens, 1).unwrap();
        let mut qkv = values(4, 3 * head_dim * tokens);
        for (i, value) in qkv[..2 * head_dim * tokens].iter_mut().enumerate() {
            let queries = i < head_dim * tokens;
            *value = *value * 0.1 + if queries { 10.0 } else { 10.0 * sign };
        }
        let (qkv, dy) = (padded(&qkv, 1, tokens), padded(&values(5, head_dim * tokens), 1, tokens));
        on_devices(|device, label| {
            let got = attend(device, &shape, &qkv, &dy, &[1], 1);
            let lse = true_columns(&got.lse, 1, tokens, false, label);
            assert!(lse.iter().all(|&lse| (380.0..420.0).contains(&(lse * sign))), "{label}: {lse:?}");
            assert!(got.y.iter().chain(&got.dqkv).all(|value| value.is_finite()), "{label}");
            assert!(got.y.iter().all(|y| y.abs() <= 1.0), "{label}: a mean of values in -1..1");
            true_columns(&got.dqkv, 1, tokens, true, label);
            vec![got.y, got.dqkv]
        });
    }
}

#[test]
fn a_nan_stays_visible() {
    let (head_dim, tokens) = (8, 70);
    let shape = AttentionShape::new(1, head_dim, tokens, 1).unwrap();
    let mut qkv = values(6, 3 * head_dim * tokens);
    qkv[head_dim * tokens + 3] = f32::NAN; // key 3
    let mut infinite = qkv.clone();
    infinite[head_dim * tokens + 3] = 1.0;
    infinite[2 * head_dim * tokens + 5] = f32::INFINITY; // of feature 0 of the values
    let [qkv, infinite] = [qkv, infinite].map(|qkv| padded(&qkv, 1, tokens));
    let dy = vec![0.0; shape.output_len()];
    on_devices(|device, label| {
        for storage in [Storage::F32, Storage::Bf16] {
            let y = |qkv: &[f32]| {
                let y = attend_stored(device, &shape, [qkv, &dy], &[1], 1, storage).y;
                true_columns(&y, 1, tokens, false, label)
            };
            assert!(y(&qkv).iter().all(|y| y.is_nan()), "{label}: {storage:?}");
            assert!(y(&infinite)[..tokens].iter().all(|&y| y == f32::INFINITY), "{label}: {storage:?}");
        }
        vec![]
    });
}

#[test]
fn attention_without_statistics_gives_the_same_output() {
    let (heads, head_dim, tokens, n) = (2, 32, 10, 3);
    let shape = AttentionShape::new(heads, head_dim, tokens, n).unwrap();
    let qkv = padded(&values(7, 3 * heads * head_dim * n * tokens), n, tokens);
    let dy = vec![0.0; shape.output_len()];
    on_devices(|device, label| {
        let want = attend(device, &shape, &qkv, &dy, &[1; 2], n).y;
        let (qkv, live, count) =
            (device.upload(&qkv).unwrap(), device.upload(&[1u32; 2]).unwrap(), device.upload(&[n as u32]).unwrap());
        let input = AttentionInput { qkv: qkv.view().into(), live: live.view(), count: count.view() };
        let mut y = unwritten(device, shape.output_len());
        attention_forward(device, &shape, input, None, y.view_mut().into()).unwrap();
        let y = read(device, y.view());
        assert_eq!(y, want, "{label}");
        vec![y]
    });
}

#[test]
fn tensors_of_the_wrong_size_and_heads_that_are_too_wide_are_refused() {
    let device = Device::open("host").unwrap();
    let shape = AttentionShape::new(2, 4, 5, 3).unwrap();
    assert_eq!((shape.qkv_len(), shape.output_len(), shape.statistic_len()), (1536, 512, 128));
    let tensor = |len: usize| device.alloc::<f32>(len).unwrap();
    let words = |len: usize| device.alloc::<u32>(len).unwrap();
    // Length of each argument, in the order of the functions' parameters; which is wrong, and how.
    let right = [1536, 2, 1, 128, 512, 512, 128, 1536];
    let run = |lens: [usize; 8]| {
        let [qkv, live, count, lse, y, dy, delta, dqkv] = lens;
        let (qkv, live, count, dy) = (tensor(qkv), words(live), words(count), tensor(dy));
        let (mut lse, mut y, mut delta, mut dqkv) = (tensor(lse), tensor(y), tensor(delta), tensor(dqkv));
        let input = AttentionInput { qkv: qkv.view().into(), live: live.view(), count: count.view() };
        let forward = attention_forward(&device, &shape, input, Some(lse.view_mut()), y.view_mut().into());
        let saved = AttentionSaved { y: y.view().into(), lse: lse.view() };
        let (dy, dqkv) = (dy.view().into(), dqkv.view_mut().into());
        let backward = attention_backward(&device, &shape, input, saved, dy, delta.view_mut(), dqkv);
        [forward, backward].map(|result| result.err().map(|error| error.to_string()))
    };
    assert_eq!(run(right), [None, None]);
    for (i, name) in ["qkv", "live", "count", "lse", "y", "dy", "delta", "dqkv"].into_iter().enumerate() {
        let mut lens = right;
        lens[i] -= 1;
        let [forward, backward] = run(lens);
        let expected = format!("elements of {name}: expected {}, got {}", right[i], right[i] - 1);
        assert!(backward.as_ref().is_some_and(|error| error.contains(&expected)), "{name}: {backward:?}");
        assert_eq!(forward.is_some_and(|error| error.contains(&expected)), i < 5, "{name}");
    }
    let (qkv, mut y) = (Storage::Bf16.upload(&device, &[0.0; 1536]), Storage::F32.upload(&device, &[0.0; 512]));
    let (live, count, lse, mut delta) = (words(2), words(1), tensor(128), tensor(128));
    let input = AttentionInput { qkv: qkv.view(), live: live.view(), count: count.view() };
    refuses_precision(attention_forward(&device, &shape, input, None, y.view_mut()), "attention_forward", "y");
    let (low, mut dqkv) = (Storage::Bf16.upload(&device, &[0.0; 512]), Storage::Bf16.upload(&device, &[0.0; 1536]));
    let saved = AttentionSaved { y: low.view(), lse: lse.view() };
    let mixed = attention_backward(&device, &shape, input, saved, y.view(), delta.view_mut(), dqkv.view_mut());
    refuses_precision(mixed, "attention_backward", "dy");
    for (heads, head_dim, tokens, n) in [
        (0, 4, 5, 3),
        (2, 0, 5, 3),
        (2, 129, 5, 3),
        (2, 4, 0, 3),
        (2, 4, 5, 0),
        (70_000, 4, 5, 3),
        (2, 4, usize::MAX, 3),
    ] {
        let error = AttentionShape::new(heads, head_dim, tokens, n).unwrap_err().to_string();
        assert!(error.contains("attention"), "{error}");
    }
    let error = AttentionShape::new(3, 129, 5, 3).unwrap_err().to_string();
    assert!(error.contains("features of a head: expected 1 to 128, got 3 heads of 129 features"), "{error}");
}
