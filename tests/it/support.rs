//! What the tests share: devices to run on, golden files, layouts, comparisons.

use std::collections::BTreeMap;
use std::path::PathBuf;

use dilt::device::{Device, HostOptions, Policy, Precision, RealBuffer, Slice};
use half::bf16;
use ndarray::Array2;
use safetensors::{Dtype, SafeTensors};

/// A device under test and what to call it in a failure.
pub struct Case {
    pub label: String,
    pub device: Device,
}

/// The host device in all its forms, and the GPU where there is one.
///
/// Without a GPU this prints that its part was skipped; `DILT_REQUIRE_CUDA=1` turns that into a failure.
/// `DILT_TEST_DEVICES=cuda` leaves the host out, which has nothing to show to a sanitizer of GPU code.
pub fn devices() -> Vec<Case> {
    let mut cases = Vec::new();
    if std::env::var("DILT_TEST_DEVICES").is_ok_and(|value| value == "cuda") {
        return cuda().into_iter().collect();
    }
    let mut host = |label: &str, options: HostOptions| match Device::host(options) {
        Ok(device) => cases.push(Case { label: label.into(), device }),
        Err(error) => eprintln!("skipped: {label}: {error}"),
    };
    let direct = HostOptions::default();
    let staged = HostOptions { policy: Policy::Staged, ..direct };
    host("host", direct);
    host("host staged", staged);
    // ThreadSanitizer finds races in any order, at a tenth of a millisecond for each thread of a GPU: no more than that.
    // Sanitizer builds have one instruction set, and AddressSanitizer one random order, for accesses that depend on it.
    if !cfg!(dilt_sanitize) {
        for isa in ["base", "v3", "v4"] {
            host(&format!("host {isa}"), HostOptions { isa: Some(isa), ..direct });
        }
        host("host staged, schedule 2", HostOptions { schedule: Some(2), ..staged });
        host("host, schedule 3", HostOptions { schedule: Some(3), ..direct });
    }
    if !cfg!(dilt_sanitize = "thread") {
        host("host staged, schedule 1", HostOptions { schedule: Some(1), ..staged });
    }
    cases.extend(cuda());
    cases
}

/// The host device as it is used, and the GPU where there is one: for what takes seconds on each.
pub fn default_devices() -> Vec<Case> {
    let host = Case { label: "host".into(), device: Device::open("host").unwrap() };
    [host].into_iter().chain(cuda()).collect()
}

fn cuda() -> Option<Case> {
    if Device::cuda_count() > 0 {
        return Some(Case { label: "cuda".into(), device: Device::open("cuda").expect("a GPU was counted") });
    }
    let why = Device::cuda_status();
    let required = std::env::var("DILT_REQUIRE_CUDA").is_ok_and(|value| value == "1");
    assert!(!required, "DILT_REQUIRE_CUDA is set: {why}");
    eprintln!("skipped: cuda: {why}");
    None
}

/// Runs `test` on every device, and demands the same bits from host devices that differ only in their schedule.
pub fn on_devices(test: impl Fn(&Device, &str) -> Vec<Vec<f32>>) {
    let mut results: BTreeMap<String, Vec<Vec<u32>>> = BTreeMap::new();
    for Case { label, device } in devices() {
        let bits: Vec<Vec<u32>> =
            test(&device, &label).iter().map(|values| values.iter().map(|v| v.to_bits()).collect()).collect();
        let kind = label.split(", schedule").next().unwrap().to_owned();
        if let Some(first) = results.get(&kind) {
            assert!(*first == bits, "{label}: the bits depend on the order of threads or blocks");
        }
        results.entry(kind).or_insert(bits);
    }
}

/// Another handle to a staged device, which multiplies by wgmma, where it can.
pub fn by_wgmma(device: &Device) -> Option<Device> {
    let can = device.policy() == Policy::Staged && device.has_wgmma();
    can.then(|| device.with_wgmma().unwrap())
}

/// A tensor of a golden file, in PyTorch's layout.
#[derive(Clone)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data: Vec<f64>,
}

/// A golden file: `<case>/<tensor>`, and the scalars of each case. Made by `tests/golden/generate.py`.
pub struct Golden {
    tensors: BTreeMap<String, Tensor>,
    scalars: BTreeMap<String, BTreeMap<String, String>>,
}

