//! Gromov-Wasserstein couplings of pairs of layers, many at a time (`kernels/gw.cu`, on the host `gw_direct.cu`).

use ndarray::{Array2, ArrayView2};

use super::distances::{pitch, squared_distances};
use super::layouts_of;
use crate::device::{Buffer, Device, Kernel, Launch, Policy, Ptr, kernel_args};
use crate::error::{Error, Result};

kernel_args! {
    struct GwArgs {
        layers: Ptr<u32>, pairs: Ptr<u32>, matrices: Ptr<f32>, means: Ptr<f32>, constants: Ptr<f64>, logs: Ptr<f32>,
        plans: Ptr<f32>, products: Ptr<f32>, partial: Ptr<f64>, values: Ptr<f64>, done: Ptr<u32>, slot: i64, tiles: i32,
        first: i32, scale: f32, tolerance: f32, enough: f32, iterations: i32,
    }
}
layouts_of!(GwArgs);

/// A kernel for each policy: staged, direct.
type Kernels = [Kernel<GwArgs>; 2];

static RIGHT: Kernels = [Kernel::new("gw_right_product_f32"), Kernel::new("gw_right_product_direct_f32")];
static STEP: Kernels = [Kernel::new("gw_step_product_f32"), Kernel::new("gw_step_product_direct_f32")];
static VALUE: Kernels = [Kernel::new("gw_value_product_f32"), Kernel::new("gw_value_product_direct_f32")];
/// Of so many rows and columns, at most, by so many threads. The first keeps half of a matrix in 146 KiB of shared memory, for
/// which GPUs of 99 KiB take the second.
static SCALE: [(usize, u32, Kernel<GwArgs>); 4] = [
    (256, 512, Kernel::new("gw_scale_256_f32")),
    (512, 512, Kernel::new("gw_scale_512_f32")),
    (1024, 256, Kernel::new("gw_scale_1024_f32")),
    (MOST_COUPLED, 256, Kernel::new("gw_scale_2048_f32")),
];
static SCALE_DIRECT: Kernel<GwArgs> = Kernel::new("gw_scale_direct_f32");
static BEGIN: Kernel<GwArgs> = Kernel::new("gw_begin_f32");
static ROUND: Kernel<GwArgs> = Kernel::new("gw_round_f32");

/// Probes of a layer that can be coupled, at most.
pub const MOST_COUPLED: usize = 2048;
/// Tiles of a product of `kernels/gw.cu` and of `gw_direct.cu`.
const STAGED_TILE: usize = 128;
const DIRECT_TILE: usize = 64;
const THREADS: u32 = 256;
/// Blocks of a grid in its second and third dimension, at most.
const MOST_COUPLINGS: usize = 65_535;

/// The distance matrices of layers on a device, one after the other, and what couplings ask of them.
pub struct Layers {
    /// Where each matrix begins, in 16 elements; where its means begin; n.
    table: Buffer<u32>,
    matrices: Buffer<f32>,
    means: Buffer<f32>,
    /// For each layer `[samples of a quantile function, pitch(n)]`: the distances of each probe in ascending order.
    sorted: Vec<Buffer<f32>>,
    quantiles: usize,
    sizes: Vec<usize>,
    /// Mean square of each matrix.
    squares: Vec<f64>,
}

impl Layers {
    /// Takes symmetric matrices `[n, n]` of finite distances.
    ///
    /// # Errors
    /// [`Error::Shape`] if a matrix is not square, not finite or of more than [`MOST_COUPLED`] rows; [`Error::Device`] when
    /// memory runs out.
    pub fn new(device: &Device, matrices: &[ArrayView2<f32>]) -> Result<Self> {
        let (mut table, mut padded, mut means) = (Vec::new(), Vec::new(), Vec::new());
        let (mut sizes, mut squares) = (Vec::new(), Vec::new());
        for (index, matrix) in matrices.iter().enumerate() {
            let n = matrix.nrows();
            let finite = matrix.iter().all(|x| x.is_finite());
            if matrix.ncols() != n || !(1..=MOST_COUPLED).contains(&n) || !finite {
                let expected = format!("[n, n] of finite values, n from 1 to {MOST_COUPLED}");
                let what = if finite { "" } else { ", not all finite" };
                let got = format!("{:?}{what}", matrix.shape());
                return Err(Error::Shape { op: "gw", what: format!("matrix {index}"), expected, got });
            }
            let begin = u32::try_from(padded.len() / 16).map_err(|_| Error::Shape {
                op: "gw",
                what: "elements of all matrices".into(),
                expected: "fewer than 2^36".into(),
                got: padded.len().to_string(),
            })?;
            table.extend([begin, means.len() as u32, n as u32]);
            let mut square = 0.0;
            for row in matrix.rows() {
                let mean = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / n as f64;
                square += mean / n as f64;
                means.push(mean as f32);
                padded.extend(row);
                padded.resize(padded.len().next_multiple_of(16), 0.0);
            }
            means.resize(means.len().next_multiple_of(16), 0.0);
            sizes.push(n);
            squares.push(square);
        }
        let quantiles = sizes.iter().copied().max().unwrap_or(0);
        let sorted = matrices.iter().map(|matrix| device.upload(&quantile_functions(matrix, quantiles)));
        Ok(Layers {
            table: device.upload(&table)?,
            matrices: device.upload(&padded)?,
            means: device.upload(&means)?,
            sorted: sorted.collect::<Result<_>>()?,
            quantiles,
            sizes,
            squares,
        })
    }

