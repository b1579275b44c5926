//! One repetition of an experiment: it trains networks under masks, each in a folder of its own, and scores tickets.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::heads::{HeadDensities, head_densities};
use super::run::{RunFolder, StageFolder};
use super::saver::{Saver, resume};
use super::settings::{Repetitions, Search};
use super::streams::Streams;
use crate::data::partition::Part;
use crate::data::{DataSet, Examples};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::mask::Mask;
use crate::mask::set::MaskSet;
use crate::nn::config::ModelConfig;
use crate::nn::init;
use crate::nn::model::Model;
use crate::nn::network::Network;
use crate::nn::paths::Planning;
use crate::nn::plan::Use;
use crate::nn::weights::Weights;
use crate::report::progress::Progress;
use crate::train::{Images, Labelled, Recipe, Training, evaluate, refresh_statistics};

/// The method of the network that keeps everything, which has no ticket file.
pub(super) const DENSE: &str = "dense";

/// What all repetitions share.
pub struct Experiment<'a> {
    /// Where masks are combined, and where the data lies.
    pub device: &'a Device,
    /// Where networks run.
    pub streams: &'a Streams,
    /// What they are trained and tested on.
    pub data: &'a DataSet,
    /// The network, with as many outputs as the data has classes.
    pub config: &'a ModelConfig,
    /// How tickets are trained.
    pub recipe: &'a Recipe,
    /// How often, and on which parts of the data they are judged.
    pub repetitions: &'a Repetitions,
    /// Where everything is kept.
    pub folder: &'a RunFolder,
    /// What decides how layers multiply.
    pub planning: &'a Planning,
    /// Is told how far it is.
    pub progress: &'a Progress,
}

impl Experiment<'_> {
    /// A network of a model with these weights.
    fn network(
        &self,
        device: &Device,
        model: &Model,
        weights: &Weights,
        memory_for: Use,
        only: Option<&MaskSet>,
    ) -> Result<Network> {
        let (batch, planning) = (self.recipe.batch, self.planning);
        let mut network = Network::for_masks(device, model, &weights.masks, batch, memory_for, planning)?;
        if let Some(only) = only {
            network.train_only(only)?;
        }
        network.load(weights)?;
        Ok(network)
    }

    /// An error of a training, with the training's name.
    fn named(&self, stage: &str, error: Error) -> Error {
        match error {
            Error::Run(problem) => Error::Run(format!("{stage}: {problem}")),
            Error::Device(problem) => Error::Device(match self.streams.count() {
                1 => format!("{stage}: {problem}"),
                // Memory may be what failed it.
                count => format!("{stage}: {problem} (--streams {count}: so many trainings share the memory)"),
            }),
            other => other,
        }
    }
}

/// The examples of an experiment, which all repetitions share.
pub struct Splits {
    train: Images,
    test: Images,
}

impl Splits {
    /// Copies the images to the device, if they are in memory.
    ///
    /// # Errors
    /// As [`Images::new`].
    pub fn new(experiment: &Experiment) -> Result<Self> {
        let Experiment { device, streams, data, .. } = *experiment;
        let images = |split| Ok(Images::new(device, data, split)?.shared_by(streams.count()));
        Ok(Splits { train: images(&data.train)?, test: images(&data.test)? })
    }
}

/// One repetition: a seed and its starting point.
pub struct Repetition<'a> {
    /// What all repetitions share.
    pub experiment: &'a Experiment<'a>,
    /// Of initial weights and orders of examples.
    pub seed: u64,
    /// The weights that are pruned, all kept.
    pub candidates: MaskSet,
    /// The parts of the training examples; empty where parts play no role.
    pub parts: Vec<Part>,
    /// The parts of the test examples.
    pub test_parts: Vec<Part>,
    /// Where every training starts: θ_k.
    pub start: Weights,
    splits: &'a Splits,
}

