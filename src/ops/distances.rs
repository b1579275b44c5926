//! Distances between probes as a layer sees them (`kernels/distances.cu`, `kernels/distance_matrix.cu`).

use super::{Columns, check_len, check_precision, layouts_of};
use crate::device::{
    Device, Kernel, Launch, Policy, Precision, Ptr, Real, RealKernel, Reals, SliceMut, kernel_args, real_kernel,
};
use crate::error::{Error, Result};

kernel_args! {
    struct RepresentationArgs {
        x: Ptr<Real>, out: Ptr<f32>, elements: i64, positions: i64, n: i32, pooled: i32, columns: Columns,
    }
    struct SquaredDistancesArgs {
        x: Ptr<Real>, y: Ptr<Real>, out: Ptr<f32>, features: i64, x_pitch: i64, y_pitch: i64, pitch: i64, x_n: i32,
        y_n: i32, rows: i32, columns: i32, splits: i32, upper: i32,
    }
    struct DistanceMatrixArgs {
        squared: Ptr<f32>, c: Ptr<f32>, largest: Ptr<f32>, squared_pitch: i64, pitch: i64, n: i32, splits: i32,
        cosine: i32,
    }
}
layouts_of!(RepresentationArgs, SquaredDistancesArgs, DistanceMatrixArgs);

static REPRESENTATION: RealKernel<RepresentationArgs> = real_kernel!("representation");
static STAGED: RealKernel<SquaredDistancesArgs> = real_kernel!("squared_distances");
static DIRECT: RealKernel<SquaredDistancesArgs> = real_kernel!("squared_distances_direct");
static MATRIX: Kernel<DistanceMatrixArgs> = Kernel::new("distance_matrix_f32");
static SCALE: Kernel<DistanceMatrixArgs> = Kernel::new("distance_scale_f32");

/// Tile of `kernels/distances.cu`.
const TILE: usize = 64;
const THREADS: u32 = 256;
/// Blocks that splits of the features aim for, on any device, and features of a split at least.
const BLOCKS: usize = 264;
const SPLIT_FEATURES: usize = 256;
/// Probes, at most: an n x n matrix has places below 2^31.
pub const MOST_PROBES: usize = 1 << 15;

/// How far apart two representations are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// The length of their difference.
    Euclidean,
    /// 1 - the cosine of the angle between them; 1 between a vector of length 0 and another.
    Cosine,
}

/// Elements from one row of a matrix of n columns to the next.
pub fn pitch(n: usize) -> usize {
    n.next_multiple_of(16)
}

/// A layer's output, `[features, positions, columns]`, for the first `n` samples of its columns.
#[derive(Clone, Copy, Debug)]
pub struct RepresentationShape {
    /// Channels, or features of a token.
    pub features: usize,
    /// Pixels of an image; 1 for tokens.
    pub positions: usize,
    /// What a row is made of.
    pub columns: Columns,
    /// Probes.
    pub n: usize,
    /// Means over positions and tokens, instead of all values of a probe.
    pub pooled: bool,
}

impl RepresentationShape {
    /// Rows of [`representation`]'s result.
    pub fn rows(&self) -> usize {
        self.features * if self.pooled { 1 } else { self.positions * self.columns.tokens as usize }
    }

    /// Columns of [`representation`]'s result: samples, padding included.
    pub fn samples(&self) -> usize {
        self.columns.n as usize
    }

    /// Whether the output is its own representation: nothing to pool, samples side by side.
    pub fn is_plain(&self) -> bool {
        self.columns.row == 1 && (!self.pooled || self.positions == 1)
    }
}

/// What [`distance_matrix`] compares: probes as columns of a matrix, whose rows are features.
#[derive(Clone, Copy, Debug)]
pub struct DistanceShape {
    /// Rows of x.
    pub features: usize,
    /// Columns of x, padding included.
    pub columns: usize,
    /// Probes.
    pub n: usize,
}

impl DistanceShape {
    /// Ranges of the features that are summed apart: a function of the shape alone.
    fn splits(&self) -> usize {
        let tiles = (self.n + 1).div_ceil(TILE);
        (BLOCKS / (tiles * (tiles + 1) / 2)).clamp(1, self.features.div_ceil(SPLIT_FEATURES).max(1))
    }

    /// Elements of scratch memory that [`distance_matrix`] needs.
    pub fn scratch_len(&self) -> usize {
        self.splits() * (self.n + 1) * pitch(self.n + 1)
    }

    fn check(&self, op: &'static str) -> Result<()> {
        if (1..=MOST_PROBES.min(self.columns)).contains(&self.n) && self.columns.is_multiple_of(super::SAMPLE_ALIGNMENT)
        {
            return Ok(());
        }
        let expected = format!("1 to {MOST_PROBES} probes, in columns padded to a multiple of 8");
        let got = format!("{} in {}", self.n, self.columns);
        Err(Error::Shape { op, what: "probes".into(), expected, got })
    }
}