    /// Bytes that layers of these sizes take.
    pub fn bytes(sizes: &[usize]) -> usize {
        let quantiles = sizes.iter().copied().max().unwrap_or(0);
        sizes.iter().map(|&n| (n + quantiles + 1) * pitch(n) * size_of::<f32>()).sum()
    }

    /// What the value of a coupling with exact sums has beside its products.
    fn constant(&self, pair: [usize; 2]) -> f64 {
        pair.iter().map(|&layer| self.squares[layer]).sum()
    }

    fn of(&self, pair: [usize; 2]) -> [usize; 2] {
        pair.map(|layer| self.sizes[layer])
    }
}

/// The quantile function of the distances of each probe at `samples` places, `[samples, pitch(n)]`; with as many samples
/// as probes, the distances in order.
fn quantile_functions(matrix: &ArrayView2<f32>, samples: usize) -> Vec<f32> {
    let (n, width) = (matrix.nrows(), pitch(matrix.nrows()));
    let mut functions = vec![0.0; samples * width];
    for (probe, row) in matrix.rows().into_iter().enumerate() {
        let mut sorted = row.to_vec();
        sorted.sort_unstable_by(f32::total_cmp);
        for sample in 0..samples {
            // The middle of a step: (sample + 1/2) / samples lies in step floor of it times n.
            functions[sample * width + probe] = sorted[(2 * sample + 1) * n / (2 * samples)];
        }
    }
    functions
}

/// Where the steps of a coupling begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Every probe coupled with every other alike.
    Product = 0,
    /// The mean of that and of the identity: each probe with itself.
    Mean = 1,
    /// The cheapest coupling, softened, of probes by their sorted distances (the third lower bound of Mémoli, 2011).
    Sorted = 2,
}

/// How a coupling's step is taken.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Regularisation, as POT counts it: the step minimises <2 L(T), T'> + epsilon KL(T' | T), half of which is the value
    /// linearised.
    pub epsilon: f32,
    /// Iterations of Sinkhorn, at most.
    pub iterations: usize,
    /// Error of a row's sum, as a share of the sum, where they may end.
    pub tolerance: f32,
    /// A coupling ends where the step before took at most this share off its value; `None`: none ends.
    pub enough: Option<f32>,
}

/// Couplings that are sought together, each of a pair of layers and from a start.
pub struct Couplings<'a> {
    layers: &'a Layers,
    sought: Vec<([usize; 2], Start)>,
    pairs: Buffer<u32>,
    constants: Buffer<f64>,
    logs: Buffer<f32>,
    plans: Buffer<f32>,
    products: Buffer<f32>,
    partial: Buffer<f64>,
    values: Buffer<f64>,
    done: Buffer<u32>,
    /// Elements of a coupling's matrices.
    slot: usize,
    /// Rows or columns of the largest.
    most: usize,
    begun: bool,
}

impl<'a> Couplings<'a> {
    /// Bytes that a coupling of `[n1, n2]` probes takes.
    pub fn bytes([n1, n2]: [usize; 2]) -> usize {
        3 * n1 * pitch(n2) * size_of::<f32>()
    }

