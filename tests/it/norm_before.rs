//! Input gradients that begin the backward pass of the batch norm which has made what their layer reads, against float64 of the
//! gradient that they store by themselves.

use dilt::device::{Buffer, Device, HostOptions, Policy, Precision, RealsMut};
use dilt::ops::conv::{ConvShape, conv_input_gradient};
use dilt::ops::conv_sparse::conv_sparse_input_gradient;
use dilt::ops::epilogue::{AddedNorm, BeforeNorm, Dx};
use dilt::ops::kept::Pass;
use dilt::ops::norm::{NormBackward, NormGradient, NormGradients, NormShape, Normalised, Normed, norm_backward};
use dilt::ops::norm_join::norm_join_gradient;
use dilt::ops::norm_pair::{NormPair, NormPairGradient, norm_pair_backward};
use dilt::ops::row_map::RowMap;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::conv::rounded;
use crate::conv_sparse::in_groups;
use crate::support::{Storage, by_wgmma, on_devices, read, unwritten};

/// A few roundings of f32, 6e-8 each, of the root of the sum of squares.
const TOLERANCE: f64 = 2e-6;
/// Where what ReLU is applied to is so small, a rounding may decide.
const UNDECIDED: f64 = 1e-5;

/// What stands between the norm and the layer, and what else reads the norm's result.
#[derive(Clone, Copy, Debug)]
struct Norm {
    add: bool,
    residual: bool,
    /// A second norm, whose result is added.
    added: bool,
    relu: bool,
    mapped: bool,
}

const NORMS: [Norm; 7] = [
    Norm { add: true, residual: true, added: false, relu: true, mapped: true },
    Norm { add: true, residual: false, added: true, relu: true, mapped: false },
    Norm { add: false, residual: false, added: false, relu: true, mapped: false },
    Norm { add: true, residual: true, added: false, relu: true, mapped: false },
    Norm { add: false, residual: false, added: false, relu: true, mapped: true },
    Norm { add: true, residual: false, added: false, relu: false, mapped: false },
    Norm { add: false, residual: false, added: true, relu: false, mapped: false },
];

/// What a norm reads and normalises with.
struct Read {
    x: Vec<f32>,
    gamma: Vec<f32>,
    beta: Vec<f32>,
    mean: Vec<f32>,
    invstd: Vec<f32>,
}

impl Read {
    fn of(&self, feature: usize) -> [f64; 4] {
        [&self.gamma, &self.beta, &self.mean, &self.invstd].map(|row| f64::from(row[feature]))
    }
}

/// A convolution after a norm of features around `offset`.
struct Layer {
    kernel: &'static str,
    input: [usize; 3],
    k: usize,
    filter: usize,
    stride: usize,
    pad: usize,
    n: usize,
    count: usize,
    offset: f32,
}

impl Layer {
    fn shape(&self) -> ConvShape {
        ConvShape::new(self.input, self.k, [self.filter; 2], self.stride, self.pad, self.n).unwrap()
    }

