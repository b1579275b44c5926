//! What a training leaves while it runs: metrics, and checkpoints that it goes on from.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::run::StageFolder;
use super::streams::Streams;
use crate::error::{Error, Result};
use crate::nn::network::Network;
use crate::train::{Checkpoint, Chunk, MetricsFile, Observer};

/// Environment variable: a training writes a checkpoint when so many seconds have passed since the last.
const CHECKPOINT_SECONDS: &str = "DILT_CHECKPOINT_SECONDS";

/// Puts a network into the state of a checkpoint, if there is one; returns the steps done.
///
/// # Errors
/// [`Error::File`] if it is damaged or of another training than `identity`.
pub fn resume(network: &mut Network, path: &Path, identity: &str) -> Result<usize> {
    if !path.exists() {
        return Ok(0);
    }
    let checkpoint = Checkpoint::load(path)?;
    if checkpoint.identity != identity {
        return Err(Error::file(
            path,
            "the checkpoint is of a training with other settings, data, weights or device; give the command it was \
             begun with, choose another folder, or remove it",
        ));
    }
    checkpoint.restore(network)?;
    Ok(checkpoint.step)
}

/// How often a training writes a checkpoint: `DILT_CHECKPOINT_SECONDS`, 20 if not set; 0 after every chunk of steps.
fn checkpoint_every() -> Result<Duration> {
    let Ok(text) = std::env::var(CHECKPOINT_SECONDS) else { return Ok(Duration::from_secs(20)) };
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or_else(|| Error::Usage(format!("{CHECKPOINT_SECONDS}: expected a number of at least 0, got '{text}'")))
}

/// Writes metrics and checkpoints of a training, and shows its progress.
pub struct Saver<'a> {
    metrics: MetricsFile,
    checkpoint: PathBuf,
    identity: String,
    every: Duration,
    /// When the state was kept last.
    saved: Instant,
    shown: &'a mut dyn FnMut(usize, f32),
    /// Where other trainings run, whose failure ends this one.
    beside: Option<&'a Streams>,
}

impl<'a> Saver<'a> {
    /// Goes on with the metrics after `done` steps. Checkpoints are of the training `identity`; `shown` is given the
    /// steps done and the last loss.
    ///
    /// # Errors
    /// As [`MetricsFile::resume`]; [`Error::Usage`] if the interval of checkpoints is no number.
    pub fn new(
        folder: &StageFolder,
        done: usize,
        identity: String,
        shown: &'a mut dyn FnMut(usize, f32),
    ) -> Result<Self> {
        let every = checkpoint_every()?;
        let metrics = MetricsFile::resume(&folder.metrics(), done)?;
        let (checkpoint, saved) = (folder.checkpoint(), Instant::now());
        Ok(Saver { metrics, checkpoint, identity, every, saved, shown, beside: None })
    }

    /// Leaves a checkpoint and ends the training when one beside it fails.
    pub fn beside(self, streams: &'a Streams) -> Self {
        Saver { beside: Some(streams), ..self }
    }
}

impl Observer for Saver<'_> {
    fn chunk(&mut self, chunk: &Chunk, network: &Network, done: usize, total: usize) -> Result<()> {
        self.metrics.append(chunk)?;
        (self.shown)(done, *chunk.loss.last().expect("a chunk has a step"));
        if done == total {
            return Ok(());
        }
        let stopped = self.beside.map_or(Ok(()), Streams::check);
        if stopped.is_err() || self.saved.elapsed() >= self.every {
            Checkpoint::take(network, done, &self.identity)?.save(&self.checkpoint)?;
            self.saved = Instant::now();
        }
        stopped
    }
}
