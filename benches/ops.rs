//! Single operations on the shapes of ResNet-20 at batch 128 and of vision transformers, products in bf16 too, augmentation at 224 too,
//! exact selection of 1M and 25M weights, and couplings of 256 and 512 probes.
//!
//! `cargo bench --bench ops [FILTER]`, on the device that `DILT_BENCH_DEVICE` names (auto, host, cuda; auto if not set).
//! Convolutions report floating point operations per second (elem/s), the others bytes read and written.

use std::time::Duration;

use criterion::{BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use dilt::device::{Buffer, Device, Precision};
use dilt::ops::Columns;
use dilt::ops::attention::{AttentionInput, AttentionSaved, AttentionShape, attention_backward, attention_forward};
use dilt::ops::augment::{
    Augment, Colours, Crop, GatherInto, GatherShape, GatherSource, RandomCrop, draw, gather, grey_means, resample,
};
use dilt::ops::conv::{ConvShape, conv_forward, conv_input_gradient, conv_weight_gradient};
use dilt::ops::conv_sparse::{conv_sparse_forward, conv_sparse_input_gradient, conv_sparse_weight_gradient};
use dilt::ops::distances::{DistanceShape, Metric, distance_matrix, pitch};
use dilt::ops::epilogue::{Dx, Epilogue};
use dilt::ops::gw::{Couplings, Layers, Start, Step};
use dilt::ops::kept::{Kept, KeptWeights, Pass};
use dilt::ops::layer_norm::{
    LayerNormAffine, LayerNormBackward, LayerNormShape, LayerNormStatistics, layer_norm_backward, layer_norm_forward,
};
use dilt::ops::loss::{LossInput, LossShape, LossTables, cross_entropy};
use dilt::ops::norm::{
    NormAffine, NormBackward, NormGradient, NormGradients, NormInput, NormRunning, NormSaved, NormShape, Normalised,
    Normed, norm_backward, norm_forward,
};
use dilt::ops::optimizer::{OptimizerInput, Sgd, sgd_step};
use dilt::ops::pool::{MeanPoolShape, PoolShape, max_pool_forward, mean_pool_forward};
use dilt::ops::prune::{Selection, prune_scratch_len, prune_smallest};
use ndarray::Array2;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const BATCH: usize = 128;

struct Bench<'a> {
    device: Device,
    group: BenchmarkGroup<'a, WallTime>,
}

/// Numbers between -1 and 1, the same in every run.
fn numbers(len: usize) -> Vec<f32> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

