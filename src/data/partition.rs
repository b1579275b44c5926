//! Partition of a data set into K parts, on each of which a ticket is found (DiLT, arXiv 2508.16915).
//!
//! Parts by class have a head each, with an output for each of the part's own classes only, so labels are re-based;
//! random parts keep all classes. The same [`Partition`] splits training and test examples.

use std::path::Path;

use super::permutation;
use crate::{Error, Result};

/// Longest file of parts that is read, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// How examples are divided into parts.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Partition {
    /// Contiguous ranges of classes, as equal as possible, the first ones larger.
    Classes {
        /// Number of parts, at least 2, with at least two classes each.
        parts: usize,
    },
    /// Disjoint random sets of examples, as equal as possible, the first ones larger; labels play no role.
    Random {
        /// Number of parts, at least 2.
        parts: usize,
        /// Chooses the sets; for examples of another number the sets are unrelated.
        seed: u64,
    },
    /// Classes grouped by hand. A class in no group is left out: its examples are in no part.
    File {
        /// Labels of each part, at least two, in the order of its head's outputs.
        groups: Vec<Vec<u32>>,
    },
}

/// One part of the examples.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// `part-1`, `part-2`, ...
    pub name: String,
    /// Indices of the part's examples, ascending.
    pub examples: Vec<u32>,
    /// Original label of each output of the part's head.
    pub classes: Vec<u32>,
}

impl Part {
    /// The output of the part's head that stands for an original label; none if the label is of another part.
    pub fn relabel(&self, label: u32) -> Option<u32> {
        self.classes.iter().position(|&class| class == label).map(|i| i as u32)
    }
}

impl Partition {
    /// Understands `--partition`: `classes`, `random`, or `file=F`, with `--parts` and a seed for `random`.
    ///
    /// The file has a line for each part: its labels, separated by spaces or commas. What follows a `#` is a comment;
    /// lines without labels are skipped.
    ///
    /// # Errors
    /// [`Error::Usage`]: another text, fewer than two parts, a file that cannot be read or understood or has another
    /// number of parts than `parts`. What depends on the data set is checked by [`split`](Self::split).
    pub fn parse(text: &str, parts: usize, seed: u64) -> Result<Self> {
        let partition = match text.split_once('=') {
            None if text == "classes" => Partition::Classes { parts },
            None if text == "random" => Partition::Random { parts, seed },
            Some(("file", file)) => Partition::File { groups: read_groups(file, parts)? },
            _ => return usage(format!("--partition {text:?}: expected classes, random or file=FILE")),
        };
        partition.check_parts()?;
        Ok(partition)
    }

    /// Number of parts.
    pub fn parts(&self) -> usize {
        match self {
            Partition::Classes { parts } | Partition::Random { parts, .. } => *parts,
            Partition::File { groups } => groups.len(),
        }
    }

    /// Divides the examples with these labels, each below `classes`, into parts. Depends on nothing else.
    ///
    /// # Errors
    /// [`Error::Usage`]: fewer than two parts, a part without examples, a part by class with fewer than two classes
    /// (so more than `classes / 2` parts), a label in two parts, a label that is not below `classes`.
    pub fn split(&self, labels: &[u32], classes: usize) -> Result<Vec<Part>> {
        self.check_parts()?;
        if let Some(i) = labels.iter().position(|&label| label as usize >= classes) {
            return usage(format!("example {i} has label {}: expected a label below {classes}", labels[i]));
        }
        let Ok(examples) = u32::try_from(labels.len()) else {
            return usage(format!("{} examples: a partition takes at most {}", labels.len(), u32::MAX));
        };
        let parts = match self {
            Partition::Random { parts, seed } => random_parts(*parts, *seed, examples, classes)?,
            Partition::Classes { parts } if *parts > classes / 2 => {
                return usage(format!(
                    "{parts} parts by class of {classes} classes: each part needs at least two classes; expected --parts of \
                     at most {}, or --partition random",
                    classes / 2
                ));
            }
            Partition::Classes { parts } => {
                let labels_of = |range: std::ops::Range<usize>| range.map(|label| label as u32).collect();
                class_parts(&even_ranges(classes, *parts).map(labels_of).collect::<Vec<_>>(), labels, classes)?
            }
            Partition::File { groups } => class_parts(groups, labels, classes)?,
        };
        match parts.iter().find(|part| part.examples.is_empty()) {
            Some(part) => usage(format!(
                "{} has no examples (its labels: {:?}); use fewer parts, other labels or more data",
                part.name, part.classes
            )),
            None => Ok(parts),
        }
    }

