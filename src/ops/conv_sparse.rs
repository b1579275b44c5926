//! Convolution with kept weights alone (`kernels/conv_sparse.cu`): what a pruned weight would multiply is never read.

use super::conv::{Bias, ConvShape};
use super::{Columns, check_len, layouts_of};
use crate::device::{Buffer, Device, Kernel, Launch, Policy, Ptr, Slice, SliceMut, kernel_args};
use crate::error::{Error, Result};

kernel_args! {
    struct ConvSparseArgs {
        from: Ptr<f32>, starts: Ptr<u32>, offsets: Ptr<i32>, values: Ptr<f32>, bias: Ptr<f32>, to: Ptr<f32>,
        count: Ptr<u32>, shape: ConvShape, columns: Columns, accumulate: i32,
    }
    struct ConvSparseGradientArgs {
        x: Ptr<f32>, dy: Ptr<f32>, starts: Ptr<u32>, offsets: Ptr<i32>, places: Ptr<u32>, chunks: Ptr<u32>,
        partial: Ptr<f32>, shape: ConvShape, kept: i32, splits: i32,
    }
    struct ConvSparseGatherArgs { w: Ptr<f32>, places: Ptr<u32>, values: Ptr<f32>, kept: i64 }
    struct ConvSparseScatterArgs { partial: Ptr<f32>, places: Ptr<u32>, dw: Ptr<f32>, kept: i64, splits: i32 }
}
layouts_of!(ConvSparseArgs, ConvSparseGradientArgs, ConvSparseGatherArgs, ConvSparseScatterArgs);

static FORWARD: [Kernel<ConvSparseArgs>; 2] =
    [Kernel::new("conv_sparse_forward_f32"), Kernel::new("conv_sparse_forward_direct_f32")];
static INPUT_GRADIENT: [Kernel<ConvSparseArgs>; 2] =
    [Kernel::new("conv_sparse_input_gradient_f32"), Kernel::new("conv_sparse_input_gradient_direct_f32")];
static WEIGHT_GRADIENT: [Kernel<ConvSparseGradientArgs>; 2] =
    [Kernel::new("conv_sparse_weight_gradient_f32"), Kernel::new("conv_sparse_weight_gradient_direct_f32")];
static GATHER: Kernel<ConvSparseGatherArgs> = Kernel::new("conv_sparse_gather_f32");
static SCATTER: Kernel<ConvSparseScatterArgs> = Kernel::new("conv_sparse_scatter_f32");

/// Tile sizes of `kernels/conv_sparse.cu`.
const GROUP_ROWS: usize = 64;
const GROUP_SAMPLES: usize = 128;
const STAGED_TILE: [usize; 2] = [32, 128];
const CHUNK: usize = 64;
const THREADS: u32 = 256;
/// Blocks that a staged weight gradient aims for: two for each of 132 multiprocessors.
const GRADIENT_BLOCKS: usize = 264;
/// What a split of a direct weight gradient reads, about: its blocks follow each other, and find it in the second-level
/// cache.
const DIRECT_GRADIENT_BYTES: usize = 1 << 20;

/// The kept weights of a convolution, as lists on a device: for every pass where each of them reads.
pub struct KeptWeights {
    shape: ConvShape,
    kept: usize,
    forward: List,
    /// None in a network that is not trained.
    input_gradient: Option<List>,
    /// Row, first entry and the one after the last of each chunk of the forward list.
    chunks: Buffer<u32>,
    /// Sums of the weight gradient's splits, `[splits, kept]`.
    partial: Buffer<f32>,
    splits: usize,
}

/// The kept weights by rows, a row by taps.
struct List {
    starts: Buffer<u32>,
    offsets: Buffer<i32>,
    places: Buffer<u32>,
    values: Buffer<f32>,
}

