//! How similar the layers of a search's tickets are: dense, core, specialists, union, or what the method made of them.

use super::experiment::{Experiment, Repetition, Ticket};
use crate::device::Device;
use crate::error::Result;
use crate::nn::network::Network;
use crate::nn::plan::Use;
use crate::nn::weights::Weights;
use crate::similarity::compare::{
    Comparing, EPSILON, ITERATIONS, MeasuredNetwork, REFINE_UP_TO, STEPS, Similarity, compare,
};
use crate::similarity::distances::Metric;
use crate::similarity::gw::Options;
use crate::similarity::representations::{Measuring, Output, outputs};
use crate::similarity::store::PairStore;
use crate::train::{Images, Labelled};

/// Probe images: enough to see modules, few enough to take seconds.
pub const PROBES: usize = 64;
/// Most layers of a network.
pub const LAYERS: usize = 5;
/// Bytes that pairs may take together.
const MEMORY: usize = 256 << 20;

/// Compares the layers of a repetition's retrained tickets, its controls and parts left out, on test images: the first of
/// each class in turn. Reads what is there already.
///
/// # Errors
/// [`crate::Error::Device`] when memory runs out; [`crate::Error::File`] if the folder cannot be written.
pub fn of_tickets(repetition: &Repetition, device: &Device, tickets: &[Ticket]) -> Result<Similarity> {
    let Experiment { data, config, folder, progress, .. } = *repetition.experiment;
    let stage = folder.similarity(repetition.seed)?;
    if let Some(similarity) = stage.similarity()? {
        return Ok(similarity);
    }
    let mut store = PairStore::open(&stage.pairs())?;
    let model = config.build()?;
    let chosen = some_of(outputs(&model, &[])?);
    let probes = data.test.spread(data.classes, PROBES, data.stored.iter().product());
    let images = Images::new(device, data, &probes)?;
    let probes = Labelled::all(device, &images, &probes, 0)?;
    let mut network = Network::new(device, &model, probes.len(), Use::Evaluate)?;
    let measuring = Measuring { metric: Metric::Euclidean, pooled: false };
    let mut measured = Vec::new();
    for ticket in tickets.iter().filter(|ticket| is_compared(ticket)) {
        let name = &ticket.name;
        network.load(&Weights::load(&folder.ticket(repetition.seed, name)?.weights())?)?;
        let title = format!("{}: distances of {name}", stage.name());
        let layers = measuring.network(&mut network, &chosen, &probes, progress, &title)?;
        measured.push(MeasuredNetwork { name: name.clone(), layers });
    }
    let solver =
        Options { epsilon: EPSILON, steps: STEPS, iterations: ITERATIONS, refine_up_to: REFINE_UP_TO, memory: MEMORY };
    let comparing = Comparing { measuring, solver, clusters: None, sigma: None, seed: repetition.seed };
    let similarity = compare(device, &measured, &comparing, Some(&mut store), progress, stage.name())?;
    stage.write_similarity(&similarity)?;
    Ok(similarity)
}

/// Whether a ticket is none of the controls, and no part's, which is its specialist and the core again.
fn is_compared(ticket: &Ticket) -> bool {
    ticket.matched.is_none() && !ticket.name.starts_with("part-")
}

/// The first, the last, and some between at even distances.
fn some_of(outputs: Vec<Output>) -> Vec<Output> {
    let last = outputs.len() - 1;
    if last < LAYERS {
        return outputs;
    }
    (0..LAYERS).map(|i| outputs[i * last / (LAYERS - 1)].clone()).collect()
}
