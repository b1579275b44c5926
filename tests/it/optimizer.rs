//! Stochastic gradient descent against float64 goldens of PyTorch's.

use dilt::device::Device;
use dilt::ops::optimizer::{Clip, GRADIENT_NORM_PARTIALS, Sgd, SgdInput, gradient_norm, sgd_step};

use crate::support::{Arena, Golden, on_devices, read, unwritten};

/// f32 against float64, over four steps.
const TOLERANCE: f64 = 1e-6;

#[test]
fn four_steps_agree_with_pytorch() {
    let golden = Golden::open("sgd");
    on_devices(|device, label| {
        let mut results = Vec::new();
        for case in golden.cases() {
            let label = format!("{label}: {case}");
            let prefixes: &[&str] = if golden.find(&case, "b_w0").is_some() { &["", "b_"] } else { &[""] };
            let tensors = |name: &str| -> Vec<Vec<f32>> {
                prefixes.iter().map(|prefix| golden.get(&case, &format!("{prefix}{name}")).f32()).collect()
            };
            let start = tensors("w0");
            let arena = Arena::new(start.iter().map(Vec::len));
            let mut masks: Vec<Vec<f32>> = start.iter().map(|tensor| vec![1.0; tensor.len()]).collect();
            if let Some(mask) = golden.find(&case, "mask") {
                masks[0] = mask.f32();
            }
            let number = |name: &str| golden.number(&case, name) as f32;
            let sgd = Sgd {
                momentum: number("momentum"),
                nesterov: number("nesterov") != 0.0,
                weight_decay: number("weight_decay"),
            };
            let mask = device.upload(&arena.bits(&masks)).unwrap();
            let rate = device.upload(&[number("lr")]).unwrap();
            let mut weights = device.upload(&arena.lay(&start)).unwrap();
            let mut velocity = device.alloc::<f32>(arena.len).unwrap();
            let mut partials = unwritten(device, GRADIENT_NORM_PARTIALS);
            for step in 0..4 {
                let gradients = device.upload(&arena.lay(&tensors(&format!("grad{step}")))).unwrap();
                let clips = number("clip") > 0.0;
                if clips {
                    gradient_norm(device, gradients.view(), mask.view(), partials.view_mut()).unwrap();
                    let squares: f32 = read(device, partials.view()).iter().sum();
                    let want = golden.get(&case, "norms").data[step];
                    assert!((f64::from(squares.sqrt()) / want - 1.0).abs() < TOLERANCE, "{label}: norm of step {step}");
                }
                let input = SgdInput {
                    rate: rate.view(),
                    gradients: gradients.view(),
                    mask: mask.view(),
                    decay: None,
                    clip: clips.then(|| Clip { partials: partials.view(), max_norm: number("clip") }),
                };
                sgd_step(device, &sgd, input, weights.view_mut(), velocity.view_mut()).unwrap();
                let got = read(device, weights.view());
                for (prefix, piece) in prefixes.iter().zip(&arena.pieces) {
                    let name = format!("{prefix}w{}", step + 1);
                    golden.get(&case, &name).check(&got[piece.clone()], TOLERANCE, &format!("{label}: {name}"));
                }
                results.push(got);
            }
            let got = read(device, velocity.view());
            if sgd.momentum > 0.0 {
                for (prefix, piece) in prefixes.iter().zip(&arena.pieces) {
                    let name = format!("{prefix}buf4");
                    golden.get(&case, &name).check(&got[piece.clone()], TOLERANCE, &format!("{label}: {name}"));
                }
            }
            // Pruned weights, their velocity and the gaps of the arena are exactly +0.
            let kept = arena.lay(&masks);
            let weights = results.last().unwrap();
            let stray = (0..arena.len).find(|&i| kept[i] == 0.0 && (weights[i].to_bits() | got[i].to_bits()) != 0);
            assert_eq!(stray, None, "{label}: not +0");
            results.push(got);
        }
        results
    });
}