impl List {
    /// A row for each input channel (`transposed`) or output channel. `kept` are places in w, ascending.
    fn new(device: &Device, shape: &ConvShape, kept: &[u32], transposed: bool) -> Result<(Self, Vec<u32>)> {
        let [c, k, r, s] = [shape.c, shape.k, shape.r, shape.s].map(|size| size as usize);
        let (rows, stride) = if transposed { (c, shape.stride as usize) } else { (k, 1) };
        let [height, width] = if transposed { [shape.p, shape.q] } else { [shape.h, shape.w] }.map(i64::from);
        // Where a tap stands in the order by remainder, as `place` in the kernel.
        let order = |tap: usize, filter: usize| {
            let rest = tap % stride;
            rest * (filter / stride) + rest.min(filter % stride) + tap / stride
        };
        let mut starts = vec![0u32; rows * r * s + 1];
        let entry = |place: u32| {
            let place = place as usize;
            let [k, c, r0, s0] = [place / (c * r * s), place / (r * s) % c, place / s % r, place % s];
            let (row, channel) = if transposed { (c, k) } else { (k, c) };
            let slot = row * r * s + order(r0, r) * s + order(s0, s);
            let [r0, s0] = [r0, s0].map(|tap| if transposed { -((tap / stride) as i64) } else { tap as i64 });
            (slot, ((channel as i64 * height + r0) * width + s0) * i64::from(shape.n))
        };
        for &place in kept {
            starts[entry(place).0 + 1] += 1;
        }
        for slot in 1..starts.len() {
            starts[slot] += starts[slot - 1];
        }
        let (mut next, mut offsets, mut places) = (starts.clone(), vec![0i32; kept.len()], vec![0u32; kept.len()]);
        for &place in kept {
            let (slot, offset) = entry(place);
            let at = next[slot] as usize;
            next[slot] += 1;
            offsets[at] = i32::try_from(offset).expect("refused before");
            places[at] = place;
        }
        let list = List {
            starts: device.upload(&starts)?,
            offsets: device.upload(&offsets)?,
            places: device.upload(&places)?,
            values: device.alloc(kept.len())?,
        };
        Ok((list, starts))
    }

    fn gather(&mut self, device: &Device, w: Slice<f32>) -> Result<()> {
        let (kept, values) = (self.places.len() as i64, self.values.view_mut().ptr());
        let args = ConvSparseGatherArgs { w: w.ptr(), places: self.places.view().ptr(), values, kept };
        // SAFETY: places are below the length of w, which the caller has checked.
        unsafe { device.launch(&GATHER, device.elementwise(self.places.len()), &args) }
    }
}

impl KeptWeights {
    /// Whether a convolution of this shape can have lists: an index reaches all of its input and its output.
    pub fn reach(shape: &ConvShape) -> bool {
        shape.input_len().max(shape.output_len()) < 1 << 30
    }

    /// Lists of the weights of `[k, c, r, s]` that `kept` names by their places, ascending; for the input gradient too
    /// if `train`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the tensors are beyond [`KeptWeights::reach`], or a place beyond the weights or not above
    /// the one before it; [`Error::Device`] when memory runs out.
    pub fn new(device: &Device, shape: &ConvShape, kept: &[u32], train: bool) -> Result<Self> {
        let refuse = |what: &str, expected: String, got: String| {
            Err(Error::Shape { op: "convolution of kept weights", what: what.into(), expected, got })
        };
        if !Self::reach(shape) {
            let len = shape.input_len().max(shape.output_len());
            return refuse("elements of a tensor", "fewer than 2^30".into(), len.to_string());
        }
        if let Some(pair) = kept.windows(2).find(|pair| pair[0] >= pair[1]) {
            return refuse("places of kept weights", "ascending ones".into(), format!("{pair:?}"));
        }
        if let Some(&last) = kept.last().filter(|&&last| last as usize >= shape.weight_len()) {
            return refuse("place of a kept weight", format!("one below {}", shape.weight_len()), last.to_string());
        }
        let (forward, starts) = List::new(device, shape, kept, false)?;
        let input_gradient = if train { Some(List::new(device, shape, kept, true)?.0) } else { None };
        let taps = (shape.r * shape.s) as usize;
        let mut chunks = Vec::new();
        for row in 0..shape.k as usize {
            let end = starts[(row + 1) * taps];
            let begins = (starts[row * taps]..end).step_by(CHUNK);
            chunks.extend(begins.flat_map(|begin| [row as u32, begin, end.min(begin + CHUNK as u32)]));
        }
        let splits = splits(shape, chunks.len() / 3, device.policy());
        let partial = device.alloc(if train { splits * kept.len() } else { 0 })?;
        let chunks = device.upload(&chunks)?;
        Ok(KeptWeights { shape: *shape, kept: kept.len(), forward, input_gradient, chunks, partial, splits })
    }

