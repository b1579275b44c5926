//! Scaled dot product attention of many heads, fused (`kernels/attention.cuh`).

use super::{Columns, check_len, check_precision, layouts_of};
use crate::device::{
    Device, Kernel, KernelArgs, Launch, Policy, Precision, Ptr, Real, RealKernel, Reals, RealsMut, Slice, SliceMut,
    kernel_args, real_kernel,
};
use crate::error::{Error, Result};

kernel_args! {
    /// Shape of attention: `heads` heads of `head_dim` features each, in all D; qkv `[3 D, N, Tp]`, y `[D, N, Tp]`.
    pub struct AttentionShape { heads: i32, head_dim: i32, columns: Columns }
    struct AttentionForwardArgs {
        qkv: Ptr<Real>, live: Ptr<u32>, count: Ptr<u32>, lse: Ptr<f32>, y: Ptr<Real>, shape: AttentionShape, scale: f32,
    }
    struct AttentionBackwardArgs {
        qkv: Ptr<Real>, live: Ptr<u32>, count: Ptr<u32>, y: Ptr<Real>, lse: Ptr<f32>, dy: Ptr<Real>, delta: Ptr<f32>,
        dqkv: Ptr<Real>, shape: AttentionShape, scale: f32,
    }
}
layouts_of!(AttentionShape, AttentionForwardArgs, AttentionBackwardArgs);

static FORWARD_DIRECT: RealKernel<AttentionForwardArgs> = real_kernel!("attention_forward_direct");
static BACKWARD_DIRECT: RealKernel<AttentionBackwardArgs> = real_kernel!("attention_backward_direct");

/// The kernels that cut tokens into tiles, for heads of up to so many features.
struct Staged {
    head_dim: usize,
    /// Tokens of a block's tile.
    tokens: usize,
    threads: u32,
    forward: Kernel<AttentionForwardArgs>,
    backward_queries: Kernel<AttentionBackwardArgs>,
    backward_keys: Kernel<AttentionBackwardArgs>,
}

macro_rules! staged {
    ($head_dim:literal, $precision:literal, $tokens:literal, $threads:literal) => {
        Staged {
            head_dim: $head_dim,
            tokens: $tokens,
            threads: $threads,
            forward: Kernel::new(concat!("attention_forward_", $head_dim, "_", $precision)),
            backward_queries: Kernel::new(concat!("attention_backward_queries_", $head_dim, "_", $precision)),
            backward_keys: Kernel::new(concat!("attention_backward_keys_", $head_dim, "_", $precision)),
        }
    };
}

/// Those of `kernels/attention.cu`.
static STAGED_F32: [Staged; 3] =
    [staged!(32, "f32", 64, 256), staged!(64, "f32", 64, 256), staged!(128, "f32", 32, 256)];
/// Those of `kernels/attention_mma.cu`.
static STAGED_BF16: [Staged; 3] =
    [staged!(32, "bf16", 64, 128), staged!(64, "bf16", 64, 128), staged!(128, "bf16", 64, 128)];

/// Most features of a head.
const MOST_HEAD_DIM: usize = 128;

impl AttentionShape {
    /// The shape of attention of `heads` heads of `head_dim` features over the `tokens` of each of `n` samples (rounded
    /// up to a multiple of 8, as the tokens are in memory).
    ///
    /// # Errors
    /// [`Error::Shape`] if a size is 0 or too large, or a head has more than 128 features.
    pub fn new(heads: usize, head_dim: usize, tokens: usize, n: usize) -> Result<Self> {
        let refuse = |what: &str, expected: &str| {
            let got = format!("{heads} heads of {head_dim} features, {n} samples of {tokens} tokens");
            Err(Error::Shape { op: "attention", what: what.into(), expected: expected.into(), got })
        };
        if !(1..=MOST_HEAD_DIM).contains(&head_dim) {
            return refuse("features of a head", "1 to 128");
        }
        if !(1..=65_535).contains(&heads) {
            return refuse("heads", "1 to 65535");
        }
        let most = 1 << 30;
        if [tokens, n].iter().any(|size| !(1..most).contains(size)) {
            return refuse("samples and tokens", "at least 1 and fewer than 2^30 each");
        }
        let columns = Columns::tokens(n, tokens)?;
        Ok(AttentionShape { heads: heads as i32, head_dim: head_dim as i32, columns })
    }

    /// Elements of qkv and dqkv, `[3 D, N, Tp]`.
    pub fn qkv_len(&self) -> usize {
        3 * self.output_len()
    }

    /// Elements of y and dy, `[D, N, Tp]`.
    pub fn output_len(&self) -> usize {
        self.head_dim as usize * self.statistic_len()
    }

    /// Elements of lse and delta, `[heads, N, Tp]`.
    pub fn statistic_len(&self) -> usize {
        self.heads as usize * self.columns.len()
    }

    /// Multiply-adds of one product of all heads, such as that of queries and keys, for so many samples.
    pub fn multiply_adds(&self, samples: usize) -> usize {
        let [heads, head_dim, tokens] = [self.heads, self.head_dim, self.columns.tokens].map(|x| x as usize);
        heads * head_dim * tokens * tokens * samples
    }

    /// 1 / sqrt(head_dim).
    fn scale(&self) -> f32 {
        (1.0 / f64::from(self.head_dim).sqrt()) as f32
    }

