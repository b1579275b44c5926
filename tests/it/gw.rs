//! Couplings against the same steps in f64 and in the log domain, and what holds of every coupling.

use dilt::device::Device;
use dilt::ops::gw::{Couplings, Layers, Start, Step};
use ndarray::{Array1, Array2, ArrayView1, Axis};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::support::{default_devices, on_devices};

/// Of a plan, whose logarithms are sums of numbers of up to a thousand: 6e-5 each.
const TOLERANCE: f64 = 5e-4;

/// Distances of random points, divided by the largest.
fn distances(n: usize, features: usize, seed: u64) -> Array2<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let x = Array2::from_shape_simple_fn((n, features), || rng.random_range(-1.0f64..1.0));
    let c = Array2::from_shape_fn((n, n), |(i, j)| (&x.row(i) - &x.row(j)).mapv(|d| d * d).sum().sqrt());
    let most = c.iter().copied().fold(1e-300, f64::max);
    c.mapv(|d| (d / most) as f32)
}

fn permuted(c: &Array2<f32>, seed: u64) -> Array2<f32> {
    let mut order: Vec<usize> = (0..c.nrows()).collect();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    Array2::from_shape_fn(c.dim(), |(i, j)| c[[order[i], order[j]]])
}

/// The value of a plan, term by term.
fn value(c1: &Array2<f32>, c2: &Array2<f32>, plan: &Array2<f64>) -> f64 {
    let [c1, c2] = [c1, c2].map(|c| c.mapv(f64::from));
    let cross = (c1.dot(plan).dot(&c2) * plan).sum();
    let squares = |c: &Array2<f64>, weights: Array1<f64>| c.mapv(|d| d * d).dot(&weights).dot(&weights);
    squares(&c1, plan.sum_axis(Axis(1))) + squares(&c2, plan.sum_axis(Axis(0))) - 2.0 * cross
}

fn log_sum(x: impl Iterator<Item = f64> + Clone) -> f64 {
    let most = x.clone().fold(f64::NEG_INFINITY, f64::max);
    most + x.map(|x| (x - most).exp()).sum::<f64>().ln()
}

/// Sinkhorn's iterations on a matrix given by its logarithms: log T. They begin where each column's largest element is 1
/// after each row's is.
fn scaled(log: &Array2<f64>, iterations: usize) -> Array2<f64> {
    let (n1, n2) = log.dim();
    let largest = |x: ArrayView1<f64>| x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let rows = log.map_axis(Axis(1), largest).insert_axis(Axis(1));
    let (mut f, mut g) = (Array1::<f64>::zeros(n1), -(log - &rows).map_axis(Axis(0), largest));
    for _ in 0..iterations {
        f = Array1::from_shape_fn(n1, |i| -(n1 as f64).ln() - log_sum((0..n2).map(|j| log[[i, j]] + g[j])));
        g = Array1::from_shape_fn(n2, |j| -(n2 as f64).ln() - log_sum((0..n1).map(|i| log[[i, j]] + f[i])));
    }
    Array2::from_shape_fn((n1, n2), |(i, j)| log[[i, j]] + f[i] + g[j])
}

/// A proximal step in f64.
fn step(c1: &Array2<f32>, c2: &Array2<f32>, log: &Array2<f64>, step: &Step) -> Array2<f64> {
    let [c1, c2] = [c1, c2].map(|c| c.mapv(f64::from));
    let means = |c: &Array2<f64>| c.mapv(|d| d * d).mean_axis(Axis(1)).unwrap();
    let (m1, m2) = (means(&c1), means(&c2));
    let cross = c1.dot(&log.mapv(f64::exp)).dot(&c2);
    let scale = 2.0 / f64::from(step.epsilon);
    let shifted =
        Array2::from_shape_fn(log.dim(), |(i, j)| log[[i, j]] - scale * (m1[i] + m2[j] - 2.0 * cross[[i, j]]));
    scaled(&shifted, step.iterations)
}

fn begun(start: Start, n1: usize, n2: usize) -> Array2<f64> {
    let (one, uniform) = (1.0 / n1 as f64, 1.0 / (n1 * n2) as f64);
    Array2::from_shape_fn((n1, n2), |(i, j)| match start {
        Start::Product => uniform.ln(),
        _ => (0.5 * (uniform + if i == j { one } else { 0.0 })).ln(),
    })
}