    /// The convolution.
    pub fn shape(&self) -> &ConvShape {
        &self.shape
    }

    /// Number of kept weights.
    pub fn kept(&self) -> usize {
        self.kept
    }

    /// Takes the values of the kept weights from w `[k, c, r, s]`, for the passes that follow.
    ///
    /// # Errors
    /// [`Error::Shape`] if w is of another size.
    pub fn gather(&mut self, device: &Device, w: Slice<f32>) -> Result<()> {
        check_len("conv_sparse_gather", "w", w.len(), self.shape.weight_len())?;
        if self.kept == 0 {
            return Ok(());
        }
        self.forward.gather(device, w)?;
        self.input_gradient.as_mut().map_or(Ok(()), |list| list.gather(device, w))
    }
}

/// Splits of the weight gradient: a function of shape, mask and policy alone.
fn splits(shape: &ConvShape, chunks: usize, policy: Policy) -> usize {
    let units = shape.p as usize * (shape.n as usize).div_ceil(GROUP_SAMPLES);
    let bytes = (shape.input_len() + shape.output_len()) * size_of::<f32>();
    let splits = match policy {
        Policy::Direct => bytes / DIRECT_GRADIENT_BYTES,
        Policy::Staged => GRADIENT_BLOCKS / chunks.max(1),
    };
    splits.clamp(1, units)
}

fn product(
    device: &Device,
    [staged, direct]: &'static [Kernel<ConvSparseArgs>; 2],
    rows: i32,
    pixels: i32,
    args: &ConvSparseArgs,
) -> Result<()> {
    let [rows, pixels, n] = [rows, pixels, args.shape.n].map(|x| x as usize);
    let (kernel, grid, block) = match device.policy() {
        Policy::Direct => (direct, [pixels, n.div_ceil(GROUP_SAMPLES), rows.div_ceil(GROUP_ROWS)], 1),
        Policy::Staged => {
            let [tile_rows, tile_columns] = STAGED_TILE;
            (staged, [(pixels * n).div_ceil(tile_columns), rows.div_ceil(tile_rows), 1], THREADS)
        }
    };
    // SAFETY: the callers have checked the lengths of everything that `args` points to against its shape; offsets and
    // starts are those of the shape.
    unsafe { device.launch(kernel, Launch::new(grid.map(|x| x as u32), block), args) }
}

fn made_for_evaluation(op: &'static str) -> Error {
    let (expected, got) = ("lists for training".into(), "lists for evaluation".into());
    Error::Shape { op, what: "kept weights".into(), expected, got }
}

/// Forward, as [`conv_forward`](super::conv::conv_forward), with the values that [`KeptWeights::gather`] took.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn conv_sparse_forward(
    device: &Device,
    weights: &KeptWeights,
    x: Slice<f32>,
    bias: Option<Bias>,
    y: SliceMut<f32>,
) -> Result<()> {
    let (op, shape) = ("conv_sparse_forward", weights.shape);
    check_len(op, "x", x.len(), shape.input_len())?;
    check_len(op, "y", y.len(), shape.output_len())?;
    if let Some(b) = bias {
        b.check(op, &shape)?;
    }
    let list = &weights.forward;
    let args = ConvSparseArgs {
        from: x.ptr(),
        starts: list.starts.view().ptr(),
        offsets: list.offsets.view().ptr(),
        values: list.values.view().ptr(),
        bias: bias.map_or(Ptr::null(), |b| b.bias.ptr()),
        to: y.ptr(),
        count: bias.map_or(Ptr::null(), |b| b.count.ptr()),
        shape,
        columns: bias.map_or_else(|| Columns::samples(shape.n as usize), |b| Ok(b.columns))?,
        accumulate: 0,
    };
    product(device, &FORWARD, shape.k, shape.p * shape.q, &args)
}

