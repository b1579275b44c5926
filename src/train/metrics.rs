//! `metrics.csv`: one row per step.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::run::Chunk;
use crate::error::{Error, Result};

const HEADER: &str = "step,epoch,loss,lr,top1\n";

/// An open `metrics.csv`.
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens the file and keeps the rows of the first `steps` steps: what was written after a checkpoint goes, since
    /// those steps will be done again.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read or written, or lacks rows that the checkpoint needs.
    pub fn resume(path: &Path, steps: usize) -> Result<Self> {
        let cannot = |error: std::io::Error| Error::file(path, format!("the metrics cannot be written: {error}"));
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(cannot)?;
        let mut reader = BufReader::new(&file);
        let (mut keep, mut rows, mut line) = (0, 0, String::new());
        while rows <= steps && reader.read_line(&mut line).map_err(cannot)? > 0 && line.ends_with('\n') {
            keep += line.len() as u64;
            rows += 1;
            line.clear();
        }
        if steps > 0 && rows <= steps {
            let found = rows.saturating_sub(1);
            return Err(Error::file(
                path,
                format!(
                    "expected the rows of {steps} steps, found {found}; remove the checkpoint beside it to begin anew"
                ),
            ));
        }
        if steps == 0 {
            file.set_len(0).and_then(|()| file.rewind()).map_err(cannot)?;
            file.write_all(HEADER.as_bytes()).map_err(cannot)?;
            keep = HEADER.len() as u64;
        }
        file.set_len(keep).map_err(cannot)?;
        file.seek(SeekFrom::Start(keep)).map_err(cannot)?;
        Ok(MetricsFile { path: path.to_path_buf(), file })
    }

    /// Adds the rows of a chunk.
    ///
    /// # Errors
    /// [`Error::File`] if they cannot be written.
    pub fn append(&mut self, chunk: &Chunk) -> Result<()> {
        let mut rows = String::new();
        for (row, loss) in chunk.loss.iter().enumerate() {
            let top1 = f64::from(chunk.top1[row]) / f64::from(chunk.count[row]);
            let (step, rate) = (chunk.first_step + row, chunk.rate[row]);
            rows.push_str(&format!("{step},{},{loss},{rate},{top1}\n", chunk.epoch));
        }
        let written = self.file.write_all(rows.as_bytes()).and_then(|()| self.file.sync_data());
        written.map_err(|error| Error::file(&self.path, format!("the metrics cannot be written: {error}")))
    }
}
