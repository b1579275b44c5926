//! Convolution with kept weights alone (`kernels/conv_sparse.cu`, on the host `conv_sparse_direct.cu`): what a pruned weight would multiply is never read.

use super::conv::{Bias, ConvShape};
use super::{Columns, check_len, layouts_of};
use crate::device::{Buffer, Device, Kernel, Launch, Policy, Ptr, Slice, SliceMut, kernel_args};
use crate::error::{Error, Result};

kernel_args! {
    struct ConvSparseArgs {
        from: Ptr<f32>, rows: Ptr<u32>, starts: Ptr<u32>, offsets: Ptr<i32>, values: Ptr<f32>, bias: Ptr<f32>,
        to: Ptr<f32>, count: Ptr<u32>, shape: ConvShape, columns: Columns, groups: i32, accumulate: i32,
    }
    struct ConvSparseGradientArgs {
        x: Ptr<f32>, dy: Ptr<f32>, rows: Ptr<u32>, starts: Ptr<u32>, offsets: Ptr<i32>, taps: Ptr<u32>,
        chunks: Ptr<u32>, partial: Ptr<f32>, shape: ConvShape, entries: i32, chunk_count: i32, units: i32, splits: i32,
    }
    struct ConvSparseGatherArgs { w: Ptr<f32>, places: Ptr<u32>, values: Ptr<f32>, count: i64 }
    struct ConvSparseScatterArgs { partial: Ptr<f32>, places: Ptr<u32>, dw: Ptr<f32>, count: i64, splits: i32 }
}
layouts_of!(ConvSparseArgs, ConvSparseGradientArgs, ConvSparseGatherArgs, ConvSparseScatterArgs);

/// A kernel for rows by themselves and one for groups, each staged and direct.
type Kernels<Args> = [[Kernel<Args>; 2]; 2];

static FORWARD: Kernels<ConvSparseArgs> = [
    [Kernel::new("conv_sparse_forward_f32"), Kernel::new("conv_sparse_forward_direct_f32")],
    [Kernel::new("conv_groups_forward_f32"), Kernel::new("conv_groups_forward_direct_f32")],
];
static INPUT_GRADIENT: Kernels<ConvSparseArgs> = [
    [Kernel::new("conv_sparse_input_gradient_f32"), Kernel::new("conv_sparse_input_gradient_direct_f32")],
    [Kernel::new("conv_groups_input_gradient_f32"), Kernel::new("conv_groups_input_gradient_direct_f32")],
];
static WEIGHT_GRADIENT: Kernels<ConvSparseGradientArgs> = [
    [Kernel::new("conv_sparse_weight_gradient_f32"), Kernel::new("conv_sparse_weight_gradient_direct_f32")],
    [Kernel::new("conv_groups_weight_gradient_f32"), Kernel::new("conv_groups_weight_gradient_direct_f32")],
];
static GATHER: Kernel<ConvSparseGatherArgs> = Kernel::new("conv_sparse_gather_f32");
static SCATTER: Kernel<ConvSparseScatterArgs> = Kernel::new("conv_sparse_scatter_f32");

/// Rows of a group that share what they read.
pub const GROUP_ROWS: usize = 8;

/// Tile sizes of `kernels/conv_sparse.cu` and `conv_sparse_direct.cu`, and its mark for what is not there.
const BLOCK_ROWS: usize = 64;
const BLOCK_SAMPLES: usize = 128;
const STAGED_COLUMNS: usize = 128;
const THREADS: u32 = 256;
const ROW_THREADS: u32 = 512;
const WARP_ROWS: usize = 4;
const WARP: u32 = 32;
const CHUNK: usize = 64;
const WARP_ENTRIES: usize = 8;
const GROUP_WARP_ENTRIES: usize = 4;
const NONE: u32 = u32::MAX;
/// Entries of a chunk of a direct weight gradient of groups: whole tiles of every instruction set.
const GROUP_CHUNK: usize = 24;
/// Blocks that a staged weight gradient aims for: four for each of 132 multiprocessors.
const GRADIENT_BLOCKS: usize = 528;
/// What a split of a direct weight gradient reads, about: its blocks follow each other, and find it in the second-level
/// cache.
const DIRECT_GRADIENT_BYTES: usize = 1 << 20;

