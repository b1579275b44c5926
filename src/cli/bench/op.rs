//! `dilt bench --op`: one operation by itself, for its time or for a profiler of kernels.

use anyhow::Context;
use dilt::Error;
use dilt::device::{Buffer, Device, Precision, RealBuffer};
use dilt::nn::traffic::{self, Work};
use dilt::ops::Columns;
use dilt::ops::attention::{AttentionInput, AttentionSaved, AttentionShape, attention_backward, attention_forward};
use dilt::ops::conv::{ConvShape, conv_forward, conv_input_gradient, conv_weight_gradient};
use dilt::ops::gelu::{gelu_backward, gelu_forward};
use dilt::ops::gw::{Couplings, Layers, MOST_COUPLED, Start, Step};
use dilt::ops::layer_norm::{
    LayerNormAffine, LayerNormBackward, LayerNormShape, LayerNormStatistics, layer_norm_backward, layer_norm_forward,
};
use dilt::ops::norm::{
    NormAffine, NormBackward, NormInput, NormRunning, NormSaved, NormShape, norm_backward, norm_forward,
};
use dilt::ops::optimizer::{AdamW, OptimizerInput, Sgd, adamw_step, sgd_step};
use dilt::ops::prune::{Selection, prune_scratch_len, prune_smallest};
use dilt::report::table::table;
use ndarray::Array2;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// Written between two runs, so that none finds its tensors in a cache: more than the last-level caches of today's GPUs
/// (126 MB) and of most CPUs.
const FLUSH_BYTES: usize = 256 << 20;
/// Random numbers that are drawn and copied at once.
const CHUNK: usize = 1 << 20;
/// A size may have this many at most: the product of three is still a number.
const LARGEST: usize = 1 << 20;
/// As many as selection can count.
const MOST_ELEMENTS: usize = u32::MAX as usize;

/// An operation, the sizes that it takes with what they are if they are not given, and what prepares and times it.
struct Op {
    name: &'static str,
    sizes: &'static [(&'static str, usize)],
    time: fn(&mut Timer, &Sizes) -> dilt::Result<()>,
}

const CONV: &[(&str, usize)] =
    &[("c", 64), ("h", 32), ("w", 32), ("k", 64), ("r", 3), ("s", 3), ("stride", 1), ("pad", 1), ("n", 128)];
const NORM: &[(&str, usize)] = &[("c", 64), ("h", 32), ("w", 32), ("n", 128)];
const LAYER_NORM: &[(&str, usize)] = &[("d", 384), ("t", 197), ("n", 64)];
const ATTENTION: &[(&str, usize)] = &[("heads", 6), ("head_dim", 64), ("t", 197), ("n", 64)];
const ELEMENTS: &[(&str, usize)] = &[("elements", 25_000_000)];

const OPS: &[Op] = &[
    Op { name: "conv_forward", sizes: CONV, time: time_conv_forward },
    Op { name: "conv_input_gradient", sizes: CONV, time: time_conv_input_gradient },
    Op { name: "conv_weight_gradient", sizes: CONV, time: time_conv_weight_gradient },
    Op { name: "norm_forward", sizes: NORM, time: time_norm_forward },
    Op { name: "norm_backward", sizes: NORM, time: time_norm_backward },
    Op { name: "layer_norm_forward", sizes: LAYER_NORM, time: time_layer_norm_forward },
    Op { name: "layer_norm_backward", sizes: LAYER_NORM, time: time_layer_norm_backward },
    Op { name: "attention_forward", sizes: ATTENTION, time: time_attention_forward },
    Op { name: "attention_backward", sizes: ATTENTION, time: time_attention_backward },
    Op { name: "gelu_forward", sizes: ELEMENTS, time: time_gelu_forward },
    Op { name: "gelu_backward", sizes: ELEMENTS, time: time_gelu_backward },
    Op { name: "sgd_step", sizes: ELEMENTS, time: time_sgd_step },
    Op { name: "adamw_step", sizes: ELEMENTS, time: time_adamw_step },
    Op { name: "prune", sizes: &[("elements", 25_000_000), ("remove", 5_000_000)], time: time_prune },
    Op { name: "couplings", sizes: &[("probes", 256), ("count", 28), ("iterations", 50)], time: time_couplings },
];

