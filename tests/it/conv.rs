//! Convolution against float64 goldens, finite differences of the formula being PyTorch's business.

use dilt::device::{Buffer, Device, HostOptions, Precision, Reals, RealsMut};
use dilt::ops::Columns;
use dilt::ops::conv::{ConvShape, conv_forward, conv_input_gradient, conv_weight_gradient};
use dilt::ops::epilogue::{Beside, Bias, Dx, Epilogue};
use dilt::ops::gelu::{gelu_backward, gelu_forward};
use dilt::ops::round::{RoundPlan, round_weights};
use half::bf16;

use crate::support::{Golden, Storage, close_within, judge_bf16, on_devices, read, unwritten};

/// f32 sums of up to a few thousand products, against float64.
const TOLERANCE: f64 = 2e-6;

fn shape_of(golden: &Golden, case: &str) -> (ConvShape, usize) {
    let (x, w) = (golden.get(case, "x").shape, golden.get(case, "w").shape);
    let (stride, pad) = (golden.number(case, "stride") as usize, golden.number(case, "pad") as usize);
    (ConvShape::new([x[1], x[2], x[3]], w[0], [w[2], w[3]], stride, pad, x[0]).unwrap(), x[0])
}

/// A convolution, or a linear layer, and gradients that come to it, in dilt's layout.
pub struct Layer<'a> {
    pub shape: ConvShape,
    /// What the shape's samples are made of, and how many are true.
    pub columns: Columns,
    pub count: usize,
    pub x: &'a [f32],
    pub w: &'a [f32],
    pub bias: Option<&'a [f32]>,
    pub dy: &'a [f32],
}

/// What all passes of a layer give.
pub struct Passes {
    pub y: Vec<f32>,
    /// GELU of y.
    pub gelu: Vec<f32>,
    pub dx: Vec<f32>,
    /// dx added to itself.
    pub twice: Vec<f32>,
    /// dx through GELU, as if the layer had read GELU of its x.
    pub before_gelu: Vec<f32>,
    pub dw: Vec<f32>,
    pub dbias: Vec<f32>,
}

/// GELU of some values, and values through GELU at others, in f32, which has its goldens.
pub fn gelu_of(x: &[f32], dy: &[f32]) -> [Vec<f32>; 2] {
    let device = Device::host(HostOptions::default()).unwrap();
    let (x, mut y, mut dx) = (device.upload(x).unwrap(), device.alloc(x.len()).unwrap(), device.upload(dy).unwrap());
    gelu_forward(&device, x.view().into(), y.view_mut().into()).unwrap();
    gelu_backward(&device, x.view().into(), dx.view_mut().into()).unwrap();
    [y, dx].map(|values| read(&device, values.view()))
}

