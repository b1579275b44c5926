//! The examples of each step, brought to where the kernels that gather a batch read them.
//!
//! Images that lie on the device stay there, and a table says which are a step's. Image files are decoded ahead of the
//! steps by threads of their own, and copied before each step to one place on the device, where the step's images are
//! 0, 1, ... whatever the step: what a step launches is the same for both.

use std::sync::Arc;

use super::batches::Batches;
use super::decode::{Decoded, Decoders, Decoding};
use super::labelled::{Images, Labelled, Labels, Source};
use crate::data::Files;
use crate::device::{Buffer, Device};
use crate::error::Result;
use crate::nn::network::Network;
use crate::ops::augment::{
    Augment, Colours, Crop, GatherInto, GatherShape, GatherSource, RandomCrop, draw, gather, grey_means, resample,
};

/// Brings examples to the device, a batch a step, and gathers them into a network's input.
pub(super) struct Feed<'a> {
    device: Device,
    images: &'a Images,
    shape: GatherShape,
    batch: usize,
    augment: Option<Augment>,
    drawn: Drawn,
    /// An example for each place of each row of a chunk.
    order: Buffer<u32>,
    supply: Supply<'a>,
}

/// What is drawn for each sample of a step; empty where nothing is scaled or recoloured.
#[derive(Default)]
struct Drawn {
    boxes: Buffer<i32>,
    factors: Buffer<f32>,
    grey: Buffer<f32>,
}

enum Supply<'a> {
    /// From all images and labels, which lie on the device.
    Resident { images: &'a Buffer<u8>, labels: &'a Buffer<u32>, batches: Option<Batches> },
    /// From files and all labels, through one place on the device for the images of a step, and one for their labels.
    Decoded {
        files: &'a Arc<Files>,
        all_labels: &'a [u32],
        images: Buffer<u8>,
        labels: Buffer<u32>,
        decoders: Option<Decoders>,
    },
}

impl<'a> Feed<'a> {
    /// Prepares batches of at most `batch` examples, and chunks of at most `rows` steps.
    ///
    /// # Errors
    /// [`Error::Shape`] if images or batch are too large; [`Error::Device`] when memory runs out.
    pub(super) fn new(
        device: &Device,
        data: &'a Labelled<'a>,
        batch: usize,
        rows: usize,
        augment: Option<Augment>,
    ) -> Result<Self> {
        let [_, height, width] = data.images.shape;
        let shape = GatherShape::new(data.images.stored, [height, width], batch)?;
        let n = shape.samples();
        let drawn = match augment {
            Some(augment) if plain_crop(augment).is_none() => Drawn {
                boxes: device.alloc(n * GatherShape::BOX)?,
                factors: device.alloc(n * GatherShape::FACTORS)?,
                grey: device.alloc(n)?,
            },
            _ => Drawn::default(),
        };
        let (order, supply) = match (&data.images.source, &data.labels) {
            (Source::Resident(images), Labels::Device(labels)) => {
                (device.alloc(rows * batch)?, Supply::Resident { images, labels, batches: None })
            }
            (Source::Files(files), Labels::Host(all_labels)) => {
                let order: Vec<u32> = (0..rows).flat_map(|_| 0..batch as u32).collect();
                let (images, labels) = (device.alloc(batch * shape.image_len())?, device.alloc(batch)?);
                (device.upload(&order)?, Supply::Decoded { files, all_labels, images, labels, decoders: None })
            }
            _ => unreachable!("labels lie where the images do"),
        };
        Ok(Feed { device: device.clone(), images: data.images, shape, batch, augment, drawn, order, supply })
    }

    /// The steps from now on are those of `batches`.
    ///
    /// # Errors
    /// [`Error::Device`] when memory or threads run out.
    pub(super) fn begin(&mut self, batches: Batches) -> Result<()> {
        match &mut self.supply {
            Supply::Resident { batches: next, .. } => *next = Some(batches),
            Supply::Decoded { files, decoders, .. } => {
                *decoders = None; // so that the threads of before end first
                let decoding = Decoding { files: files.clone(), stored: self.images.stored, batch: self.batch };
                *decoders = Some(Decoders::start(&self.device, decoding, batches, self.images.workers)?);
            }
        }
        Ok(())
    }

