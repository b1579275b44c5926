//! `dilt bench --op`: one operation by itself, for its time or for a profiler of kernels.

use anyhow::Context;
use dilt::Error;
use dilt::device::{Buffer, Device, Precision, RealBuffer};
use dilt::nn::roofline::Ceilings;
use dilt::nn::traffic::Work;
use dilt::report::table::table;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::operations::OPS;
use super::share;

/// Written between two runs, so that none finds its tensors in a cache: more than the last-level caches of today's GPUs
/// (126 MB) and of most CPUs.
const FLUSH_BYTES: usize = 256 << 20;
/// Random numbers that are drawn and copied at once.
const CHUNK: usize = 1 << 20;
/// A size may have this many at most: the product of three is still a number.
const LARGEST: usize = 1 << 20;
/// As many as selection can count.
const MOST_ELEMENTS: usize = u32::MAX as usize;

/// An operation, the sizes that it takes with what they are if they are not given, what it has to compute and to move, and
/// what prepares and times it.
pub(super) struct Op {
    pub(super) name: &'static str,
    pub(super) sizes: &'static [(&'static str, usize)],
    pub(super) work: fn(&Device, Precision, &Sizes) -> dilt::Result<Work>,
    pub(super) time: fn(&mut Timer, &Sizes) -> dilt::Result<()>,
}

/// The sizes of an operation, in the order of [`Op::sizes`].
pub(super) struct Sizes(Vec<(&'static str, usize)>);

impl Sizes {
    /// Those given as `key=value,key=value`, and the operation's own for the others.
    fn parse(op: &Op, given: &[String]) -> dilt::Result<Self> {
        let mut sizes = op.sizes.to_vec();
        for size in given {
            let (key, value) = size.split_once('=').unwrap_or((size.as_str(), ""));
            let Some(known) = sizes.iter_mut().find(|(known, _)| *known == key) else {
                let keys: Vec<&str> = op.sizes.iter().map(|(key, _)| *key).collect();
                let message = format!("--shape of {}: expected {}, got '{key}'", op.name, keys.join(", "));
                return Err(Error::Usage(message));
            };
            let most = if ["elements", "remove"].contains(&key) { MOST_ELEMENTS } else { LARGEST };
            let least = usize::from(!["pad", "remove", "iterations"].contains(&key));
            let size = value.parse().ok().filter(|size| (least..=most).contains(size));
            known.1 = size.ok_or_else(|| {
                let name = op.name;
                let expected = format!("expected {key}= and a whole number from {least} to {most}");
                Error::Usage(format!("--shape of {name}: {key}: {expected}, got '{value}'"))
            })?;
        }
        Ok(Sizes(sizes))
    }

    pub(super) fn get(&self, key: &str) -> usize {
        self.find(key).expect("a size of this operation")
    }

    pub(super) fn find(&self, key: &str) -> Option<usize> {
        self.0.iter().find(|(known, _)| *known == key).map(|(_, size)| *size)
    }
}

impl std::fmt::Display for Sizes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sizes: Vec<String> = self.0.iter().map(|(key, value)| format!("{key}={value}")).collect();
        f.write_str(&sizes.join(","))
    }
}

#[derive(Serialize)]
struct Measured {
    rows: Vec<Row>,
    precision: Precision,
    device: String,
    threads: usize,
    runs: usize,
    /// Written before each run.
    flushed_bytes: usize,
    ceilings: Ceilings,
}

/// Times of an operation, and how much of it is done in the median.
#[derive(Serialize)]
struct Row {
    name: &'static str,
    shape: String,
    ms: f64,
    ms_p10: f64,
    ms_p90: f64,
    /// Of products, two a multiply-add; none of what multiplies nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    gflop_per_second: Option<f64>,
    /// Of the bytes that it must read and write.
    #[serde(skip_serializing_if = "Option::is_none")]
    gb_per_second: Option<f64>,
    /// Of the arithmetic ceiling.
    #[serde(skip_serializing_if = "Option::is_none")]
    share_of_ceiling: Option<f64>,
    /// The least time by both ceilings, of the median.
    share_of_roofline: f64,
}

