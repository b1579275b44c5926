//! Softmax cross entropy against float64 goldens, and its rules for ties, NaN, and rows of the tables.

use dilt::device::Device;
use dilt::ops::loss::{LossInput, LossShape, LossTables, cross_entropy};

use crate::support::{Golden, Storage, judge_bf16, on_devices, read, refuses_precision, unwritten};

/// Exponentials and logarithms of f32 and sums of up to 1000 of them; logits of scale 50 lose a digit before that.
const TOLERANCE: f64 = 3e-6;

/// Rows of the tables in these tests.
const ROWS: usize = 3;

struct Outcome {
    loss: Vec<f32>,
    top1: Vec<u32>,
    top5: Vec<u32>,
    dlogits: Vec<f32>,
}

/// Runs the loss on logits `[classes, n]`; outputs are NaN and 77 before. Without a gradient it must give the same.
fn run(device: &Device, logits: &[f32], labels: &[u32], count: usize, step: u32, smoothing: f32) -> Outcome {
    run_stored(device, logits, labels, count, step, smoothing, Storage::F32)
}

fn run_stored(
    device: &Device,
    logits: &[f32],
    labels: &[u32],
    count: usize,
    step: u32,
    smoothing: f32,
    storage: Storage,
) -> Outcome {
    let shape = LossShape::new(logits.len() / labels.len(), labels.len()).unwrap();
    let (logits, labels) = (storage.upload(device, logits), device.upload(labels).unwrap());
    let (count, step) = (device.upload(&[count as u32]).unwrap(), device.upload(&[step]).unwrap());
    let mut dlogits = storage.unwritten(device, shape.len());
    let mut outcomes = [true, false].map(|gradient| {
        let mut loss = unwritten(device, ROWS);
        let (mut top1, mut top5) = (device.upload(&[77u32; ROWS]).unwrap(), device.upload(&[77u32; ROWS]).unwrap());
        let (logits, labels, count, step) = (logits.view(), labels.view(), count.view(), step.view());
        let input = LossInput { logits, labels, count, step, smoothing };
        let tables = LossTables { loss: loss.view_mut(), top1: top1.view_mut(), top5: top5.view_mut() };
        cross_entropy(device, &shape, input, tables, gradient.then(|| dlogits.view_mut())).unwrap();
        let (top1, top5) = (device.read(top1.view()).unwrap(), device.read(top5.view()).unwrap());
        Outcome { loss: read(device, loss.view()), top1, top5, dlogits: Vec::new() }
    });
    let bits = |outcome: &Outcome| outcome.loss.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&outcomes[0]), bits(&outcomes[1]));
    assert_eq!((&outcomes[0].top1, &outcomes[0].top5), (&outcomes[1].top1, &outcomes[1].top5));
    outcomes[0].dlogits = storage.read(device, &dlogits);
    let [outcome, _] = outcomes;
    outcome
}

/// Labels of the true samples, padded with a class that would show if it were counted.
fn padded(labels: &[f64]) -> Vec<u32> {
    let mut labels: Vec<u32> = labels.iter().map(|&label| label as u32).collect();
    labels.resize(labels.len().next_multiple_of(8), 0);
    labels
}

#[test]
fn cross_entropy_and_its_gradient_agree_with_pytorch() {
    let golden = Golden::open("loss");
    on_devices(|device, label| {
        let mut results = Vec::new();
        for case in golden.cases() {
            let tensor = |name: &str| golden.get(&case, name);
            let smoothing = golden.number(&case, "label_smoothing") as f32;
            let (logits, labels) = (tensor("logits"), tensor("labels"));
            let step = results.len() as u32 / 2 % ROWS as u32;
            let count = labels.data.len();
            let got = run(device, &logits.samples_last(), &padded(&labels.data), count, step, smoothing);
            let (row, label) = (step as usize, format!("{label}: {case}"));
            tensor("loss").check(&got.loss[row..=row], TOLERANCE, &format!("{label}: loss"));
            tensor("dlogits").check_samples_last(&got.dlogits, TOLERANCE, &format!("{label}: dlogits"));
            for (got, name) in [(&got.top1, "top1"), (&got.top5, "top5")] {
                assert_eq!(f64::from(got[row]), tensor(name).data[0], "{label}: {name}");
            }
            for other in (0..ROWS).filter(|&other| other != row) {
                assert!(got.loss[other].is_nan() && got.top1[other] == 77 && got.top5[other] == 77, "{label}: {other}");
            }
            results.extend([got.loss[row..=row].to_vec(), got.dlogits]);
            results.extend(judge_bf16(&format!("{label}: bf16"), |storage| {
                let (from, labels) = (logits.samples_last(), padded(&labels.data));
                let got = run_stored(device, &from, &labels, count, 0, smoothing, storage);
                let want = |name: &str| tensor(name);
                vec![
                    ("loss", got.loss[..1].to_vec(), want("loss").f32()),
                    ("dlogits", got.dlogits, want("dlogits").samples_last()),
                ]
            }));
        }
        results
    });
}

