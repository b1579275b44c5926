//! A batch norm and the max pool that reads it in one pass: the bits of one after the other, which have their goldens.

use dilt::device::{Buffer, Device};
use dilt::ops::norm::{
    NormAffine, NormBackward, NormGradient, NormGradients, NormInput, NormShape, Normalised, Normed, norm_apply,
    norm_backward,
};
use dilt::ops::norm_pool::{NormPool, norm_pool_backward, norm_pool_forward};
use dilt::ops::pool::{PoolShape, max_pool_backward, max_pool_forward};
use dilt::ops::row_map::RowMap;

use crate::norm::values;
use crate::support::{Storage, on_devices, read, unwritten};

/// Of each row of the pool, the row of x.
const SOURCE: [Option<usize>; 5] = [None, Some(1), Some(0), None, Some(2)];
const FEATURES: usize = 3;

#[derive(Clone, Copy, Debug)]
struct Case {
    image: [usize; 2],
    /// Side of a window, stride, padding.
    window: [usize; 3],
    n: usize,
    count: usize,
    relu: bool,
    mapped: bool,
}

impl Case {
    /// y, index, dx, dgamma and dbeta, in one pass or one after the other.
    fn results(&self, device: &Device, storage: Storage, in_one: bool) -> Vec<Vec<f32>> {
        let Case { image: [h, w], window: [kernel, stride, pad], n, count, relu, mapped } = *self;
        let rows = if mapped { SOURCE.len() } else { FEATURES };
        let shape = NormShape::new(FEATURES, h * w, n).unwrap();
        let pool = PoolShape::new(rows, [h, w], kernel, stride, pad, n).unwrap();
        let map = mapped.then(|| RowMap::new(device, FEATURES, &SOURCE).unwrap());
        let tensor = |seed: u32, len: usize| {
            let values = values(seed, len).into_iter().enumerate();
            storage.upload(device, &values.map(|(i, x)| if i % n < count { x } else { 0.0 }).collect::<Vec<_>>())
        };
        let (x, dy) = (tensor(1, shape.len()), tensor(2, pool.output_len()));
        // A feature that is above zero nowhere, and one that is everywhere.
        let rows = [vec![0.7, -1.2, 0.4], vec![-9.0, 0.1, 9.0], vec![0.1, -0.2, 0.05], vec![1.5, 0.8, 1.0]];
        let [gamma, beta, mean, invstd] = rows.map(|row: Vec<f32>| device.upload(&row).unwrap());
        let counted = device.upload(&[count as u32]).unwrap();
        let [gamma, beta, mean, invstd] = [&gamma, &beta, &mean, &invstd].map(Buffer::view);
        let norm = Normalised { x: x.view(), gamma, beta, mean, invstd };
        let mut index = device.upload(&vec![0xffu8; pool.output_len()]).unwrap();
        let mut y = storage.unwritten(device, pool.output_len());
        let mut dx = storage.unwritten(device, shape.len());
        let (mut dgamma, mut dbeta) = (unwritten(device, FEATURES), unwritten(device, FEATURES));
        let mut scratch = unwritten(device, shape.scratch_len());
        if in_one {
            let input = NormPool { norm, relu, map: map.as_ref(), count: counted.view() };
            norm_pool_forward(device, &shape, &pool, input, index.view_mut(), y.view_mut()).unwrap();
            let to = NormGradients { dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut(), dx: dx.view_mut() };
            let (index, scratch) = (index.view(), scratch.view_mut());
            norm_pool_backward(device, &shape, &pool, input, dy.view(), index, scratch, to).unwrap();
        } else {
            let [mut z, mut dz] = [(); 2].map(|()| storage.unwritten(device, pool.input_len()));
            let input = NormInput { x: x.view(), residual: None, map: map.as_ref(), relu, count: counted.view() };
            let affine = NormAffine { gamma, beta, epsilon: 1e-5 };
            norm_apply(device, &shape, input, affine, mean, invstd, z.view_mut()).unwrap();
            max_pool_forward(device, &pool, z.view(), index.view_mut(), y.view_mut()).unwrap();
            max_pool_backward(device, &pool, dy.view(), index.view(), dz.view_mut()).unwrap();
            let normed = Normed { norm, y: None, relu, map: map.as_ref() };
            let dy = NormGradient::Kept(dz.view());
            let input = NormBackward { normed, dy, training: true, count: counted.view() };
            let to = NormGradients { dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut(), dx: dx.view_mut() };
            norm_backward(device, &shape, input, scratch.view_mut(), to).unwrap();
        }
        let index = device.read(index.view()).unwrap().into_iter().map(f32::from).collect();
        let [dgamma, dbeta] = [&dgamma, &dbeta].map(|row| read(device, row.view()));
        vec![storage.read(device, &y), index, storage.read(device, &dx), dgamma, dbeta]
    }
}