    /// The input gradient in so many tiles of a row, given what it does with its sums.
    fn agrees(
        &self,
        device: &Device,
        label: &str,
        norm: Norm,
        tiles: usize,
        product: &dyn Fn(&[f32], Dx, RealsMut),
    ) -> Vec<Vec<f32>> {
        let (shape, storage, n, count) = (self.shape(), Storage::Bf16, self.n, self.count);
        let label = format!("{label}: {shape}, {count} true, {norm:?}");
        let [rows, pixels] = [self.input[0], self.input[1] * self.input[2]];
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let mut real = |len: usize, middle: f32| {
            let value = |i| if i % n < count { middle + rng.random_range(-1.0..1.0) } else { 0.0 };
            storage.rounded((0..len).map(value).collect())
        };
        // Every third row of the result has none of x; the others are in their order.
        let source = |row: usize| if !norm.mapped { Some(row) } else { (row % 3 != 1).then_some(row - (row + 1) / 3) };
        let features = (0..rows).filter_map(source).count();
        let (dy, old) = (real(shape.output_len(), 0.0), real(shape.input_len(), 0.0));
        let x = [0.0, 0.1].map(|more| real(features * pixels * n, self.offset + more));
        let y: Vec<f32> = real(shape.input_len(), 0.0).iter().map(|y| y.max(0.0)).collect();
        let mut row = |low: f32, high: f32| (0..features).map(|_| rng.random_range(low..high)).collect::<Vec<f32>>();
        let norms = x.map(|x| Read {
            x,
            gamma: row(-1.5, 1.5),
            beta: row(-0.3, 0.3),
            mean: row(self.offset - 0.2, self.offset + 0.2),
            invstd: row(0.5, 2.0),
        });
        let norms = &norms[..if norm.added { 2 } else { 1 }];

        let upload = |values: &[f32]| storage.upload(device, values);
        let start = || if norm.add { upload(&old) } else { storage.unwritten(device, old.len()) };
        let mut alone = start();
        product(&dy, if norm.add { Dx::Add } else { Dx::Set }, alone.view_mut());
        let alone = storage.read(device, &alone);

        let map =
            norm.mapped.then(|| RowMap::new(device, features, &(0..rows).map(source).collect::<Vec<_>>()).unwrap());
        let on_device = |of: &Read| {
            let rows = [&of.gamma, &of.beta, &of.mean, &of.invstd].map(|row| device.upload(row).unwrap());
            (upload(&of.x), rows)
        };
        let (on_devices, on_y) = (norms.iter().map(on_device).collect::<Vec<_>>(), upload(&y));
        let normalised = |which: usize| {
            let (x, rows) = &on_devices[which];
            let [gamma, beta, mean, invstd] = rows.each_ref().map(Buffer::view);
            Normalised { x: x.view(), gamma, beta, mean, invstd }
        };
        let normed =
            Normed { norm: normalised(0), y: norm.residual.then(|| on_y.view()), relu: norm.relu, map: map.as_ref() };
        // Longer than they have to be, as scratch memory is.
        let (len, beyond) = (2 * features * tiles, 6);
        let mut dz = start();
        let [mut sums, mut of_added] = [(); 2].map(|()| unwritten(device, len + beyond));
        let (launches, done) = device.trace(|| {
            let added = norm.added.then(|| AddedNorm { norm: normalised(1), sums: of_added.view_mut() });
            let before = BeforeNorm { normed, added, add: norm.add, sums: sums.view_mut() };
            product(&dy, Dx::BeforeNorm(before), dz.view_mut());
            Ok(())
        });
        done.unwrap();
        let launched: Vec<_> = launches.iter().map(|launch| launch.kernel).collect();
        assert!(launched.contains(&self.kernel), "{label}: {launched:?}");
        let mut gradients = [&sums, &of_added].map(|sums| {
            let [mut dgamma, mut dbeta] = [(); 2].map(|()| unwritten(device, features));
            norm_join_gradient(device, sums.view(), tiles, dgamma.view_mut(), dbeta.view_mut()).unwrap();
            (dgamma, dbeta, storage.unwritten(device, norms[0].x.len()))
        });
        let shape = NormShape::new(features, pixels, n).unwrap();
        let mut scratch = unwritten(device, 2 * shape.scratch_len());
        let counted = device.upload(&[count as u32]).unwrap();
        let [(dgamma, dbeta, dx), rest] = &mut gradients;
        let [dgamma, dbeta] = [dgamma, dbeta].map(Buffer::view_mut);
        if norm.added {
            let pair = NormPair { norms: [0, 1].map(normalised), relu: norm.relu, count: counted.view() };
            let first = NormGradients { dgamma, dbeta, dx: dx.view_mut() };
            let second = NormGradients { dgamma: rest.0.view_mut(), dbeta: rest.1.view_mut(), dx: rest.2.view_mut() };
            let dz = NormPairGradient::Summed(dz.view());
            norm_pair_backward(device, &shape, pair, dz, scratch.view_mut(), [first, second]).unwrap();
        } else {
            let (dy, count) = (NormGradient::Summed(dz.view()), counted.view());
            let backward = NormBackward { normed, dy, training: true, count };
            let to = NormGradients { dgamma, dbeta, dx: dx.view_mut() };
            norm_backward(device, &shape, backward, scratch.view_mut(), to).unwrap();
        }

        let dz = storage.read(device, &dz);
        let (row_len, items) = (pixels * n, (pixels * count) as f64);
        let off = |which: usize, feature: usize, i: usize| {
            f64::from(norms[which].x[feature * row_len + i]) - norms[which].of(feature)[2]
        };
        for row in 0..rows {
            for i in 0..row_len {
                let at = row * row_len + i;
                let of_norm = |which: usize| {
                    source(row).map_or(0.0, |feature| {
                        let [gamma, beta, _, invstd] = norms[which].of(feature);
                        off(which, feature, i) * gamma * invstd + beta
                    })
                };
                let z = if norm.residual { f64::from(y[at]) } else { (0..norms.len()).map(of_norm).sum() };
                let undecided = z.abs() < UNDECIDED && !norm.residual && (dz[at] == alone[at] || dz[at] == 0.0);
                let want = if norm.relu && z <= 0.0 { 0.0 } else { alone[at] };
                assert!(undecided || dz[at].to_bits() == want.to_bits(), "{label}: dz: {at}: {} for {want}", dz[at]);
            }
        }
        let mut results = vec![dz.clone()];
        for (which, (sums, (dgamma, dbeta, dx))) in [&sums, &of_added].into_iter().zip(&gradients).enumerate() {
            let [sums, dgamma, dbeta] = [sums, dgamma, dbeta].map(|buffer| read(device, buffer.view()));
            if which == norms.len() {
                assert!(sums.iter().all(|sum| sum.is_nan()), "{label}: nothing is added");
                break;
            }
            assert!(sums[..len].iter().all(|sum| sum.is_finite()), "{label}: a tile is not summed");
            assert!(sums[len..].iter().all(|sum| sum.is_nan()), "{label}: beyond the last tile");
            let dx = storage.read(device, dx);
            for (row, feature) in (0..rows).filter_map(|row| Some((row, source(row)?))) {
                let [gamma, _, _, invstd] = norms[which].of(feature);
                let (mut sum, mut dot, mut squares) = (0.0, 0.0, [0.0; 2]);
                for i in 0..row_len {
                    let own = f64::from(dz[row * row_len + i]);
                    let terms = [own, own * off(which, feature, i) * invstd];
                    (sum, dot) = (sum + terms[0], dot + terms[1]);
                    squares = [0, 1].map(|which| squares[which] + terms[which] * terms[which]);
                }
                let sums = [("dbeta", &dbeta, sum, squares[0]), ("dgamma", &dgamma, dot, squares[1])];
                for (name, got, want, squares) in sums {
                    let (got, allowed) = (f64::from(got[feature]), TOLERANCE * squares.sqrt() + TOLERANCE * want.abs());
                    assert!(
                        (got - want).abs() <= allowed,
                        "{label}: {name} {which} of {row}: {got} for {want} within {allowed:.1e}"
                    );
                }
                for i in 0..row_len {
                    let own = f64::from(dz[row * row_len + i]);
                    let centred = own - sum / items - off(which, feature, i) * invstd * dot / items;
                    let want = if i % n < count { gamma * invstd * centred } else { 0.0 };
                    let (got, allowed) = (f64::from(dx[feature * row_len + i]), want.abs() / 250.0 + 1e-5);
                    assert!((got - want).abs() <= allowed, "{label}: dx {which}: row {row}, {i}: {got} for {want}");
                }
            }
            results.extend([sums[..len].to_vec(), dgamma, dbeta, dx]);
        }
        results
    }

