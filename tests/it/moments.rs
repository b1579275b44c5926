//! Statistics of a batch norm's input that come out of the convolution which makes it, against float64 sums of what it has
//! stored; and a network that trains so.

use dilt::device::{Buffer, Device, HostOptions, Policy, Precision, Reals, RealsMut};
use dilt::nn::config::ModelConfig;
use dilt::nn::model::{Layer, Model};
use dilt::nn::network::{Mode, Network};
use dilt::nn::paths::Planning;
use dilt::nn::plan::{OptimizerKind, Use};
use dilt::nn::ways::Way;
use dilt::nn::weights::Weights;
use dilt::ops::Columns;
use dilt::ops::conv::{ConvShape, conv_forward};
use dilt::ops::conv_sparse::conv_sparse_forward;
use dilt::ops::epilogue::{Bias, Epilogue, TileStatistics};
use dilt::ops::kept::Pass;
use dilt::ops::norm::{NormRunning, NormSaved, NormShape};
use dilt::ops::norm_join::norm_join;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::compact::tickets;
use crate::conv::rounded;
use crate::conv_sparse::in_groups;
use crate::support::{Storage, by_wgmma, on_devices, read, unwritten};

/// A few roundings of f32, 6e-8 each, of the deviation.
const TOLERANCE: f64 = 4e-6;
/// One rounding of the mean itself.
const ROUNDING: f64 = 1.2e-7;
const EPSILON: f32 = 1e-5;

/// Mean and squared deviations in f64.
fn moments(values: impl Iterator<Item = f32> + Clone) -> (f64, f64, f64) {
    let items = values.clone().count().max(1) as f64;
    let mean = values.clone().map(f64::from).sum::<f64>() / items;
    (items, mean, values.map(|value| (f64::from(value) - mean).powi(2)).sum())
}

fn close(got: f32, want: f64, allowed: f64, what: &str) {
    assert!((f64::from(got) - want).abs() <= allowed, "{what}: {got}, expected {want} within {allowed:.1e}");
}

/// How far a mean may be off.
fn allowed((items, mean, squares): (f64, f64, f64)) -> f64 {
    TOLERANCE * (squares / items).sqrt() + ROUNDING * mean.abs()
}

/// How far squared deviations may be off: means of parts are rounded, and so are their distances from the mean.
fn allowed_squares((items, mean, squares): (f64, f64, f64)) -> f64 {
    let rounding = ROUNDING * mean.abs();
    TOLERANCE * squares + 2.0 * rounding * (squares * items).sqrt() + items * rounding.powi(2)
}

/// A convolution whose results lie around `offset`, about `spread` apart.
struct Summed {
    kernel: &'static str,
    input: [usize; 3],
    k: usize,
    filter: [usize; 2],
    stride: usize,
    pad: usize,
    n: usize,
    counts: &'static [usize],
    offset: f32,
    spread: f32,
}

/// Forward of x to y with statistics.
type Forward<'a> = &'a dyn Fn(Reals, TileStatistics, RealsMut);

impl Summed {
    fn shape(&self) -> ConvShape {
        ConvShape::new(self.input, self.k, self.filter, self.stride, self.pad, self.n).unwrap()
    }

