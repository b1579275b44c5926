//! The command line: one file per subcommand, and here what several of them share.

mod assemble;
mod bench;
mod doctor;
mod eval;
mod experiment;
mod export;
mod find;
mod mask;
mod prune;
mod report;
mod similarity;
mod structure;
mod train;
mod transfer;

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use dilt::data::{DataSet, Reading};
use dilt::device::{Device, Precision};
use dilt::mask::set::MaskSet;
use dilt::nn::config::ModelConfig;
use dilt::nn::model::Model;
use dilt::nn::paths::{Planning, Tuning};
use dilt::nn::plan::OptimizerKind;
use dilt::nn::weights::Weights;
use dilt::report::progress::{Progress, Verbosity};
use dilt::train::{Augmentation, Recipe, Schedule};
use serde::Serialize;

/// Lottery tickets of residual networks: found, trained, evaluated and taken apart, with handwritten CUDA kernels
/// that also run on a CPU.
#[derive(Parser)]
#[command(version, about, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Find(find::Find),
    Train(train::Train),
    Eval(eval::Eval),
    Prune(prune::Prune),
    Mask(mask::Mask),
    Structure(structure::Structure),
    Export(export::Export),
    Assemble(assemble::Assemble),
    Transfer(transfer::Transfer),
    Similarity(similarity::Similarity),
    Report(report::Report),
    Bench(bench::Bench),
    Doctor(doctor::Doctor),
}

impl Command {
    /// Trainings that run side by side.
    fn side_by_side(&self) -> usize {
        match self {
            Command::Find(command) => command.options.streams,
            Command::Assemble(command) => command.options.streams,
            Command::Transfer(command) => command.options.streams,
            Command::Bench(command) => command.tickets.unwrap_or(1),
            _ => 1,
        }
    }
}

/// Runs the command that the arguments name. Wrong arguments exit with 2, as clap does.
pub fn run() -> anyhow::Result<()> {
    let command = Cli::parse().command;
    if command.side_by_side() == 1 {
        // This thread is one of the pool that host kernels run on: otherwise each launch puts it to sleep and wakes it. Not
        // where it waits for trainings on other threads, and would leave the pool one short. An error means that there is
        // a pool already, which serves as well.
        let _ = rayon::ThreadPoolBuilder::new().use_current_thread().build_global();
    }
    match command {
        Command::Find(command) => command.run(),
        Command::Train(command) => command.run(),
        Command::Eval(command) => command.run(),
        Command::Prune(command) => command.run(),
        Command::Mask(command) => command.run(),
        Command::Structure(command) => command.run(),
        Command::Export(command) => command.run(),
        Command::Assemble(command) => command.run(),
        Command::Transfer(command) => command.run(),
        Command::Similarity(command) => command.run(),
        Command::Report(command) => command.run(),
        Command::Bench(command) => command.run(),
        Command::Doctor(command) => command.run(),
    }
}

/// Options of every command that computes.
#[derive(Args)]
struct Common {
    /// Where to compute: auto (a GPU if there is one), cuda, cuda:INDEX or host.
    #[arg(long, default_value = "auto", global = true, help_heading = "Computing")]
    device: String,
    /// Numbers that activations, and weights as products read them, are stored as. Trained weights, sums and statistics are
    /// f32 in both.
    #[arg(long, value_enum, default_value = "f32", help_heading = "Computing")]
    precision: PrecisionOption,
    /// Seed of initial weights and orders of examples.
    #[arg(long, default_value_t = 0, help_heading = "Computing")]
    seed: u64,
    /// Choose how each layer multiplies under its mask by times that are taken here, instead of by a table. They are kept
    /// in tuning.json of $DILT_CACHE (the user's folder for caches, if not set), and taken once.
    #[arg(long, help_heading = "Computing")]
    tune: bool,
    /// Print one JSON object instead of a table.
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// Show more on stderr.
    #[arg(short, long, conflicts_with = "quiet", help_heading = "Output")]
    verbose: bool,
    /// Show nothing on stderr but errors and warnings.
    #[arg(short, long, help_heading = "Output")]
    quiet: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PrecisionOption {
    /// 32-bit floats.
    F32,
    /// Their upper 16 bits; products on a GPU's tensor cores. On a CPU slower than f32.
    Bf16,
}

impl Common {
    /// Opens the device and says which.
    fn open(&self) -> anyhow::Result<Device> {
        let device = Device::open(&self.device)?;
        if self.verbose {
            self.progress().say(&format!("device: {} ({})", device.description(), Device::cuda_status()));
        }
        Ok(device)
    }

