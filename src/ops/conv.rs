//! Convolution, `Y = W X` (`kernels/conv.cu`, in bf16 `conv_mma.cu`; on the host `conv_direct.cu`, 1x1 ones of stride 1 in f32
//! `linear.cu`). A linear layer is the 1x1 case on a 1x1 image: of tokens with `n` the number of their columns,
//! [`Columns::len`](super::Columns::len). What is done with the sums: [`epilogue`](super::epilogue).
//!
//! Weights are `[k, c, r, s]` in f32; in bf16 `[k, r, s, c]` with channels and filters padded, as [`round`](super::round) writes
//! them. Their gradient is `[k, c, r, s]` in f32.

use super::bias::bias_gradient;
use super::epilogue::{Dx, Epilogue, EpilogueArgs};
use super::linear::{self, LinearShape};
use super::tiles::{self, FORWARD, INPUT_GRADIENT, Product, Tile};
use super::{SAMPLE_ALIGNMENT, check_len, check_precision, conv_wgmma, layouts_of};
use crate::device::{
    Device, Kernel, Launch, Policy, Precision, Ptr, Real, RealKernel, Reals, RealsMut, Slice, SliceMut, kernel_args,
    real_kernel,
};
use crate::error::{Error, Result};

kernel_args! {
    /// Shape of a convolution: x `[c, h, w, n]`, w `[k, c, r, s]`, y `[k, p, q, n]`.
    pub struct ConvShape {
        pub(super) c: i32, pub(super) h: i32, pub(super) w: i32, pub(super) k: i32, pub(super) r: i32,
        pub(super) s: i32, pub(super) p: i32, pub(super) q: i32, pub(super) stride: i32, pub(super) pad: i32,
        pub(super) n: i32,
    }
    pub(super) struct ConvArgs {
        pub(super) from: Ptr<Real>, pub(super) w: Ptr<Real>, to: Ptr<Real>, pub(super) shape: ConvShape,
        epilogue: EpilogueArgs,
    }
    pub(super) struct ConvWeightGradientArgs {
        pub(super) x: Ptr<Real>, pub(super) dy: Ptr<Real>, partial: Ptr<f32>, row_sums: Ptr<f32>,
        pub(super) shape: ConvShape, splits: i32,
    }
    struct ConvSumArgs {
        partial: Ptr<f32>, places: Ptr<u32>, sum: Ptr<f32>, rest: Ptr<f32>, count: i64, weights: i64, splits: i32,
    }
}
layouts_of!(ConvShape, ConvArgs, ConvWeightGradientArgs, ConvSumArgs);

static WEIGHT_GRADIENT_DIRECT: RealKernel<ConvWeightGradientArgs> = real_kernel!("conv_weight_gradient_direct");
static SUM_SPLITS: Kernel<ConvSumArgs> = Kernel::new("conv_sum_splits_f32");

const THREADS: u32 = 256;
/// What a block of `kernels/conv_direct.cu` owns.
const DIRECT_ROWS: usize = 64;
const DIRECT_SAMPLES: usize = 64;
const DIRECT_GRADIENT: [usize; 2] = [4, 12];
/// What a split of a direct weight gradient reads, about: its blocks follow each other, and find it in the second-level
/// cache.
const DIRECT_GRADIENT_BYTES: usize = 2 << 20;

impl std::fmt::Display for ConvShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ConvShape { c, h, w, k, r, s, stride, pad, n, .. } = self;
        write!(f, "{c}x{h}x{w} to {k} by {r}x{s}, stride {stride}, padding {pad}, {n} samples")
    }
}