/// What an operation has to compute and to move.
#[derive(Serialize)]
struct Counted {
    rows: Vec<CountedRow>,
    precision: Precision,
    device: String,
}

#[derive(Serialize)]
struct CountedRow {
    name: &'static str,
    shape: String,
    flop: usize,
    read_bytes: usize,
    written_bytes: usize,
}

/// Random tensors on a device, and the times of what is done with them.
pub(super) struct Timer {
    pub(super) device: Device,
    pub(super) precision: Precision,
    rng: ChaCha8Rng,
    runs: usize,
    /// Bytes of memory that tensors may still take.
    free: usize,
    flush: Buffer<u32>,
    ms: Vec<f64>,
}

/// Measures the operation of that name, or counts what it does (`count`), or shows all of them for `list`.
pub(super) fn run(
    name: &str,
    shape: &[String],
    runs: usize,
    count: bool,
    common: &super::Common,
) -> anyhow::Result<()> {
    if name == "list" {
        let row = |op: &Op| serde_json::json!({"name": op.name, "shape": Sizes(op.sizes.to_vec()).to_string()});
        let rows = serde_json::json!({"rows": OPS.iter().map(row).collect::<Vec<_>>()});
        return common.print(&rows, |_| {
            table(
                &["operation", "shape"],
                OPS.iter().map(|op| vec![op.name.into(), Sizes(op.sizes.to_vec()).to_string()]),
            )
        });
    }
    let Some(op) = OPS.iter().find(|op| op.name == name) else {
        let names: Vec<&str> = OPS.iter().map(|op| op.name).collect();
        return Err(Error::Usage(format!("--op: expected list, {}, got '{name}'", names.join(", "))).into());
    };
    let sizes = Sizes::parse(op, shape)?;
    let device = common.open()?;
    let precision = common.precision();
    let described = || format!("--op {name} --shape {sizes}");
    let work = (op.work)(&device, precision, &sizes).map_err(refused).with_context(described)?;
    if count {
        let (read_bytes, written_bytes) = (work.read, work.written);
        let row = CountedRow { name: op.name, shape: sizes.to_string(), flop: work.flop, read_bytes, written_bytes };
        let counted = Counted { rows: vec![row], precision, device: device.description() };
        return common.print(&counted, counted_to_table);
    }
    let ceilings = Ceilings::measure(&device, precision)?;
    let flush = device.alloc(FLUSH_BYTES / 4)?;
    let rng = ChaCha8Rng::seed_from_u64(common.seed);
    let free = device.free_memory().unwrap_or(usize::MAX);
    let mut timer = Timer { device, precision, rng, runs, free, flush, ms: Vec::new() };
    (op.time)(&mut timer, &sizes).map_err(refused).with_context(described)?;
    let Timer { device, mut ms, .. } = timer;
    ms.sort_by(f64::total_cmp);
    let at = |share: f64| ms[((ms.len() - 1) as f64 * share).round() as usize];
    let seconds = at(0.5) / 1e3;
    let rate = |amount: usize| (amount > 0).then(|| amount as f64 / seconds / 1e9);
    let row = Row {
        name: op.name,
        shape: sizes.to_string(),
        ms: at(0.5),
        ms_p10: at(0.1),
        ms_p90: at(0.9),
        gflop_per_second: rate(work.flop),
        gb_per_second: rate(work.bytes()),
        share_of_ceiling: (work.flop > 0).then(|| ceilings.share(work.flop, seconds)),
        share_of_roofline: ceilings.seconds(&work) / seconds,
    };
    let measured = Measured {
        rows: vec![row],
        precision,
        device: device.description(),
        threads: rayon::current_num_threads(),
        runs,
        flushed_bytes: FLUSH_BYTES,
        ceilings,
    };
    common.print(&measured, to_table)
}

/// A shape that an operation refuses is a wrong request here.
fn refused(error: Error) -> Error {
    match error {
        Error::Shape { .. } => Error::Usage(error.to_string()),
        other => other,
    }
}

