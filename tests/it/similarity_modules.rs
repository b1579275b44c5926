//! Modules of layers against scikit-learn and planted ones.

use dilt::Error;
use dilt::similarity::modules::{Clustering, cluster};
use ndarray::{Array2, array, s};

use crate::support::Golden;

/// Adjusted Rand index (Hubert and Arabie 1985), over pairs of layers that are together.
fn adjusted_rand(a: &[usize], b: &[usize]) -> f64 {
    assert_eq!(a.len(), b.len());
    let (mut both, mut of_a, mut of_b, mut all) = (0.0, 0.0, 0.0, 0.0);
    for i in 0..a.len() {
        for j in 0..i {
            let (in_a, in_b) = (a[i] == a[j], b[i] == b[j]);
            both += f64::from(u8::from(in_a && in_b));
            of_a += f64::from(u8::from(in_a));
            of_b += f64::from(u8::from(in_b));
            all += 1.0;
        }
    }
    let (chance, most) = (of_a * of_b / all, (of_a + of_b) / 2.0);
    (both - chance) / (most - chance)
}

#[test]
fn modules_are_those_of_scikit_learn() {
    let golden = Golden::open("similarity");
    let labels = |case: &str, name: &str| -> Vec<usize> {
        golden.get(case, name).data.iter().map(|&label| label as usize).collect()
    };
    for case in ["modules_even", "modules_uneven", "modules_pair"] {
        let values = golden.get(case, "values").matrix();
        let found = cluster(values.view(), Clustering::default()).unwrap();
        assert_eq!(found.count() as f64, golden.number(case, "k"), "{case}: {:?}", found.eigenvalues);
        assert_eq!(adjusted_rand(&found.labels, &labels(case, "labels")), 1.0, "{case}: {:?}", found.labels);
        assert_eq!(adjusted_rand(&found.labels, &labels(case, "planted")), 1.0, "{case}: {:?}", found.labels);
    }
    let values = golden.get("resnet20", "best").matrix();
    for k in [2, 3, 4] {
        for seed in 0..5 {
            let found = cluster(values.view(), Clustering { modules: Some(k), seed, ..Default::default() }).unwrap();
            let index = adjusted_rand(&found.labels, &labels("resnet20", &format!("labels{k}")));
            assert!(index >= 0.9, "k = {k}: index {index}: {:?}", found.labels);
            assert_eq!(found.count(), k);
        }
    }
}

#[test]
fn modules_are_numbered_by_their_first_layers_and_depend_on_nothing_else() {
    let golden = Golden::open("similarity");
    let values = golden.get("modules_uneven", "values").matrix();
    let found = cluster(values.view(), Clustering::default()).unwrap();
    let mut next = 0;
    for &label in &found.labels {
        assert!(label <= next, "{:?}", found.labels);
        next = next.max(label + 1);
    }
    for seed in 0..20 {
        let again = cluster(values.view(), Clustering { seed, ..Default::default() }).unwrap();
        assert_eq!(again, found);
    }
    // Neither the unit nor the diagonal.
    let mut other = values.mapv(|v| 1e3 * v);
    other.diag_mut().fill(7.0);
    assert_eq!(cluster(other.view(), Clustering::default()).unwrap().labels, found.labels);
}

#[test]
fn modules_of_few_or_equal_layers_are_defined() {
    let labels = |values: &Array2<f64>, modules| {
        cluster(values.view(), Clustering { modules, ..Default::default() }).unwrap().labels
    };
    assert_eq!(labels(&array![[0.0]], None), [0]);
    assert_eq!(labels(&array![[0.0]], Some(1)), [0]);
    let two = array![[0.0, 0.3], [0.3, 0.0]];
    assert_eq!(labels(&two, None), [0, 0]);
    assert_eq!(labels(&two, Some(2)), [0, 1]);
    assert_eq!(labels(&Array2::zeros((5, 5)), None), [0; 5]);
    // Values within groups are 0, and so is their median: 6 layers are one, two are alone.
    let mut values = Array2::from_elem((8, 8), 0.1);
    values.slice_mut(s![..6, ..6]).fill(0.0);
    assert_eq!(labels(&values, None), [0, 0, 0, 0, 0, 0, 1, 2]);
    // All values are equal: no groups.
    assert_eq!(labels(&Array2::from_elem((6, 6), 0.3), None), [0; 6]);
    let each = labels(&Golden::open("similarity").get("resnet20", "best").matrix(), Some(10));
    assert_eq!(each, (0..10).collect::<Vec<_>>());
}

#[test]
fn what_cannot_be_clustered_is_refused() {
    let good = array![[0.0, 1.0], [1.0, 0.0]];
    for bad in [f64::NAN, f64::INFINITY, -1.0] {
        let bad = array![[0.0, bad], [bad, 0.0]];
        assert!(matches!(cluster(bad.view(), Clustering::default()), Err(Error::Run(_))));
    }
    for bad in [Array2::zeros((0, 0)), Array2::zeros((2, 3))] {
        assert!(matches!(cluster(bad.view(), Clustering::default()), Err(Error::Shape { .. })));
    }
    for how in [
        Clustering { modules: Some(3), ..Default::default() },
        Clustering { modules: Some(0), ..Default::default() },
        Clustering { sigma: Some(-1.0), ..Default::default() },
        Clustering { sigma: Some(f64::NAN), ..Default::default() },
    ] {
        assert!(matches!(cluster(good.view(), how), Err(Error::Usage(_))), "{how:?}");
    }
}
