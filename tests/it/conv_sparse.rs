//! Convolution with kept weights alone, against the same convolution with zeros in their places, which has its goldens.

use dilt::device::{Buffer, Device, HostOptions, Precision};
use dilt::mask::Mask;
use dilt::nn::config::ModelConfig;
use dilt::nn::init;
use dilt::nn::network::Network;
use dilt::nn::paths::{Choice, Planning};
use dilt::nn::ways::Way;
use dilt::ops::Columns;
use dilt::ops::conv::{Bias, ConvShape, conv_forward, conv_input_gradient, conv_weight_gradient};
use dilt::ops::conv_sparse::{
    GROUP_ROWS, Kept, KeptWeights, Pass, RowGroups, conv_sparse_forward, conv_sparse_input_gradient,
    conv_sparse_weight_gradient,
};
use dilt::train::Recipe;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::support::{on_devices, read, unwritten};
use crate::training::Descent;

/// Of the largest value, since the sums are the same in another order.
const TOLERANCE: f32 = 2e-6;

/// Strides with and without taps of every remainder, images smaller than the filter's reach, ragged samples, more
/// columns than a group and more entries of a row than a chunk.
fn shapes() -> Vec<ConvShape> {
    [
        ([16, 8, 8], 16, [3, 3], 1, 1, 128),
        ([5, 7, 6], 9, [3, 3], 2, 1, 24),
        ([3, 2, 1], 4, [3, 3], 1, 1, 8),
        ([4, 9, 9], 3, [5, 3], 3, 2, 16),
        ([6, 8, 8], 10, [1, 1], 2, 0, 40),
        ([3, 11, 13], 5, [7, 7], 2, 3, 8),
        ([90, 1, 1], 70, [1, 1], 1, 0, 328),
        ([1, 1, 1], 1, [1, 1], 1, 0, 8),
        ([2, 3, 3], 3, [2, 2], 1, 0, 136),
    ]
    .map(|(input, filters, filter, stride, pad, n)| ConvShape::new(input, filters, filter, stride, pad, n).unwrap())
    .into_iter()
    // A sanitizer sees as much in the small ones, and takes minutes for the others.
    .filter(|shape| !cfg!(dilt_sanitize) || shape.input_len() + shape.output_len() < 8000)
    .collect()
}

/// Places that are kept: none, all, at random, and whole rows and columns of a few.
fn masks(shape: &ConvShape, rng: &mut ChaCha8Rng) -> Vec<(&'static str, Vec<u32>)> {
    let (len, taps) = (shape.weight_len() as u32, (shape.weight_len() / shape.filters()) as u32);
    let mut random = |density: f64| (0..len).filter(|_| rng.random_bool(density)).collect::<Vec<_>>();
    let (half, few) = (random(0.5), random(0.05));
    let clustered = (0..len).filter(|place| (place / taps) % 3 == 1 && (place % taps) % 4 < 2).collect();
    vec![("none", vec![]), ("all", (0..len).collect()), ("half", half), ("few", few), ("clustered", clustered)]
}

fn close(got: &[f32], want: &[f32], what: &str) {
    close_within(TOLERANCE, got, want, what);
}

fn close_within(tolerance: f32, got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(1e-3f32, |most, value| most.max(value.abs()));
    let worst = got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max);
    // Not a comparison that a NaN would pass.
    assert!(worst <= tolerance * largest, "{what}: off by {worst} where the largest is {largest}");
    assert!(got.iter().all(|value| value.is_finite()), "{what}: not finite");
}

#[test]
fn kept_weights_give_what_masked_ones_give_in_every_pass() {
    on_devices(|device, label| {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut results = Vec::new();
        for shape in shapes() {
            for (name, kept) in masks(&shape, &mut rng) {
                let what = format!("{label}: {shape:?}, {name}");
                let mut values = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0..1.0)).collect() };
                let [x, dy, bias] = [shape.input_len(), shape.output_len(), shape.filters()].map(&mut values);
                let full = values(shape.weight_len());
                let mut w = vec![0.0; full.len()];
                kept.iter().for_each(|&place| w[place as usize] = full[place as usize]);
                let groups = RowGroups { outputs: grouped(shape.filters()), inputs: grouped(shape.channels()) };
                for groups in [None, Some(&groups)] {
                    let what = format!("{what}, groups {}", groups.is_some());
                    results.extend(compare(device, &shape, &kept, groups, [&x, &dy, &bias, &w], &what));
                }
            }
        }
        results
    });
}

/// Every third row beside each other, in groups of several sizes.
fn grouped(rows: usize) -> Vec<Vec<usize>> {
    let order: Vec<usize> = (0..3).flat_map(|first| (first..rows).step_by(3)).collect();
    let (few, rest) = order.split_at(rows.min(3));
    [few].into_iter().chain(rest.chunks(GROUP_ROWS)).map(<[usize]>::to_vec).collect()
}

