//! Token columns against float64 goldens of PyTorch's: linear layers, patches, embedding and pooling.

use dilt::device::Device;
use dilt::ops::Columns;
use dilt::ops::conv::{Bias, ConvShape, conv_bias_gradient, conv_forward, conv_input_gradient, conv_weight_gradient};

use crate::support::{Golden, Tensor, on_devices, read, unwritten};

/// f32 sums of up to a few hundred products, against float64.
const TOLERANCE: f64 = 2e-6;

/// `[N, T, D]` to `[D, N, T]`, N and T padded to multiples of 8 with zeros.
fn tokens_last(tensor: &Tensor) -> Vec<f32> {
    let [n, tokens, features] = tensor.shape[..] else { panic!("{:?}", tensor.shape) };
    let (padded, row) = (n.next_multiple_of(8), tokens.next_multiple_of(8));
    let mut out = vec![0.0; features * padded * row];
    for (i, &value) in tensor.data.iter().enumerate() {
        let (sample, token, feature) = (i / features / tokens, i / features % tokens, i % features);
        out[(feature * padded + sample) * row + token] = value as f32;
    }
    out
}

/// Compares values in dilt's layout with a tensor `[N, T, D]`; padded tokens and samples must be exactly zero.
fn check_tokens_last(want: &Tensor, got: &[f32], tolerance: f64, label: &str) {
    let [n, tokens, features] = want.shape[..] else { panic!("{:?}", want.shape) };
    let (padded, row) = (n.next_multiple_of(8), tokens.next_multiple_of(8));
    assert_eq!(got.len(), features * padded * row, "{label}: number of elements");
    let mut back = vec![0.0; want.data.len()];
    for (i, &value) in got.iter().enumerate() {
        let (feature, sample, token) = (i / row / padded, i / row % padded, i % row);
        if sample < n && token < tokens {
            back[(sample * tokens + token) * features + feature] = value;
        } else {
            assert!(value == 0.0, "{label}: {value} in a padded column");
        }
    }
    want.check(&back, tolerance, label);
}

#[test]
fn linear_layers_over_token_columns_agree_with_pytorch() {
    let golden = Golden::open("linear");
    on_devices(|device, label| {
        let mut results = Vec::new();
        for case in golden.cases() {
            let label = format!("{label}: {case}");
            let tensor = |name: &str| golden.get(&case, name);
            let [n, tokens, c] = tensor("x").shape[..] else { panic!() };
            let columns = Columns::tokens(n, tokens).unwrap();
            let shape = ConvShape::new([c, 1, 1], tensor("w").shape[0], [1, 1], 1, 0, columns.len()).unwrap();
            let (x, dy) = (tokens_last(&tensor("x")), tokens_last(&tensor("dy")));
            let (x, dy) = (device.upload(&x).unwrap(), device.upload(&dy).unwrap());
            let w = device.upload(&tensor("w").f32()).unwrap();
            let bias = golden.find(&case, "bias").map(|bias| device.upload(&bias.f32()).unwrap());
            let count = device.upload(&[n as u32]).unwrap();

            let mut y = unwritten(device, shape.output_len());
            let with = bias.as_ref().map(|bias| Bias { bias: bias.view(), columns, count: count.view() });
            conv_forward(device, &shape, x.view(), w.view(), with, y.view_mut()).unwrap();
            let y = read(device, y.view());
            check_tokens_last(&tensor("y"), &y, TOLERANCE, &format!("{label}: y"));

            let mut dx = unwritten(device, shape.input_len());
            conv_input_gradient(device, &shape, dy.view(), w.view(), false, dx.view_mut()).unwrap();
            let once = read(device, dx.view());
            check_tokens_last(&tensor("dx"), &once, TOLERANCE, &format!("{label}: dx"));
            conv_input_gradient(device, &shape, dy.view(), w.view(), true, dx.view_mut()).unwrap();
            let twice: Vec<f32> = read(device, dx.view()).iter().map(|value| value / 2.0).collect();
            check_tokens_last(&tensor("dx"), &twice, TOLERANCE, &format!("{label}: dx, accumulated"));

            let mut scratch = unwritten(device, shape.gradient_scratch_len(device));
            let mut dw = unwritten(device, shape.weight_len());
            conv_weight_gradient(device, &shape, x.view(), dy.view(), scratch.view_mut(), dw.view_mut()).unwrap();
            let dw = read(device, dw.view());
            tensor("dw").check(&dw, TOLERANCE, &format!("{label}: dw"));
            results.extend([y, once, twice, dw]);

            if let Some(want) = golden.find(&case, "dbias") {
                let mut dbias = unwritten(device, want.data.len());
                conv_bias_gradient(device, &shape, dy.view(), dbias.view_mut()).unwrap();
                let dbias = read(device, dbias.view());
                want.check(&dbias, TOLERANCE, &format!("{label}: dbias"));
                results.push(dbias);
            }
        }
        results
    });
}

#[test]
fn columns_that_are_not_those_of_the_layer_are_refused_by_name() {
    let device = Device::open("host").unwrap();
    let shape = ConvShape::new([3, 1, 1], 4, [1, 1], 1, 0, Columns::tokens(5, 17).unwrap().len()).unwrap();
    let (x, w) = (device.alloc(shape.input_len()).unwrap(), device.alloc(shape.weight_len()).unwrap());
    let (bias, count) = (device.alloc(4).unwrap(), device.alloc(1).unwrap());
    let mut y = device.alloc(shape.output_len()).unwrap();
    let bias = Bias { bias: bias.view(), columns: Columns::samples(5).unwrap(), count: count.view() };
    let error = conv_forward(&device, &shape, x.view(), w.view(), Some(bias), y.view_mut()).unwrap_err().to_string();
    assert!(error.contains("elements of columns: expected 192, got 8"), "{error}");
}
