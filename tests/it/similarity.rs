//! Values between layers against POT and CKA's formula; the linear problems in them against SciPy and brute force.

use dilt::Error;
use dilt::device::Device;
use dilt::similarity::assignment::Assignment;
use dilt::similarity::cka::{identity_value, linear_cka};
use dilt::similarity::exact::{Refined, conditional_gradient, refine, value};
use dilt::similarity::gw::{Options, Pair, solve};
use dilt::similarity::linear::{LinearProblem, Move};
use dilt::similarity::plans;
use ndarray::{Array2, ArrayView2, Axis, array};
use proptest::prelude::*;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::support::{Case, Golden, default_devices};

const FAMILIES: [&str; 4] = ["relu", "clusters", "sphere", "resnet20"];

/// Euclidean distances of features, divided by the largest.
fn distances(features: &Array2<f64>) -> Array2<f64> {
    let n = features.nrows();
    let between = |i, j| (&features.row(i) - &features.row(j)).mapv_into(|d| d * d).sum().sqrt();
    let c = Array2::from_shape_fn((n, n), |(i, j)| between(i, j));
    let largest = c.iter().copied().fold(0.0, f64::max);
    c / largest
}

/// The distance matrices of a case's layers.
fn layers(golden: &Golden, case: &str) -> Vec<Array2<f64>> {
    let found = (0..).map_while(|i| golden.find(case, &format!("features{i}")));
    found.map(|features| distances(&features.matrix())).collect()
}

fn pairs(layers: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..layers).flat_map(move |i| (i + 1..layers).map(move |j| (i, j)))
}

/// Probes in another order.
fn reordered(c: &Array2<f64>, order: &[usize]) -> Array2<f64> {
    c.select(Axis(0), order).select(Axis(1), order)
}

fn random_order(n: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    order.shuffle(rng);
    order
}

/// Symmetric, zero diagonal, else from 0 to 1: no distances of anything.
fn random_symmetric(n: usize, rng: &mut ChaCha8Rng) -> Array2<f64> {
    let draw = Array2::from_shape_fn((n, n), |(i, j)| if i < j { rng.random::<f64>() } else { 0.0 });
    &draw + &draw.t()
}

fn check_feasible(plan: ArrayView2<f64>, label: &str) {
    for axis in [Axis(0), Axis(1)] {
        let target = 1.0 / plan.len_of(axis) as f64;
        for line in plan.axis_iter(axis) {
            assert!((line.sum() - target).abs() <= 1e-14, "{label}: expected a sum of {target}, got {}", line.sum());
            assert!(line.iter().all(|&weight| weight >= 0.0), "{label}: a negative weight");
        }
    }
}

/// [`refine`], and what must hold of every result.
fn refined(c1: &Array2<f64>, c2: &Array2<f64>, label: &str) -> Refined {
    let found = refine(c1.view(), c2.view(), &[]).unwrap();
    check_feasible(found.plan.view(), label);
    let again = value(c1.view(), c2.view(), found.plan.view());
    assert!((found.value - again).abs() <= 1e-12, "{label}: value {} of a plan of value {again}", found.value);
    assert!(found.value >= 0.0, "{label}: {}", found.value);
    found
}

/// `Σ costs plan` of a plan that must be feasible.
fn cost_of(moves: &[Move], costs: &Array2<f64>, label: &str) -> f64 {
    let mut plan = Array2::zeros(costs.dim());
    moves.iter().for_each(|step| plan[[step.from, step.to]] += step.weight);
    check_feasible(plan.view(), label);
    (plan * costs).sum()
}

