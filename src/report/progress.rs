//! Progress on stderr: a bar for each stage on a terminal, one below the other where stages run side by side; elsewhere a
//! line for each stage when it ends.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::profile::{Range, range};

/// How much is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verbosity {
    /// Errors alone.
    Quiet,
    /// Progress.
    Normal,
    /// Progress, and details.
    Verbose,
}

/// Shows how far a long job is.
pub struct Progress {
    verbosity: Verbosity,
    bars: MultiProgress,
    stages: AtomicUsize,
    begun: Instant,
}

/// The progress of one stage.
pub struct Stage {
    bar: ProgressBar,
    name: String,
    unit: &'static str,
    number: usize,
    total: usize,
    begun: Instant,
    job_begun: Instant,
    lines: bool,
    _range: Range,
}

impl Progress {
    /// Shows progress as `verbosity` says.
    pub fn new(verbosity: Verbosity) -> Self {
        Progress { verbosity, bars: MultiProgress::new(), stages: AtomicUsize::new(0), begun: Instant::now() }
    }

    /// A stage of `total` steps begins.
    pub fn stage(&self, name: &str, total: usize) -> Stage {
        self.begin(name, total, "steps")
    }

    /// A stage that goes through `total` images begins.
    pub fn images(&self, name: &str, total: usize) -> Stage {
        self.begin(name, total, "images")
    }

    /// A stage that measures `total` layers begins.
    pub fn layers(&self, name: &str, total: usize) -> Stage {
        self.begin(name, total, "layers")
    }

    /// A stage that compares `total` pairs begins.
    pub fn pairs(&self, name: &str, total: usize) -> Stage {
        self.begin(name, total, "pairs")
    }

    fn begin(&self, name: &str, total: usize, unit: &'static str) -> Stage {
        let number = self.stages.fetch_add(1, Ordering::Relaxed) + 1;
        let shown = self.verbosity > Verbosity::Quiet;
        let terminal = std::io::stderr().is_terminal();
        let bar = match shown && terminal {
            true => self.bars.add(ProgressBar::new(total as u64)),
            false => ProgressBar::hidden(),
        };
        let template = format!("{{elapsed_precise}} {{bar:24}} {{pos:>5}}/{{len}} {unit}  {{eta}} left  {{wide_msg}}");
        bar.set_style(ProgressStyle::with_template(&template).expect("a constant template").progress_chars("=> "));
        bar.set_message(name.to_owned());
        Stage {
            bar,
            name: name.into(),
            unit,
            number,
            total,
            begun: Instant::now(),
            job_begun: self.begun,
            lines: shown && !terminal,
            _range: range(name),
        }
    }

    /// A message that is no error, for those who want progress.
    pub fn say(&self, message: &str) {
        if self.verbosity > Verbosity::Quiet {
            self.write(message);
        }
    }

    /// A message that everybody must see: what was asked for is not quite what is done.
    pub fn warn(&self, message: &str) {
        self.write(&format!("warning: {message}"));
    }

    /// Writes a line between bars.
    fn write(&self, line: &str) {
        // Not eprintln!, which panics when nobody can read it.
        self.bars.suspend(|| {
            let _ = writeln!(std::io::stderr(), "{line}");
        });
    }
}

impl Stage {
    /// `done` steps are done; the last had this loss.
    pub fn show(&self, done: usize, loss: f32) {
        self.bar.set_message(format!("{}  loss {loss:.4}", self.name));
        self.advance(done, &format!(", loss {loss:.4}"));
    }

    /// So many are done.
    pub fn show_count(&self, done: usize) {
        self.advance(done, "");
    }

    fn advance(&self, done: usize, note: &str) {
        self.bar.set_position(done as u64);
        if done == self.total {
            self.bar.finish_and_clear();
            if self.lines {
                let (job, stage) = (self.job_begun.elapsed().as_secs_f64(), self.begun.elapsed().as_secs_f64());
                let (number, name, unit) = (self.number, &self.name, self.unit);
                let line = format!("{job:7.1} s  {number:3}  {name}: {done} {unit} in {stage:.1} s{note}");
                let _ = writeln!(std::io::stderr(), "{line}");
            }
        }
    }
}
