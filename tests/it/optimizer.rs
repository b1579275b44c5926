//! Stochastic gradient descent and AdamW against float64 goldens of PyTorch's.

use dilt::device::Device;
use dilt::ops::optimizer::{
    AdamW, Clip, GRADIENT_NORM_PARTIALS, OptimizerInput, Sgd, adamw_step, gradient_norm, sgd_step,
};

use crate::support::{Arena, Golden, on_devices, read, unwritten};

/// f32 against float64, over four or five steps.
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
                let input = OptimizerInput {
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

/// AdamW's bias corrections of step t = 1, 2, ...
fn corrections([beta1, beta2]: [f64; 2], t: i32) -> [f32; 2] {
    [(1.0 / (1.0 - beta1.powi(t))) as f32, (1.0 / (1.0 - beta2.powi(t)).sqrt()) as f32]
}

#[test]
fn five_steps_of_adamw_agree_with_pytorch() {
    let golden = Golden::open("adamw");
    on_devices(|device, label| {
        let mut results = Vec::new();
        for case in golden.cases() {
            let label = format!("{label}: {case}");
            let prefixes = ["", "b_"];
            let tensors = |name: &str| -> Vec<Vec<f32>> {
                prefixes.iter().map(|prefix| golden.get(&case, &format!("{prefix}{name}")).f32()).collect()
            };
            let start = tensors("w0");
            let arena = Arena::new(start.iter().map(Vec::len));
            let masks = [golden.get(&case, "mask").f32(), vec![1.0; start[1].len()]];
            let decays = [vec![1.0; start[0].len()], vec![0.0; start[1].len()]];
            let number = |name: &str| golden.number(&case, name);
            let betas = [number("beta1"), number("beta2")];
            let adamw = AdamW { betas, epsilon: number("eps") as f32, weight_decay: number("weight_decay") as f32 };
            let mask = device.upload(&arena.bits(&masks)).unwrap();
            let decay = device.upload(&arena.bits(&decays)).unwrap();
            let rate = device.upload(&[number("lr") as f32]).unwrap();
            let mut weights = device.upload(&arena.lay(&start)).unwrap();
            let (mut first, mut second) =
                (device.alloc::<f32>(arena.len).unwrap(), device.alloc::<f32>(arena.len).unwrap());
            let mut partials = unwritten(device, GRADIENT_NORM_PARTIALS);
            let check = |name: &str, got: &[f32]| {
                for (prefix, piece) in prefixes.iter().zip(&arena.pieces) {
                    let want = golden.get(&case, &format!("{prefix}{name}"));
                    want.check(&got[piece.clone()], TOLERANCE, &format!("{label}: {prefix}{name}"));
                }
            };
            for step in 0..5 {
                let gradients = device.upload(&arena.lay(&tensors(&format!("grad{step}")))).unwrap();
                let corrections = device.upload(&corrections(betas, step + 1)).unwrap();
                let clips = number("clip") > 0.0;
                if clips {
                    gradient_norm(device, gradients.view(), mask.view(), partials.view_mut()).unwrap();
                }
                let input = OptimizerInput {
                    rate: rate.view(),
                    gradients: gradients.view(),
                    mask: mask.view(),
                    decay: Some(decay.view()),
                    clip: clips.then(|| Clip { partials: partials.view(), max_norm: number("clip") as f32 }),
                };
                let (w, m, v) = (weights.view_mut(), first.view_mut(), second.view_mut());
                adamw_step(device, &adamw, input, corrections.view(), w, m, v).unwrap();
                check(&format!("w{}", step + 1), &read(device, weights.view()));
            }
            let state = [&weights, &first, &second].map(|buffer| read(device, buffer.view()));
            check("first", &state[1]);
            check("second", &state[2]);
            // Pruned weights, their moments and the gaps of the arena are exactly +0.
            let kept = arena.lay(&masks);
            let stray = |i: &usize| kept[*i] == 0.0 && state.iter().any(|values| values[*i].to_bits() != 0);
            assert_eq!((0..arena.len).find(stray), None, "{label}: not +0");
            results.extend(state);
        }
        results
    });
}

/// Over a length that is no multiple of anything, where gradients and moments of pruned weights are poison.
#[test]
fn adamw_decays_where_the_bits_say_and_nothing_that_is_pruned_survives() {
    const COUNT: usize = 100_003;
    let word = |i: usize| (i as u32).wrapping_mul(0x9E37_79B9) ^ 0x1357_9bdf;
    let (mask, decay): (Vec<u32>, Vec<u32>) = (0..COUNT.div_ceil(32)).map(|i| (word(i), word(i + 12_345))).unzip();
    let set = |words: &[u32], i: usize| crate::support::bit(words, i);
    let where_kept = |value: f32| (0..COUNT).map(|i| if set(&mask, i) { value } else { f32::NAN }).collect::<Vec<_>>();
    on_devices(|device, label| {
        let (mask_bits, decay_bits) = (device.upload(&mask).unwrap(), device.upload(&decay).unwrap());
        let (rate, gradients) = (device.upload(&[0.5f32]).unwrap(), device.upload(&where_kept(4.0)).unwrap());
        let corrections = device.upload(&[2.0f32, 0.5]).unwrap();
        let mut weights = device.upload(&where_kept(-2.0)).unwrap();
        let (mut first, mut second) =
            (device.upload(&where_kept(2.0)).unwrap(), device.upload(&where_kept(16.0)).unwrap());
        let adamw = AdamW { betas: [0.5, 0.75], epsilon: 1.0, weight_decay: 0.125 };
        let (rate, decay_view) = (rate.view(), Some(decay_bits.view()));
        let (gradients, mask_view) = (gradients.view(), mask_bits.view());
        let input = OptimizerInput { rate, gradients, mask: mask_view, decay: decay_view, clip: None };
        let (w, m, v) = (weights.view_mut(), first.view_mut(), second.view_mut());
        adamw_step(device, &adamw, input, corrections.view(), w, m, v).unwrap();
        let state = [&weights, &first, &second].map(|buffer| read(device, buffer.view()));
        for i in 0..COUNT {
            // m = 0.5 * 2 + 0.5 * 4, v = 0.75 * 16 + 0.25 * 16, step = 0.5 * 2 * 3 / (4 * 0.5 + 1): exact in f32.
            let w = if set(&decay, i) { -2.0 + 0.5 * 0.125 * 2.0 } else { -2.0 } - 1.0;
            let want = if set(&mask, i) { [w, 3.0, 16.0] } else { [0.0; 3] };
            let got = state.each_ref().map(|values| values[i]);
            assert_eq!(got.map(f32::to_bits), want.map(f32::to_bits), "{label}: element {i}: {got:?}");
        }
        state.into()
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
        let input = OptimizerInput {
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
        let input =
            OptimizerInput { rate: rate.view(), gradients: gradients.view(), mask: mask.view(), decay: None, clip };
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
    let input =
        OptimizerInput { rate: rate.view(), gradients: gradients.view(), mask: mask.view(), decay: None, clip: None };
    let error = sgd_step(&device, &sgd, input, weights.view_mut(), velocity.view_mut()).unwrap_err().to_string();
    assert!(error.contains("elements of velocity: expected 64, got 63"), "{error}");
    let adamw = AdamW { betas: [0.9, 0.999], epsilon: 1e-8, weight_decay: 0.0 };
    let mut moments = device.alloc::<f32>(128).unwrap();
    for (corrections, second, message) in
        [(2, 63, "elements of second: expected 64, got 63"), (1, 64, "elements of corrections: expected 2, got 1")]
    {
        let corrections = gradients.slice(0..corrections);
        let (first, second) = moments.pair_mut(0..64, 64..64 + second);
        let error = adamw_step(&device, &adamw, input, corrections, weights.view_mut(), first, second).unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
    }
    let partials = weights.slice_mut(0..GRADIENT_NORM_PARTIALS / 8);
    let error = gradient_norm(&device, gradients.view(), mask.view(), partials).unwrap_err().to_string();
    assert!(error.contains("elements of partials: expected 256, got 32"), "{error}");
}