/// The passes of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// y of x and w.
    Forward,
    /// dx of dy and w.
    InputGradient,
    /// dw of x and dy.
    WeightGradient,
}

impl Pass {
    /// All of a training, in this order; evaluation has the first alone.
    pub const ALL: [Pass; 3] = [Pass::Forward, Pass::InputGradient, Pass::WeightGradient];
}

/// Which rows of a layer share their reads: groups of at most [`GROUP_ROWS`], each row in one.
pub struct RowGroups {
    /// Of output channels, for the forward pass and the weight gradient.
    pub outputs: Vec<Vec<usize>>,
    /// Of input channels, for the input gradient.
    pub inputs: Vec<Vec<usize>>,
}

impl RowGroups {
    /// Groups of neighbours.
    pub fn neighbours(shape: &ConvShape) -> Self {
        let groups = |rows: usize| {
            let all: Vec<usize> = (0..rows).collect();
            all.chunks(GROUP_ROWS).map(<[usize]>::to_vec).collect()
        };
        RowGroups { outputs: groups(shape.filters()), inputs: groups(shape.channels()) }
    }
}

/// Which weights of `[k, c, r, s]` are kept.
#[derive(Clone, Copy)]
pub struct Kept<'a> {
    /// Their places, ascending.
    pub places: &'a [u32],
    /// Whether memory holds them alone, one after the other, or all of w and dw.
    pub packed: bool,
}

/// The kept weights of a convolution, as lists on a device: for each pass that they serve, where each of them reads.
pub struct KeptWeights {
    shape: ConvShape,
    kept: usize,
    /// Whether w and dw hold the kept weights alone.
    packed: bool,
    /// Rows of output channels: of the forward pass and the weight gradient.
    outputs: Option<List>,
    /// Rows of input channels: of the input gradient.
    inputs: Option<List>,
    /// Of the forward pass, whose values are gathered.
    forward: bool,
    weight_gradient: Option<Chunks>,
}

/// How the weight gradient is cut into blocks.
struct Chunks {
    /// Group, tap, first entry and the one after the last of each chunk of the list of output channels.
    chunks: Buffer<u32>,
    /// Sums of the splits, `[splits, entries, rows of a group]`.
    partial: Buffer<f32>,
    /// The filter tap of each entry, where a staged kernel asks for it.
    taps: Buffer<u32>,
    units: usize,
    splits: usize,
}

/// What a list is for: its rows are input channels (`transposed`) or output channels, by themselves or in groups; its
/// values will be gathered, or not.
struct ListRequest<'a> {
    groups: Option<&'a [Vec<usize>]>,
    transposed: bool,
    gathered: bool,
}

/// The kept weights by groups of rows, a group by taps.
struct List {
    /// Rows of a group: 1 or [`GROUP_ROWS`].
    size: usize,
    groups: usize,
    /// `[groups, size]`; empty for rows by themselves.
    rows: Buffer<u32>,
    starts: Buffer<u32>,
    offsets: Buffer<i32>,
    places: Buffer<u32>,
    values: Buffer<f32>,
}

