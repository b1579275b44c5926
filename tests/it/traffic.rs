//! What a training step has to compute and to move, beside what is counted by hand.

use std::collections::BTreeMap;

use dilt::device::{Device, HostOptions, Policy, Precision};
use dilt::mask::Mask;
use dilt::nn::config::ModelConfig;
use dilt::nn::layout::Layout;
use dilt::nn::model::Layer;
use dilt::nn::paths::Planning;
use dilt::nn::plan::{OptimizerKind, Use};
use dilt::nn::traffic::{LayerWork, Work, conv_weight_gradient, evaluation, training_step};
use dilt::ops::conv::ConvShape;

fn step_of(model: &str, set: &[&str], batch: usize, masks: &BTreeMap<String, Mask>) -> Vec<LayerWork> {
    let set: Vec<String> = set.iter().map(|&field| field.into()).collect();
    let model = ModelConfig::load(model, &set).unwrap().build().unwrap();
    let device = Device::host(HostOptions::default()).unwrap();
    let memory_for = Use::Train(OptimizerKind::Sgd);
    let layout = Layout::new(&device, &model, masks, batch, memory_for, &Planning::Table).unwrap();
    training_step(&device, &layout, batch, memory_for, false).unwrap()
}

fn layer<'a>(step: &'a [LayerWork], name: &str) -> &'a LayerWork {
    step.iter().find(|layer| layer.name == name).unwrap_or_else(|| panic!("{name} is not in {step:?}"))
}

fn work(flop: usize, read: usize, written: usize) -> Work {
    Work { flop, read: 4 * read, written: 4 * written }
}

#[test]
fn a_residual_network_moves_what_is_counted_by_hand() {
    // Images of 1 x 8 x 8, 16 samples.
    let step = step_of("resnet8", &["widths=[4,8,16]"], 16, &BTreeMap::new());
    let pixels = |size: usize| size * size * 16;

    // The images have no gradient.
    let (x, w, y) = (pixels(8), 4 * 9, 4 * pixels(8));
    assert_eq!(layer(&step, "conv1").forward, work(2 * 9 * y, x + w, y));
    assert_eq!(layer(&step, "conv1").backward, work(2 * 9 * y, x + y, w));
    // The statistics read x, the norm reads it again; backwards x and dy are read twice.
    assert_eq!(layer(&step, "bn1").forward, work(0, 2 * y, y));
    assert_eq!(layer(&step, "bn1").backward, work(0, 4 * y, y));
    // Stride 2, 4 to 8 channels; its input's gradient is added to that of the shortcut.
    let (x, w, y) = (4 * pixels(8), 8 * 4 * 9, 8 * pixels(4));
    let product = 2 * 4 * 9 * y;
    assert_eq!(layer(&step, "layer2.0.conv1").forward, work(product, x + w, y));
    assert_eq!(layer(&step, "layer2.0.conv1").backward, work(2 * product, (x + y) + (y + w + x), w + x));
    // Every second pixel of 4 channels is read, 8 channels are written; backwards the pixels between become zero.
    assert_eq!(layer(&step, "layer2.0.shortcut").forward, work(0, 4 * pixels(4), y));
    assert_eq!(layer(&step, "layer2.0.shortcut").backward, work(0, 4 * pixels(4), x));
    // A norm to which the shortcut is added before ReLU: backwards y is read too, two gradients are written, and that of the
    // shortcut is read instead of dy and y.
    assert_eq!(layer(&step, "layer2.0.bn2").forward, work(0, 3 * y, y));
    assert_eq!(layer(&step, "layer2.0.bn2").backward, work(0, 5 * y, 2 * y));
    // Weights, gradients and velocity; bits of mask and weight decay.
    let update = layer(&step, "optimizer").update;
    let parameters = update.written / 8;
    assert_eq!(update.read, 12 * parameters + parameters / 8 * 2);
    let names: Vec<&str> = step.iter().rev().take(3).map(|layer| layer.name.as_str()).collect();
    assert_eq!(names, ["optimizer", "loss", "linear"]);
}

#[test]
fn in_bf16_activations_and_weights_move_half_as_many_bytes() {
    let model = |precision| {
        let mut config = ModelConfig::load("resnet8", &[]).unwrap();
        config.precision = precision;
        let device = Device::open("host").unwrap();
        let (memory_for, model) = (Use::Train(OptimizerKind::Sgd), config.build().unwrap());
        let layout = Layout::new(&device, &model, &BTreeMap::new(), 16, memory_for, &Planning::Table).unwrap();
        training_step(&device, &layout, 16, memory_for, false).unwrap()
    };
    let [full, half] = [Precision::F32, Precision::Bf16].map(model);
    for name in ["bn1", "layer1.0.conv1", "loss"] {
        let [full, half] = [&full, &half].map(|step| layer(step, name).forward);
        assert_eq!((full.read, full.written, full.flop), (2 * half.read, 2 * half.written, half.flop), "{name}");
    }
}

