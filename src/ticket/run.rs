//! The run folder: the only place that knows its file names.
//!
//! ```text
//! RUNS/<experiment>-<hash>/
//!   lock            held while a process works here
//!   config.json     everything that the hash is of
//!   machine.json    what the run's bits depend on beside that: version, device, instruction set
//!   result.json     the result, once everything is done
//!   report.html     the page that shows it
//!   seed_<s>/search/<stage>/     trainings that masks come from
//!   seed_<s>/tickets/<ticket>/   ticket.safetensors, weights.safetensors, metrics.csv, score.json
//!   seed_<s>/similarity/         similarity.json; until that is there, pairs.jsonl
//! ```
//!
//! Files appear by atomic rename. A stage begins with "if its output exists, it is done", so a run that was killed at
//! any moment goes on where it was.

use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::nn::atomic::{sweep, write_atomically};
use crate::nn::weights::Weights;

/// A run folder, locked for this process.
pub struct RunFolder {
    path: PathBuf,
    /// Unlocked when dropped, also when the process is killed.
    _lock: File,
}

/// The folder of one training.
pub struct StageFolder {
    path: PathBuf,
    relative: String,
}

impl RunFolder {
    /// Opens, or makes, the folder of an experiment under `runs`. The name is made of the experiment and a hash of its
    /// settings, so that equal settings meet again.
    ///
    /// # Errors
    /// [`Error::Run`] if another process works in it, or it was begun with another device, instruction set or version
    /// and `allow_device_change` is not set; [`Error::File`] if it cannot be written.
    pub fn open(
        runs: &Path,
        experiment: &str,
        config: &impl Serialize,
        machine: &Value,
        allow_device_change: bool,
    ) -> Result<Self> {
        let config = to_json(config)?;
        let hash = Sha256::digest(config.as_bytes());
        let hash: String = hash.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
        let path = runs.join(format!("{experiment}-{hash}"));
        make_folder(&path)?;
        let lock = lock(&path)?;
        remove_temporaries(&path);
        let folder = RunFolder { path, _lock: lock };
        folder.write_text("config.json", &config)?;
        folder.check_machine(machine, allow_device_change)?;
        Ok(folder)
    }

    /// Opens the folder of a run that was begun before.
    ///
    /// # Errors
    /// [`Error::File`] if it is no run folder; [`Error::Run`] if another process works in it.
    pub fn existing(path: &Path) -> Result<Self> {
        if !path.join("config.json").is_file() {
            let problem = "no run folder: it has no config.json; expected a folder that `dilt find`, `dilt transfer` or \
                           `dilt assemble` printed";
            return Err(Error::file(path, problem));
        }
        let lock = lock(path)?;
        Ok(RunFolder { path: path.into(), _lock: lock })
    }

    fn check_machine(&self, machine: &Value, allow_change: bool) -> Result<()> {
        if self.path.join("result.json").exists() {
            return Ok(()); // Nothing will be computed.
        }
        let path = self.path.join("machine.json");
        match read_json::<Value>(&path)? {
            Some(before) if before != *machine && !allow_change => Err(Error::Run(format!(
                "{}: this run was begun with {before}, now there is {machine}, which gives other bits; run it there, \
                 choose another --runs folder, or go on with --allow-device-change",
                self.path.display()
            ))),
            Some(before) if before == *machine => Ok(()),
            changed => {
                if changed.is_some() {
                    let warning =
                        format!("warning: the run goes on with {machine}: its bits are those of no single machine");
                    let _ = writeln!(std::io::stderr(), "{warning}");
                }
                self.write_text("machine.json", &to_json(machine)?)
            }
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The result, if the run is finished.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read.
    pub fn result<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        read_json(&self.path.join("result.json"))
    }

    /// Writes the result: the run is finished.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written.
    pub fn finish(&self, result: &impl Serialize) -> Result<()> {
        self.write_text("result.json", &to_json(result)?)
    }

    /// The settings of the run, as JSON.
    ///
    /// # Errors
    /// [`Error::File`] if they cannot be read.
    pub fn settings(&self) -> Result<Value> {
        Ok(read_json(&self.path.join("config.json"))?.unwrap_or_default())
    }

    /// The page that shows the result.
    pub fn report(&self) -> PathBuf {
        self.path.join("report.html")
    }

    /// Writes that page.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written.
    pub fn write_report(&self, html: &str) -> Result<()> {
        write_text(&self.report(), html)
    }

    /// The folder of a training that masks come from.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be made.
    pub fn search(&self, seed: u64, stage: &str) -> Result<StageFolder> {
        self.stage(format!("seed_{seed}/search/{stage}"))
    }

    /// The folder of a ticket.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be made.
    pub fn ticket(&self, seed: u64, name: &str) -> Result<StageFolder> {
        self.stage(format!("seed_{seed}/tickets/{name}"))
    }

    /// The folder of the comparison of a repetition's tickets.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be made.
    pub fn similarity(&self, seed: u64) -> Result<StageFolder> {
        self.stage(format!("seed_{seed}/similarity"))
    }

    fn stage(&self, relative: String) -> Result<StageFolder> {
        let path = self.path.join(&relative);
        make_folder(&path)?;
        Ok(StageFolder { path, relative })
    }

    fn write_text(&self, name: &str, text: &str) -> Result<()> {
        write_text(&self.path.join(name), text)
    }
}

/// The folder of one training that belongs to no run, locked for this process.
pub struct TrainingFolder {
    files: StageFolder,
    _lock: File,
}

impl TrainingFolder {
    /// Opens, or makes, the folder.
    ///
    /// # Errors
    /// [`Error::Run`] if another process works in it; [`Error::File`] if it cannot be written.
    pub fn open(path: &Path) -> Result<Self> {
        make_folder(path)?;
        let lock = lock(path)?;
        sweep(path);
        Ok(TrainingFolder { files: StageFolder { path: path.into(), relative: "train".into() }, _lock: lock })
    }

