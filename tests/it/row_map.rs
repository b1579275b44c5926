//! Norms and shortcuts between values that have other features left in them: what the whole ones give, row by row.

use dilt::device::{Buffer, Device};
use dilt::ops::norm::{
    NormAffine, NormBackward, NormGradient, NormGradients, NormInput, NormRunning, NormSaved, NormShape, Normalised,
    Normed, norm_apply, norm_backward, norm_eval, norm_forward,
};
use dilt::ops::pointwise::{ShortcutShape, shortcut_backward, shortcut_forward};
use dilt::ops::row_map::RowMap;

use crate::support::{on_devices, read, unwritten};

/// Rows of y, and of each the row of x.
const SOURCE: [Option<usize>; 5] = [None, Some(1), Some(0), None, Some(2)];

fn values(seed: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i + seed).wrapping_mul(2_654_435_761) % 2003) as f32 / 1001.0 - 1.0).collect()
}

/// `[rows, pixels, n]` with zeros in padded samples.
fn tensor(seed: usize, rows: usize, pixels: usize, n: usize, count: usize) -> Vec<f32> {
    let values = values(seed, rows * pixels * n);
    values.into_iter().enumerate().map(|(i, value)| if i % n < count { value } else { 0.0 }).collect()
}

fn rows(of: &[f32], count: usize, which: impl Iterator<Item = usize>) -> Vec<f32> {
    let row = of.len() / count;
    which.flat_map(|i| of[i * row..(i + 1) * row].to_vec()).collect()
}

#[test]
fn a_norm_writes_its_rows_among_those_of_the_residual() {
    let targets: Vec<usize> = (0..3).map(|x| SOURCE.iter().position(|source| *source == Some(x)).unwrap()).collect();
    on_devices(|device, label| {
        let mut results = Vec::new();
        for (pixels, n, count, residual, relu) in
            [(6, 8, 5, true, true), (6, 8, 8, false, true), (700, 16, 13, true, true), (9, 24, 17, true, false)]
        {
            let what = format!("{label}: {pixels} pixels, {n} samples, residual {residual}, relu {relu}");
            let shape = NormShape::new(3, pixels, n).unwrap();
            let (row, all) = (pixels * n, 5 * pixels * n);
            let upload = |values: &[f32]| device.upload(values).unwrap();
            let (x, added) = (tensor(1, 3, pixels, n, count), tensor(2, 5, pixels, n, count));
            let dy = tensor(3, 5, pixels, n, count);
            let (gamma, beta) = (upload(&[0.7, -1.2, 0.4]), upload(&[0.1, 0.2, -0.3]));
            let counted = device.upload(&[count as u32]).unwrap();
            let map = RowMap::new(device, 3, &SOURCE).unwrap();
            // The same of the rows that x has, without a map; x in the order of its rows.
            let pass = |map: Option<&RowMap>, added: &[f32], dy: &[f32], eval: bool| {
                let (x, added, mut dy) = (upload(&x), upload(added), upload(dy));
                let len = dy.len();
                let input = NormInput {
                    x: x.view().into(),
                    residual: residual.then(|| added.view().into()),
                    relu,
                    map,
                    count: counted.view(),
                };
                let affine = NormAffine { gamma: gamma.view(), beta: beta.view(), epsilon: 1e-5 };
                let (mut y, mut scratch) = (unwritten(device, len), unwritten(device, shape.scratch_len()));
                let (mut mean, mut var) = (upload(&[0.5; 3]), upload(&[2.0; 3]));
                if eval {
                    norm_eval(device, &shape, input, affine, mean.view(), var.view(), y.view_mut().into()).unwrap();
                    return vec![read(device, y.view())];
                }
                let (mut saved, mut invstd) = (unwritten(device, 3), unwritten(device, 3));
                let running = NormRunning { mean: mean.view_mut(), var: var.view_mut(), momentum: 0.1 };
                let kept = NormSaved { mean: saved.view_mut(), invstd: invstd.view_mut() };
                let to = y.view_mut().into();
                norm_forward(device, &shape, input, affine, running, kept, scratch.view_mut(), to).unwrap();
                let mut again = unwritten(device, len);
                let (mean_of_x, to) = (saved.view(), again.view_mut().into());
                norm_apply(device, &shape, input, affine, mean_of_x, invstd.view(), to).unwrap();
                assert_eq!(read(device, again.view()), read(device, y.view()), "{what}: by what was saved");
                let backward = NormBackward {
                    normed: Normed {
                        norm: Normalised {
                            x: x.view().into(),
                            gamma: gamma.view(),
                            beta: beta.view(),
                            mean: saved.view(),
                            invstd: invstd.view(),
                        },
                        y: input.residual.map(|_| y.view().into()),
                        relu,
                        map,
                    },
                    dy: match residual {
                        true => NormGradient::OfResidual(dy.view_mut().into()),
                        false => NormGradient::Kept(dy.view().into()),
                    },
                    training: true,
                    count: counted.view(),
                };
                let mut dx = unwritten(device, 3 * row);
                let (mut dgamma, mut dbeta) = (unwritten(device, 3), unwritten(device, 3));
                let dx_to = dx.view_mut().into();
                let to = NormGradients { dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut(), dx: dx_to };
                norm_backward(device, &shape, backward, scratch.view_mut(), to).unwrap();
                let mut of = vec![y];
                of.extend(residual.then_some(dy));
                of.extend([dx, dgamma, dbeta, mean, var, saved, invstd]);
                of.iter().map(|buffer: &Buffer<f32>| read(device, buffer.view())).collect()
            };
            for eval in [true, false] {
                let got = pass(Some(&map), &added, &dy, eval);
                let pick = |of: &[f32]| rows(of, 5, targets.iter().copied());
                let want = pass(None, &pick(&added), &pick(&dy), eval);
                let spread = if eval { 1 } else { 1 + usize::from(residual) };
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    let got = if i < spread { pick(got) } else { got.clone() };
                    assert_eq!(&got, want, "{what}: result {i}");
                }
                // The rows that x has not.
                let alone = |z: f32| if relu && z <= 0.0 { 0.0 } else { z };
                for y_row in [0, 3] {
                    let of = |all: &[f32]| rows(all, 5, std::iter::once(y_row));
                    let sum = if residual { of(&added) } else { vec![0.0; row] };
                    let want: Vec<f32> = sum.iter().map(|z| alone(*z)).collect();
                    assert_eq!(of(&got[0]), want, "{what}: row {y_row}");
                    if residual && !eval {
                        let through = |(dy, z): (f32, &f32)| if relu && *z <= 0.0 { 0.0 } else { dy };
                        let want: Vec<f32> = of(&dy).into_iter().zip(&sum).map(through).collect();
                        assert_eq!(of(&got[1]), want, "{what}: gradient of row {y_row}");
                    }
                }
                assert_eq!(got[0].len(), all);
                results.extend(got);
            }
        }
        results
    });
}

