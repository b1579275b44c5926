//! Lists of a convolution's kept weights: for each pass that they serve, where each of them reads, as the kernels of
//! `kernels/conv_sparse.cuh`, `kernels/conv_groups_mma.cu` and `kernels/conv_groups_wgmma.cu` take it.

use half::bf16;

use super::conv::ConvShape;
use super::round::gather_weights;
use super::{check_len, layouts_of, tiles};
use crate::device::{Buffer, Device, Policy, Precision, Ptr, RealKernel, Slice, kernel_args, real_kernel};
use crate::error::{Error, Result};

kernel_args! {
    struct ConvSparseGatherArgs { w: Ptr<f32>, places: Ptr<u32>, values: Ptr<f32>, count: i64 }
}
layouts_of!(ConvSparseGatherArgs);

static GATHER: RealKernel<ConvSparseGatherArgs> = real_kernel!("conv_sparse_gather");

/// What the kernels call a row that is not there, or the place of a weight that is not kept.
const NONE: u32 = u32::MAX;
/// Entries of a tile: what a tensor core takes at a time, and of wgmma's a stage.
const TILE_ENTRIES: usize = 16;
const BOX_ENTRIES: usize = 64;
/// The shift of an entry that fills up a tile: above every image that has a list ([`MOST_SIDE`]).
const NOWHERE: u32 = 0x8000_0000;
/// Rows and columns of an image or filter stay below this: sums of two are 16 bits.
const MOST_SIDE: i32 = 1 << 14;

/// Entries of a chunk of a weight gradient, at most: of rows by themselves and of groups, direct and staged. Of direct
/// groups whole tiles of every instruction set.
const DIRECT_CHUNK: usize = 64;
const DIRECT_GROUP_CHUNK: usize = 24;
const STAGED_CHUNK: usize = 8;
const STAGED_GROUP_CHUNK: usize = 4;
/// Samples of a unit of a weight gradient.
pub(super) const BLOCK_SAMPLES: usize = 128;
/// Blocks that a staged weight gradient aims for: four for each of 132 multiprocessors.
const GRADIENT_BLOCKS: usize = 528;
/// What a split of a direct weight gradient reads, about: its blocks follow each other, and find it in the second-level
/// cache.
const DIRECT_GRADIENT_BYTES: usize = 1 << 20;
/// Chunks of a block of a staged weight gradient, a warp each.
pub(super) const BLOCK_CHUNKS: usize = 8;

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

/// How the rows of a list stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Each by itself.
    Rows,
    /// In groups that share what they read, as threads take them.
    Groups,
    /// In groups that share what they read, as tensor cores take them.
    Tiles,
    /// In larger groups, as wgmma takes them.
    Boxes,
}

impl Form {
    /// Of groups of a layer on this device.
    fn of_groups(device: &Device, shape: &ConvShape, precision: Precision) -> Self {
        match (device.policy(), precision) {
            _ if shape.by_wgmma(device, precision) => Form::Boxes,
            (Policy::Staged, Precision::Bf16) => Form::Tiles,
            _ => Form::Groups,
        }
    }

    /// Rows of a group.
    pub(super) fn rows(self) -> usize {
        match self {
            Form::Rows => 1,
            Form::Groups => 8,
            Form::Tiles => 32,
            Form::Boxes => 64,
        }
    }

    /// Entries of a tile, where tensor cores multiply.
    fn tile_entries(self) -> Option<usize> {
        match self {
            Form::Rows | Form::Groups => None,
            Form::Tiles => Some(TILE_ENTRIES),
            Form::Boxes => Some(BOX_ENTRIES),
        }
    }

    pub(super) fn on_tensor_cores(self) -> bool {
        self.tile_entries().is_some()
    }
}

/// Rows of a layer's groups that share what they read, at most: 32 on tensor cores and 64 by wgmma, else 8.
pub fn group_rows(device: &Device, shape: &ConvShape, precision: Precision) -> usize {
    Form::of_groups(device, shape, precision).rows()
}