    /// The next `rows` steps are a chunk, which begins with row 0.
    ///
    /// # Errors
    /// [`Error::Device`] if the device fails.
    pub(super) fn chunk(&mut self, rows: usize) -> Result<()> {
        let Supply::Resident { batches, .. } = &mut self.supply else { return Ok(()) };
        let mut order = vec![0; rows * self.batch];
        let batches = batches.iter_mut().flatten().take(rows);
        for (row, examples) in order.chunks_exact_mut(self.batch).zip(batches) {
            row[..examples.len()].copy_from_slice(&examples);
        }
        self.device.write(&order, self.order.slice_mut(0..rows * self.batch))
    }

    /// Whether all images lie on the device, so that nothing is to be brought there between the steps of a chunk.
    pub(super) fn is_resident(&self) -> bool {
        matches!(self.supply, Supply::Resident { .. })
    }

    /// Brings the examples of the next step to the device, when everything launched before has read those of the last.
    ///
    /// # Errors
    /// [`Error::File`] for a file that cannot be decoded; [`Error::Device`] if the device fails.
    pub(super) fn step(&mut self) -> Result<()> {
        let Supply::Decoded { all_labels, images, labels, decoders: Some(decoders), .. } = &mut self.supply else {
            return Ok(());
        };
        let Decoded { bytes, examples } = decoders.next()?;
        let len = examples.len() * self.shape.image_len();
        self.device.write(&bytes[..len], images.slice_mut(0..len))?;
        let these: Vec<u32> = examples.iter().map(|&example| all_labels[example as usize]).collect();
        self.device.write(&these, labels.slice_mut(0..these.len()))?;
        decoders.take_back(bytes);
        Ok(())
    }

    /// Gathers the batch of the current row, `state` `[2]` as in [`GatherSource`], into the network's input. Launches
    /// alone: can be captured.
    ///
    /// # Errors
    /// [`Error::Launch`] if the device fails.
    pub(super) fn load(&mut self, state: &Buffer<u32>, network: &mut Network) -> Result<()> {
        let (device, shape, batch) = (&self.device, &self.shape, network.batch());
        let (images, labels) = match &self.supply {
            Supply::Resident { images, labels, .. } => (*images, *labels),
            Supply::Decoded { images, labels, .. } => (images, labels),
        };
        let source = GatherSource {
            images: images.view(),
            labels: labels.view(),
            order: self.order.view(),
            state: state.view(),
            count: batch.current.count.view(),
            scale: self.images.scale,
        };
        let (mean, std) = (self.images.mean.view(), self.images.std.view());
        let into = GatherInto { mean, std, x: batch.x, labels: batch.labels };
        let augment = match self.augment {
            Some(augment) if plain_crop(augment).is_none() => augment,
            crop => return gather(device, shape, source, crop.and_then(plain_crop), into),
        };
        let Drawn { boxes, factors, grey } = &mut self.drawn;
        draw(device, shape, source.state, augment, boxes.view_mut(), factors.view_mut())?;
        let jitter = augment.jitter > 0.0;
        if jitter {
            grey_means(device, shape, source, boxes.view(), factors.view(), grey.view_mut())?;
        }
        let colours = jitter.then_some(Colours { factors: factors.view(), grey: grey.view() });
        resample(device, shape, source, boxes.view(), colours, into)
    }
}

/// The augmentation as a crop and a flip, if it is no more than that.
fn plain_crop(augment: Augment) -> Option<RandomCrop> {
    match augment {
        Augment { crop: Crop::Padded { pad }, flip, jitter: 0.0, seed } => Some(RandomCrop { pad, flip, seed }),
        _ => None,
    }
}
