//! Convolution against float64 goldens, finite differences of the formula being PyTorch's business.

use dilt::ops::Columns;
use dilt::ops::conv::{Bias, ConvShape, conv_bias_gradient, conv_forward, conv_input_gradient, conv_weight_gradient};

use crate::support::{Golden, on_devices, read, unwritten};

/// f32 sums of up to a few thousand products, against float64.
const TOLERANCE: f64 = 2e-6;

fn shape_of(golden: &Golden, case: &str) -> (ConvShape, usize) {
    let (x, w) = (golden.get(case, "x").shape, golden.get(case, "w").shape);
    let (stride, pad) = (golden.number(case, "stride") as usize, golden.number(case, "pad") as usize);
    (ConvShape::new([x[1], x[2], x[3]], w[0], [w[2], w[3]], stride, pad, x[0]).unwrap(), x[0])
}

#[test]
fn convolution_and_its_gradients_agree_with_pytorch() {
    let golden = Golden::open("conv");
    on_devices(|device, label| {
        let mut results = Vec::new();
        for case in golden.cases() {
            let label = format!("{label}: {case}");
            let (shape, n) = shape_of(&golden, &case);
            let tensor = |name: &str| golden.get(&case, name);
            let x = device.upload(&tensor("x").samples_last()).unwrap();
            let dy = device.upload(&tensor("dy").samples_last()).unwrap();
            let w = device.upload(&tensor("w").f32()).unwrap();
            let bias = golden.find(&case, "bias").map(|bias| device.upload(&bias.f32()).unwrap());
            let count = device.upload(&[n as u32]).unwrap();

            let mut y = unwritten(device, shape.output_len());
            let columns = Columns::samples(n).unwrap();
            let with = bias.as_ref().map(|bias| Bias { bias: bias.view(), columns, count: count.view() });
            conv_forward(device, &shape, x.view(), w.view(), with, y.view_mut()).unwrap();
            let y = read(device, y.view());
            tensor("y").check_samples_last(&y, TOLERANCE, &format!("{label}: y"));

            let mut dx = unwritten(device, shape.input_len());
            conv_input_gradient(device, &shape, dy.view(), w.view(), false, dx.view_mut()).unwrap();
            let once = read(device, dx.view());
            tensor("dx").check_samples_last(&once, TOLERANCE, &format!("{label}: dx"));
            conv_input_gradient(device, &shape, dy.view(), w.view(), true, dx.view_mut()).unwrap();
            let twice: Vec<f32> = read(device, dx.view()).iter().map(|value| value / 2.0).collect();
            tensor("dx").check_samples_last(&twice, TOLERANCE, &format!("{label}: dx, accumulated"));

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
fn tensors_of_the_wrong_size_are_refused_by_name() {
    let device = dilt::device::Device::open("host").unwrap();
    let shape = ConvShape::new([3, 8, 8], 4, [3, 3], 1, 1, 5).unwrap();
    let (x, w) = (device.alloc(shape.input_len()).unwrap(), device.alloc(shape.weight_len() - 1).unwrap());
    let mut y = device.alloc(shape.output_len()).unwrap();
    let error = conv_forward(&device, &shape, x.view(), w.view(), None, y.view_mut()).unwrap_err().to_string();
    assert!(error.contains("elements of w: expected 108, got 107"), "{error}");
}

#[test]
fn shapes_that_make_no_sense_are_refused() {
    for (input, k, filter, stride) in [
        ([3, 2, 2], 4, [5, 5], 1),
        ([0, 8, 8], 4, [3, 3], 1),
        ([3, 8, 8], 4, [3, 3], 0),
        ([3, 1 << 20, 1 << 20], 4, [3, 3], 1),
    ] {
        assert!(ConvShape::new(input, k, filter, stride, 1, 8).is_err(), "{input:?} {filter:?}");
    }
}