/// The sizes of an operation, in the order of [`Op::sizes`].
struct Sizes(Vec<(&'static str, usize)>);

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

    fn get(&self, key: &str) -> usize {
        self.0.iter().find(|(known, _)| *known == key).expect("a size of this operation").1
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
}

/// Random tensors on a device, and the times of what is done with them.
struct Timer {
    device: Device,
    precision: Precision,
    rng: ChaCha8Rng,
    runs: usize,
    /// Bytes of memory that tensors may still take.
    free: usize,
    flush: Buffer<u32>,
    work: Work,
    ms: Vec<f64>,
}

/// Measures the operation of that name, or shows all of them for `list`.
pub(super) fn run(name: &str, shape: &[String], runs: usize, common: &super::Common) -> anyhow::Result<()> {
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
    let flush = device.alloc(FLUSH_BYTES / 4)?;
    let rng = ChaCha8Rng::seed_from_u64(common.seed);
    let free = device.free_memory().unwrap_or(usize::MAX);
    let mut timer =
        Timer { device, precision: common.precision(), rng, runs, free, flush, work: Work::default(), ms: Vec::new() };
    (op.time)(&mut timer, &sizes).map_err(refused).with_context(|| format!("--op {name} --shape {sizes}"))?;
    let Timer { device, work, mut ms, .. } = timer;
    ms.sort_by(f64::total_cmp);
    let at = |share: f64| ms[((ms.len() - 1) as f64 * share).round() as usize];
    let rate = |amount: usize| (amount > 0).then(|| amount as f64 / at(0.5) / 1e6);
    let row = Row {
        name: op.name,
        shape: sizes.to_string(),
        ms: at(0.5),
        ms_p10: at(0.1),
        ms_p90: at(0.9),
        gflop_per_second: rate(work.flop),
        gb_per_second: rate(work.bytes()),
    };
    let threads = rayon::current_num_threads();
    let device = device.description();
    common.print(
        &Measured { rows: vec![row], precision: common.precision(), device, threads, runs, flushed_bytes: FLUSH_BYTES },
        to_table,
    )
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
        [row.name.to_owned()].into_iter().chain(times).chain(rates).collect()
    });
    let shape = result.rows.iter().map(|row| row.shape.as_str()).collect::<Vec<_>>().join("; ");
    format!(
        "{}\n\n{shape}, {}, {} ({} threads); median, 10th and 90th percentile of {} runs, {} MiB written before each, so \
         that caches are cold",
        table(&["", "ms", "p10", "p90", "GFLOP/s", "GB/s"], rows),
        result.precision.name(),
        result.device,
        result.threads,
        result.runs,
        result.flushed_bytes >> 20
    )
}