/// The kinds of randomness of a repetition: trainings of one kind see examples in the same order.
#[derive(Clone, Copy)]
pub enum Purpose {
    /// From the initial weights to where every training starts.
    Rewind,
    /// To find masks.
    Search,
    /// To judge a ticket.
    Retrain,
}

/// What a training sees and for how long.
#[derive(Clone, Copy)]
pub struct Task<'a> {
    /// The part of the examples; all of them if none.
    pub part: Option<&'a Part>,
    /// The outputs of the network.
    pub head: Head,
    /// The weights that are trained; all that the mask keeps if none.
    pub only: Option<&'a MaskSet>,
    /// Which orders of examples.
    pub purpose: Purpose,
    /// Times the recipe's epochs.
    pub times: usize,
    /// Stops after so many steps, with the learning rates of the whole training.
    pub stop: Option<usize>,
}

/// The outputs of a network that is trained on a part.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// The part's own classes.
    Own,
    /// All classes of the data.
    All,
}

impl Task<'_> {
    /// Training of all weights on all examples.
    pub fn all(purpose: Purpose) -> Self {
        Task { part: None, head: Head::All, only: None, purpose, times: 1, stop: None }
    }
}

/// A ticket that is to be judged.
#[derive(Clone)]
pub struct Ticket {
    /// Which ticket.
    pub name: String,
    /// How it was found.
    pub method: &'static str,
    /// The ticket whose number of weights a control has.
    pub matched: Option<String>,
    /// What it keeps.
    pub masks: MaskSet,
    /// Masks of vectors: norms and biases that it fixes to zero.
    pub fixed: BTreeMap<String, Mask>,
    /// The weights to start from; θ_k if none.
    pub start: Option<Weights>,
    /// Where its masks come from, for its file's metadata.
    pub origin: Origin,
}

/// Where the masks of a ticket come from.
#[derive(Clone, Default)]
pub struct Origin {
    /// Levels of training and pruning after which they were found.
    pub level: Option<usize>,
    /// [`Weights::identity`] of the file that they are from.
    pub parent: Option<String>,
}

impl Ticket {
    /// A ticket that starts from θ_k.
    pub fn new(name: impl Into<String>, method: &'static str, masks: MaskSet) -> Self {
        let (matched, fixed, start, origin) = Default::default();
        Ticket { name: name.into(), method, matched, masks, fixed, start, origin }
    }

    /// A control with the number of weights of a ticket.
    pub fn at(self, matched: &str) -> Self {
        Ticket { matched: Some(matched.into()), ..self }
    }

    /// Starts from other weights.
    pub fn starting_from(self, start: Weights) -> Self {
        Ticket { start: Some(start), ..self }
    }

    /// Fixes norms and biases to zero.
    pub fn fixing(self, fixed: BTreeMap<String, Mask>) -> Self {
        Ticket { fixed, ..self }
    }

    /// Was found after so many levels.
    pub fn after(mut self, levels: usize) -> Self {
        self.origin.level = Some(levels);
        self
    }
}

/// How a ticket did on the test examples.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct TicketScore {
    /// Kept / prunable weights.
    pub density: f64,
    /// Accuracy on all test examples.
    pub top1: f64,
    /// Mean cross entropy on all test examples.
    pub loss: f64,
    /// Accuracy on each part's test examples, with all outputs.
    pub parts: Vec<f64>,
    /// Accuracy on each part's test examples, when only the outputs of its classes may be chosen.
    pub restricted: Vec<f64>,
    /// Layers that the mask leaves nothing of.
    pub empty_layers: Vec<String>,
    /// What the mask keeps of each attention head.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub heads: Vec<HeadDensities>,
}

