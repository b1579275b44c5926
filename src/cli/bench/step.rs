//! The training step that `dilt bench` measures.

use dilt::device::{Buffer, Device};
use dilt::nn::model::Model;
use dilt::nn::network::{Mode, Network};
use dilt::ops::loss::{LossInput, LossShape, LossTables, cross_entropy};
use dilt::train::Recipe;

/// A network, and what the loss of a step writes beside its gradient.
pub struct Trained {
    pub network: Network,
    shape: LossShape,
    /// Of the tables, which have one.
    row: Buffer<u32>,
    loss: Buffer<f32>,
    top1: Buffer<u32>,
    top5: Buffer<u32>,
}

impl Trained {
    /// Of a network that is trained with batches of `batch` samples.
    pub fn new(network: Network, model: &Model, batch: usize) -> dilt::Result<Self> {
        let (device, classes) = (network.device().clone(), model.values[model.output()].features());
        Ok(Trained {
            network,
            shape: LossShape::new(classes, batch)?,
            row: device.alloc(1)?,
            loss: device.alloc(1)?,
            top1: device.alloc(1)?,
            top5: device.alloc(1)?,
        })
    }

    pub fn device(&self) -> &Device {
        self.network.device()
    }

    /// Forward pass, loss, backward pass and optimizer.
    pub fn step(&mut self, recipe: &Recipe) -> dilt::Result<()> {
        let Trained { network, shape, row, loss, top1, top5 } = self;
        network.forward(Mode::Train)?;
        let (device, head, smoothing) = (network.device().clone(), network.head(), recipe.label_smoothing);
        let (logits, labels, count, step) = (head.logits, head.labels, head.count, row.view());
        let tables = LossTables { loss: loss.view_mut(), top1: top1.view_mut(), top5: top5.view_mut() };
        cross_entropy(&device, shape, LossInput { logits, labels, count, step, smoothing }, tables, head.gradient)?;
        network.backward()?;
        network.update(&recipe.optimizer(), recipe.clip_norm)
    }
}
