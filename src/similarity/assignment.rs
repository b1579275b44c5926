//! The linear assignment problem, `min Σ_i costs[i, x(i)]` over permutations x: an auction, finished by shortest
//! augmenting paths (Bertsekas 1988; Jonker and Volgenant 1987).
//!
//! Columns have prices. A free row bids for the column of the least `costs[i, j] - price[j]`: it lowers that price until its
//! second choice is as good, and whoever had the column is free again. An assignment is optimal if every row has such a
//! column, which bids keep true of rows that are assigned, and shortest paths (Dijkstra) of the rows that are left.
//!
//! No stage asks where prices come from, so those of one problem begin the next, similar one. Where they are far off, as
//! they are at first, bids leave many rows to long paths, the more so with the costs of Gromov-Wasserstein, of which many
//! are nearly equal. Then bids that lower prices by ε more than they must come first, a smaller ε in each round, until
//! prices are nearly right (ε-scaling).

use std::collections::VecDeque;

use ndarray::ArrayView2;

/// Bids for each row without ε, and in each round with it.
const BIDS: usize = 5;
const EPSILON_BIDS: usize = 20;
/// Rounds with ε come first where more than one row in so many is left.
const MOST_FREE: usize = 10;
/// ε as a share of the range of costs: in the first round, and a bound for the last; how many times smaller each round is.
const FIRST_EPSILON: f64 = 0.1;
const LAST_EPSILON: f64 = 1e-5;
const EPSILON_FALL: f64 = 5.0;
/// Columns that are looked at together.
const LANES: usize = 8;
/// A row or a column without a partner.
const FREE: usize = usize::MAX;

/// Solves assignments of one size, each beginning from the prices of the one before.
pub struct Assignment {
    prices: Vec<f64>,
    /// Column of each row, row of each column.
    column_of: Vec<usize>,
    row_of: Vec<usize>,
    /// Of the shortest paths so far: length to each open column, and the row before each column. Whole lanes.
    length: Vec<f64>,
    before: Vec<u64>,
    /// Columns whose length is final, with it; their open price is -infinity, that of others the price.
    closed: Vec<(usize, f64)>,
    open_price: Vec<f64>,
}

impl Assignment {
    /// For n rows and columns.
    pub fn new(n: usize) -> Self {
        let padded = n.next_multiple_of(LANES);
        Assignment {
            prices: vec![0.0; n],
            column_of: vec![FREE; n],
            row_of: vec![FREE; n],
            length: vec![0.0; padded],
            before: vec![0; padded],
            closed: Vec::new(),
            open_price: vec![f64::NEG_INFINITY; padded],
        }
    }

    /// The column of each row in an assignment of the lowest cost: `costs` `[n, n]`.
    ///
    /// # Panics
    /// If the size is another, or a cost is not finite.
    pub fn solve(&mut self, costs: ArrayView2<f64>) -> &[usize] {
        let n = self.prices.len();
        assert_eq!(costs.dim(), (n, n), "costs of an assignment of {n}");
        let costs = costs.as_standard_layout();
        let costs = costs.as_slice().expect("standard layout");
        let mut free = self.bid(costs, 0.0, BIDS * n);
        if free.len() > n / MOST_FREE {
            let (least, most) = costs.iter().fold((f64::MAX, f64::MIN), |(a, b), &cost| (a.min(cost), b.max(cost)));
            let range = most - least;
            let mut epsilon = FIRST_EPSILON * range;
            while epsilon > LAST_EPSILON * range {
                self.bid(costs, epsilon, EPSILON_BIDS * n);
                epsilon /= EPSILON_FALL;
            }
            free = self.bid(costs, 0.0, BIDS * n);
        }
        for row in free {
            self.augment(costs, row);
        }
        &self.column_of
    }

    /// Frees all rows and assigns them by bids; returns those that are left after so many bids.
    fn bid(&mut self, costs: &[f64], epsilon: f64, most_bids: usize) -> VecDeque<usize> {
        let n = self.prices.len();
        self.column_of.fill(FREE);
        self.row_of.fill(FREE);
        let mut free: VecDeque<usize> = (0..n).collect();
        for _ in 0..most_bids {
            let Some(row) = free.pop_front() else { break };
            let (mut first, mut second) = ((f64::INFINITY, FREE), (f64::INFINITY, FREE));
            for (column, (cost, price)) in costs[row * n..][..n].iter().zip(&self.prices).enumerate() {
                let net = cost - price;
                if net < second.0 {
                    second = (net, column);
                    if net < first.0 {
                        (first, second) = (second, first);
                    }
                }
            }
            let mut column = first.1;
            let margin = second.0 - first.0 + epsilon;
            if second.1 == FREE {
                // The only column: nobody bids against this row.
            } else if margin > 0.0 {
                self.prices[column] -= margin;
            } else if self.row_of[column] != FREE {
                // Both are as good: the other may be free.
                column = second.1;
            }
            let outbid = std::mem::replace(&mut self.row_of[column], row);
            self.column_of[row] = column;
            if outbid != FREE {
                self.column_of[outbid] = FREE;
                free.push_back(outbid);
            }
        }
        free
    }

    /// Assigns one more row, by the shortest alternating path from it to a free column.
    fn augment(&mut self, costs: &[f64], start: usize) {
        let n = self.prices.len();
        self.open_price[..n].copy_from_slice(&self.prices);
        self.length.fill(f64::INFINITY);
        self.closed.clear();
        let (mut row, mut detour) = (start, 0.0);
        let (end, shortest) = loop {
            let shortest = self.relax(&costs[row * n..][..n], row, detour);
            let column = self.length.iter().position(|&length| length == shortest).expect("a free column is left");
            row = self.row_of[column];
            if row == FREE {
                break (column, shortest);
            }
            detour = shortest - (costs[row * n + column] - self.prices[column]);
            self.closed.push((column, shortest));
            self.length[column] = f64::INFINITY;
            self.open_price[column] = f64::NEG_INFINITY;
        };
        for &(column, length) in &self.closed {
            self.prices[column] += length - shortest;
        }
        let mut column = end;
        loop {
            let row = self.before[column] as usize;
            self.row_of[column] = row;
            column = std::mem::replace(&mut self.column_of[row], column);
            if row == start {
                break;
            }
        }
    }

    /// Takes the ways over a row, whose costs are `line`, where they are shorter; returns the shortest open length.
    /// No way undercuts the infinite length of a closed column, so that the loop has no branch and runs in vectors.
    fn relax(&mut self, line: &[f64], row: usize, detour: f64) -> f64 {
        let mut shortest = [f64::INFINITY; LANES];
        let (line, rest) = line.as_chunks::<LANES>();
        let mut last = [0.0; LANES];
        last[..rest.len()].copy_from_slice(rest);
        let columns = line.iter().chain([&last]).zip(self.open_price.as_chunks::<LANES>().0);
        let ways = self.length.as_chunks_mut::<LANES>().0.iter_mut().zip(self.before.as_chunks_mut::<LANES>().0);
        for ((costs, prices), (lengths, befores)) in columns.zip(ways) {
            for lane in 0..LANES {
                let length = costs[lane] - prices[lane] + detour;
                let shorter = length < lengths[lane];
                lengths[lane] = if shorter { length } else { lengths[lane] };
                befores[lane] = if shorter { row as u64 } else { befores[lane] };
                shortest[lane] = if lengths[lane] < shortest[lane] { lengths[lane] } else { shortest[lane] };
            }
        }
        shortest.into_iter().fold(f64::INFINITY, f64::min)
    }
}