impl Timer {
    /// Numbers between -1 and 1.
    fn numbers(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.rng.random_range(-1.0..1.0)).collect()
    }

    /// A tensor of zeros. Where a host hands out memory that it does not have, what is free decides.
    fn zeros<T: bytemuck::Pod>(&mut self, len: usize) -> dilt::Result<Buffer<T>> {
        let bytes = len.saturating_mul(size_of::<T>());
        let Some(rest) = self.free.checked_sub(bytes) else {
            let (mib, free) = (bytes >> 20, self.free >> 20);
            return Err(Error::Device(format!("a tensor of {mib} MiB: expected at most {free} MiB, which are left")));
        };
        self.free = rest;
        self.device.alloc(len)
    }

    /// A tensor of random numbers.
    fn random(&mut self, len: usize) -> dilt::Result<Buffer<f32>> {
        let mut buffer = self.zeros(len)?;
        for start in (0..len).step_by(CHUNK) {
            let numbers = self.numbers(CHUNK.min(len - start));
            self.device.write(&numbers, buffer.slice_mut(start..start + numbers.len()))?;
        }
        Ok(buffer)
    }

    /// Activations, zeros.
    fn real_zeros(&mut self, len: usize) -> dilt::Result<RealBuffer> {
        Ok(RealBuffer::new(self.zeros((len * self.precision.bytes()).div_ceil(4))?, len, self.precision))
    }

    /// Activations, random numbers.
    fn reals(&mut self, len: usize) -> dilt::Result<RealBuffer> {
        let mut buffer = self.real_zeros(len)?;
        let numbers = self.numbers(len);
        self.device.write_reals(&numbers, buffer.view_mut())?;
        Ok(buffer)
    }

    /// A bit for each element, all set.
    fn bits(&self, elements: usize) -> dilt::Result<Buffer<u32>> {
        self.device.upload(&vec![u32::MAX; elements.div_ceil(32)])
    }

    /// Takes the times of an operation that does so much; the first time is for what has to be loaded.
    fn time(&mut self, work: Work, mut op: impl FnMut(&Device) -> dilt::Result<()>) -> dilt::Result<()> {
        let device = self.device.clone();
        op(&device)?;
        self.work = work;
        for _ in 0..self.runs {
            device.zero(self.flush.view_mut())?;
            let begin = device.event()?;
            op(&device)?;
            self.ms.push(device.event()?.elapsed_ms(&begin)?);
        }
        Ok(())
    }
}

fn conv_shape(sizes: &Sizes) -> dilt::Result<ConvShape> {
    let [c, h, w, k, r, s] = ["c", "h", "w", "k", "r", "s"].map(|key| sizes.get(key));
    ConvShape::new([c, h, w], k, [r, s], sizes.get("stride"), sizes.get("pad"), sizes.get("n"))
}

fn time_conv_forward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let shape = conv_shape(sizes)?;
    let (x, w) = (timer.reals(shape.input_len())?, timer.reals(shape.read_weight_len(timer.precision))?);
    let mut y = timer.real_zeros(shape.output_len())?;
    timer.time(traffic::conv_forward(&shape, timer.precision), |device| {
        conv_forward(device, &shape, x.view(), w.view(), None, y.view_mut())
    })
}

fn time_conv_input_gradient(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let shape = conv_shape(sizes)?;
    let (dy, w) = (timer.reals(shape.output_len())?, timer.reals(shape.read_weight_len(timer.precision))?);
    let mut dx = timer.real_zeros(shape.input_len())?;
    timer.time(traffic::conv_input_gradient(&shape, timer.precision), |device| {
        conv_input_gradient(device, &shape, dy.view(), w.view(), false, dx.view_mut())
    })
}

fn time_conv_weight_gradient(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let shape = conv_shape(sizes)?;
    let (x, dy) = (timer.reals(shape.input_len())?, timer.reals(shape.output_len())?);
    let mut dw = timer.zeros(shape.weight_len())?;
    let mut scratch = timer.zeros(shape.gradient_scratch_len(&timer.device.clone(), timer.precision))?;
    timer.time(traffic::conv_weight_gradient(&timer.device, &shape, timer.precision), |device| {
        conv_weight_gradient(device, &shape, x.view(), dy.view(), scratch.view_mut(), dw.view_mut())
    })
}

/// The tensors of a norm, and the vectors of its features.
struct NormTensors {
    shape: NormShape,
    x: RealBuffer,
    y: RealBuffer,
    scratch: Buffer<f32>,
    gamma: Buffer<f32>,
    beta: Buffer<f32>,
    running: [Buffer<f32>; 2],
    saved: [Buffer<f32>; 2],
    count: Buffer<u32>,
}

