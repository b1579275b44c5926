//! Matching the names of a file to those of a model, and names to patterns.
//!
//! | in the file | in the model |
//! |---|---|
//! | `module.<name>`, on all tensors: PyTorch's `DataParallel` | `<name>` |
//! | `fc.*`, `linear.*` | the one of the two that the model has |
//! | `*.shortcut.0.*`, `*.shortcut.1.*`: kuangliu's CIFAR networks | `*.downsample.0.*`, `*.downsample.1.*` |
//!
//! Masks follow their tensors. Everything else must have the model's own names and shapes, unless what fits is asked for.

use std::collections::{BTreeMap, BTreeSet};

use ndarray::ArrayD;

use super::weights::Weights;
use crate::{Error, Result};

/// What `DataParallel` puts before all names.
const PARALLEL: &str = "module.";
/// Parts of names that may stand for one another: in a file, in the model.
const ALIASES: [(&str, &str); 4] =
    [("fc.", "linear."), ("linear.", "fc."), (".shortcut.0.", ".downsample.0."), (".shortcut.1.", ".downsample.1.")];

/// Names of a vision transformer's tokens.
const CLASS_TOKEN: &str = "cls_token";
const POSITIONS: &str = "pos_embed";

impl Weights {
    /// The content of a file for a model whose files hold `expected`, names and shapes: all of that, and no more.
    ///
    /// # Errors
    /// As [`Weights::named_as`] and [`Weights::check_against`].
    pub fn for_model(self, expected: &[(String, Vec<usize>)]) -> Result<Self> {
        let weights = self.named_as(expected.iter().map(|(name, _)| name.as_str()))?;
        weights.check_against(expected)?;
        Ok(weights)
    }

    /// What fits a model of the content of a file; the rest is that of `drawn`, which holds all of the model's tensors.
    /// Also returns what of the file and of the model did not fit, and why: one line per reason.
    ///
    /// # Errors
    /// As [`Weights::named_as`]; [`Error::Usage`] if nothing fits.
    pub fn partly_for(self, mut drawn: Weights) -> Result<(Self, Vec<String>)> {
        let weights = self.named_as(drawn.tensors.keys().map(String::as_str))?;
        let Weights { tensors, mut masks, metadata } = weights;
        let (mut unknown, mut misshapen, mut taken) = (Vec::new(), Vec::new(), Vec::new());
        let missing: Vec<String> = drawn.tensors.keys().filter(|&n| !tensors.contains_key(n)).cloned().collect();
        for (name, tensor) in tensors {
            match drawn.tensors.get_mut(&name) {
                None => unknown.push(name),
                Some(place) if place.shape() != tensor.shape() => {
                    let mask = if masks.contains_key(&name) { ", its mask left out" } else { "" };
                    misshapen.push(format!(
                        "{name} ({:?} in the model, {:?} in the file{mask})",
                        place.shape(),
                        tensor.shape()
                    ));
                }
                Some(place) => {
                    *place = tensor;
                    taken.push(name);
                }
            }
        }
        let reasons = [
            ("another shape, so drawn from --seed", misshapen),
            ("not in the file, so drawn from --seed", missing),
            ("not in the model, so left out", unknown),
        ];
        let lines = reasons.into_iter().filter(|(_, names)| !names.is_empty());
        let lines: Vec<String> = lines.map(|(reason, names)| format!("{reason}: {}", names.join(", "))).collect();
        if taken.is_empty() {
            let lines = lines.join("\n  ");
            return Err(Error::Usage(format!(
                "--partial: no tensor fits the model; choose another --model\n  {lines}"
            )));
        }
        masks.retain(|name, _| taken.contains(name));
        Ok((Weights { tensors: drawn.tensors, masks, metadata }, lines))
    }