impl ConvShape {
    /// The shape of a convolution of `n` samples (rounded up to a multiple of 8): input `[c, h, w]`, `k` filters of
    /// `[r, s]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the filter does not fit the padded image, or a size is 0 or too large for an index.
    pub fn new(input: [usize; 3], k: usize, filter: [usize; 2], stride: usize, pad: usize, n: usize) -> Result<Self> {
        let [c, h, w] = input;
        let [r, s] = filter;
        let refuse = |what: &str, expected: &str| {
            let got = format!("input {input:?}, {k} filters {filter:?}, stride {stride}, padding {pad}, {n} samples");
            Err(Error::Shape { op: "convolution", what: what.into(), expected: expected.into(), got })
        };
        if [c, h, w, k, r, s, stride, n].contains(&0) {
            return refuse("sizes", "none to be 0");
        }
        if h + 2 * pad < r || w + 2 * pad < s {
            return refuse("filter", "one that fits the padded image");
        }
        let n = n.next_multiple_of(SAMPLE_ALIGNMENT);
        let (p, q) = ((h + 2 * pad - r) / stride + 1, (w + 2 * pad - s) / stride + 1);
        let largest = [h * w * n, p * q * n, c * r * s, k * r * s, pad + h, pad + w, stride];
        if largest.iter().any(|&size| size >= 1 << 30) {
            return refuse("sizes", "fewer than 2^30 samples times pixels and weights of a filter");
        }
        let [c, h, w, k, r, s, p, q, stride, pad, n] = [c, h, w, k, r, s, p, q, stride, pad, n].map(|x| x as i32);
        Ok(ConvShape { c, h, w, k, r, s, p, q, stride, pad, n })
    }

    /// Elements of x, `[c, h, w, n]`.
    pub fn input_len(&self) -> usize {
        [self.c, self.h, self.w, self.n].map(|x| x as usize).iter().product()
    }

    /// Elements of w, `[k, c, r, s]`.
    pub fn weight_len(&self) -> usize {
        [self.k, self.c, self.r, self.s].map(|x| x as usize).iter().product()
    }

    /// Elements of w in bf16: `[k, r, s, c]`, the channels padded to a multiple of 8 where there are that many, and the
    /// filters too.
    pub fn rounded_len(&self) -> usize {
        let [k, r, s, pitch] = [self.k, self.r, self.s, self.channel_pitch()].map(|x| x as usize);
        k * (r * s * pitch).next_multiple_of(8)
    }

    /// Channels of a filter tap in bf16, padding included.
    pub(super) fn channel_pitch(&self) -> i32 {
        if self.c < 8 { self.c } else { (self.c + 7) / 8 * 8 }
    }

    /// Elements of w as products of this precision read it.
    pub fn read_weight_len(&self, precision: Precision) -> usize {
        match precision {
            Precision::F32 => self.weight_len(),
            Precision::Bf16 => self.rounded_len(),
        }
    }

    /// Elements of y, `[k, p, q, n]`.
    pub fn output_len(&self) -> usize {
        [self.k, self.p, self.q, self.n].map(|x| x as usize).iter().product()
    }

    /// Output channels, `k`.
    pub fn filters(&self) -> usize {
        self.k as usize
    }

    /// Input channels, `c`.
    pub fn channels(&self) -> usize {
        self.c as usize
    }

    /// Output image, `[p, q]`.
    pub fn output_image(&self) -> [usize; 2] {
        [self.p as usize, self.q as usize]
    }

    /// Multiply-adds of one pass.
    pub fn multiply_adds(&self) -> usize {
        self.output_len() * (self.c * self.r * self.s) as usize
    }

    /// The linear layer over all pixels that this is, where the host has kernels of their own for it.
    fn linear(&self, policy: Policy, precision: Precision) -> Option<LinearShape> {
        let pointwise = [self.r, self.s, self.stride, self.pad] == [1, 1, 1, 0];
        let [c, k, n] = [self.c, self.k, self.h * self.w * self.n].map(|x| x as usize);
        (policy == Policy::Direct && precision == Precision::F32 && pointwise).then_some(LinearShape { c, k, n })
    }

    /// Splits of the weight gradient: a function of shape, kind of device and precision alone.
    fn gradient_splits(&self, device: &Device, precision: Precision) -> usize {
        if self.by_wgmma(device, precision) {
            return self.wgmma_gradient_plan().1[2];
        }
        let plan = || self.gradient_plan(device.policy(), precision).1[2];
        self.linear(device.policy(), precision).map_or_else(plan, |linear| linear.splits())
    }

    /// Kernel, tap tiles, row tiles and splits of the weight gradient.
    fn gradient_plan(
        &self,
        policy: Policy,
        precision: Precision,
    ) -> (&'static Kernel<ConvWeightGradientArgs>, [usize; 3]) {
        let [filters, weights] = [self.k, self.c * self.r * self.s].map(|x| x as usize);
        let (kernel, [rows, taps], splits) = match policy {
            Policy::Direct => {
                let splits = (self.gradient_read_bytes(precision) / DIRECT_GRADIENT_BYTES).clamp(1, self.p as usize);
                (WEIGHT_GRADIENT_DIRECT.of(precision), DIRECT_GRADIENT, splits)
            }
            Policy::Staged => {
                let (tile, splits) = tiles::weight_gradient(precision, filters, weights, self.output_columns());
                (&tile.kernel, [tile.rows, tile.columns], splits)
            }
        };
        (kernel, [weights.div_ceil(taps), filters.div_ceil(rows), splits])
    }