#[test]
fn a_norm_reads_once_what_tensor_cores_have_summed_forward_and_backward() {
    let mut config = ModelConfig::load("resnet8", &["widths=[4,8,16]".into()]).unwrap();
    config.precision = Precision::Bf16;
    let staged = HostOptions { policy: Policy::Staged, ..HostOptions::default() };
    let [direct, staged] = [HostOptions::default(), staged].map(|options| {
        let (device, model) = (Device::host(options).unwrap(), config.build().unwrap());
        let of = |memory_for: Use, step: &dyn Fn(&Layout) -> Vec<LayerWork>| {
            step(&Layout::new(&device, &model, &BTreeMap::new(), 16, memory_for, &Planning::Table).unwrap())
        };
        let train = Use::Train(OptimizerKind::Sgd);
        let step = of(train, &|layout| training_step(&device, layout, 16, train, false).unwrap());
        let evaluation = of(Use::Evaluate, &|layout| evaluation(&device, layout, 16).unwrap());
        (step, evaluation, device)
    });
    let shape = ConvShape::new([4, 8, 8], 4, [3, 3], 1, 1, 16).unwrap();
    // 4 features of 8 x 8 pixels and 16 samples, in tiles of 256 columns: mean and squared deviations of each, f32.
    let (y, tiles) = (2 * 4 * 8 * 8 * 16, 4 * (8 * 8 * 16 / 256) * 2 * 4);
    let forward = |step: &[LayerWork], name: &str| layer(step, name).forward;
    let (summed, plain) = (forward(&staged.0, "conv1"), forward(&direct.0, "conv1"));
    assert_eq!((summed.read, summed.written), (plain.read + tiles, plain.written + tiles));
    let [summed, plain] = [&staged.0, &direct.0].map(|step| forward(step, "bn1"));
    assert_eq!((summed.read, plain.read, summed.written), (y, 2 * y, plain.written));
    // Evaluation has running statistics.
    for name in ["conv1", "bn1"] {
        assert_eq!(forward(&staged.1, name), forward(&direct.1, name), "{name}");
    }
    assert_eq!(forward(&staged.1, "bn1"), summed);
    // Backward: its ReLU and sums are the epilogue's of what comes last to its result, a convolution of 4 to 4 channels, which
    // reads x and as many tiles of sums beside; so the norm reads x and dz alone.
    let backward = [&staged.0, &direct.0].map(|step| layer(step, "bn1").backward);
    assert_eq!(backward.map(|work| (work.read, work.written)), [(2 * y, y), (4 * y, y)]);
    let [summed, plain] = [&staged.0, &direct.0].map(|step| layer(step, "layer1.0.conv1").backward);
    let partial = |device: &Device| conv_weight_gradient(device, &shape, shape.output_len(), Precision::Bf16);
    let [summed_dw, plain_dw] = [&staged.2, &direct.2].map(partial);
    assert_eq!(summed.read - summed_dw.read, plain.read - plain_dw.read + y + tiles);
    assert_eq!(summed.written - summed_dw.written, plain.written - plain_dw.written + tiles);
    // And y, where ReLU follows a sum.
    let backward = [&staged.0, &direct.0].map(|step| layer(step, "layer1.0.bn2").backward);
    assert_eq!(backward.map(|work| (work.read, work.written)), [(2 * y, y), (5 * y, 2 * y)]);
}

#[test]
fn a_block_whose_shortcut_has_a_norm_reads_once_what_both_norms_read() {
    let step = step_of("resnet18", &["widths=[4,8]", "stages=[1,1]", "image=[3,16,16]"], 8, &BTreeMap::new());
    // The stem leaves 4 x 4 pixels, the second stage 8 channels of 2 x 2.
    let y = 8 * 2 * 2 * 8;
    // Of the shortcut's norm the statistics alone are its own.
    let shortcut = layer(&step, "layer2.0.downsample.1");
    assert_eq!((shortcut.forward, shortcut.backward), (work(0, y, 0), Work::default()));
    // Statistics, then both x, and the sum; backwards dy and both x twice, and both gradients.
    let sum = layer(&step, "layer2.0.bn2");
    assert_eq!((sum.forward, sum.backward), (work(0, y + 2 * y, y), work(0, 6 * y, 2 * y)));
    let alone = layer(&step, "layer1.0.bn2");
    let y = 4 * 4 * 4 * 8;
    assert_eq!((alone.forward, alone.backward), (work(0, 3 * y, y), work(0, 5 * y, 2 * y)));

    let mut config = ModelConfig::load("resnet18", &["widths=[4,8]".into(), "stages=[1,2]".into()]).unwrap();
    config.precision = Precision::Bf16;
    let device = Device::host(HostOptions { policy: Policy::Staged, ..HostOptions::default() }).unwrap();
    let (train, model) = (Use::Train(OptimizerKind::Sgd), config.build().unwrap());
    let layout = Layout::new(&device, &model, &BTreeMap::new(), 8, train, &Planning::Table).unwrap();
    let step = training_step(&device, &layout, 8, train, false).unwrap();
    // Tensor cores sum for both: dz and both x once, and the product before reads both x and writes sums for both.
    let y = 8 * 28 * 28 * 8 * 2;
    let (first, next) = (layer(&step, "layer2.0.bn2"), layer(&step, "layer2.1.conv1").backward);
    assert_eq!((first.forward.read, first.backward.read, first.backward.written), (2 * y, 3 * y, 2 * y));
    let shape = ConvShape::new([8, 28, 28], 8, [3, 3], 1, 1, 8).unwrap();
    let dw = conv_weight_gradient(&device, &shape, shape.output_len(), Precision::Bf16);
    let (weights, tiles) = (8 * 9 * 8 * 2, 8 * 2 * 4 * (28 * 28 * 8usize).div_ceil(256));
    assert_eq!(next.read - dw.read, y + weights + y + 2 * y + 2 * tiles);
    assert_eq!(next.written - dw.written, y + 2 * tiles);
}