impl NormTensors {
    fn new(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<Self> {
        let [c, h, w, n] = ["c", "h", "w", "n"].map(|key| sizes.get(key));
        let shape = NormShape::new(c, h * w, n)?;
        Ok(NormTensors {
            x: timer.reals(shape.len())?,
            y: timer.real_zeros(shape.len())?,
            scratch: timer.zeros(shape.scratch_len())?,
            gamma: timer.random(c)?,
            beta: timer.random(c)?,
            running: [timer.zeros(c)?, timer.zeros(c)?],
            saved: [timer.zeros(c)?, timer.zeros(c)?],
            count: timer.device.upload(&[n as u32])?,
            shape,
        })
    }

    fn forward(&mut self, device: &Device) -> dilt::Result<()> {
        let input = NormInput { x: self.x.view(), residual: None, relu: true, map: None, count: self.count.view() };
        let affine = NormAffine { gamma: self.gamma.view(), beta: self.beta.view(), epsilon: 1e-5 };
        let [mean, var] = self.running.each_mut().map(Buffer::view_mut);
        let running = NormRunning { mean, var, momentum: 0.1 };
        let [mean, invstd] = self.saved.each_mut().map(Buffer::view_mut);
        let saved = NormSaved { mean, invstd };
        norm_forward(device, &self.shape, input, affine, running, saved, self.scratch.view_mut(), self.y.view_mut())
    }
}

/// With ReLU.
fn time_norm_forward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let mut norm = NormTensors::new(timer, sizes)?;
    let elements = norm.shape.len();
    timer.time(traffic::norm_forward(timer.precision, elements, elements, false), |device| norm.forward(device))
}

fn time_norm_backward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let mut norm = NormTensors::new(timer, sizes)?;
    norm.forward(&timer.device)?;
    let (elements, features) = (norm.shape.len(), norm.gamma.len());
    let (dy, mut dx) = (timer.reals(elements)?, timer.real_zeros(elements)?);
    let (mut dgamma, mut dbeta) = (timer.zeros(features)?, timer.zeros(features)?);
    timer.time(traffic::norm_backward(timer.precision, elements, elements, false, false), |device| {
        let input = NormBackward {
            map: None,
            x: norm.x.view(),
            y: None,
            dy: dy.view(),
            relu: true,
            gamma: norm.gamma.view(),
            beta: norm.beta.view(),
            mean: norm.saved[0].view(),
            invstd: norm.saved[1].view(),
            training: true,
            count: norm.count.view(),
        };
        let (dgamma, dbeta) = (dgamma.view_mut(), dbeta.view_mut());
        norm_backward(device, &norm.shape, input, norm.scratch.view_mut(), dgamma, dbeta, None, dx.view_mut())
    })
}

fn layer_norm_shape(sizes: &Sizes) -> dilt::Result<LayerNormShape> {
    LayerNormShape::new(sizes.get("d"), Columns::tokens(sizes.get("n"), sizes.get("t"))?)
}

fn time_layer_norm_forward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let shape = layer_norm_shape(sizes)?;
    let (x, mut y) = (timer.reals(shape.len())?, timer.real_zeros(shape.len())?);
    let (gamma, beta) = (timer.random(sizes.get("d"))?, timer.random(sizes.get("d"))?);
    let (mut mean, mut invstd) = (timer.zeros(shape.columns())?, timer.zeros(shape.columns())?);
    let count = timer.device.upload(&[sizes.get("n") as u32])?;
    timer.time(traffic::layer_norm_forward(&shape, timer.precision), |device| {
        let affine = LayerNormAffine { gamma: gamma.view(), beta: beta.view(), epsilon: 1e-6 };
        let saved = LayerNormStatistics { mean: mean.view_mut(), invstd: invstd.view_mut() };
        layer_norm_forward(device, &shape, x.view(), affine, count.view(), Some(saved), y.view_mut())
    })
}