impl List {
    /// The list of these kept weights, where its slots of group and tap start, and the tap of each entry.
    fn new(
        device: &Device,
        shape: &ConvShape,
        kept: &Kept,
        request: ListRequest,
    ) -> Result<(Self, Vec<u32>, Vec<u32>)> {
        let ListRequest { groups, transposed, gathered } = request;
        let [c, k, r, s] = [shape.c, shape.k, shape.r, shape.s].map(|size| size as usize);
        let (rows, stride) = if transposed { (c, shape.stride as usize) } else { (k, 1) };
        let [height, width] = if transposed { [shape.p, shape.q] } else { [shape.h, shape.w] }.map(i64::from);
        let size = if groups.is_some() { GROUP_ROWS } else { 1 };
        // Of each row, its group and its place in that.
        let mut homes: Vec<(usize, usize)> = (0..rows).map(|row| (row, 0)).collect();
        let mut listed = Vec::new();
        for (number, group) in groups.into_iter().flatten().enumerate() {
            group.iter().enumerate().for_each(|(lane, &row)| homes[row] = (number, lane));
            listed.extend((0..GROUP_ROWS).map(|lane| group.get(lane).map_or(NONE, |&row| row as u32)));
        }
        let groups = groups.map_or(rows, <[_]>::len);
        // Where a tap stands in the order by remainder, as `place` in the kernel.
        let order = |tap: usize, filter: usize| {
            let rest = tap % stride;
            rest * (filter / stride) + rest.min(filter % stride) + tap / stride
        };
        // Slot of group and tap, where it reads, which row of the group, place in memory, tap.
        let mut entries: Vec<(u32, i32, u32, u32, u32)> = (0u32..)
            .zip(kept.places)
            .map(|(rank, &at)| {
                let place = at as usize;
                let [k, c, r0, s0] = [place / (c * r * s), place / (r * s) % c, place / s % r, place % s];
                let (row, channel) = if transposed { (c, k) } else { (k, c) };
                let (group, lane) = homes[row];
                let (slot, tap) = (group * r * s + order(r0, r) * s + order(s0, s), r0 * s + s0);
                let [r0, s0] = [r0, s0].map(|tap| if transposed { -((tap / stride) as i64) } else { tap as i64 });
                let offset = ((channel as i64 * height + r0) * width + s0) * i64::from(shape.n);
                let stored = if kept.packed { rank } else { at };
                (slot as u32, i32::try_from(offset).expect("refused before"), lane as u32, stored, tap as u32)
            })
            .collect();
        entries.sort_unstable();
        let mut starts = vec![0u32; groups * r * s + 1];
        let (mut offsets, mut places, mut taps) = (Vec::new(), Vec::new(), Vec::new());
        let mut last = None;
        for (slot, offset, lane, place, tap) in entries {
            if last.replace((slot, offset)) != Some((slot, offset)) {
                starts[slot as usize + 1] += 1;
                offsets.push(offset);
                taps.push(tap);
                places.resize(places.len() + size, NONE);
            }
            let first = places.len() - size;
            places[first + lane as usize] = place;
        }
        for slot in 1..starts.len() {
            starts[slot] += starts[slot - 1];
        }
        let list = List {
            size,
            groups,
            rows: device.upload(&listed)?,
            starts: device.upload(&starts)?,
            offsets: device.upload(&offsets)?,
            places: device.upload(&places)?,
            values: device.alloc(if gathered { places.len() } else { 0 })?,
        };
        Ok((list, starts, taps))
    }

    fn gather(&mut self, device: &Device, w: Slice<f32>) -> Result<()> {
        let (count, values) = (self.places.len() as i64, self.values.view_mut().ptr());
        let args = ConvSparseGatherArgs { w: w.ptr(), places: self.places.view().ptr(), values, count };
        // SAFETY: places are below the length of w, which the caller has checked, or marks.
        unsafe { device.launch(&GATHER, device.elementwise(self.places.len()), &args) }
    }

    /// Bytes of its tensors.
    fn bytes(&self) -> usize {
        let words = [&self.rows, &self.starts, &self.places].map(Buffer::len).iter().sum::<usize>();
        4 * (words + self.offsets.len() + self.values.len())
    }
}

impl KeptWeights {
    /// Whether a convolution of this shape can have lists: an index reaches all of its input and its output.
    pub fn reach(shape: &ConvShape) -> bool {
        shape.input_len().max(shape.output_len()) < 1 << 30
    }

