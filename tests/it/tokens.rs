//! Token columns against float64 goldens of PyTorch's: linear layers, patches, embedding and pooling.

use dilt::device::{Buffer, Device, Precision, Reals};
use dilt::ops::Columns;
use dilt::ops::conv::{ConvShape, conv_forward, conv_input_gradient, conv_weight_gradient};
use dilt::ops::epilogue::{Bias, Dx, Epilogue};

use dilt::ops::tokens::{
    EmbedGradients, EmbedParameters, EmbedShape, PatchShape, TokenPool, TokenPoolShape, embed_backward, embed_forward,
    patches_forward, token_pool_backward, token_pool_forward,
};

use crate::conv::{Layer, Passes};
use crate::support::{Golden, Storage, Tensor, judge_bf16, on_devices, read, refuses_precision, unwritten};

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
            let (x, w, dy) = (tokens_last(&tensor("x")), tensor("w").f32(), tokens_last(&tensor("dy")));
            let bias = golden.find(&case, "bias").map(|bias| bias.f32());
            let layer = Layer { shape, columns, count: n, x: &x, w: &w, bias: bias.as_deref(), dy: &dy };

            let Passes { y, gelu, dx, twice, before_gelu, dw, dbias } = layer.passes(device, Storage::F32);
            check_tokens_last(&tensor("y"), &y, TOLERANCE, &format!("{label}: y"));
            check_tokens_last(&tensor("dx"), &dx, TOLERANCE, &format!("{label}: dx"));
            let half: Vec<f32> = twice.iter().map(|value| value / 2.0).collect();
            check_tokens_last(&tensor("dx"), &half, TOLERANCE, &format!("{label}: dx, added twice"));
            tensor("dw").check(&dw, TOLERANCE, &format!("{label}: dw"));
            if let Some(want) = golden.find(&case, "dbias") {
                want.check(&dbias, TOLERANCE, &format!("{label}: dbias"));
            }
            results.extend([y, gelu, dx, twice, before_gelu, dw, dbias]);

            let [y, dx] = ["y", "dx"].map(|name| tokens_last(&tensor(name)));
            results.extend(layer.judge_bf16(device, &format!("{label}: bf16"), &y, &dx, &tensor("dw").f32()));
        }
        results
    });
}

/// y and dw of a layer of f32 without a bias.
fn forward_and_weight_gradient(device: &Device, shape: &ConvShape, tensors: [&Buffer<f32>; 3]) -> [Vec<f32>; 2] {
    let [x, w, dy] = tensors.map(|tensor| Reals::from(tensor.view()));
    let scratch_len = shape.gradient_scratch_len(device, Precision::F32);
    let [mut y, mut dw, mut scratch] =
        [shape.output_len(), shape.weight_len(), scratch_len].map(|len| unwritten(device, len));
    conv_forward(device, shape, x, w, Epilogue::default(), y.view_mut().into()).unwrap();
    conv_weight_gradient(device, shape, x, dy, scratch.view_mut(), dw.view_mut(), None).unwrap();
    [y, dw].map(|buffer| read(device, buffer.view()))
}