/// Every bit of the mask and of the decay, every lane, over a length that is no multiple of anything.
#[test]
fn mask_and_decay_bits_reach_each_weight_and_nothing_that_is_pruned_survives() {
    const COUNT: usize = 100_003;
    let word = |i: usize| (i as u32).wrapping_mul(0x9E37_79B9) ^ 0x1357_9bdf;
    let (mask, decay): (Vec<u32>, Vec<u32>) = (0..COUNT.div_ceil(32)).map(|i| (word(i), word(i + 12_345))).unzip();
    let set = |words: &[u32], i: usize| crate::support::bit(words, i);
    // Gradients of pruned weights are poison.
    let gradients: Vec<f32> = (0..COUNT).map(|i| if set(&mask, i) { 1.0 } else { f32::NAN }).collect();
    on_devices(|device, label| {
        let (mask_bits, decay_bits) = (device.upload(&mask).unwrap(), device.upload(&decay).unwrap());
        let (rate, gradients) = (device.upload(&[0.5f32]).unwrap(), device.upload(&gradients).unwrap());
        let mut weights = device.upload(&vec![-2.0f32; COUNT]).unwrap();
        let mut velocity = device.upload(&vec![4.0f32; COUNT]).unwrap();
        let mut partials = unwritten(device, GRADIENT_NORM_PARTIALS);
        gradient_norm(device, gradients.view(), mask_bits.view(), partials.view_mut()).unwrap();
        let partials = read(device, partials.view());
        let kept = (0..COUNT).filter(|&i| set(&mask, i)).count();
        assert_eq!(partials.iter().sum::<f32>(), kept as f32, "{label}: the norm counts the kept gradients");
        let sgd = Sgd { momentum: 0.25, nesterov: false, weight_decay: 0.125 };
        let input = SgdInput {
            rate: rate.view(),
            gradients: gradients.view(),
            mask: mask_bits.view(),
            decay: Some(decay_bits.view()),
            clip: None,
        };
        sgd_step(device, &sgd, input, weights.view_mut(), velocity.view_mut()).unwrap();
        let (weights, velocity) = (read(device, weights.view()), read(device, velocity.view()));
        for i in 0..COUNT {
            // v = 0.25 * 4 + 1 + decay * -2: exact in f32.
            let v = 2.0 - if set(&decay, i) { 0.25 } else { 0.0 };
            let want = if set(&mask, i) { (-2.0 - 0.5 * v, v) } else { (0.0, 0.0) };
            assert_eq!((weights[i], velocity[i]), want, "{label}: element {i}");
            assert!(set(&mask, i) || weights[i].to_bits() | velocity[i].to_bits() == 0, "{label}: -0 at {i}");
        }
        vec![partials, weights, velocity]
    });
}

#[test]
fn a_norm_of_nan_is_not_clipped_away() {
    on_devices(|device, label| {
        let (rate, mask) = (device.upload(&[0.5f32]).unwrap(), device.upload(&[!0u32]).unwrap());
        let mut values = vec![1.0f32; 32];
        values[3] = f32::NAN;
        let gradients = device.upload(&values).unwrap();
        let (mut weights, mut velocity) = (device.alloc::<f32>(32).unwrap(), device.alloc::<f32>(32).unwrap());
        let mut partials = unwritten(device, GRADIENT_NORM_PARTIALS);
        gradient_norm(device, gradients.view(), mask.view(), partials.view_mut()).unwrap();
        let clip = Some(Clip { partials: partials.view(), max_norm: 1.0 });
        let input = SgdInput { rate: rate.view(), gradients: gradients.view(), mask: mask.view(), decay: None, clip };
        let sgd = Sgd { momentum: 0.9, nesterov: false, weight_decay: 0.0 };
        sgd_step(device, &sgd, input, weights.view_mut(), velocity.view_mut()).unwrap();
        assert!(read(device, weights.view()).iter().all(|w| w.is_nan()), "{label}");
        Vec::new()
    });
}

#[test]
fn arenas_of_the_wrong_size_are_refused_by_name() {
    let device = Device::open("host").unwrap();
    let (rate, mask) = (device.alloc::<f32>(1).unwrap(), device.alloc::<u32>(2).unwrap());
    let gradients = device.alloc::<f32>(64).unwrap();
    let (mut weights, mut velocity) = (device.alloc::<f32>(64).unwrap(), device.alloc::<f32>(63).unwrap());
    let sgd = Sgd { momentum: 0.9, nesterov: false, weight_decay: 0.0 };
    let input = SgdInput { rate: rate.view(), gradients: gradients.view(), mask: mask.view(), decay: None, clip: None };
    let error = sgd_step(&device, &sgd, input, weights.view_mut(), velocity.view_mut()).unwrap_err().to_string();
    assert!(error.contains("elements of velocity: expected 64, got 63"), "{error}");
    let partials = weights.slice_mut(0..GRADIENT_NORM_PARTIALS / 8);
    let error = gradient_norm(&device, gradients.view(), mask.view(), partials).unwrap_err().to_string();
    assert!(error.contains("elements of partials: expected 256, got 32"), "{error}");
}