    /// What layers choose by.
    fn planning(&self) -> dilt::Result<Planning> {
        if self.tune { Tuning::of_user().map(Planning::Times) } else { Ok(Planning::Table) }
    }

    fn precision(&self) -> Precision {
        match self.precision {
            PrecisionOption::F32 => Precision::F32,
            PrecisionOption::Bf16 => Precision::Bf16,
        }
    }

    fn progress(&self) -> Progress {
        Progress::new(match (self.quiet, self.verbose) {
            (true, _) => Verbosity::Quiet,
            (_, true) => Verbosity::Verbose,
            _ => Verbosity::Normal,
        })
    }

    /// Says which layers a ticket prunes as a whole: its network computes less than it seems to, and may not learn.
    fn warn_of_empty_layers(&self, weights: &Weights) {
        let empty = MaskSet::of_weights(&weights.masks).empty_layers();
        if !empty.is_empty() {
            let layers = empty.join(", ");
            self.progress().warn(&format!("nothing is kept of {layers}: what only feeds them is left out too"));
        }
    }

    /// Prints a result: as JSON, or as the table that `table` makes.
    fn print<T: Serialize>(&self, result: &T, table: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
        let text = if self.json { serde_json::to_string_pretty(result)? } else { table(result) };
        // Not println!, which panics when the disk is full or the reader has gone.
        match writeln!(std::io::stdout(), "{text}") {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                Err(dilt::Error::file("standard output", format!("the result cannot be written: {error}")).into())
            }
            _ => Ok(()),
        }
    }
}

/// Which model and which data.
#[derive(Args)]
struct ModelAndData {
    /// A model of models/ by name, or a path to a .toml file; the one that the given weights name, with what was set of it, or
    /// resnet8.
    #[arg(long, help_heading = "Model and data")]
    model: Option<String>,
    /// Set a field of the model file, e.g. widths=[8,16,32]; may be given several times.
    #[arg(long, value_name = "KEY=VALUE", help_heading = "Model and data")]
    set: Vec<String>,
    /// Height and width of the model's images, or the size of a square; position embeddings that are loaded are
    /// resampled for it, as timm does.
    #[arg(long, value_name = "H,W", value_delimiter = ',', num_args = 1..=2, help_heading = "Model and data")]
    image_size: Vec<usize>,
    /// A data set: digits, which is part of dilt, or one in a folder: idx=DIR (MNIST, Fashion-MNIST, plain or .gz),
    /// cifar10=DIR, cifar100=DIR or cifar100-coarse=DIR (binary version), folder=DIR (train/CLASS/ and test/CLASS/ or
    /// val/CLASS/, JPEG and PNG, brought to the model's input).
    #[arg(long, default_value = "digits", value_name = "NAME[=DIR]", help_heading = "Model and data")]
    data: String,
    /// Use only N examples of each split: the first; of a folder, the first of each class in turn.
    #[arg(long, value_name = "N", help_heading = "Model and data")]
    limit: Option<usize>,
    /// Share of the training examples, of each class, that is held out as the split val.
    #[arg(long, value_name = "F", allow_negative_numbers = true, help_heading = "Model and data")]
    val_split: Option<f64>,
    /// Mean of each channel, instead of the data set's.
    #[arg(long, value_delimiter = ',', value_name = "MEAN", help_heading = "Model and data")]
    mean: Vec<f32>,
    /// Standard deviation of each channel, instead of the data set's.
    #[arg(long, value_delimiter = ',', value_name = "STD", help_heading = "Model and data")]
    std: Vec<f32>,
    /// Height in pixels that a folder's images are resized to before they are cropped to the model's input; eight
    /// sevenths of the input if that has 128 rows or more (256 for 224), else the input's own.
    #[arg(long, value_name = "PIXELS", help_heading = "Model and data")]
    resize: Option<usize>,
    /// Leave out a folder's broken images and stray files, and name them, instead of refusing them. Looks at every
    /// image once before it begins.
    #[arg(long, help_heading = "Model and data")]
    skip_broken: bool,
    /// Keep a folder's images in memory, decoded, if that takes at most so many MiB; else decode them as they are
    /// needed, and stop at a broken one.
    #[arg(long, value_name = "MIB", default_value_t = 2048, help_heading = "Model and data")]
    resident: u64,
}