    /// Memory for couplings of pairs of layers. Those from [`Start::Sorted`] come last.
    ///
    /// # Errors
    /// [`Error::Shape`] if a layer is not there, a mean is asked of layers of different sizes, the order is another, or
    /// there are none or too many; [`Error::Device`] when memory runs out.
    pub fn new(device: &Device, layers: &'a Layers, sought: &[([usize; 2], Start)]) -> Result<Self> {
        let refuse = |what: &str, expected: String, got: String| {
            Err(Error::Shape { op: "gw", what: what.into(), expected, got })
        };
        if !(1..=MOST_COUPLINGS).contains(&sought.len()) {
            return refuse("couplings", format!("1 to {MOST_COUPLINGS}"), sought.len().to_string());
        }
        for &(pair, start) in sought {
            if let Some(layer) = pair.into_iter().find(|&layer| layer >= layers.sizes.len()) {
                return refuse("layer", format!("one below {}", layers.sizes.len()), layer.to_string());
            }
            let [n1, n2] = layers.of(pair);
            if start == Start::Mean && n1 != n2 {
                return refuse("layers that begin at the mean", "as many probes in both".into(), format!("{n1}, {n2}"));
            }
        }
        if !sought.is_sorted_by_key(|&(_, start)| start == Start::Sorted) {
            return refuse("couplings", "sorted starts last".into(), format!("{sought:?}"));
        }
        let sizes = || sought.iter().map(|&(pair, _)| layers.of(pair));
        let slot = sizes().map(|[n1, n2]| n1 * pitch(n2)).max().unwrap_or(0);
        let most = sizes().flatten().max().unwrap_or(0);
        let pairs: Vec<u32> = sought.iter().flat_map(|&([x, y], start)| [x as u32, y as u32, start as u32]).collect();
        let constants: Vec<f64> = sought.iter().map(|&(pair, _)| layers.constant(pair)).collect();
        let count = sought.len();
        Ok(Couplings {
            layers,
            sought: sought.to_vec(),
            pairs: device.upload(&pairs)?,
            constants: device.upload(&constants)?,
            logs: device.alloc(count * slot)?,
            plans: device.alloc(count * slot)?,
            products: device.alloc(count * slot)?,
            partial: device.alloc(count * side(device, most) * side(device, most))?,
            values: device.alloc(count)?,
            done: device.alloc(count)?,
            slot,
            most,
            begun: false,
        })
    }

    fn args(&self, first: usize, step: &Step, tiles: usize) -> GwArgs {
        GwArgs {
            layers: self.layers.table.view().ptr(),
            pairs: self.pairs.view().ptr(),
            matrices: self.layers.matrices.view().ptr(),
            means: self.layers.means.view().ptr(),
            constants: self.constants.view().ptr(),
            logs: self.logs.view().ptr(),
            plans: self.plans.view().ptr(),
            products: self.products.view().ptr(),
            partial: self.partial.view().ptr(),
            values: self.values.view().ptr(),
            done: self.done.view().ptr(),
            slot: self.slot as i64,
            tiles: tiles as i32,
            first: first as i32,
            scale: 2.0 / step.epsilon,
            tolerance: step.tolerance,
            enough: step.enough.unwrap_or(-1.0),
            iterations: step.iterations as i32,
        }
    }

    fn product(&mut self, device: &Device, kernels: &'static Kernels, args: &GwArgs) -> Result<()> {
        let side = side(device, self.most) as u32;
        let grid = [side, side, self.sought.len() as u32];
        let (kernel, threads) = match device.policy() {
            Policy::Staged => (&kernels[0], THREADS),
            Policy::Direct => (&kernels[1], 1),
        };
        // SAFETY: all that `args` points to is this struct's or its layers', made for these couplings.
        unsafe { device.launch(kernel, Launch::new(grid, threads), args) }
    }

    fn scale(&mut self, device: &Device, args: &GwArgs) -> Result<()> {
        let couplings = (self.sought.len() - args.first as usize) as u32;
        let (kernel, threads) = match device.policy() {
            Policy::Staged => {
                let fits = |most, kernel: &Kernel<_>| self.most <= most && device.has_shared_memory_for(kernel.name);
                let (_, threads, kernel) =
                    SCALE.iter().find(|(most, _, kernel)| fits(*most, kernel)).expect("checked by Layers");
                (kernel, *threads)
            }
            Policy::Direct => (&SCALE_DIRECT, 1),
        };
        // SAFETY: as in `product`.
        unsafe { device.launch(kernel, Launch::new([couplings, 1, 1], threads), args) }
    }

