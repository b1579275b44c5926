//! How a network is trained.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::nn::network::Optimizer;
use crate::nn::plan::OptimizerKind;
use crate::ops::augment::{Augment, Crop};
use crate::ops::optimizer::{AdamW, Sgd};

/// Most samples of a step.
pub const MOST_SAMPLES: usize = 1 << 24;
/// Samples of a batch, at most: kernels that load them have 16 bits for each.
pub const MOST_BATCH: usize = (1 << 15) - 1;
/// Most epochs of a training.
const MOST_EPOCHS: usize = 1 << 20;
/// Most steps of a training: kernels count them in 32 bits.
const MOST_STEPS: usize = 1 << 31;

/// How a network is trained: the `[train]` table of a model file, with options on top.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// Times that each example is seen.
    pub epochs: usize,
    /// Steps, instead of epochs.
    pub steps: Option<usize>,
    /// Samples of a step; the last step of an epoch takes what is left.
    pub batch: usize,
    /// Optimizer.
    pub optimizer: OptimizerKind,
    /// Highest learning rate.
    pub lr: f64,
    /// SGD: share of the velocity that is kept.
    pub momentum: f32,
    /// SGD: Nesterov's momentum.
    pub nesterov: bool,
    /// AdamW: shares of the first and the second moment that are kept.
    pub betas: [f64; 2],
    /// AdamW: added to the root of the second moment.
    pub epsilon: f32,
    /// Weight decay: added to the gradient by SGD, decoupled from it by AdamW, as in PyTorch.
    pub weight_decay: f32,
    /// Whether norms, biases, tokens and positions decay too, as in PyTorch with `model.parameters()`.
    pub decay_norms: bool,
    /// How the learning rate changes.
    pub schedule: Schedule,
    /// Epochs after which the multi-step schedule multiplies by `gamma`.
    pub milestones: Vec<f64>,
    /// Factor of the multi-step schedule.
    pub gamma: f64,
    /// Epochs in which the learning rate rises linearly.
    pub warmup: f64,
    /// Share of the target that is spread over all classes.
    pub label_smoothing: f32,
    /// Largest norm of all gradients together.
    pub clip_norm: Option<f32>,
    /// Whether examples come in a new random order each epoch, or in file order.
    pub shuffle: bool,
    /// How images are varied.
    pub augment: Augmentation,
    /// Brightness, contrast and saturation are multiplied by factors from `max(0, 1 - jitter)` to `1 + jitter`; 0: none.
    pub jitter: f32,
}

impl Default for Recipe {
    fn default() -> Self {
        Recipe {
            epochs: 1,
            steps: None,
            batch: 128,
            optimizer: OptimizerKind::Sgd,
            lr: 0.1,
            momentum: 0.9,
            nesterov: false,
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            weight_decay: 5e-4,
            decay_norms: true,
            schedule: Schedule::Cosine,
            milestones: Vec::new(),
            gamma: 0.1,
            warmup: 0.0,
            label_smoothing: 0.0,
            clip_norm: None,
            shuffle: true,
            augment: Augmentation::None,
            jitter: 0.0,
        }
    }
}

/// How the learning rate changes after the warm-up.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Not at all.
    Constant,
    /// Multiplied by `gamma` after each milestone.
    Multistep,
    /// Half a cosine, to zero (Loshchilov and Hutter, arXiv 1608.03983, without restarts).
    Cosine,
}

/// How images are varied in training.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Augmentation {
    /// Not at all.
    None,
    /// `ResizedCrop` where the stored images are larger than the network's input, else `Crop`.
    Standard,
    /// Random crop and random horizontal flip; images that are stored in the input's size are padded by an eighth of it
    /// before.
    Crop,
    /// Random part of the image, scaled to the input's size, and random horizontal flip: torchvision's
    /// `RandomResizedCrop`.
    ResizedCrop,
}

impl Recipe {
    /// The `[train]` table of a model file.
    ///
    /// # Errors
    /// [`Error::Usage`] for an unknown field or a value of another type.
    pub fn from_table(table: &toml::Table) -> Result<Self> {
        let wrong = |error: toml::de::Error| Error::Usage(format!("model file, table train: {}", error.message()));
        table.clone().try_into().map_err(wrong)
    }

    /// Batch, and epochs or the steps that stand in their place.
    fn length(&self) -> String {
        let steps = self.steps.map_or(format!("epochs {}", self.epochs), |steps| format!("steps {steps}"));
        format!("batch {}, {steps}", self.batch)
    }