impl Layer<'_> {
    pub fn passes(&self, device: &Device, storage: Storage) -> Passes {
        let (shape, precision) = (&self.shape, storage.precision());
        let [x, dy] = [self.x, self.dy].map(|values| storage.upload(device, values));
        let (stored, read_w) = (storage.upload(device, self.w), rounded(device, shape, self.w));
        let w = match precision {
            Precision::F32 => stored.view(),
            Precision::Bf16 => read_w.view().into(),
        };
        let bias = self.bias.map(|bias| device.upload(bias).unwrap());
        let (columns, count) = (self.columns, device.upload(&[self.count as u32]).unwrap());
        let bias = bias.as_ref().map(|bias| Bias { bias: bias.view(), columns, count: count.view() });
        let [y, gelu] = beside(device, storage, shape, dy.view(), &|beside, y| {
            let epilogue = Epilogue { bias, beside, ..Epilogue::default() };
            conv_forward(device, shape, x.view(), w, epilogue, y).unwrap();
        });
        let mut dx = storage.unwritten(device, shape.input_len());
        let [once, twice, before_gelu] = [Dx::Set, Dx::Add, Dx::BeforeGelu(x.view())].map(|how| {
            conv_input_gradient(device, shape, dy.view(), w, how, dx.view_mut()).unwrap();
            storage.read(device, &dx)
        });
        let weight_gradient = |with_bias: bool| {
            let scratch_len = shape.gradient_scratch_len(device, precision);
            let [mut scratch, mut dw, mut dbias] =
                [scratch_len, shape.weight_len(), shape.filters()].map(|len| unwritten(device, len));
            let bias = with_bias.then(|| dbias.view_mut());
            conv_weight_gradient(device, shape, x.view(), dy.view(), scratch.view_mut(), dw.view_mut(), bias).unwrap();
            [dw, dbias].map(|gradient| read(device, gradient.view()))
        };
        let [dw, dbias] = weight_gradient(true);
        assert!(dw == weight_gradient(false)[0], "{shape}: dw beside dbias");
        let ([of_y, _], [_, through]) = (gelu_of(&y, &y), gelu_of(self.x, &once));
        let [gelu, before_gelu] = match storage {
            // Naive bf16 rounds what GELU takes.
            Storage::Naive => [of_y, through].map(|values| storage.rounded(values)),
            Storage::Bf16 => [gelu, before_gelu],
            Storage::F32 => {
                close_within(TOLERANCE as f32, &gelu, &of_y, &format!("{shape}: GELU of y"));
                close_within(TOLERANCE as f32, &before_gelu, &through, &format!("{shape}: dx before GELU"));
                [gelu, before_gelu]
            }
        };
        Passes { y, gelu, dx: once, twice, before_gelu, dw, dbias }
    }

    /// bf16 beside what y, dx and dw should be.
    pub fn judge_bf16(&self, device: &Device, label: &str, y: &[f32], dx: &[f32], dw: &[f32]) -> Vec<Vec<f32>> {
        let twice: Vec<f32> = dx.iter().map(|value| 2.0 * value).collect();
        let ([gelu, _], [_, before_gelu]) = (gelu_of(y, y), gelu_of(self.x, dx));
        let rows = self.dy.chunks(self.dy.len() / self.shape.filters());
        let dbias: Vec<f32> = rows.map(|row| row.iter().map(|&dy| f64::from(dy)).sum::<f64>() as f32).collect();
        judge_bf16(label, |storage| {
            let got = self.passes(device, storage);
            vec![
                ("y", got.y, y.to_vec()),
                ("GELU of y", got.gelu, gelu.clone()),
                ("dx", got.dx, dx.to_vec()),
                ("dx, added twice", got.twice, twice.clone()),
                ("dx before GELU", got.before_gelu, before_gelu.clone()),
                ("dw", got.dw, dw.to_vec()),
                ("dbias", got.dbias, dbias.clone()),
            ]
        })
    }
}

/// A forward pass alone, beside GELU and beside its sum with `added`: y and GELU.
pub fn beside(
    device: &Device,
    storage: Storage,
    shape: &ConvShape,
    added: Reals,
    forward: &dyn Fn(Option<Beside>, RealsMut),
) -> [Vec<f32>; 2] {
    let [mut y, mut to] = [(); 2].map(|()| storage.unwritten(device, shape.output_len()));
    forward(None, y.view_mut());
    let alone = storage.read(device, &y);
    let mut with = |what: Beside| {
        forward(Some(what), y.view_mut());
        assert!(alone == storage.read(device, &y), "{shape}: y beside another tensor");
    };
    with(Beside::Gelu(to.view_mut()));
    let gelu = storage.read(device, &to);
    with(Beside::Sum { x: added, to: to.view_mut() });
    // Of what is stored: in naive bf16 that is not what is read.
    let values = device.read_reals(added).unwrap();
    let sum = storage.rounded(alone.iter().zip(values).map(|(y, x)| x + y).collect());
    assert!(storage == Storage::Naive || sum == storage.read(device, &to), "{shape}: the sum");
    [alone, gelu]
}

/// Weights as products in bf16 read them.
pub fn rounded(device: &Device, shape: &ConvShape, w: &[f32]) -> Buffer<bf16> {
    let plan = RoundPlan::new([Some((0, *shape))]);
    let mut to = device.upload(&vec![bf16::NAN; plan.len()]).unwrap();
    let table = plan.upload(device).unwrap().expect("a layer");
    round_weights(device, &table, device.upload(w).unwrap().view(), to.view_mut()).unwrap();
    to
}