#[test]
fn a_vision_transformer_multiplies_what_is_counted_by_hand() {
    let step = step_of("vit_digits", &[], 8, &BTreeMap::new());
    let attention = step.iter().find(|layer| layer.name.ends_with(".attn")).unwrap();
    // Two products forward, five backward, of as many true tokens.
    assert_eq!(attention.backward.flop * 2, attention.forward.flop * 5);
    let gelu = step.iter().find(|layer| layer.name.ends_with(".mlp.act")).unwrap();
    assert_eq!(gelu.forward.read * 3, gelu.backward.bytes());
    // The sum's gradient is that of both summands.
    let sum = step.iter().find(|layer| layer.name.ends_with(".ls1")).unwrap();
    assert_eq!((sum.forward.read, sum.backward), (2 * sum.forward.written, Work::default()));
}

#[test]
fn what_stands_in_an_epilogue_moves_what_the_product_does_not_have() {
    let mut config = ModelConfig::load("vit_digits", &[]).unwrap();
    config.precision = Precision::Bf16;
    let staged = HostOptions { policy: Policy::Staged, ..HostOptions::default() };
    let train = Use::Train(OptimizerKind::Adamw);
    let [alone, fused] = [HostOptions::default(), staged].map(|options| {
        let (device, model) = (Device::host(options).unwrap(), config.build().unwrap());
        let layout = Layout::new(&device, &model, &BTreeMap::new(), 16, train, &Planning::Table).unwrap();
        training_step(&device, &layout, 16, train, false).unwrap()
    });
    let of = |name: &str| [&alone, &fused].map(|step| layer(step, name));
    let [alone, fused] = of("blocks.0.mlp.act");
    let h = alone.forward.written;
    assert_eq!((alone.forward.read, alone.backward.read, alone.backward.written), (h, 2 * h, h));
    assert_eq!((fused.forward.read, fused.forward.written), (0, h));
    assert_eq!((fused.backward.read, fused.backward.written), (h, 0));
    let [alone, fused] = of("blocks.0.ls1");
    assert_eq!((alone.forward.read, fused.forward.read), (2 * alone.forward.written, fused.forward.written));
    // The gradient of a bias reads dy once more; partial sums are others.
    let [alone, fused] = of("blocks.0.attn.proj");
    let y = fused.forward.written;
    let model = config.build().unwrap();
    let is_projection = |layer: &&Layer| model.values[layer.output()].name == "blocks.0.attn.proj";
    let shape = model.conv_shape(model.layers.iter().find(is_projection).unwrap(), 16).unwrap();
    let [others, own] = [HostOptions::default(), staged].map(|options| {
        conv_weight_gradient(&Device::host(options).unwrap(), &shape, shape.output_len(), Precision::Bf16).read
    });
    assert_eq!(alone.backward.read - others, fused.backward.read - own + y);
}

/// SPEED: 24.3 GFLOP an image in three passes, as others count ResNet-50.
#[test]
fn resnet50_has_the_operations_that_others_count() {
    let step = step_of("resnet50", &[], 8, &BTreeMap::new());
    let gflop = step.iter().map(|layer| layer.total().flop).sum::<usize>() as f64 / 8e9;
    assert!((gflop / 24.3 - 1.0).abs() < 0.02, "{gflop} GFLOP");
}

#[test]
fn a_ticket_multiplies_its_kept_weights_alone() {
    let names = ["layer1.0.conv1.weight"];
    let masks = names.map(|name| (name.to_owned(), Mask::from_fn(&[16, 16, 3, 3], |place| place % 50 == 0)));
    let (dense, ticket) = (step_of("resnet20", &[], 8, &BTreeMap::new()), step_of("resnet20", &[], 8, &masks.into()));
    let [dense, ticket] = [&dense, &ticket].map(|step| layer(step, "layer1.0.conv1").forward);
    let kept = (16 * 16 * 9usize).div_ceil(50);
    assert_eq!(ticket.flop * 16 * 16 * 9, dense.flop * kept);
    // A value and a place for each.
    assert_eq!(dense.read - ticket.read, 4 * 16 * 16 * 9 - 8 * kept);
}
