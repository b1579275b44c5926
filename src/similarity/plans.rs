//! Plans to start from: matrices `[n1, n2]` whose rows sum to 1/n1 and columns to 1/n2.
//!
//! The objective has many local minima, and no start finds the best for all pairs. The product knows nothing; the identity
//! knows that both layers saw the same probes; the sorted plan matches probes that lie alike among the others, whatever
//! they are called, which finds permutations.

use ndarray::{Array1, Array2, ArrayView2, Axis};

use super::linear::{LinearProblem, to_matrix};

/// The product coupling: each element 1 / (n1 n2).
pub fn product(n1: usize, n2: usize) -> Array2<f64> {
    Array2::from_elem((n1, n2), 1.0 / (n1 * n2) as f64)
}

/// The identity coupling: each probe stays where it is.
pub fn identity(n: usize) -> Array2<f64> {
    Array2::from_diag_elem(n, 1.0 / n as f64)
}

/// The mean of product and identity.
pub fn mean(n: usize) -> Array2<f64> {
    (product(n, n) + identity(n)) / 2.0
}

/// The plan of Mémoli's third lower bound (2011): optimal for the cost of moving, on the line, the distances of one row
/// to those of another. Distance matrices `[n1, n1]` and `[n2, n2]`, finite.
pub fn sorted(c1: ArrayView2<f64>, c2: ArrayView2<f64>) -> Array2<f64> {
    let (n1, n2) = (c1.nrows(), c2.nrows());
    // Of the squared difference of two quantile functions only the product depends on both rows.
    let levels = common_levels(n1, n2);
    let widths: Array1<f64> = levels.iter().map(|level| level.0).collect();
    let first = quantiles(c1, levels.iter().map(|level| level.1)) * widths;
    let second = quantiles(c2, levels.iter().map(|level| level.2));
    let costs = -first.dot(&second.t());
    to_matrix(&LinearProblem::new(n1, n2).solve(costs.view()), n1, n2)
}

/// Where both quantile functions of n1 and n2 values are constant: width, and the rank of the value of each.
fn common_levels(n1: usize, n2: usize) -> Vec<(f64, usize, usize)> {
    let (mut i, mut j, mut at) = (0, 0, 0);
    let mut levels = Vec::new();
    // In units of 1 / (n1 n2).
    while i < n1 && j < n2 {
        let (next_i, next_j) = ((i + 1) * n2, (j + 1) * n1);
        let next = next_i.min(next_j);
        levels.push(((next - at) as f64 / (n1 * n2) as f64, i, j));
        at = next;
        i += usize::from(next == next_i);
        j += usize::from(next == next_j);
    }
    levels
}

/// Each row's values of these ranks.
fn quantiles(c: ArrayView2<f64>, ranks: impl Iterator<Item = usize> + Clone) -> Array2<f64> {
    let mut values = Vec::new();
    for row in c.rows() {
        let mut row = row.to_vec();
        row.sort_unstable_by(f64::total_cmp);
        values.extend(ranks.clone().map(|rank| row[rank]));
    }
    Array2::from_shape_vec((c.nrows(), ranks.count()), values).expect("one value a row and rank")
}

/// The plan with exact marginals next to one that nearly has them (Altschuler, Weed, Rigollet 2017, algorithm 2): rows
/// and then columns that are too heavy are scaled down, and what is missing is added as a product. `plan` `[n1, n2]`,
/// finite and not negative.
pub fn rounded(plan: ArrayView2<f64>) -> Array2<f64> {
    let mut plan = plan.to_owned();
    let (row_weight, column_weight) = (1.0 / plan.nrows() as f64, 1.0 / plan.ncols() as f64);
    let scale = |sum: f64, weight: f64| if sum > weight { weight / sum } else { 1.0 };
    let rows = plan.sum_axis(Axis(1)).mapv_into(|sum| scale(sum, row_weight));
    plan *= &rows.insert_axis(Axis(1));
    let columns = plan.sum_axis(Axis(0)).mapv_into(|sum| scale(sum, column_weight));
    plan *= &columns;
    // Rounding may leave a sum just above its weight.
    let row_gaps = plan.sum_axis(Axis(1)).mapv_into(|sum| (row_weight - sum).max(0.0));
    let column_gaps = plan.sum_axis(Axis(0)).mapv_into(|sum| (column_weight - sum).max(0.0));
    let missing = column_gaps.sum();
    if missing > 0.0 {
        plan += &(row_gaps.insert_axis(Axis(1)) * (column_gaps / missing));
    }
    plan
}