#[test]
fn convolution_and_its_gradients_agree_with_pytorch() {
    let golden = Golden::open("conv");
    on_devices(|device, label| {
        let mut results = Vec::new();
        for case in golden.cases() {
            let label = format!("{label}: {case}");
            let (shape, count) = shape_of(&golden, &case);
            let tensor = |name: &str| golden.get(&case, name);
            let (x, w, dy) = (tensor("x").samples_last(), tensor("w").f32(), tensor("dy").samples_last());
            let (columns, bias) = (Columns::samples(count).unwrap(), golden.find(&case, "bias").map(|bias| bias.f32()));
            let layer = Layer { shape, columns, count, x: &x, w: &w, bias: bias.as_deref(), dy: &dy };

            let Passes { y, gelu, dx, twice, before_gelu, dw, dbias } = layer.passes(device, Storage::F32);
            tensor("y").check_samples_last(&y, TOLERANCE, &format!("{label}: y"));
            tensor("dx").check_samples_last(&dx, TOLERANCE, &format!("{label}: dx"));
            let half: Vec<f32> = twice.iter().map(|value| value / 2.0).collect();
            tensor("dx").check_samples_last(&half, TOLERANCE, &format!("{label}: dx, added twice"));
            tensor("dw").check(&dw, TOLERANCE, &format!("{label}: dw"));
            if let Some(want) = golden.find(&case, "dbias") {
                want.check(&dbias, TOLERANCE, &format!("{label}: dbias"));
            }
            results.extend([y, gelu, dx, twice, before_gelu, dw, dbias]);

            let [y, dx] = ["y", "dx"].map(|name| tensor(name).samples_last());
            results.extend(layer.judge_bf16(device, &format!("{label}: bf16"), &y, &dx, &tensor("dw").f32()));
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
    let error =
        conv_forward(&device, &shape, x.view().into(), w.view().into(), Epilogue::default(), y.view_mut().into())
            .unwrap_err()
            .to_string();
    assert!(error.contains("elements of w: expected 108, got 107"), "{error}");

    let w = device.alloc::<f32>(shape.weight_len()).unwrap();
    let [mut short, low] = [Storage::F32, Storage::Bf16].map(|storage| storage.unwritten(&device, 8));
    let all = Storage::F32.unwritten(&device, shape.output_len());
    let mut forward = |beside: Beside| {
        let epilogue = Epilogue { beside: Some(beside), ..Epilogue::default() };
        conv_forward(&device, &shape, x.view().into(), w.view().into(), epilogue, y.view_mut().into()).unwrap_err()
    };
    for (error, says) in [
        (forward(Beside::Gelu(short.view_mut())), "elements of GELU: expected 2048, got 8"),
        (forward(Beside::Sum { x: all.view(), to: short.view_mut() }), "elements of sum: expected 2048, got 8"),
        (
            forward(Beside::Sum { x: low.view(), to: short.view_mut() }),
            "elements of x of the sum: expected 2048, got 8",
        ),
    ] {
        assert!(error.to_string().contains(says), "{error}");
    }
    let mut low_y = Storage::Bf16.unwritten(&device, shape.output_len());
    let error = forward(Beside::Gelu(low_y.view_mut())).to_string();
    assert!(error.contains("conv_forward: precision of GELU: expected f32, got bf16"), "{error}");

    let mut dx = device.alloc::<f32>(shape.input_len()).unwrap();
    let how = Dx::BeforeGelu(low.view());
    let error = conv_input_gradient(&device, &shape, all.view(), w.view().into(), how, dx.view_mut().into());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("elements of x of GELU: expected 1536, got 8"), "{error}");
    let scratch_len = shape.gradient_scratch_len(&device, Precision::F32);
    let [mut scratch, mut dw, mut dbias] = [scratch_len, shape.weight_len(), 3].map(|len| device.alloc(len).unwrap());
    let (scratch, bias) = (scratch.view_mut(), Some(dbias.view_mut()));
    let error = conv_weight_gradient(&device, &shape, x.view().into(), all.view(), scratch, dw.view_mut(), bias);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("elements of dbias: expected 4, got 3"), "{error}");
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
