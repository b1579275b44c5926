//! Gromov-Wasserstein with square loss and uniform weights (Mémoli 2011), in f64, to a local minimum that is exact.
//!
//! Layers with distance matrices `C1` `[n1, n1]` and `C2` `[n2, n2]` are coupled by a plan `T` `[n1, n2]`, rows summing
//! to 1/n1, columns to 1/n2. Its value is `Σ (C1[i, k] - C2[j, l])² T[i, j] T[k, l]`, no root taken; with G = C1 T C2
//! that is `mean C1² + mean C2² - 2 <G, T>`, with the gradient `-4 G`, but for a term for each row and each column, which
//! no choice among plans sees.
//!
//! Conditional gradient (Frank-Wolfe; Vayer et al. 2019, algorithm 2): the plan V that minimises the linear cost `-G` is
//! the solution of a linear problem, and the value on the line from T to V a parabola. For Euclidean distances it bends
//! down everywhere, so that steps are whole, and plans of equal sizes permutations that are reached in a few of them.

use std::cmp::Ordering;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use ndarray::{Array2, ArrayView2, Axis, Zip};

use super::linear::{LinearProblem, Move};
use super::{check_distances, plans};
use crate::error::{Error, Result};

/// Of the duality gap `<∇, T - V>` where the search ends, as a share of the value.
const TOLERANCE: f64 = 1e-9;
/// The same as a share of `mean C1² + mean C2²`, of which the value is a small difference.
const ROUNDING: f64 = 1e-13;
/// About ten are usual. Where the parabola bends up, steps grow ever shorter.
const MOST_STEPS: usize = 1000;

/// A plan that no conditional gradient step improves.
#[derive(Clone, Debug, PartialEq)]
pub struct Refined {
    /// `[n1, n2]`, rows summing to 1/n1, columns to 1/n2.
    pub plan: Array2<f64>,
    /// Its value, not negative.
    pub value: f64,
    /// Linear problems that were solved on the way from its start.
    pub iterations: usize,
}

/// `Σ (c1[i, k] - c2[j, l])² plan[i, j] plan[k, l]`, not below 0, the plan's sums being what they are: c1 `[n1, n1]`, c2
/// `[n2, n2]`, symmetric, plan `[n1, n2]`. NaN if any element is.
///
/// # Panics
/// If sizes do not fit.
pub fn value(c1: ArrayView2<f64>, c2: ArrayView2<f64>, plan: ArrayView2<f64>) -> f64 {
    let weighted = |c: ArrayView2<f64>, axis| {
        let weights = plan.sum_axis(axis);
        c.mapv(|d| d * d).dot(&weights).dot(&weights)
    };
    let squares = weighted(c1, Axis(1)) + weighted(c2, Axis(0));
    let g = multiply(&multiply(&c1, &plan).view(), &c2);
    not_negative(squares - 2.0 * (g * plan).sum())
}

/// The best of conditional gradients from the starts of [`plans`] and from `more` plans `[n1, n2]`; the first of equal
/// ones. Exchanging c1 `[n1, n1]` and c2 `[n2, n2]` transposes the result and changes no bit of the value.
///
/// # Errors
/// As [`conditional_gradient`].
pub fn refine(c1: ArrayView2<f64>, c2: ArrayView2<f64>, more: &[Array2<f64>]) -> Result<Refined> {
    let op = "refine";
    check_distances(op, "c1", c1)?;
    check_distances(op, "c2", c2)?;
    let (n1, n2) = (c1.nrows(), c2.nrows());
    more.iter().try_for_each(|plan| check_plan(op, plan.view(), n1, n2))?;
    // One order for both, since ties and rounding are not symmetric.
    if n1.cmp(&n2).then_with(|| c1.iter().partial_cmp(c2.iter()).unwrap_or(Ordering::Equal)).is_gt() {
        let more: Vec<_> = more.iter().map(|plan| plan.t().to_owned()).collect();
        let refined = refine(c2, c1, &more)?;
        return Ok(Refined { plan: refined.plan.reversed_axes(), ..refined });
    }
    let mut starts = vec![plans::product(n1, n2)];
    if n1 == n2 {
        starts.extend([plans::mean(n1), plans::identity(n1)]);
    }
    starts.push(plans::sorted(c1, c2));
    let descent = Descent::new(c1.reborrow(), c2.reborrow());
    let found = starts.iter().chain(more).map(|start| descent.run(start.view()));
    Ok(found.reduce(|best, other| if other.value < best.value { other } else { best }).expect("the product"))
}

/// Conditional gradient from `start` `[n1, n2]`, which is rounded to exact sums first: c1 `[n1, n1]` and c2 `[n2, n2]`
/// symmetric.
///
/// # Errors
/// [`Error::Shape`] if a matrix does not fit; [`Error::Run`] if an element is negative or not finite.
pub fn conditional_gradient(c1: ArrayView2<f64>, c2: ArrayView2<f64>, start: ArrayView2<f64>) -> Result<Refined> {
    let op = "conditional_gradient";
    check_distances(op, "c1", c1)?;
    check_distances(op, "c2", c2)?;
    check_plan(op, start, c1.nrows(), c2.nrows())?;
    Ok(Descent::new(c1.reborrow(), c2.reborrow()).run(start))
}