#[test]
fn values_are_as_good_as_the_best_of_pot() {
    let golden = Golden::open("similarity");
    let (mut all, mut far) = (0, 0);
    for case in FAMILIES {
        let layers = layers(&golden, case);
        let (best, identity) = (golden.get(case, "best").matrix(), golden.get(case, "identity").matrix());
        for (i, j) in pairs(layers.len()) {
            let label = format!("{case}: layers {i} and {j}");
            let found = refined(&layers[i], &layers[j], &label).value;
            assert!(found <= identity[[i, j]] + 1e-12, "{label}: {found} above the identity's {}", identity[[i, j]]);
            let ratio = found / best[[i, j]];
            assert!(ratio <= 1.1, "{label}: {ratio} times the value of POT");
            all += 1;
            if ratio > 1.02 {
                far += 1;
                println!("{label}: {ratio:.3} times the value of POT");
            }
        }
    }
    assert!(all >= 90 && far * 20 <= all, "{far} of {all} pairs are more than 2 % above the value of POT");
}

fn solved(device: &Device, layers: &[Array2<f32>], pairs: &[[usize; 2]], options: &Options) -> Vec<Pair> {
    let views: Vec<_> = layers.iter().map(Array2::view).collect();
    let mut found = Vec::new();
    let mut keep = |pair: &Pair| {
        found.push(pair.clone());
        Ok(())
    };
    solve(device, &views, pairs, options, &mut keep).unwrap();
    assert!(found.iter().map(|pair| pair.layers).eq(pairs.iter().copied()), "in order");
    found
}

const REFINING: Options = Options { epsilon: 0.01, steps: 100, iterations: 100, refine_up_to: 512, memory: 1 << 30 };

#[test]
fn pairs_are_as_good_as_the_best_of_pot_and_in_f32_not_far_from_it() {
    let golden = Golden::open("similarity");
    for Case { label, device } in default_devices() {
        let (mut all, mut far) = (0, 0);
        for case in FAMILIES {
            let layers: Vec<Array2<f32>> = layers(&golden, case).iter().map(|c| c.mapv(|d| d as f32)).collect();
            let (best, identity) = (golden.get(case, "best").matrix(), golden.get(case, "identity").matrix());
            let pairs: Vec<[usize; 2]> = pairs(layers.len()).map(|(i, j)| [i, j]).collect();
            let proximal = solved(&device, &layers, &pairs, &Options { refine_up_to: 0, ..REFINING });
            for (found, rough) in solved(&device, &layers, &pairs, &REFINING).iter().zip(&proximal) {
                let label = format!("{label}, {case}: layers {:?}", found.layers);
                let identity = identity[found.layers];
                for value in [found.value, rough.value] {
                    assert!((0.0..=identity + 1e-7).contains(&value), "{label}: {value}, the identity has {identity}");
                }
                // f32 has its own value, exact steps their own minimum.
                assert!(found.value <= rough.value + 1e-6, "{label}: {} from {}", found.value, rough.value);
                let [ratio, rough] = [found.value, rough.value].map(|value| value / best[found.layers]);
                assert!(ratio <= 1.1 && rough <= 1.25, "{label}: {ratio} and {rough} times the value of POT");
                all += 1;
                far += usize::from(ratio > 1.02);
            }
        }
        assert!(all >= 90 && far * 20 <= all, "{label}: {far} of {all} pairs are more than 2 % above the value of POT");
    }
}

#[test]
fn a_pair_has_the_same_bits_whatever_is_solved_beside_it() {
    let golden = Golden::open("similarity");
    let device = Device::open("host").unwrap();
    let mut layers: Vec<Array2<f32>> = layers(&golden, "relu").iter().map(|c| c.mapv(|d| d as f32)).collect();
    // Of another size, which has one start fewer.
    let fewer: Vec<usize> = (0..50).collect();
    layers.push(layers[1].select(Axis(0), &fewer).select(Axis(1), &fewer));
    let pairs: Vec<[usize; 2]> = pairs(layers.len()).map(|(i, j)| [i, j]).collect();
    for refine_up_to in [0, 60, 512] {
        let options = Options { refine_up_to, ..REFINING };
        let together = solved(&device, &layers, &pairs, &options);
        let apart = solved(&device, &layers, &pairs, &Options { memory: 0, ..options });
        for (one, other) in together.iter().zip(&apart) {
            assert_eq!(
                (one.value.to_bits(), one.found_by),
                (other.value.to_bits(), other.found_by),
                "{:?}",
                one.layers
            );
        }
        let last = together.last().unwrap().layers;
        let alone = solved(&device, &layers, &[last], &options);
        assert_eq!(alone[0].value.to_bits(), together.last().unwrap().value.to_bits());
    }
}