#[test]
fn only_true_samples_count_and_a_row_past_the_tables_is_not_written() {
    let (classes, n) = (10, 600);
    let logits: Vec<f32> = (0..classes * n).map(|i| (i * 2_654_435_761 % 1009) as f32 / 300.0).collect();
    let labels: Vec<u32> = (0..n).map(|sample| (sample * 7 % classes) as u32).collect();
    on_devices(|device, label| {
        let mut results = Vec::new();
        for count in [1, 5, 8, 333, 600] {
            let got = run(device, &logits, &labels, count, 2, 0.0);
            let mut want = 0.0;
            for (sample, &class) in labels[..count].iter().enumerate() {
                let at = |c: usize| f64::from(logits[c * n + sample]);
                want += ((0..classes).map(|c| at(c).exp()).sum::<f64>().ln() - at(class as usize)) / count as f64;
            }
            assert!(
                (f64::from(got.loss[2]) / want - 1.0).abs() < TOLERANCE,
                "{label}: {count}: {}, {want}",
                got.loss[2]
            );
            assert!(got.top5[2] as usize <= count && got.top1[2] <= got.top5[2], "{label}: {count}");
            for (i, &gradient) in got.dlogits.iter().enumerate() {
                assert_eq!(gradient != 0.0, i % n < count, "{label}: {count} samples: dlogits {i} is {gradient}");
            }
            results.extend([got.loss[2..].to_vec(), got.dlogits]);
        }
        for step in [ROWS as u32, u32::MAX] {
            let got = run(device, &logits, &labels, 5, step, 0.0);
            assert!(got.loss.iter().all(|value| value.is_nan()) && got.top1 == [77; ROWS], "{label}: step {step}");
        }
        results
    });
}

#[test]
fn equal_logits_rank_in_the_order_of_classes() {
    // All logits equal: label 0 is first, labels up to 4 are among five, labels from 5 are not.
    let labels: Vec<u32> = (0..8).collect();
    on_devices(|device, label| {
        let got = run(device, &[0.25; 64], &labels, 8, 0, 0.0);
        assert_eq!((got.top1[0], got.top5[0]), (1, 5), "{label}");
        assert!((got.loss[0] - 8f32.ln()).abs() < 1e-6, "{label}: {}", got.loss[0]);
        vec![got.dlogits]
    });
}

#[test]
fn what_is_no_number_shows_in_the_loss_and_counts_as_wrong() {
    on_devices(|device, label| {
        let labels = [1u32; 8];
        let clean: Vec<f32> = (0..24).map(|i| if i / 8 == 1 { 4.0 } else { i as f32 / 10.0 }).collect();
        assert_eq!(run(device, &clean, &labels, 8, 0, 0.0).top1[0], 8, "{label}");
        // A NaN in any class of sample 3, the label's included; in a padded sample it is nobody's.
        for class in 0..3 {
            let mut logits = clean.clone();
            logits[class * 8 + 3] = f32::NAN;
            for (smoothing, storage) in [(0.0, Storage::F32), (0.1, Storage::F32), (0.1, Storage::Bf16)] {
                let got = run_stored(device, &logits, &labels, 8, 0, smoothing, storage);
                assert!(got.loss[0].is_nan() && got.top1[0] == 7, "{label}: class {class}: {:?}", got.top1);
                assert!(got.dlogits[3].is_nan() && got.dlogits[2].is_finite(), "{label}: class {class}");
                let got = run_stored(device, &logits, &labels, 3, 0, smoothing, storage);
                assert!(got.loss[0].is_finite() && got.top1[0] == 3, "{label}: class {class}");
            }
        }
        // A label that is no class reads nothing, and shows.
        let got = run(device, &clean, &[1, 1, 3, 1, 1, 1, 1, u32::MAX], 8, 0, 0.0);
        assert!(got.loss[0].is_nan() && got.top1[0] == 6, "{label}: {:?}", got.top1);
        // An impossible class is no error.
        let mut logits = clean.clone();
        logits[3] = f32::NEG_INFINITY;
        for storage in [Storage::F32, Storage::Bf16] {
            let got = run_stored(device, &logits, &labels, 8, 0, 0.0, storage);
            assert!(got.loss[0].is_finite() && got.dlogits[3] == 0.0, "{label}: {storage:?}: {}", got.loss[0]);
        }
        vec![run(device, &logits, &labels, 8, 0, 0.0).loss[..1].to_vec()]
    });
}

#[test]
fn tensors_of_the_wrong_size_are_refused_by_name() {
    let device = Device::open("host").unwrap();
    let shape = LossShape::new(10, 5).unwrap();
    let (logits, one) = (Storage::Bf16.upload(&device, &[0.0; 80]), device.alloc::<u32>(1).unwrap());
    let mut loss = device.alloc(4).unwrap();
    let (mut top1, mut top5) = (device.alloc(4).unwrap(), device.alloc(3).unwrap());
    for (labels, problem) in [(5, "elements of labels: expected 8, got 5"), (8, "table top5: expected 4, got 3")] {
        let labels = device.alloc(labels).unwrap();
        let (count, step) = (one.view(), one.view());
        let input = LossInput { logits: logits.view(), labels: labels.view(), count, step, smoothing: 0.0 };
        let tables = LossTables { loss: loss.view_mut(), top1: top1.view_mut(), top5: top5.view_mut() };
        let error = cross_entropy(&device, &shape, input, tables, None).unwrap_err().to_string();
        assert!(error.contains(problem), "{error}");
    }
    let (labels, mut top5, mut dlogits) =
        (device.alloc(8).unwrap(), device.alloc(4).unwrap(), Storage::F32.upload(&device, &[0.0; 80]));
    let (count, step) = (one.view(), one.view());
    let input = LossInput { logits: logits.view(), labels: labels.view(), count, step, smoothing: 0.0 };
    let tables = LossTables { loss: loss.view_mut(), top1: top1.view_mut(), top5: top5.view_mut() };
    let mixed = cross_entropy(&device, &shape, input, tables, Some(dlogits.view_mut()));
    refuses_precision(mixed, "cross_entropy", "dlogits");
    assert!(LossShape::new(0, 5).is_err() && LossShape::new(5, 0).is_err());
}
