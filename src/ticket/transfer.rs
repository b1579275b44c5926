//! `dilt transfer`: a ticket of one data set on another, beside its controls.
//!
//! The body of the network (everything but the classifier) comes from files, the classifier is drawn anew by each seed
//! and has no mask: the other data may have other classes and images of another size. Densities count the convolutions
//! that the ticket has masks of, in every row alike.

use std::collections::BTreeMap;

use super::experiment::{DENSE, Experiment, Origin, Repetition, Ticket, check_body};
use super::result::Outcome;
use super::rows::repeat;
use super::settings::check_levels;
use super::{controls, lth};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::mask::Mask;
use crate::mask::set::MaskSet;
use crate::nn::config::ModelConfig;
use crate::nn::init;
use crate::nn::model::{Model, Parameter, ParameterKind};
use crate::nn::weights::Weights;

/// Name of the row of the ticket.
const TICKET: &str = "ticket";

/// The body of a network from a file, and what the file keeps of its convolutions.
pub struct Body {
    /// Everything but the classifier; as in the file, before masks.
    weights: Weights,
    /// In the order of the model's parameters.
    masks: MaskSet,
    /// Norms and biases that it fixes to zero.
    fixed: BTreeMap<String, Mask>,
    /// [`Weights::identity`] of the file.
    identity: String,
}

/// Where an lth ticket comes from.
pub enum Lth {
    /// A ticket of the source.
    Given(Body),
    /// Found on the target data, in so many levels.
    Found(usize),
}

/// What is brought to other data.
pub struct Transfer {
    ticket: Body,
    lth: Lth,
    /// Where the dense network and the random ticket start; drawn by each seed if none.
    dense: Option<Weights>,
    notes: Vec<String>,
}

impl Body {
    /// The body of `file`, which must be one of the network that `config` describes.
    ///
    /// # Errors
    /// [`Error::Usage`] if its first convolution reads another number of channels, or with the full list of what else does
    /// not fit; as [`Weights::named_as`].
    pub fn new(file: &Weights, config: &ModelConfig) -> Result<Self> {
        let model = config.build()?;
        let (identity, tensors) = (file.identity(), model.file_tensors());
        let file = file.clone().named_as(tensors.iter().map(|(name, _)| name.as_str()))?;
        let file = &file.with_positions_for(config)?;
        check_channels(file, &model)?;
        let keep = |name: &String| !model.is_head(name);
        let weights = Weights {
            tensors: file.tensors.iter().filter(|(name, _)| keep(name)).map(|(n, t)| (n.clone(), t.clone())).collect(),
            ..Weights::default()
        };
        check_body(&weights, &model)?;
        let masks = file.masks.iter().filter(|(name, _)| keep(name)).map(|(n, m)| (n.clone(), m.clone()));
        let (masks, fixed) = masks.partition::<BTreeMap<_, _>, _>(|(_, mask)| mask.shape().len() > 1);
        let body = model.parameters.iter().map(|parameter| parameter.name.clone());
        let names = body.filter(|name| masks.contains_key(name));
        let masks = MaskSet::from_file(&masks, &names.collect::<Vec<_>>())?;
        Ok(Body { weights, masks, fixed, identity })
    }

    /// Whether the file holds what its masks remove: of trained weights that is exactly zero.
    fn has_unmasked_weights(&self) -> bool {
        let (mut removed, mut zero) = (0, 0);
        for (name, mask) in self.masks.layers() {
            let values = self.weights.tensors[name].iter().zip(mask.iter()).filter(|(_, keep)| !keep);
            values.for_each(|(value, _)| (removed, zero) = (removed + 1, zero + usize::from(*value == 0.0)));
        }
        // Drawn weights are hardly ever zero, but those of a coarse number format may be.
        zero * 2 <= removed
    }
}

/// Refuses weights whose first convolution reads another number of channels than the data has.
fn check_channels(file: &Weights, model: &Model) -> Result<()> {
    let first = [ParameterKind::Convolution, ParameterKind::PatchEmbedding];
    let Some(Parameter { name, .. }) = model.parameters.iter().find(|p| first.contains(&p.kind)) else { return Ok(()) };
    let (shape, got) = (file.tensors.get(name).map(|tensor| tensor.shape()), model.image[0]);
    match shape {
        Some(shape @ &[_, channels, _, _]) if channels != got => Err(Error::Usage(format!(
            "--data: expected images with {channels} channels, which is what '{name}' {shape:?} reads, got {got}; choose \
             such data, or a ticket of images with {got} channels (a folder is read with the channels of --set image)"
        ))),
        _ => Ok(()),
    }
}