/// Input gradient, as [`conv_input_gradient`](super::conv::conv_input_gradient), with the values that
/// [`KeptWeights::gather`] took.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got, lists made without `train` too.
pub fn conv_sparse_input_gradient(
    device: &Device,
    weights: &KeptWeights,
    dy: Slice<f32>,
    accumulate: bool,
    dx: SliceMut<f32>,
) -> Result<()> {
    let (op, shape) = ("conv_sparse_input_gradient", weights.shape);
    check_len(op, "dy", dy.len(), shape.output_len())?;
    check_len(op, "dx", dx.len(), shape.input_len())?;
    let list = weights.input_gradient.as_ref().ok_or_else(|| made_for_evaluation(op))?;
    let args = ConvSparseArgs {
        from: dy.ptr(),
        starts: list.starts.view().ptr(),
        offsets: list.offsets.view().ptr(),
        values: list.values.view().ptr(),
        bias: Ptr::null(),
        to: dx.ptr(),
        count: Ptr::null(),
        shape,
        columns: Columns::samples(shape.n as usize)?,
        accumulate: i32::from(accumulate),
    };
    product(device, &INPUT_GRADIENT, shape.c, shape.h * shape.w, &args)
}

/// Weight gradient, as [`conv_weight_gradient`](super::conv::conv_weight_gradient), of kept weights: the others' places
/// in dw `[k, c, r, s]` are not written.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got, lists made without `train` too.
pub fn conv_sparse_weight_gradient(
    device: &Device,
    weights: &mut KeptWeights,
    x: Slice<f32>,
    dy: Slice<f32>,
    dw: SliceMut<f32>,
) -> Result<()> {
    let (op, shape) = ("conv_sparse_weight_gradient", weights.shape);
    check_len(op, "x", x.len(), shape.input_len())?;
    check_len(op, "dy", dy.len(), shape.output_len())?;
    check_len(op, "dw", dw.len(), shape.weight_len())?;
    if weights.input_gradient.is_none() {
        return Err(made_for_evaluation(op));
    }
    let chunks = weights.chunks.len() / 3;
    if chunks == 0 {
        return Ok(());
    }
    let KeptWeights { forward: list, kept, splits, .. } = weights;
    let (kept, splits, partial) = (*kept, *splits, weights.partial.view_mut().ptr());
    let args = ConvSparseGradientArgs {
        x: x.ptr(),
        dy: dy.ptr(),
        starts: list.starts.view().ptr(),
        offsets: list.offsets.view().ptr(),
        places: list.places.view().ptr(),
        chunks: weights.chunks.view().ptr(),
        partial,
        shape,
        kept: kept as i32,
        splits: splits as i32,
    };
    let [staged, direct] = &WEIGHT_GRADIENT;
    let (kernel, block) = match device.policy() {
        Policy::Direct => (direct, 1),
        Policy::Staged => (staged, THREADS),
    };
    let launch = Launch::new([chunks as u32, splits as u32, 1], block);
    // SAFETY: the lengths of everything that `args` points to were checked against its shape; chunks are those of the
    // list.
    unsafe { device.launch(kernel, launch, &args)? };
    let places = list.places.view().ptr();
    let args = ConvSparseScatterArgs { partial, places, dw: dw.ptr(), kept: kept as i64, splits: splits as i32 };
    // SAFETY: the first `splits * kept` sums were just written; places are below the length of dw.
    unsafe { device.launch(&SCATTER, device.elementwise(kept), &args) }
}