    /// Gives tensors and masks the names that a model with the names `expected` has for them.
    ///
    /// # Errors
    /// [`Error::Usage`] if two tensors would have the same name.
    pub fn named_as<'a>(self, expected: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let expected: BTreeSet<&str> = expected.into_iter().collect();
        let parallel = self.tensors.keys().all(|name| name.starts_with(PARALLEL));
        let rename = |name: &str| {
            let name = if parallel { &name[PARALLEL.len()..] } else { name };
            let aliases = ALIASES.iter().filter(|(theirs, _)| theirs.starts_with('.') || name.starts_with(theirs));
            let mut renamed = aliases.map(|(theirs, ours)| name.replacen(theirs, ours, 1));
            match expected.contains(name) {
                true => name.to_owned(),
                false => renamed.find(|renamed| expected.contains(renamed.as_str())).unwrap_or_else(|| name.to_owned()),
            }
        };
        let mut tensors: BTreeMap<String, (String, ArrayD<f32>)> = BTreeMap::new();
        for (theirs, tensor) in self.tensors {
            let ours = rename(&theirs);
            if let Some((other, _)) = tensors.get(&ours) {
                return Err(Error::Usage(format!(
                    "tensors {other:?} and {theirs:?} are both the model's {ours:?}; leave one of them out"
                )));
            }
            tensors.insert(ours, (theirs, tensor));
        }
        Ok(Weights {
            tensors: tensors.into_iter().map(|(name, (_, tensor))| (name, tensor)).collect(),
            masks: self.masks.into_iter().map(|(name, mask)| (rename(&name), mask)).collect(),
            metadata: self.metadata,
        })
    }

    /// Checks that the tensors are exactly those of a network: `expected` names and shapes, no more and no less.
    ///
    /// # Errors
    /// [`Error::Usage`] lists every missing, unexpected and mis-shaped tensor, each unexpected one with the missing
    /// name that it resembles, if any.
    pub fn check_against(&self, expected: &[(String, Vec<usize>)]) -> Result<()> {
        let expected: BTreeMap<&str, &[usize]> = expected.iter().map(|(n, s)| (n.as_str(), s.as_slice())).collect();
        let missing: Vec<&str> = expected.keys().copied().filter(|&n| !self.tensors.contains_key(n)).collect();
        let mut problems: Vec<String> =
            missing.iter().map(|name| format!("missing     {name:?}, expected {:?}", expected[name])).collect();
        for (name, tensor) in &self.tensors {
            match expected.get(name.as_str()) {
                None => {
                    let hint = nearest(name, &missing).map_or(String::new(), |near| format!("; is it {near:?}?"));
                    problems.push(format!("unexpected  {name:?}, got {:?}{hint}", tensor.shape()));
                }
                Some(shape) if *shape != tensor.shape() => {
                    problems.push(format!("wrong shape {name:?}, expected {shape:?}, got {:?}", tensor.shape()));
                }
                Some(_) => {}
            }
        }
        if problems.is_empty() {
            return Ok(());
        }
        problems.extend(self.transformer_hint(&expected));
        Err(Error::Usage(format!(
            "the weights do not fit the model, which has {} tensors, in {} places; choose the --model they were made \
             with, rename them, or train with --partial, which draws the rest:\n  {}",
            expected.len(),
            problems.iter().filter(|problem| !problem.starts_with("hint")).count(),
            problems.join("\n  ")
        )))
    }
}

impl Weights {
    /// What to do where the class token or the positions of a vision transformer do not fit.
    fn transformer_hint(&self, expected: &BTreeMap<&str, &[usize]>) -> Option<String> {
        let tokens = [self.tensors.contains_key(CLASS_TOKEN), expected.contains_key(CLASS_TOKEN)];
        let hint = match tokens {
            [true, false] => "the weights have a class token, the model has none: --set class_token=true",
            [false, true] if expected.contains_key(POSITIONS) => {
                "the model has a class token, the weights have none: --set class_token=false"
            }
            _ => {
                let own = self.tensors.get(POSITIONS).map(|tensor| tensor.shape());
                let differs = own
                    .zip(expected.get(POSITIONS))
                    .is_some_and(|(own, expected)| own.len() == 3 && own[1] != expected[1] && own[2] == expected[2]);
                if !differs {
                    return None;
                }
                "the positions are of images of another size: --image-size, with the size that the model shall have, \
                 resamples them"
            }
        };
        Some(format!("hint: {hint}"))
    }
}

/// Whether a tensor of a file is the patch embedding, the class token or the positions of a vision transformer, which are
/// not pruned unless asked for.
pub fn is_embedding(name: &str) -> bool {
    let name = name.strip_prefix(PARALLEL).unwrap_or(name);
    name == CLASS_TOKEN || name == POSITIONS || name.starts_with("patch_embed.")
}

/// The candidate that `name` most resembles: itself behind a prefix, else at an edit distance of at most a quarter.
fn nearest<'a>(name: &str, candidates: &[&'a str]) -> Option<&'a str> {
    let behind_prefix = candidates.iter().find(|c| name.strip_suffix(**c).is_some_and(|prefix| prefix.ends_with('.')));
    let most = name.len() / 4;
    let close = || {
        let similar = candidates.iter().filter(|c| c.len().abs_diff(name.len()) <= most);
        let best = similar.map(|c| (edit_distance(name, c), c)).min()?;
        (best.0 <= most).then_some(best.1)
    };
    behind_prefix.or_else(close).copied()
}

/// Levenshtein distance in bytes.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// Whether a name matches a pattern, in which `*` stands for any characters and `?` for one.
pub fn glob(pattern: &str, name: &str) -> bool {
    // matches[i]: whether the pattern so far matches the first i characters.
    let name: Vec<char> = name.chars().collect();
    let mut matches = vec![false; name.len() + 1];
    matches[0] = true;
    for p in pattern.chars() {
        let before = matches.clone();
        matches[0] = p == '*' && before[0];
        for (i, &c) in name.iter().enumerate() {
            matches[i + 1] = if p == '*' { before[i + 1] || matches[i] } else { before[i] && (p == '?' || p == c) };
        }
    }
    matches[name.len()]
}

#[cfg(test)]
mod tests {
    use super::glob;

    #[test]
    fn patterns_match_whole_names() {
        assert!(glob("conv1.weight", "conv1.weight"));
        assert!(glob("*.conv?.weight", "layer1.0.conv2.weight"));
        assert!(glob("*", ""));
        assert!(!glob("conv1", "conv1.weight"));
        assert!(!glob("?", ""));
        assert!(!glob(&"*a".repeat(30), &"b".repeat(60)));
    }
}
