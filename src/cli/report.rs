//! `dilt report`: the page of a run.

use std::path::PathBuf;

use clap::Args;
use dilt::ticket::report::write;
use dilt::ticket::result::Outcome;
use dilt::ticket::run::RunFolder;
use serde::Serialize;

use super::Common;

/// Write the HTML page of a finished run, RUN/report.html, again, and say where it is.
#[derive(Args)]
pub struct Report {
    /// A run folder.
    #[arg(value_name = "RUN")]
    run: PathBuf,
    #[command(flatten)]
    common: Common,
}

#[derive(Serialize)]
struct Written {
    report: String,
}

impl Report {
    pub fn run(&self) -> anyhow::Result<()> {
        let folder = RunFolder::existing(&self.run)?;
        let Some(outcome) = folder.result::<Outcome>()? else {
            let run = self.run.display();
            let problem =
                format!("{run}: the run is not finished; give the command that began it again, then this one");
            return Err(dilt::Error::Run(problem).into());
        };
        let report = write(&folder, &outcome)?.to_string_lossy().into_owned();
        self.common.print(&Written { report }, |written| written.report.clone())
    }
}