#[test]
fn a_layer_is_nothing_from_itself() {
    let golden = Golden::open("similarity");
    for case in FAMILIES {
        for (i, c) in layers(&golden, case).iter().enumerate() {
            let found = refined(c, c, case).value;
            assert!(found <= 1e-12, "{case}: layer {i}: {found}");
        }
    }
}

#[test]
fn the_same_probes_in_another_order_are_found() {
    let golden = Golden::open("similarity");
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let order: Vec<usize> = golden.get("permutation", "order").data.iter().map(|&i| i as usize).collect();
    let mut problems = vec![("permutation", layers(&golden, "permutation").remove(0), order)];
    for case in FAMILIES {
        for c in layers(&golden, case) {
            let order = random_order(c.nrows(), &mut rng);
            problems.push((case, c, order));
        }
    }
    for (case, c, order) in problems {
        let moved = reordered(&c, &order);
        let found = refined(&c, &moved, case).value;
        assert!(found <= 1e-10, "{case}: {found}");
        // Distances in order say it all here.
        let sorted = value(c.view(), moved.view(), plans::sorted(c.view(), moved.view()).view());
        assert!(sorted <= 1e-10, "{case}: sorted: {sorted}");
    }
}

#[test]
fn exchanging_layers_changes_no_bit() {
    let golden = Golden::open("similarity");
    let mut problems: Vec<(Array2<f64>, Array2<f64>)> = Vec::new();
    for case in FAMILIES {
        let mut layers = layers(&golden, case);
        problems.push((layers.remove(3), layers.remove(0)));
    }
    let mut different = layers(&golden, "rectangular_50x75");
    problems.push((different.remove(1), different.remove(0)));
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for (a, b) in problems {
        // A plan of somebody else, which must change sides too.
        let more = Array2::from_shape_fn((a.nrows(), b.nrows()), |_| rng.random::<f64>() / b.len() as f64);
        let there = refine(a.view(), b.view(), std::slice::from_ref(&more)).unwrap();
        let back = refine(b.view(), a.view(), &[more.reversed_axes()]).unwrap();
        assert_eq!(there.value.to_bits(), back.value.to_bits());
        assert_eq!(there.plan, back.plan.t());
    }
}

#[test]
fn layers_of_different_probes_are_as_near_as_pot_finds_them() {
    let golden = Golden::open("similarity");
    for case in golden.cases().into_iter().filter(|case| case.starts_with("rectangular")) {
        let layers = layers(&golden, &case);
        let (found, pot) = (refined(&layers[0], &layers[1], &case).value, golden.number(&case, "value"));
        assert!(found <= 1.02 * pot, "{case}: {found}, POT {pot}");
    }
}

#[test]
fn probes_that_are_there_twice_change_nothing() {
    let golden = Golden::open("similarity");
    for (first, second) in [(2, 1), (3, 2)] {
        let c = &layers(&golden, "relu")[2];
        let often = |times: usize| -> Vec<usize> { (0..24).flat_map(|i| std::iter::repeat_n(i, times)).collect() };
        let (c1, c2) = (reordered(c, &often(first)), reordered(c, &often(second)));
        let found = refined(&c1, &c2, "doubled").value;
        assert!(found <= 1e-10, "{first} to {second}: {found}");
        let sorted = value(c1.view(), c2.view(), plans::sorted(c1.view(), c2.view()).view());
        assert!(sorted <= 1e-10, "{first} to {second}: sorted: {sorted}");
    }
}