impl Golden {
    pub fn open(name: &str) -> Self {
        let path = golden_dir().join(format!("{name}.safetensors"));
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let tensors = file.iter().map(|(name, view)| {
            let data = view.data();
            let data: Vec<f64> = match view.dtype() {
                Dtype::F64 => data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
                Dtype::F32 => data.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect(),
                Dtype::I64 => data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
                Dtype::U8 => data.iter().map(|&b| f64::from(b)).collect(),
                other => panic!("{name}: {other:?}"),
            };
            (name.to_owned(), Tensor { shape: view.shape().to_vec(), data })
        });
        let scalars = header.metadata().iter().flatten().map(|(case, list)| {
            let pairs = list.split(',').filter_map(|pair| pair.split_once('='));
            (case.clone(), pairs.map(|(key, value)| (key.trim().into(), value.trim().into())).collect())
        });
        Golden { tensors: tensors.collect(), scalars: scalars.collect() }
    }

    /// Names of the cases, in order.
    pub fn cases(&self) -> Vec<String> {
        let mut cases: Vec<_> = self.tensors.keys().filter_map(|name| Some(name.split_once('/')?.0.into())).collect();
        cases.dedup();
        cases
    }

    pub fn get(&self, case: &str, tensor: &str) -> Tensor {
        self.find(case, tensor).unwrap_or_else(|| panic!("no {case}/{tensor} in this golden file"))
    }

    pub fn find(&self, case: &str, tensor: &str) -> Option<Tensor> {
        self.tensors.get(&format!("{case}/{tensor}")).cloned()
    }

    /// A tensor that belongs to no case.
    pub fn whole(&self, tensor: &str) -> Tensor {
        self.tensors[tensor].clone()
    }

    /// A scalar of a case, as text.
    pub fn text(&self, case: &str, key: &str) -> String {
        self.scalars[case][key].clone()
    }

    /// A scalar of a case.
    pub fn number(&self, case: &str, key: &str) -> f64 {
        self.text(case, key).parse().unwrap()
    }
}

/// The golden files: where this machine's checkout has them, or `DILT_GOLDEN` where only binaries were carried.
pub fn golden_dir() -> PathBuf {
    std::env::var_os("DILT_GOLDEN")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden"), PathBuf::from)
}

impl Tensor {
    /// As f32, in PyTorch's layout.
    pub fn f32(&self) -> Vec<f32> {
        self.data.iter().map(|&value| value as f32).collect()
    }

    /// As a matrix.
    pub fn matrix(&self) -> Array2<f64> {
        let [rows, columns] = self.shape[..] else { panic!("expected a matrix, got {:?}", self.shape) };
        Array2::from_shape_vec((rows, columns), self.data.clone()).unwrap()
    }

    /// [N, rest] to [rest, N padded to a multiple of 8 with zeros].
    pub fn samples_last(&self) -> Vec<f32> {
        let (n, rest) = (self.shape[0], self.shape[1..].iter().product::<usize>());
        let padded = n.next_multiple_of(8);
        let mut out = vec![0.0; rest * padded];
        for sample in 0..n {
            for i in 0..rest {
                out[i * padded + sample] = self.data[sample * rest + i] as f32;
            }
        }
        out
    }

    /// Compares values in dilt's layout, [rest, padded N], with this tensor; padded samples must be exactly zero.
    pub fn check_samples_last(&self, got: &[f32], tolerance: f64, label: &str) -> f64 {
        let (n, rest) = (self.shape[0], self.shape[1..].iter().product::<usize>());
        let padded = n.next_multiple_of(8);
        assert_eq!(got.len(), rest * padded, "{label}: number of elements");
        let at = |sample: usize, i: usize| got[i * padded + sample];
        let back: Vec<f32> = (0..n).flat_map(|sample| (0..rest).map(move |i| at(sample, i))).collect();
        let error = self.check(&back, tolerance, label);
        let stray = (n..padded).flat_map(|sample| (0..rest).map(move |i| at(sample, i))).find(|&value| value != 0.0);
        assert_eq!(stray, None, "{label}: a padded sample is not zero");
        error
    }

    /// Padded samples and tokens of a tensor `[N, T, rest]`, and where its elements lie in dilt's layout.
    fn token_places(&self) -> (usize, impl Iterator<Item = usize>) {
        let [n, tokens, rest] = self.shape[..] else { panic!("expected [N, T, D], got {:?}", self.shape) };
        let (padded, row) = (n.next_multiple_of(8), tokens.next_multiple_of(8));
        let place = move |i: usize| (i % rest * padded + i / rest / tokens) * row + i / rest % tokens;
        (rest * padded * row, (0..n * tokens * rest).map(place))
    }