fn to_table(result: &Measured) -> String {
    let rate = |rate: Option<f64>| rate.map_or("-".into(), |rate| format!("{rate:.1}"));
    let rows = result.rows.iter().map(|row| {
        let times = [row.ms, row.ms_p10, row.ms_p90].map(|ms| format!("{ms:.4}"));
        let rates = [rate(row.gflop_per_second), rate(row.gb_per_second)];
        let shares = [row.share_of_ceiling.map_or("-".into(), share), share(row.share_of_roofline)];
        [row.name.to_owned()].into_iter().chain(times).chain(rates).chain(shares).collect()
    });
    let shape = result.rows.iter().map(|row| row.shape.as_str()).collect::<Vec<_>>().join("; ");
    format!(
        "{}\n\n{shape}, {}, {} ({} threads); median, 10th and 90th percentile of {} runs, {} MiB written before each, so \
         that caches are cold\nmeasured ceilings: {}",
        table(&["", "ms", "p10", "p90", "GFLOP/s", "GB/s", "of ceiling", "of roofline"], rows),
        result.precision.name(),
        result.device,
        result.threads,
        result.runs,
        result.flushed_bytes >> 20,
        result.ceilings
    )
}

fn counted_to_table(result: &Counted) -> String {
    let rows = result.rows.iter().map(|row| {
        let megabytes = [row.read_bytes, row.written_bytes].map(|bytes| format!("{:.3}", bytes as f64 / 1e6));
        [row.name.to_owned(), format!("{:.4}", row.flop as f64 / 1e9)].into_iter().chain(megabytes).collect()
    });
    let shape = result.rows.iter().map(|row| row.shape.as_str()).collect::<Vec<_>>().join("; ");
    let (precision, device) = (result.precision.name(), &result.device);
    let table = table(&["", "GFLOP", "MB read", "MB written"], rows);
    format!("{table}\n\n{shape}, {precision}: counted from shapes as the kernels of {device} do it")
}

impl Timer {
    /// Numbers between -1 and 1.
    pub(super) fn numbers(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.rng.random_range(-1.0..1.0)).collect()
    }

    /// A tensor of zeros. Where a host hands out memory that it does not have, what is free decides.
    pub(super) fn zeros<T: bytemuck::Pod>(&mut self, len: usize) -> dilt::Result<Buffer<T>> {
        let bytes = len.saturating_mul(size_of::<T>());
        let Some(rest) = self.free.checked_sub(bytes) else {
            let (mib, free) = (bytes >> 20, self.free >> 20);
            return Err(Error::Device(format!("a tensor of {mib} MiB: expected at most {free} MiB, which are left")));
        };
        self.free = rest;
        self.device.alloc(len)
    }

    /// A tensor of random numbers.
    pub(super) fn random(&mut self, len: usize) -> dilt::Result<Buffer<f32>> {
        let mut buffer = self.zeros(len)?;
        for start in (0..len).step_by(CHUNK) {
            let numbers = self.numbers(CHUNK.min(len - start));
            self.device.write(&numbers, buffer.slice_mut(start..start + numbers.len()))?;
        }
        Ok(buffer)
    }

    /// Activations, zeros.
    pub(super) fn real_zeros(&mut self, len: usize) -> dilt::Result<RealBuffer> {
        Ok(RealBuffer::new(self.zeros((len * self.precision.bytes()).div_ceil(4))?, len, self.precision))
    }

    /// Activations, random numbers.
    pub(super) fn reals(&mut self, len: usize) -> dilt::Result<RealBuffer> {
        let mut buffer = self.real_zeros(len)?;
        let numbers = self.numbers(len);
        self.device.write_reals(&numbers, buffer.view_mut())?;
        Ok(buffer)
    }

    /// A bit for each element, all set.
    pub(super) fn bits(&self, elements: usize) -> dilt::Result<Buffer<u32>> {
        self.device.upload(&vec![u32::MAX; elements.div_ceil(32)])
    }

    /// Takes the times of an operation; the first time is for what has to be loaded.
    pub(super) fn time(&mut self, mut op: impl FnMut(&Device) -> dilt::Result<()>) -> dilt::Result<()> {
        let device = self.device.clone();
        op(&device)?;
        for _ in 0..self.runs {
            device.zero(self.flush.view_mut())?;
            let begin = device.event()?;
            op(&device)?;
            self.ms.push(device.event()?.elapsed_ms(&begin)?);
        }
        Ok(())
    }
}
