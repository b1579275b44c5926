//! Max pool and global average pool against float64 goldens, and where PyTorch's rule for equal values shows.

use dilt::device::Device;
use dilt::ops::pool::{
    MeanPoolShape, PoolShape, max_pool_backward, max_pool_forward, mean_pool_backward, mean_pool_forward,
};

use crate::support::{Golden, Storage, Tensor, judge_bf16, on_devices, refuses_precision};

/// Sums of up to 64 values of one size in f32.
const TOLERANCE: f64 = 1e-6;

/// y, index and dx of a max pool; outputs are NaN and 255 before.
fn max_pool(
    device: &Device,
    shape: &PoolShape,
    [x, dy]: [&[f32]; 2],
    storage: Storage,
) -> (Vec<f32>, Vec<u8>, Vec<f32>) {
    let (x, dy) = (storage.upload(device, x), storage.upload(device, dy));
    let mut y = storage.unwritten(device, shape.output_len());
    let mut index = device.upload(&vec![255u8; shape.output_len()]).unwrap();
    max_pool_forward(device, shape, x.view(), index.view_mut(), y.view_mut()).unwrap();
    let mut dx = storage.unwritten(device, shape.input_len());
    max_pool_backward(device, shape, dy.view(), index.view(), dx.view_mut()).unwrap();
    (storage.read(device, &y), device.read(index.view()).unwrap(), storage.read(device, &dx))
}

/// y and dx of a golden case.
fn pool(device: &Device, golden: &Golden, case: &str, storage: Storage) -> [Vec<f32>; 2] {
    let tensor = |name: &str| golden.get(case, name);
    let number = |key: &str| golden.number(case, key) as usize;
    let [n, c, h, w] = tensor("x").shape[..] else { panic!() };
    let (x, dy) = (tensor("x").samples_last(), tensor("dy").samples_last());
    if number("kernel") == 0 {
        let shape = MeanPoolShape::new(c, h * w, n).unwrap();
        let (x, dy) = (storage.upload(device, &x), storage.upload(device, &dy));
        let mut y = storage.unwritten(device, shape.output_len());
        let mut dx = storage.unwritten(device, shape.input_len());
        mean_pool_forward(device, &shape, x.view(), y.view_mut()).unwrap();
        mean_pool_backward(device, &shape, dy.view(), dx.view_mut()).unwrap();
        return [y, dx].map(|buffer| storage.read(device, &buffer));
    }
    let shape = PoolShape::new(c, [h, w], number("kernel"), number("stride"), number("pad"), n).unwrap();
    assert_eq!(shape.output_image()[..], tensor("y").shape[2..]);
    let (y, _, dx) = max_pool(device, &shape, [&x, &dy], storage);
    [y, dx]
}

#[test]
fn pools_and_their_gradients_agree_with_pytorch() {
    let golden = Golden::open("pool");
    on_devices(|device, label| {
        let mut results = Vec::new();
        for case in golden.cases() {
            let tensor = |name: &str| golden.get(&case, name);
            let [y, dx] = pool(device, &golden, &case, Storage::F32);
            tensor("y").check_samples_last(&y, TOLERANCE, &format!("{label}: {case}: y"));
            tensor("dx").check_samples_last(&dx, TOLERANCE, &format!("{label}: {case}: dx"));
            results.extend([y, dx]);
            // Rounding makes other maxima of near values, whose gradients go elsewhere: not an error of the pool's.
            let want = |name: &str| tensor(name).samples_last();
            results.extend(judge_bf16(&format!("{label}: {case}: bf16"), |storage| {
                let [y, dx] = pool(device, &golden, &case, storage);
                vec![("y", y, want("y")), ("dx", dx, want("dx"))]
            }));
        }
        results
    });
}

#[test]
fn the_first_of_equal_maxima_gets_the_gradient_and_a_nan_is_a_maximum() {
    // One channel, 3x3 pixels, 3x3 windows at stride 1 with padding 1, eight samples.
    let shape = PoolShape::new(1, [3, 3], 3, 1, 1, 8).unwrap();
    on_devices(|device, label| {
        let mut results = Vec::new();
        for storage in [Storage::F32, Storage::Bf16] {
            // Samples 0 to 3 are constant; 4 and 5 have a NaN in the middle, which is in all windows.
            let x: Vec<f32> = (0..72)
                .map(|i| match (i / 8, i % 8) {
                    (_, 0..4) => -2.0,
                    (4, 4..6) => f32::NAN,
                    (pixel, _) => pixel as f32,
                })
                .collect();
            let (y, index, dx) = max_pool(device, &shape, [&x, &[1.0; 72]], storage);
            for pixel in 0..9 {
                let (row, column) = (pixel / 3, pixel % 3);
                // The first tap of a window inside the image: the middle one for the pixel in the corner.
                let first = usize::from(row == 0) * 3 + usize::from(column == 0);
                assert_eq!((y[pixel * 8], usize::from(index[pixel * 8])), (-2.0, first), "{label}: pixel {pixel}");
                let middle = (2 - row) * 3 + 2 - column;
                assert!(y[pixel * 8 + 4].is_nan(), "{label}: pixel {pixel}");
                assert_eq!(usize::from(index[pixel * 8 + 4]), middle, "{label}: pixel {pixel}");
            }
            let gradient = |sample: usize| dx.iter().skip(sample).step_by(8).copied().collect::<Vec<_>>();
            assert_eq!(gradient(0), [4.0, 2.0, 0.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0], "{label}");
            assert_eq!(gradient(4), [0.0, 0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0], "{label}");
            results.push(dx);
        }
        results
    });
}