    /// Columns of the tiles of y whose statistics the forward pass writes
    /// ([`TileStatistics`](super::epilogue::TileStatistics)) that multiplies all weights, or so many groups of rows; none where no
    /// tensor cores do.
    pub fn statistics_tile(&self, device: &Device, precision: Precision, groups: Option<usize>) -> Option<usize> {
        self.tile_columns(device, precision, &FORWARD, groups)
    }

    /// Tiles of a row of dx, all classes of pixels together, that the input gradient sums for a batch norm
    /// ([`BeforeNorm`](super::epilogue::BeforeNorm)) where it multiplies all weights, or so many groups of rows; none where no
    /// tensor cores do, or where classes differ in size.
    pub fn gradient_tiles(&self, device: &Device, precision: Precision, groups: Option<usize>) -> Option<usize> {
        let tile = self.tile_columns(device, precision, &INPUT_GRADIENT, groups)?;
        let Extent { classes, columns, .. } = self.extent(INPUT_GRADIENT.gradient);
        (self.h % self.stride == 0 && self.w % self.stride == 0).then(|| classes * columns.div_ceil(tile))
    }

    /// What the forward pass makes, or the input gradient.
    pub(super) fn extent(&self, gradient: bool) -> Extent {
        let [rows, height, width, apart] = match gradient {
            false => [self.k, self.p, self.q, 1],
            true => [self.c, self.h, self.w, self.stride],
        }
        .map(|x| x as usize);
        let columns = height.div_ceil(apart) * width.div_ceil(apart) * self.n as usize;
        Extent { rows, pixels: height * width, classes: apart * apart, columns }
    }

    /// Columns of the tiles of a product that multiplies all weights, or so many groups of rows; none where no tensor cores do.
    fn tile_columns(
        &self,
        device: &Device,
        precision: Precision,
        kernels: &'static Product,
        groups: Option<usize>,
    ) -> Option<usize> {
        if !on_tensor_cores(device, precision) {
            return None;
        }
        let Extent { rows, classes, columns, .. } = self.extent(kernels.gradient);
        let wgmma = self.by_wgmma(device, precision);
        Some(match groups {
            Some(groups) => kernels.group_tile(wgmma, groups * classes, columns).columns,
            None if wgmma => kernels.wgmma_tile(rows, columns * classes).columns,
            None => kernels.of(precision, rows, columns * classes, self.r * self.s == 1).columns,
        })
    }

    /// Elements of the statistics of tiles of so many columns.
    pub fn statistics_len(&self, tile: usize) -> usize {
        2 * self.k as usize * self.output_columns().div_ceil(tile)
    }

    /// Columns of y: pixels times samples.
    pub(super) fn output_columns(&self) -> usize {
        [self.p, self.q, self.n].map(|x| x as usize).iter().product()
    }

    /// Bytes of x and dy.
    fn gradient_read_bytes(&self, precision: Precision) -> usize {
        (self.input_len() + self.output_len()) * precision.bytes()
    }

    /// Elements of scratch memory that [`conv_weight_gradient`] needs on this device.
    pub fn gradient_scratch_len(&self, device: &Device, precision: Precision) -> usize {
        self.partial_sums_len(device, precision, on_tensor_cores(device, precision))
    }

    /// Elements of partial sums that it writes, those for the gradient of a bias included or not.
    pub(crate) fn partial_sums_len(&self, device: &Device, precision: Precision, row_sums: bool) -> usize {
        match self.gradient_splits(device, precision) {
            1 => 0,
            splits => splits * self.split_len(row_sums),
        }
    }

    /// Sums of a split of the weight gradient, those for the gradient of a bias included or not.
    fn split_len(&self, row_sums: bool) -> usize {
        self.weight_len() + if row_sums { self.filters() } else { 0 }
    }
}

/// What a product makes.
pub(super) struct Extent {
    /// Features.
    pub rows: usize,
    /// Of each.
    pub pixels: usize,
    /// Classes of pixels, by their remainder in each direction, that a GPU multiplies apart.
    pub classes: usize,
    /// Columns of the largest class: its pixels times samples.
    pub columns: usize,
}

