//! Gathering batches: against a plain reference that draws from its own Philox, and against torchvision in float64.

use dilt::device::{Buffer, Device, RealBuffer};
use dilt::ops::augment::{
    Augment, Colours, Crop, GatherInto, GatherShape, GatherSource, RandomCrop, draw, gather, grey_means, resample,
};

use crate::command::{fails, json};
use crate::support::{Golden, Storage, as_floats, on_devices, read, unwritten};

/// Largest difference as a share of the largest value: a few roundings of 2^-24 at each pixel, no long sum.
const TOLERANCE: f64 = 2e-6;

/// Philox4x32-10, from the paper.
fn philox(key: [u32; 2], mut c: [u32; 4]) -> [u32; 4] {
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let (p0, p1) = (0xD251_1F53 * u64::from(c[0]), 0xCD9E_8D57 * u64::from(c[2]));
        c = [(p1 >> 32) as u32 ^ c[1] ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k1, p0 as u32];
        (k0, k1) = (k0.wrapping_add(0x9E37_79B9), k1.wrapping_add(0xBB67_AE85));
    }
    c
}

#[test]
fn the_reference_draws_what_random123_publishes() {
    assert_eq!(philox([0; 2], [0; 4]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
    assert_eq!(philox([!0; 2], [!0; 4]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
}

/// What `philox` draws for a sample of a step.
fn draws(seed: u64, step: u32, sample: usize, stream: u32) -> [u32; 4] {
    philox([seed as u32, (seed >> 32) as u32], [step, 0, sample as u32, stream])
}

/// Uniform in 0..choices.
fn below(word: u32, choices: usize) -> i64 {
    ((u64::from(word) * choices as u64) >> 32) as i64
}

/// A chunk of three steps of at most 13 samples, whose inputs have 9 columns: more than a staged block has.
#[derive(Clone)]
struct Batches {
    stored: [usize; 3],
    images: Vec<u8>,
    labels: Vec<u32>,
    order: Vec<u32>,
    mean: Vec<f32>,
    std: Vec<f32>,
    storage: Storage,
}

const INPUT: [usize; 2] = [5, 9];
const EXAMPLES: usize = 20;
const BATCH: usize = 13;
const SCALE: f32 = 255.0;

/// A batch on a device, and where it goes.
struct Uploaded {
    images: Buffer<u8>,
    labels: Buffer<u32>,
    order: Buffer<u32>,
    state: Buffer<u32>,
    count: Buffer<u32>,
    mean: Buffer<f32>,
    std: Buffer<f32>,
    x: RealBuffer,
    to_labels: Buffer<u32>,
}

impl Uploaded {
    fn parts(&mut self) -> (GatherSource<'_>, GatherInto<'_>) {
        let source = GatherSource {
            images: self.images.view(),
            labels: self.labels.view(),
            order: self.order.view(),
            state: self.state.view(),
            count: self.count.view(),
            scale: SCALE,
        };
        let (x, labels) = (self.x.view_mut(), self.to_labels.view_mut());
        (source, GatherInto { mean: self.mean.view(), std: self.std.view(), x, labels })
    }
}

impl Batches {
    fn new(stored: [usize; 3]) -> Self {
        let pixels: usize = stored.iter().product();
        Batches {
            stored,
            images: (0..EXAMPLES * pixels).map(|i| philox([1, 0], [i as u32, 0, 0, 0])[0] as u8).collect(),
            labels: (0..EXAMPLES).map(|i| 100 + i as u32).collect(),
            order: (0..3 * BATCH).map(|i| (i * 7 % EXAMPLES) as u32).collect(),
            mean: vec![0.5, 0.25, 0.1],
            std: vec![0.2, 0.3, 0.7],
            storage: Storage::F32,
        }
    }

    /// The example of a sample, if there is one.
    fn example(&self, row: u32, sample: usize) -> Option<usize> {
        let example = *self.order.get(row as usize * BATCH + sample)? as usize;
        (example < EXAMPLES).then_some(example)
    }

    /// x and labels of a step, by the formulas.
    fn want(&self, [row, step]: [u32; 2], count: usize, crop: Option<RandomCrop>) -> (Vec<f32>, Vec<u32>) {
        let ([c, sh, sw], [h, w]) = (self.stored, INPUT);
        let n = BATCH.next_multiple_of(8);
        let (mut x, mut labels) = (vec![0.0; c * h * w * n], vec![0; n]);
        for (sample, label) in labels.iter_mut().enumerate().take(count) {
            let example = self.example(row, sample);
            *label = example.map_or(0, |example| self.labels[example]);
            // Python's round, as torchvision's center_crop uses it.
            let centre = |whole: usize, part: usize| ((whole - part) as f64 / 2.0).round_ties_even() as i64;
            let (mut top, mut left, mut flip) = (centre(sh, h), centre(sw, w), false);
            if let Some(RandomCrop { pad, flip: may_flip, seed }) = crop {
                let words = draws(seed, step, sample, 0);
                let offset =
                    |word, whole: usize, part: usize| below(word, whole + 2 * pad as usize - part + 1) - i64::from(pad);
                (top, left) = (offset(words[0], sh, h), offset(words[1], sw, w));
                flip = may_flip && words[2] >> 31 == 1;
            }
            for (at, value) in x.iter_mut().skip(sample).step_by(n).enumerate() {
                let (channel, to_h, to_w) = (at / (h * w), at / w % h, at % w);
                let from = [to_h as i64 + top, (if flip { w - 1 - to_w } else { to_w }) as i64 + left];
                let inside = (0..sh as i64).contains(&from[0]) && (0..sw as i64).contains(&from[1]);
                *value = example.map_or(f32::NAN, |example| {
                    let at = ((example * c + channel) as i64 * sh as i64 + from[0]) * sw as i64 + from[1];
                    let byte = if inside { self.images[at as usize] } else { 0 };
                    (f32::from(byte) / SCALE - self.mean[channel]) / self.std[channel]
                });
            }
        }
        (x, labels)
    }

    fn shape(&self) -> GatherShape {
        GatherShape::new(self.stored, INPUT, BATCH).unwrap()
    }

    fn upload(&self, device: &Device, state: [u32; 2], count: usize) -> Uploaded {
        let shape = self.shape();
        Uploaded {
            images: device.upload(&self.images).unwrap(),
            labels: device.upload(&self.labels).unwrap(),
            order: device.upload(&self.order).unwrap(),
            state: device.upload(&state).unwrap(),
            count: device.upload(&[count as u32]).unwrap(),
            mean: device.upload(&self.mean).unwrap(),
            std: device.upload(&self.std).unwrap(),
            x: self.storage.unwritten(device, shape.output_len()),
            to_labels: device.upload(&vec![77u32; shape.samples()]).unwrap(),
        }
    }

    fn got(&self, device: &Device, state: [u32; 2], count: usize, crop: Option<RandomCrop>) -> (Vec<f32>, Vec<u32>) {
        let mut batch = self.upload(device, state, count);
        let (source, into) = batch.parts();
        gather(device, &self.shape(), source, crop, into).unwrap();
        (self.storage.read(device, &batch.x), device.read(batch.to_labels.view()).unwrap())
    }

    /// The same through the tables.
    fn resampled(&self, device: &Device, state: [u32; 2], count: usize, augment: Augment) -> Resampled {
        let (shape, mut batch) = (self.shape(), self.upload(device, state, count));
        let n = shape.samples();
        let mut boxes = device.upload(&vec![-7; n * GatherShape::BOX]).unwrap();
        let (mut factors, mut grey) = (unwritten(device, n * GatherShape::FACTORS), unwritten(device, n));
        draw(device, &shape, batch.state.view(), augment, boxes.view_mut(), factors.view_mut()).unwrap();
        let (source, into) = batch.parts();
        grey_means(device, &shape, source, boxes.view(), factors.view(), grey.view_mut()).unwrap();
        let colours = Colours { factors: factors.view(), grey: grey.view() };
        resample(device, &shape, source, boxes.view(), (augment.jitter > 0.0).then_some(colours), into).unwrap();
        Resampled {
            x: self.storage.read(device, &batch.x),
            labels: device.read(batch.to_labels.view()).unwrap(),
            grey: read(device, grey.view()),
        }
    }
}

struct Resampled {
    x: Vec<f32>,
    labels: Vec<u32>,
    grey: Vec<f32>,
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { 0x7fc0_0000 } else { value.to_bits() }).collect()
}

/// Batches of an order in which two examples do not exist.
fn broken(stored: [usize; 3]) -> Batches {
    let mut broken = Batches::new(stored);
    broken.order[BATCH + 2] = EXAMPLES as u32;
    broken.order[BATCH + 5] = u32::MAX;
    broken
}

#[test]
fn a_batch_is_cropped_flipped_and_normalised_as_the_formulas_say() {
    let (plain, broken, large) = (Batches::new([3, 5, 9]), broken([3, 5, 9]), Batches::new([3, 8, 14]));
    let seed = 0x1234_5678_9abc_def0;
    let cases = [
        ("plain", &plain, [0, 0], 13, None),
        ("ragged last batch", &plain, [2, 7], 6, None),
        ("no samples", &plain, [1, 7], 0, None),
        ("crop and flip", &plain, [1, 40], 13, Some(RandomCrop { pad: 2, flip: true, seed })),
        ("another step", &plain, [1, 41], 13, Some(RandomCrop { pad: 2, flip: true, seed })),
        ("crop beyond the image", &plain, [1, 41], 13, Some(RandomCrop { pad: 12, flip: false, seed: 3 })),
        ("flip alone", &plain, [2, 41], 13, Some(RandomCrop { pad: 0, flip: true, seed: 3 })),
        ("examples that do not exist", &broken, [1, 9], 13, Some(RandomCrop { pad: 1, flip: true, seed })),
        ("places that do not exist", &plain, [3, 9], 9, None),
        ("rows far away", &plain, [u32::MAX, 9], 9, None),
        ("centre of a larger image", &large, [1, 9], 13, None),
        ("crop of a larger image", &large, [1, 9], 13, Some(RandomCrop { pad: 0, flip: true, seed })),
        ("crop of a larger image, padded", &large, [2, 5], 7, Some(RandomCrop { pad: 1, flip: true, seed })),
    ];
    on_devices(|device, label| {
        let mut results = Vec::new();
        for (name, batches, state, count, crop) in &cases {
            let (x, labels) = batches.got(device, *state, *count, *crop);
            let (want, want_labels) = batches.want(*state, *count, *crop);
            assert_eq!(labels, want_labels, "{label}: {name}: labels");
            assert!(bits(&x) == bits(&want), "{label}: {name}: x");
            // All is f32 until x is rounded.
            let low = Batches { storage: Storage::Bf16, ..(*batches).clone() };
            let (x_low, labels_low) = low.got(device, *state, *count, *crop);
            assert!(
                bits(&x_low) == bits(&Storage::Bf16.rounded(want)) && labels_low == labels,
                "{label}: {name}: bf16"
            );
            results.extend([x, as_floats(&labels)]);
        }
        results
    });
}

#[test]
fn boxes_of_the_inputs_size_give_the_bits_of_a_crop() {
    let seed = 0x1234_5678_9abc_def0;
    on_devices(|device, label| {
        let mut results = Vec::new();
        for (batches, pad) in [(broken([3, 5, 9]), 2), (broken([3, 8, 14]), 0)] {
            for (state, count) in [([1, 40], 13), ([3, 40], 3)] {
                let crop = Crop::Padded { pad };
                let got = batches.resampled(device, state, count, Augment { crop, flip: true, jitter: 0.0, seed });
                let (x, labels) = batches.got(device, state, count, Some(RandomCrop { pad, flip: true, seed }));
                assert_eq!(got.labels, labels, "{label}: labels");
                assert!(bits(&got.x) == bits(&x), "{label}: pad {pad}, state {state:?}");
                let low = Batches { storage: Storage::Bf16, ..batches.clone() };
                let low = low.resampled(device, state, count, Augment { crop, flip: true, jitter: 0.0, seed });
                assert!(bits(&low.x) == bits(&Storage::Bf16.rounded(x)), "{label}: pad {pad}, state {state:?}: bf16");
                results.push(got.x);
            }
        }
        results
    });
}

#[test]
fn samples_without_an_image_show_whatever_is_drawn_for_them() {
    let batches = broken([3, 8, 14]);
    let n = BATCH.next_multiple_of(8);
    on_devices(|device, label| {
        let augment = Augment { crop: Crop::Resized, flip: true, jitter: 0.5, seed: 3 };
        let got = batches.resampled(device, [1, 4], 11, augment);
        for sample in 0..n {
            let mut values = got.x.iter().skip(sample).step_by(n);
            let example = batches.example(1, sample);
            match (sample < 11, example) {
                (false, _) => assert!(values.all(|value| value.to_bits() == 0), "{label}: padded sample {sample}"),
                (true, None) => assert!(values.all(|value| value.is_nan()), "{label}: sample {sample}"),
                (true, Some(_)) => assert!(values.all(|value| value.is_finite()), "{label}: sample {sample}"),
            }
            let exists = sample < 11 && example.is_some();
            assert_eq!(got.grey[sample] > 0.0, exists, "{label}: grey of sample {sample}: {}", got.grey[sample]);
            assert_eq!(got.labels[sample] > 0, exists, "{label}: label of sample {sample}");
        }
        vec![got.x, got.grey]
    });
}

#[test]
fn scaled_boxes_and_changed_colours_follow_torchvision() {
    let golden = Golden::open("augment");
    on_devices(|device, label| {
        let mut results = Vec::new();
        for case in golden.cases() {
            let (images, y) = (golden.get(&case, "images"), golden.get(&case, "y"));
            let (&[n, c, sh, sw], &[_, _, h, w]) = (&images.shape[..], &y.shape[..]) else {
                panic!("{case}: four dimensions");
            };
            let shape = GatherShape::new([c, sh, sw], [h, w], n).unwrap();
            let padded = |values: Vec<f64>, each: usize| {
                let mut values = values;
                values.resize(shape.samples() * each, 0.0);
                values
            };
            let floats = |values: &[f64]| device.upload(&values.iter().map(|&v| v as f32).collect::<Vec<_>>()).unwrap();
            let bytes: Vec<u8> = images.data.iter().map(|&byte| byte as u8).collect();
            let boxes = padded(golden.get(&case, "boxes").data, GatherShape::BOX);
            let boxes = device.upload(&boxes.iter().map(|&number| number as i32).collect::<Vec<_>>()).unwrap();
            let mut batch = Uploaded {
                images: device.upload(&bytes).unwrap(),
                labels: device.upload(&vec![1u32; n]).unwrap(),
                order: device.upload(&(0..n as u32).collect::<Vec<_>>()).unwrap(),
                state: device.upload(&[0u32, 0]).unwrap(),
                count: device.upload(&[n as u32]).unwrap(),
                mean: floats(&golden.get(&case, "mean").data),
                std: floats(&golden.get(&case, "std").data),
                x: Storage::F32.unwritten(device, shape.output_len()),
                to_labels: device.alloc(shape.samples()).unwrap(),
            };
            let (source, into) = batch.parts();
            let mut grey = unwritten(device, shape.samples());
            let factors = golden.find(&case, "factors").map(|f| floats(&padded(f.data, GatherShape::FACTORS)));
            if let Some(factors) = &factors {
                grey_means(device, &shape, source, boxes.view(), factors.view(), grey.view_mut()).unwrap();
                let got = read(device, grey.view());
                golden.get(&case, "grey").check(&got[..n], TOLERANCE, &format!("{label}: {case}: grey"));
            }
            let colours = factors.as_ref().map(|factors| Colours { factors: factors.view(), grey: grey.view() });
            resample(device, &shape, source, boxes.view(), colours, into).unwrap();
            let x = Storage::F32.read(device, &batch.x);
            y.check_samples_last(&x, TOLERANCE, &format!("{label}: {case}"));
            results.push(x);
        }
        results
    });
}

/// torchvision's RandomResizedCrop, with the draws of `kernels/augment_draw.cu`.
fn random_box([sh, sw]: [usize; 2], seed: u64, step: u32, sample: usize) -> [i32; 4] {
    let uniform = |word: u32, low: f64, high: f64| low + (high - low) * (f64::from(word) / 4_294_967_296.0);
    let log_most = (4.0f64 / 3.0).ln();
    for attempt in 0..10 {
        let words = draws(seed, step, sample, 2 + attempt);
        let area = (sh * sw) as f64 * uniform(words[0], 0.08, 1.0);
        let ratio = uniform(words[1], -log_most, log_most).exp();
        let side = |square: f64| square.sqrt().round_ties_even() as usize;
        let (width, height) = (side(area * ratio), side(area / ratio));
        if (1..=sw).contains(&width) && (1..=sh).contains(&height) {
            let (top, left) = (below(words[2], sh - height + 1), below(words[3], sw - width + 1));
            return [top as i32, left as i32, height as i32, width as i32];
        }
    }
    let ratio = sw as f64 / sh as f64;
    let (height, width) = match ratio {
        _ if ratio < 0.75 => ((sw as f64 / 0.75).round_ties_even() as usize, sw),
        _ if ratio > 4.0 / 3.0 => (sh, (sh as f64 * (4.0 / 3.0)).round_ties_even() as usize),
        _ => (sh, sw),
    };
    [((sh - height) / 2) as i32, ((sw - width) / 2) as i32, height as i32, width as i32]
}

/// Boxes and factors of a step.
fn drawn(device: &Device, shape: &GatherShape, step: u32, augment: Augment) -> (Vec<i32>, Vec<f32>) {
    let state = device.upload(&[0, step]).unwrap();
    let mut boxes = device.alloc(shape.samples() * GatherShape::BOX).unwrap();
    let mut factors = unwritten(device, shape.samples() * GatherShape::FACTORS);
    draw(device, shape, state.view(), augment, boxes.view_mut(), factors.view_mut()).unwrap();
    (device.read(boxes.view()).unwrap(), read(device, factors.view()))
}

#[test]
fn boxes_are_those_of_torchvisions_random_resized_crop() {
    // The second is so narrow that the first ten tries often fail; the last so small that its box is always all of it.
    let stored = [[40, 50], [60, 11], [7, 64], [224, 1], [1, 1]];
    on_devices(|device, label| {
        let mut results = Vec::new();
        for [sh, sw] in stored {
            let shape = GatherShape::new([3, sh, sw], [1, 1], 200).unwrap();
            for (step, seed) in [(0, 1), (77, u64::MAX - 5)] {
                let augment = Augment { crop: Crop::Resized, flip: false, jitter: 0.0, seed };
                let (boxes, factors) = drawn(device, &shape, step, augment);
                for (sample, got) in boxes.chunks_exact(GatherShape::BOX).enumerate() {
                    let want = random_box([sh, sw], seed, step, sample);
                    assert_eq!(got, [&want[..], &[0]].concat(), "{label}: {sh}x{sw}, sample {sample} of step {step}");
                    let [top, left, height, width] = want;
                    let inside = top >= 0 && left >= 0 && top + height <= sh as i32 && left + width <= sw as i32;
                    assert!(inside && height > 0 && width > 0, "{want:?} of {sh}x{sw}");
                }
                assert!(factors.iter().all(|&factor| factor == 1.0), "{label}: no jitter");
                results.push(boxes.iter().map(|&number| number as f32).collect());
            }
        }
        results
    });
}

/// Mean and largest distance of a value from 0 to 1 that should be uniform.
fn assert_uniform(name: &str, values: &[f64]) {
    let n = values.len() as f64;
    let mut cells = [0.0; 20];
    values.iter().for_each(|value| cells[((value * 20.0) as usize).min(19)] += 1.0);
    // Chi-squared of 20 cells has mean 19 and standard deviation 6.
    let chi_squared: f64 = cells.iter().map(|count: &f64| (count - n / 20.0).powi(2) / (n / 20.0)).sum();
    assert!(chi_squared < 50.0, "{name}: chi-squared {chi_squared}");
}

fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let (ma, mb) = (mean(a), mean(b));
    let sum = |f: &dyn Fn(f64, f64) -> f64| a.iter().zip(b).map(|(&a, &b)| f(a - ma, b - mb)).sum::<f64>();
    sum(&|a, b| a * b) / (sum(&|a, _| a * a) * sum(&|_, b| b * b)).sqrt()
}

#[test]
fn areas_ratios_places_flips_and_factors_are_uniform_and_independent() {
    let (side, n) = (10_000usize, 8192);
    let device = Device::open("host").unwrap();
    let shape = GatherShape::new([3, side, side], [1, 1], n).unwrap();
    let augment = Augment { crop: Crop::Resized, flip: true, jitter: 0.4, seed: 9 };
    let (boxes, factors) = drawn(&device, &shape, 3, augment);
    let mut columns: Vec<(String, Vec<f64>)> = Vec::new();
    let column = |f: &dyn Fn(&[i32]) -> f64| boxes.chunks_exact(GatherShape::BOX).map(f).collect::<Vec<f64>>();
    let (most, whole) = ((4.0f64 / 3.0).ln(), side as f64);
    let area = column(&|b| f64::from(b[2]) * f64::from(b[3]) / (whole * whole));
    let ratio = column(&|b| (f64::from(b[3]) / f64::from(b[2])).ln() / (2.0 * most) + 0.5);
    assert!(area.iter().all(|area| (0.0799..=1.0).contains(area)), "areas within the bounds");
    assert!(ratio.iter().all(|ratio| (-0.001..=1.001).contains(ratio)), "ratios within the bounds");
    // Only boxes that fit are taken, so large ones are rarer and areas not quite uniform; up to half of the image all fit.
    let half: Vec<f64> = area.iter().filter(|&&area| area < 0.5).map(|area| (area - 0.08) / 0.42).collect();
    assert_uniform("area", &half);
    columns.push(("area".into(), area));
    columns.push(("ratio".into(), ratio));
    for (name, place, size) in [("top", 0, 2), ("left", 1, 3)] {
        let share = column(&|b| f64::from(b[place]) / (whole - f64::from(b[size]) + 1.0));
        assert_uniform(name, &share);
        columns.push((name.into(), share));
    }
    let flips = column(&|b| f64::from(b[4]));
    assert!((flips.iter().sum::<f64>() / n as f64 - 0.5).abs() < 0.025, "half of the images are flipped");
    columns.push(("flip".into(), flips));
    for (i, name) in ["brightness", "contrast", "saturation"].into_iter().enumerate() {
        let share: Vec<f64> =
            factors.iter().skip(i).step_by(3).map(|&factor| (f64::from(factor) - 0.6) / 0.8).collect();
        assert!(share.iter().all(|share| (-1e-6..=1.000001).contains(share)), "{name} within the bounds");
        assert_uniform(name, &share);
        columns.push((name.into(), share));
    }
    for (i, (a, x)) in columns.iter().enumerate() {
        for (b, y) in &columns[..i] {
            // Standard deviation 1 / sqrt(n) = 0.011 if they are independent.
            let r = correlation(x, y);
            assert!(r.abs() < 0.055, "{a} and {b}: correlation {r}");
        }
    }
}

#[test]
fn offsets_are_uniform_and_half_of_the_images_are_flipped() {
    // Pixel (h, w) of the one image is byte 16h + w, so two pixels of a sample tell its crop and its flip.
    let (pad, batch) = (4i64, 8192);
    let device = Device::open("host").unwrap();
    let shape = GatherShape::new([1, 16, 16], [16, 16], batch).unwrap();
    let mut uploaded = Uploaded {
        images: device.upload(&(0..=255u8).collect::<Vec<_>>()).unwrap(),
        labels: device.alloc(1).unwrap(),
        order: device.alloc(batch).unwrap(),
        state: device.upload(&[0u32, 5]).unwrap(),
        count: device.upload(&[batch as u32]).unwrap(),
        mean: device.upload(&[0.0f32]).unwrap(),
        std: device.upload(&[1.0f32 / SCALE]).unwrap(),
        x: Storage::F32.unwritten(&device, shape.output_len()),
        to_labels: device.alloc(batch).unwrap(),
    };
    let (source, into) = uploaded.parts();
    gather(&device, &shape, source, Some(RandomCrop { pad: pad as u32, flip: true, seed: 1 }), into).unwrap();
    let x = Storage::F32.read(&device, &uploaded.x);

    let mut drawn = vec![0usize; 9 * 9 * 2];
    for sample in 0..batch {
        let at = |h: usize, w: usize| x[(h * 16 + w) * batch + sample].round() as i64;
        let flip = at(8, 7) > at(8, 8);
        let (top, left) = (at(8, 8) / 16 - 8 + pad, at(8, 8) % 16 - if flip { 7 } else { 8 } + pad);
        drawn[((top * 9 + left) * 2 + i64::from(flip)) as usize] += 1;
    }
    // 162 cells, 51 draws each: chi-squared has mean 161 and standard deviation 18.
    let mean = batch as f64 / 162.0;
    let chi_squared: f64 = drawn.iter().map(|&count| (count as f64 - mean).powi(2) / mean).sum();
    assert!((100.0..230.0).contains(&chi_squared), "chi-squared {chi_squared}");
    let flipped: usize = drawn.iter().skip(1).step_by(2).sum();
    assert!(flipped.abs_diff(batch / 2) < 200, "{flipped} of {batch} are flipped");
}

#[test]
fn batches_of_the_wrong_size_are_refused_by_name() {
    let device = Device::open("host").unwrap();
    let batches = Batches::new([3, 8, 14]);
    let (shape, n) = (batches.shape(), BATCH.next_multiple_of(8));
    let mut batch = batches.upload(&device, [0, 0], 13);
    batch.images = device.alloc(EXAMPLES * 3 * 8 * 14 - 1).unwrap();
    let (source, into) = batch.parts();
    let error = gather(&device, &shape, source, None, into).unwrap_err().to_string();
    assert!(error.contains("elements of images: expected 6720, got 6719"), "{error}");

    let mut batch = batches.upload(&device, [0, 0], 13);
    let (source, _) = batch.parts();
    let (boxes, short) = (device.alloc(n * 5).unwrap(), device.alloc::<i32>(n * 5 - 1).unwrap());
    let (factors, mut grey) = (device.alloc(n * 3).unwrap(), device.alloc(n).unwrap());
    let error = grey_means(&device, &shape, source, short.view(), factors.view(), grey.view_mut()).unwrap_err();
    assert!(error.to_string().contains("elements of boxes: expected 80, got 79"), "{error}");
    let two = GatherShape::new([2, 8, 14], INPUT, BATCH).unwrap();
    let error = grey_means(&device, &two, source, boxes.view(), factors.view(), grey.view_mut()).unwrap_err();
    assert!(error.to_string().contains("expected 1 or 3, got 2"), "{error}");

    let (state, mut boxes, mut factors) = (device.alloc(2).unwrap(), boxes, factors);
    for (crop, jitter, what) in [
        (Crop::Padded { pad: 1 << 20 }, 0.0, "padding"),
        (Crop::Resized, -1.0, "jitter"),
        (Crop::Resized, f32::NAN, "jitter"),
    ] {
        let augment = Augment { crop, flip: true, jitter, seed: 0 };
        let error = draw(&device, &shape, state.view(), augment, boxes.view_mut(), factors.view_mut()).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    }
    for (stored, input, batch) in [
        ([0, 2, 2], [2, 2], 3),
        ([1, 2, 2], [2, 2], 0),
        ([1, 1 << 20, 2], [2, 2], 3),
        ([1, 2, 2], [3, 2], 3),
        ([1, 2, 2], [2, 3], 3),
    ] {
        assert!(GatherShape::new(stored, input, batch).is_err(), "{stored:?} {input:?} {batch}");
    }
}

#[test]
fn trainings_take_every_augmentation_and_refuse_jitter_without_one() {
    let folder = tempfile::tempdir().unwrap();
    let train = |out, options: &[&'static str]| {
        [&["train", "--out", out, "--set", "widths=[4,8,16]", "--limit", "40", "--steps", "3", "-q"], options].concat()
    };
    let mut losses = Vec::new();
    for (out, options) in [
        ("a", &["--augment", "none"][..]),
        ("b", &["--augment", "standard"]),
        ("c", &["--augment", "standard", "--jitter", "0.4"]),
        ("d", &["--augment", "resized-crop"]),
        ("e", &["--augment", "resized-crop", "--jitter", "0.4"]),
    ] {
        losses.push(json(folder.path(), &train(out, options))["loss"].as_f64().unwrap());
    }
    losses.dedup();
    assert_eq!(losses.len(), 5, "each sees other images: {losses:?}");
    let crop = json(folder.path(), &train("f", &["--augment", "crop"]))["loss"].as_f64().unwrap();
    assert_eq!(crop, losses[1], "standard is a crop where images are stored in the input's size");
    for options in [&["--augment", "none", "--jitter", "0.4"][..], &["--augment", "crop", "--jitter", "-1"]] {
        fails(folder.path(), &train("g", options), 2, &["jitter", options[3]]);
    }
}