    fn weights(&self) -> Vec<f32> {
        let (mut rng, inputs) = (ChaCha8Rng::seed_from_u64(7), self.k * self.filter * self.filter);
        (0..self.shape().weight_len()).map(|_| rng.random_range(-1.0..1.0) / (inputs as f32).sqrt()).collect()
    }

    fn dense(&self, device: &Device, label: &str) -> Vec<Vec<f32>> {
        let (shape, w) = (self.shape(), rounded(device, &self.shape(), &self.weights()));
        let tiles = shape.gradient_tiles(device, Precision::Bf16, None).unwrap();
        let product = |dy: &[f32], how: Dx, dx: RealsMut| {
            let dy = Storage::Bf16.upload(device, dy);
            conv_input_gradient(device, &shape, dy.view(), w.view().into(), how, dx).unwrap();
        };
        self.norms().flat_map(|&norm| self.agrees(device, label, norm, tiles, &product)).collect()
    }

    fn groups(&self, device: &Device, label: &str) -> Vec<Vec<f32>> {
        let weights = in_groups(device, &self.shape(), &self.weights(), Pass::InputGradient);
        let tiles = weights.gradient_tiles(device).unwrap();
        let product = |dy: &[f32], how: Dx, dx: RealsMut| {
            let dy = Storage::Bf16.upload(device, dy);
            conv_sparse_input_gradient(device, &weights, dy.view(), how, dx).unwrap();
        };
        self.norms().flat_map(|&norm| self.agrees(device, label, norm, tiles, &product)).collect()
    }