    /// Lists of kept weights of `[k, c, r, s]` for some passes. Rows are taken by themselves, or in groups.
    ///
    /// # Errors
    /// [`Error::Shape`] if the tensors are beyond [`KeptWeights::reach`], a place beyond the weights or not above the
    /// one before it, or a row not in exactly one group of at most [`GROUP_ROWS`]; [`Error::Device`] when memory runs
    /// out.
    pub fn new(
        device: &Device,
        shape: &ConvShape,
        kept: &Kept,
        groups: Option<&RowGroups>,
        passes: &[Pass],
    ) -> Result<Self> {
        let refuse = |what: &str, expected: String, got: String| {
            Err(Error::Shape { op: "convolution of kept weights", what: what.into(), expected, got })
        };
        if !Self::reach(shape) {
            let len = shape.input_len().max(shape.output_len());
            return refuse("elements of a tensor", "fewer than 2^30".into(), len.to_string());
        }
        if let Some(pair) = kept.places.windows(2).find(|pair| pair[0] >= pair[1]) {
            return refuse("places of kept weights", "ascending ones".into(), format!("{pair:?}"));
        }
        if let Some(&last) = kept.places.last().filter(|&&last| last as usize >= shape.weight_len()) {
            return refuse("place of a kept weight", format!("one below {}", shape.weight_len()), last.to_string());
        }
        if let Some(groups) = groups {
            for (rows, groups, what) in [
                (shape.k as usize, &groups.outputs, "groups of output channels"),
                (shape.c as usize, &groups.inputs, "groups of input channels"),
            ] {
                let mut all = groups.concat();
                all.sort_unstable();
                if !all.iter().copied().eq(0..rows) || groups.iter().any(|group| group.len() > GROUP_ROWS) {
                    let expected = format!("each of {rows} in one group of at most {GROUP_ROWS}");
                    return refuse(what, expected, format!("{groups:?}"));
                }
            }
        }
        let [forward, input, weight] = Pass::ALL.map(|pass| passes.contains(&pass));
        let (mut outputs, mut inputs, mut weight_gradient) = (None, None, None);
        if forward || weight {
            let groups = groups.map(|groups| &groups.outputs[..]);
            let request = ListRequest { groups, transposed: false, gathered: forward };
            let (list, starts, taps) = List::new(device, shape, kept, request)?;
            if weight {
                weight_gradient = Some(Chunks::new(device, shape, &list, &starts, &taps)?);
            }
            outputs = Some(list);
        }
        if input {
            let groups = groups.map(|groups| &groups.inputs[..]);
            inputs = Some(List::new(device, shape, kept, ListRequest { groups, transposed: true, gathered: true })?.0);
        }
        let (shape, packed, kept) = (*shape, kept.packed, kept.places.len());
        Ok(KeptWeights { shape, kept, packed, outputs, inputs, forward, weight_gradient })
    }

    /// Bytes that the lists take.
    pub fn bytes(&self) -> usize {
        let lists = [&self.outputs, &self.inputs].into_iter().flatten().map(List::bytes).sum::<usize>();
        lists
            + self.weight_gradient.as_ref().map_or(0, |own| 4 * (own.chunks.len() + own.taps.len() + own.partial.len()))
    }

    /// Elements of w and dw.
    pub fn weight_len(&self) -> usize {
        if self.packed { self.kept } else { self.shape.weight_len() }
    }

    /// Takes the values of the kept weights from w, for the passes that follow.
    ///
    /// # Errors
    /// [`Error::Shape`] if w is of another size.
    pub fn gather(&mut self, device: &Device, w: Slice<f32>) -> Result<()> {
        check_len("conv_sparse_gather", "w", w.len(), self.weight_len())?;
        if self.kept == 0 {
            return Ok(());
        }
        let forward = self.outputs.as_mut().filter(|_| self.forward);
        forward.into_iter().chain(self.inputs.as_mut()).try_for_each(|list| list.gather(device, w))
    }