/// Whether products are those of tensor cores, whose epilogues do more than store.
pub(crate) fn on_tensor_cores(device: &Device, precision: Precision) -> bool {
    device.policy() == Policy::Staged && precision == Precision::Bf16
}

/// Forward pass or input gradient by all weights.
fn product(device: &Device, precision: Precision, kernels: &'static Product, args: &ConvArgs) -> Result<()> {
    let Extent { rows, pixels, classes, columns } = args.shape.extent(kernels.gradient);
    let (kernel, grid, block) = match device.policy() {
        Policy::Direct => {
            let grid = [pixels, (args.shape.n as usize).div_ceil(DIRECT_SAMPLES), rows.div_ceil(DIRECT_ROWS)];
            (kernels.direct.of(precision), grid, 1)
        }
        Policy::Staged => {
            if args.shape.by_wgmma(device, precision) {
                let tile = kernels.wgmma_tile(rows, columns * classes);
                let grid = [columns.div_ceil(tile.columns), rows.div_ceil(tile.rows), classes];
                return conv_wgmma::product(device, kernels.gradient, tile, grid, args);
            }
            let one_tap = args.shape.r * args.shape.s == 1;
            let Tile { kernel, rows: tile_rows, columns: tile_columns } =
                kernels.of(precision, rows, columns * classes, one_tap);
            let grid = [columns.div_ceil(*tile_columns), rows.div_ceil(*tile_rows), classes];
            (kernel, grid, THREADS)
        }
    };
    // SAFETY: the callers have checked the lengths of everything that `args` points to against its shape.
    unsafe { device.launch(kernel, Launch::new(grid.map(|x| x as u32), block), args) }
}

/// Forward: `y = w * x [+ bias]`. x `[c, h, w, n]`, y `[k, p, q, n]`, overwritten, and what the epilogue says.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn conv_forward(
    device: &Device,
    shape: &ConvShape,
    x: Reals,
    w: Reals,
    epilogue: Epilogue,
    mut y: RealsMut,
) -> Result<()> {
    let op = "conv_forward";
    let precision = check_precision(op, x, &[("w", w), ("y", y.view())])?;
    check_len(op, "x", x.len(), shape.input_len())?;
    check_len(op, "w", w.len(), shape.read_weight_len(precision))?;
    check_len(op, "y", y.len(), shape.output_len())?;
    epilogue.check(op, shape, x, shape.statistics_tile(device, precision, None))?;
    let tensor_cores = on_tensor_cores(device, precision);
    let bias = epilogue.bias;
    // The columns of a bias are those of one pixel.
    let one_pixel = shape.h * shape.w == 1;
    if let Some(linear) = shape.linear(device.policy(), precision).filter(|_| bias.is_none() || one_pixel) {
        linear::forward(device, linear, x.f32(op)?, w.f32(op)?, bias, y.reborrow().f32(op)?)?;
    } else {
        let epilogue = epilogue.args(shape, tensor_cores)?;
        let args = ConvArgs { from: x.ptr(), w: w.ptr(), to: y.ptr(), shape: *shape, epilogue };
        product(device, precision, &FORWARD, &args)?;
    }
    epilogue.finish(device, shape, tensor_cores, y.view())
}

/// Input gradient: dy `[k, p, q, n]`, dx `[c, h, w, n]`, as `how` says.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn conv_input_gradient(
    device: &Device,
    shape: &ConvShape,
    dy: Reals,
    w: Reals,
    how: Dx,
    mut dx: RealsMut,
) -> Result<()> {
    let op = "conv_input_gradient";
    let precision = check_precision(op, dy, &[("w", w), ("dx", dx.view())])?;
    check_len(op, "dy", dy.len(), shape.output_len())?;
    check_len(op, "w", w.len(), shape.read_weight_len(precision))?;
    check_len(op, "dx", dx.len(), shape.input_len())?;
    how.check(op, shape, dy, shape.gradient_tiles(device, precision, None))?;
    let tensor_cores = on_tensor_cores(device, precision);
    if let Some(linear) = shape.linear(device.policy(), precision) {
        let add = matches!(how, Dx::Add);
        linear::input_gradient(device, linear, dy.f32(op)?, w.f32(op)?, add, dx.reborrow().f32(op)?)?;
    } else {
        let epilogue = how.args(shape, tensor_cores)?;
        let args = ConvArgs { from: dy.ptr(), w: w.ptr(), to: dx.ptr(), shape: *shape, epilogue };
        product(device, precision, &INPUT_GRADIENT, &args)?;
    }
    how.finish(device, tensor_cores, dx)
}