impl<'a> Repetition<'a> {
    /// Prepares a repetition of a search: trains to where every training starts.
    ///
    /// # Errors
    /// [`crate::Error::Usage`] if data, model and search do not fit together; an error of the training.
    pub fn of_search(experiment: &'a Experiment<'a>, splits: &'a Splits, search: &Search, seed: u64) -> Result<Self> {
        let model = experiment.config.build()?;
        let partition = experiment.repetitions.partition.as_ref();
        search.check(partition, &model, experiment.recipe.total_steps(experiment.data.train.len()))?;
        let start = init::draw(&model, seed);
        let candidates = search.candidates(partition, &model)?;
        let mut repetition = Self::new(experiment, splits, seed, candidates, start)?;
        if search.rewind > 0 {
            let folder = experiment.folder.search(seed, "rewind")?;
            let task = Task { stop: Some(search.rewind), ..Task::all(Purpose::Rewind) };
            let (model, start, recipe) = (&model, &repetition.start, experiment.recipe);
            repetition.start =
                experiment.streams.one(|device| repetition.train_with(device, &folder, model, start, task, recipe))?;
        }
        Ok(repetition)
    }

    /// Prepares a repetition whose prunable weights and starting point are given.
    ///
    /// # Errors
    /// [`crate::Error::Usage`] if the data cannot be divided so.
    pub fn new(
        experiment: &'a Experiment<'a>,
        splits: &'a Splits,
        seed: u64,
        candidates: MaskSet,
        start: Weights,
    ) -> Result<Self> {
        let Experiment { data, repetitions, .. } = *experiment;
        let parts = |split: &Examples| match &repetitions.partition {
            Some(partition) => partition.split(&split.labels, data.classes),
            None => Ok(Vec::new()),
        };
        Ok(Repetition {
            experiment,
            seed,
            candidates,
            parts: parts(&data.train)?,
            test_parts: parts(&data.test)?,
            start,
            splits,
        })
    }

    /// The network with these outputs.
    fn model(&self, classes: usize) -> Result<Model> {
        ModelConfig { classes, ..self.experiment.config.clone() }.build()
    }

    /// Outputs of the network of a task.
    fn classes(&self, task: Task) -> usize {
        match (task.part, task.head) {
            (Some(part), Head::Own) => part.classes.len(),
            _ => self.experiment.data.classes,
        }
    }