fn compare(
    device: &Device,
    shape: &ConvShape,
    kept: &[u32],
    groups: Option<&RowGroups>,
    [x, dy, bias, w]: [&Vec<f32>; 4],
    what: &str,
) -> Vec<Vec<f32>> {
    let [x, dy, bias, w] = [x, dy, bias, w].map(|values| device.upload(values).unwrap());
    let mut weights = KeptWeights::new(device, shape, &all(kept), groups, &Pass::ALL).unwrap();
    weights.gather(device, w.view()).unwrap();
    let mut results = Vec::new();

    // One true sample less than columns, where there is a bias.
    let n = shape.output_len() / shape.filters() / shape.output_image().iter().product::<usize>();
    let count = device.upload(&[n as u32 - 1]).unwrap();
    let columns = Columns::samples(n).unwrap();
    for with in [None, Some(Bias { bias: bias.view(), columns, count: count.view() })] {
        let (mut y, mut want) = (unwritten(device, shape.output_len()), unwritten(device, shape.output_len()));
        conv_sparse_forward(device, &weights, x.view(), with, y.view_mut()).unwrap();
        conv_forward(device, shape, x.view().into(), w.view().into(), with, want.view_mut().into()).unwrap();
        let y = read(device, y.view());
        close(&y, &read(device, want.view()), &format!("{what}: y, bias {}", with.is_some()));
        results.push(y);
    }

    let (mut dx, mut want) = (unwritten(device, shape.input_len()), unwritten(device, shape.input_len()));
    for accumulate in [false, true] {
        conv_sparse_input_gradient(device, &weights, dy.view(), accumulate, dx.view_mut()).unwrap();
        conv_input_gradient(device, shape, dy.view().into(), w.view().into(), accumulate, want.view_mut().into())
            .unwrap();
        let dx = read(device, dx.view());
        close(&dx, &read(device, want.view()), &format!("{what}: dx, accumulate {accumulate}"));
        results.push(dx);
    }

    let mut dw = device.alloc(shape.weight_len()).unwrap();
    conv_sparse_weight_gradient(device, &mut weights, x.view(), dy.view(), dw.view_mut()).unwrap();
    same_packed(device, shape, kept, groups, [&x, &dy, &w, &dw], &results, what);
    let mut scratch = unwritten(device, shape.gradient_scratch_len(device, Precision::F32));
    let mut dense = unwritten(device, shape.weight_len());
    conv_weight_gradient(device, shape, x.view().into(), dy.view().into(), scratch.view_mut(), dense.view_mut())
        .unwrap();
    let (dw, dense) = (read(device, dw.view()), read(device, dense.view()));
    let mut want = vec![0.0; dense.len()];
    kept.iter().for_each(|&place| want[place as usize] = dense[place as usize]);
    close(&dw, &want, &format!("{what}: dw"));
    results.push(dw);
    results
}

fn all(places: &[u32]) -> Kept<'_> {
    Kept { places, packed: false }
}

/// Where memory holds the kept weights alone, the results are the same bit by bit: y, dx, dw.
fn same_packed(
    device: &Device,
    shape: &ConvShape,
    kept: &[u32],
    groups: Option<&RowGroups>,
    [x, dy, w, dw]: [&Buffer<f32>; 4],
    results: &[Vec<f32>],
    what: &str,
) {
    let of_kept = |buffer: &Buffer<f32>| -> Vec<f32> {
        let whole = device.read(buffer.view()).unwrap();
        kept.iter().map(|&place| whole[place as usize]).collect()
    };
    let packed = Kept { places: kept, packed: true };
    let mut weights = KeptWeights::new(device, shape, &packed, groups, &Pass::ALL).unwrap();
    assert_eq!(weights.weight_len(), kept.len());
    weights.gather(device, device.upload(&of_kept(w)).unwrap().view()).unwrap();
    let (mut y, mut dx) = (unwritten(device, shape.output_len()), unwritten(device, shape.input_len()));
    let mut own = unwritten(device, kept.len());
    conv_sparse_forward(device, &weights, x.view(), None, y.view_mut()).unwrap();
    conv_sparse_input_gradient(device, &weights, dy.view(), false, dx.view_mut()).unwrap();
    conv_sparse_weight_gradient(device, &mut weights, x.view(), dy.view(), own.view_mut()).unwrap();
    assert!(read(device, y.view()) == results[0] && read(device, dx.view()) == results[2], "{what}: packed");
    assert_eq!(read(device, own.view()), of_kept(dw), "{what}: packed dw");
}