    /// Of so many true samples; tiles have so many columns.
    fn agrees(&self, device: &Device, label: &str, tile: usize, count: usize, forward: Forward) -> Vec<Vec<f32>> {
        let (shape, storage, n) = (self.shape(), Storage::Bf16, self.n.next_multiple_of(8));
        let label = format!("{label}: {shape}, {count} true");
        let mut rng = ChaCha8Rng::seed_from_u64(count as u64);
        let mut value =
            |i: usize| if i % n < count { self.offset + self.spread * rng.random_range(-1.0..1.0) } else { 0.0 };
        let x = storage.upload(device, &(0..shape.input_len()).map(&mut value).collect::<Vec<_>>());
        let mut y = storage.unwritten(device, shape.output_len());
        let counted = device.upload(&[count as u32]).unwrap();
        // Longer than it has to be, as scratch memory is.
        let (len, beyond) = (shape.statistics_len(tile), 6);
        let mut tiles = unwritten(device, len + beyond);
        let (launches, done) = device.trace(|| {
            forward(x.view(), TileStatistics { count: counted.view(), tiles: tiles.view_mut() }, y.view_mut());
            Ok(())
        });
        done.unwrap();
        let launched: Vec<_> = launches.iter().map(|launch| launch.kernel).collect();
        assert!(launched.contains(&self.kernel), "{label}: {launched:?}");

        let y = storage.read(device, &y);
        let (got, row) = (read(device, tiles.view()), y.len() / self.k);
        assert!(got[len..].iter().all(|value| value.is_nan()), "{label}: beyond the last tile");
        let of = |k: usize, columns: std::ops::Range<usize>| {
            columns.filter(|column| column % n < count).map(|column| y[k * row + column]).collect::<Vec<_>>()
        };
        let per_row = row.div_ceil(tile);
        for (i, got) in got[..len].chunks(2).enumerate() {
            let (k, first) = (i / per_row, i % per_row * tile);
            let values = of(k, first..row.min(first + tile));
            let want = moments(values.iter().copied());
            let label = format!("{label}: row {k}, column {first}");
            close(got[0], want.1, allowed(want), &format!("{label}: mean"));
            close(got[1], want.2, allowed_squares(want), &format!("{label}: squared deviations"));
        }

        let norm = NormShape::new(self.k, row / n, n).unwrap();
        let full = |value: f32| device.upload(&vec![value; self.k]).unwrap();
        let (mut mean, mut invstd) = (unwritten(device, self.k), unwritten(device, self.k));
        let (mut running_mean, mut running_var) = (full(2.0), full(3.0));
        let running = NormRunning { mean: running_mean.view_mut(), var: running_var.view_mut(), momentum: 0.25 };
        let saved = NormSaved { mean: mean.view_mut(), invstd: invstd.view_mut() };
        norm_join(device, &norm, tiles.view(), tile, counted.view(), EPSILON, running, saved).unwrap();
        let results = [&mean, &invstd, &running_mean, &running_var].map(|buffer| read(device, buffer.view()));
        for k in 0..self.k {
            let [own_mean, own_invstd, own_running_mean, own_running_var] = results.each_ref().map(|result| result[k]);
            let label = format!("{label}: row {k}");
            let all = moments(of(k, 0..row).into_iter());
            let (items, mean, squares) = all;
            close(own_mean, mean, allowed(all), &format!("{label}: mean"));
            let var = squares / items + f64::from(EPSILON);
            let apart = TOLERANCE + allowed_squares(all) / items / var;
            close(own_invstd, 1.0 / var.sqrt(), apart / var.sqrt(), &format!("{label}: invstd"));
            let share = if count == 0 { 0.0 } else { 0.25 };
            let moved = |old: f64, new: f64| old + share * (new - old);
            close(own_running_mean, moved(2.0, mean), allowed(all) + TOLERANCE, &format!("{label}: running mean"));
            let unbiased = squares / (items - 1.0).max(1.0);
            close(
                own_running_var,
                moved(3.0, unbiased),
                TOLERANCE * 3.0 + apart * unbiased,
                &format!("{label}: running var"),
            );
        }
        [vec![got[..len].to_vec(), y], results.to_vec()].concat()
    }

    /// Weights of about as much as one together.
    fn weights(&self) -> Vec<f32> {
        let (mut rng, inputs) = (ChaCha8Rng::seed_from_u64(7), self.input[0] * self.filter[0] * self.filter[1]);
        (0..self.shape().weight_len()).map(|_| rng.random_range(0.2..1.8) / inputs as f32).collect()
    }

    fn dense(&self, device: &Device, label: &str) -> Vec<Vec<f32>> {
        let (shape, w) = (self.shape(), rounded(device, &self.shape(), &self.weights()));
        let tile = shape.statistics_tile(device, Precision::Bf16, None).unwrap();
        let forward = |x: Reals, statistics: TileStatistics, y: RealsMut| {
            let epilogue = Epilogue { statistics: Some(statistics), ..Epilogue::default() };
            conv_forward(device, &shape, x, w.view().into(), epilogue, y).unwrap();
        };
        self.counts.iter().flat_map(|&count| self.agrees(device, label, tile, count, &forward)).collect()
    }

    fn groups(&self, device: &Device, label: &str) -> Vec<Vec<f32>> {
        let weights = in_groups(device, &self.shape(), &self.weights(), Pass::Forward);
        let tile = weights.statistics_tile(device).unwrap();
        let forward = |x: Reals, statistics: TileStatistics, y: RealsMut| {
            let epilogue = Epilogue { statistics: Some(statistics), ..Epilogue::default() };
            conv_sparse_forward(device, &weights, x, epilogue, y).unwrap();
        };
        self.counts.iter().flat_map(|&count| self.agrees(device, label, tile, count, &forward)).collect()
    }
}