/// As many iterations as are asked for, and no coupling ends.
fn exactly(epsilon: f32, iterations: usize) -> Step {
    Step { epsilon, iterations, tolerance: -1.0, enough: None }
}

#[test]
fn steps_agree_with_the_log_domain_in_f64() {
    let sizes = [40, 40, 33, 1, 2];
    let layers: Vec<_> = sizes.iter().enumerate().map(|(seed, &n)| distances(n, 3 + seed, seed as u64)).collect();
    let sought = [
        ([0, 1], Start::Product),
        ([0, 1], Start::Mean),
        ([2, 0], Start::Product),
        ([0, 2], Start::Product),
        ([3, 3], Start::Mean),
        ([3, 4], Start::Product),
        ([4, 4], Start::Mean),
    ];
    // ThreadSanitizer takes a minute for a million waits of a thread.
    let less = cfg!(dilt_sanitize = "thread");
    let sought = &sought[..if less { 3 } else { sought.len() }];
    let schedule = [exactly(0.1, if less { 2 } else { 9 }), exactly(0.02, if less { 1 } else { 7 }), exactly(0.005, 1)];
    let want: Vec<Array2<f64>> = sought
        .iter()
        .map(|&([x, y], start)| {
            let first = begun(start, sizes[x], sizes[y]);
            schedule.iter().fold(first, |log, own| step(&layers[x], &layers[y], &log, own)).mapv(f64::exp)
        })
        .collect();
    let views: Vec<_> = layers.iter().map(Array2::view).collect();
    on_devices(|device, label| {
        let on_device = Layers::new(device, &views).unwrap();
        let mut couplings = Couplings::new(device, &on_device, sought).unwrap();
        couplings.begin(device, &exactly(0.001, 1)).unwrap();
        schedule.iter().for_each(|own| couplings.step(device, own).unwrap());
        assert!(!couplings.all_ended(device).unwrap(), "{label}");
        let mut bits = Vec::new();
        for (number, want) in want.iter().enumerate() {
            let plan = couplings.plan(device, number).unwrap();
            let most = want.iter().copied().fold(0.0, f64::max);
            for (at, &got) in plan.indexed_iter() {
                let error = (f64::from(got) - want[at]).abs() / most;
                assert!(error <= TOLERANCE, "{label}: coupling {number}, {at:?}: expected {}, got {got}", want[at]);
            }
            bits.push(plan.into_raw_vec_and_offset().0);
        }
        bits
    });
}

#[test]
fn rounded_couplings_have_the_weights_of_all_probes_and_their_own_value() {
    let layers = [distances(50, 4, 1), distances(50, 9, 2), distances(21, 4, 3)];
    let sought = [([0, 1], Start::Product), ([1, 0], Start::Mean), ([2, 1], Start::Product), ([0, 2], Start::Sorted)];
    let views: Vec<_> = layers.iter().map(Array2::view).collect();
    on_devices(|device, label| {
        let on_device = Layers::new(device, &views).unwrap();
        let mut couplings = Couplings::new(device, &on_device, &sought).unwrap();
        couplings.begin(device, &exactly(0.001, 2)).unwrap();
        // So few iterations leave wrong sums.
        (0..4).for_each(|_| couplings.step(device, &exactly(0.005, 1)).unwrap());
        let values = couplings.finish(device).unwrap();
        for (number, ([x, y], _)) in sought.into_iter().enumerate() {
            let plan = couplings.plan(device, number).unwrap().mapv(f64::from);
            let label = format!("{label}: coupling {number}");
            assert!(plan.iter().all(|&t| t >= 0.0), "{label}");
            for (axis, n) in [(1, plan.nrows()), (0, plan.ncols())] {
                let worst =
                    plan.sum_axis(Axis(axis)).iter().fold(0.0f64, |most, s| most.max((s * n as f64 - 1.0).abs()));
                assert!(worst <= 1e-6, "{label}: sums differ by {worst:.1e} from 1/{n}");
            }
            let want = value(&layers[x], &layers[y], &plan);
            assert!((values[number] - want).abs() <= 1e-6, "{label}: expected {want}, got {}", values[number]);
        }
        vec![values.iter().map(|&value| value as f32).collect()]
    });
}