#[test]
fn the_sorted_plan_moves_sorted_distances_least() {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    for (n1, n2) in [(5, 3), (6, 4), (7, 7), (3, 8), (25, 16)].repeat(10) {
        let (c1, c2) = (random_symmetric(n1, &mut rng), random_symmetric(n2, &mut rng));
        // Each distance as often as makes n1 n2 of them.
        let quantiles = |c: &Array2<f64>, row: usize| -> Vec<f64> {
            let mut values: Vec<f64> = c.row(row).iter().flat_map(|&d| vec![d; n1 * n2 / c.nrows()]).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let costs = Array2::from_shape_fn((n1, n2), |(i, j)| {
            let (a, b) = (quantiles(&c1, i), quantiles(&c2, j));
            a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / (n1 * n2) as f64
        });
        let least = cost_of(&LinearProblem::new(n1, n2).solve(costs.view()), &costs, "sorted");
        let cost = (plans::sorted(c1.view(), c2.view()) * &costs).sum();
        assert!((cost - least).abs() <= 1e-14, "{n1} and {n2}: expected {least}, got {cost}");
    }
}

#[test]
fn a_better_plan_that_is_given_is_taken() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let order = random_order(37, &mut rng);
    // Paley's graph of 37 points: every row holds the same distances, and every local minimum looks alike.
    let residue = |d: usize| (1..37).any(|root| root * root % 37 == d);
    let distance = |(i, j): (usize, usize)| match i.abs_diff(j) {
        0 => 0.0,
        d => {
            if residue(d) {
                1.0
            } else {
                0.5
            }
        }
    };
    let c = Array2::from_shape_fn((37, 37), distance);
    let moved = reordered(&c, &order);
    let alone = refine(c.view(), moved.view(), &[]).unwrap().value;
    // Single precision, whose sums are not exact.
    let mut given = Array2::from_elem((37, 37), 1e-9);
    order.iter().enumerate().for_each(|(to, &from)| given[[from, to]] = f64::from(1.00001f32 / 37.0));
    let found = refine(c.view(), moved.view(), &[given]).unwrap();
    check_feasible(found.plan.view(), "given");
    assert!(alone > 1e-3 && found.value < 1e-12, "{}, {alone} without the plan", found.value);
}

#[test]
fn value_is_the_sum_over_pairs_of_pairs() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let (c1, c2) = (random_symmetric(4, &mut rng), random_symmetric(3, &mut rng));
    let plan = Array2::from_shape_fn((4, 3), |_| rng.random::<f64>());
    let mut sum = 0.0;
    for ((i, j), t) in plan.indexed_iter() {
        for ((k, l), u) in plan.indexed_iter() {
            sum += (c1[[i, k]] - c2[[j, l]]).powi(2) * t * u;
        }
    }
    let got = value(c1.view(), c2.view(), plan.view());
    assert!((got - sum).abs() <= 1e-14 * sum, "expected {sum}, got {got}");
    assert!(value(c1.view(), c2.view(), plan.mapv(|t| t / (t - t)).view()).is_nan());
}

#[test]
fn a_valley_has_one_lowest_point_for_all_starts() {
    // Distances beside nearness: the value bends up everywhere, and steps are not whole.
    let golden = Golden::open("similarity");
    let layers = layers(&golden, "sphere");
    let n = 32;
    let first: Vec<usize> = (0..n).collect();
    let (far, near) = (reordered(&layers[0], &first), reordered(&layers[1], &first).mapv(|d| 1.0 - d));
    let values = [plans::product(n, n), plans::mean(n), plans::identity(n)].map(|start| {
        let found = conditional_gradient(far.view(), near.view(), start.view()).unwrap();
        check_feasible(found.plan.view(), "valley");
        assert!(found.iterations > 10, "{} steps", found.iterations);
        found.value
    });
    let (least, most) = values.iter().fold((f64::MAX, 0.0f64), |(a, b), &v| (a.min(v), b.max(v)));
    assert!(most <= least * 1.0001, "{values:?}");
}

