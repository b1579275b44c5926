//! `dilt train`: trains a dense network or a ticket.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use dilt::nn::config::ModelConfig;
use dilt::nn::init;
use dilt::nn::layout::Layout;
use dilt::nn::model::Model;
use dilt::nn::network::Network;
use dilt::nn::plan::{Group, Use};
use dilt::nn::weights::Weights;
use dilt::report::table::table;
use dilt::ticket::run::TrainingFolder;
use dilt::ticket::saver::{Saver, resume};
use dilt::train::{Images, Labelled, Training, evaluate};
use serde::Serialize;

use super::{Common, ModelAndData, RecipeOptions, machine};

/// Train a dense network, or a ticket under its masks.
///
/// Writes OUT/weights.safetensors, OUT/training.json, which says what they are of, and OUT/metrics.csv, which has one row per
/// step. A training that was stopped goes on from its last checkpoint in OUT when the same command is given again; of one that
/// has ended, the command tells the result again, and another training is refused. Checkpoints are written every 20 seconds,
/// or as often as the environment variable DILT_CHECKPOINT_SECONDS says.
#[derive(Args)]
pub struct Train {
    /// Weights or a ticket to start from; its masks hold throughout. Drawn from --seed if not given.
    #[arg(long, value_name = "FILE", visible_alias = "ticket")]
    weights: Option<PathBuf>,
    /// Load what fits of --weights, and draw the rest from --seed: a new head for another number of classes, say. What was
    /// not loaded is listed on stderr.
    #[arg(long, requires = "weights")]
    partial: bool,
    /// Folder for weights and metrics.
    #[arg(long, value_name = "DIR", required_unless_present = "dry_run")]
    out: Option<PathBuf>,
    /// Which examples.
    #[arg(long, value_enum, default_value = "train")]
    split: super::eval::Split,
    /// Show the network's tensors with their bytes, and train nothing; --weights are checked against them.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    target: ModelAndData,
    #[command(flatten)]
    recipe: RecipeOptions,
    #[command(flatten)]
    common: Common,
}

#[derive(Serialize)]
struct Trained {
    top1: f64,
    loss: f64,
    epochs: usize,
    steps: usize,
    /// None if it had been trained before.
    images_per_second: Option<f64>,
    weights: String,
}

impl Train {
    pub fn run(&self) -> anyhow::Result<()> {
        let given = self.weights.as_ref().map(|path| Weights::load(path)).transpose()?;
        let (config, data) = self.target.load(given.as_ref(), &self.common)?;
        let recipe = self.recipe.apply(&config)?;
        let model = config.build()?;
        let given = given.map(|weights| self.fit(weights, &config, &model)).transpose()?;
        let device = self.common.open()?;
        if self.dry_run {
            let masks = given.map(|weights| weights.masks).unwrap_or_default();
            let (memory_for, planning) = (Use::Train(recipe.optimizer), self.common.planning()?);
            let layout = Layout::new(&device, &model, &masks, recipe.batch, memory_for, &planning)?;
            return self.show_plan(&layout, layout.list_bytes(&device)?, recipe.batch);
        }
        let out = self.out.as_ref().expect("required by clap");
        let folder = TrainingFolder::open(out)?;
        let files = folder.files();
        let split = self.split.of(&data);
        let images = Images::new(&device, &data, split)?;
        let examples = Labelled::all(&device, &images, split, data.classes)?;
        let start = given.unwrap_or_else(|| init::draw(&model, self.common.seed));
        let (memory_for, planning) = (Use::Train(recipe.optimizer), self.common.planning()?);
        let mut network = Network::for_masks(&device, &model, &start.masks, recipe.batch, memory_for, &planning)?;
        network.load(&start)?;
        // Everything that the bits depend on, so that another training's checkpoint is not gone on from.
        let training_of = serde_json::json!({
            "model": config,
            "recipe": recipe,
            "data": data.identity(),
            "split": self.split.name(),
            "seed": self.common.seed,
            "start": start.identity(),
            "machine": machine(&device),
            "choices": network.choices_hash(),
        });
        let mut training = Training::new(&mut network, &examples, &recipe, self.common.seed)?;
        let (total, per_epoch) = (training.total_steps(), recipe.steps_per_epoch(examples.len()));
        let ended = folder.finished(&training_of)?;
        // The evaluation that follows a training belongs to it.
        let stage;
        let images_per_second = if let Some(weights) = &ended {
            network.load(weights)?;
            None
        } else {
            let identity = training_of.to_string();
            let done = resume(&mut network, &files.checkpoint(), &identity)?;
            stage = self.common.progress().stage("train", total);
            let begun = Instant::now();
            let mut shown = |done, loss| stage.show(done, loss);
            let mut observer = Saver::new(files, done, identity, &mut shown)?;
            training.run(&mut network, done, &mut observer)?;
            let seconds = begun.elapsed().as_secs_f64();
            let seen = (total - done) as f64 * examples.len().min(per_epoch * recipe.batch) as f64 / per_epoch as f64;
            Some(seen / seconds)
        };
        // Weights that give no numbers are not written.
        let score = evaluate(&mut network, &examples, recipe.batch, false)?;
        if ended.is_none() {
            let mut weights = network.weights()?;
            config.record(&mut weights.metadata);
            folder.finish(&weights, &training_of)?;
        }
        let trained = Trained {
            top1: score.top1,
            loss: score.loss,
            epochs: total.div_ceil(per_epoch),
            steps: total,
            images_per_second,
            weights: files.weights().to_string_lossy().into_owned(),
        };
        self.common.print(&trained, |trained| {
            let speed = trained.images_per_second.map_or("before".into(), |speed| format!("at {speed:.0} images/s"));
            format!(
                "trained {} steps {speed}; on the same examples: top-1 {:.2} %, loss {:.4}\nweights: {}",
                trained.steps,
                trained.top1 * 100.0,
                trained.loss,
                trained.weights
            )
        })
    }

