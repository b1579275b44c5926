//! A self-test of every kernel: each operation, on random inputs of a small ragged shape, on the device under test and
//! on an independent form of it.
//!
//! The other form is the host device with the other policy and the plainest instruction set: another tiling of the same
//! sums, other vectors, and, for a GPU, another compiler. Both policies are tested, so that every tiling runs on the
//! device. Which kernels a check launches is seen by [`Device::trace`], not written down: a kernel that no check
//! launches fails. What has activations runs with both precisions of them.

mod batch_norm;
mod checks;
mod convolution;
mod coupling;

use bytemuck::Pod;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::device::{Buffer, Device, HostOptions, Policy, Precision, RealBuffer, Traced, kernel_files};
use crate::error::Result;
use crate::ops::SAMPLE_ALIGNMENT;

/// Largest difference of f32 results, as a share of the largest value of the tensor. Two orders of a sum of n terms
/// differ by about sqrt(n) roundings of 2^-24; the longest sums here have 10,000 terms, which makes 6e-6.
pub const TOLERANCE: f64 = 1e-5;

/// The same of bf16 results: near the middle between two of them, such a difference is that of a rounding, 2^-7 of a value.
pub const BF16_TOLERANCE: f64 = 1.0 / 128.0;

/// Runs an operation, and hands its results over.
type Check = fn(&mut Trial) -> Result<()>;

/// True samples, which are padded to [`PADDED`].
const SAMPLES: usize = 13;
const PADDED: usize = SAMPLES.next_multiple_of(SAMPLE_ALIGNMENT);

/// What the self-test found about a kernel.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Name in `kernels/`.
    pub kernel: &'static str,
    /// Largest difference in what the checks that launch it gave, as a share of the tensor's largest value.
    pub error: f64,
    /// Milliseconds of its shortest launch; `None` if none ended well.
    pub ms: Option<f64>,
    /// What is wrong, if anything is.
    pub problem: Option<String>,
}

/// Tests every kernel that the device can launch ([`kernels`]), in the order of [`kernel_files`], with inputs drawn from `seed`.
///
/// # Errors
/// As [`Device::with_policy`]. What fails in a kernel is told in its [`Outcome`].
pub fn run(device: &Device, seed: u64) -> Result<Vec<Outcome>> {
    // All of them now: after a kernel has failed, a GPU refuses new ones, and what was found would be lost.
    let [direct, staged] = [Policy::Direct, Policy::Staged].map(|policy| device.with_policy(policy));
    let policies = [(direct?, Policy::Staged), (staged?, Policy::Direct)];
    let by_wgmma = device.has_wgmma().then(|| device.with_wgmma()).transpose()?;
    let mut findings = Vec::new();
    let mut test = |device: &Device, other: Policy, checks: &mut dyn Iterator<Item = (&Check, Precision)>| {
        let reference = Device::host(HostOptions { policy: other, isa: Some("base"), ..HostOptions::default() })?;
        for (check, precision) in checks {
            let (mut got, mut want) = (Trial::new(device, seed, precision), Trial::new(&reference, seed, precision));
            let (launches, done) = device.trace(|| check(&mut got));
            let compared = done.and_then(|()| check(&mut want)).map(|()| compare(&got.results, &want.results));
            let (error, problem) = compared.unwrap_or_else(|error| (f64::INFINITY, Some(error.to_string())));
            findings.push(Finding { precision, launches, error, problem });
        }
        Ok(())
    };
    for (device, other) in &policies {
        let of_activations = checks::OF_ACTIVATIONS.iter().chain(convolution::OF_ACTIVATIONS);
        let of_activations = of_activations.chain(batch_norm::OF_ACTIVATIONS).chain(coupling::OF_ACTIVATIONS);
        let others = checks::OTHERS.iter().chain(convolution::OTHERS);
        let others = others.chain(batch_norm::OTHERS).chain(coupling::OTHERS);
        let each = of_activations.flat_map(|check| Precision::ALL.map(|precision| (check, precision)));
        let mut checks = each.chain(others.map(|check| (check, Precision::F32)));
        test(device, *other, &mut checks)?;
    }
    if let Some(device) = &by_wgmma {
        let mut checks = convolution::BY_WGMMA.iter().map(|check| (check, Precision::Bf16));
        test(device, Policy::Direct, &mut checks)?;
    }
    Ok(kernels(device).map(|kernel| outcome(kernel, &findings)).collect())
}