#[test]
fn in_one_pass_they_have_the_bits_of_one_after_the_other() {
    let cases = [
        Case { image: [9, 12], window: [3, 2, 1], n: 24, count: 21, relu: true, mapped: false },
        Case { image: [7, 5], window: [2, 1, 0], n: 8, count: 8, relu: false, mapped: false },
        Case { image: [6, 6], window: [3, 3, 1], n: 40, count: 1, relu: true, mapped: true },
        // Two chunks of a row.
        Case { image: [24, 20], window: [3, 2, 1], n: 32, count: 30, relu: true, mapped: true },
    ];
    on_devices(|device, label| {
        let mut results = Vec::new();
        for case in cases {
            for storage in [Storage::F32, Storage::Bf16] {
                let [got, want] = [true, false].map(|in_one| case.results(device, storage, in_one));
                for ((name, got), want) in ["y", "index", "dx", "dgamma", "dbeta"].iter().zip(&got).zip(&want) {
                    assert!(got.iter().all(|value| value.is_finite()), "{label}: {case:?}: {name} is not all written");
                    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(got), bits(want), "{label}: {case:?}, {storage:?}: {name}");
                }
                results.extend(got);
            }
        }
        results
    });
}

#[test]
fn tensors_of_the_wrong_size_or_precision_are_refused_by_name() {
    let device = Device::open("host").unwrap();
    let (shape, pool) = (NormShape::new(4, 36, 8).unwrap(), PoolShape::new(4, [6, 6], 3, 2, 1, 8).unwrap());
    let (count, row) = (device.alloc::<u32>(1).unwrap(), device.alloc::<f32>(4).unwrap());
    let x = Storage::F32.upload(&device, &vec![0.0; shape.len()]);
    let row = row.view();
    let norm = Normalised { x: x.view(), gamma: row, beta: row, mean: row, invstd: row };
    let input = NormPool { norm, relu: true, map: None, count: count.view() };
    let forward = |pool: &PoolShape, storage: Storage, index: usize, y: usize| {
        let (mut index, mut y) = (device.alloc::<u8>(index).unwrap(), storage.unwritten(&device, y));
        norm_pool_forward(&device, &shape, pool, input, index.view_mut(), y.view_mut()).unwrap_err().to_string()
    };
    let len = pool.output_len();
    for (error, expected) in [
        (forward(&pool, Storage::F32, len - 1, len), format!("elements of index: expected {len}, got {}", len - 1)),
        (forward(&pool, Storage::F32, len, len + 8), format!("elements of y or dy: expected {len}, got {}", len + 8)),
        (forward(&pool, Storage::Bf16, len, len), "precision of x of the norm: expected bf16, got f32".into()),
        (
            forward(&PoolShape::new(4, [6, 12], 3, 2, 1, 8).unwrap(), Storage::F32, len, len),
            "what the pool reads: expected 4 x 36 x 8, got 4 x 72 x 8".into(),
        ),
        (
            forward(&PoolShape::new(5, [6, 6], 3, 2, 1, 8).unwrap(), Storage::F32, len, len),
            "what the pool reads: expected 4 x 36 x 8, got 5 x 36 x 8".into(),
        ),
    ] {
        assert!(error.contains(&expected), "{error}");
    }
    let backward = |scratch: usize, dx: usize| {
        let (mut dgamma, mut dbeta) = (unwritten(&device, 4), unwritten(&device, 4));
        let (mut scratch, mut dx) = (unwritten(&device, scratch), Storage::F32.unwritten(&device, dx));
        let (dy, index) = (Storage::F32.unwritten(&device, len), device.alloc::<u8>(len).unwrap());
        let to = NormGradients { dgamma: dgamma.view_mut(), dbeta: dbeta.view_mut(), dx: dx.view_mut() };
        let result = norm_pool_backward(&device, &shape, &pool, input, dy.view(), index.view(), scratch.view_mut(), to);
        result.unwrap_err().to_string()
    };
    let needed = shape.scratch_len();
    let error = backward(needed - 1, shape.len());
    assert!(error.contains(&format!("elements of scratch: expected {needed}, got {}", needed - 1)), "{error}");
    let error = backward(needed, shape.len() - 8);
    assert!(error.contains("elements of dx: expected 1152, got 1144"), "{error}");
}