/// The model that is asked for, or else the one that given weights say they are of, with what was set of it, or resnet8.
fn model_config(asked: Option<&str>, given: Option<&Weights>, set: &[String]) -> dilt::Result<ModelConfig> {
    match (asked, given.and_then(|weights| Some((weights.metadata.get("model")?, weights)))) {
        (Some(model), _) => ModelConfig::load(model, set),
        // A file is not to choose which other file is read.
        (None, Some((named, _))) if !ModelConfig::is_embedded(named) => Err(dilt::Error::Usage(format!(
            "the weights say that they are of model '{named}', which is not part of dilt; give its file with --model"
        ))),
        (None, Some((named, weights))) => ModelConfig::load(named, &ModelConfig::set_by(&weights.metadata, set)?),
        (None, None) => ModelConfig::load("resnet8", set),
    }
}

impl ModelAndData {
    /// Reads model file and data set.
    fn load(&self, given: Option<&Weights>, common: &Common) -> dilt::Result<(ModelConfig, DataSet)> {
        let config = self.config(given, common)?;
        let data = self.data(&config, None, &common.progress())?;
        Ok((config, data))
    }

    /// Reads the model file.
    fn config(&self, given: Option<&Weights>, common: &Common) -> dilt::Result<ModelConfig> {
        let mut config = model_config(self.model.as_deref(), given, &self.set)?;
        config.precision = common.precision();
        match *self.image_size {
            [] => Ok(config),
            [size] => config.with_image_size(size, size),
            [height, width] => config.with_image_size(height, width),
            _ => {
                let got = &self.image_size;
                Err(dilt::Error::Usage(format!("--image-size: expected one or two sizes, got {got:?}")))
            }
        }
    }

    /// Reads the data set for a model: of each split no more than `most` examples, as --limit does.
    fn data(&self, config: &ModelConfig, most: Option<usize>, progress: &Progress) -> dilt::Result<DataSet> {
        let reading = Reading {
            input: config.image,
            resize: self.resize,
            limit: self.limit.into_iter().chain(most).min(),
            val_split: self.val_split,
            mean: self.mean.clone(),
            std: self.std.clone(),
            skip_broken: self.skip_broken,
            resident_bytes: self.resident.saturating_mul(1 << 20),
        };
        dilt::data::load(&self.data, &reading, progress)
    }
}

impl ModelAndData {
    /// The weights of a file, for all of the model.
    fn fitted(&self, file: &Path, weights: Weights, config: &ModelConfig, model: &Model) -> anyhow::Result<Weights> {
        let renamed = self.renamed(weights, config, model);
        let fitted = renamed.and_then(|weights| weights.for_model(&model.file_tensors()));
        fitted.with_context(|| Self::described(file, config))
    }

    /// Which file does not fit which model.
    fn described(file: &Path, config: &ModelConfig) -> String {
        format!("{}, as weights of model '{}' (--model and --set choose another)", file.display(), config.name)
    }

    /// The weights of a file under the model's names, with positions resampled if --image-size asks for it.
    fn renamed(&self, weights: Weights, config: &ModelConfig, model: &Model) -> dilt::Result<Weights> {
        let weights = weights.named_as(model.file_tensors().iter().map(|(name, _)| name.as_str()))?;
        if self.image_size.is_empty() { Ok(weights) } else { weights.with_positions_for(config) }
    }
}