#[test]
fn the_start_by_sorted_distances_finds_permutations() {
    let first = distances(60, 5, 1);
    let second = permuted(&first, 2);
    for case in default_devices() {
        let layers = Layers::new(&case.device, &[first.view(), second.view()]).unwrap();
        let sought = [([0, 1], Start::Product), ([0, 1], Start::Sorted)];
        let mut couplings = Couplings::new(&case.device, &layers, &sought).unwrap();
        couplings.begin(&case.device, &exactly(0.001, 100)).unwrap();
        let own = Step { epsilon: 0.01, iterations: 100, tolerance: 1e-3, enough: Some(1e-4) };
        let steps = (0..100).take_while(|_| {
            couplings.step(&case.device, &own).unwrap();
            !couplings.all_ended(&case.device).unwrap()
        });
        assert!(steps.count() < 99, "{}: all end", case.label);
        let values = couplings.finish(&case.device).unwrap();
        assert!(values[1].abs() < 1e-5, "{}: {values:?}", case.label);
    }
}

/// Each of the scalings of a GPU, and a matrix that one block of a product does not hold.
#[test]
fn large_couplings_agree_between_the_ways_to_cut_them() {
    use dilt::device::Policy;
    let sizes = [(200, 250), (300, 290), (600, 130), (1100, 40)];
    for (n1, n2) in sizes.into_iter().take(if cfg!(dilt_sanitize = "thread") { 1 } else { 4 }) {
        let layers = [distances(n1, 3, 1), distances(n2, 3, 2)];
        let views: Vec<_> = layers.iter().map(Array2::view).collect();
        let first = step(&layers[0], &layers[1], &begun(Start::Product, n1, n2), &exactly(0.05, 3)).mapv(f64::exp);
        for case in default_devices() {
            for policy in [Policy::Direct, Policy::Staged] {
                let device = case.device.with_policy(policy).unwrap();
                let on_device = Layers::new(&device, &views).unwrap();
                let mut couplings = Couplings::new(&device, &on_device, &[([0, 1], Start::Product)]).unwrap();
                couplings.begin(&device, &exactly(0.001, 1)).unwrap();
                couplings.step(&device, &exactly(0.05, 3)).unwrap();
                let plan = couplings.plan(&device, 0).unwrap();
                let most = first.iter().copied().fold(0.0, f64::max);
                let errors = plan.iter().zip(&first).map(|(&got, want)| (f64::from(got) - want).abs() / most);
                let worst =
                    errors.fold(0.0f64, |most, error| if error > most || error.is_nan() { error } else { most });
                assert!(worst <= TOLERANCE, "{} {policy:?}: {n1} x {n2}: error {worst:.1e} of scale", case.label);
            }
        }
    }
}

#[test]
fn what_cannot_be_coupled_is_refused() {
    let device = Device::open("host").unwrap();
    let mut bad = distances(5, 2, 1);
    bad[[1, 2]] = f32::NAN;
    let message = |matrix: &Array2<f32>| Layers::new(&device, &[matrix.view()]).err().unwrap().to_string();
    assert!(message(&bad).contains("not all finite"), "{}", message(&bad));
    let wide = Array2::zeros((2, 3));
    assert!(message(&wide).contains("expected [n, n]"), "{}", message(&wide));
    let good = [distances(5, 2, 1), distances(4, 2, 1)];
    let layers = Layers::new(&device, &good.each_ref().map(Array2::view)).unwrap();
    let refused = |sought: &[([usize; 2], Start)]| Couplings::new(&device, &layers, sought).err().unwrap().to_string();
    for (sought, why) in [
        (vec![], "expected 1 to 65535"),
        (vec![([0, 2], Start::Product)], "expected one below 2, got 2"),
        (vec![([0, 1], Start::Mean)], "as many probes in both"),
        (vec![([0, 1], Start::Sorted), ([0, 1], Start::Product)], "sorted starts last"),
    ] {
        assert!(refused(&sought).contains(why), "{}", refused(&sought));
    }
    let mut couplings = Couplings::new(&device, &layers, &[([0, 1], Start::Product)]).unwrap();
    assert!(couplings.finish(&device).unwrap_err().to_string().contains("no start yet"));
}