/// Which rows of a layer share their reads: groups of at most [`group_rows`], each row in one.
pub struct RowGroups {
    /// Of output channels, for the forward pass and the weight gradient.
    pub outputs: Vec<Vec<usize>>,
    /// Of input channels, for the input gradient.
    pub inputs: Vec<Vec<usize>>,
}

impl RowGroups {
    /// Groups of `size` neighbours.
    pub fn neighbours(shape: &ConvShape, size: usize) -> Self {
        let groups = |rows: usize| {
            let all: Vec<usize> = (0..rows).collect();
            all.chunks(size).map(<[usize]>::to_vec).collect()
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
    pub(super) shape: ConvShape,
    /// Of activations, and of the weights as products read them.
    pub(super) precision: Precision,
    kept: usize,
    /// Whether w and dw hold the kept weights alone.
    packed: bool,
    /// Rows of output channels: of the forward pass and the weight gradient.
    pub(super) outputs: Option<List>,
    /// Rows of input channels: of the input gradient.
    inputs: Option<List>,
    /// Of the forward pass, whose values are gathered.
    forward: bool,
    pub(super) weight_gradient: Option<Chunks>,
}

/// How the weight gradient is cut into blocks.
pub(super) struct Chunks {
    /// Group, tap (on tensor cores 0), first entry and the one after the last of each chunk of the list of output channels.
    pub chunks: Buffer<u32>,
    /// Sums of the splits, each in the order of the list's places.
    pub partial: Buffer<f32>,
    pub units: usize,
    pub splits: usize,
}

/// The kept weights by groups of rows, a group by taps; on tensor cores by classes of pixels, then by taps.
pub(super) struct List {
    pub form: Form,
    pub groups: usize,
    /// `[groups, rows of one]`; empty for rows by themselves.
    pub rows: Buffer<u32>,
    /// Where the entries of each slot begin: `[groups, taps]` and one more, on tensor cores `[groups, classes]` and one
    /// more.
    pub starts: Buffer<u32>,
    /// Where each entry reads, in elements, and in rows and columns where a kernel asks for it.
    pub offsets: Buffer<i32>,
    pub shifts: Buffer<u32>,
    /// Of each value, its place in w; in the order of the values.
    pub places: Buffer<u32>,
    /// `[entries, rows of a group]`.
    pub values: Buffer<f32>,
    /// On tensor cores instead: `[entries / 16, 2, 32, 8]`, by wgmma `[entries / 64, 64 rows, 64]`.
    pub left_tiles: Buffer<bf16>,
}

/// What a list is for: its rows are input channels (`transposed`) or output channels, by themselves or in groups; its
/// values will be gathered, or not; its weight gradient summed, or not.
struct ListRequest<'a> {
    groups: Option<&'a [Vec<usize>]>,
    precision: Precision,
    transposed: bool,
    gathered: bool,
    summed: bool,
}

/// An entry as it is sorted: by its slot, its tap, and where it reads; what follows is of one row.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    slot: usize,
    tap: usize,
    offset: i32,
    /// Row of the group.
    lane: usize,
    /// In memory.
    place: u32,
    shift: u32,
}

