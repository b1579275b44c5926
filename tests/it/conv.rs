//! Convolution against float64 goldens, finite differences of the formula being PyTorch's business.

use dilt::device::{Buffer, Device, Precision};
use dilt::ops::Columns;
use dilt::ops::bias::bias_gradient;
use dilt::ops::conv::{Bias, ConvShape, conv_forward, conv_input_gradient, conv_weight_gradient};
use dilt::ops::round::{RoundPlan, round_weights};
use half::bf16;

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
            conv_forward(device, &shape, x.view().into(), w.view().into(), with, y.view_mut().into()).unwrap();
            let y = read(device, y.view());
            tensor("y").check_samples_last(&y, TOLERANCE, &format!("{label}: y"));

            let mut dx = unwritten(device, shape.input_len());
            conv_input_gradient(device, &shape, dy.view().into(), w.view().into(), false, dx.view_mut().into())
                .unwrap();
            let once = read(device, dx.view());
            tensor("dx").check_samples_last(&once, TOLERANCE, &format!("{label}: dx"));
            conv_input_gradient(device, &shape, dy.view().into(), w.view().into(), true, dx.view_mut().into()).unwrap();
            let twice: Vec<f32> = read(device, dx.view()).iter().map(|value| value / 2.0).collect();
            tensor("dx").check_samples_last(&twice, TOLERANCE, &format!("{label}: dx, accumulated"));

            let mut scratch = unwritten(device, shape.gradient_scratch_len(device, Precision::F32));
            let mut dw = unwritten(device, shape.weight_len());
            conv_weight_gradient(device, &shape, x.view().into(), dy.view().into(), scratch.view_mut(), dw.view_mut())
                .unwrap();
            let dw = read(device, dw.view());
            tensor("dw").check(&dw, TOLERANCE, &format!("{label}: dw"));
            results.extend([y, once, twice, dw]);

            if let Some(want) = golden.find(&case, "dbias") {
                let mut dbias = unwritten(device, want.data.len());
                bias_gradient(device, dy.view().into(), dbias.view_mut()).unwrap();
                let dbias = read(device, dbias.view());
                want.check(&dbias, TOLERANCE, &format!("{label}: dbias"));
                results.push(dbias);
            }
        }
        results
    });
}

/// Weights as products in bf16 read them.
fn rounded(device: &Device, shape: &ConvShape, w: &[f32]) -> Buffer<bf16> {
    let plan = RoundPlan::new([Some((0, *shape))]);
    let mut to = device.upload(&vec![bf16::NAN; plan.len()]).unwrap();
    let table = plan.upload(device).unwrap().expect("a layer");
    round_weights(device, &table, device.upload(w).unwrap().view(), to.view_mut()).unwrap();
    to
}

fn root_mean_square_error(got: &[f32], want: &[f32]) -> f64 {
    let squares = got.iter().zip(want).map(|(&got, &want)| f64::from(got - want).powi(2));
    (squares.sum::<f64>() / want.len() as f64).sqrt()
}