    /// [N, T, rest] to [rest, N, T], N and T padded to multiples of 8 with zeros.
    pub fn tokens_last(&self) -> Vec<f32> {
        let (len, places) = self.token_places();
        let mut out = vec![0.0; len];
        places.zip(&self.data).for_each(|(place, &value)| out[place] = value as f32);
        out
    }

    /// Compares values in dilt's layout, [rest, padded N, padded T], with this tensor; padding must be exactly zero.
    pub fn check_tokens_last(&self, got: &[f32], tolerance: f64, label: &str) {
        let (len, places) = self.token_places();
        assert_eq!(got.len(), len, "{label}: number of elements");
        let mut padding = got.to_vec();
        let back: Vec<f32> = places.map(|place| std::mem::take(&mut padding[place])).collect();
        self.check(&back, tolerance, label);
        assert_eq!(padding.iter().find(|&&value| value != 0.0), None, "{label}: a padded column is not zero");
    }

    /// Compares values in PyTorch's layout; returns the largest difference over the largest value.
    pub fn check(&self, got: &[f32], tolerance: f64, label: &str) -> f64 {
        assert_eq!(got.len(), self.data.len(), "{label}: number of elements");
        let scale = self.data.iter().fold(0.0f64, |most, value| most.max(value.abs())).max(1e-30);
        let mut largest = 0.0f64;
        for (i, (&got, &want)) in got.iter().zip(&self.data).enumerate() {
            let error = (f64::from(got) - want).abs() / scale;
            assert!(error <= tolerance, "{label}: element {i}: expected {want}, got {got}: error {error:.1e} of scale");
            largest = largest.max(error);
        }
        largest
    }
}

/// Reads a slice, for the list that [`on_devices`] compares.
pub fn read(device: &Device, slice: Slice<f32>) -> Vec<f32> {
    device.read(slice).unwrap()
}

/// A buffer of NaN, so that an element that a kernel leaves out shows.
pub fn unwritten(device: &Device, len: usize) -> dilt::device::Buffer<f32> {
    device.upload(&vec![f32::NAN; len]).unwrap()
}

/// How a test stores activations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Storage {
    F32,
    /// As f32, inputs rounded to bf16 before an operation, results after it: by this bf16 is judged.
    Naive,
    Bf16,
}

impl Storage {
    pub fn precision(self) -> Precision {
        match self {
            Storage::F32 | Storage::Naive => Precision::F32,
            Storage::Bf16 => Precision::Bf16,
        }
    }

    pub fn upload(self, device: &Device, values: &[f32]) -> RealBuffer {
        device.upload_reals(&self.rounded(values.to_vec()), self.precision()).unwrap()
    }

    /// NaN, so that an element that a kernel leaves out shows.
    pub fn unwritten(self, device: &Device, len: usize) -> RealBuffer {
        self.upload(device, &vec![f32::NAN; len])
    }

    pub fn read(self, device: &Device, buffer: &RealBuffer) -> Vec<f32> {
        self.rounded(device.read_reals(buffer.view()).unwrap())
    }

    /// Values as they are stored.
    pub fn rounded(self, values: Vec<f32>) -> Vec<f32> {
        match self {
            Storage::F32 => values,
            Storage::Naive | Storage::Bf16 => values.iter().map(|&value| bf16::from_f32(value).to_f32()).collect(),
        }
    }
}

/// Demands that no element is further off than `tolerance` of the largest.
pub fn close_within(tolerance: f32, got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(1e-3f32, |most, value| most.max(value.abs()));
    let worst = got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max);
    // Not a comparison that a NaN would pass.
    assert!(worst <= tolerance * largest, "{what}: off by {worst} where the largest is {largest}");
    assert!(got.iter().all(|value| value.is_finite()), "{what}: not finite");
}

