//! Distances between probes against their formulas in f64.

use dilt::device::Device;
use dilt::ops::Columns;
use dilt::ops::distances::{
    DistanceShape, Metric, RepresentationShape, distance_matrix, pitch, representation, squared_distances,
};
use dilt::similarity::distances::{Representation, measure};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::support::{Storage, on_devices, read, refuses_precision, unwritten};

/// Sums of up to 3,000 squares in two levels of f32, half of it after the root.
const TOLERANCE: f64 = 1e-6;

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// A column of x `[features, columns]`.
fn column(x: &[f32], columns: usize, at: usize) -> impl Iterator<Item = f64> + '_ {
    x.iter().skip(at).step_by(columns).map(|&x| f64::from(x))
}

fn expected(x: &[f32], columns: usize, metric: Metric, i: usize, j: usize) -> f64 {
    let dot = |i, j| column(x, columns, i).zip(column(x, columns, j)).map(|(x, y)| x * y).sum::<f64>();
    match metric {
        Metric::Euclidean => {
            column(x, columns, i).zip(column(x, columns, j)).map(|(x, y)| (x - y).powi(2)).sum::<f64>().sqrt()
        }
        Metric::Cosine => 1.0 - dot(i, j) / (dot(i, i) * dot(j, j)).sqrt(),
    }
}

#[test]
fn distances_agree_with_their_formulas_and_are_symmetric_to_the_bit() {
    for (features, n) in [(1, 1usize), (3, 2), (5, 8), (300, 13), (64, 63), (70, 64), (3000, 70), (9, 150)] {
        let columns = n.next_multiple_of(8);
        let x = random(features * columns, 1 + n as u64);
        for metric in [Metric::Euclidean, Metric::Cosine] {
            // Of one feature, all cosines are 1 or -1, and what is near 0 is rounding.
            if features == 1 && metric == Metric::Cosine {
                continue;
            }
            let mut most = 0.0f64;
            let want: Vec<f64> = (0..n * n).map(|at| expected(&x, columns, metric, at / n, at % n)).collect();
            want.iter().for_each(|&d| most = most.max(d));
            on_devices(|device, label| {
                let label = format!("{label}, {features} features, {n} probes, {metric:?}");
                let shape = DistanceShape { features, columns, n };
                let run = |storage: Storage| {
                    let from = storage.upload(device, &x);
                    let mut scratch = unwritten(device, shape.scratch_len());
                    let (mut c, mut largest) = (unwritten(device, n * pitch(n)), unwritten(device, n + 1));
                    let (scratch, to, most_of) = (scratch.view_mut(), c.view_mut(), largest.view_mut());
                    distance_matrix(device, &shape, metric, from.view(), scratch, to, most_of).unwrap();
                    [read(device, c.view()), read(device, largest.view())]
                };
                let [c, largest] = run(Storage::F32);
                assert!((f64::from(largest[n]) - most).abs() <= TOLERANCE * most, "{label}: {most} {}", largest[n]);
                for (i, row) in c.chunks(pitch(n)).enumerate() {
                    assert!(row[n..].iter().all(|&x| x == 0.0), "{label}: padding");
                    assert_eq!(row[i], 0.0, "{label}: diagonal");
                    for j in 0..n {
                        assert_eq!(row[j].to_bits(), c[j * pitch(n) + i].to_bits(), "{label}: symmetry");
                        let want = if most == 0.0 || i == j { 0.0 } else { want[i * n + j] / most };
                        let error = (f64::from(row[j]) - want).abs();
                        assert!(error <= TOLERANCE, "{label}: ({i}, {j}): expected {want}, got {}", row[j]);
                    }
                }
                // What bf16 holds is widened before anything is done with it.
                let [low, naive] = [Storage::Bf16, Storage::Naive].map(run);
                assert_eq!(low, naive, "{label}: bf16");
                let mut results = vec![c, largest];
                results.extend(low);
                results
            });
        }
    }
}

#[test]
fn near_probes_far_from_the_origin_keep_their_digits() {
    // Squared lengths are 1e6 times the squared distances.
    let (features, n, columns) = (200, 9, 16);
    let x: Vec<f32> = random(features * columns, 5).into_iter().map(|x| 1000.0 + x).collect();
    on_devices(|device, label| {
        let shape = DistanceShape { features, columns, n };
        let from = device.upload(&x).unwrap();
        let (mut scratch, mut c) = (unwritten(device, shape.scratch_len()), unwritten(device, n * pitch(n)));
        let mut largest = unwritten(device, n + 1);
        let (scratch, to, most) = (scratch.view_mut(), c.view_mut(), largest.view_mut());
        distance_matrix(device, &shape, Metric::Euclidean, from.view().into(), scratch, to, most).unwrap();
        let (c, largest) = (read(device, c.view()), f64::from(read(device, largest.view())[n]));
        for (i, j) in [(0, 1), (3, 8), (2, 7)] {
            let (want, got) =
                (expected(&x, columns, Metric::Euclidean, i, j), f64::from(c[i * pitch(n) + j]) * largest);
            assert!((got - want).abs() <= TOLERANCE * want, "{label}: {want} {got}");
        }
        vec![c]
    });
}

