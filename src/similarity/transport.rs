//! The transport problem between uniform weights, `min Σ_ij costs[i, j] T[i, j]` over plans T whose rows sum to 1/m and
//! whose columns sum to 1/n, by successive shortest paths (Ahuja, Magnanti, Orlin 1993, section 9.7).
//!
//! In units of 1/lcm(m, n) each row gives n/g units and each column takes m/g, g = gcd(m, n), so amounts are integers and
//! the optimum is exact but for the rounding of path lengths. Rows and columns have potentials: `costs[i, j] - row[i] -
//! column[j]` is never negative, and zero where something flows. As in [`super::assignment`], which is faster where m = n,
//! the columns' potentials of one problem begin the next.

use ndarray::{Array2, ArrayView2};

/// An element of a plan that is not zero.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Move {
    /// Row.
    pub from: usize,
    /// Column.
    pub to: usize,
    /// Its weight; those of a plan sum to 1.
    pub weight: f64,
}

/// Not reached by a path yet.
const NONE: usize = usize::MAX;

/// Solves transport problems of one size, each beginning from the potentials of the one before.
pub struct Transport {
    /// Units that each row gives and each column takes.
    supply: usize,
    demand: usize,
    rows: Vec<f64>,
    columns: Vec<f64>,
    /// Units in transport.
    flow: Array2<usize>,
}

/// Shortest paths from one row: lengths, and where each came from.
struct Paths {
    to_row: Vec<f64>,
    to_column: Vec<f64>,
    column_before: Vec<usize>,
    row_before: Vec<usize>,
}

impl Transport {
    /// From m rows to n columns, neither zero.
    pub fn new(m: usize, n: usize) -> Self {
        let divisor = gcd(m, n);
        let (rows, columns) = (vec![0.0; m], vec![0.0; n]);
        Transport { supply: n / divisor, demand: m / divisor, rows, columns, flow: Array2::zeros((m, n)) }
    }

    /// A plan of the lowest cost: `costs` `[m, n]`.
    ///
    /// # Panics
    /// If the size is another, or a cost is not finite.
    pub fn solve(&mut self, costs: ArrayView2<f64>) -> Vec<Move> {
        assert_eq!(costs.dim(), self.flow.dim(), "costs of a transport problem");
        self.flow.fill(0);
        for (potential, line) in self.rows.iter_mut().zip(costs.rows()) {
            let net = line.iter().zip(&self.columns).map(|(cost, price)| cost - price);
            *potential = net.fold(f64::INFINITY, f64::min);
        }
        let mut wanted = vec![self.demand; self.columns.len()];
        for row in 0..self.rows.len() {
            let mut left = self.supply;
            while left > 0 {
                let (paths, end) = self.shortest_paths(costs, row, &wanted);
                self.update_potentials(&paths, paths.to_column[end]);
                let sent = self.send(&paths, row, end, left.min(wanted[end]));
                left -= sent;
                wanted[end] -= sent;
            }
        }
        let unit = 1.0 / (self.supply * self.rows.len()) as f64;
        let moved = self.flow.indexed_iter().filter(|(_, units)| **units > 0);
        moved.map(|((from, to), &units)| Move { from, to, weight: units as f64 * unit }).collect()
    }

    /// Paths from `start` until the nearest column that wants more, which is returned too.
    fn shortest_paths(&self, costs: ArrayView2<f64>, start: usize, wanted: &[usize]) -> (Paths, usize) {
        let (m, n) = self.flow.dim();
        let mut paths = Paths {
            to_row: vec![f64::INFINITY; m],
            to_column: vec![f64::INFINITY; n],
            column_before: vec![NONE; m],
            row_before: vec![NONE; n],
        };
        let mut left: Vec<usize> = (0..n).collect();
        let relax = |paths: &mut Paths, left: &[usize], row: usize, length: f64| {
            paths.to_row[row] = length;
            for &column in left {
                // Rounding may leave a reduced cost just below zero.
                let reduced = (costs[[row, column]] - self.rows[row] - self.columns[column]).max(0.0);
                if length + reduced < paths.to_column[column] {
                    paths.to_column[column] = length + reduced;
                    paths.row_before[column] = row;
                }
            }
        };
        relax(&mut paths, &left, start, 0.0);
        loop {
            let length = |i: usize| paths.to_column[left[i]];
            let shorter = |best: usize, i: usize| if length(i) < length(best) { i } else { best };
            let nearest = (0..left.len()).reduce(shorter).expect("as much is wanted as given");
            let column = left.swap_remove(nearest);
            if wanted[column] > 0 {
                return (paths, column);
            }
            // Whatever flows into a full column may be sent elsewhere.
            let length = paths.to_column[column];
            for row in 0..m {
                if self.flow[[row, column]] > 0 && paths.to_row[row] == f64::INFINITY {
                    paths.column_before[row] = column;
                    relax(&mut paths, &left, row, length);
                }
            }
        }
    }

    /// Makes the path of this length one of zero reduced costs, and no reduced cost negative.
    fn update_potentials(&mut self, paths: &Paths, length: f64) {
        for (potential, to) in self.rows.iter_mut().zip(&paths.to_row) {
            *potential += if *to < length { length - to } else { 0.0 };
        }
        for (potential, to) in self.columns.iter_mut().zip(&paths.to_column) {
            *potential -= if *to < length { length - to } else { 0.0 };
        }
    }

    /// Sends as many units along the path to `end` as it carries, at most `most`; returns how many.
    fn send(&mut self, paths: &Paths, start: usize, end: usize, most: usize) -> usize {
        let (mut sent, mut column) = (most, end);
        while paths.row_before[column] != start {
            let row = paths.row_before[column];
            column = paths.column_before[row];
            sent = sent.min(self.flow[[row, column]]);
        }
        column = end;
        loop {
            let row = paths.row_before[column];
            self.flow[[row, column]] += sent;
            if row == start {
                return sent;
            }
            column = paths.column_before[row];
            self.flow[[row, column]] -= sent;
        }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