/// A result of an operation that is judged: name, values, and what they should be.
pub type Judged = (&'static str, Vec<f32>, Vec<f32>);

/// Demands that bf16 errs at most twice as much as naive bf16, on the root mean square of a tensor and at most, and that
/// padding, zero in naive bf16 and in what it should be, stays zero. Returns what bf16 gave.
pub fn judge_bf16(label: &str, run: impl Fn(Storage) -> Vec<Judged>) -> Vec<Vec<f32>> {
    judge(label, run, true)
}

/// The same of tensors without padding, of whose elements some may be zero by cancellation.
pub fn judge_bf16_unpadded(label: &str, run: impl Fn(Storage) -> Vec<Judged>) -> Vec<Vec<f32>> {
    judge(label, run, false)
}

fn judge(label: &str, run: impl Fn(Storage) -> Vec<Judged>, padded: bool) -> Vec<Vec<f32>> {
    /// Sums of f32 in another order.
    const TINY: f64 = 1e-5;
    let judge = |((name, got, want), (_, naive, _)): (Judged, Judged)| {
        assert_eq!((got.len(), naive.len()), (want.len(), want.len()), "{label}: {name}: number of elements");
        let errors = |of: &[f32]| {
            let errors = || of.iter().zip(&want).map(|(&got, &want)| (f64::from(got) - f64::from(want)).abs());
            let squares = errors().map(|error| error * error).sum::<f64>();
            [(squares / want.len() as f64).sqrt(), errors().fold(0.0, f64::max)]
        };
        let tiny = TINY * want.iter().fold(0.0f64, |most, &value| most.max(f64::from(value).abs()));
        for (kind, (error, most)) in ["mean", "largest"].iter().zip(errors(&got).into_iter().zip(errors(&naive))) {
            assert!(error <= 2.0 * most + tiny, "{label}: {name}: {kind} error {error:.2e}, naive bf16's {most:.2e}");
        }
        // Statistics and gradients of parameters are f32: of the same inputs, they are the same.
        if naive.iter().any(|&value| bf16::from_f32(value).to_f32() != value) {
            let apart = got.iter().zip(&naive).map(|(got, naive)| f64::from((got - naive).abs())).fold(0.0, f64::max);
            assert!(apart <= tiny, "{label}: {name}: {apart:.2e} from f32 of the same inputs");
        }
        let stray = (0..got.len()).find(|&i| padded && want[i] == 0.0 && naive[i] == 0.0 && got[i] != 0.0);
        assert_eq!(stray, None, "{label}: {name}: padding that is not zero");
        got
    };
    run(Storage::Bf16).into_iter().zip(run(Storage::Naive)).map(judge).collect()
}

/// Demands an error that names the tensor whose precision is another than bf16, the first one's.
pub fn refuses_precision(result: dilt::Result<()>, op: &str, tensor: &str) {
    let error = result.unwrap_err().to_string();
    assert!(error.contains(&format!("{op}: precision of {tensor}: expected bf16, got f32")), "{error}");
}

/// Tensors laid into one arena as a network's parameters are: each starts at a multiple of 64 elements, gaps are zero.
pub struct Arena {
    pub pieces: Vec<std::ops::Range<usize>>,
    pub len: usize,
}

impl Arena {
    pub fn new(lens: impl IntoIterator<Item = usize>) -> Self {
        let mut len = 0;
        let place = |piece: usize| {
            let start: usize = len;
            len = (start + piece).next_multiple_of(64);
            start..start + piece
        };
        Arena { pieces: lens.into_iter().map(place).collect(), len }
    }

    pub fn lay(&self, tensors: &[Vec<f32>]) -> Vec<f32> {
        let mut arena = vec![0.0; self.len];
        for (piece, tensor) in self.pieces.iter().zip(tensors) {
            arena[piece.clone()].copy_from_slice(tensor);
        }
        arena
    }

    /// One bit per element: set where the tensor is not 0, clear in the gaps.
    pub fn bits(&self, tensors: &[Vec<f32>]) -> Vec<u32> {
        bits_of(self.lay(tensors).into_iter().map(|value| value != 0.0))
    }
}

/// Packs bits into words, lowest first.
pub fn bits_of(bits: impl IntoIterator<Item = bool>) -> Vec<u32> {
    let bits: Vec<bool> = bits.into_iter().collect();
    bits.chunks(32).map(|word| word.iter().rev().fold(0, |bits, &bit| bits << 1 | u32::from(bit))).collect()
}

/// Whether bit `i` is set.
pub fn bit(words: &[u32], i: usize) -> bool {
    words[i / 32] >> (i % 32) & 1 == 1
}

/// Words as the floats of the same bits, for the list that [`on_devices`] compares.
pub fn as_floats(words: &[u32]) -> Vec<f32> {
    words.iter().map(|&word| f32::from_bits(word)).collect()
}