    fn check_parts(&self) -> Result<()> {
        match self.parts() {
            0 | 1 => usage(format!("a partition into {} parts: expected at least 2; see --parts", self.parts())),
            _ => Ok(()),
        }
    }
}

fn usage<T>(message: String) -> Result<T> {
    Err(Error::Usage(message))
}

fn name(part: usize) -> String {
    format!("part-{}", part + 1)
}

/// `0..n` in `parts` contiguous ranges whose sizes differ by at most one, the larger first.
fn even_ranges(n: usize, parts: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let start = move |part: usize| part * (n / parts) + part.min(n % parts);
    (0..parts).map(move |part| start(part)..start(part + 1))
}

fn random_parts(parts: usize, seed: u64, examples: u32, classes: usize) -> Result<Vec<Part>> {
    if parts > examples as usize {
        return usage(format!("{parts} random parts of {examples} examples: some would be empty; use fewer --parts"));
    }
    let order = permutation(examples, seed, 0);
    let part = |(i, range): (usize, std::ops::Range<usize>)| {
        let mut examples = order[range].to_vec();
        examples.sort_unstable();
        Part { name: name(i), examples, classes: (0..classes as u32).collect() }
    };
    Ok(even_ranges(order.len(), parts).enumerate().map(part).collect())
}

fn class_parts(groups: &[Vec<u32>], labels: &[u32], classes: usize) -> Result<Vec<Part>> {
    let mut part_of: Vec<Option<usize>> = vec![None; classes];
    for (part, group) in groups.iter().enumerate() {
        if group.len() < 2 {
            return usage(format!("{} has {} classes: expected at least two to tell apart", name(part), group.len()));
        }
        for &label in group {
            let Some(owner) = part_of.get_mut(label as usize) else {
                return usage(format!("{} has label {label}: expected labels below {classes}", name(part)));
            };
            if let Some(first) = owner.replace(part) {
                return usage(format!("label {label} is in {} and in {}: expected it once", name(first), name(part)));
            }
        }
    }
    let new_part = |(i, group): (usize, &Vec<u32>)| Part { name: name(i), examples: vec![], classes: group.clone() };
    let mut parts: Vec<Part> = groups.iter().enumerate().map(new_part).collect();
    for (i, &label) in labels.iter().enumerate() {
        if let Some(part) = part_of[label as usize] {
            parts[part].examples.push(i as u32);
        }
    }
    Ok(parts)
}

/// Reads a file of `parts` groups of labels.
fn read_groups(file: &str, parts: usize) -> Result<Vec<Vec<u32>>> {
    let wrong = |problem: String| usage(format!("--partition file={file}: {problem}"));
    match std::fs::metadata(Path::new(file)) {
        Err(e) => return wrong(format!("cannot read it: {e}")),
        Ok(about) if !about.is_file() => return wrong("expected a file, got a folder or device".into()),
        Ok(about) if about.len() > MAX_FILE_BYTES => {
            return wrong(format!("expected at most {MAX_FILE_BYTES} bytes, got {}", about.len()));
        }
        Ok(_) => {}
    }
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(e) => return wrong(format!("cannot read it as text: {e}")),
    };
    let mut groups = Vec::new();
    for (line, content) in text.lines().enumerate() {
        let content = content.split('#').next().unwrap_or_default();
        let mut group = Vec::new();
        for word in content.split([' ', '\t', '\r', ',']).filter(|word| !word.is_empty()) {
            match word.parse() {
                Ok(label) => group.push(label),
                Err(_) => {
                    return wrong(format!("line {}: expected labels (whole numbers from 0), got {word:?}", line + 1));
                }
            }
        }
        if !group.is_empty() {
            groups.push(group);
        }
    }
    if groups.len() != parts {
        return wrong(format!("expected {parts} parts, a line of labels each, got {}; see --parts", groups.len()));
    }
    Ok(groups)
}