    /// Refuses what cannot be trained.
    ///
    /// # Errors
    /// [`Error::Usage`] names the field, what was expected and what it is.
    pub fn check(&self) -> Result<()> {
        let refuse = |field: &str, expected: &str, got: String| {
            Err(Error::Usage(format!("training: {field}: expected {expected}, got {got}")))
        };
        if self.batch == 0 || (self.epochs == 0 && self.steps.is_none()) || self.steps == Some(0) {
            return refuse("batch, epochs and steps", "at least 1", self.length());
        }
        if self.batch > MOST_BATCH || self.epochs > MOST_EPOCHS || self.steps.is_some_and(|n| n > MOST_STEPS) {
            let expected = format!("at most {MOST_BATCH}, {MOST_EPOCHS} and {MOST_STEPS}");
            return refuse("batch, epochs and steps", &expected, self.length());
        }
        if !(self.lr.is_finite() && self.lr >= 0.0) {
            return refuse("lr", "a number of at least 0", self.lr.to_string());
        }
        if !(0.0..1.0).contains(&self.momentum) {
            return refuse("momentum", "0 or more, less than 1", self.momentum.to_string());
        }
        if self.nesterov && self.momentum == 0.0 {
            return refuse("nesterov", "momentum above 0 with it", "0".into());
        }
        if !self.betas.iter().all(|beta| (0.0..1.0).contains(beta)) {
            return refuse("betas", "two numbers of 0 or more, less than 1", format!("{:?}", self.betas));
        }
        if !(self.epsilon.is_finite() && self.epsilon > 0.0) {
            return refuse("epsilon", "a number above 0", self.epsilon.to_string());
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            return refuse("weight_decay", "a number of at least 0", self.weight_decay.to_string());
        }
        if !(0.0..1.0).contains(&self.label_smoothing) {
            return refuse("label_smoothing", "0 or more, less than 1", self.label_smoothing.to_string());
        }
        if let Some(norm) = self.clip_norm.filter(|norm| norm.is_nan() || *norm <= 0.0) {
            return refuse("clip_norm", "a number above 0", norm.to_string());
        }
        if !(self.jitter.is_finite() && self.jitter >= 0.0) {
            return refuse("jitter", "a number of at least 0", self.jitter.to_string());
        }
        if self.jitter > 0.0 && self.augment == Augmentation::None {
            return refuse("jitter", "0 without augmentation, or --augment standard with it", self.jitter.to_string());
        }
        if !(self.warmup.is_finite() && self.warmup >= 0.0 && self.gamma.is_finite()) {
            return refuse("warmup and gamma", "numbers of at least 0", format!("{}, {}", self.warmup, self.gamma));
        }
        Ok(())
    }

    /// What is drawn for each sample: `stored` and `input` are channels, height and width.
    pub(super) fn augment(&self, stored: [usize; 3], input: [usize; 3], seed: u64) -> Option<Augment> {
        let larger = stored != input;
        // Around an image that is larger than the input there is no need of black.
        let padded = Crop::Padded { pad: if larger { 0 } else { (input[1] / 8) as u32 } };
        let crop = match self.augment {
            Augmentation::None => return None,
            Augmentation::Standard if larger => Crop::Resized,
            Augmentation::Standard | Augmentation::Crop => padded,
            Augmentation::ResizedCrop => Crop::Resized,
        };
        Some(Augment { crop, flip: true, jitter: self.jitter, seed })
    }

    /// Steps of an epoch of `examples` examples. A last batch of one sample is left out: it has no variance.
    pub fn steps_per_epoch(&self, examples: usize) -> usize {
        let rest = examples % self.batch;
        (examples / self.batch + usize::from(rest > 1)).max(1)
    }

    /// Steps of the whole training.
    pub fn total_steps(&self, examples: usize) -> usize {
        self.steps.unwrap_or_else(|| self.epochs * self.steps_per_epoch(examples))
    }

    /// The optimizer with its settings.
    pub fn optimizer(&self) -> Optimizer {
        let Recipe { momentum, nesterov, betas, epsilon, weight_decay, .. } = *self;
        match self.optimizer {
            OptimizerKind::Sgd => Optimizer::Sgd(Sgd { momentum, nesterov, weight_decay }),
            OptimizerKind::Adamw => Optimizer::AdamW(AdamW { betas, epsilon, weight_decay }),
        }
    }

    /// AdamW's bias corrections of a step: `1 / (1 - β1^t)` and `1 / sqrt(1 - β2^t)`, where the first step is t = 1.
    pub fn corrections(&self, step: usize) -> [f32; 2] {
        let [first, second] = self.betas.map(|beta| 1.0 - beta.powf(step as f64 + 1.0));
        [(1.0 / first) as f32, (1.0 / second.sqrt()) as f32]
    }

    /// The learning rate of a step.
    pub fn rate(&self, step: usize, examples: usize) -> f64 {
        let per_epoch = self.steps_per_epoch(examples) as f64;
        let total = self.total_steps(examples) as f64;
        let warmup = (self.warmup * per_epoch).round().min(total);
        let step = step as f64;
        if step < warmup {
            return self.lr * (step + 1.0) / warmup;
        }
        match self.schedule {
            Schedule::Constant => self.lr,
            Schedule::Multistep => {
                let passed = self.milestones.iter().filter(|&&epoch| step >= epoch * per_epoch).count();
                self.lr * self.gamma.powi(passed as i32)
            }
            Schedule::Cosine => {
                let progress = (step - warmup) / (total - warmup).max(1.0);
                self.lr * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_augmentation_scales_only_images_that_are_stored_larger() {
        let (same, input) = ([3, 32, 32], [3, 32, 32]);
        let larger = [3, 36, 36];
        let crop = |augment, stored| {
            let recipe = Recipe { augment, jitter: 0.5, ..Recipe::default() };
            recipe.augment(stored, input, 9).map(|augment| {
                assert_eq!((augment.flip, augment.jitter, augment.seed), (true, 0.5, 9));
                augment.crop
            })
        };
        assert_eq!([same, larger].map(|stored| crop(Augmentation::None, stored)), [None; 2]);
        let (padded, inside) = (Some(Crop::Padded { pad: 4 }), Some(Crop::Padded { pad: 0 }));
        assert_eq!([same, larger].map(|s| crop(Augmentation::Standard, s)), [padded, Some(Crop::Resized)]);
        assert_eq!([same, larger].map(|s| crop(Augmentation::Crop, s)), [padded, inside]);
        assert_eq!([same, larger].map(|s| crop(Augmentation::ResizedCrop, s)), [Some(Crop::Resized); 2]);
    }
}