/// The kernels that a device can launch: not those of wgmma where it has none, nor on a smaller GPU what needs more shared memory
/// than that has.
pub fn kernels(device: &Device) -> impl Iterator<Item = &'static str> {
    let all = kernel_files().flat_map(|(_, kernels)| kernels).copied();
    all.filter(|kernel| device.has_wgmma() || !kernel.contains("_wgmma_"))
        .filter(|kernel| device.has_shared_memory_for(kernel))
}

/// What a check found, which concerns every kernel that it launched.
struct Finding {
    precision: Precision,
    launches: Vec<Traced>,
    error: f64,
    problem: Option<String>,
}

fn outcome(kernel: &'static str, findings: &[Finding]) -> Outcome {
    let is_own = |launch: &&Traced| launch.kernel == kernel;
    let own: Vec<_> = findings.iter().filter(|finding| finding.launches.iter().any(|l| is_own(&l))).collect();
    let missing = || {
        // After a kernel has failed, a GPU refuses all work.
        let refused = findings.iter().find(|finding| finding.launches.is_empty()).and_then(|f| f.problem.as_deref());
        format!("not launched: {}", refused.unwrap_or("no check of src/selftest does"))
    };
    let problem = own.iter().find_map(|finding| finding.problem.clone());
    // A kernel of f32 alone may stand beside one of bf16, whose roundings are not its own.
    let in_f32 = own.iter().any(|finding| finding.precision == Precision::F32);
    let alike = own.iter().filter(|finding| finding.precision == Precision::F32 || !in_f32);
    Outcome {
        kernel,
        error: alike.map(|finding| finding.error).fold(0.0, f64::max),
        ms: own.iter().flat_map(|f| f.launches.iter().filter(is_own)).filter_map(|l| l.ms).reduce(f64::min),
        problem: problem.or_else(|| own.is_empty().then(missing)),
    }
}

/// The largest difference of two runs of a check, and the first that is too large.
fn compare(got: &[Tensor], want: &[Tensor]) -> (f64, Option<String>) {
    let (mut largest, mut problem) = (0.0f64, None);
    for (got, want) in got.iter().zip(want) {
        let scale = want.values.iter().fold(1e-30f64, |most, value| most.max(value.abs()));
        for (i, (value, expected)) in got.values.iter().zip(&want.values).enumerate() {
            // What a kernel left out is NaN on both sides, and wrong.
            let error = (value - expected).abs() / scale;
            let error = if error.is_finite() { error } else { f64::INFINITY };
            if error > got.tolerance && problem.is_none() {
                let name = got.name;
                problem = Some(format!("{name}[{i}]: expected {expected}, got {value}: error {error:.1e} of scale"));
            }
            largest = largest.max(error);
        }
    }
    (largest, problem)
}

/// A result of a check, and how far from the other form's it may be.
struct Tensor {
    name: &'static str,
    values: Vec<f64>,
    tolerance: f64,
}

/// A run of a check: where, on what, and what came out. Equal seeds give equal inputs on every device.
struct Trial<'a> {
    device: &'a Device,
    /// Of activations.
    precision: Precision,
    random: ChaCha8Rng,
    results: Vec<Tensor>,
}

impl<'a> Trial<'a> {
    fn new(device: &'a Device, seed: u64, precision: Precision) -> Self {
        Trial { device, precision, random: ChaCha8Rng::seed_from_u64(seed), results: Vec::new() }
    }

    fn draw<T: Pod>(&mut self, len: usize, value: impl Fn(&mut ChaCha8Rng) -> T) -> Result<Buffer<T>> {
        let values: Vec<T> = (0..len).map(|_| value(&mut self.random)).collect();
        self.device.upload(&values)
    }

    /// From -1 to 1.
    fn floats(&mut self, len: usize) -> Result<Buffer<f32>> {
        self.draw(len, |random| random.random_range(-1.0..1.0))
    }

