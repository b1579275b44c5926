//! Convolution, `Y = W X` (`kernels/conv.cu`; on the host `conv_direct.cu`, 1x1 ones of stride 1 `linear.cu`). A linear layer is
//! the 1x1 case on a 1x1 image: of tokens with `n` the number of their columns, [`Columns::len`].

use super::linear::{self, LinearShape};
use super::{Columns, SAMPLE_ALIGNMENT, check_len, layouts_of};
use crate::device::{Device, Kernel, Launch, Policy, Ptr, Slice, SliceMut, kernel_args};
use crate::error::{Error, Result};

kernel_args! {
    /// Shape of a convolution: x `[c, h, w, n]`, w `[k, c, r, s]`, y `[k, p, q, n]`.
    pub struct ConvShape {
        pub(super) c: i32, pub(super) h: i32, pub(super) w: i32, pub(super) k: i32, pub(super) r: i32,
        pub(super) s: i32, pub(super) p: i32, pub(super) q: i32, pub(super) stride: i32, pub(super) pad: i32,
        pub(super) n: i32,
    }
    struct ConvArgs {
        from: Ptr<f32>, w: Ptr<f32>, bias: Ptr<f32>, to: Ptr<f32>, count: Ptr<u32>, shape: ConvShape, columns: Columns,
        accumulate: i32,
    }
    struct ConvWeightGradientArgs {
        x: Ptr<f32>, dy: Ptr<f32>, partial: Ptr<f32>, shape: ConvShape, splits: i32,
    }
    struct ConvSumArgs { partial: Ptr<f32>, sum: Ptr<f32>, count: i64, splits: i32 }
    struct ConvBiasGradientArgs { dy: Ptr<f32>, dbias: Ptr<f32>, row: i64 }
}
layouts_of!(ConvShape, ConvArgs, ConvWeightGradientArgs, ConvSumArgs, ConvBiasGradientArgs);

static FORWARD: Product = Product {
    tiles: [
        Kernel::new("conv_forward_16x256_f32"),
        Kernel::new("conv_forward_32x256_f32"),
        Kernel::new("conv_forward_64x64_f32"),
        Kernel::new("conv_forward_64x128_f32"),
        Kernel::new("conv_forward_128x128_f32"),
    ],
    pointwise: None,
    direct: Kernel::new("conv_forward_direct_f32"),
};
static INPUT_GRADIENT: Product = Product {
    tiles: [
        Kernel::new("conv_input_gradient_16x256_f32"),
        Kernel::new("conv_input_gradient_32x256_f32"),
        Kernel::new("conv_input_gradient_64x64_f32"),
        Kernel::new("conv_input_gradient_64x128_f32"),
        Kernel::new("conv_input_gradient_128x128_f32"),
    ],
    pointwise: Some([
        Kernel::new("conv_input_gradient_pointwise_64x64_f32"),
        Kernel::new("conv_input_gradient_pointwise_64x128_f32"),
        Kernel::new("conv_input_gradient_pointwise_128x128_f32"),
    ]),
    direct: Kernel::new("conv_input_gradient_direct_f32"),
};
static WEIGHT_GRADIENT: [Kernel<ConvWeightGradientArgs>; 4] = [
    Kernel::new("conv_weight_gradient_16x96_f32"),
    Kernel::new("conv_weight_gradient_32x96_f32"),
    Kernel::new("conv_weight_gradient_64x96_f32"),
    Kernel::new("conv_weight_gradient_128x96_f32"),
];
static WEIGHT_GRADIENT_DIRECT: Kernel<ConvWeightGradientArgs> = Kernel::new("conv_weight_gradient_direct_f32");
static SUM_SPLITS: Kernel<ConvSumArgs> = Kernel::new("conv_sum_splits_f32");
static BIAS_GRADIENT: Kernel<ConvBiasGradientArgs> = Kernel::new("conv_bias_gradient_f32");

