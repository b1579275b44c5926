//! Pairs that are finished, kept in a file, so that a comparison that was stopped goes on where it was.
//!
//! A line for each pair: `{"key": ..., "value": ..., "found_by": ...}`, appended when it is finished; the key is a hash of
//! both distance matrices and of how the pair is solved. What a kill left of a last line is cut off.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use ndarray::ArrayView2;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::gw::Options;
use crate::error::{Error, Result};

/// A file of finished pairs, locked for this process.
pub struct PairStore {
    path: PathBuf,
    file: File,
    known: BTreeMap<String, Finished>,
}

/// What was found for a pair.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Finished {
    /// Its Gromov-Wasserstein value.
    pub value: f64,
    /// Where it was found.
    pub found_by: String,
}

#[derive(Deserialize, Serialize)]
struct Line {
    key: String,
    #[serde(flatten)]
    finished: Finished,
}

impl PairStore {
    /// Opens, or makes, a file of pairs.
    ///
    /// # Errors
    /// [`Error::Run`] if another process works with it; [`Error::File`] if it cannot be read or written, or is damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let cannot =
            |error: std::io::Error| Error::file(path, format!("cannot be used: {error}; choose another folder"));
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(cannot)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Run(format!(
                    "{}: another process works with it; wait for it, or stop it and run this command again",
                    path.display()
                )));
            }
            Err(TryLockError::Error(error)) => return Err(cannot(error)),
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(cannot)?;
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        if whole < bytes.len() {
            file.set_len(whole as u64).map_err(cannot)?;
        }
        let mut known = BTreeMap::new();
        for (number, line) in bytes[..whole].split(|&byte| byte == b'\n').enumerate().filter(|(_, l)| !l.is_empty()) {
            let Line { key, finished } = serde_json::from_slice(line).map_err(|error| {
                Error::file(path, format!("line {}: damaged: {error}; remove the file to begin anew", number + 1))
            })?;
            known.insert(key, finished);
        }
        Ok(PairStore { path: path.into(), file, known })
    }

    /// What was found for a pair, if it was finished.
    pub fn get(&self, key: &str) -> Option<&Finished> {
        self.known.get(key)
    }

    /// Keeps a pair.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written.
    pub fn put(&mut self, key: &str, finished: Finished) -> Result<()> {
        let cannot = |error: &dyn std::fmt::Display| {
            Error::file(&self.path, format!("cannot be written: {error}; free some space and run this command again"))
        };
        let line = Line { key: key.into(), finished };
        let text = serde_json::to_string(&line).map_err(|error| cannot(&error))? + "\n";
        // One write: a kill leaves the line, a part of it, or nothing.
        self.file.write_all(text.as_bytes()).map_err(|error| cannot(&error))?;
        self.known.insert(line.key, line.finished);
        Ok(())
    }
}

/// A hash of a layer's distances.
pub fn layer_hash(distances: ArrayView2<f32>) -> String {
    let mut hash = Sha256::new();
    hash.update((distances.nrows() as u64).to_le_bytes());
    distances.iter().for_each(|distance| hash.update(distance.to_le_bytes()));
    hex(hash)
}

/// The key of a pair of layers with these hashes, solved so.
pub fn pair_key(layers: [&str; 2], options: &Options) -> String {
    let Options { epsilon, steps, iterations, refine_up_to, memory: _ } = options;
    let version = env!("CARGO_PKG_VERSION");
    let mut hash = Sha256::new();
    hash.update(format!("{layers:?} {epsilon} {steps} {iterations} {refine_up_to} {version}"));
    hex(hash)
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finished(value: f64) -> Finished {
        Finished { value, found_by: "product".into() }
    }

    #[test]
    fn what_a_kill_left_of_a_line_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pairs.jsonl");
        let mut store = PairStore::open(&path).unwrap();
        store.put("a", finished(0.1 + 0.2)).unwrap();
        store.put("b", finished(1e-300)).unwrap();
        drop(store);
        let whole = std::fs::read(&path).unwrap();
        for end in 0..=whole.len() {
            std::fs::write(&path, &whole[..end]).unwrap();
            let mut store = PairStore::open(&path).unwrap();
            assert!(store.get("a").is_none_or(|pair| *pair == finished(0.1 + 0.2)), "{end}");
            for (key, value) in [("a", 0.1 + 0.2), ("b", 1e-300)] {
                if store.get(key).is_none() {
                    store.put(key, finished(value)).unwrap();
                }
            }
            drop(store);
            assert_eq!(std::fs::read(&path).unwrap(), whole, "cut at {end}");
        }
    }

    #[test]
    fn damage_is_named_and_a_second_process_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pairs.jsonl");
        let store = PairStore::open(&path).unwrap();
        let error = PairStore::open(&path).err().unwrap().to_string();
        assert!(error.contains("another process"), "{error}");
        drop(store);
        std::fs::write(&path, "{\"key\":\"a\",\"value\":1.0,\"found_by\":\"x\"}\nnonsense\n").unwrap();
        let error = PairStore::open(&path).err().unwrap().to_string();
        assert!(error.contains("line 2") && error.contains("remove"), "{error}");
    }
}