#[test]
fn in_bf16_a_convolution_errs_at_most_twice_as_much_as_f32_on_rounded_numbers() {
    let golden = Golden::open("conv");
    let round = |values: Vec<f32>| values.into_iter().map(|value| bf16::from_f32(value).to_f32()).collect::<Vec<_>>();
    on_devices(|device, label| {
        let mut results = Vec::new();
        for case in golden.cases() {
            let (shape, n) = shape_of(&golden, &case);
            let tensor = |name: &str| golden.get(&case, name);
            let [x, dy] = ["x", "dy"].map(|name| tensor(name).samples_last());
            let w = tensor("w").f32();
            let bias = golden.find(&case, "bias").map(|bias| device.upload(&bias.f32()).unwrap());
            let count = device.upload(&[n as u32]).unwrap();
            // y, dx, dx added twice, dw, dbias.
            let run = |precision: Precision| {
                let upload = |values: &[f32]| device.upload_reals(&round(values.to_vec()), precision).unwrap();
                let unwritten = |len: usize| upload(&vec![f32::NAN; len]);
                let (x, dy, read_w) = (upload(&x), upload(&dy), upload(&w));
                let rounded = rounded(device, &shape, &w);
                let w = match precision {
                    Precision::F32 => read_w.view(),
                    Precision::Bf16 => rounded.view().into(),
                };
                let (mut y, mut dx) = (unwritten(shape.output_len()), unwritten(shape.input_len()));
                let columns = Columns::samples(n).unwrap();
                let with = bias.as_ref().map(|bias| Bias { bias: bias.view(), columns, count: count.view() });
                conv_forward(device, &shape, x.view(), w, with, y.view_mut()).unwrap();
                conv_input_gradient(device, &shape, dy.view(), w, false, dx.view_mut()).unwrap();
                let once = device.read_reals(dx.view()).unwrap();
                conv_input_gradient(device, &shape, dy.view(), w, true, dx.view_mut()).unwrap();
                let mut scratch =
                    device.upload(&vec![f32::NAN; shape.gradient_scratch_len(device, precision)]).unwrap();
                let mut dw = device.upload(&vec![f32::NAN; shape.weight_len()]).unwrap();
                let mut dbias = device.upload(&vec![f32::NAN; shape.filters()]).unwrap();
                conv_weight_gradient(device, &shape, x.view(), dy.view(), scratch.view_mut(), dw.view_mut()).unwrap();
                bias_gradient(device, dy.view(), dbias.view_mut()).unwrap();
                let [y, twice] = [y.view(), dx.view()].map(|reals| round(device.read_reals(reals).unwrap()));
                [y, round(once), twice, read(device, dw.view()), read(device, dbias.view())]
            };
            let (naive, got) = (run(Precision::F32), run(Precision::Bf16));
            let dx = tensor("dx").samples_last();
            let twice: Vec<f32> = dx.iter().map(|value| 2.0 * value).collect();
            let dbias = dy.chunks(dy.len() / shape.filters()).map(|row| row.iter().sum()).collect();
            let want = [tensor("y").samples_last(), dx, twice, tensor("dw").f32(), dbias];
            for (i, name) in ["y", "dx", "dx, added twice", "dw", "dbias"].iter().enumerate() {
                let [naive, error] = [&naive[i], &got[i]].map(|values| root_mean_square_error(values, &want[i]));
                assert!(error <= 2.0 * naive + 1e-6, "{label}: {case}: {name}: error {error:.2e}, of f32 {naive:.2e}");
            }
            results.extend(got);
        }
        results
    });
}

#[test]
fn rounded_weights_are_what_rust_rounds_in_the_order_of_the_products() {
    on_devices(|device, label| {
        let shapes = [[3, 5, 7, 7], [20, 6, 3, 3], [8, 4, 1, 1]]
            .map(|[c, k, r, s]| ConvShape::new([c, 9, 9], k, [r, s], 1, 0, 8).unwrap());
        let mut from = vec![f32::NAN; 3];
        let mut layers = Vec::new();
        for shape in shapes {
            layers.push((from.len(), shape));
            // Any bits: infinities, NaN, what is too small for a normal number, ties.
            let bits = |i: u32| if i.is_multiple_of(3) { i << 15 | 1 << 15 } else { i.wrapping_mul(2_654_435_761) };
            from.extend((1..=shape.weight_len() as u32).map(|i| f32::from_bits(bits(i))));
        }
        let plan = RoundPlan::new(layers.iter().copied().map(Some));
        let mut to = device.upload(&vec![bf16::NAN; plan.len()]).unwrap();
        let table = plan.upload(device).unwrap().expect("three layers");
        round_weights(device, &table, device.upload(&from).unwrap().view(), to.view_mut()).unwrap();
        let to = device.read(to.view()).unwrap();
        for (number, (offset, shape)) in layers.iter().enumerate() {
            let [c, taps] = [shape.channels(), shape.weight_len() / shape.channels() / shape.filters()];
            let own = &to[plan.place(number)];
            let filter = own.len() / shape.filters();
            let pitch = if c < 8 { c } else { c.next_multiple_of(8) };
            for (i, value) in own.iter().enumerate() {
                let (k, tap, channel) = (i / filter, i % filter / pitch, i % filter % pitch);
                let is_weight = tap < taps && channel < c;
                let want = if is_weight { from[offset + (k * c + channel) * taps + tap] } else { 0.0 };
                let (same, want) = (value.is_nan() && want.is_nan(), bf16::from_f32(want));
                assert!(same || value.to_bits() == want.to_bits(), "{label}: {shape}: {i}: {value} for {want}");
            }
        }
        Vec::new()
    });
}

#[test]
fn tensors_of_the_wrong_size_are_refused_by_name() {
    let device = Device::open("host").unwrap();
    let shape = ConvShape::new([3, 8, 8], 4, [3, 3], 1, 1, 5).unwrap();
    let (x, w) =
        (device.alloc::<f32>(shape.input_len()).unwrap(), device.alloc::<f32>(shape.weight_len() - 1).unwrap());
    let mut y = device.alloc::<f32>(shape.output_len()).unwrap();
    let error = conv_forward(&device, &shape, x.view().into(), w.view().into(), None, y.view_mut().into())
        .unwrap_err()
        .to_string();
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
