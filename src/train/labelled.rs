//! Images on a device, and which of them a network is trained or evaluated on, with which labels.

use std::num::NonZero;
use std::sync::Arc;
use std::thread::available_parallelism;

use crate::data::partition::Part;
use crate::data::{DataSet, Examples, Files, Pixels};
use crate::device::{Buffer, Device};
use crate::error::{Error, Result};

/// Most threads that decode.
const MOST_WORKERS: usize = 1 << 10;

/// The images of a split: on a device, as bytes, or in files that are decoded whenever they are needed.
pub struct Images {
    pub(super) source: Source,
    /// Channels, height and width of the stored images.
    pub(super) stored: [usize; 3],
    /// Channels, height and width of the network's input.
    pub(super) shape: [usize; 3],
    pub(super) scale: f32,
    pub(super) mean: Buffer<f32>,
    pub(super) std: Buffer<f32>,
    /// Threads that decode.
    pub(super) workers: usize,
}

/// Where images come from.
pub(super) enum Source {
    /// From the device: `[examples, C, SH, SW]`.
    Resident(Buffer<u8>),
    /// From files, decoded to `[C, SH, SW]`.
    Files(Arc<Files>),
}

impl Images {
    /// Copies the images of a split to a device, if they are in memory. If they are files, as many threads as the machine
    /// has cores will decode them, or as the environment variable `DILT_WORKERS` says.
    ///
    /// # Errors
    /// [`Error::Device`] when memory runs out; [`Error::Usage`] if `DILT_WORKERS` is no number of threads.
    pub fn new(device: &Device, data: &DataSet, split: &Examples) -> Result<Self> {
        Ok(Images {
            source: match &split.images {
                Pixels::Bytes(bytes) => Source::Resident(device.upload(bytes)?),
                Pixels::Files(files) => Source::Files(Arc::new(files.clone())),
            },
            stored: data.stored,
            shape: data.shape,
            scale: data.scale,
            mean: device.upload(&data.mean)?,
            std: device.upload(&data.std)?,
            workers: workers()?,
        })
    }

    /// The same, whose files are decoded by so many threads, at least one.
    pub fn with_workers(self, workers: usize) -> Self {
        Images { workers: workers.max(1), ..self }
    }

    /// The same for `count` trainings at a time, which share the threads that decode.
    pub fn shared_by(self, count: usize) -> Self {
        let workers = self.workers / count.max(1);
        self.with_workers(workers)
    }
}

/// Threads that decode files.
fn workers() -> Result<usize> {
    match std::env::var("DILT_WORKERS") {
        Ok(text) if !text.is_empty() => match text.parse() {
            Ok(workers @ 1..=MOST_WORKERS) => Ok(workers),
            _ => Err(Error::Usage(format!(
                "environment variable DILT_WORKERS: expected a number of threads from 1 to {MOST_WORKERS}, got '{text}'"
            ))),
        },
        _ => Ok(available_parallelism().map_or(1, NonZero::get)),
    }
}

/// Examples to go through, each with the label that the network should give it.
pub struct Labelled<'a> {
    pub(super) images: &'a Images,
    /// Labels of all images of the split; those of examples that are not gone through are not read.
    pub(super) labels: Labels,
    /// Indices of the examples, in file order.
    pub(super) examples: Vec<u32>,
    /// Number of outputs that the labels need.
    pub(super) classes: usize,
}

/// Labels lie where the images do.
pub(super) enum Labels {
    Device(Buffer<u32>),
    Host(Vec<u32>),
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
            let advice = "choose another part or split (val: --val-split holds some out), or a larger --limit";
            return Err(Error::Usage(format!("there are no examples; {advice}")));
        }
        let labels = match &images.source {
            Source::Resident(_) => Labels::Device(device.upload(&labels)?),
            Source::Files(_) => Labels::Host(labels),
        };
        Ok(Labelled { images, labels, examples, classes })
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
