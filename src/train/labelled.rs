//! Images on a device, and which of them a network is trained or evaluated on, with which labels.

use crate::data::partition::Part;
use crate::data::{DataSet, Examples, Pixels};
use crate::device::{Buffer, Device};
use crate::error::{Error, Result};
use crate::ops::augment::GatherShape;

/// The images of a split, on a device, as bytes.
pub struct Images {
    /// `[examples, C, SH, SW]`.
    pub(super) bytes: Buffer<u8>,
    /// C, SH, SW: the stored images.
    pub(super) stored: [usize; 3],
    /// C, H, W: the network's input.
    pub(super) shape: [usize; 3],
    pub(super) scale: f32,
    pub(super) mean: Buffer<f32>,
    pub(super) std: Buffer<f32>,
}

impl Images {
    /// Copies the images of a split to a device.
    ///
    /// # Errors
    /// [`Error::Device`] when memory runs out.
    pub fn new(device: &Device, data: &DataSet, split: &Examples) -> Result<Self> {
        let Pixels::Bytes(bytes) = &split.images else {
            return Err(Error::Usage(
                "images that do not fit in memory are not built yet; use a larger --resident".into(),
            ));
        };
        Ok(Images {
            bytes: device.upload(bytes)?,
            stored: data.stored,
            shape: data.shape,
            scale: data.scale,
            mean: device.upload(&data.mean)?,
            std: device.upload(&data.std)?,
        })
    }

    /// The shape of batches of these images.
    pub(super) fn batches(&self, batch: usize) -> Result<GatherShape> {
        let [_, height, width] = self.shape;
        GatherShape::new(self.stored, [height, width], batch)
    }
}

/// Examples to go through, each with the label that the network should give it.
pub struct Labelled<'a> {
    pub(super) images: &'a Images,
    /// Labels of all images of the split; those of examples that are not gone through are not read.
    pub(super) labels: Buffer<u32>,
    /// Indices of the examples, in file order.
    pub(super) examples: Vec<u32>,
    /// Number of outputs that the labels need.
    pub(super) classes: usize,
}

impl<'a> Labelled<'a> {
    /// All examples of a split, with their own labels.
    ///
    /// # Errors
    /// [`Error::Usage`] if there are none; [`Error::Device`] when memory runs out.
    pub fn all(device: &Device, images: &'a Images, split: &Examples, classes: usize) -> Result<Self> {
        let examples = (0..split.len() as u32).collect();
        Self::new(device, images, split.labels.clone(), examples, classes)
    }

    /// The examples of a part, with the labels of its own head.
    ///
    /// # Errors
    /// [`Error::Usage`] if there are none; [`Error::Device`] when memory runs out.
    pub fn part(device: &Device, images: &'a Images, split: &Examples, part: &Part) -> Result<Self> {
        let labels = split.labels.iter().map(|&label| part.relabel(label).unwrap_or(0)).collect();
        Self::new(device, images, labels, part.examples.clone(), part.classes.len())
    }

    /// The examples of a part, with their own labels.
    ///
    /// # Errors
    /// [`Error::Usage`] if there are none; [`Error::Device`] when memory runs out.
    pub fn part_of_all(
        device: &Device,
        images: &'a Images,
        split: &Examples,
        part: &Part,
        classes: usize,
    ) -> Result<Self> {
        Self::new(device, images, split.labels.clone(), part.examples.clone(), classes)
    }

    fn new(device: &Device, images: &'a Images, labels: Vec<u32>, examples: Vec<u32>, classes: usize) -> Result<Self> {
        if examples.is_empty() {
            return Err(Error::Usage("there are no examples; choose another part, split or --limit".into()));
        }
        Ok(Labelled { images, labels: device.upload(&labels)?, examples, classes })
    }

    /// Number of examples.
    pub fn len(&self) -> usize {
        self.examples.len()
    }

    /// Whether there are none; there always are some.
    pub fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }

    /// Refuses a network for images of another shape or for fewer classes.
    pub(super) fn check_fits(&self, image: [usize; 3], classes: usize) -> Result<()> {
        if image != self.images.shape {
            let shape = self.images.shape;
            return Err(Error::Usage(format!(
                "the model reads images {image:?}, the data has {shape:?} (channels, height, width); set the model's \
                 with --set image='{shape:?}'"
            )));
        }
        if classes < self.classes {
            return Err(Error::Usage(format!(
                "the model has {classes} classes, the data {}; set the model's with --set classes={}",
                self.classes, self.classes
            )));
        }
        Ok(())
    }
}