    /// The list of a pass.
    fn list(&self, op: &'static str, pass: Pass) -> Result<&List> {
        let list = match pass {
            Pass::Forward => self.outputs.as_ref().filter(|_| self.forward),
            Pass::InputGradient => self.inputs.as_ref(),
            Pass::WeightGradient => self.outputs.as_ref().filter(|_| self.weight_gradient.is_some()),
        };
        list.ok_or_else(|| {
            let (expected, got) = (format!("lists for the pass {pass:?}"), "lists for others".into());
            Error::Shape { op, what: "kept weights".into(), expected, got }
        })
    }
}

impl Chunks {
    /// Chunks of the list and splits: a function of shape, mask and policy alone.
    fn new(device: &Device, shape: &ConvShape, list: &List, starts: &[u32], entry_taps: &[u32]) -> Result<Self> {
        let taps = (shape.r * shape.s) as usize;
        // Chunks of groups have one tap.
        let (step, length) = match (list.size, device.policy()) {
            (1, Policy::Direct) => (taps, CHUNK),
            (1, Policy::Staged) => (taps, WARP_ENTRIES),
            (_, Policy::Direct) => (1, GROUP_CHUNK),
            (_, Policy::Staged) => (1, GROUP_WARP_ENTRIES),
        };
        let mut chunks = Vec::new();
        for slot in (0..list.groups * taps).step_by(step) {
            let end = starts[slot + step];
            let begins = (starts[slot]..end).step_by(length);
            let (group, tap) = ((slot / taps) as u32, (slot % taps) as u32);
            chunks.extend(begins.flat_map(|begin| [group, tap, begin, end.min(begin + length as u32)]));
        }
        let bytes = (shape.input_len() + shape.output_len()) * size_of::<f32>();
        let rows = shape.p as usize * (shape.n as usize).div_ceil(BLOCK_SAMPLES);
        let (units, splits) = match device.policy() {
            Policy::Direct => (rows, bytes / DIRECT_GRADIENT_BYTES),
            Policy::Staged => (rows * shape.q as usize, GRADIENT_BLOCKS / staged_blocks(chunks.len() / 4).max(1)),
        };
        let splits = splits.clamp(1, units);
        let partial = device.alloc(splits * list.places.len())?;
        let asked = list.size == 1 && device.policy() == Policy::Staged;
        let taps = device.upload(if asked { entry_taps } else { &[] })?;
        Ok(Chunks { chunks: device.upload(&chunks)?, partial, taps, units, splits })
    }
}

/// Blocks of a split of a staged weight gradient.
fn staged_blocks(chunks: usize) -> usize {
    chunks.div_ceil((THREADS / WARP) as usize)
}

fn product(
    device: &Device,
    kernels: &'static Kernels<ConvSparseArgs>,
    list: &List,
    pixels: i32,
    args: &ConvSparseArgs,
) -> Result<()> {
    let [pixels, n] = [pixels, args.shape.n].map(|x| x as usize);
    let [staged, direct] = &kernels[usize::from(list.size > 1)];
    let (kernel, grid, block) = match device.policy() {
        Policy::Direct => {
            (direct, [pixels, n.div_ceil(BLOCK_SAMPLES), list.groups.div_ceil(BLOCK_ROWS / list.size)], 1)
        }
        Policy::Staged => {
            let (most, groups) = if list.size == 1 { (ROW_THREADS, WARP_ROWS) } else { (THREADS, 1) };
            // Fewer warps where there are fewer rows.
            let warps = list.groups.div_ceil(groups);
            let threads = most.min(warps as u32 * WARP);
            let columns = (pixels * n).div_ceil(STAGED_COLUMNS);
            (staged, [columns, warps.div_ceil((threads / WARP) as usize), 1], threads)
        }
    };
    // SAFETY: the callers have checked the lengths of everything that `args` points to against its shape; rows, offsets
    // and starts are those of the shape.
    unsafe { device.launch(kernel, Launch::new(grid.map(|x| x as u32), block), args) }
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
    let list = weights.list(op, Pass::Forward)?;
    let args = ConvSparseArgs {
        from: x.ptr(),
        rows: list.rows.view().ptr(),
        starts: list.starts.view().ptr(),
        offsets: list.offsets.view().ptr(),
        values: list.values.view().ptr(),
        bias: bias.map_or(Ptr::null(), |b| b.bias.ptr()),
        to: y.ptr(),
        count: bias.map_or(Ptr::null(), |b| b.count.ptr()),
        shape,
        columns: bias.map_or_else(|| Columns::samples(shape.n as usize), |b| Ok(b.columns))?,
        groups: list.groups as i32,
        accumulate: 0,
    };
    product(device, &FORWARD, list, shape.p * shape.q, &args)
}

