//! Weights rounded to bf16, in the order that products read them (`kernels/round.cu`): all, or kept ones.

use std::ops::Range;

use half::bf16;

use super::conv::ConvShape;
use super::{check_len, layouts_of};
use crate::device::{Buffer, Device, Kernel, Launch, Ptr, Slice, SliceMut, kernel_args};
use crate::error::Result;

kernel_args! {
    struct RoundLayerArgs { from: i64, to: i64, filter: i64, k: i32, c: i32, taps: i32, pitch: i32 }
    struct RoundWeightsArgs { from: Ptr<f32>, to: Ptr<bf16>, layers: Ptr<u32> }
    struct GatherWeightsArgs { from: Ptr<f32>, places: Ptr<u32>, to: Ptr<bf16>, count: i64 }
}
layouts_of!(RoundLayerArgs, RoundWeightsArgs, GatherWeightsArgs);

static ROUND: Kernel<RoundWeightsArgs> = Kernel::new("round_weights_bf16");
static GATHER: Kernel<GatherWeightsArgs> = Kernel::new("gather_weights_bf16");

/// Blocks that share a layer on a GPU.
const BLOCKS: u32 = 64;
const THREADS: u32 = 256;
/// Layers start at multiples of this many elements: 128 bytes.
const ALIGNMENT: usize = 64;

/// Which weights of an arena are rounded, and where to in another.
#[derive(Clone, Debug)]
pub struct RoundPlan {
    layers: Vec<RoundLayerArgs>,
    places: Vec<Range<usize>>,
    /// Elements of both arenas, at least.
    from_len: usize,
    len: usize,
}

impl RoundPlan {
    /// Of these layers: where the weights of some begin, and their shapes. They lie one after the other.
    pub fn new(layers: impl IntoIterator<Item = Option<(usize, ConvShape)>>) -> Self {
        let mut plan = RoundPlan { layers: Vec::new(), places: Vec::new(), from_len: 0, len: 0 };
        for layer in layers {
            let Some((from, shape)) = layer else {
                plan.places.push(0..0);
                continue;
            };
            let to = plan.len.next_multiple_of(ALIGNMENT);
            plan.len = to + shape.rounded_len();
            plan.from_len = plan.from_len.max(from + shape.weight_len());
            plan.places.push(to..plan.len);
            let filter = (shape.rounded_len() / shape.filters()) as i64;
            let (k, c, taps, pitch) = (shape.k, shape.c, shape.r * shape.s, shape.channel_pitch());
            plan.layers.push(RoundLayerArgs { from: from as i64, to: to as i64, filter, k, c, taps, pitch });
        }
        plan
    }

    /// Elements of the rounded arena; 0 if no layer has weights.
    #[expect(clippy::len_without_is_empty, reason = "asked for a length to allocate")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where the weights of a layer lie, by its number.
    pub fn place(&self, layer: usize) -> Range<usize> {
        self.places[layer].clone()
    }

    /// The plan on a device; none if no layer has weights.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) when memory runs out.
    pub fn upload(&self, device: &Device) -> Result<Option<RoundTable>> {
        if self.layers.is_empty() {
            return Ok(None);
        }
        let longs = |x: i64| [x as u32, (x >> 32) as u32];
        let words = self.layers.iter().flat_map(|layer| {
            let RoundLayerArgs { from, to, filter, k, c, taps, pitch } = *layer;
            [from, to, filter].into_iter().flat_map(longs).chain([k, c, taps, pitch].map(|x| x as u32))
        });
        let words: Vec<u32> = words.collect();
        Ok(Some(RoundTable { layers: device.upload(&words)?, plan: self.clone() }))
    }
}

/// A [`RoundPlan`] on a device.
pub struct RoundTable {
    layers: Buffer<u32>,
    plan: RoundPlan,
}

/// Rounds the weights of all layers: `to` has [`RoundPlan::len`] elements.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) names the argument, what was expected and what it got.
pub fn round_weights(device: &Device, table: &RoundTable, from: Slice<f32>, to: SliceMut<bf16>) -> Result<()> {
    let plan = &table.plan;
    // Memory is in whole words.
    if to.len() < plan.len {
        check_len("round_weights", "to", to.len(), plan.len)?;
    }
    if from.len() < plan.from_len {
        check_len("round_weights", "from", from.len(), plan.from_len)?;
    }
    let args = RoundWeightsArgs { from: from.ptr(), to: to.ptr(), layers: table.layers.view().ptr() };
    let threads = device.threads(THREADS);
    let blocks = if threads == 1 { 1 } else { BLOCKS };
    let launch = Launch::new([blocks, plan.layers.len() as u32, 1], threads);
    // SAFETY: the plan's offsets and lengths lie within both arenas, as was checked.
    unsafe { device.launch(&ROUND, launch, &args) }
}

/// Rounds the weights at these places, which are below the length of `from` or mark a zero.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if there are not as many places as values.
pub(super) fn gather_weights(device: &Device, from: Slice<f32>, places: Slice<u32>, to: SliceMut<bf16>) -> Result<()> {
    check_len("gather_weights", "to", to.len(), places.len())?;
    let (count, launch) = (places.len() as i64, device.elementwise(places.len()));
    let args = GatherWeightsArgs { from: from.ptr(), places: places.ptr(), to: to.ptr(), count };
    // SAFETY: the callers have made sure of the places.
    unsafe { device.launch(&GATHER, launch, &args) }
}
