//! The state of a training between two steps, in one file.

use std::path::Path;

use crate::error::{Error, Result};
use crate::nn::network::Network;
use crate::nn::weights::Weights;

/// Prefixes of the optimizer's tensors in a checkpoint: velocity or first moment, second moment.
const MOMENTS: [&str; 2] = ["moment.", "second_moment."];
const STEP: &str = "step";
const IDENTITY: &str = "identity";

/// Weights, masks, statistics, the optimizer's state, and the number of steps done.
pub struct Checkpoint {
    /// Steps done.
    pub step: usize,
    /// Of which training it is.
    pub identity: String,
    weights: Weights,
    moments: Vec<Weights>,
}

impl Checkpoint {
    /// The state of a network after `step` steps of the training `identity`.
    ///
    /// # Errors
    /// [`Error::Device`] if the device fails.
    pub fn take(network: &Network, step: usize, identity: &str) -> Result<Self> {
        Ok(Checkpoint { step, identity: identity.into(), weights: network.weights()?, moments: network.moments()? })
    }

    /// Writes it: whole or not at all.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be written.
    pub fn save(mut self, path: &Path) -> Result<()> {
        for (moment, prefix) in std::mem::take(&mut self.moments).into_iter().zip(MOMENTS) {
            let tensors = moment.tensors.into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor));
            self.weights.tensors.extend(tensors);
        }
        self.weights.metadata.insert(STEP.into(), self.step.to_string());
        self.weights.metadata.insert(IDENTITY.into(), self.identity);
        self.weights.save(path)
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read or is not a checkpoint.
    pub fn load(path: &Path) -> Result<Self> {
        let mut weights = Weights::load(path)?;
        let step = weights.metadata.remove(STEP).and_then(|step| step.parse().ok());
        let step = step.ok_or_else(|| Error::file(path, "not a checkpoint: it has no number of steps"))?;
        let mut moments = vec![Weights::default(); MOMENTS.len()];
        for (name, tensor) in std::mem::take(&mut weights.tensors) {
            let moment = MOMENTS.iter().enumerate().find_map(|(i, prefix)| Some((i, name.strip_prefix(prefix)?)));
            match moment {
                Some((i, name)) => moments[i].tensors.insert(name.into(), tensor),
                None => weights.tensors.insert(name, tensor),
            };
        }
        moments.retain(|moment| !moment.tensors.is_empty());
        let identity = weights.metadata.remove(IDENTITY).unwrap_or_default();
        Ok(Checkpoint { step, identity, weights, moments })
    }

    /// Puts a network into this state.
    ///
    /// # Errors
    /// [`Error::Usage`] if the checkpoint is of another model.
    pub fn restore(&self, network: &mut Network) -> Result<()> {
        network.load(&self.weights)?;
        network.set_moments(&self.moments)
    }
}