fn time_layer_norm_backward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let (shape, features) = (layer_norm_shape(sizes)?, sizes.get("d"));
    let (x, dy, mut dx) = (timer.reals(shape.len())?, timer.reals(shape.len())?, timer.real_zeros(shape.len())?);
    let (mean, invstd) = (timer.random(shape.columns())?, timer.random(shape.columns())?);
    let (gamma, mut scratch) = (timer.random(features)?, timer.zeros(shape.scratch_len())?);
    let (mut dgamma, mut dbeta) = (timer.zeros(features)?, timer.zeros(features)?);
    let count = timer.device.upload(&[sizes.get("n") as u32])?;
    timer.time(traffic::layer_norm_backward(&shape, timer.precision, false), |device| {
        let input = LayerNormBackward {
            x: x.view(),
            dy: dy.view(),
            gamma: gamma.view(),
            mean: mean.view(),
            invstd: invstd.view(),
            count: count.view(),
            accumulate: false,
        };
        let (dgamma, dbeta) = (dgamma.view_mut(), dbeta.view_mut());
        layer_norm_backward(device, &shape, input, scratch.view_mut(), dgamma, dbeta, dx.view_mut())
    })
}

/// The tensors of attention.
struct AttentionTensors {
    shape: AttentionShape,
    qkv: RealBuffer,
    y: RealBuffer,
    lse: Buffer<f32>,
    live: Buffer<u32>,
    count: Buffer<u32>,
}

impl AttentionTensors {
    fn new(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<Self> {
        let [heads, head_dim, tokens, n] = ["heads", "head_dim", "t", "n"].map(|key| sizes.get(key));
        let shape = AttentionShape::new(heads, head_dim, tokens, n)?;
        Ok(AttentionTensors {
            qkv: timer.reals(shape.qkv_len())?,
            y: timer.real_zeros(shape.output_len())?,
            lse: timer.zeros(shape.statistic_len())?,
            live: timer.device.upload(&vec![1; heads])?,
            count: timer.device.upload(&[n as u32])?,
            shape,
        })
    }

    fn forward(&mut self, device: &Device) -> dilt::Result<()> {
        let input = AttentionInput { qkv: self.qkv.view(), live: self.live.view(), count: self.count.view() };
        attention_forward(device, &self.shape, input, Some(self.lse.view_mut()), self.y.view_mut())
    }
}

fn time_attention_forward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let mut attention = AttentionTensors::new(timer, sizes)?;
    timer.time(traffic::attention_forward(&attention.shape, timer.precision), |device| attention.forward(device))
}

fn time_attention_backward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let mut attention = AttentionTensors::new(timer, sizes)?;
    attention.forward(&timer.device)?;
    let AttentionTensors { shape, qkv, y, lse, live, count } = attention;
    let (dy, mut dqkv) = (timer.reals(shape.output_len())?, timer.real_zeros(shape.qkv_len())?);
    let mut delta = timer.zeros(shape.statistic_len())?;
    timer.time(traffic::attention_backward(&timer.device, &shape, timer.precision), |device| {
        let input = AttentionInput { qkv: qkv.view(), live: live.view(), count: count.view() };
        let saved = AttentionSaved { y: y.view(), lse: lse.view() };
        attention_backward(device, &shape, input, saved, dy.view(), delta.view_mut(), dqkv.view_mut())
    })
}

fn time_gelu_forward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let elements = sizes.get("elements");
    let (x, mut y) = (timer.reals(elements)?, timer.real_zeros(elements)?);
    timer.time(Work::reals(timer.precision, elements, elements), |device| gelu_forward(device, x.view(), y.view_mut()))
}

fn time_gelu_backward(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let elements = sizes.get("elements");
    let (x, dy, mut dx) = (timer.reals(elements)?, timer.reals(elements)?, timer.real_zeros(elements)?);
    timer.time(Work::reals(timer.precision, 2 * elements, elements), |device| {
        gelu_backward(device, x.view(), dy.view(), dx.view_mut())
    })
}

