//! `dilt doctor`: what this machine and this binary have, and whether every kernel computes what it should.

use std::path::{Path, PathBuf};

use clap::Args;
use dilt::Error;
use dilt::device::{self, Device, Precision};
use dilt::nn::roofline::Ceilings;
use dilt::report::table::table;
use dilt::selftest::{self, Outcome};
use serde::Serialize;

use super::Common;

/// Look at this machine: driver, GPUs, embedded kernels, what it multiplies and copies at best, and a self-test of every
/// kernel.
///
/// The self-test runs each kernel on --device, with small random inputs drawn from --seed, and compares with the same
/// operation in another form. Exits with 1 if a kernel fails.
#[derive(Args)]
pub struct Doctor {
    /// Also write the embedded GPU machine code: DIR/<kernel file>.fatbin.
    #[arg(long, value_name = "DIR")]
    dump: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

#[derive(Serialize)]
struct Report {
    rows: Vec<Row>,
    #[serde(skip)]
    kernels: Vec<Outcome>,
}

#[derive(Serialize)]
struct Row {
    check: String,
    value: String,
    ok: bool,
}

impl Doctor {
    pub fn run(&self) -> anyhow::Result<()> {
        if let Some(folder) = &self.dump {
            dump(folder)?;
        }
        let device = self.common.open()?;
        let mut rows = facts(&device)?;
        let kernels = selftest::run(&device, self.common.seed)?;
        rows.extend(kernels.iter().map(row));
        let report = Report { rows, kernels };
        self.common.print(&report, text)?;
        Ok(verdict(&device, &report.kernels)?)
    }
}

/// What there is, before anything runs on it.
fn facts(device: &Device) -> dilt::Result<Vec<Row>> {
    let host = Device::open("host")?.description();
    let mut rows =
        vec![("device under test".to_owned(), device.description()), ("driver".into(), Device::cuda_status())];
    for (index, gpu) in Device::gpus()?.into_iter().enumerate() {
        let (major, minor) = gpu.capability;
        let memory = gpu.memory_bytes as f64 / f64::from(1 << 30);
        let value = format!("{}, compute capability {major}.{minor}, {memory:.1} GiB", gpu.name);
        rows.push((format!("cuda:{index}"), value));
    }
    let sets = device::host_instruction_sets().join(", ");
    let chosen = host.strip_prefix("host ").unwrap_or(&host);
    rows.push(("host instruction set".into(), format!("{chosen} (compiled for {sets})")));
    rows.push(("host threads".into(), device::host_threads().to_string()));
    for precision in Precision::ALL {
        // The self-test follows, and says more of a device that fails.
        let value = match Ceilings::measure(device, precision) {
            Ok(ceilings) => ceilings.to_string(),
            Err(error) => format!("none: {error}"),
        };
        rows.push((format!("measured ceilings, {}", precision.name()), value));
    }
    let archs: Vec<_> = device::embedded_archs().iter().map(|arch| format!("sm_{arch}")).collect();
    for (stem, image) in device::embedded_images() {
        rows.push((format!("kernels/{stem}.cu"), format!("{}, {} bytes", archs.join(", "), image.len())));
    }
    if archs.is_empty() {
        rows.push(("GPU code".into(), "none: built without nvcc".into()));
    }
    Ok(rows.into_iter().map(|(check, value)| Row { check, value, ok: true }).collect())
}

fn row(outcome: &Outcome) -> Row {
    let value = match &outcome.problem {
        Some(problem) => format!("FAILED: {problem}"),
        None => format!("ok, error {:.1e}, {} ms", outcome.error, milliseconds(outcome)),
    };
    Row { check: outcome.kernel.into(), value, ok: outcome.problem.is_none() }
}

fn milliseconds(outcome: &Outcome) -> String {
    outcome.ms.map_or("-".into(), |ms| format!("{ms:.3}"))
}

fn text(report: &Report) -> String {
    let facts = &report.rows[..report.rows.len() - report.kernels.len()];
    let width = facts.iter().map(|row| row.check.len()).max().unwrap_or(0);
    let facts = facts.iter().map(|row| format!(" {:width$}  {}\n", row.check, row.value));
    let kernels = report.kernels.iter().map(|outcome| {
        let state = if outcome.problem.is_none() { "ok" } else { "FAILED" };
        vec![outcome.kernel.into(), state.into(), format!("{:.1e}", outcome.error), milliseconds(outcome)]
    });
    let kernels = table(&["kernel", "self-test", "largest error", "ms"], kernels);
    format!("{}\n{kernels}", facts.collect::<String>())
}

/// The failures, as the error that ends the command.
fn verdict(device: &Device, kernels: &[Outcome]) -> dilt::Result<()> {
    let line = |outcome: &Outcome| outcome.problem.as_ref().map(|problem| format!("\n  {}: {problem}", outcome.kernel));
    let failures: Vec<_> = kernels.iter().filter_map(line).collect();
    if failures.is_empty() {
        return Ok(());
    }
    let (failed, all, device) = (failures.len(), kernels.len(), device.description());
    Err(Error::Run(format!("{failed} of {all} kernels fail their self-test on {device}:{}", failures.concat())))
}

fn dump(folder: &Path) -> dilt::Result<()> {
    if device::embedded_images().next().is_none() {
        let why = "--dump: this binary was built without nvcc: it holds no GPU code";
        return Err(Error::Usage(why.into()));
    }
    std::fs::create_dir_all(folder).map_err(|error| Error::file(folder, format!("cannot be made: {error}")))?;
    for (stem, image) in device::embedded_images() {
        let path = folder.join(format!("{stem}.fatbin"));
        std::fs::write(&path, image).map_err(|error| Error::file(&path, format!("cannot be written: {error}")))?;
    }
    Ok(())
}