/// Tile sizes of `kernels/conv.cu` and `conv_direct.cu`: rows x columns of the products, rows x taps of the weight gradients.
const TILES: [[usize; 2]; 5] = [[16, 256], [32, 256], [64, 64], [64, 128], [128, 128]];
const GRADIENT_TILES: [[usize; 2]; 4] = [[16, 96], [32, 96], [64, 96], [128, 96]];
const THREADS: u32 = 256;
const DIRECT_ROWS: usize = 64;
const DIRECT_SAMPLES: usize = 64;
const DIRECT_GRADIENT: [usize; 2] = [4, 12];
/// What a split of a direct weight gradient reads, about: its blocks follow each other, and find it in the second-level
/// cache.
const DIRECT_GRADIENT_BYTES: usize = 2 << 20;
/// Blocks that a staged weight gradient aims for: two for each of 132 multiprocessors.
const GRADIENT_BLOCKS: usize = 264;
/// Blocks from which on a larger tile of a product pays: they fill most of 132 multiprocessors twice.
const PRODUCT_BLOCKS: usize = 200;

/// The tilings of one pass.
struct Product {
    tiles: [Kernel<ConvArgs>; 5],
    /// The last three for filters of one tap, where they are others.
    pointwise: Option<[Kernel<ConvArgs>; 3]>,
    direct: Kernel<ConvArgs>,
}

/// Which of [`TILES`] a product of so many rows and columns takes.
fn tile(rows: usize, columns: usize) -> usize {
    let fills = |&tile: &usize| {
        let [height, width] = TILES[tile];
        rows.div_ceil(height) * columns.div_ceil(width) >= PRODUCT_BLOCKS
    };
    let (smallest, larger): (usize, &[usize]) = match rows {
        0..=16 => (0, &[]),
        17..=32 => (1, &[]),
        33..=64 => (2, &[3]),
        _ => (2, &[4, 3]),
    };
    larger.iter().copied().find(fills).unwrap_or(smallest)
}

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
    fn linear(&self, policy: Policy) -> Option<LinearShape> {
        let pointwise = [self.r, self.s, self.stride, self.pad] == [1, 1, 1, 0];
        let [c, k, n] = [self.c, self.k, self.h * self.w * self.n].map(|x| x as usize);
        (policy == Policy::Direct && pointwise).then_some(LinearShape { c, k, n })
    }

    /// Splits of the weight gradient: a function of the shape and the policy alone.
    fn gradient_splits(&self, policy: Policy) -> usize {
        self.linear(policy).map_or_else(|| self.gradient_plan(policy).1[2], |linear| linear.splits())
    }

    /// Kernel, tap tiles, row tiles and splits of the weight gradient.
    fn gradient_plan(&self, policy: Policy) -> (&'static Kernel<ConvWeightGradientArgs>, [usize; 3]) {
        let staged = || GRADIENT_TILES.iter().position(|tile| self.k as usize <= tile[0]).unwrap_or(3);
        let (kernel, [rows, taps]) = match policy {
            Policy::Direct => (&WEIGHT_GRADIENT_DIRECT, DIRECT_GRADIENT),
            Policy::Staged => (&WEIGHT_GRADIENT[staged()], GRADIENT_TILES[staged()]),
        };
        let row_tiles = (self.k as usize).div_ceil(rows);
        let tap_tiles = ((self.c * self.r * self.s) as usize).div_ceil(taps);
        let columns = (self.p * self.q * self.n) as usize;
        let splits = match policy {
            Policy::Direct => (self.gradient_read_bytes() / DIRECT_GRADIENT_BYTES).clamp(1, self.p as usize),
            Policy::Staged => (GRADIENT_BLOCKS / (row_tiles * tap_tiles)).min(columns / 256).max(1),
        };
        (kernel, [tap_tiles, row_tiles, splits])
    }

    /// Bytes of x and dy.
    fn gradient_read_bytes(&self) -> usize {
        (self.input_len() + self.output_len()) * size_of::<f32>()
    }

    /// Elements of scratch memory that [`conv_weight_gradient`] needs on this device.
    pub fn gradient_scratch_len(&self, device: &Device) -> usize {
        match self.gradient_splits(device.policy()) {
            1 => 0,
            splits => splits * self.weight_len(),
        }
    }
}