/// More input features, output features and columns than a block takes at a time; whole numbers, so that every sum is
/// exact and every order of it gives the same.
#[test]
fn linear_layers_of_any_size_sum_every_product_once() {
    for (c, k, n) in [(203, 11, 72), (9, 271, 16), (21, 11, 1096), (65, 33, 8)] {
        let shape = ConvShape::new([c, 1, 1], k, [1, 1], 1, 0, n).unwrap();
        let whole = |len: usize, seed: usize| -> Vec<f32> {
            (0..len).map(|i| ((i + seed) * 2_654_435_761 % 1009 % 9) as f32 - 4.0).collect()
        };
        let (x, w, dy, old) = (whole(c * n, 1), whole(k * c, 2), whole(k * n, 3), whole(c * n, 4));
        let (mut y_want, mut dx_want, mut dw_want) = (vec![0.0; k * n], old.clone(), vec![0.0; k * c]);
        for (row, channel, column) in (0..k * c * n).map(|i| (i / n / c, i / n % c, i % n)) {
            y_want[row * n + column] += w[row * c + channel] * x[channel * n + column];
            dx_want[channel * n + column] += w[row * c + channel] * dy[row * n + column];
            dw_want[row * c + channel] += dy[row * n + column] * x[channel * n + column];
        }
        on_devices(|device, label| {
            let [x, w, dy] = [&x, &w, &dy].map(|values| device.upload(values).unwrap());
            let mut dx = device.upload(&old).unwrap();
            let [y, dw] = forward_and_weight_gradient(device, &shape, [&x, &w, &dy]);
            conv_input_gradient(device, &shape, dy.view().into(), w.view().into(), Dx::Add, dx.view_mut().into())
                .unwrap();
            let got = [y, read(device, dx.view()), dw];
            for (name, got, want) in [("y", &got[0], &y_want), ("dx", &got[1], &dx_want), ("dw", &got[2], &dw_want)] {
                assert_eq!(got, want, "{label}: {c} to {k}, {n} columns: {name}");
            }
            got.into()
        });
    }
}

#[test]
fn columns_that_are_not_those_of_the_layer_are_refused_by_name() {
    let device = Device::open("host").unwrap();
    let shape = ConvShape::new([3, 1, 1], 4, [1, 1], 1, 0, Columns::tokens(5, 17).unwrap().len()).unwrap();
    let (x, w) = (device.alloc::<f32>(shape.input_len()).unwrap(), device.alloc::<f32>(shape.weight_len()).unwrap());
    let (bias, count) = (device.alloc(4).unwrap(), device.alloc(1).unwrap());
    let mut y = device.alloc::<f32>(shape.output_len()).unwrap();
    let bias = Bias { bias: bias.view(), columns: Columns::samples(5).unwrap(), count: count.view() };
    let error = conv_forward(&device, &shape, x.view().into(), w.view().into(), Some(bias).into(), y.view_mut().into())
        .unwrap_err()
        .to_string();
    assert!(error.contains("elements of columns: expected 192, got 8"), "{error}");
}