macro_rules! layer {
    ($kernel:literal, $input:expr, $k:literal, $filter:expr, $stride:literal, $pad:literal, $n:literal, $counts:expr, $offset:literal, $spread:literal) => {
        Summed {
            kernel: concat!("conv_", $kernel, "_bf16"),
            input: $input,
            k: $k,
            filter: $filter,
            stride: $stride,
            pad: $pad,
            n: $n,
            counts: &$counts,
            offset: $offset,
            spread: $spread,
        }
    };
}

/// Those of many blocks, which ThreadSanitizer would take minutes for.
fn large(layer: &Summed) -> bool {
    layer.n * layer.input[1] * layer.input[2] > 4000
}

/// Whether a device multiplies on tensor cores.
fn staged(device: &Device) -> bool {
    device.policy() == Policy::Staged
}

#[test]
fn a_convolution_sums_each_tile_of_what_it_stores() {
    let layers = [
        layer!("forward_16x256", [5, 7, 6], 9, [3, 3], 2, 1, 24, [0, 1, 17, 24], 0.0, 1.0),
        layer!("forward_16x256", [4, 3, 5], 16, [1, 1], 1, 0, 16, [1, 15], 1000.0, 8.0),
        layer!("forward_32x256", [8, 5, 5], 20, [1, 1], 1, 0, 72, [70], 1000.0, 8.0),
        layer!("forward_64x64", [6, 4, 4], 40, [3, 3], 1, 1, 8, [5, 8], 0.0, 1.0),
        layer!("forward_64x64", [4, 3, 3], 100, [1, 1], 1, 0, 136, [1, 130], 10.0, 0.1),
        layer!("forward_64x128", [3, 10, 10], 33, [1, 1], 1, 0, 264, [259], 1.0, 0.5),
        layer!("forward_128x128", [3, 10, 10], 130, [3, 3], 1, 1, 136, [129], 0.0, 1.0),
    ];
    on_devices(|device, label| {
        if !staged(device) {
            assert_eq!(layers[0].shape().statistics_tile(device, Precision::Bf16, None), None, "{label}");
            return Vec::new();
        }
        let layers = layers.iter().filter(|layer| !cfg!(dilt_sanitize) || !large(layer));
        layers.flat_map(|layer| layer.dense(device, label)).collect()
    });
}

#[test]
fn groups_of_rows_sum_each_tile_of_what_they_store() {
    let layers = [
        layer!("groups_forward_32x128", [6, 4, 5], 40, [3, 3], 2, 1, 40, [0, 1, 33], 0.0, 1.0),
        layer!("groups_forward_32x128", [16, 3, 3], 70, [1, 1], 1, 0, 24, [24], 1000.0, 8.0),
        layer!("groups_forward_32x256", [3, 8, 8], 224, [1, 1], 1, 0, 120, [113], 2.0, 0.5),
    ];
    on_devices(|device, label| {
        let layers = layers.iter().filter(|layer| staged(device) && (!cfg!(dilt_sanitize) || !large(layer)));
        layers.flat_map(|layer| layer.groups(device, label)).collect()
    });
}

#[test]
fn a_convolution_by_wgmma_sums_each_tile_of_what_it_stores() {
    let layers = [
        layer!("forward_wgmma_64x128", [72, 3, 3], 64, [1, 1], 1, 0, 64, [1, 50], 1000.0, 8.0),
        layer!("forward_wgmma_128x128", [64, 5, 4], 130, [3, 3], 2, 1, 64, [64], 0.0, 1.0),
        layer!("forward_wgmma_128x256", [64, 1, 1], 72, [1, 1], 1, 0, 33792, [33789], 1.0, 0.5),
    ];
    on_devices(|device, label| {
        let Some(device) = by_wgmma(device) else { return Vec::new() };
        let layers = layers.iter().filter(|layer| !cfg!(dilt_sanitize) || !large(layer));
        layers.flat_map(|layer| layer.dense(&device, label)).collect()
    });
}

#[test]
fn groups_of_rows_by_wgmma_sum_each_tile_of_what_they_store() {
    let layers = [
        layer!("groups_forward_wgmma_64x128", [64, 4, 5], 72, [3, 3], 2, 1, 64, [1, 50], 0.0, 1.0),
        layer!("groups_forward_wgmma_64x256", [64, 1, 1], 130, [1, 1], 1, 0, 11264, [11261], 2.0, 0.5),
    ];
    on_devices(|device, label| {
        let Some(device) = by_wgmma(device) else { return Vec::new() };
        let layers = layers.iter().filter(|layer| !cfg!(dilt_sanitize) || !large(layer));
        layers.flat_map(|layer| layer.groups(&device, label)).collect()
    });
}