    /// Its files.
    pub fn files(&self) -> &StageFolder {
        &self.files
    }

    /// What the weights here are of.
    fn record(&self) -> PathBuf {
        self.files.path.join("training.json")
    }

    /// The weights of the training that has ended here, if one has: of everything that their bits depend on.
    ///
    /// # Errors
    /// [`Error::File`] if they are of another training, or cannot be read.
    pub fn finished(&self, training: &Value) -> Result<Option<Weights>> {
        let weights = self.files.weights();
        if !weights.exists() || self.files.checkpoint().exists() {
            return Ok(None);
        }
        let expected = to_json(training)?;
        if std::fs::read_to_string(self.record()).is_ok_and(|text| text == expected) {
            return Weights::load(&weights).map(Some);
        }
        let problem = "the weights are of a training with other settings, data, start or device; choose another folder, or \
                       remove them";
        Err(Error::file(weights, problem))
    }

    /// Writes the weights of a training that has ended, and what they are of.
    ///
    /// # Errors
    /// [`Error::File`] if they cannot be written.
    pub fn finish(&self, weights: &Weights, training: &Value) -> Result<()> {
        write_text(&self.record(), &to_json(training)?)?;
        weights.save(&self.files.weights())?;
        remove_quietly(self.files.checkpoint());
        Ok(())
    }
}

impl StageFolder {
    /// Name of the stage, relative to the run.
    pub fn name(&self) -> &str {
        &self.relative
    }

    /// The trained weights.
    pub fn weights(&self) -> PathBuf {
        self.path.join("weights.safetensors")
    }

    /// The ticket: weights to start from, and masks.
    pub fn ticket(&self) -> PathBuf {
        self.path.join("ticket.safetensors")
    }

    /// The state of a training that was not finished.
    pub fn checkpoint(&self) -> PathBuf {
        self.path.join("checkpoint.safetensors")
    }

    /// One row per step.
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.csv")
    }

    /// A file of this folder, relative to the run.
    pub fn relative(&self, path: &Path) -> String {
        format!("{}/{}", self.relative, path.file_name().unwrap_or_default().to_string_lossy())
    }

    /// Pairs of layers that are compared already.
    pub fn pairs(&self) -> PathBuf {
        self.path.join("pairs.jsonl")
    }

    /// How similar layers are, if they were compared.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read.
    pub fn similarity<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        read_json(&self.path.join("similarity.json"))
    }

    /// Writes how similar layers are, and forgets the single pairs.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written.
    pub fn write_similarity(&self, similarity: &impl Serialize) -> Result<()> {
        write_text(&self.path.join("similarity.json"), &to_json(similarity)?)?;
        remove_quietly(self.pairs());
        Ok(())
    }

    /// How the ticket did, if it was evaluated.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read.
    pub fn score<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        read_json(&self.path.join("score.json"))
    }

    /// Writes how the ticket did.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written.
    pub fn write_score(&self, score: &impl Serialize) -> Result<()> {
        write_text(&self.path.join("score.json"), &to_json(score)?)
    }
}

fn to_json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string_pretty(value).map_err(|error| Error::Run(format!("cannot be written as JSON: {error}")))
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::file(path, format!("cannot be read: {error}"))),
    };
    let damaged = |error| Error::file(path, format!("damaged: {error}; remove it and run the command again"));
    serde_json::from_str(&text).map(Some).map_err(damaged)
}

fn write_text(path: &Path, text: &str) -> Result<()> {
    if std::fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    write_atomically(path, |file| file.write_all(text.as_bytes()))
}

fn cannot_write(path: &Path, error: &std::io::Error) -> Error {
    Error::file(path, format!("cannot be written: {error}; choose another folder"))
}

fn make_folder(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|error| cannot_write(path, &error))
}

/// Takes the lock of a folder; the system gives it back when the process ends, also when it is killed.
fn lock(folder: &Path) -> Result<File> {
    let path = folder.join("lock");
    let lock = File::create(&path).map_err(|error| cannot_write(&path, &error))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(Error::Run(format!(
            "{}: another process works on this run; wait for it, or stop it and run this command again",
            folder.display()
        ))),
        Err(TryLockError::Error(error)) => Err(cannot_write(&path, &error)),
    }
}

/// Removes what a killed process was writing, in folders within too. The lock is held, so nobody else is.
fn remove_temporaries(folder: &Path) {
    sweep(folder);
    entries(folder).filter(|path| path.is_dir() && !path.is_symlink()).for_each(|path| remove_temporaries(&path));
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// A temporary file that cannot be removed does no harm.
fn remove_quietly(path: PathBuf) {
    let _ = std::fs::remove_file(path);
}