    /// Sets the couplings to their starts. `softness` is the regularisation of [`Start::Sorted`], as `step` takes it: of
    /// mean squared differences of sorted distances.
    ///
    /// # Errors
    /// [`Error::Launch`] if the device fails.
    pub fn begin(&mut self, device: &Device, softness: &Step) -> Result<()> {
        let first = self.sought.iter().position(|&(_, start)| start == Start::Sorted).unwrap_or(self.sought.len());
        let quantiles = self.layers.quantiles;
        for (index, &([x, y], _)) in self.sought.iter().enumerate().skip(first) {
            let sizes = self.layers.of([x, y]);
            let costs = index * self.slot..index * self.slot + sizes[0] * pitch(sizes[1]);
            let [x, y] = [x, y].map(|layer| self.layers.sorted[layer].view());
            squared_distances(device, quantiles, sizes, x.into(), y.into(), self.logs.slice_mut(costs))?;
        }
        // Costs are sums over the samples of a quantile function.
        let softness = Step { epsilon: softness.epsilon * quantiles as f32, enough: None, ..*softness };
        let parts = device.elementwise(self.slot);
        let begin = Launch::new([parts.grid[0], self.sought.len() as u32, 1], parts.block);
        device.zero(self.done.view_mut())?;
        // SAFETY: as in `product`.
        unsafe { device.launch(&BEGIN, begin, &self.args(0, &softness, 0))? };
        if first < self.sought.len() {
            self.scale(device, &self.args(first, &softness, 0))?;
        }
        self.begun = true;
        Ok(())
    }

    /// A proximal step of all couplings that have not ended.
    ///
    /// # Errors
    /// [`Error::Run`] before [`Couplings::begin`]; [`Error::Launch`] if the device fails.
    pub fn step(&mut self, device: &Device, step: &Step) -> Result<()> {
        self.check_begun()?;
        let side = side(device, self.most);
        let args = self.args(0, step, side * side);
        self.product(device, &RIGHT, &args)?;
        self.product(device, &STEP, &args)?;
        self.scale(device, &args)
    }

    fn check_begun(&self) -> Result<()> {
        if self.begun { Ok(()) } else { Err(Error::Run("gw: couplings have no start yet".into())) }
    }

    /// Whether all have ended; waits for the steps.
    ///
    /// # Errors
    /// [`Error::Device`] if the copy fails.
    pub fn all_ended(&self, device: &Device) -> Result<bool> {
        Ok(device.read(self.done.view())?.into_iter().all(|done| done != 0))
    }

    /// Rounds the couplings so that their rows sum to 1/n1 and their columns to 1/n2, and returns their values, which are
    /// NaN where the steps came to something that is not finite.
    ///
    /// # Errors
    /// As [`Couplings::step`]; [`Error::Device`] if a copy fails.
    pub fn finish(&mut self, device: &Device) -> Result<Vec<f64>> {
        self.check_begun()?;
        device.zero(self.done.view_mut())?;
        let side = side(device, self.most);
        let nothing = Step { epsilon: 1.0, iterations: 0, tolerance: 0.0, enough: None };
        let args = self.args(0, &nothing, side * side);
        let round = Launch::new([self.sought.len() as u32, 1, 1], device.threads(THREADS));
        // SAFETY: as in `product`.
        unsafe { device.launch(&ROUND, round, &args)? };
        self.product(device, &RIGHT, &args)?;
        self.product(device, &VALUE, &args)?;
        let constants = self.sought.iter().map(|&(pair, _)| self.layers.constant(pair));
        let partial = device.read(self.partial.view())?;
        let sums = partial.chunks(side * side).map(|tiles| tiles.iter().sum::<f64>());
        Ok(constants.zip(sums).map(|(constant, sum)| constant - 2.0 * sum).collect())
    }

    /// A coupling's plan, `[n1, n2]`.
    ///
    /// # Errors
    /// [`Error::Device`] if the copy fails.
    pub fn plan(&self, device: &Device, coupling: usize) -> Result<Array2<f32>> {
        let [n1, n2] = self.layers.of(self.sought[coupling].0);
        let first = coupling * self.slot;
        let padded = device.read(self.plans.slice(first..first + n1 * pitch(n2)))?;
        let rows: Vec<f32> = padded.chunks(pitch(n2)).flat_map(|row| &row[..n2]).copied().collect();
        Ok(Array2::from_shape_vec((n1, n2), rows).expect("n1 rows of n2"))
    }
}

/// Tiles along a side of the largest product.
fn side(device: &Device, most: usize) -> usize {
    let tile = match device.policy() {
        Policy::Staged => STAGED_TILE,
        Policy::Direct => DIRECT_TILE,
    };
    pitch(most).div_ceil(tile)
}