#[test]
fn windows_of_any_size_and_stride_give_every_gradient_to_one_pixel() {
    let n = 24;
    for (image, kernel, stride, pad) in [([7, 9], 5, 1, 2), ([6, 5], 2, 3, 1), ([16, 16], 16, 1, 0), ([1, 3], 3, 2, 1)]
    {
        let shape = PoolShape::new(3, image, kernel, stride, pad, n).unwrap();
        let [p, q] = shape.output_image();
        let x: Vec<f32> = (0..shape.input_len()).map(|i| (i * 2_654_435_761 % 10_007) as f32 - 9000.0).collect();
        let dy: Vec<f32> = (0..shape.output_len()).map(|i| (i % 13) as f32).collect();
        // The definition, window by window.
        let (mut y_want, mut dx_want) = (Vec::new(), vec![0.0; x.len()]);
        for (i, &gradient) in dy.iter().enumerate() {
            let (c, row, column, sample) = (i / n / q / p, i / n / q % p, i / n % q, i % n);
            let span = |o: usize, extent: usize| {
                (0..kernel).map(move |tap| o * stride + tap).filter(move |at| (pad..extent + pad).contains(at))
            };
            let taps = span(row, image[0]).flat_map(|h| span(column, image[1]).map(move |w| [h - pad, w - pad]));
            let at = taps.map(|[h, w]| ((c * image[0] + h) * image[1] + w) * n + sample);
            let best = at.reduce(|best, at| if x[at] > x[best] { at } else { best }).unwrap();
            y_want.push(f64::from(x[best]));
            dx_want[best] += f64::from(gradient);
        }
        on_devices(|device, label| {
            let label = format!("{label}: {image:?}, window {kernel}, stride {stride}, padding {pad}");
            let (y, _, dx) = max_pool(device, &shape, [&x, &dy], Storage::F32);
            // Small whole numbers: exact.
            Tensor { shape: vec![], data: y_want.clone() }.check(&y, 0.0, &label);
            Tensor { shape: vec![], data: dx_want.clone() }.check(&dx, 0.0, &label);
            vec![y, dx]
        });
    }
}

#[test]
fn tensors_of_the_wrong_size_and_windows_that_make_no_sense_are_refused() {
    let device = Device::open("host").unwrap();
    let shape = PoolShape::new(3, [8, 8], 2, 2, 0, 5).unwrap();
    let (x, mut y) =
        (device.alloc::<f32>(shape.input_len()).unwrap(), device.alloc::<f32>(shape.output_len()).unwrap());
    let mut index = device.alloc::<u8>(1).unwrap();
    let (from, to) = (x.view().into(), y.view_mut().into());
    let error = max_pool_forward(&device, &shape, from, index.view_mut(), to).unwrap_err().to_string();
    assert!(error.contains("elements of index: expected 384, got 1"), "{error}");
    let shape = MeanPoolShape::new(3, 64, 5).unwrap();
    let error = mean_pool_forward(&device, &shape, x.view().into(), y.view_mut().into()).unwrap_err().to_string();
    assert!(error.contains("elements of y: expected 24, got 384"), "{error}");
    let (x, mut y) = (Storage::Bf16.upload(&device, &[0.0; 1536]), Storage::F32.upload(&device, &[0.0; 24]));
    refuses_precision(mean_pool_forward(&device, &shape, x.view(), y.view_mut()), "mean_pool_forward", "y");
    let (shape, mut index) = (PoolShape::new(3, [8, 8], 8, 8, 0, 5).unwrap(), device.alloc(24).unwrap());
    let mixed = max_pool_forward(&device, &shape, x.view(), index.view_mut(), y.view_mut());
    refuses_precision(mixed, "max_pool_forward", "y");
    for (image, kernel, stride, pad) in [([8, 8], 17, 1, 8), ([8, 8], 2, 0, 0), ([8, 8], 2, 2, 2), ([2, 8], 3, 1, 0)] {
        assert!(PoolShape::new(3, image, kernel, stride, pad, 5).is_err(), "{image:?} {kernel} {stride} {pad}");
    }
    assert!(MeanPoolShape::new(3, 0, 5).is_err() && MeanPoolShape::new(3, usize::MAX, 5).is_err());
}
