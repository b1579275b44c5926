//! The training loop.

use super::array::{Seat, TicketArray};
use super::batches::Batches;
use super::feed::Feed;
use super::labelled::Labelled;
use super::recipe::Recipe;
use crate::device::{Buffer, Device, Graph};
use crate::error::{Error, Result};
use crate::nn::network::{Mode, Network};
use crate::nn::snapshot::Snapshot;
use crate::ops::loss::{LossInput, LossShape, LossTables, cross_entropy};
use crate::ops::step::{StepTables, step_begin, step_end};
use crate::profile::range;

/// Most steps of a chunk: after so many the host looks at the losses, and a NaN stops the run.
const MOST_ROWS: usize = 256;

/// Steps that are done, and what they measured.
pub struct Chunk {
    /// Number of the first step, from 0.
    pub first_step: usize,
    /// Epoch of the steps, from 0.
    pub epoch: usize,
    /// Mean loss of each step's batch.
    pub loss: Vec<f32>,
    /// Correct predictions of each step.
    pub top1: Vec<u32>,
    /// Samples of each step.
    pub count: Vec<u32>,
    /// Learning rate of each step.
    pub rate: Vec<f32>,
}

/// Is told of each chunk: writes metrics and checkpoints, shows progress.
pub trait Observer {
    /// `done` steps of `total` are done.
    ///
    /// # Errors
    /// An error stops the training.
    fn chunk(&mut self, chunk: &Chunk, network: &Network, done: usize, total: usize) -> Result<()>;
}

/// Observes nothing.
impl Observer for () {
    fn chunk(&mut self, _: &Chunk, _: &Network, _: usize, _: usize) -> Result<()> {
        Ok(())
    }
}

/// The training of one network: what a step reads and writes beside the network itself.
pub struct Training<'a> {
    device: Device,
    data: &'a Labelled<'a>,
    recipe: Recipe,
    seed: u64,
    feed: Feed<'a>,
    loss_shape: LossShape,
    rows: usize,
    stop: usize,
    tables: Tables,
    array: Option<&'a TicketArray>,
    replayed: Option<Replayed<'a>>,
}

/// The captured step: of this training, or one with those of others.
enum Replayed<'a> {
    Alone(Graph),
    Together(Seat<'a>),
}

/// On the device: one row per step of a chunk.
struct Tables {
    /// Row of the next step, number of the next step.
    state: Buffer<u32>,
    count: Buffer<u32>,
    rate: Buffer<f32>,
    corrections: Buffer<f32>,
    loss: Buffer<f32>,
    top1: Buffer<u32>,
    top5: Buffer<u32>,
}

impl<'a> Training<'a> {
    /// Prepares the training of `network`, whose weights and velocity are where the first step begins.
    ///
    /// # Errors
    /// [`Error::Usage`] if the recipe makes no sense or the data does not fit the network.
    pub fn new(network: &mut Network, data: &'a Labelled<'a>, recipe: &Recipe, seed: u64) -> Result<Self> {
        recipe.check()?;
        data.check_fits(network.model().image, network.model().classes)?;
        network.set_decay(recipe.decay_norms)?;
        network.set_seed(seed);
        let device = network.device().clone();
        let rows = recipe.steps_per_epoch(data.len()).min(MOST_ROWS);
        let tables = Tables {
            state: device.alloc(2)?,
            count: device.alloc(rows)?,
            rate: device.alloc(rows)?,
            corrections: device.alloc(2 * rows)?,
            loss: device.alloc(rows)?,
            top1: device.alloc(rows)?,
            top5: device.alloc(rows)?,
        };
        let augment = recipe.augment(data.images.stored, data.images.shape, seed);
        Ok(Training {
            feed: Feed::new(&device, data, recipe.batch, rows, augment)?,
            loss_shape: LossShape::new(network.model().classes, recipe.batch)?,
            recipe: recipe.clone(),
            device,
            data,
            seed,
            rows,
            stop: recipe.total_steps(data.len()),
            tables,
            array: None,
            replayed: None,
        })
    }

    /// Stops after so many steps; the learning rates stay those of the whole training.
    pub fn stop_after(&mut self, steps: usize) {
        self.stop = self.stop.min(steps);
    }

    /// Does its steps together with other trainings.
    pub fn join(&mut self, array: Option<&'a TicketArray>) {
        self.array = array;
    }

    /// Steps of the whole training, or those after which it stops.
    pub fn total_steps(&self) -> usize {
        self.stop
    }

    /// Trains from step `from` to the end.
    ///
    /// # Errors
    /// [`Error::Run`] if the loss is not finite, with the step and the first layer whose value is not;
    /// [`Error::Launch`] if the device fails; an error of the observer.
    pub fn run(&mut self, network: &mut Network, from: usize, observer: &mut dyn Observer) -> Result<()> {
        let (total, per_epoch) = (self.total_steps(), self.recipe.steps_per_epoch(self.data.len()));
        self.feed.begin(self.batches(from))?;
        let (mut step, mut before) = (from, Snapshot::new(network)?);
        let mut profiled = None;
        while step < total {
            let epoch = step / per_epoch;
            if step == from || step % per_epoch == 0 {
                // The last epoch's range ends before the next one begins.
                drop(profiled.take());
                profiled = Some(range(format_args!("epoch {epoch}")));
            }
            let rows = self.rows.min(total - step).min((epoch + 1) * per_epoch - step);
            before.take(network)?;
            let chunk = self.chunk(network, step, rows)?;
            step += rows;
            if let Some(row) = chunk.loss.iter().position(|loss| !loss.is_finite()) {
                let layer = self.first_not_finite(network, &before, chunk.first_step, row)?;
                return Err(Error::Run(format!(
                    "training diverged: the loss of step {} (epoch {epoch}) is {}; the first layer with such a value \
                     is {layer}; try a smaller --lr, a longer --warmup or --clip-norm",
                    chunk.first_step + row,
                    chunk.loss[row],
                )));
            }
            observer.chunk(&chunk, network, step, total)?;
        }
        // Where steps are done together, the others need not wait for this training any more.
        self.replayed = None;
        Ok(())
    }