/// Input gradient, as [`conv_input_gradient`](super::conv::conv_input_gradient), with the values that
/// [`KeptWeights::gather`] took.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got, lists for other passes too.
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
    let list = weights.list(op, Pass::InputGradient)?;
    let args = ConvSparseArgs {
        from: dy.ptr(),
        rows: list.rows.view().ptr(),
        starts: list.starts.view().ptr(),
        offsets: list.offsets.view().ptr(),
        values: list.values.view().ptr(),
        bias: Ptr::null(),
        to: dx.ptr(),
        count: Ptr::null(),
        shape,
        columns: Columns::samples(shape.n as usize)?,
        groups: list.groups as i32,
        accumulate: i32::from(accumulate),
    };
    product(device, &INPUT_GRADIENT, list, shape.h * shape.w, &args)
}

/// Weight gradient, as [`conv_weight_gradient`](super::conv::conv_weight_gradient), of kept weights: the others' places
/// in dw `[k, c, r, s]`, where it has them, are not written.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got, lists for other passes too.
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
    check_len(op, "dw", dw.len(), weights.weight_len())?;
    weights.list(op, Pass::WeightGradient)?;
    let (Some(list), Some(own)) = (&weights.outputs, &mut weights.weight_gradient) else { return Ok(()) };
    let chunks = own.chunks.len() / 4;
    if chunks == 0 {
        return Ok(());
    }
    let partial = own.partial.view_mut().ptr();
    let args = ConvSparseGradientArgs {
        x: x.ptr(),
        dy: dy.ptr(),
        rows: list.rows.view().ptr(),
        starts: list.starts.view().ptr(),
        offsets: list.offsets.view().ptr(),
        taps: own.taps.view().ptr(),
        chunks: own.chunks.view().ptr(),
        partial,
        shape,
        entries: list.offsets.len() as i32,
        chunk_count: chunks as i32,
        units: own.units as i32,
        splits: own.splits as i32,
    };
    let [staged, direct] = &WEIGHT_GRADIENT[usize::from(list.size > 1)];
    let (kernel, blocks, block) = match device.policy() {
        Policy::Direct => (direct, chunks, 1),
        Policy::Staged => (staged, staged_blocks(chunks), THREADS),
    };
    let launch = Launch::new([blocks as u32, own.splits as u32, 1], block);
    // SAFETY: the lengths of everything that `args` points to were checked against its shape; chunks are those of the
    // list.
    unsafe { device.launch(kernel, launch, &args)? };
    let (places, count) = (list.places.view().ptr(), list.places.len());
    let args = ConvSparseScatterArgs { partial, places, dw: dw.ptr(), count: count as i64, splits: own.splits as i32 };
    // SAFETY: the first `splits * count` sums were just written; places are below the length of dw, or marks.
    unsafe { device.launch(&SCATTER, device.elementwise(count), &args) }
}