    /// The given weights under the model's names, with --partial on top of drawn ones.
    fn fit(&self, given: Weights, config: &ModelConfig, model: &Model) -> anyhow::Result<Weights> {
        let fitted = self.target.renamed(given, config, model).and_then(|given| {
            if self.partial {
                given.partly_for(init::draw(model, self.common.seed))
            } else {
                given.for_model(&model.file_tensors()).map(|weights| (weights, Vec::new()))
            }
        });
        let in_file = || self.weights.as_ref().map_or(String::new(), |path| ModelAndData::described(path, config));
        let (weights, left) = fitted.with_context(in_file)?;
        self.common.warn_of_empty_layers(&weights);
        left.iter().for_each(|line| self.common.progress().say(line));
        Ok(weights)
    }

    fn show_plan(&self, layout: &Layout, list_bytes: usize, batch: usize) -> anyhow::Result<()> {
        let Layout { computed: model, plan, .. } = layout;
        #[derive(Serialize)]
        struct Row<'a> {
            name: &'a str,
            group: String,
            offset_bytes: usize,
            bytes: usize,
        }
        #[derive(Serialize)]
        struct DryRun<'a> {
            model: &'a str,
            parameters: usize,
            batch: usize,
            bytes: usize,
            list_bytes: usize,
            tensors: Vec<Row<'a>>,
        }
        let row = |tensor: &'_ dilt::nn::plan::PlannedTensor| (format!("{:?}", tensor.group), tensor.clone());
        let rows: Vec<_> = plan.tensors.iter().map(row).collect();
        let tensors = rows.iter().map(|(group, tensor)| Row {
            name: &tensor.name,
            group: group.clone(),
            offset_bytes: tensor.offset_bytes,
            bytes: tensor.bytes,
        });
        let result = DryRun {
            model: &model.name,
            parameters: model.parameter_count(),
            batch,
            bytes: plan.bytes,
            list_bytes,
            tensors: tensors.collect(),
        };
        self.common.print(&result, |result| {
            let rows = result.tensors.iter().map(|tensor| {
                let bytes = if tensor.bytes == 0 { "shared".into() } else { tensor.bytes.to_string() };
                vec![tensor.name.to_owned(), tensor.group.clone(), tensor.offset_bytes.to_string(), bytes]
            });
            let mut text = table(&["tensor", "group", "offset", "bytes"], rows);
            let groups = [
                Group::Parameters,
                Group::Gradients,
                Group::Optimizer,
                Group::Masks,
                Group::Statistics,
                Group::Activations,
                Group::ActivationGradients,
                Group::Scratch,
            ];
            let sums = groups.map(|group| vec![format!("{group:?}"), plan.group_bytes(group).to_string()]);
            text += &format!("\n\n{}", table(&["group", "bytes"], sums));
            let (model, parameters, batch) = (result.model, result.parameters, result.batch);
            text + &format!(
                "\n\n{model}: {parameters} parameters; {} bytes in one arena at batch {batch}, {} of lists of kept weights",
                result.bytes, result.list_bytes
            )
        })
    }
}
