//! `dilt bench --tickets`: steps of several networks at a time.

use std::thread;
use std::time::Instant;

use dilt::device::{Device, Graph, Recording};
use dilt::nn::network::Network;

/// Times of so many runs are taken of each way, by turns; the median is told.
const ROUNDS: usize = 5;

/// Milliseconds for a step of each network, which has a handle of its own to the device: side by side, each on its stream
/// from a thread of its own; and together, on a stream of `device`. `train` is a step.
pub fn measure(
    device: &Device,
    networks: &mut [Network],
    runs: usize,
    train: impl Fn(&mut Network) -> dilt::Result<()>,
) -> dilt::Result<[f64; 2]> {
    let record = |network: &mut Network| {
        train(network)?;
        let device = network.device().clone();
        device.record(|| train(network))
    };
    let steps: Vec<Recording> = networks.iter_mut().map(record).collect::<dilt::Result<_>>()?;
    let alone = networks.iter().zip(&steps).map(|(network, step)| network.device().together(&[step]));
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

/// Milliseconds for one replay of all, each on a thread of its own, done many times.
fn replay(graphs: &mut [Graph], runs: usize) -> dilt::Result<f64> {
    let begin = Instant::now();
    thread::scope(|scope| {
        let replay = |graph: &mut Graph| {
            (0..runs).try_for_each(|_| graph.replay())?;
            graph.synchronize()
        };
        let threads: Vec<_> = graphs.iter_mut().map(|graph| scope.spawn(move || replay(graph))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("a replay does not panic"))
    })?;
    Ok(begin.elapsed().as_secs_f64() * 1e3 / runs as f64)
}