impl Bench<'_> {
    fn tensor(&self, len: usize) -> Buffer<f32> {
        self.device.upload(&numbers(len)).expect("enough memory")
    }

    fn time(&mut self, name: &str, throughput: Throughput, mut op: impl FnMut(&Device) -> dilt::Result<()>) {
        let device = self.device.clone();
        self.group.throughput(throughput);
        self.group.bench_function(name, |bencher| {
            bencher.iter_custom(|count| {
                let begin = device.event().expect("an event");
                (0..count).for_each(|_| op(&device).expect("the operation runs"));
                let milliseconds = device.event().and_then(|end| end.elapsed_ms(&begin)).expect("an event");
                Duration::from_secs_f64(milliseconds / 1e3)
            });
        });
    }

    fn convolution(&mut self, channels: usize, image: usize, filters: usize, stride: usize) -> dilt::Result<()> {
        let shape = ConvShape::new([channels, image, image], filters, [3, 3], stride, 1, BATCH)?;
        let name = format!("conv {channels}x{image}x{image} to {filters}, stride {stride}");
        self.passes(&name, shape)?;
        self.sparse(&name, shape)
    }

    /// A linear layer over the tokens of so many samples: 14 x 14 patches and one more.
    fn linear(&mut self, channels: usize, filters: usize, samples: usize) -> dilt::Result<()> {
        let shape = ConvShape::new([channels, 1, 1], filters, [1, 1], 1, 0, Columns::tokens(samples, 197)?.len())?;
        let name = format!("linear {channels} to {filters}, {samples} samples");
        self.passes(&name, shape)?;
        self.sparse(&name, shape)
    }

    /// The same layer with random masks, kept weights alone: operations are those of kept weights.
    fn sparse(&mut self, name: &str, shape: ConvShape) -> dilt::Result<()> {
        let [x, dy, w] = [shape.input_len(), shape.output_len(), shape.weight_len()].map(|len| self.tensor(len));
        let [mut y, mut dx, mut dw] =
            [shape.output_len(), shape.input_len(), shape.weight_len()].map(|len| self.tensor(len));
        for sparsity in [0.5, 0.75, 0.9, 0.95, 0.98] {
            let mut rng = ChaCha8Rng::seed_from_u64(7);
            let places: Vec<u32> = (0..shape.weight_len() as u32).filter(|_| !rng.random_bool(sparsity)).collect();
            let kept = Kept { places: &places, packed: false };
            let mut kept = KeptWeights::new(&self.device, &shape, Precision::F32, &kept, None, &Pass::ALL)?;
            let flop = Throughput::Elements(2 * (shape.multiply_adds() / shape.weight_len() * places.len()) as u64);
            let name = format!("{name}, {}% pruned", sparsity * 100.0);
            self.time(&format!("sparse {name}: forward"), flop.clone(), |device| {
                kept.gather(device, w.view())?;
                conv_sparse_forward(device, &kept, x.view().into(), Epilogue::default(), y.view_mut().into())
            });
            self.time(&format!("sparse {name}: input gradient"), flop.clone(), |device| {
                conv_sparse_input_gradient(device, &kept, dy.view().into(), Dx::Set, dx.view_mut().into())
            });
            self.time(&format!("sparse {name}: weight gradient"), flop, |device| {
                conv_sparse_weight_gradient(device, &mut kept, x.view().into(), dy.view().into(), dw.view_mut(), None)
            });
        }
        Ok(())
    }

    /// In both precisions.
    fn passes(&mut self, name: &str, shape: ConvShape) -> dilt::Result<()> {
        let flop = Throughput::Elements(2 * shape.multiply_adds() as u64);
        for precision in Precision::ALL {
            let reals = |len: usize| self.device.upload_reals(&numbers(len), precision);
            let (x, w) = (reals(shape.input_len())?, reals(shape.read_weight_len(precision))?);
            let (dy, mut y, mut dx) =
                (reals(shape.output_len())?, reals(shape.output_len())?, reals(shape.input_len())?);
            let scratch_len = shape.gradient_scratch_len(&self.device, precision);
            let (mut dw, mut scratch) = (self.tensor(shape.weight_len()), self.tensor(scratch_len));
            let name = if precision.is_f32() { name.to_owned() } else { format!("bf16 {name}") };
            self.time(&format!("{name}: forward"), flop.clone(), |device| {
                conv_forward(device, &shape, x.view(), w.view(), Epilogue::default(), y.view_mut())
            });
            self.time(&format!("{name}: input gradient"), flop.clone(), |device| {
                conv_input_gradient(device, &shape, dy.view(), w.view(), Dx::Set, dx.view_mut())
            });
            self.time(&format!("{name}: weight gradient"), flop.clone(), |device| {
                conv_weight_gradient(device, &shape, x.view(), dy.view(), scratch.view_mut(), dw.view_mut(), None)
            });
        }
        Ok(())
    }

    fn norm(&mut self, features: usize, image: usize) -> dilt::Result<()> {
        let shape = NormShape::new(features, image * image, BATCH)?;
        let tensor = |len| self.tensor(len);
        let (x, dy, mut y, mut dx) =
            (tensor(shape.len()), tensor(shape.len()), tensor(shape.len()), tensor(shape.len()));
        let (gamma, beta, mut scratch) = (tensor(features), tensor(features), tensor(shape.scratch_len()));
        let (mut mean, mut var, mut saved, mut invstd) =
            (tensor(features), tensor(features), tensor(features), tensor(features));
        let (mut dgamma, mut dbeta) = (tensor(features), tensor(features));
        let count = self.device.upload(&[BATCH as u32])?;
        let bytes = 4 * shape.len() as u64;
        let input = NormInput { x: x.view().into(), residual: None, relu: true, map: None, count: count.view() };
        let affine = NormAffine { gamma: gamma.view(), beta: beta.view(), epsilon: 1e-5 };
        self.time(&format!("norm forward {features}x{image}x{image}"), Throughput::Bytes(3 * bytes), |device| {
            let running = NormRunning { mean: mean.view_mut(), var: var.view_mut(), momentum: 0.1 };
            let saved = NormSaved { mean: saved.view_mut(), invstd: invstd.view_mut() };
            norm_forward(device, &shape, input, affine, running, saved, scratch.view_mut(), y.view_mut().into())
        });
        self.time(&format!("norm backward {features}x{image}x{image}"), Throughput::Bytes(5 * bytes), |device| {
            let input = NormBackward {
                normed: Normed {
                    norm: Normalised {
                        x: x.view().into(),
                        gamma: gamma.view(),
                        beta: beta.view(),
                        mean: saved.view(),
                        invstd: invstd.view(),
                    },
                    y: None,
                    relu: true,
                    map: None,
                },
                dy: NormGradient::Kept(dy.view().into()),
                training: true,
                count: count.view(),
            };
            let to = NormGradients { dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut(), dx: dx.view_mut().into() };
            norm_backward(device, &shape, input, scratch.view_mut(), to)
        });
        Ok(())
    }

    /// Over the columns of 197 tokens, the batch of ViT-Tiny's step bench.
    fn layer_norm(&mut self, features: usize, samples: usize) -> dilt::Result<()> {
        let shape = LayerNormShape::new(features, Columns::tokens(samples, 197)?)?;
        let [x, dy, mut y, mut dx] = [(); 4].map(|()| self.tensor(shape.len()));
        let [gamma, beta, mut dgamma, mut dbeta] = [(); 4].map(|()| self.tensor(features));
        let [mut mean, mut invstd] = [(); 2].map(|()| self.tensor(shape.columns()));
        let mut scratch = self.tensor(shape.scratch_len());
        let count = self.device.upload(&[samples as u32])?;
        let (name, bytes) = (format!("{features} features, {samples} samples"), 4 * shape.len() as u64);
        self.time(&format!("layer norm forward {name}"), Throughput::Bytes(2 * bytes), |device| {
            let affine = LayerNormAffine { gamma: gamma.view(), beta: beta.view(), epsilon: 1e-6 };
            let saved = LayerNormStatistics { mean: mean.view_mut(), invstd: invstd.view_mut() };
            layer_norm_forward(device, &shape, x.view().into(), affine, count.view(), Some(saved), y.view_mut().into())
        });
        self.time(&format!("layer norm backward {name}"), Throughput::Bytes(3 * bytes), |device| {
            let input = LayerNormBackward {
                x: x.view().into(),
                dy: dy.view().into(),
                gamma: gamma.view(),
                mean: mean.view(),
                invstd: invstd.view(),
                count: count.view(),
                accumulate: false,
            };
            let (dgamma, dbeta) = (dgamma.view_mut(), dbeta.view_mut());
            layer_norm_backward(device, &shape, input, scratch.view_mut(), dgamma, dbeta, dx.view_mut().into())
        });
        Ok(())
    }

    /// Operations are those of the formula: two products forward, five backward.
    fn attention(&mut self, heads: usize, head_dim: usize, tokens: usize, n: usize) -> dilt::Result<()> {
        let shape = AttentionShape::new(heads, head_dim, tokens, n)?;
        let (qkv, dy) = (self.tensor(shape.qkv_len()), self.tensor(shape.output_len()));
        let (mut y, mut dqkv) = (self.tensor(shape.output_len()), self.tensor(shape.qkv_len()));
        let (mut lse, mut delta) = (self.tensor(shape.statistic_len()), self.tensor(shape.statistic_len()));
        let (live, count) = (self.device.upload(&vec![1u32; heads])?, self.device.upload(&[n as u32])?);
        let input = AttentionInput { qkv: qkv.view().into(), live: live.view(), count: count.view() };
        let name = format!("{heads} heads of {head_dim}, {tokens} tokens, {n} samples");
        let product = (2 * heads * head_dim * tokens * tokens * n) as u64;
        self.time(&format!("attention forward {name}"), Throughput::Elements(2 * product), |device| {
            attention_forward(device, &shape, input, Some(lse.view_mut()), y.view_mut().into())
        });
        self.time(&format!("attention backward {name}"), Throughput::Elements(5 * product), |device| {
            let saved = AttentionSaved { y: y.view().into(), lse: lse.view() };
            attention_backward(device, &shape, input, saved, dy.view().into(), delta.view_mut(), dqkv.view_mut().into())
        });
        Ok(())
    }

    fn pools(&mut self) -> dilt::Result<()> {
        let shape = PoolShape::new(64, [32, 32], 3, 2, 1, BATCH)?;
        let (x, mut y) = (self.tensor(shape.input_len()), self.tensor(shape.output_len()));
        let mut index = self.device.alloc::<u8>(shape.output_len())?;
        let bytes = Throughput::Bytes((4 * shape.input_len() + 5 * shape.output_len()) as u64);
        self.time("max pool 3x3 stride 2, 64x32x32", bytes, |device| {
            max_pool_forward(device, &shape, x.view().into(), index.view_mut(), y.view_mut().into())
        });
        let shape = MeanPoolShape::new(64, 64, BATCH)?;
        let (x, mut y) = (self.tensor(shape.input_len()), self.tensor(shape.output_len()));
        self.time("mean pool 64x8x8", Throughput::Bytes(4 * shape.input_len() as u64), |device| {
            mean_pool_forward(device, &shape, x.view().into(), y.view_mut().into())
        });
        Ok(())
    }

    /// A batch of images `[3, image, image]` from stored ones: bytes are those of x and one read for each of its elements.
    fn augment(&mut self, stored: usize, image: usize) -> dilt::Result<()> {
        let shape = GatherShape::new([3, stored, stored], [image, image], BATCH)?;
        let bytes: Vec<u8> =
            (0..BATCH * shape.image_len()).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let (images, labels) = (self.device.upload(&bytes)?, self.device.alloc::<u32>(BATCH)?);
        let order = self.device.upload(&(0..BATCH as u32).collect::<Vec<_>>())?;
        let (state, count) = (self.device.upload(&[0u32, 1])?, self.device.upload(&[BATCH as u32])?);
        let (mean, std) = (self.device.upload(&[0.5f32; 3])?, self.device.upload(&[0.25f32; 3])?);
        let (mut x, mut to_labels) = (self.tensor(shape.output_len()), self.device.alloc::<u32>(BATCH)?);
        let mut boxes = self.device.alloc::<i32>(BATCH * GatherShape::BOX)?;
        let (mut factors, mut grey) = (self.tensor(BATCH * GatherShape::FACTORS), self.tensor(BATCH));
        let (images, labels, order, state) = (images.view(), labels.view(), order.view(), state.view());
        let source = GatherSource { images, labels, order, state, count: count.view(), scale: 255.0 };
        let (mean, std) = (mean.view(), std.view());
        let (name, bytes) =
            (format!("3x{image}x{image} of {stored}"), Throughput::Bytes(5 * shape.output_len() as u64));
        self.time(&format!("gather {name}"), bytes.clone(), |device| {
            let into = GatherInto { mean, std, x: x.view_mut().into(), labels: to_labels.view_mut() };
            gather(device, &shape, source, Some(RandomCrop { pad: 4, flip: true, seed: 0 }), into)
        });
        for jitter in [0.0, 0.4] {
            self.time(&format!("resample {name}, jitter {jitter}"), bytes.clone(), |device| {
                let augment = Augment { crop: Crop::Resized, flip: true, jitter, seed: 0 };
                draw(device, &shape, state, augment, boxes.view_mut(), factors.view_mut())?;
                if jitter > 0.0 {
                    grey_means(device, &shape, source, boxes.view(), factors.view(), grey.view_mut())?;
                }
                let colours = (jitter > 0.0).then_some(Colours { factors: factors.view(), grey: grey.view() });
                let into = GatherInto { mean, std, x: x.view_mut().into(), labels: to_labels.view_mut() };
                resample(device, &shape, source, boxes.view(), colours, into)
            });
        }
        Ok(())
    }

    fn loss(&mut self) -> dilt::Result<()> {
        let shape = LossShape::new(1000, BATCH)?;
        let (logits, mut gradient) = (self.tensor(shape.len()), self.tensor(shape.len()));
        let labels = self.device.upload(&[7u32; BATCH])?;
        let (count, step) = (self.device.upload(&[BATCH as u32])?, self.device.upload(&[0u32])?);
        let (mut loss, mut top1, mut top5) =
            (self.device.alloc::<f32>(1)?, self.device.alloc(1)?, self.device.alloc(1)?);
        self.time("cross entropy, 1000 classes", Throughput::Bytes(8 * shape.len() as u64), |device| {
            let (labels, count, step) = (labels.view(), count.view(), step.view());
            let input = LossInput { logits: logits.view().into(), labels, count, step, smoothing: 0.1 };
            let tables = LossTables { loss: loss.view_mut(), top1: top1.view_mut(), top5: top5.view_mut() };
            cross_entropy(device, &shape, input, tables, Some(gradient.view_mut().into()))
        });
        Ok(())
    }

    fn sgd(&mut self, elements: usize) -> dilt::Result<()> {
        let (gradients, mut weights, mut velocity) =
            (self.tensor(elements), self.tensor(elements), self.tensor(elements));
        let mask = self.device.upload(&vec![u32::MAX; elements.div_ceil(32)])?;
        let rate = self.device.upload(&[1e-3f32])?;
        let sgd = Sgd { momentum: 0.9, nesterov: false, weight_decay: 1e-4 };
        self.time(&format!("sgd of {elements}"), Throughput::Bytes(20 * elements as u64), |device| {
            let (rate, gradients, mask) = (rate.view(), gradients.view(), mask.view());
            let input = OptimizerInput { rate, gradients, mask, decay: None, clip: None };
            sgd_step(device, &sgd, input, weights.view_mut(), velocity.view_mut())
        });
        Ok(())
    }

    /// Removes a fifth of all weights.
    fn prune(&mut self, elements: usize) -> dilt::Result<()> {
        let weights = self.tensor(elements);
        let live = self.device.upload(&vec![u32::MAX; elements.div_ceil(32)])?;
        let mut mask = self.device.upload(&vec![u32::MAX; elements.div_ceil(32)])?;
        let mut scratch = self.device.alloc::<u32>(prune_scratch_len(elements))?;
        self.time(&format!("prune a fifth of {elements}"), Throughput::Bytes(4 * elements as u64), |device| {
            let selection = Selection { weights: weights.view(), live: live.view(), remove: elements / 5 };
            prune_smallest(device, selection, scratch.view_mut(), mask.view_mut())
        });
        Ok(())
    }

    /// Between all probes; three operations a pair and a feature.
    fn distances(&mut self, features: usize, n: usize) -> dilt::Result<()> {
        let shape = DistanceShape { features, columns: n, n };
        let x = self.tensor(features * n);
        let (mut scratch, mut c) = (self.tensor(shape.scratch_len()), self.tensor(n * pitch(n)));
        let mut largest = self.tensor(n + 1);
        let operations = Throughput::Elements((3 * features * n * n / 2) as u64);
        self.time(&format!("distances of {n} probes, {features} features"), operations, |device| {
            let (scratch, c, largest) = (scratch.view_mut(), c.view_mut(), largest.view_mut());
            distance_matrix(device, &shape, Metric::Euclidean, x.view().into(), scratch, c, largest)
        });
        Ok(())
    }

    /// A proximal step of couplings of `n` probes with 50 Sinkhorn iterations; two operations a multiplication.
    fn couplings(&mut self, n: usize, count: usize) -> dilt::Result<()> {
        let x = numbers(2 * n);
        let layer = |x: &[f32]| Array2::from_shape_fn((n, n), |(i, j)| (x[i] - x[j]).abs() / 2.0);
        let layers = [layer(&x[..n]), layer(&x[n..])];
        let layers = Layers::new(&self.device, &layers.each_ref().map(Array2::view))?;
        let mut couplings = Couplings::new(&self.device, &layers, &vec![([0, 1], Start::Product); count])?;
        let step = Step { epsilon: 0.1, iterations: 50, tolerance: -1.0, enough: None };
        couplings.begin(&self.device, &step)?;
        let operations = Throughput::Elements((count * (4 * n * n * n + 50 * 4 * n * n)) as u64);
        self.time(&format!("proximal step of {count} couplings of {n}"), operations, |device| {
            couplings.step(device, &step)
        });
        Ok(())
    }
}

