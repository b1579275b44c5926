//! Evaluation: loss and accuracy with running statistics.

use std::collections::BTreeMap;

use super::batches::Batches;
use super::feed::Feed;
use super::labelled::Labelled;
use crate::device::{Reals, Slice};
use crate::error::{Error, Result};
use crate::nn::model::Layer;
use crate::nn::network::{Mode, Network};
use crate::ops::loss::{LossInput, LossShape, LossTables, cross_entropy};
use crate::ops::step::{StepTables, step_begin, step_end};
use crate::profile::range;

/// Moves the running statistics to those of the network as it is: one pass over the examples in file order, with the
/// batches' statistics, and without a step of the optimizer.
///
/// # Errors
/// As [`evaluate`].
pub fn refresh_statistics(network: &mut Network, data: &Labelled, batch: usize) -> Result<()> {
    pass(network, data, batch, |network, _, _| network.forward(Mode::Train))
}

/// Sums of the magnitudes of what each row of each convolution and linear layer puts out, over all examples, by name of
/// the weights; with the batches' statistics. The network is one that is trained.
///
/// # Errors
/// As [`evaluate`].
pub fn row_magnitudes(network: &mut Network, data: &Labelled, batch: usize) -> Result<BTreeMap<String, Vec<f64>>> {
    let mut sums: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    pass(network, data, batch, |network, _, _| {
        network.forward(Mode::Train)?;
        for layer in &network.model().layers {
            let &Layer::Conv { weight, output, .. } = layer else { continue };
            let magnitudes = network.feature_magnitudes(output)?;
            let name = network.model().parameters[weight].name.clone();
            let sum = sums.entry(name).or_insert_with(|| vec![0.0; magnitudes.len()]);
            sum.iter_mut().zip(magnitudes).for_each(|(sum, more)| *sum += more);
        }
        Ok(())
    })?;
    Ok(sums)
}

/// Shows a network, whose batches have room for all examples, all of them at once; `done` is told of each layer's output as
/// [`Network::forward_with`] tells it, with running statistics.
///
/// # Errors
/// As [`evaluate`]; what `done` returns.
pub fn observe(network: &mut Network, data: &Labelled, mut done: impl FnMut(usize, Reals) -> Result<()>) -> Result<()> {
    pass(network, data, data.len(), |network, _, _| network.forward_with(Mode::Evaluate, &mut done))
}

/// Goes over the examples in file order. With each batch in its input, `forward` is given the network, the row of the batch
/// in device memory, and its number of true samples.
fn pass(
    network: &mut Network,
    data: &Labelled,
    batch: usize,
    mut forward: impl FnMut(&mut Network, Slice<u32>, usize) -> Result<()>,
) -> Result<()> {
    data.check_fits(network.model().image, network.model().classes)?;
    let device = network.device().clone();
    let examples = data.len();
    let counts: Vec<u32> = (0..examples.div_ceil(batch)).map(|row| batch.min(examples - row * batch) as u32).collect();
    let rows = counts.len();
    let mut feed = Feed::new(&device, data, batch, rows, None)?;
    feed.begin(Batches::new(data, batch, rows, None, 0..rows))?;
    feed.chunk(rows)?;
    let mut state = device.alloc::<u32>(2)?;
    // What an optimizer would read stays zero.
    let (count, rate, corrections) =
        (device.upload(&counts)?, device.alloc::<f32>(rows)?, device.alloc::<f32>(2 * rows)?);
    let tables = StepTables { count: count.view(), rate: rate.view(), corrections: corrections.view() };
    for &samples in &counts {
        feed.step()?;
        step_begin(&device, state.view(), tables, network.batch().current)?;
        feed.load(&state, network)?;
        forward(network, state.slice(0..1), samples as usize)?;
        step_end(&device, state.view_mut())?;
    }
    Ok(())
}

/// How well a network does on some examples.
#[derive(Clone, Debug)]
pub struct Score {
    /// Number of examples.
    pub examples: usize,
    /// Mean cross entropy.
    pub loss: f64,
    /// Fraction whose label has the largest logit.
    pub top1: f64,
    /// Fraction whose label is among the five largest.
    pub top5: f64,
    /// Logits, `[examples, classes]` in file order, where they were asked for.
    pub logits: Vec<f32>,
}

/// Evaluates a network, whose batches have room for `batch` samples, on all examples of `data`.
///
/// # Errors
/// [`Error::Usage`] if the data does not fit the network; [`Error::Run`] if the loss is not finite; [`Error::Launch`]
/// if the device fails.
pub fn evaluate(network: &mut Network, data: &Labelled, batch: usize, with_logits: bool) -> Result<Score> {
    let _range = range("evaluation");
    let classes = network.model().classes;
    let device = network.device().clone();
    let (examples, rows) = (data.len(), data.len().div_ceil(batch));
    let (mut loss, mut top1, mut top5) = (device.alloc::<f32>(rows)?, device.alloc(rows)?, device.alloc(rows)?);
    let shape = LossShape::new(classes, batch)?;
    let (mut logits, mut counts) = (Vec::new(), Vec::new());
    pass(network, data, batch, |network, step, samples| {
        network.forward(Mode::Evaluate)?;
        let head = network.head();
        let input = LossInput { logits: head.logits, labels: head.labels, count: head.count, step, smoothing: 0.0 };
        let tables = LossTables { loss: loss.view_mut(), top1: top1.view_mut(), top5: top5.view_mut() };
        cross_entropy(&device, &shape, input, tables, None)?;
        counts.push(samples as f64);
        if with_logits {
            let columns = device.read_reals(network.head().logits)?;
            let n = columns.len() / classes;
            for sample in 0..samples {
                logits.extend((0..classes).map(|class| columns[class * n + sample]));
            }
        }
        Ok(())
    })?;
    let share = |table: Vec<u32>| table.into_iter().map(u64::from).sum::<u64>() as f64 / examples as f64;
    let losses = device.read(loss.view())?;
    let sum: f64 = losses.iter().zip(&counts).map(|(&loss, count)| f64::from(loss) * count).sum();
    let loss = sum / examples as f64;
    if !loss.is_finite() {
        return Err(Error::Run(format!(
            "evaluation of {examples} examples: expected a finite mean loss, got {loss}; use weights from before the \
             training diverged"
        )));
    }
    Ok(Score { examples, loss, top1: share(device.read(top1.view())?), top5: share(device.read(top5.view())?), logits })
}