#[test]
fn a_shortcut_reads_the_channels_that_are_left() {
    // Channels 1 and 2 of x go to 2 and 0 of y; y's other channels are zero, and x's channel 0 is read by none.
    let source = [Some(2), None, Some(1), None];
    on_devices(|device, label| {
        let shape = ShortcutShape::mapped([3, 5, 4], 4, 2, 8).unwrap();
        let map = RowMap::new(device, 3, &source).unwrap();
        let (x, dy) = (values(4, shape.input_len()), values(5, shape.output_len()));
        let (mut y, mut dx) = (unwritten(device, shape.output_len()), unwritten(device, shape.input_len()));
        let (on_x, on_dy) = (device.upload(&x).unwrap(), device.upload(&dy).unwrap());
        shortcut_forward(device, &shape, Some(&map), on_x.view().into(), y.view_mut().into()).unwrap();
        shortcut_backward(device, &shape, Some(&map), on_dy.view().into(), dx.view_mut().into()).unwrap();
        let (y, dx) = (read(device, y.view()), read(device, dx.view()));
        for (i, got) in y.iter().enumerate() {
            let (channel, row, column, n) = (i / 48, i / 16 % 3, i / 8 % 2, i % 8);
            let want = source[channel].map_or(0.0, |c| x[((c * 5 + row * 2) * 4 + column * 2) * 8 + n]);
            assert_eq!(*got, want, "{label}: y {i}");
        }
        for (i, got) in dx.iter().enumerate() {
            let (channel, row, column, n) = (i / 160, i / 32 % 5, i / 8 % 4, i % 8);
            let target = source.iter().position(|source| *source == Some(channel));
            let read = target.filter(|_| row % 2 == 0 && column % 2 == 0);
            let want = read.map_or(0.0, |k| dy[((k * 3 + row / 2) * 2 + column / 2) * 8 + n]);
            assert_eq!(*got, want, "{label}: dx {i}");
        }
        vec![y, dx]
    });
}

#[test]
fn maps_that_make_no_sense_are_refused() {
    let device = Device::open("host").unwrap();
    let refused = |source: &[Option<usize>], says: &str| {
        let error = RowMap::new(&device, 2, source).err().unwrap().to_string();
        assert!(error.contains("one of 2 rows, each once") && error.contains(says), "{error}");
    };
    refused(&[Some(0), Some(2)], "row 1");
    refused(&[Some(1), None, Some(1)], "row 2");
    // A norm needs a place for each of its rows, and a map of its size.
    let shape = NormShape::new(2, 1, 8).unwrap();
    let (x, mut y, two) =
        (device.upload(&[0.0f32; 16]).unwrap(), device.alloc::<f32>(16).unwrap(), device.upload(&[1.0; 2]).unwrap());
    let count = device.upload(&[8]).unwrap();
    let affine = NormAffine { gamma: two.view(), beta: two.view(), epsilon: 1e-5 };
    for (rows, source, says) in [(2, [Some(0), None], "one for each of x"), (3, [Some(0), Some(2)], "the map's inputs")]
    {
        let map = RowMap::new(&device, rows, &source).unwrap();
        let x = x.view().into();
        let input = NormInput { x, residual: None, relu: false, map: Some(&map), count: count.view() };
        let result = norm_eval(&device, &shape, input, affine, two.view(), two.view(), y.view_mut().into());
        let error = result.unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    }
}