/// `to_image` of the result; `classes` of its pixels, by their remainder in each direction, are multiplied apart.
fn product(
    device: &Device,
    kernels: &'static Product,
    rows: i32,
    to_image: [i32; 2],
    classes: i32,
    args: &ConvArgs,
) -> Result<()> {
    let [rows, n, classes] = [rows, args.shape.n, classes].map(|x| x as usize);
    let [height, width] = to_image.map(|x| x as usize);
    let (kernel, grid, block) = match device.policy() {
        Policy::Direct => {
            let grid = [height * width, n.div_ceil(DIRECT_SAMPLES), rows.div_ceil(DIRECT_ROWS)];
            (&kernels.direct, grid, 1)
        }
        Policy::Staged => {
            // Of the largest class.
            let columns = height.div_ceil(classes) * width.div_ceil(classes) * n;
            let tile = tile(rows, columns * classes * classes);
            let [tile_rows, tile_columns] = TILES[tile];
            let grid = [columns.div_ceil(tile_columns), rows.div_ceil(tile_rows), classes * classes];
            let of_one_tap = kernels.pointwise.as_ref().filter(|_| args.shape.r * args.shape.s == 1 && tile >= 2);
            (of_one_tap.map_or(&kernels.tiles[tile], |others| &others[tile - 2]), grid, THREADS)
        }
    };
    // SAFETY: the callers have checked the lengths of everything that `args` points to against its shape.
    unsafe { device.launch(kernel, Launch::new(grid.map(|x| x as u32), block), args) }
}

/// A bias `[k]` and which columns get it: padded columns of y are set to zero.
#[derive(Clone, Copy)]
pub struct Bias<'a> {
    /// One value per output channel.
    pub bias: Slice<'a, f32>,
    /// What the shape's `n` is made of: [`Columns::samples`] in a layer of images, [`Columns::tokens`] in one of tokens.
    pub columns: Columns,
    /// Number of true samples, on the device.
    pub count: Slice<'a, u32>,
}

impl Bias<'_> {
    pub(super) fn check(&self, op: &'static str, shape: &ConvShape) -> Result<()> {
        check_len(op, "bias", self.bias.len(), shape.k as usize)?;
        check_len(op, "columns", self.columns.len(), shape.n as usize)?;
        check_len(op, "count", self.count.len(), 1)
    }
}

/// Forward: `y = w * x [+ bias]`. x `[c, h, w, n]`, w `[k, c, r, s]`, y `[k, p, q, n]`, overwritten.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn conv_forward(
    device: &Device,
    shape: &ConvShape,
    x: Slice<f32>,
    w: Slice<f32>,
    bias: Option<Bias>,
    y: SliceMut<f32>,
) -> Result<()> {
    let op = "conv_forward";
    check_len(op, "x", x.len(), shape.input_len())?;
    check_len(op, "w", w.len(), shape.weight_len())?;
    check_len(op, "y", y.len(), shape.output_len())?;
    if let Some(b) = bias {
        b.check(op, shape)?;
    }
    // The columns of a bias are those of one pixel.
    let one_pixel = shape.h * shape.w == 1;
    if let Some(linear) = shape.linear(device.policy()).filter(|_| bias.is_none() || one_pixel) {
        return linear::forward(device, linear, x, w, bias, y);
    }
    let args = ConvArgs {
        from: x.ptr(),
        w: w.ptr(),
        bias: bias.map_or(Ptr::null(), |b| b.bias.ptr()),
        to: y.ptr(),
        count: bias.map_or(Ptr::null(), |b| b.count.ptr()),
        shape: *shape,
        columns: bias.map_or_else(|| Columns::samples(shape.n as usize), |b| Ok(b.columns))?,
        accumulate: 0,
    };
    product(device, &FORWARD, shape.k, [shape.p, shape.q], 1, &args)
}