/// Makes f32 rows of features whose samples lie side by side, `[rows, columns.n]`, of what a layer gives: all values of a
/// sample, or their means over positions and tokens. Samples from n on become zero.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn representation(device: &Device, shape: &RepresentationShape, x: Reals, out: SliceMut<f32>) -> Result<()> {
    let (op, columns) = ("representation", shape.columns);
    check_len(op, "x", x.len(), shape.features * shape.positions * columns.len())?;
    check_len(op, "out", out.len(), shape.rows() * shape.samples())?;
    let args = RepresentationArgs {
        x: x.ptr(),
        out: out.ptr(),
        elements: out.len() as i64,
        positions: shape.positions as i64,
        n: shape.n.min(shape.samples()) as i32,
        pooled: i32::from(shape.pooled),
        columns,
    };
    // SAFETY: the lengths of everything that `args` points to were checked.
    unsafe { device.launch(REPRESENTATION.of(x.precision()), device.elementwise(out.len()), &args) }
}

fn launch_squared(device: &Device, precision: Precision, args: &SquaredDistancesArgs) -> Result<()> {
    let [rows, columns] = [args.rows, args.columns].map(|count| (count as usize).div_ceil(TILE) as u32);
    let (kernel, threads) = match device.policy() {
        Policy::Staged => (&STAGED, THREADS),
        Policy::Direct => (&DIRECT, 1),
    };
    // SAFETY: the callers have checked the lengths of everything that `args` points to, and that x and y are of the
    // precision.
    unsafe { device.launch(kernel.of(precision), Launch::new([columns, rows, args.splits as u32], threads), args) }
}

/// Distances between the first n columns of x `[features, columns]`: c `[n, pitch(n)]`, symmetric, divided by the
/// largest; `largest` `[n + 1]` gets that of each row and of all, 0 if all columns are equal, not finite if a value of x is
/// not. `scratch` has [`DistanceShape::scratch_len`] elements.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn distance_matrix(
    device: &Device,
    shape: &DistanceShape,
    metric: Metric,
    x: Reals,
    scratch: SliceMut<f32>,
    c: SliceMut<f32>,
    largest: SliceMut<f32>,
) -> Result<()> {
    let op = "distance_matrix";
    let DistanceShape { features, columns, n } = *shape;
    shape.check(op)?;
    check_len(op, "x", x.len(), features * columns)?;
    check_len(op, "scratch", scratch.len(), shape.scratch_len())?;
    check_len(op, "c", c.len(), n * pitch(n))?;
    check_len(op, "largest", largest.len(), n + 1)?;
    let squared_pitch = pitch(n + 1);
    let splits = shape.splits();
    let args = SquaredDistancesArgs {
        x: x.ptr(),
        y: x.ptr(),
        out: scratch.ptr(),
        features: features as i64,
        x_pitch: columns as i64,
        y_pitch: columns as i64,
        pitch: squared_pitch as i64,
        x_n: n as i32,
        y_n: n as i32,
        rows: n as i32 + 1,
        columns: n as i32 + 1,
        splits: splits as i32,
        upper: 1,
    };
    launch_squared(device, x.precision(), &args)?;
    let args = DistanceMatrixArgs {
        squared: scratch.ptr(),
        c: c.ptr(),
        largest: largest.ptr(),
        squared_pitch: squared_pitch as i64,
        pitch: pitch(n) as i64,
        n: n as i32,
        splits: splits as i32,
        cosine: i32::from(metric == Metric::Cosine),
    };
    let rows = Launch::new([n as u32, 1, 1], device.threads(THREADS));
    // SAFETY: the lengths of everything that `args` points to were checked.
    unsafe {
        device.launch(&MATRIX, rows, &args)?;
        device.launch(&SCALE, rows, &args)
    }
}

/// Squared distances between the first x_n columns of x `[features, pitch(x_n)]` and the first y_n of y, `[x_n,
/// pitch(y_n)]`.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn squared_distances(
    device: &Device,
    features: usize,
    [x_n, y_n]: [usize; 2],
    x: Reals,
    y: Reals,
    out: SliceMut<f32>,
) -> Result<()> {
    let op = "squared_distances";
    check_len(op, "x", x.len(), features * pitch(x_n))?;
    check_len(op, "y", y.len(), features * pitch(y_n))?;
    check_len(op, "out", out.len(), x_n * pitch(y_n))?;
    let precision = check_precision(op, x, &[("y", y)])?;
    for n in [x_n, y_n] {
        DistanceShape { features, columns: pitch(n), n }.check(op)?;
    }
    let args = SquaredDistancesArgs {
        x: x.ptr(),
        y: y.ptr(),
        out: out.ptr(),
        features: features as i64,
        x_pitch: pitch(x_n) as i64,
        y_pitch: pitch(y_n) as i64,
        pitch: pitch(y_n) as i64,
        x_n: x_n as i32,
        y_n: y_n as i32,
        rows: x_n as i32,
        columns: y_n as i32,
        splits: 1,
        upper: 0,
    };
    launch_squared(device, precision, &args)
}