impl List {
    /// The list of these kept weights, and where its slots start.
    fn new(device: &Device, shape: &ConvShape, kept: &Kept, request: ListRequest) -> Result<(Self, Vec<u32>)> {
        let ListRequest { groups, precision, transposed, gathered, summed } = request;
        let [c, k, r, s] = [shape.c, shape.k, shape.r, shape.s].map(|size| size as usize);
        let (rows, stride) = if transposed { (c, shape.stride as usize) } else { (k, 1) };
        let [height, width] = if transposed { [shape.p, shape.q] } else { [shape.h, shape.w] }.map(i64::from);
        let form = groups.map_or(Form::Rows, |_| Form::of_groups(device, shape, precision));
        let size = form.rows();
        // Of each row, its group and its place in that.
        let mut homes: Vec<(usize, usize)> = (0..rows).map(|row| (row, 0)).collect();
        let mut listed = Vec::new();
        for (number, group) in groups.into_iter().flatten().enumerate() {
            group.iter().enumerate().for_each(|(lane, &row)| homes[row] = (number, lane));
            listed.extend((0..size).map(|lane| group.get(lane).map_or(NONE, |&row| row as u32)));
        }
        let groups = groups.map_or(rows, <[_]>::len);
        // Where a tap stands in the order by remainder, as `place` in the kernel.
        let order = |tap: usize, filter: usize| {
            let rest = tap % stride;
            rest * (filter / stride) + rest.min(filter % stride) + tap / stride
        };
        // The class of the pixels that a tap is for, as `Taps::pixels` numbers them.
        let class = |tap: usize| (tap + stride - shape.pad as usize % stride) % stride;
        let slots = if form.on_tensor_cores() { stride * stride } else { r * s };
        let entry = |(rank, &at): (u32, &u32)| {
            let place = at as usize;
            let [k, c, r0, s0] = [place / (c * r * s), place / (r * s) % c, place / s % r, place % s];
            let (row, channel) = if transposed { (c, k) } else { (k, c) };
            let (group, lane) = homes[row];
            let slot = match form.on_tensor_cores() {
                true => class(r0) * stride + class(s0),
                false => order(r0, r) * s + order(s0, s),
            };
            let [down, across] = [r0, s0].map(|tap| if transposed { -((tap / stride) as i64) } else { tap as i64 });
            let offset = ((channel as i64 * height + down) * width + across) * i64::from(shape.n);
            Entry {
                slot: group * slots + slot,
                tap: r0 * s + s0,
                offset: i32::try_from(offset).expect("refused before"),
                lane,
                place: if kept.packed { rank } else { at },
                shift: (down as u32) << 16 | across as u32 & 0xffff,
            }
        };
        let mut entries: Vec<Entry> = (0u32..).zip(kept.places).map(entry).collect();
        entries.sort_unstable();
        let mut starts = vec![0u32; groups * slots + 1];
        let (mut offsets, mut places, mut shifts) = (Vec::new(), Vec::new(), Vec::new());
        for own in entries.chunk_by(|a, b| a.slot == b.slot) {
            for entry in own.chunk_by(|a, b| (a.tap, a.offset) == (b.tap, b.offset)) {
                offsets.push(entry[0].offset);
                shifts.push(entry[0].shift);
                let first = places.len();
                places.resize(first + size, NONE);
                entry.iter().for_each(|entry| places[first + entry.lane] = entry.place);
            }
            if let Some(tile) = form.tile_entries() {
                offsets.resize(offsets.len().next_multiple_of(tile), 0);
                shifts.resize(offsets.len(), NOWHERE);
                places.resize(offsets.len() * size, NONE);
            }
            starts[own[0].slot + 1] = offsets.len() as u32;
        }
        // Slots without entries begin where they end.
        for slot in 1..starts.len() {
            starts[slot] = starts[slot].max(starts[slot - 1]);
        }
        match form {
            Form::Rows | Form::Groups => {}
            Form::Tiles => {
                places = places.chunks_exact(TILE_ENTRIES * size).flat_map(|tile| as_lanes_hold(tile, size)).collect();
            }
            Form::Boxes => {
                places = places.chunks_exact(BOX_ENTRIES * size).flat_map(|tile| as_rows(tile, size)).collect();
            }
        }
        let tensor_cores = form.on_tensor_cores();
        let shifted = tensor_cores || (summed && form == Form::Rows && device.policy() == Policy::Staged);
        let values = |wanted: bool| if gathered && wanted { places.len() } else { 0 };
        let list = List {
            form,
            groups,
            rows: device.upload(&listed)?,
            starts: device.upload(&starts)?,
            offsets: device.upload(&offsets)?,
            shifts: device.upload(if shifted { &shifts } else { &[] })?,
            places: device.upload(&places)?,
            values: device.alloc(values(!tensor_cores))?,
            left_tiles: device.alloc(values(tensor_cores))?,
        };
        Ok((list, starts))
    }