#[test]
fn lists_that_make_no_sense_are_refused_by_name() {
    let device = Device::open("host").unwrap();
    let shape = ConvShape::new([2, 3, 3], 3, [2, 2], 1, 0, 8).unwrap();
    let refused =
        |kept: &[u32]| KeptWeights::new(&device, &shape, &all(kept), None, &Pass::ALL).err().unwrap().to_string();
    assert!(refused(&[3, 3]).contains("ascending"), "{}", refused(&[3, 3]));
    assert!(refused(&[5, 24]).contains("below 24"), "{}", refused(&[5, 24]));
    let far = ConvShape::new([600, 128, 128], 3, [1, 1], 1, 0, 128).unwrap();
    let error = KeptWeights::new(&device, &far, &all(&[0]), None, &Pass::ALL).err().unwrap().to_string();
    assert!(error.contains("2^30"), "{error}");

    let missing = RowGroups { outputs: vec![vec![0, 2]], inputs: vec![vec![0, 1]] };
    let error = KeptWeights::new(&device, &shape, &all(&[0]), Some(&missing), &Pass::ALL).err().unwrap().to_string();
    assert!(error.contains("groups of output channels: expected each of 3"), "{error}");

    let mut weights = KeptWeights::new(&device, &shape, &all(&[0, 5]), None, &[Pass::Forward]).unwrap();
    let mut dx = device.alloc(shape.input_len()).unwrap();
    let (short, dy) = (device.alloc::<f32>(3).unwrap(), device.alloc(shape.output_len()).unwrap());
    let error = weights.gather(&device, short.view()).unwrap_err().to_string();
    assert!(error.contains("w: expected 24, got 3"), "{error}");
    let error = conv_sparse_input_gradient(&device, &weights, dy.view(), false, dx.view_mut()).unwrap_err().to_string();
    assert!(error.contains("expected lists for the pass InputGradient"), "{error}");
    let error = conv_sparse_forward(&device, &weights, short.view(), None, dx.view_mut()).unwrap_err().to_string();
    assert!(error.contains("x: expected"), "{error}");
}

/// The host's way multiplies kept weights alone, a GPU's way on the host all of them.
#[test]
#[cfg_attr(dilt_sanitize, ignore = "minutes, and the kernels are those of the test above")]
fn ten_steps_with_kept_weights_alone_are_those_with_zeros_in_their_place() {
    let device = Device::host(HostOptions::default()).unwrap();
    let vit = ["image=[3,16,16]", "patch=4", "dim=24", "depth=2", "heads=3", "classes=7"];
    let bottlenecks = ["classes=3", "image=[2,16,16]", "widths=[8,16]", "stages=[2,1]"];
    for (name, set) in [("resnet8", &[][..]), ("resnet18", &bottlenecks), ("resnet50", &bottlenecks), ("vit", &vit)] {
        let set: Vec<String> = set.iter().map(|text| (*text).into()).collect();
        let model = ModelConfig::load(name, &set).unwrap().build().unwrap();
        let mut weights = init::draw(&model, 3);
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        for parameter in model.prunable() {
            let mask = Mask::from_fn(&parameter.shape, |_| rng.random_bool(0.1));
            weights.masks.insert(parameter.name.clone(), mask);
        }
        let (samples, pixels) = (20, model.image.iter().product::<usize>());
        let mut batch = || -> (Vec<f32>, Vec<u32>) {
            // Samples last, padded with zeros.
            let x =
                (0..pixels * 24).map(|i| if i % 24 < samples { rng.random_range(-1.0..1.0) } else { 0.0 }).collect();
            (x, (0..samples as u32).map(|i| i % model.classes as u32).collect())
        };
        let batches: Vec<_> = (0..10).map(|_| batch()).collect();
        let optimizer = Recipe::default().optimizer();
        let descent = Descent { model: &model, weights: &weights, samples, steps: 10, rate: 0.05, optimizer };
        let [kept, masked] = [Planning::Table, Planning::Dense].map(|planning| {
            let masks = &weights.masks;
            let network = Network::for_masks(&device, &model, masks, samples, descent.memory(), &planning).unwrap();
            let (losses, network) = descent.run_in(network, |step| batches[step].clone(), |_, _| {});
            let is_sparse = |choice: &&Choice| choice.ways.iter().any(|way| *way != Way::Dense);
            let sparse = network.choices().iter().flatten().filter(is_sparse).count();
            (losses, sparse, network.weights().unwrap())
        });
        // In resnet8, one layer is too small for its list to pay.
        assert!(kept.1 + 1 >= model.prunable().count() && masked.1 == 0, "{name}: {} layers of kept weights", kept.1);
        for (step, (got, want)) in kept.0.iter().zip(&masked.0).enumerate() {
            assert!((got - want).abs() <= 1e-5 * want.abs(), "{name}: loss of step {step}: {got}, expected {want}");
        }
        for (tensor, want) in &masked.2.tensors {
            let got = kept.2.tensors[tensor].as_slice().unwrap();
            let want = want.as_slice().unwrap();
            close_within(1e-4, got, want, &format!("{name}: {tensor}"));
        }
        for (tensor, mask) in &weights.masks {
            let pruned = kept.2.tensors[tensor].iter().zip(mask.iter()).filter(|(_, kept)| !kept);
            assert!(
                pruned.map(|(w, _)| w).all(|w| w.to_bits() == 0),
                "a pruned weight of {tensor} is not exactly zero"
            );
        }
    }
}
