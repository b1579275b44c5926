//! Optimal transport with a linear cost between uniform weights: assignment where both sides have as many points,
//! transport otherwise.

use ndarray::{Array2, ArrayView2};

pub use super::transport::Move;

use super::assignment::Assignment;
use super::transport::Transport;

/// Solves problems of one size, each beginning from the prices of the one before.
pub enum LinearProblem {
    /// Of n rows and columns.
    Assignment(usize, Assignment),
    /// Of rows and columns of different numbers.
    Transport(Transport),
}

impl LinearProblem {
    /// From n1 rows to n2 columns, neither zero.
    pub fn new(n1: usize, n2: usize) -> Self {
        if n1 == n2 {
            LinearProblem::Assignment(n1, Assignment::new(n1))
        } else {
            LinearProblem::Transport(Transport::new(n1, n2))
        }
    }

    /// A plan of the lowest cost: `costs` `[n1, n2]`.
    ///
    /// # Panics
    /// If the size is another, or a cost is not finite.
    pub fn solve(&mut self, costs: ArrayView2<f64>) -> Vec<Move> {
        match self {
            LinearProblem::Assignment(n, assignment) => {
                let weight = 1.0 / *n as f64;
                let columns = assignment.solve(costs).iter().enumerate();
                columns.map(|(from, &to)| Move { from, to, weight }).collect()
            }
            LinearProblem::Transport(transport) => transport.solve(costs),
        }
    }
}

/// The matrix `[n1, n2]` of a plan.
pub fn to_matrix(moves: &[Move], n1: usize, n2: usize) -> Array2<f64> {
    let mut plan = Array2::zeros((n1, n2));
    moves.iter().for_each(|step| plan[[step.from, step.to]] = step.weight);
    plan
}