fn main() -> dilt::Result<()> {
    // As the program does.
    rayon::ThreadPoolBuilder::new().use_current_thread().build_global().expect("nothing has run yet");
    let name = std::env::var("DILT_BENCH_DEVICE").unwrap_or_else(|_| "auto".into());
    let device = Device::open(&name)?;
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .configure_from_args();
    let group = criterion.benchmark_group(device.description());
    let mut bench = Bench { device, group };
    for (channels, image, filters, stride) in
        [(3, 32, 16, 1), (16, 32, 16, 1), (16, 32, 32, 2), (32, 16, 32, 1), (32, 16, 64, 2), (64, 8, 64, 1)]
    {
        bench.convolution(channels, image, filters, stride)?;
    }
    for samples in [8, 64] {
        for (channels, filters) in [(192, 192), (192, 576), (192, 768), (768, 192)] {
            bench.linear(channels, filters, samples)?;
        }
    }
    for (features, image) in [(16, 32), (32, 16), (64, 8)] {
        bench.norm(features, image)?;
    }
    bench.layer_norm(192, 16)?;
    bench.attention(3, 64, 197, 8)?;
    bench.attention(4, 32, 65, BATCH)?;
    bench.augment(32, 32)?;
    bench.augment(256, 224)?;
    bench.pools()?;
    bench.loss()?;
    bench.sgd(1_000_000)?;
    bench.prune(1_000_000)?;
    bench.prune(25_000_000)?;
    bench.distances(16 * 32 * 32, 512)?;
    bench.couplings(256, 28)?;
    bench.couplings(512, 28)?;
    bench.group.finish();
    Ok(())
}