    fn gather(&mut self, device: &Device, precision: Precision, w: Slice<f32>) -> Result<()> {
        if self.form.on_tensor_cores() {
            return gather_weights(device, w, self.places.view(), self.left_tiles.view_mut());
        }
        let (count, values) = (self.places.len() as i64, self.values.view_mut().ptr());
        let args = ConvSparseGatherArgs { w: w.ptr(), places: self.places.view().ptr(), values, count };
        // SAFETY: places are below the length of w, which the caller has checked, or marks.
        unsafe { device.launch(GATHER.of(precision), device.elementwise(self.places.len()), &args) }
    }

    /// Bytes of its tensors.
    fn bytes(&self) -> usize {
        let words = [&self.rows, &self.starts, &self.shifts, &self.places].map(Buffer::len).iter().sum::<usize>();
        4 * (words + self.offsets.len() + self.values.len()) + 2 * self.left_tiles.len()
    }
}

/// The places of 16 entries of `rows` rows, `[16, rows]`, in the order in which the lanes of a warp hold left tiles of 16
/// rows (`kernels/lib/mma.cuh`): `[rows / 16, 32, 8]`.
fn as_lanes_hold(places: &[u32], rows: usize) -> impl Iterator<Item = u32> {
    (0..places.len()).map(move |at| {
        let (half, lane, element) = (at / 256, at / 8 % 32, at % 8);
        let (word, second) = (element / 2, element % 2);
        let (row, entry) = (half * 16 + lane / 4 + word % 2 * 8, lane % 4 * 2 + word / 2 * 8 + second);
        places[entry * rows + row]
    })
}

/// The places of entries of `rows` rows, row by row.
fn as_rows(places: &[u32], rows: usize) -> impl Iterator<Item = u32> {
    (0..rows).flat_map(move |row| places.iter().skip(row).step_by(rows).copied())
}

impl KeptWeights {
    /// Whether a convolution of this shape can have lists: an index reaches all of its input and its output, 16 bits its
    /// images and filters.
    pub fn reach(shape: &ConvShape) -> bool {
        let sides = [shape.h, shape.w, shape.p, shape.q, shape.r, shape.s, shape.pad];
        shape.input_len().max(shape.output_len()) < 1 << 30 && sides.iter().all(|&side| side < MOST_SIDE)
    }

    /// Lists of kept weights of `[k, c, r, s]` for some passes, of activations of this precision. Rows are taken by
    /// themselves, or in groups.
    ///
    /// # Errors
    /// [`Error::Shape`] if the tensors are beyond [`KeptWeights::reach`], a place beyond the weights or not above the
    /// one before it, or a row not in exactly one group of at most [`group_rows`]; [`Error::Device`] when memory runs
    /// out.
    pub fn new(
        device: &Device,
        shape: &ConvShape,
        precision: Precision,
        kept: &Kept,
        groups: Option<&RowGroups>,
        passes: &[Pass],
    ) -> Result<Self> {
        let refuse = |what: &str, expected: String, got: String| {
            Err(Error::Shape { op: "convolution of kept weights", what: what.into(), expected, got })
        };
        if !Self::reach(shape) {
            let expected = format!("fewer than 2^30 elements, sides below {MOST_SIDE}");
            return refuse("tensors", expected, shape.to_string());
        }
        if let Some(pair) = kept.places.windows(2).find(|pair| pair[0] >= pair[1]) {
            return refuse("places of kept weights", "ascending ones".into(), format!("{pair:?}"));
        }
        if let Some(&last) = kept.places.last().filter(|&&last| last as usize >= shape.weight_len()) {
            return refuse("place of a kept weight", format!("one below {}", shape.weight_len()), last.to_string());
        }
        if let Some(groups) = groups {
            let most = group_rows(device, shape, precision);
            for (rows, groups, what) in [
                (shape.k as usize, &groups.outputs, "groups of output channels"),
                (shape.c as usize, &groups.inputs, "groups of input channels"),
            ] {
                let mut all = groups.concat();
                all.sort_unstable();
                if !all.iter().copied().eq(0..rows) || groups.iter().any(|group| group.len() > most) {
                    return refuse(
                        what,
                        format!("each of {rows} in one group of at most {most}"),
                        format!("{groups:?}"),
                    );
                }
            }
        }
        let [forward, input, weight] = Pass::ALL.map(|pass| passes.contains(&pass));
        let (mut outputs, mut inputs, mut weight_gradient) = (None, None, None);
        if forward || weight {
            let groups = groups.map(|groups| &groups.outputs[..]);
            let request = ListRequest { groups, precision, transposed: false, gathered: forward, summed: weight };
            let (list, starts) = List::new(device, shape, kept, request)?;
            if weight {
                weight_gradient = Some(Chunks::new(device, shape, precision, &list, &starts)?);
            }
            outputs = Some(list);
        }
        if input {
            let groups = groups.map(|groups| &groups.inputs[..]);
            let request = ListRequest { groups, precision, transposed: true, gathered: true, summed: false };
            inputs = Some(List::new(device, shape, kept, request)?.0);
        }
        let (shape, packed, kept) = (*shape, kept.packed, kept.places.len());
        Ok(KeptWeights { shape, precision, kept, packed, outputs, inputs, forward, weight_gradient })
    }