/// Input gradient: dy `[k, p, q, n]`, w `[k, c, r, s]`, dx `[c, h, w, n]`, overwritten or (`accumulate`) added to.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn conv_input_gradient(
    device: &Device,
    shape: &ConvShape,
    dy: Slice<f32>,
    w: Slice<f32>,
    accumulate: bool,
    dx: SliceMut<f32>,
) -> Result<()> {
    let op = "conv_input_gradient";
    check_len(op, "dy", dy.len(), shape.output_len())?;
    check_len(op, "w", w.len(), shape.weight_len())?;
    check_len(op, "dx", dx.len(), shape.input_len())?;
    if let Some(linear) = shape.linear(device.policy()) {
        return linear::input_gradient(device, linear, dy, w, accumulate, dx);
    }
    let (bias, count) = (Ptr::null(), Ptr::null());
    let accumulate = i32::from(accumulate);
    let (from, to, columns) = (dy.ptr(), dx.ptr(), Columns::samples(shape.n as usize)?);
    let args = ConvArgs { from, w: w.ptr(), bias, to, count, shape: *shape, columns, accumulate };
    product(device, &INPUT_GRADIENT, shape.c, [shape.h, shape.w], shape.stride, &args)
}

/// Weight gradient: x `[c, h, w, n]`, dy `[k, p, q, n]`, dw `[k, c, r, s]`, overwritten. `scratch` has
/// [`ConvShape::gradient_scratch_len`] elements or more. Padded samples of dy are zero.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn conv_weight_gradient(
    device: &Device,
    shape: &ConvShape,
    x: Slice<f32>,
    dy: Slice<f32>,
    scratch: SliceMut<f32>,
    dw: SliceMut<f32>,
) -> Result<()> {
    let op = "conv_weight_gradient";
    check_len(op, "x", x.len(), shape.input_len())?;
    check_len(op, "dy", dy.len(), shape.output_len())?;
    check_len(op, "dw", dw.len(), shape.weight_len())?;
    let needed = shape.gradient_scratch_len(device);
    if scratch.len() < needed {
        check_len(op, "scratch", scratch.len(), needed)?;
    }
    let splits = shape.gradient_splits(device.policy());
    let partial = if splits == 1 { dw.ptr() } else { scratch.ptr() };
    if let Some(linear) = shape.linear(device.policy()) {
        linear::weight_gradient(device, linear, x, dy, partial)?;
    } else {
        let (kernel, grid) = shape.gradient_plan(device.policy());
        let args = ConvWeightGradientArgs { x: x.ptr(), dy: dy.ptr(), partial, shape: *shape, splits: splits as i32 };
        let launch = Launch::new(grid.map(|x| x as u32), device.threads(THREADS));
        // SAFETY: the lengths of everything that `args` points to were checked against its shape.
        unsafe { device.launch(kernel, launch, &args)? };
    }
    if splits > 1 {
        let args = ConvSumArgs { partial, sum: dw.ptr(), count: dw.len() as i64, splits: splits as i32 };
        // SAFETY: the first `splits * dw.len()` elements of scratch were just written.
        unsafe { device.launch(&SUM_SPLITS, device.elementwise(dw.len()), &args)? };
    }
    Ok(())
}

/// Bias gradient: dy `[k, p, q, n]`, dbias `[k]`, overwritten. Padded samples of dy are zero.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn conv_bias_gradient(device: &Device, shape: &ConvShape, dy: Slice<f32>, dbias: SliceMut<f32>) -> Result<()> {
    let op = "conv_bias_gradient";
    check_len(op, "dy", dy.len(), shape.output_len())?;
    check_len(op, "dbias", dbias.len(), shape.k as usize)?;
    let row = (shape.output_len() / shape.k as usize) as i64;
    let args = ConvBiasGradientArgs { dy: dy.ptr(), dbias: dbias.ptr(), row };
    // SAFETY: the lengths of everything that `args` points to were checked.
    unsafe { device.launch(&BIAS_GRADIENT, Launch::new([shape.k as u32, 1, 1], device.threads(THREADS)), &args) }
}