#[test]
fn statistics_that_nothing_makes_are_refused() {
    let device = Device::host(HostOptions { policy: Policy::Staged, ..HostOptions::default() }).unwrap();
    let shape = ConvShape::new([8, 2, 2], 8, [1, 1], 1, 0, 64).unwrap();
    let tile = shape.statistics_tile(&device, Precision::Bf16, None).unwrap();
    let (len, count) = (shape.statistics_len(tile), device.upload(&[8u32]).unwrap());
    let refused = |precision: Precision, len: usize, tokens: bool| {
        let real = |len: usize| device.alloc_reals(len, precision).unwrap();
        let (x, w, mut y) = (real(shape.input_len()), real(shape.weight_len()), real(shape.output_len()));
        let (mut tiles, bias) = (device.alloc(len).unwrap(), device.alloc(8).unwrap());
        let columns = Columns::tokens(1, 8).unwrap();
        let bias = tokens.then(|| Bias { bias: bias.view(), columns, count: count.view() });
        let statistics = TileStatistics { count: count.view(), tiles: tiles.view_mut() };
        let epilogue = Epilogue { bias, statistics: Some(statistics), beside: None };
        conv_forward(&device, &shape, x.view(), w.view(), epilogue, y.view_mut()).unwrap_err().to_string()
    };
    for error in [refused(Precision::F32, len, false), refused(Precision::Bf16, len, true)] {
        assert!(error.contains("conv_forward: statistics: expected none but of images that tensor cores"), "{error}");
    }
    let error = refused(Precision::Bf16, len - 1, false);
    assert!(error.contains(&format!("elements of statistics: expected {len}, got {}", len - 1)), "{error}");

    let norm = NormShape::new(8, 4, 64).unwrap();
    let mut rows: [Buffer<f32>; 4] = std::array::from_fn(|_| device.alloc(8).unwrap());
    let [mean, var, saved, invstd] = rows.each_mut().map(Buffer::view_mut);
    let (running, saved) = (NormRunning { mean, var, momentum: 0.1 }, NormSaved { mean: saved, invstd });
    let tiles = device.alloc(len - 1).unwrap();
    let error = norm_join(&device, &norm, tiles.view(), tile, count.view(), EPSILON, running, saved).unwrap_err();
    assert!(error.to_string().contains(&format!("elements of tiles: expected {len}")), "{error}");
}