    /// Norms to put before it: of many blocks, which take seconds each, those that ask for most and for least.
    fn norms(&self) -> impl Iterator<Item = &'static Norm> {
        NORMS.iter().take(if self.is_large() { 2 } else { NORMS.len() })
    }

    fn is_large(&self) -> bool {
        self.n * self.input[1] * self.input[2] > 4000
    }
}

macro_rules! layer {
    ($kernel:literal, $input:expr, $k:literal, $filter:literal, $stride:literal, $pad:literal, $n:literal, $count:literal, $offset:literal) => {
        Layer {
            kernel: concat!("conv_", $kernel, "_bf16"),
            input: $input,
            k: $k,
            filter: $filter,
            stride: $stride,
            pad: $pad,
            n: $n,
            count: $count,
            offset: $offset,
        }
    };
}

/// Runs layers on each device that multiplies on tensor cores; without the large ones, which ThreadSanitizer would take minutes
/// for.
fn on_tensor_cores(layers: &[Layer], run: impl Fn(&Layer, &Device, &str) -> Vec<Vec<f32>>) {
    on_devices(|device, label| {
        if device.policy() != Policy::Staged {
            assert_eq!(layers[0].shape().gradient_tiles(device, Precision::Bf16, None), None, "{label}");
            return Vec::new();
        }
        let layers = layers.iter().filter(|layer| !cfg!(dilt_sanitize) || !layer.is_large());
        layers.flat_map(|layer| run(layer, device, label)).collect()
    });
}

#[test]
fn an_input_gradient_begins_the_backward_pass_of_the_norm_before() {
    let layers = [
        layer!("input_gradient_16x256", [9, 6, 4], 5, 3, 2, 1, 24, 17, 0.0),
        layer!("input_gradient_16x256", [16, 3, 5], 4, 1, 1, 0, 16, 15, 10.0),
        layer!("input_gradient_32x256", [20, 5, 5], 8, 1, 1, 0, 72, 70, 3.0),
        layer!("input_gradient_64x64", [40, 4, 4], 6, 3, 1, 1, 8, 5, 0.0),
        layer!("input_gradient_64x64", [100, 2, 2], 4, 1, 2, 0, 136, 130, 1.0),
        layer!("input_gradient_64x128", [33, 10, 10], 3, 1, 1, 0, 264, 259, 0.5),
        layer!("input_gradient_128x128", [130, 10, 10], 3, 3, 1, 1, 136, 129, 0.0),
    ];
    on_tensor_cores(&layers, Layer::dense);
}

#[test]
fn groups_of_rows_begin_the_backward_pass_of_the_norm_before() {
    let layers = [
        layer!("groups_input_gradient_32x128", [40, 4, 6], 6, 3, 2, 1, 40, 33, 0.0),
        layer!("groups_input_gradient_32x128", [70, 3, 3], 16, 1, 1, 0, 24, 24, 5.0),
        layer!("groups_input_gradient_32x256", [224, 8, 8], 3, 1, 1, 0, 120, 113, 2.0),
    ];
    on_tensor_cores(&layers, Layer::groups);
}

#[test]
fn wgmma_begins_the_backward_pass_of_the_norm_before() {
    let layers = [
        layer!("input_gradient_wgmma_64x128", [64, 3, 3], 72, 1, 1, 0, 64, 50, 4.0),
        layer!("input_gradient_wgmma_128x128", [130, 4, 2], 64, 3, 2, 1, 64, 64, 0.0),
        layer!("input_gradient_wgmma_128x256", [72, 1, 1], 64, 1, 1, 0, 33792, 33789, 1.0),
    ];
    on_tensor_cores(&layers, |layer, device, label| {
        by_wgmma(device).map_or_else(Vec::new, |device| layer.dense(&device, label))
    });
}

#[test]
fn groups_of_rows_by_wgmma_begin_the_backward_pass_of_the_norm_before() {
    let layers = [
        layer!("groups_input_gradient_wgmma_64x128", [72, 4, 2], 64, 3, 2, 1, 64, 50, 4.0),
        layer!("groups_input_gradient_wgmma_64x256", [130, 1, 1], 64, 1, 1, 0, 11264, 11261, 1.0),
    ];
    on_tensor_cores(&layers, |layer, device, label| {
        by_wgmma(device).map_or_else(Vec::new, |device| layer.groups(&device, label))
    });
}

