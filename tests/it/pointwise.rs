//! The shortcut without parameters against float64 goldens.

use dilt::device::Device;
use dilt::ops::pointwise::{ShortcutShape, shortcut_backward, shortcut_forward};

use half::bf16;

use crate::support::{Golden, Storage, judge_bf16, on_devices, refuses_precision};

/// y of x and dx of dy, without a map.
fn shortcut(device: &Device, shape: &ShortcutShape, [x, dy]: [&[f32]; 2], storage: Storage) -> [Vec<f32>; 2] {
    let (x, dy) = (storage.upload(device, x), storage.upload(device, dy));
    let mut y = storage.unwritten(device, shape.output_len());
    let mut dx = storage.unwritten(device, shape.input_len());
    shortcut_forward(device, shape, None, x.view(), y.view_mut()).unwrap();
    shortcut_backward(device, shape, None, dy.view(), dx.view_mut()).unwrap();
    [y, dx].map(|buffer| storage.read(device, &buffer))
}

#[test]
fn the_shortcut_and_its_gradient_agree_with_pytorch() {
    let golden = Golden::open("shortcut");
    on_devices(|device, label| {
        let mut results = Vec::new();
        for case in golden.cases() {
            let tensor = |name: &str| golden.get(&case, name);
            let ([n, c, h, w], k) = (tensor("x").shape.try_into().unwrap(), tensor("y").shape[1]);
            let shape = ShortcutShape::new([c, h, w], k, golden.number(&case, "stride") as usize, n).unwrap();
            assert_eq!(shape.output_image()[..], tensor("y").shape[2..]);
            let (from, by) = (tensor("x").samples_last(), tensor("dy").samples_last());
            let [y, dx] = shortcut(device, &shape, [&from, &by], Storage::F32);
            // Values are only moved: exact.
            tensor("y").check_samples_last(&y, 0.0, &format!("{label}: {case}: y"));
            tensor("dx").check_samples_last(&dx, 0.0, &format!("{label}: {case}: dx"));
            results.extend([y, dx]);
            results.extend(judge_bf16(&format!("{label}: {case}: bf16"), |storage| {
                let [y, dx] = shortcut(device, &shape, [&from, &by], storage);
                vec![("y", y, tensor("y").samples_last()), ("dx", dx, tensor("dx").samples_last())]
            }));
        }
        results
    });
}

#[test]
fn an_odd_number_of_new_channels_leaves_the_larger_half_behind() {
    // Two channels to five: one of zeros before, two after. One row of three pixels at stride 3: the first is read.
    let shape = ShortcutShape::new([2, 1, 3], 5, 3, 8).unwrap();
    on_devices(|device, label| {
        let x: Vec<f32> = (1..=48).map(|i| i as f32).collect();
        let [y, _] = shortcut(device, &shape, [&x, &vec![0.0; shape.output_len()]], Storage::F32);
        assert_eq!(y.iter().step_by(8).copied().collect::<Vec<_>>(), [0.0, 1.0, 25.0, 0.0, 0.0], "{label}");
        vec![y]
    });
}

#[test]
fn tensors_of_the_wrong_size_and_fewer_channels_are_refused() {
    let device = Device::open("host").unwrap();
    let shape = ShortcutShape::new([4, 8, 8], 8, 2, 5).unwrap();
    let (x, mut y) = (device.alloc::<f32>(shape.input_len()).unwrap(), device.alloc::<f32>(7).unwrap());
    let error = shortcut_forward(&device, &shape, None, x.view().into(), y.view_mut().into()).unwrap_err().to_string();
    assert!(error.contains("elements of y: expected 1024, got 7"), "{error}");
    let (x, mut y) = (Storage::Bf16.upload(&device, &[0.0; 2048]), Storage::F32.upload(&device, &[0.0; 1024]));
    refuses_precision(shortcut_forward(&device, &shape, None, x.view(), y.view_mut()), "shortcut_forward", "y");
    let (dy, mut dx) = (Storage::Bf16.upload(&device, &[0.0; 1024]), Storage::F32.upload(&device, &[0.0; 2048]));
    refuses_precision(shortcut_backward(&device, &shape, None, dy.view(), dx.view_mut()), "shortcut_backward", "dx");
    let error = ShortcutShape::new([4, 8, 8], 3, 2, 5).err().unwrap().to_string();
    assert!(error.contains("output channels"), "{error}");
    assert!(ShortcutShape::new([4, 8, 8], 8, 0, 5).is_err());
}

/// A copy reads and writes what it copies, so that all bits of a bf16 but a NaN's come back.
#[test]
fn every_bf16_is_read_and_written_as_it_is() {
    let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
    // Rows of whole vectors, and of a half of one.
    for n in [1 << 16, 8] {
        let shape = ShortcutShape::new([1, 1, all.len() / n], 1, 1, n).unwrap();
        on_devices(|device, label| {
            let (x, mut y) = (device.upload(&all).unwrap(), device.upload(&vec![bf16::ONE; all.len()]).unwrap());
            shortcut_forward(device, &shape, None, x.view().into(), y.view_mut().into()).unwrap();
            let got = device.read(y.view()).unwrap();
            for (got, want) in got.iter().zip(&all) {
                let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
                assert!(same, "{label}: {:#x}: {:#x}", want.to_bits(), got.to_bits());
            }
            vec![]
        });
    }
}