/// With momentum, over weights of which none is pruned and all decay.
fn time_sgd_step(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let elements = sizes.get("elements");
    let (gradients, mut weights, mut velocity) =
        (timer.random(elements)?, timer.random(elements)?, timer.zeros(elements)?);
    let (mask, rate) = (timer.bits(elements)?, timer.device.upload(&[1e-3])?);
    let sgd = Sgd { momentum: 0.9, nesterov: false, weight_decay: 1e-4 };
    timer.time(traffic::optimizer_step(elements, 1, false), |device| {
        let (rate, gradients, mask) = (rate.view(), gradients.view(), mask.view());
        let input = OptimizerInput { rate, gradients, mask, decay: None, clip: None };
        sgd_step(device, &sgd, input, weights.view_mut(), velocity.view_mut())
    })
}

fn time_adamw_step(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let elements = sizes.get("elements");
    let (gradients, mut weights) = (timer.random(elements)?, timer.random(elements)?);
    let (mut first, mut second) = (timer.zeros(elements)?, timer.zeros(elements)?);
    let (mask, rate) = (timer.bits(elements)?, timer.device.upload(&[1e-3])?);
    let corrections = timer.device.upload(&[1.0, 1.0])?;
    let adamw = AdamW { betas: [0.9, 0.999], epsilon: 1e-8, weight_decay: 0.05 };
    timer.time(traffic::optimizer_step(elements, 2, false), |device| {
        let (rate, gradients, mask) = (rate.view(), gradients.view(), mask.view());
        let input = OptimizerInput { rate, gradients, mask, decay: None, clip: None };
        let corrections = corrections.view();
        adamw_step(device, &adamw, input, corrections, weights.view_mut(), first.view_mut(), second.view_mut())
    })
}

/// Bytes are those of the weights, once.
fn time_prune(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let (elements, remove) = (sizes.get("elements"), sizes.get("remove"));
    if remove > elements {
        return Err(Error::Usage(format!("remove: expected at most elements, {elements}, got {remove}")));
    }
    let weights = timer.random(elements)?;
    let (live, mut mask) = (timer.bits(elements)?, timer.bits(elements)?);
    let mut scratch = timer.zeros(prune_scratch_len(elements))?;
    timer.time(Work::elements(elements, 0), |device| {
        let selection = Selection { weights: weights.view(), live: live.view(), remove };
        prune_smallest(device, selection, scratch.view_mut(), mask.view_mut())
    })
}

/// A proximal step of so many couplings of two layers, with all iterations of Sinkhorn: two products of matrices, and
/// two of a matrix and a vector an iteration.
fn time_couplings(timer: &mut Timer, sizes: &Sizes) -> dilt::Result<()> {
    let [n, count, iterations] = ["probes", "count", "iterations"].map(|key| sizes.get(key));
    if n > MOST_COUPLED {
        return Err(Error::Usage(format!("probes: expected at most {MOST_COUPLED}, got {n}")));
    }
    let mut distances = || {
        let x = timer.numbers(n);
        Array2::from_shape_fn((n, n), |(i, j)| (x[i] - x[j]).abs() / 2.0)
    };
    let matrices = [distances(), distances()];
    let layers = Layers::new(&timer.device, &matrices.each_ref().map(Array2::view))?;
    let mut couplings = Couplings::new(&timer.device, &layers, &vec![([0, 1], Start::Product); count])?;
    // A tolerance below zero: no iteration is left out.
    let step = Step { epsilon: 0.1, iterations, tolerance: -1.0, enough: None };
    couplings.begin(&timer.device, &step)?;
    let work = Work::default().with_multiply_adds(count * (2 * n * n * n + iterations * 2 * n * n));
    timer.time(work, |device| couplings.step(device, &step))
}