#[test]
fn two_sets_of_vectors_are_compared() {
    let (features, sizes) = (90, [70, 9]);
    let [x, y] = [0, 1].map(|set| random(features * pitch(sizes[set]), set as u64));
    on_devices(|device, label| {
        let run = |storage: Storage| {
            let (from, with) = (storage.upload(device, &x), storage.upload(device, &y));
            let mut out = unwritten(device, sizes[0] * pitch(sizes[1]));
            squared_distances(device, features, sizes, from.view(), with.view(), out.view_mut()).unwrap();
            read(device, out.view())
        };
        assert_eq!(run(Storage::Bf16), run(Storage::Naive), "{label}: bf16");
        let out = run(Storage::F32);
        for at in 0..sizes[0] * sizes[1] {
            let (i, j) = (at / sizes[1], at % sizes[1]);
            let pairs = column(&x, pitch(sizes[0]), i).zip(column(&y, pitch(sizes[1]), j));
            let want = pairs.map(|(x, y)| (x - y).powi(2)).sum::<f64>();
            let got = f64::from(out[i * pitch(sizes[1]) + j]);
            assert!((got - want).abs() <= TOLERANCE * want, "{label}: ({i}, {j}): {want} {got}");
        }
        vec![out]
    });
}

#[test]
fn images_and_tokens_are_pooled_or_laid_out_by_probe() {
    for (features, positions, columns, n) in [
        (3, 6, Columns::samples(13).unwrap(), 13),
        (5, 1, Columns::tokens(5, 11).unwrap(), 5),
        (2, 1, Columns::samples(8).unwrap(), 3),
    ] {
        let x = random(features * positions * columns.len(), 3);
        for pooled in [false, true] {
            let shape = RepresentationShape { features, positions, columns, n, pooled };
            let samples = shape.samples();
            let (row, tokens) = (columns.len() / samples, if positions == 1 && features == 5 { 11 } else { 1 });
            on_devices(|device, label| {
                let run = |storage: Storage| {
                    let from = storage.upload(device, &x);
                    let mut out = unwritten(device, shape.rows() * samples);
                    representation(device, &shape, from.view(), out.view_mut()).unwrap();
                    read(device, out.view())
                };
                assert_eq!(run(Storage::Bf16), run(Storage::Naive), "{label}: bf16");
                let out = run(Storage::F32);
                for (at, &got) in out.iter().enumerate() {
                    let (part, sample) = (at / samples, at % samples);
                    let parts = positions * tokens;
                    let value = |part: usize| {
                        let (line, token) = (part / tokens, part % tokens);
                        f64::from(x[(line * samples + sample) * row + token])
                    };
                    let want = match (sample < n, pooled) {
                        (false, _) => 0.0,
                        (true, false) => value(part),
                        (true, true) => (0..parts).map(|own| value(part * parts + own)).sum::<f64>() / parts as f64,
                    };
                    assert!((f64::from(got) - want).abs() <= 1e-7, "{label}: {at}: expected {want}, got {got}");
                }
                vec![out]
            });
        }
    }
}

fn measured(device: &Device, x: &[f32], features: usize, n: usize) -> dilt::Result<(Vec<f32>, f32)> {
    let values = device.upload(x).unwrap();
    let columns = Columns::samples(n).unwrap();
    let representation = Representation { values: values.view().into(), features, positions: 1, columns, n };
    let distances = measure(device, &representation, Metric::Euclidean, false)?;
    Ok((distances.matrix.into_raw_vec_and_offset().0, distances.largest))
}

#[test]
fn what_is_not_finite_is_refused_and_what_is_constant_has_no_distances() {
    let device = Device::open("host").unwrap();
    for bad in [f32::NAN, f32::INFINITY, 1e30] {
        for n in [1, 7] {
            let mut x = random(4 * 8, 9);
            x[2 * 8] = bad;
            let error = measured(&device, &x, 4, n).unwrap_err().to_string();
            assert!(error.contains("expected finite values"), "{bad}, {n}: {error}");
        }
    }
    let constant: Vec<f32> = (0..4 * 8).map(|at| (at / 8) as f32).collect();
    assert_eq!(measured(&device, &constant, 4, 7).unwrap(), (vec![0.0; 49], 0.0));
}

#[test]
fn a_vector_without_length_is_as_far_as_a_right_angle() {
    let device = Device::open("host").unwrap();
    let mut x = random(4 * 8, 2);
    (0..4).for_each(|feature| x[feature * 8 + 3] = 0.0);
    let shape = DistanceShape { features: 4, columns: 8, n: 5 };
    let (from, mut scratch) = (device.upload(&x).unwrap(), device.alloc(shape.scratch_len()).unwrap());
    let (mut c, mut largest) = (device.alloc(5 * 16).unwrap(), device.alloc(6).unwrap());
    let (scratch, to, most) = (scratch.view_mut(), c.view_mut(), largest.view_mut());
    distance_matrix(&device, &shape, Metric::Cosine, from.view().into(), scratch, to, most).unwrap();
    let (c, most) = (read(&device, c.view()), read(&device, largest.view())[5]);
    assert!((c[3 * 16] * most - 1.0).abs() < 1e-6, "{}", c[3 * 16] * most);
}

#[test]
fn tensors_of_the_wrong_size_are_refused_by_name() {
    let device = Device::open("host").unwrap();
    let shape = DistanceShape { features: 4, columns: 8, n: 5 };
    let (x, mut scratch) = (device.alloc::<f32>(31).unwrap(), device.alloc(shape.scratch_len()).unwrap());
    let (mut c, mut largest) = (device.alloc(5 * 16).unwrap(), device.alloc(6).unwrap());
    let (scratch, to, most) = (scratch.view_mut(), c.view_mut(), largest.view_mut());
    let error = distance_matrix(&device, &shape, Metric::Euclidean, x.view().into(), scratch, to, most).unwrap_err();
    assert!(error.to_string().contains("number of elements of x: expected 32, got 31"), "{error}");
    let [low, single] = [Storage::Bf16, Storage::F32].map(|storage| storage.upload(&device, &[0.0; 64]));
    let mixed = squared_distances(&device, 4, [5, 5], low.view(), single.view(), c.view_mut());
    refuses_precision(mixed, "squared_distances", "y");
}
