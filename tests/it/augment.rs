//! Gathering batches, against a plain reference that draws from its own Philox.

use dilt::device::Device;
use dilt::ops::augment::{Augment, GatherShape, GatherSource, Normalise, gather};

use crate::support::{as_floats, on_devices, read, unwritten};

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

/// A chunk of three steps of at most 13 samples, of images of 9 columns: more than a staged block has.
struct Batches {
    images: Vec<u8>,
    labels: Vec<u32>,
    order: Vec<u32>,
    mean: Vec<f32>,
    std: Vec<f32>,
}

const IMAGE: [usize; 3] = [3, 5, 9];
const EXAMPLES: usize = 20;
const BATCH: usize = 13;
const SCALE: f32 = 255.0;

impl Batches {
    fn new() -> Self {
        let pixels: usize = IMAGE.iter().product();
        Batches {
            images: (0..EXAMPLES * pixels).map(|i| philox([1, 0], [i as u32, 0, 0, 0])[0] as u8).collect(),
            labels: (0..EXAMPLES).map(|i| 100 + i as u32).collect(),
            order: (0..3 * BATCH).map(|i| (i * 7 % EXAMPLES) as u32).collect(),
            mean: vec![0.5, 0.25, 0.1],
            std: vec![0.2, 0.3, 0.7],
        }
    }

    /// x and labels of a step, by the formulas.
    fn want(&self, [row, step]: [u32; 2], count: usize, augment: Option<Augment>) -> (Vec<f32>, Vec<u32>) {
        let [c, h, w] = IMAGE.map(|size| size as i64);
        let n = BATCH.next_multiple_of(8);
        let (mut x, mut labels) = (vec![0.0; (c * h * w) as usize * n], vec![0; n]);
        for (sample, label) in labels.iter_mut().enumerate().take(count) {
            let example = self.order.get(row as usize * BATCH + sample).map_or(EXAMPLES, |&example| example as usize);
            let exists = example < EXAMPLES;
            *label = if exists { self.labels[example] } else { 0 };
            let (mut top, mut left, mut flip) = (0, 0, false);
            if let Some(Augment { pad, flip: may_flip, seed }) = augment {
                let words = philox([seed as u32, (seed >> 32) as u32], [step, 0, sample as u32, 0]);
                let offset = |word: u32| ((u64::from(word) * u64::from(2 * pad + 1)) >> 32) as i64 - i64::from(pad);
                (top, left, flip) = (offset(words[0]), offset(words[1]), may_flip && words[2] >> 31 == 1);
            }
            for (at, value) in x.iter_mut().skip(sample).step_by(n).enumerate() {
                let (channel, to_h, to_w) = (at as i64 / (h * w), at as i64 / w % h, at as i64 % w);
                let (from_h, from_w) = (to_h + top, if flip { w - 1 - to_w } else { to_w } + left);
                let inside = (0..h).contains(&from_h) && (0..w).contains(&from_w) && exists;
                let byte = match inside {
                    true => self.images[(((example as i64 * c + channel) * h + from_h) * w + from_w) as usize],
                    false => 0,
                };
                let channel = channel as usize;
                *value =
                    if exists { (f32::from(byte) / SCALE - self.mean[channel]) / self.std[channel] } else { f32::NAN };
            }
        }
        (x, labels)
    }

    fn got(&self, device: &Device, state: [u32; 2], count: usize, augment: Option<Augment>) -> (Vec<f32>, Vec<u32>) {
        let shape = GatherShape::new(IMAGE, BATCH).unwrap();
        let (images, labels) = (device.upload(&self.images).unwrap(), device.upload(&self.labels).unwrap());
        let (order, state) = (device.upload(&self.order).unwrap(), device.upload(&state).unwrap());
        let count = device.upload(&[count as u32]).unwrap();
        let (mean, std) = (device.upload(&self.mean).unwrap(), device.upload(&self.std).unwrap());
        let mut x = unwritten(device, shape.output_len());
        let mut to_labels = device.upload(&vec![77u32; shape.samples()]).unwrap();
        let source = GatherSource {
            images: images.view(),
            labels: labels.view(),
            order: order.view(),
            state: state.view(),
            count: count.view(),
        };
        let normalise = Normalise { scale: SCALE, mean: mean.view(), std: std.view() };
        gather(device, &shape, source, normalise, augment, x.view_mut(), to_labels.view_mut()).unwrap();
        (read(device, x.view()), device.read(to_labels.view()).unwrap())
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { 0x7fc0_0000 } else { value.to_bits() }).collect()
}