#[test]
fn images_become_patches_and_patches_tokens_as_in_pytorch() {
    let golden = Golden::open("tokens");
    on_devices(|device, label| {
        let mut results = Vec::new();
        for case in golden.cases() {
            let label = format!("{label}: {case}");
            let tensor = |name: &str| golden.get(&case, name);
            let uploaded = |name: &str| golden.find(&case, name).map(|tensor| device.upload(&tensor.f32()).unwrap());
            let number = |key: &str| golden.number(&case, key) as usize;
            let [n, c, h, w] = tensor("x").shape[..] else { panic!() };
            let [_, tokens, features] = tensor("y").shape[..] else { panic!() };
            let shape = PatchShape::new([c, h, w], number("patch"), number("prefix"), n).unwrap();
            assert_eq!([shape.tokens(), shape.features()], tensor("patches").shape[1..], "{label}");

            let cut = |storage: Storage| {
                let x = storage.upload(device, &tensor("x").samples_last());
                let mut patches = storage.unwritten(device, shape.output_len());
                patches_forward(device, &shape, x.view(), patches.view_mut()).unwrap();
                storage.read(device, &patches)
            };
            let patches = cut(Storage::F32);
            let want = tokens_last(&tensor("patches"));
            judge_bf16(&label, |storage| vec![("patches", cut(storage), want.clone())]);
            check_tokens_last(&tensor("patches"), &patches, 0.0, &format!("{label}: patches"));

            // A patch convolution is a linear layer over patches.
            let columns = Columns::tokens(n, tokens).unwrap().len();
            let linear = ConvShape::new([shape.features(), 1, 1], features, [1, 1], 1, 0, columns).unwrap();
            let (x, w) = (device.upload(&patches).unwrap(), uploaded("w").unwrap());
            let dy = device.upload(&tokens_last(&tensor("dy"))).unwrap();
            let [y, dw] = forward_and_weight_gradient(device, &linear, [&x, &w, &dy]);
            check_tokens_last(&tensor("embedded"), &y, TOLERANCE, &format!("{label}: embedded"));
            tensor("dw").check(&dw, TOLERANCE, &format!("{label}: dw"));
            results.extend([y, dw]);

            let shape = EmbedShape::new(features, tokens, number("prefix"), n).unwrap();
            let mut embedded = tokens_last(&tensor("embedded"));
            // What is not true is not read: it may hold anything.
            let row = tokens.next_multiple_of(8);
            let stray =
                |i: &usize| i % row >= tokens || i % row < number("prefix") || i / row % n.next_multiple_of(8) >= n;
            (0..embedded.len()).filter(stray).for_each(|i| embedded[i] = f32::NAN);
            let count = device.upload(&[n as u32]).unwrap();
            let (token, bias, positions) = (uploaded("token"), uploaded("bias"), uploaded("positions").unwrap());
            let (token, bias) = (token.as_ref().map(|token| token.view()), bias.as_ref().map(|bias| bias.view()));
            let parameters = EmbedParameters { token, bias, positions: positions.view() };
            let embed = |storage: Storage| {
                let (x, mut y) = (storage.upload(device, &embedded), storage.unwritten(device, shape.len()));
                embed_forward(device, &shape, x.view(), parameters, count.view(), y.view_mut()).unwrap();
                let gradient = |there: bool| there.then(|| unwritten(device, features));
                let (mut dtoken, mut dbias) = (gradient(token.is_some()), gradient(bias.is_some()));
                let mut dpositions = unwritten(device, shape.positions_len());
                let (token, bias) =
                    (dtoken.as_mut().map(|token| token.view_mut()), dbias.as_mut().map(|bias| bias.view_mut()));
                let gradients = EmbedGradients { token, bias, positions: dpositions.view_mut() };
                let dy = storage.upload(device, &tokens_last(&tensor("dy")));
                embed_backward(device, &shape, dy.view(), gradients).unwrap();
                let of = [("dtoken", dtoken), ("dbias", dbias), ("dpositions", Some(dpositions))];
                let of = of.map(|(name, got)| (name, got.map(|got| read(device, got.view()))));
                (storage.read(device, &y), of)
            };
            let (y, gradients) = embed(Storage::F32);
            check_tokens_last(&tensor("y"), &y, TOLERANCE, &format!("{label}: y"));
            results.extend([patches, y]);
            for (name, got) in gradients {
                assert_eq!(got.is_some(), golden.find(&case, name).is_some(), "{label}: {name}");
                if let Some(got) = got {
                    tensor(name).check(&got, TOLERANCE, &format!("{label}: {name}"));
                    results.push(got);
                }
            }
            results.extend(judge_bf16(&format!("{label}: bf16"), |storage| {
                let (y, gradients) = embed(storage);
                let gradients = gradients.into_iter().filter_map(|(name, got)| Some((name, got?, tensor(name).f32())));
                std::iter::once(("y", y, tokens_last(&tensor("y")))).chain(gradients).collect()
            }));
        }
        results
    });
}