    /// The training examples of a task.
    fn examples(&self, device: &Device, task: Task) -> Result<Labelled<'_>> {
        let data = self.experiment.data;
        let (images, split, classes) = (&self.splits.train, &data.train, data.classes);
        match (task.part, task.head) {
            (None, _) => Labelled::all(device, images, split, classes),
            (Some(part), Head::All) => Labelled::part_of_all(device, images, split, part, classes),
            (Some(part), Head::Own) => Labelled::part(device, images, split, part),
        }
    }

    /// Trains from θ_k under `masks` in a folder of the search, or reads what was trained there.
    ///
    /// # Errors
    /// [`crate::Error::Run`] if the training diverges; [`crate::Error::File`] if the folder cannot be written.
    pub fn search(&self, device: &Device, stage: &str, masks: &MaskSet, task: Task) -> Result<Weights> {
        let model = self.model(self.classes(task))?;
        self.search_from(device, stage, &self.starting_weights(&model, &self.start, masks), task)
    }

    /// The same from given weights under their own masks.
    ///
    /// # Errors
    /// As [`Repetition::search`].
    pub fn search_from(&self, device: &Device, stage: &str, start: &Weights, task: Task) -> Result<Weights> {
        let folder = self.experiment.folder.search(self.seed, stage)?;
        let model = self.model(self.classes(task))?;
        self.train_with(device, &folder, &model, start, task, &self.recipe(task))
    }

    /// The recipe of a task. Steps are shared by the parts as epochs are: together they see as many samples as a
    /// training on all data.
    fn recipe(&self, task: Task) -> Recipe {
        let Experiment { recipe, data, .. } = *self.experiment;
        let (times, all) = (task.times, data.train.len());
        let examples = task.part.map_or(all, |part| part.examples.len());
        Recipe {
            epochs: recipe.epochs * times,
            steps: recipe.steps.map(|steps| (steps * times * examples).div_ceil(all)),
            milestones: recipe.milestones.iter().map(|epoch| epoch * times as f64).collect(),
            ..recipe.clone()
        }
    }

    fn train_with(
        &self,
        device: &Device,
        folder: &StageFolder,
        model: &Model,
        start: &Weights,
        task: Task,
        recipe: &Recipe,
    ) -> Result<Weights> {
        let _turn = self.experiment.streams.turn(folder.name())?;
        let trained = self.train_in(device, folder, model, start, task, recipe);
        trained.map_err(|error| self.experiment.named(folder.name(), error))
    }

    fn train_in(
        &self,
        device: &Device,
        folder: &StageFolder,
        model: &Model,
        start: &Weights,
        task: Task,
        recipe: &Recipe,
    ) -> Result<Weights> {
        let output = folder.weights();
        if output.exists() {
            remove_checkpoint(folder);
            return Weights::load(&output);
        }
        let Experiment { progress, streams, .. } = *self.experiment;
        let examples = self.examples(device, task)?;
        let memory_for = Use::Train(recipe.optimizer);
        let mut network = self.experiment.network(device, model, start, memory_for, task.only)?;
        // With the run folder's name, everything that the bits depend on.
        let identity = network.choices_hash();
        let done = resume(&mut network, &folder.checkpoint(), &identity)?;
        let seed = self.seed * 4 + task.purpose as u64;
        let mut training = Training::new(&mut network, &examples, recipe, seed)?;
        if let Some(steps) = task.stop {
            training.stop_after(steps);
        }
        training.join(streams.array());
        let bar = progress.stage(folder.name(), training.total_steps());
        let mut shown = |done, loss| bar.show(done, loss);
        let mut observer = Saver::new(folder, done, identity, &mut shown)?.beside(streams);
        training.run(&mut network, done, &mut observer)?;
        let mut weights = network.weights()?;
        self.experiment.config.record(&mut weights.metadata);
        weights.metadata.insert("seed".into(), self.seed.to_string());
        weights.metadata.insert("stage".into(), folder.name().into());
        weights.save(&output)?;
        remove_checkpoint(folder);
        Ok(weights)
    }

    /// The body of `start`, the model's own drawn head, and the masks, unless they keep everything.
    fn starting_weights(&self, model: &Model, start: &Weights, masks: &MaskSet) -> Weights {
        let mut weights = init::draw(model, self.seed);
        for (name, tensor) in start.tensors.iter().filter(|(name, _)| !model.is_head(name)) {
            weights.tensors.insert(name.clone(), tensor.clone());
        }
        if masks.kept() < masks.total() {
            weights.masks = masks.to_file();
        }
        weights
    }

    /// Writes a ticket into the folder of that name, retrains it on all data, and evaluates it; or reads what is there.
    ///
    /// # Errors
    /// As [`Repetition::search`].
    pub fn retrain(&self, device: &Device, folder: &str, ticket: &Ticket) -> Result<(TicketScore, StageFolder)> {
        let folder = self.experiment.folder.ticket(self.seed, folder)?;
        if let Some(score) = folder.score()? {
            return Ok((score, folder));
        }
        if ticket.method != DENSE {
            self.write_ticket(&folder, ticket)?;
        }
        let model = self.model(self.experiment.data.classes)?;
        let mut start = self.starting_weights(&model, ticket.start.as_ref().unwrap_or(&self.start), &ticket.masks);
        start.masks.extend(ticket.fixed.clone());
        let task = Task::all(Purpose::Retrain);
        let weights = self.train_with(device, &folder, &model, &start, task, self.experiment.recipe)?;
        let score = self.score(device, &weights, &ticket.masks);
        let score = score.map_err(|error| self.experiment.named(folder.name(), error))?;
        folder.write_score(&score)?;
        Ok((score, folder))
    }

    /// Writes a ticket: the weights to start from and the masks.
    pub(super) fn write_ticket(&self, folder: &StageFolder, ticket: &Ticket) -> Result<()> {
        let Ticket { method, masks, fixed, start, origin, .. } = ticket;
        let model = self.model(self.experiment.data.classes)?;
        let mut file = self.starting_weights(&model, start.as_ref().unwrap_or(&self.start), masks);
        file.masks = masks.to_file();
        file.masks.extend(fixed.clone());
        file.metadata = BTreeMap::from([
            ("method".into(), (*method).into()),
            ("sparsity".into(), (1.0 - masks.density()).to_string()),
            ("seed".into(), self.seed.to_string()),
            ("dilt".into(), env!("CARGO_PKG_VERSION").into()),
        ]);
        self.experiment.config.record(&mut file.metadata);
        let partition = self.experiment.repetitions.partition.as_ref();
        let partition = partition.map(|partition| serde_json::to_string(partition).unwrap_or_default());
        let level = origin.level.map(|level| level.to_string());
        for (key, value) in [("partition", partition), ("level", level), ("parent", origin.parent.clone())] {
            file.metadata.extend(value.map(|value| (key.to_owned(), value)));
        }
        file.save(&folder.ticket())
    }

    /// These weights with running statistics of one more pass over all training examples.
    pub(super) fn with_fresh_statistics(&self, device: &Device, weights: &Weights) -> Result<Weights> {
        let Experiment { data, recipe, .. } = *self.experiment;
        let model = self.model(data.classes)?;
        let mut network = self.experiment.network(device, &model, weights, Use::Train(recipe.optimizer), None)?;
        refresh_statistics(&mut network, &self.examples(device, Task::all(Purpose::Retrain))?, recipe.batch)?;
        network.weights()
    }

    /// Evaluates weights on the test examples: all of them, and each part's.
    pub(super) fn score(&self, device: &Device, weights: &Weights, masks: &MaskSet) -> Result<TicketScore> {
        let Experiment { data, recipe, .. } = *self.experiment;
        let model = self.model(data.classes)?;
        let mut network = self.experiment.network(device, &model, weights, Use::Evaluate, None)?;
        let examples = Labelled::all(device, &self.splits.test, &data.test, data.classes)?;
        let score = evaluate(&mut network, &examples, recipe.batch, true)?;
        let labels = &data.test.labels;
        let accuracy = |part: &Part, among: &dyn Fn(u32) -> bool| {
            let right = |&&example: &&u32| {
                let logits = &score.logits[example as usize * data.classes..][..data.classes];
                let allowed = (0..data.classes as u32).filter(|&class| among(class));
                // The first of equal logits, as everywhere.
                let best = allowed.reduce(
                    |best, class| {
                        if logits[class as usize] > logits[best as usize] { class } else { best }
                    },
                );
                best == Some(labels[example as usize])
            };
            part.examples.iter().filter(right).count() as f64 / part.examples.len() as f64
        };
        Ok(TicketScore {
            density: masks.density(),
            top1: score.top1,
            loss: score.loss,
            parts: self.test_parts.iter().map(|part| accuracy(part, &|_| true)).collect(),
            restricted: self
                .test_parts
                .iter()
                .map(|part| accuracy(part, &|class| part.classes.contains(&class)))
                .collect(),
            empty_layers: masks.empty_layers(),
            heads: head_densities(network.model(), masks),
        })
    }
}

/// Checks that weights are those of a network, whatever their head: it is drawn anew, unless it has a mask.
///
/// # Errors
/// As [`Weights::check_against`].
pub fn check_body(weights: &Weights, model: &Model) -> Result<()> {
    let counts = |name: &str| !model.is_head(name) || weights.masks.contains_key(name);
    let tensors = weights.tensors.iter().filter(|(name, _)| counts(name));
    let tensors = tensors.map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
    let expected: Vec<_> = model.file_tensors().into_iter().filter(|(name, _)| counts(name)).collect();
    Weights { tensors, ..Weights::default() }.check_against(&expected)
}

/// Removes the checkpoint of a training that is done; left behind, it would only take space.
fn remove_checkpoint(folder: &StageFolder) {
    let _ = std::fs::remove_file(folder.checkpoint());
}