#[test]
fn a_batch_is_cropped_flipped_and_normalised_as_the_formulas_say() {
    let plain = Batches::new();
    let mut broken = Batches::new();
    broken.order[BATCH + 2] = EXAMPLES as u32;
    broken.order[BATCH + 5] = u32::MAX;
    let seed = 0x1234_5678_9abc_def0;
    let cases = [
        ("plain", &plain, [0, 0], 13, None),
        ("ragged last batch", &plain, [2, 7], 6, None),
        ("no samples", &plain, [1, 7], 0, None),
        ("crop and flip", &plain, [1, 40], 13, Some(Augment { pad: 2, flip: true, seed })),
        ("another step", &plain, [1, 41], 13, Some(Augment { pad: 2, flip: true, seed })),
        ("crop beyond the image", &plain, [1, 41], 13, Some(Augment { pad: 12, flip: false, seed: 3 })),
        ("flip alone", &plain, [2, 41], 13, Some(Augment { pad: 0, flip: true, seed: 3 })),
        ("examples that do not exist", &broken, [1, 9], 13, Some(Augment { pad: 1, flip: true, seed })),
        ("places that do not exist", &plain, [3, 9], 9, None),
        ("rows far away", &plain, [u32::MAX, 9], 9, None),
    ];
    on_devices(|device, label| {
        let mut results = Vec::new();
        for (name, batches, state, count, augment) in &cases {
            let (x, labels) = batches.got(device, *state, *count, *augment);
            let (want, want_labels) = batches.want(*state, *count, *augment);
            assert_eq!(labels, want_labels, "{label}: {name}: labels");
            assert!(bits(&x) == bits(&want), "{label}: {name}: x");
            results.extend([x, as_floats(&labels)]);
        }
        results
    });
}

#[test]
fn offsets_are_uniform_and_half_of_the_images_are_flipped() {
    // Pixel (h, w) of the one image is byte 16h + w, so two pixels of a sample tell its crop and its flip.
    let (pad, batch) = (4i64, 8192);
    let device = Device::open("host").unwrap();
    let shape = GatherShape::new([1, 16, 16], batch).unwrap();
    let images = device.upload(&(0..=255u8).collect::<Vec<_>>()).unwrap();
    let (label, order) = (device.alloc::<u32>(1).unwrap(), device.alloc::<u32>(batch).unwrap());
    let (state, count) = (device.upload(&[0u32, 5]).unwrap(), device.upload(&[batch as u32]).unwrap());
    let (mean, std) = (device.upload(&[0.0f32]).unwrap(), device.upload(&[1.0f32]).unwrap());
    let (mut x, mut labels) = (unwritten(&device, shape.output_len()), device.alloc::<u32>(batch).unwrap());
    let source = GatherSource {
        images: images.view(),
        labels: label.view(),
        order: order.view(),
        state: state.view(),
        count: count.view(),
    };
    let normalise = Normalise { scale: 1.0, mean: mean.view(), std: std.view() };
    let augment = Some(Augment { pad: pad as u32, flip: true, seed: 1 });
    gather(&device, &shape, source, normalise, augment, x.view_mut(), labels.view_mut()).unwrap();
    let x = read(&device, x.view());

    let mut drawn = vec![0usize; 9 * 9 * 2];
    for sample in 0..batch {
        let at = |h: usize, w: usize| x[(h * 16 + w) * batch + sample] as i64;
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
    let shape = GatherShape::new([1, 2, 2], 3).unwrap();
    let (images, labels) = (device.alloc::<u8>(11).unwrap(), device.alloc::<u32>(3).unwrap());
    let (state, one) = (device.alloc::<u32>(2).unwrap(), device.alloc::<u32>(1).unwrap());
    let mean = device.alloc::<f32>(1).unwrap();
    let (mut x, mut to) = (device.alloc::<f32>(32).unwrap(), device.alloc::<u32>(8).unwrap());
    let source = GatherSource {
        images: images.view(),
        labels: labels.view(),
        order: labels.view(),
        state: state.view(),
        count: one.view(),
    };
    let normalise = Normalise { scale: 1.0, mean: mean.view(), std: mean.view() };
    let error = gather(&device, &shape, source, normalise, None, x.view_mut(), to.view_mut()).unwrap_err().to_string();
    assert!(error.contains("elements of images: expected 12, got 11"), "{error}");
    for (image, batch) in [([0, 2, 2], 3), ([1, 2, 2], 0), ([1, 1 << 20, 2], 3)] {
        assert!(GatherShape::new(image, batch).is_err(), "{image:?} {batch}");
    }
}
