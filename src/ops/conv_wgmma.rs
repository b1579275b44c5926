//! The products of [`conv`](super::conv) in bf16 by TMA and wgmma (`kernels/conv_wgmma.cu`), on devices that are told to.

use super::conv::{ConvArgs, ConvShape, ConvWeightGradientArgs};
use super::layouts_of;
use super::tiles::{self, Tile};
use crate::device::{Device, Launch, Precision, Ptr, Real, TensorMap, kernel_args};
use crate::error::Result;

kernel_args! {
    pub(super) struct ConvBoxesArgs { w: TensorMap, from: TensorMap, conv: ConvArgs }
    pub(super) struct ConvGradientBoxesArgs { dy: TensorMap, x: TensorMap, conv: ConvWeightGradientArgs }
}
layouts_of!(ConvBoxesArgs, ConvGradientBoxesArgs);

const THREADS: u32 = 288;
/// Elements of a box's row, and rows of most boxes.
const BOX: usize = 64;

impl ConvShape {
    /// Whether this is multiplied by wgmma: boxes end with a pixel's samples, and fewer features than a box has would leave
    /// most of it empty.
    pub(super) fn by_wgmma(&self, device: &Device, precision: Precision) -> bool {
        let [c, k, n] = [self.c, self.k, self.n].map(|x| x as usize);
        device.wgmma() && precision == Precision::Bf16 && n.is_multiple_of(BOX) && c.min(k) >= BOX
    }

    /// Kernel, tiles of channels at taps, row tiles and splits of the weight gradient by wgmma.
    pub(super) fn wgmma_gradient_plan(&self) -> (&'static Tile<ConvGradientBoxesArgs>, [usize; 3]) {
        let [c, k, taps, columns] = [self.c, self.k, self.r * self.s, self.p * self.q * self.n].map(|x| x as usize);
        let weights = c.next_multiple_of(BOX) * taps;
        let (tile, splits) = tiles::wgmma_weight_gradient(k, weights, columns);
        (tile, [weights.div_ceil(tile.columns), k.div_ceil(tile.rows), splits])
    }

    fn input_map(&self, device: &Device, x: Ptr<Real>) -> Result<TensorMap> {
        let size = [self.n, self.w, self.h, self.c].map(|x| x as usize);
        device.tensor_map(x, size, [BOX, 1, 1, BOX])
    }

    fn output_map(&self, device: &Device, y: Ptr<Real>, rows: usize) -> Result<TensorMap> {
        let size = [self.n, self.q, self.p, self.k].map(|x| x as usize);
        device.tensor_map(y, size, [BOX, 1, 1, rows])
    }
}

/// Forward pass or input gradient, by the tile's kernel.
pub(super) fn product(
    device: &Device,
    gradient: bool,
    tile: &'static Tile<ConvBoxesArgs>,
    grid: [usize; 3],
    conv: &ConvArgs,
) -> Result<()> {
    let shape = &conv.shape;
    let [k, taps, pitch] = [shape.k, shape.r * shape.s, shape.channel_pitch()].map(|x| x as usize);
    let (w, from) = if gradient {
        let w = device.tensor_map(conv.w, [pitch, taps, 1, k], [BOX, 1, 1, BOX])?;
        (w, shape.output_map(device, conv.from, BOX)?)
    } else {
        let w = device.tensor_map(conv.w, [pitch * taps, 1, 1, k], [BOX, 1, 1, tile.rows])?;
        (w, shape.input_map(device, conv.from)?)
    };
    let launch = Launch::new(grid.map(|x| x as u32), THREADS);
    // SAFETY: the callers have checked the lengths of everything that `conv` points to against its shape.
    unsafe { device.launch(&tile.kernel, launch, &ConvBoxesArgs { w, from, conv: *conv }) }
}

/// The weight gradient, split as [`ConvShape::wgmma_gradient_plan`] says.
pub(super) fn weight_gradient(device: &Device, conv: &ConvWeightGradientArgs) -> Result<()> {
    let (tile, grid) = conv.shape.wgmma_gradient_plan();
    let dy = conv.shape.output_map(device, conv.dy, tile.rows)?;
    let x = conv.shape.input_map(device, conv.x)?;
    let launch = Launch::new(grid.map(|x| x as u32), THREADS);
    // SAFETY: as in `product`.
    unsafe { device.launch(&tile.kernel, launch, &ConvGradientBoxesArgs { dy, x, conv: *conv }) }
}