/// Checks a step's statistics and norms against float64 of what the step itself has stored; whether there are some that are
/// fused and write more rows than they read.
fn norms_normalise_what_is_stored(
    device: &Device,
    model: &Model,
    weights: &Weights,
    planning: &Planning,
    label: &str,
) -> bool {
    const SAMPLES: usize = 13;
    let memory = Use::Train(OptimizerKind::Sgd);
    let mut network = Network::for_masks(device, model, &weights.masks, SAMPLES, memory, planning).unwrap();
    network.load(weights).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let pixels = model.image.iter().product::<usize>();
    let mut value = |i: usize| if i % 16 < SAMPLES { rng.random_range(-1.0..1.0) } else { 0.0 };
    let x: Vec<f32> = (0..16 * pixels).map(&mut value).collect();
    let into = network.batch();
    device.write_reals(&x, into.x).unwrap();
    device.write(&[SAMPLES as u32], into.current.count).unwrap();
    let (launches, values) = {
        let mut values = vec![Vec::new(); model.values.len()];
        let outputs: Vec<usize> = network.computed().layers.iter().map(Layer::output).collect();
        let (launches, done) = device.trace(|| {
            network.forward_with(Mode::Train, |index, y| {
                values[outputs[index]] = device.read_reals(y)?;
                Ok(())
            })
        });
        done.unwrap();
        (launches, values)
    };
    let launched = |name: &str| launches.iter().filter(|launch| launch.kernel.starts_with(name)).count();
    let trained = network.weights().unwrap();
    let (compaction, computed) = (network.compaction(), network.computed());
    let (mut norms, mut fused, mut mapped) = (0, 0, false);
    // What a norm makes that another adds, or a max pool reads, is nowhere but here; how many norms there are that other kernels
    // see to, summed for by tensor cores or not.
    let (mut unwritten, mut elsewhere) = (vec![Vec::new(); values.len()], [0, 0]);
    for layer in &computed.layers {
        let Layer::Norm { scale, shift, statistics, input, residual, relu, output } = *layer else { continue };
        norms += 1;
        let writer = computed.layers.iter().position(|layer| layer.output() == input).unwrap();
        let direct = network.choices()[writer].as_ref().is_some_and(|choice| choice.ways[0] == Way::Direct);
        fused += usize::from(!direct);
        let is_elsewhere = [Some(output), residual].into_iter().flatten().any(|value| values[value].is_empty());
        elsewhere[usize::from(direct)] += usize::from(is_elsewhere);
        let of =
            |of: &Weights, name: &str, feature: u32| f64::from(of.tensors[name].as_slice().unwrap()[feature as usize]);
        let (from, to) = (compaction.features(input), compaction.features(output));
        mapped |= !direct && residual.is_some() && from.len() < to.len();
        let row = 16 * computed.values[input].image()[1..].iter().product::<usize>();
        let [scale, shift] = [scale, shift].map(|id| &computed.parameters[id].name);
        let statistics = &computed.statistics[statistics].name;
        for (place, feature) in to.iter().enumerate() {
            let what = format!("{label}: {statistics}: feature {feature}");
            let source = from.iter().position(|from| from == feature);
            let mut normalise: Box<dyn Fn(f32) -> f64> = Box::new(|_| 0.0);
            if let Some(source) = source {
                let values = (0..row).filter(|i| i % 16 < SAMPLES).map(|i| values[input][source * row + i]);
                let all = moments(values);
                let (items, mean, squares) = all;
                for (name, new) in [("running_mean", mean), ("running_var", squares / (items - 1.0))] {
                    let name = format!("{statistics}.{name}");
                    let [old, got] = [weights, &trained].map(|weights| of(weights, &name, *feature));
                    let want = 0.9 * old + 0.1 * new;
                    let share = 0.1 * (allowed(all) + allowed_squares(all) / items);
                    let apart = 2.0 * ROUNDING * (old.abs() + want.abs()) + share;
                    close(got as f32, want, apart, &format!("{what}: {name}"));
                }
                let [scale, shift] = [scale, shift].map(|name| of(&trained, name, *feature));
                let scale = scale / (squares / items + f64::from(EPSILON)).sqrt();
                normalise = Box::new(move |x| (f64::from(x) - mean) * scale + shift);
            }
            for i in 0..row {
                let x = source.map_or(0.0, |source| values[input][source * row + i]);
                let at = place * row + i;
                let added = residual.map_or(0.0, |residual| match values[residual].get(at) {
                    Some(&added) => f64::from(added),
                    None => unwritten[residual][at],
                });
                let z = if i % 16 < SAMPLES { normalise(x) + added } else { 0.0 };
                let want = if relu { z.max(0.0) } else { z };
                if values[output].is_empty() {
                    unwritten[output].push(want);
                    continue;
                }
                // One rounding to bf16 of the result, a few of f32 of what it is made of.
                let allowed = want.abs() / 256.0 + 1e-5 * (1.0 + added.abs() + z.abs());
                close(values[output][at], want, allowed, &format!("{what}: element {i}"));
            }
        }
    }
    let [summed, others] = elsewhere;
    let pools = computed.layers.iter().filter(|layer| matches!(layer, Layer::MaxPool { .. })).count();
    let kernels =
        ["norm_join", "norm_eval", "norm_statistics", "norm_forward", "norm_pair_forward", "norm_pool_forward"];
    let launched = kernels.map(launched);
    let (alone, pairs) = (norms - fused, (summed + others - pools) / 2);
    let expected = [fused + others, fused - summed, alone, alone - others, pairs, pools];
    assert!(norms > 0 && launched == expected, "{label}: {launched:?} for {expected:?}");
    mapped
}

#[test]
#[cfg_attr(dilt_sanitize, ignore = "minutes, and the kernels are those of other tests")]
fn a_network_normalises_by_what_its_convolutions_have_summed() {
    let small = ["classes=3", "image=[2,16,16]", "widths=[8,16]", "stages=[2,2]"].map(String::from);
    let device =
        Device::host(HostOptions { policy: Policy::Staged, schedule: Some(1), ..HostOptions::default() }).unwrap();
    let mut mapped = 0;
    for name in ["resnet18", "resnet50"] {
        let mut config = ModelConfig::load(name, &small).unwrap();
        config.precision = Precision::Bf16;
        let model = config.build().unwrap();
        for (ticket, mut weights) in tickets(&model).into_iter().filter(|(ticket, _)| *ticket != "nothing") {
            for way in Way::ALL {
                let label = format!("{name}: {ticket}: {}", way.name());
                let planning = Planning::Only(way);
                mapped += usize::from(norms_normalise_what_is_stored(&device, &model, &weights, &planning, &label));
            }
            weights.masks.clear();
            norms_normalise_what_is_stored(&device, &model, &weights, &Planning::Table, &format!("{name}: all"));
        }
    }
    assert!(mapped > 0, "no norm of a compact network");
}