/// How to train; each overrides the model file's `[train]` table.
#[derive(Args)]
struct RecipeOptions {
    /// Times that each example is seen.
    #[arg(long, conflicts_with = "steps", allow_negative_numbers = true, help_heading = "Training")]
    epochs: Option<usize>,
    /// Steps, instead of epochs.
    #[arg(long, allow_negative_numbers = true, help_heading = "Training")]
    steps: Option<usize>,
    /// Samples of a step.
    #[arg(long, allow_negative_numbers = true, help_heading = "Training")]
    batch: Option<usize>,
    /// Optimizer; another than the model file's needs --lr and --weight-decay.
    #[arg(long, value_enum, help_heading = "Training")]
    optimizer: Option<OptimizerOption>,
    /// Highest learning rate.
    #[arg(long, allow_negative_numbers = true, help_heading = "Training")]
    lr: Option<f64>,
    /// SGD: share of the velocity that is kept.
    #[arg(long, allow_negative_numbers = true, help_heading = "Training")]
    momentum: Option<f32>,
    /// SGD: Nesterov's momentum.
    #[arg(long, help_heading = "Training")]
    nesterov: bool,
    /// AdamW: shares of the first and the second moment that are kept.
    #[arg(
        long,
        value_delimiter = ',',
        num_args = 1..=2,
        value_name = "B1,B2",
        allow_negative_numbers = true,
        help_heading = "Training"
    )]
    betas: Option<Vec<f64>>,
    /// AdamW: added to the root of the second moment.
    #[arg(long, allow_negative_numbers = true, help_heading = "Training")]
    epsilon: Option<f32>,
    /// Weight decay: added to the gradient by SGD, decoupled from it by AdamW, as in PyTorch.
    #[arg(long, allow_negative_numbers = true, help_heading = "Training")]
    weight_decay: Option<f32>,
    /// Leave norms, biases, tokens and positions out of weight decay.
    #[arg(long, help_heading = "Training")]
    no_decay_norms: bool,
    /// How the learning rate changes.
    #[arg(long, value_enum, help_heading = "Training")]
    schedule: Option<ScheduleOption>,
    /// Epochs after which the multi-step schedule multiplies by --gamma.
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true, help_heading = "Training")]
    milestones: Option<Vec<f64>>,
    /// Factor of the multi-step schedule.
    #[arg(long, allow_negative_numbers = true, help_heading = "Training")]
    gamma: Option<f64>,
    /// Epochs in which the learning rate rises linearly.
    #[arg(long, allow_negative_numbers = true, help_heading = "Training")]
    warmup: Option<f64>,
    /// Share of the target that is spread over all classes.
    #[arg(long, allow_negative_numbers = true, help_heading = "Training")]
    label_smoothing: Option<f32>,
    /// Largest norm of all gradients together.
    #[arg(long, allow_negative_numbers = true, help_heading = "Training")]
    clip_norm: Option<f32>,
    /// Whether examples come in a new random order each epoch, or in file order.
    #[arg(long, action = clap::ArgAction::Set, help_heading = "Training")]
    shuffle: Option<bool>,
    /// How images are varied.
    #[arg(long, value_enum, help_heading = "Training")]
    augment: Option<AugmentOption>,
    /// Multiply brightness, contrast and saturation by random factors from 1 - S to 1 + S; with --augment alone.
    #[arg(long, value_name = "S", allow_negative_numbers = true, help_heading = "Training")]
    jitter: Option<f32>,
}

#[derive(Clone, Copy, ValueEnum)]
enum OptimizerOption {
    /// Stochastic gradient descent with momentum.
    Sgd,
    /// Adam with decoupled weight decay.
    Adamw,
}

#[derive(Clone, Copy, ValueEnum)]
enum ScheduleOption {
    Constant,
    Multistep,
    Cosine,
}