    /// Bytes that the lists take.
    pub fn bytes(&self) -> usize {
        let lists = [&self.outputs, &self.inputs].into_iter().flatten().map(List::bytes).sum::<usize>();
        lists + self.weight_gradient.as_ref().map_or(0, |own| 4 * (own.chunks.len() + own.partial.len()))
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
        forward.into_iter().chain(self.inputs.as_mut()).try_for_each(|list| list.gather(device, self.precision, w))
    }

    /// The list of a pass.
    pub(super) fn list(&self, op: &'static str, pass: Pass) -> Result<&List> {
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
    fn new(device: &Device, shape: &ConvShape, precision: Precision, list: &List, starts: &[u32]) -> Result<Self> {
        let (taps, wgmma) = ((shape.r * shape.s) as usize, list.form == Form::Boxes);
        // Slots that a chunk may lie in, and its entries at most. Chunks of groups have one tap.
        let (step, length) = match (list.form, device.policy()) {
            (Form::Rows, Policy::Direct) => (taps, DIRECT_CHUNK),
            (Form::Rows, Policy::Staged) => (taps, STAGED_CHUNK),
            (Form::Groups, Policy::Direct) => (1, DIRECT_GROUP_CHUNK),
            (Form::Groups, Policy::Staged) => (1, STAGED_GROUP_CHUNK),
            (Form::Tiles | Form::Boxes, _) => (1, tiles::group_gradient(wgmma).columns),
        };
        let slots = (starts.len() - 1) / list.groups;
        let mut chunks = Vec::new();
        for slot in (0..list.groups * slots).step_by(step) {
            let end = starts[slot + step];
            let begins = (starts[slot]..end).step_by(length);
            let (group, tap) = ((slot / slots) as u32, (slot % slots) as u32);
            chunks.extend(begins.flat_map(|begin| [group, tap, begin, end.min(begin + length as u32)]));
        }
        let count = chunks.len() / 4;
        let bytes = (shape.input_len() + shape.output_len()) * precision.bytes();
        let rows = shape.p as usize * (shape.n as usize).div_ceil(BLOCK_SAMPLES);
        let (units, splits) = match (list.form, device.policy()) {
            (Form::Tiles | Form::Boxes, _) => {
                let columns = shape.output_len() / shape.filters();
                (columns, tiles::group_gradient_splits(wgmma, count, columns))
            }
            (_, Policy::Direct) => (rows, bytes / DIRECT_GRADIENT_BYTES),
            (_, Policy::Staged) => (rows * shape.q as usize, GRADIENT_BLOCKS / count.div_ceil(BLOCK_CHUNKS).max(1)),
        };
        let splits = splits.clamp(1, units);
        let partial = device.alloc(splits * list.places.len())?;
        Ok(Chunks { chunks: device.upload(&chunks)?, partial, units, splits })
    }
}