#[test]
fn sums_that_nothing_makes_are_refused() {
    let refused = |policy: Policy, image: usize, precision: Precision, missing: usize, features: usize| {
        let device = Device::host(HostOptions { policy, ..HostOptions::default() }).unwrap();
        let shape = ConvShape::new([8, image, 4], 8, [1, 1], 2, 0, 8).unwrap();
        let real = |len: usize| device.alloc_reals(len, precision).unwrap();
        let (dy, w, x) = (real(shape.output_len()), real(shape.weight_len()), real(shape.input_len()));
        let (mut dx, of_features) = (real(shape.input_len()), device.alloc(features).unwrap());
        let tiles = shape.gradient_tiles(&device, precision, None).unwrap_or(1);
        let mut sums = device.alloc(2 * 8 * tiles - missing).unwrap();
        let row = of_features.view();
        let norm = Normalised { x: x.view(), gamma: row, beta: row, mean: row, invstd: row };
        let normed = Normed { norm, y: None, relu: true, map: None };
        let how = Dx::BeforeNorm(BeforeNorm { normed, added: None, add: false, sums: sums.view_mut() });
        conv_input_gradient(&device, &shape, dy.view(), w.view(), how, dx.view_mut()).unwrap_err().to_string()
    };
    for (policy, image, precision) in [
        (Policy::Direct, 4, Precision::Bf16),
        (Policy::Staged, 4, Precision::F32),
        (Policy::Staged, 3, Precision::Bf16),
    ] {
        let error = refused(policy, image, precision, 0, 8);
        assert!(error.contains("conv_input_gradient: sums for a norm: expected none but by tensor cores"), "{error}");
    }
    let error = refused(Policy::Staged, 4, Precision::Bf16, 1, 8);
    assert!(error.contains("elements of sums: expected 64, got 63"), "{error}");
    let error = refused(Policy::Staged, 4, Precision::Bf16, 0, 7);
    assert!(error.contains("elements of gamma: expected 8, got 7"), "{error}");

    let of_a_sum = |with_y: bool, missing: usize| {
        let device = Device::host(HostOptions { policy: Policy::Staged, ..HostOptions::default() }).unwrap();
        let shape = ConvShape::new([8, 4, 4], 8, [1, 1], 1, 0, 8).unwrap();
        let real = |len: usize| device.alloc_reals(len, Precision::Bf16).unwrap();
        let (dy, w, x, y) =
            (real(shape.output_len()), real(shape.weight_len()), real(shape.input_len()), real(shape.input_len()));
        let (mut dx, of_features) = (real(shape.input_len()), device.alloc(8).unwrap());
        let needed = 2 * 8 * shape.gradient_tiles(&device, Precision::Bf16, None).unwrap();
        let [mut sums, mut of_added] = [needed, needed - missing].map(|len| device.alloc(len).unwrap());
        let row = of_features.view();
        let norm = Normalised { x: x.view(), gamma: row, beta: row, mean: row, invstd: row };
        let normed = Normed { norm, y: with_y.then(|| y.view()), relu: true, map: None };
        let added = Some(AddedNorm { norm, sums: of_added.view_mut() });
        let how = Dx::BeforeNorm(BeforeNorm { normed, added, add: false, sums: sums.view_mut() });
        conv_input_gradient(&device, &shape, dy.view(), w.view(), how, dx.view_mut())
    };
    of_a_sum(false, 0).unwrap();
    let error = of_a_sum(true, 0).unwrap_err().to_string();
    assert!(error.contains("a sum of two norms: expected no map, and no y"), "{error}");
    let error = of_a_sum(false, 1).unwrap_err().to_string();
    assert!(error.contains("elements of sums of the added norm: expected 16, got 15"), "{error}");

    let device = Device::open("host").unwrap();
    let [mut dgamma, mut dbeta] = [8, 8].map(|len| device.alloc(len).unwrap());
    let sums = device.alloc(47).unwrap();
    let error = norm_join_gradient(&device, sums.view(), 3, dgamma.view_mut(), dbeta.view_mut()).unwrap_err();
    assert!(error.to_string().contains("elements of tiles: expected 48, got 47"), "{error}");
}