    /// From 0.5 to 1.5.
    fn positive(&mut self, len: usize) -> Result<Buffer<f32>> {
        self.draw(len, |random| random.random_range(0.5..1.5))
    }

    fn below(&mut self, len: usize, end: u32) -> Result<Buffer<u32>> {
        self.draw(len, |random| random.random_range(0..end))
    }

    fn bits(&mut self, len: usize) -> Result<Buffer<u32>> {
        self.draw(len, Rng::random)
    }

    /// From -1 to 1, zero where `is_true` is not.
    fn values_where(&mut self, len: usize, is_true: impl Fn(usize) -> bool) -> Vec<f32> {
        (0..len).map(|i| if is_true(i) { self.random.random_range(-1.0..1.0) } else { 0.0 }).collect()
    }

    /// Activations from -1 to 1.
    fn reals(&mut self, len: usize) -> Result<RealBuffer> {
        self.reals_where(len, |_| true)
    }

    fn reals_where(&mut self, len: usize, is_true: impl Fn(usize) -> bool) -> Result<RealBuffer> {
        let values = self.values_where(len, is_true);
        self.device.upload_reals(&values, self.precision)
    }

    /// [`Trial::samples`] of activations.
    fn real_samples(&mut self, len: usize) -> Result<RealBuffer> {
        self.reals_where(len, |i| i % PADDED < SAMPLES)
    }

    /// Activations in rows of `n` samples of `tokens`, both padded with zeros, `len` elements in all.
    fn real_tokens(&mut self, len: usize, n: usize, tokens: usize) -> Result<RealBuffer> {
        let [padded, row] = [n, tokens].map(|size| size.next_multiple_of(SAMPLE_ALIGNMENT));
        self.reals_where(len, |i| i / row % padded < n && i % row < tokens)
    }

    /// The number of true samples.
    fn count(&self) -> Result<Buffer<u32>> {
        self.device.upload(&[SAMPLES as u32])
    }

    /// NaN, so that an element that a kernel leaves out shows.
    fn unwritten(&self, len: usize) -> Result<Buffer<f32>> {
        self.device.upload(&vec![f32::NAN; len])
    }

    /// [`Trial::unwritten`] activations.
    fn unwritten_reals(&self, len: usize) -> Result<RealBuffer> {
        self.device.upload_reals(&vec![f32::NAN; len], self.precision)
    }

    /// A result that depends on the order of sums.
    fn close(&mut self, name: &'static str, buffer: &Buffer<f32>) -> Result<()> {
        self.result(name, buffer, TOLERANCE)
    }

    /// A result that is the same in every form.
    fn exact<T: Pod + Into<f64>>(&mut self, name: &'static str, buffer: &Buffer<T>) -> Result<()> {
        self.result(name, buffer, 0.0)
    }

    fn result<T: Pod + Into<f64>>(&mut self, name: &'static str, buffer: &Buffer<T>, tolerance: f64) -> Result<()> {
        let values = self.device.read(buffer.view())?.into_iter().map(Into::into).collect();
        self.results.push(Tensor { name, values, tolerance });
        Ok(())
    }

    /// Of activations that depend on the order of sums.
    fn tolerance(&self) -> f64 {
        match self.precision {
            Precision::F32 => TOLERANCE,
            Precision::Bf16 => BF16_TOLERANCE,
        }
    }

    /// Activations that depend on the order of sums.
    fn close_reals(&mut self, name: &'static str, buffer: &RealBuffer) -> Result<()> {
        self.result_reals(name, buffer, self.tolerance())
    }

    /// What is computed of such activations.
    fn close_as_reals(&mut self, name: &'static str, buffer: &Buffer<f32>) -> Result<()> {
        self.result(name, buffer, self.tolerance())
    }

    /// Activations that are the same in every form.
    fn exact_reals(&mut self, name: &'static str, buffer: &RealBuffer) -> Result<()> {
        self.result_reals(name, buffer, 0.0)
    }

    fn result_reals(&mut self, name: &'static str, buffer: &RealBuffer, tolerance: f64) -> Result<()> {
        let values = self.device.read_reals(buffer.view())?.into_iter().map(f64::from).collect();
        self.results.push(Tensor { name, values, tolerance });
        Ok(())
    }
}