#[test]
fn pools_of_tokens_and_their_gradients_agree_with_pytorch() {
    let golden = Golden::open("tokens");
    on_devices(|device, label| {
        let mut results = Vec::new();
        for case in golden.cases() {
            let tensor = |name: &str| golden.get(&case, name);
            let [n, tokens, features] = tensor("y").shape[..] else { panic!() };
            let (x, dy) = (tokens_last(&tensor("y")), tensor("dpooled").samples_last());
            for (name, pool) in [("first", TokenPool::First), ("mean", TokenPool::Mean)] {
                let label = format!("{label}: {case}: {name}");
                let prefix = golden.number(&case, "prefix") as usize;
                let shape = TokenPoolShape::new(features, tokens, prefix, n, pool).unwrap();
                let run = |storage: Storage| {
                    let (x, dy) = (storage.upload(device, &x), storage.upload(device, &dy));
                    let mut y = storage.unwritten(device, shape.output_len());
                    let mut dx = storage.unwritten(device, shape.input_len());
                    token_pool_forward(device, &shape, x.view(), y.view_mut()).unwrap();
                    token_pool_backward(device, &shape, dy.view(), dx.view_mut()).unwrap();
                    [y, dx].map(|buffer| storage.read(device, &buffer))
                };
                let [y, dx] = run(Storage::F32);
                tensor(name).check_samples_last(&y, TOLERANCE, &format!("{label}: y"));
                check_tokens_last(&tensor(&format!("d{name}")), &dx, TOLERANCE, &format!("{label}: dx"));
                results.extend([y, dx]);
                results.extend(judge_bf16(&format!("{label}: bf16"), |storage| {
                    let [y, dx] = run(storage);
                    let want = tokens_last(&tensor(&format!("d{name}")));
                    vec![("y", y, tensor(name).samples_last()), ("dx", dx, want)]
                }));
            }
        }
        results
    });
}

/// More tokens than a block's chunk of the gradient, more samples than its parts, every sum exact.
#[test]
fn gradients_of_an_embedding_sum_every_true_column_once() {
    let (features, tokens, n) = (3, 197, 300);
    let shape = EmbedShape::new(features, tokens, 1, n).unwrap();
    let mut dy = Tensor { shape: vec![n, tokens, features], data: vec![0.0; n * tokens * features] };
    dy.data.iter_mut().enumerate().for_each(|(i, value)| *value = (i * 2_654_435_761 % 15) as f64 - 7.0);
    let sum = |keep: &dyn Fn(usize) -> bool, feature: usize| {
        let own = (0..dy.data.len()).filter(|i| i % features == feature && keep(i / features % tokens));
        own.map(|i| dy.data[i] as f32).sum::<f32>()
    };
    let positions: Vec<f32> = (0..tokens * features).map(|i| sum(&|t| t == i / features, i % features)).collect();
    let bias: Vec<f32> = (0..features).map(|feature| sum(&|t| t > 0, feature)).collect();
    on_devices(|device, label| {
        let dy = device.upload(&tokens_last(&dy)).unwrap();
        let mut dpositions = unwritten(device, shape.positions_len());
        let (mut dtoken, mut dbias) = (unwritten(device, features), unwritten(device, features));
        let (token, bias_gradient) = (Some(dtoken.view_mut()), Some(dbias.view_mut()));
        let gradients = EmbedGradients { token, bias: bias_gradient, positions: dpositions.view_mut() };
        embed_backward(device, &shape, dy.view().into(), gradients).unwrap();
        let got = [dtoken.view(), dbias.view(), dpositions.view()].map(|slice| read(device, slice));
        assert_eq!(got, [positions[..features].to_vec(), bias.clone(), positions.clone()], "{label}");
        got.into()
    });
}

#[test]
fn shapes_of_tokens_that_make_no_sense_are_refused() {
    for (image, patch, prefix) in [
        ([3, 8, 8], 3, 0),
        ([3, 8, 6], 4, 0),
        ([0, 8, 8], 4, 0),
        ([3, 8, 8], 0, 0),
        ([3, 8, 8], 4, 2),
        ([3, 1 << 20, 1 << 20], 1, 0),
    ] {
        assert!(PatchShape::new(image, patch, prefix, 8).is_err(), "{image:?}, patches of {patch}, {prefix}");
    }
    assert!(PatchShape::new([3, 8, 8], 4, 1, usize::MAX / 2).is_err());
    let error = PatchShape::new([3, 32, 30], 4, 1, 5).unwrap_err().to_string();
    assert!(error.contains("patch: expected a divisor of both sides of the image, got images [3, 32, 30]"), "{error}");
    for (features, tokens, prefix, n) in
        [(0, 9, 1, 8), (70_000, 9, 1, 8), (4, 1, 1, 8), (4, 9, 2, 8), (4, 1 << 29, 0, 8)]
    {
        assert!(EmbedShape::new(features, tokens, prefix, n).is_err(), "{features} {tokens} {prefix} {n}");
        let shape = TokenPoolShape::new(features, tokens, prefix, n, TokenPool::Mean);
        assert!(shape.is_err(), "{features} {tokens} {prefix} {n}");
    }
}

