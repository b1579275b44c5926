//! Convolution in bf16 by TMA and wgmma, on the host's meaning of them, and on a Hopper GPU.

use dilt::device::{Device, HostOptions, Policy};
use dilt::ops::Columns;
use dilt::ops::conv::ConvShape;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use crate::command::{dilt, failed};
use crate::conv::Layer;
use crate::support::{Storage, by_wgmma, on_devices};

/// Of so many true samples: beside float32 on the host, by the rule of bf16, and by no other kernels.
fn agrees(shape: &ConvShape, n: usize, count: usize) {
    let mut rng = ChaCha8Rng::seed_from_u64(shape.weight_len() as u64);
    let mut values = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0..1.0)).collect() };
    let [mut x, mut dy] = [shape.input_len(), shape.output_len()].map(&mut values);
    let [w, bias] = [shape.weight_len(), shape.filters()].map(values);
    // Padding is zero, as every kernel writes it.
    for pixel in [&mut x, &mut dy].into_iter().flat_map(|values| values.chunks_mut(n)) {
        pixel[count..].fill(0.0);
    }
    let columns = Columns::samples(n).unwrap();
    let layer = Layer { shape: *shape, columns, count, x: &x, w: &w, bias: Some(&bias), dy: &dy };
    let want = layer.passes(&Device::host(HostOptions::default()).unwrap(), Storage::F32);
    on_devices(|device, label| {
        let Some(device) = by_wgmma(device) else { return Vec::new() };
        let label = format!("{label}: {shape}");
        let (launches, done) = device.trace(|| {
            layer.passes(&device, Storage::Bf16);
            Ok(())
        });
        done.unwrap();
        let kernels = launches.iter().map(|launch| launch.kernel);
        let products = kernels.filter(|name| name.contains("conv_") && !name.contains("sum_splits"));
        let (by_wgmma, others): (Vec<_>, Vec<_>) = products.partition(|name| name.contains("_wgmma_"));
        assert_eq!((by_wgmma.len(), others), (8, vec![]), "{label}");
        layer.judge_bf16(&device, &label, &want.y, &want.dx, &want.dw)
    });
}

#[test]
fn images_agree_with_float32() {
    for (input, k, filter, stride, pad, n, count) in [
        ([72, 3, 4], 130, [3, 3], 1, 1, 64, 50),
        ([64, 5, 4], 70, [3, 3], 2, 1, 64, 64),
        ([130, 3, 2], 64, [1, 1], 2, 0, 128, 65),
        ([65, 4, 4], 66, [2, 3], 3, 2, 64, 1),
    ] {
        agrees(&ConvShape::new(input, k, filter, stride, pad, n).unwrap(), n, count);
    }
}

#[test]
fn linear_layers_agree_with_float32() {
    agrees(&ConvShape::new([200, 1, 1], 136, [1, 1], 1, 0, 192).unwrap(), 192, 180);
    // The largest tile, whose blocks are the code of the others: too many for a sanitizer's run.
    if !cfg!(dilt_sanitize) {
        let n = 132 * 256;
        agrees(&ConvShape::new([64, 1, 1], 72, [1, 1], 1, 0, n).unwrap(), n, n - 3);
        agrees(&ConvShape::new([72, 1, 1], 64, [1, 1], 1, 0, n).unwrap(), n, n - 3);
    }
}

#[test]
fn other_layers_take_the_portable_kernels() {
    let device = Device::host(HostOptions { policy: Policy::Staged, wgmma: true, ..HostOptions::default() }).unwrap();
    assert!(device.wgmma() && device.description().ends_with(", wgmma"));
    // Few channels, few filters, samples that fill no box.
    for (c, k, n) in [(63, 64, 64), (64, 63, 64), (64, 64, 72)] {
        let shape = ConvShape::new([c, 2, 2], k, [1, 1], 1, 0, n).unwrap();
        let [x, w, dy] = [shape.input_len(), shape.weight_len(), shape.output_len()].map(|len| vec![1.0; len]);
        let columns = Columns::samples(n).unwrap();
        let layer = Layer { shape, columns, count: n, x: &x, w: &w, bias: None, dy: &dy };
        let (launches, done) = device.trace(|| {
            let y = layer.passes(&device, Storage::Bf16).y;
            assert!(y.iter().all(|&y| y == c as f32), "{shape}");
            Ok(())
        });
        done.unwrap();
        assert!(launches.iter().all(|launch| !launch.kernel.contains("wgmma")), "{launches:?}");
    }
}

#[test]
fn a_device_that_does_not_stage_is_refused() {
    let direct = HostOptions { wgmma: true, ..HostOptions::default() };
    let error = Device::host(direct).err().unwrap();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("DILT_HOST_POLICY=staged"), "{error}");
}

#[test]
#[cfg_attr(dilt_sanitize, ignore = "minutes, and the kernels are those of the tests above")]
fn a_vision_transformer_trains_by_wgmma_as_it_does_without() {
    if !Device::open("auto").unwrap().has_wgmma() {
        return eprintln!("skipped: the GPU has no wgmma");
    }
    let folder = tempfile::tempdir().unwrap();
    let train = |wgmma: &str| {
        let out = format!("wgmma-{wgmma}");
        let model = ["--model", "vit_digits", "--set", "dim=64", "--set", "heads=2", "--set", "depth=1"];
        let few = ["--limit", "128", "--steps", "3", "--batch", "64", "--lr", "2e-3", "--precision", "bf16"];
        let mut command = dilt(folder.path(), &[&["train", "--out", &out, "-q", "--json"], &model[..], &few].concat());
        let output = command.env("DILT_WGMMA", wgmma).env("DILT_HOST_POLICY", "staged").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let result: Value = serde_json::from_slice(&output.stdout).unwrap();
        (result["loss"].as_f64().unwrap(), std::fs::read(folder.path().join(out).join("weights.safetensors")).unwrap())
    };
    let ((with, own), (without, others)) = (train("1"), train("0"));
    assert!((with - without).abs() < 5e-3 * without, "{with}, without {without}");
    assert!(own != others, "sums in another order have other bits");
}

#[test]
fn what_the_variable_may_say_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = dilt(folder.path(), &["bench", "--model", "resnet8", "--device", "host"]);
    command.env("DILT_WGMMA", "yes");
    failed(command, "DILT_WGMMA=yes", 2, &["environment variable DILT_WGMMA: expected 0 or 1, got 'yes'"]);
}