    /// The kernels of the staged policy for this shape.
    fn staged(&self, precision: Precision) -> &'static Staged {
        let kernels = match precision {
            Precision::F32 => &STAGED_F32,
            Precision::Bf16 => &STAGED_BF16,
        };
        let kernels = kernels.iter().find(|kernels| self.head_dim as usize <= kernels.head_dim);
        kernels.expect("the last one holds the largest head")
    }

    /// Launches one of the staged kernels, or the direct one.
    fn launch<A: KernelArgs>(
        &self,
        device: &Device,
        precision: Precision,
        direct: &RealKernel<A>,
        staged: impl Fn(&'static Staged) -> &'static Kernel<A>,
        args: &A,
    ) -> Result<()> {
        let (kernel, blocks, threads) = match device.policy() {
            Policy::Direct => (direct.of(precision), self.columns.n as usize, 1),
            Policy::Staged => {
                let kernels = self.staged(precision);
                let tiles = (self.columns.row as usize).div_ceil(kernels.tokens);
                (staged(kernels), self.columns.n as usize * tiles, kernels.threads)
            }
        };
        // SAFETY: the callers have checked the lengths of everything that `args` points to against its shape, and that
        // all activations are of the precision.
        unsafe { device.launch(kernel, Launch::new([blocks as u32, self.heads as u32, 1], threads), args) }
    }

    fn check(&self, op: &'static str, input: &AttentionInput) -> Result<()> {
        check_len(op, "qkv", input.qkv.len(), self.qkv_len())?;
        check_len(op, "live", input.live.len(), self.heads as usize)?;
        check_len(op, "count", input.count.len(), 1)
    }
}

/// What attention reads. Padded tokens and samples are zero.
#[derive(Clone, Copy)]
pub struct AttentionInput<'a> {
    /// Rows of queries, then of keys, then of values, each of all heads: `[3 D, N, Tp]`.
    pub qkv: Reals<'a>,
    /// `[heads]`: a head with 0 is left out; its rows of y and dqkv are zeros.
    pub live: Slice<'a, u32>,
    /// Number of true samples, `[1]`.
    pub count: Slice<'a, u32>,
}

/// Forward: y `[D, N, Tp]` of `softmax(Q K / sqrt(head_dim)) V` for each head and sample, overwritten, padded tokens and
/// samples with zeros. `lse`, the logarithm of each query's sum of exponentials, `[heads, N, Tp]`, is what the backward
/// pass needs.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn attention_forward(
    device: &Device,
    shape: &AttentionShape,
    input: AttentionInput,
    lse: Option<SliceMut<f32>>,
    y: RealsMut,
) -> Result<()> {
    let op = "attention_forward";
    shape.check(op, &input)?;
    check_len(op, "lse", lse.as_ref().map_or(shape.statistic_len(), SliceMut::len), shape.statistic_len())?;
    check_len(op, "y", y.len(), shape.output_len())?;
    let precision = check_precision(op, input.qkv, &[("y", y.view())])?;
    let args = AttentionForwardArgs {
        qkv: input.qkv.ptr(),
        live: input.live.ptr(),
        count: input.count.ptr(),
        lse: lse.as_ref().map_or(Ptr::null(), SliceMut::ptr),
        y: y.ptr(),
        shape: *shape,
        scale: shape.scale(),
    };
    shape.launch(device, precision, &FORWARD_DIRECT, |kernels| &kernels.forward, &args)
}

/// What [`attention_forward`] wrote.
#[derive(Clone, Copy)]
pub struct AttentionSaved<'a> {
    /// `[D, N, Tp]`.
    pub y: Reals<'a>,
    /// `[heads, N, Tp]`.
    pub lse: Slice<'a, f32>,
}

/// Backward: dy `[D, N, Tp]`, padded tokens and samples zero, to dqkv `[3 D, N, Tp]`, overwritten, padded tokens and
/// samples with zeros. `delta` is scratch of [`AttentionShape::statistic_len`] elements or more.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn attention_backward(
    device: &Device,
    shape: &AttentionShape,
    input: AttentionInput,
    saved: AttentionSaved,
    dy: Reals,
    delta: SliceMut<f32>,
    dqkv: RealsMut,
) -> Result<()> {
    let op = "attention_backward";
    shape.check(op, &input)?;
    check_len(op, "y", saved.y.len(), shape.output_len())?;
    check_len(op, "lse", saved.lse.len(), shape.statistic_len())?;
    check_len(op, "dy", dy.len(), shape.output_len())?;
    if delta.len() < shape.statistic_len() {
        check_len(op, "delta", delta.len(), shape.statistic_len())?;
    }
    check_len(op, "dqkv", dqkv.len(), shape.qkv_len())?;
    let precision = check_precision(op, input.qkv, &[("y", saved.y), ("dy", dy), ("dqkv", dqkv.view())])?;
    let args = AttentionBackwardArgs {
        qkv: input.qkv.ptr(),
        live: input.live.ptr(),
        count: input.count.ptr(),
        y: saved.y.ptr(),
        lse: saved.lse.ptr(),
        dy: dy.ptr(),
        delta: delta.ptr(),
        dqkv: dqkv.ptr(),
        shape: *shape,
        scale: shape.scale(),
    };
    shape.launch(device, precision, &BACKWARD_DIRECT, |kernels| &kernels.backward_queries, &args)?;
    match device.policy() {
        Policy::Direct => Ok(()), // one kernel makes all gradients
        Policy::Staged => shape.launch(device, precision, &BACKWARD_DIRECT, |kernels| &kernels.backward_keys, &args),
    }
}
