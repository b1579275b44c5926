//! `dilt bench --tickets`: steps of several networks at a time.

use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use dilt::device::{Device, Graph, Recording};

use super::step::Trained;

/// Times of so many runs are taken of each way, by turns; the median is told.
const ROUNDS: usize = 5;

/// Milliseconds for a step of each network, which has a handle of its own to the device: side by side, each on its stream
/// from a thread of its own; and together, on a stream of `device`. `train` is a step.
pub fn measure(
    device: &Device,
    trained: &mut [Trained],
    runs: usize,
    train: impl Fn(&mut Trained) -> dilt::Result<()>,
) -> dilt::Result<[f64; 2]> {
    let record = |trained: &mut Trained| {
        train(trained)?;
        let device = trained.device().clone();
        device.record(|| train(trained))
    };
    let steps: Vec<Recording> = trained.iter_mut().map(record).collect::<dilt::Result<_>>()?;
    let alone = trained.iter().zip(&steps).map(|(trained, step)| trained.device().together(&[step]));
    let mut alone: Vec<Graph> = alone.collect::<dilt::Result<_>>()?;
    let mut together = [device.together(&steps.iter().collect::<Vec<_>>())?];
    let mut taken = [Vec::new(), Vec::new()];
    // The first round is for the caches.
    for round in 0..=ROUNDS {
        for (graphs, taken) in [&mut alone[..], &mut together].into_iter().zip(&mut taken) {
            let ms = replay(graphs, runs)?;
            if round > 0 {
                taken.push(ms);
            }
        }
    }
    Ok(taken.map(super::median))
}

/// Milliseconds for one replay of all, each on a thread of its own, done many times, once all threads are there.
fn replay(graphs: &mut [Graph], runs: usize) -> dilt::Result<f64> {
    let there = Barrier::new(graphs.len() + 1);
    let begin = thread::scope(|scope| {
        let replay = |graph: &mut Graph| {
            there.wait();
            (0..runs).try_for_each(|_| graph.replay())?;
            graph.synchronize()
        };
        let threads: Vec<_> = graphs.iter_mut().map(|graph| scope.spawn(move || replay(graph))).collect();
        there.wait();
        let begin = Instant::now();
        let done = threads.into_iter().try_for_each(|thread| thread.join().expect("a replay does not panic"));
        done.map(|()| begin)
    })?;
    Ok(begin.elapsed().as_secs_f64() * 1e3 / runs as f64)
}