fn check_plan(op: &'static str, plan: ArrayView2<f64>, n1: usize, n2: usize) -> Result<()> {
    if plan.dim() != (n1, n2) {
        let (expected, got) = (format!("[{n1}, {n2}]"), format!("{:?}", plan.shape()));
        return Err(Error::Shape { op, what: "plan".into(), expected, got });
    }
    match plan.indexed_iter().find(|(_, weight)| !(0.0..=1.0).contains(*weight)) {
        None => Ok(()),
        Some(((i, j), weight)) => {
            Err(Error::Run(format!("{op}: plan[{i}, {j}]: expected a weight from 0 to 1, got {weight}")))
        }
    }
}

/// Two layers.
struct Descent<'a> {
    c1: ArrayView2<'a, f64>,
    c2: ArrayView2<'a, f64>,
    /// `mean C1² + mean C2²`.
    squares: f64,
}

impl<'a> Descent<'a> {
    fn new(c1: ArrayView2<'a, f64>, c2: ArrayView2<'a, f64>) -> Self {
        let mean_square = |c: ArrayView2<f64>| c.iter().map(|d| d * d).sum::<f64>() / c.len() as f64;
        Descent { c1, c2, squares: mean_square(c1) + mean_square(c2) }
    }

    fn run(&self, start: ArrayView2<f64>) -> Refined {
        let mut plan = plans::rounded(start);
        let mut g = multiply(&multiply(&self.c1, &plan.view()).view(), &self.c2);
        let mut linear = LinearProblem::new(plan.nrows(), plan.ncols());
        let mut iterations = 0;
        loop {
            iterations += 1;
            let here = inner(&g, &plan);
            let value = self.squares - 2.0 * here;
            let vertex = linear.solve(g.mapv(|g| -g).view());
            let ahead = inner_moves(&g, &vertex);
            let gap = 4.0 * (ahead - here);
            if gap <= TOLERANCE * value + ROUNDING * self.squares || iterations == MOST_STEPS {
                return Refined { plan, value: not_negative(value), iterations };
            }
            let vertex_g = multiply(&self.times_moves(&vertex).view(), &self.c2);
            // The value at T + t (V - T) is that at T, less t gap, plus t² bend.
            let bend = 4.0 * ahead - 2.0 * (here + inner_moves(&vertex_g, &vertex));
            let step = if 2.0 * bend > gap { gap / (2.0 * bend) } else { 1.0 };
            plan *= 1.0 - step;
            vertex.iter().for_each(|&Move { from, to, weight }| plan[[from, to]] += step * weight);
            g.zip_mut_with(&vertex_g, |g, vertex_g| *g = (1.0 - step) * *g + step * vertex_g);
        }
    }

    /// `C1 V`.
    fn times_moves(&self, moves: &[Move]) -> Array2<f64> {
        let mut product = Array2::zeros((self.c1.nrows(), self.c2.nrows()));
        for (mut line, distances) in product.rows_mut().into_iter().zip(self.c1.rows()) {
            moves.iter().for_each(|&Move { from, to, weight }| line[to] += weight * distances[from]);
        }
        product
    }
}

/// `max(value, 0)` that keeps a NaN.
fn not_negative(value: f64) -> f64 {
    if value < 0.0 { 0.0 } else { value }
}

/// `Σ a[i, j] b[i, j]`.
fn inner(a: &Array2<f64>, b: &Array2<f64>) -> f64 {
    Zip::from(a).and(b).fold(0.0, |sum, a, b| sum + a * b)
}

/// `Σ a[from, to] weight`.
fn inner_moves(a: &Array2<f64>, moves: &[Move]) -> f64 {
    moves.iter().map(|step| a[[step.from, step.to]] * step.weight).sum()
}

/// `a b`, on the calling thread: pairs of layers run in parallel, and no sum depends on how many do. 2026-11, one core,
/// n = 256: faer .52 ms, ndarray 1.08 ms.
fn multiply(a: &ArrayView2<f64>, b: &ArrayView2<f64>) -> Array2<f64> {
    let ((rows, inner), columns) = (a.dim(), b.ncols());
    let (a, b) = (a.as_standard_layout(), b.as_standard_layout());
    let mut product = vec![0.0; rows * columns];
    matmul(
        MatMut::from_row_major_slice_mut(&mut product, rows, columns),
        Accum::Replace,
        MatRef::from_row_major_slice(a.as_slice().expect("standard layout"), rows, inner),
        MatRef::from_row_major_slice(b.as_slice().expect("standard layout"), inner, columns),
        1.0,
        Par::Seq,
    );
    Array2::from_shape_vec((rows, columns), product).expect("rows times columns")
}