#[test]
fn tensors_of_the_wrong_size_are_refused_by_name() {
    let device = Device::open("host").unwrap();
    let (x, mut y) = (device.alloc::<f32>(640).unwrap(), device.alloc::<f32>(640).unwrap());
    let count = device.alloc::<u32>(1).unwrap();
    let refused = |result: dilt::Result<()>, message: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    };
    let shape = PatchShape::new([1, 4, 4], 2, 0, 5).unwrap();
    let result = patches_forward(&device, &shape, x.view().into(), y.view_mut().into());
    refused(result, "patches_forward: number of elements of x: expected 128, got 640");
    let result = patches_forward(&device, &shape, x.slice(0..128).into(), y.view_mut().into());
    refused(result, "elements of y: expected 256, got 640");

    // 3 features of 8 samples of 24 columns.
    let shape = EmbedShape::new(3, 17, 1, 5).unwrap();
    let (token, bias, positions) = (x.slice(0..3), x.slice(0..3), x.slice(0..51));
    let good = EmbedParameters { token: Some(token), bias: Some(bias), positions };
    let (from, to): (Reals, _) = (x.slice(0..576).into(), 0..576);
    for (parameters, message) in [
        (EmbedParameters { token: None, ..good }, "elements of token: expected 3, got 0"),
        (EmbedParameters { bias: Some(x.slice(0..4)), ..good }, "elements of bias: expected 3, got 4"),
        (EmbedParameters { positions: x.slice(0..50), ..good }, "elements of positions: expected 51, got 50"),
    ] {
        let to = y.slice_mut(to.clone()).into();
        refused(embed_forward(&device, &shape, from, parameters, count.view(), to), message);
    }
    let mut gradients = device.alloc::<f32>(51).unwrap();
    let positions = EmbedGradients { token: None, bias: None, positions: gradients.view_mut() };
    refused(embed_backward(&device, &shape, from, positions), "elements of token: expected 3, got 0");

    let shape = TokenPoolShape::new(3, 17, 1, 5, TokenPool::First).unwrap();
    refused(token_pool_forward(&device, &shape, from, y.view_mut().into()), "elements of y: expected 24, got 640");
    refused(
        token_pool_backward(&device, &shape, x.slice(0..24).into(), y.view_mut().into()),
        "elements of dx: expected 576, got 640",
    );

    // Of the right sizes, and of two precisions.
    let (low, mut pooled) = (Storage::Bf16.upload(&device, &[0.0; 576]), y.slice_mut(0..24));
    let mixed = token_pool_forward(&device, &shape, low.view(), pooled.reborrow().into());
    refuses_precision(mixed, "token_pool_forward", "y");
    let low = Storage::Bf16.upload(&device, &[0.0; 24]);
    let mixed = token_pool_backward(&device, &shape, low.view(), y.slice_mut(to.clone()).into());
    refuses_precision(mixed, "token_pool_backward", "dx");
    let (shape, low) = (EmbedShape::new(3, 17, 1, 5).unwrap(), Storage::Bf16.upload(&device, &[0.0; 576]));
    let mixed = embed_forward(&device, &shape, low.view(), good, count.view(), y.slice_mut(to).into());
    refuses_precision(mixed, "embed_forward", "y");
    let (shape, low) = (PatchShape::new([1, 4, 4], 2, 0, 5).unwrap(), Storage::Bf16.upload(&device, &[0.0; 128]));
    let mixed = patches_forward(&device, &shape, low.view(), y.slice_mut(0..256).into());
    refuses_precision(mixed, "patches_forward", "y");
}