#[test]
fn linear_problems_cost_what_scipy_and_pot_say() {
    let golden = Golden::open("similarity");
    let cases: Vec<String> = golden.cases().into_iter().filter(|case| case.starts_with("linear")).collect();
    assert!(cases.len() > 20);
    for case in cases {
        let costs = golden.get(&case, "costs").matrix();
        let optimum = golden.number(&case, "optimum");
        let scale = costs.iter().fold(0.0f64, |most, cost| most.max(cost.abs()));
        let mut problem = LinearProblem::new(costs.nrows(), costs.ncols());
        // Without prices; with those of another problem, of one that is near, and of the same.
        let mut rng = ChaCha8Rng::seed_from_u64(6);
        let other = costs.mapv(|_| rng.random::<f64>() * scale);
        let near = costs.mapv(|cost| cost + rng.random::<f64>() * scale * 1e-2);
        for before in [None, Some(&other), Some(&near), Some(&costs)] {
            before.map(|before| problem.solve(before.view()));
            let cost = cost_of(&problem.solve(costs.view()), &costs, &case);
            assert!((cost - optimum).abs() <= 1e-13 * scale, "{case}: expected {optimum}, got {cost}");
        }
    }
}

proptest! {
    #[test]
    fn assignments_cost_no_more_than_any_permutation(
        n in 1usize..=6,
        values in proptest::collection::vec(prop_oneof![(0..4i32).prop_map(f64::from), -1.0..1.0f64], 72),
    ) {
        let mut assignment = Assignment::new(n);
        for values in [&values[..36], &values[36..]] {
            let costs = Array2::from_shape_fn((n, n), |(i, j)| values[6 * i + j]);
            let columns = assignment.solve(costs.view());
            let cost: f64 = columns.iter().enumerate().map(|(i, &j)| costs[[i, j]]).sum();
            let least = least_cost(&costs, 0, &mut vec![false; n]);
            prop_assert!((cost - least).abs() <= 1e-12, "expected {}, got {} for {}", least, cost, costs);
            let mut sorted = columns.to_vec();
            sorted.sort();
            prop_assert!(sorted.into_iter().eq(0..n));
        }
    }

    #[test]
    fn rounding_makes_sums_exact_and_keeps_a_plan(
        (m, n, weights) in (1usize..20, 1usize..20).prop_flat_map(|(m, n)| {
            let weight = prop_oneof![Just(0.0), 0.0..1.0f64, 0.0..1e-12f64];
            (Just(m), Just(n), proptest::collection::vec(weight, m * n))
        }),
    ) {
        let plan = Array2::from_shape_vec((m, n), weights).unwrap();
        let rounded = plans::rounded(plan.view());
        check_feasible(rounded.view(), "rounded");
        let again = plans::rounded(rounded.view());
        prop_assert!((&again - &rounded).iter().all(|d| d.abs() <= 1e-15));
    }
}

/// Of all ways to give the rows from `row` on columns that are not taken.
fn least_cost(costs: &Array2<f64>, row: usize, taken: &mut Vec<bool>) -> f64 {
    if row == costs.nrows() {
        return 0.0;
    }
    let mut least = f64::INFINITY;
    for column in 0..costs.nrows() {
        if !std::mem::replace(&mut taken[column], true) {
            least = least.min(costs[[row, column]] + least_cost(costs, row + 1, taken));
            taken[column] = false;
        }
    }
    least
}