/// Weight gradient: x `[c, h, w, n]`, dy `[k, p, q, n]`, dw `[k, c, r, s]`, overwritten, and so is dbias `[k]` where there is
/// one, by the sums of dy's rows: tensor cores make them of what they read, elsewhere [`bias_gradient`] reads it again.
/// `scratch` has [`ConvShape::gradient_scratch_len`] elements or more. Padded samples of dy are zero.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn conv_weight_gradient(
    device: &Device,
    shape: &ConvShape,
    x: Reals,
    dy: Reals,
    scratch: SliceMut<f32>,
    dw: SliceMut<f32>,
    mut dbias: Option<SliceMut<f32>>,
) -> Result<()> {
    let op = "conv_weight_gradient";
    let precision = check_precision(op, x, &[("dy", dy)])?;
    check_len(op, "x", x.len(), shape.input_len())?;
    check_len(op, "dy", dy.len(), shape.output_len())?;
    check_len(op, "dw", dw.len(), shape.weight_len())?;
    let needed = shape.gradient_scratch_len(device, precision);
    if scratch.len() < needed {
        check_len(op, "scratch", scratch.len(), needed)?;
    }
    if let Some(dbias) = &dbias {
        check_len(op, "dbias", dbias.len(), shape.filters())?;
    }
    let splits = shape.gradient_splits(device, precision);
    let row_sums = dbias.take_if(|_| on_tensor_cores(device, precision));
    let count = shape.split_len(row_sums.is_some());
    // Of a split the sums of rows follow those of weights.
    let (weight_sums, behind) = scratch.split_at(if splits == 1 { 0 } else { shape.weight_len() });
    let partial = if splits == 1 { dw.ptr() } else { weight_sums.ptr() };
    let split_sums = row_sums.as_ref().map(|dbias| if splits == 1 { dbias.ptr() } else { behind.ptr() });
    if let Some(linear) = shape.linear(device.policy(), precision) {
        linear::weight_gradient(device, linear, x.f32(op)?, dy.f32(op)?, partial)?;
    } else {
        let args = ConvWeightGradientArgs {
            x: x.ptr(),
            dy: dy.ptr(),
            partial,
            row_sums: split_sums.unwrap_or_default(),
            shape: *shape,
            splits: splits as i32,
        };
        if shape.by_wgmma(device, precision) {
            conv_wgmma::weight_gradient(device, &args)?;
        } else {
            let (kernel, grid) = shape.gradient_plan(device.policy(), precision);
            let launch = Launch::new(grid.map(|x| x as u32), device.threads(THREADS));
            // SAFETY: the lengths of everything that `args` points to were checked against its shape.
            unsafe { device.launch(kernel, launch, &args)? };
        }
    }
    if splits > 1 {
        let (rest, weights) = (row_sums.map_or(Ptr::null(), |dbias| dbias.ptr()), dw.len() as i64);
        let (count, splits) = (count as i64, splits as i32);
        sum_splits(device, ConvSumArgs { partial, places: Ptr::null(), sum: dw.ptr(), rest, count, weights, splits })?;
    }
    dbias.map_or(Ok(()), |dbias| bias_gradient(device, dy, dbias))
}

/// Adds partial sums `[splits, places]`, which were just written, to where `places` say in dw: each below its length, or a mark
/// for nowhere.
pub(super) fn sum_places(
    device: &Device,
    partial: Ptr<f32>,
    places: Slice<u32>,
    splits: usize,
    dw: SliceMut<f32>,
) -> Result<()> {
    let (count, splits) = (places.len() as i64, splits as i32);
    let (places, sum, rest) = (places.ptr(), dw.ptr(), Ptr::null());
    sum_splits(device, ConvSumArgs { partial, places, sum, rest, count, weights: count, splits })
}

fn sum_splits(device: &Device, args: ConvSumArgs) -> Result<()> {
    let count = args.count as usize;
    // SAFETY: the callers have made sure of what stands above.
    unsafe { device.launch(&SUM_SPLITS, device.elementwise(count), &args) }
}