#[derive(Clone, Copy, ValueEnum)]
enum AugmentOption {
    /// Not at all.
    None,
    /// Resized-crop where a folder's images are stored larger than the model's input, else crop.
    Standard,
    /// Random crop, after padding by an eighth if the images are of the input's size, and horizontal flip.
    Crop,
    /// A random part of the image, scaled to the input's size, and horizontal flip.
    ResizedCrop,
}

impl RecipeOptions {
    /// The model file's recipe with these options on top.
    fn apply(&self, config: &ModelConfig) -> dilt::Result<Recipe> {
        let mut recipe = Recipe::from_table(&config.train)?;
        fn set<T: Clone>(field: &mut T, option: &Option<T>) {
            if let Some(value) = option {
                field.clone_from(value);
            }
        }
        if let Some(optimizer) = self.optimizer {
            let optimizer = match optimizer {
                OptimizerOption::Sgd => OptimizerKind::Sgd,
                OptimizerOption::Adamw => OptimizerKind::Adamw,
            };
            if optimizer != recipe.optimizer && (self.lr.is_none() || self.weight_decay.is_none()) {
                return Err(dilt::Error::Usage(format!(
                    "--optimizer: expected --lr and --weight-decay with it, since those of model {} are for another optimizer",
                    config.name
                )));
            }
            recipe.optimizer = optimizer;
        }
        if let Some(betas) = &self.betas {
            recipe.betas = betas
                .as_slice()
                .try_into()
                .map_err(|_| dilt::Error::Usage(format!("--betas: expected two numbers, got {betas:?}")))?;
        }
        set(&mut recipe.epsilon, &self.epsilon);
        set(&mut recipe.epochs, &self.epochs);
        set(&mut recipe.batch, &self.batch);
        set(&mut recipe.lr, &self.lr);
        set(&mut recipe.momentum, &self.momentum);
        set(&mut recipe.weight_decay, &self.weight_decay);
        set(&mut recipe.milestones, &self.milestones);
        set(&mut recipe.gamma, &self.gamma);
        set(&mut recipe.warmup, &self.warmup);
        set(&mut recipe.label_smoothing, &self.label_smoothing);
        set(&mut recipe.shuffle, &self.shuffle);
        set(&mut recipe.jitter, &self.jitter);
        recipe.steps = self.steps.or(recipe.steps);
        recipe.clip_norm = self.clip_norm.or(recipe.clip_norm);
        recipe.nesterov |= self.nesterov;
        recipe.decay_norms &= !self.no_decay_norms;
        if let Some(schedule) = self.schedule {
            recipe.schedule = match schedule {
                ScheduleOption::Constant => Schedule::Constant,
                ScheduleOption::Multistep => Schedule::Multistep,
                ScheduleOption::Cosine => Schedule::Cosine,
            };
        }
        if let Some(augment) = self.augment {
            recipe.augment = match augment {
                AugmentOption::None => Augmentation::None,
                AugmentOption::Standard => Augmentation::Standard,
                AugmentOption::Crop => Augmentation::Crop,
                AugmentOption::ResizedCrop => Augmentation::ResizedCrop,
            };
        }
        recipe.check()?;
        Ok(recipe)
    }
}

/// Where runs are kept.
#[derive(Args)]
struct RunOptions {
    /// Folder of the run folders.
    #[arg(long, default_value = "runs", help_heading = "Output")]
    runs: PathBuf,
    /// Go on with a run that was begun on another device, instruction set or version: its bits will differ.
    #[arg(long, help_heading = "Output")]
    allow_device_change: bool,
}

/// What a run's bits depend on beside its settings.
fn machine(device: &Device) -> serde_json::Value {
    let policy = format!("{:?}", device.policy()).to_lowercase();
    serde_json::json!({ "version": env!("CARGO_PKG_VERSION"), "device": device.description(), "policy": policy })
}

/// `model` and `data` for the name of a run folder: without paths.
fn short_name(text: &str) -> String {
    let stem = Path::new(text).file_stem().and_then(|stem| stem.to_str()).unwrap_or("model");
    stem.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' }).collect()
}