#[test]
fn cka_of_distances_is_that_of_features() {
    let golden = Golden::open("similarity");
    for case in FAMILIES {
        let layers = layers(&golden, case);
        let (want, identity) = (golden.get(case, "cka").matrix(), golden.get(case, "identity").matrix());
        for (i, a) in layers.iter().enumerate() {
            for (j, b) in layers.iter().enumerate() {
                // Of any unit.
                let got = linear_cka(a.view(), b.mapv(|d| 1e3 * d).view()).unwrap().unwrap();
                assert!((got - want[[i, j]]).abs() <= 1e-9, "{case}: {i}, {j}: expected {}, got {got}", want[[i, j]]);
                let single = |c: &Array2<f64>| c.mapv(|d| f64::from(d as f32));
                let got = linear_cka(single(a).view(), single(b).view()).unwrap().unwrap();
                assert!((got - want[[i, j]]).abs() <= 1e-5, "{case}: {i}, {j}: in f32: {got}");
                let got = identity_value(a.view(), b.view()).unwrap();
                assert!((got - identity[[i, j]]).abs() <= 1e-12, "{case}: {i}, {j}: {got}");
                let again = value(a.view(), b.view(), plans::identity(a.nrows()).view());
                assert!((got - again).abs() <= 1e-12, "{case}: {i}, {j}: {got} and {again}");
            }
        }
    }
}

#[test]
fn small_and_constant_layers_have_values() {
    let (one, two) = (Array2::zeros((1, 1)), array![[0.0, 1.0], [1.0, 0.0]]);
    assert_eq!(refined(&one, &one, "1 and 1").value, 0.0);
    assert_eq!(refined(&two, &two, "2 and 2").value, 0.0);
    // One point for two at distance 1, which half of all pairs of them are.
    assert_eq!(refined(&one, &two, "1 and 2").value, 0.5);
    assert_eq!(refined(&two, &one, "2 and 1").value, 0.5);
    let (constant, ring) = (Array2::zeros((6, 6)), Array2::from_elem((6, 6), 1.0) - Array2::<f64>::eye(6));
    assert_eq!(refined(&constant, &constant, "constant").value, 0.0);
    assert!((refined(&constant, &ring, "constant and ring").value - 5.0 / 6.0).abs() <= 1e-15);
    assert!(refined(&ring, &ring, "ring").value <= 1e-15);
    assert_eq!(linear_cka(constant.view(), ring.view()).unwrap(), None);
    assert_eq!(linear_cka(one.view(), one.view()).unwrap(), None);
    assert!((linear_cka(two.view(), two.view()).unwrap().unwrap() - 1.0).abs() <= 1e-15);
}

#[test]
fn what_is_no_distance_is_refused() {
    let good = array![[0.0, 1.0], [1.0, 0.0]];
    for bad in [f64::NAN, f64::INFINITY, -1.0, 1e200] {
        let bad = array![[0.0, bad], [bad, 0.0]];
        for (a, b) in [(&good, &bad), (&bad, &good), (&bad, &bad)] {
            assert!(matches!(refine(a.view(), b.view(), &[]), Err(Error::Run(_))));
            assert!(matches!(linear_cka(a.view(), b.view()), Err(Error::Run(_))));
            assert!(matches!(identity_value(a.view(), b.view()), Err(Error::Run(_))));
        }
        // Nor a plan, given or to start from.
        assert!(matches!(conditional_gradient(good.view(), good.view(), bad.view()), Err(Error::Run(_))));
        assert!(matches!(refine(good.view(), good.view(), &[plans::product(2, 2), bad]), Err(Error::Run(_))));
    }
    let message = refine(good.view(), array![[0.0, 1.0], [f64::NAN, 0.0]].view(), &[]).unwrap_err().to_string();
    assert_eq!(message, "refine: c2[1, 0]: expected a number from 0 to 1e100, got NaN");
    for bad in [Array2::zeros((0, 0)), Array2::zeros((2, 3))] {
        assert!(matches!(refine(good.view(), bad.view(), &[]), Err(Error::Shape { .. })));
        assert!(matches!(linear_cka(good.view(), bad.view()), Err(Error::Shape { .. })));
    }
    let three = Array2::zeros((3, 3));
    assert!(matches!(identity_value(good.view(), three.view()), Err(Error::Shape { .. })));
    assert!(matches!(refine(good.view(), three.view(), &[plans::product(3, 2)]), Err(Error::Shape { .. })));
}