impl Transfer {
    /// Checks that everything fits together. Without `dense` weights, the dense start is the ticket's own unmasked
    /// weights where its file has them.
    ///
    /// # Errors
    /// [`Error::Usage`] if the ticket has no mask of a convolution, `lth` has masks of other layers, `dense` has masks, or
    /// the number of levels cannot be.
    pub fn new(ticket: Body, lth: Lth, dense: Option<Body>) -> Result<Self> {
        let layers = |body: &Body| body.masks.layers().iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        if ticket.masks.layers().is_empty() {
            return Err(Error::Usage(
                "--ticket: expected masks of convolutions, got one of the classifier alone, which is drawn anew".into(),
            ));
        }
        if dense.as_ref().is_some_and(|dense| !dense.masks.layers().is_empty()) {
            return Err(Error::Usage(
                "--dense: expected weights without masks, such as seed_0/tickets/dense/weights.safetensors of the run \
                 that the ticket is from, got a ticket"
                    .into(),
            ));
        }
        let mut notes = Vec::new();
        match &lth {
            Lth::Found(levels) => check_levels(*levels)?,
            Lth::Given(lth) => {
                MaskSet::from_file(&lth.masks.to_file(), &layers(&ticket))
                    .map_err(|error| Error::Usage(format!("--lth: expected masks of the ticket's layers: {error}")))?;
                if lth.masks.kept() != ticket.masks.kept() {
                    notes.push(format!(
                        "warning: --lth keeps {} weights, the ticket {}: they are not matched",
                        lth.masks.kept(),
                        ticket.masks.kept()
                    ));
                }
            }
        }
        let (dense, from) = match dense {
            Some(dense) => (Some(dense.weights), "the weights of --dense"),
            None if ticket.has_unmasked_weights() => {
                (Some(ticket.weights.clone()), "the ticket's weights without its masks")
            }
            None => (None, "newly drawn weights: the ticket's file has zeros where its masks remove"),
        };
        notes.push(format!("dense and random start from {from}"));
        Ok(Transfer { ticket, lth, dense, notes })
    }

    /// What a user should know of the choices made.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The tickets of one repetition.
    fn tickets(&self, repetition: &Repetition) -> Result<Vec<Ticket>> {
        let masks = &self.ticket.masks;
        let keep = masks.kept();
        let lth = match &self.lth {
            Lth::Given(lth) => {
                let ticket = from_file("lth", "lth", lth);
                if lth.masks.kept() == keep { ticket.at(TICKET) } else { ticket }
            }
            Lth::Found(levels) => {
                let found = |device: &Device| lth::to_count(repetition, device, TICKET, *levels, keep);
                let masks = repetition.experiment.streams.one(found)?;
                Ticket::new("lth", "lth", masks).after(*levels).at(TICKET)
            }
        };
        let redrawn = from_file("redrawn", "redrawn", &self.ticket).starting_from(controls::redrawn(repetition)?);
        Ok(vec![
            Ticket::new(DENSE, DENSE, repetition.candidates.clone()),
            from_file(TICKET, "transfer", &self.ticket),
            lth,
            Ticket::new("random", "random", controls::random(repetition, masks)).at(TICKET),
            redrawn.at(TICKET),
        ])
    }
}

/// A ticket with masks and weights of a file.
fn from_file(name: &str, method: &'static str, body: &Body) -> Ticket {
    let origin = Origin { level: None, parent: Some(body.identity.clone()) };
    let ticket = Ticket { origin, ..Ticket::new(name, method, body.masks.clone()) };
    ticket.starting_from(body.weights.clone()).fixing(body.fixed.clone())
}

/// Trains and scores the ticket and its controls on the data of the experiment.
///
/// # Errors
/// Errors of trainings and files.
pub fn transfer(experiment: &Experiment, transfer: &Transfer) -> Result<Outcome> {
    let model = experiment.config.build()?;
    let all = transfer.ticket.masks.layers().iter().map(|(name, mask)| (name.clone(), Mask::ones(mask.shape())));
    let candidates = MaskSet::new(all.collect());
    repeat(experiment, |splits, seed, rows| {
        let start = transfer.dense.clone().unwrap_or_else(|| init::draw(&model, seed));
        let repetition = Repetition::new(experiment, splits, seed, candidates.clone(), start)?;
        rows.judge(&repetition, &transfer.tickets(&repetition)?)
    })
}