    /// Does the steps of the last chunk again up to step `row`, whose loss is not finite, and names the first layer whose
    /// value is not: after that step every layer's would be.
    fn first_not_finite(
        &mut self,
        network: &mut Network,
        before: &Snapshot,
        first_step: usize,
        row: usize,
    ) -> Result<String> {
        before.restore(network)?;
        self.device.write(&[0, first_step as u32], self.tables.state.view_mut())?;
        self.feed.begin(self.batches(first_step))?;
        self.feed.chunk(row + 1)?;
        for _ in 0..row {
            self.feed.step()?;
            self.step(network)?;
        }
        self.feed.step()?;
        self.begin(network)?;
        network.first_not_finite()
    }

    /// Does `rows` steps of one epoch.
    fn chunk(&mut self, network: &mut Network, first_step: usize, rows: usize) -> Result<Chunk> {
        let (examples, batch) = (self.data.len(), self.recipe.batch);
        let per_epoch = self.recipe.steps_per_epoch(examples);
        let (epoch, place) = (first_step / per_epoch, first_step % per_epoch * batch);
        let count: Vec<u32> = (0..rows).map(|row| batch.min(examples - place - row * batch) as u32).collect();
        let rate: Vec<f32> = (first_step..first_step + rows).map(|s| self.recipe.rate(s, examples) as f32).collect();
        let corrections: Vec<f32> = (first_step..first_step + rows).flat_map(|s| self.recipe.corrections(s)).collect();
        let (device, tables) = (&self.device, &mut self.tables);
        device.write(&[0, first_step as u32], tables.state.view_mut())?;
        device.write(&count, tables.count.slice_mut(0..rows))?;
        device.write(&rate, tables.rate.slice_mut(0..rows))?;
        device.write(&corrections, tables.corrections.slice_mut(0..2 * rows))?;
        self.feed.chunk(rows)?;
        let (mut step, end) = (first_step, first_step + rows);
        while step < end {
            let _range = range(format_args!("step {step}"));
            self.feed.step()?;
            step += self.steps(network, end - step)?;
        }
        Ok(Chunk {
            first_step,
            epoch,
            loss: self.device.read(self.tables.loss.slice(0..rows))?,
            top1: self.device.read(self.tables.top1.slice(0..rows))?,
            count,
            rate,
        })
    }

    /// Does the next steps, one at least and at most so many; how many they were.
    fn steps(&mut self, network: &mut Network, most: usize) -> Result<usize> {
        match &self.replayed {
            Some(Replayed::Alone(graph)) => graph.replay().map(|()| 1),
            Some(Replayed::Together(seat)) => {
                let steps = if self.feed.is_resident() { most } else { 1 };
                self.device.synchronize()?;
                seat.replay(steps).map(|()| steps)
            }
            None => {
                // Once without capture, so that everything is loaded; then recorded, to be replayed from now on.
                self.step(network)?;
                let device = self.device.clone();
                let step = device.record(|| self.step(network))?;
                self.replayed = Some(match self.array {
                    Some(array) => Replayed::Together(array.join(step)),
                    None => Replayed::Alone(device.together(&[&step])?),
                });
                Ok(1)
            }
        }
    }

    /// The examples of the steps from `from` on.
    fn batches(&self, from: usize) -> Batches {
        let per_epoch = self.recipe.steps_per_epoch(self.data.len());
        let shuffle = self.recipe.shuffle.then_some(self.seed);
        Batches::new(self.data, self.recipe.batch, per_epoch, shuffle, from..self.stop)
    }

    /// Settings and batch of the next step.
    fn begin(&mut self, network: &mut Network) -> Result<()> {
        let (device, tables) = (&self.device, &self.tables);
        let (count, rate, corrections) = (tables.count.view(), tables.rate.view(), tables.corrections.view());
        let rows = StepTables { count, rate, corrections };
        step_begin(device, tables.state.view(), rows, network.batch().current)?;
        self.feed.load(&tables.state, network)
    }

    fn step(&mut self, network: &mut Network) -> Result<()> {
        self.begin(network)?;
        network.forward(Mode::Train)?;
        let (device, tables) = (&self.device, &mut self.tables);
        let Recipe { label_smoothing, clip_norm, .. } = self.recipe;
        let head = network.head();
        let step = tables.state.slice(0..1);
        let input =
            LossInput { logits: head.logits, labels: head.labels, count: head.count, step, smoothing: label_smoothing };
        let (loss, top1, top5) = (tables.loss.view_mut(), tables.top1.view_mut(), tables.top5.view_mut());
        cross_entropy(device, &self.loss_shape, input, LossTables { loss, top1, top5 }, head.gradient)?;
        network.backward()?;
        network.update(&self.recipe.optimizer(), clip_norm)?;
        step_end(device, tables.state.view_mut())
    }
}
