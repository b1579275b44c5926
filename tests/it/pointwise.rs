//! The shortcut without parameters against float64 goldens.

use dilt::device::Device;
use dilt::ops::pointwise::{ShortcutShape, shortcut_backward, shortcut_forward};

use crate::support::{Golden, on_devices, read, unwritten};

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
            let x = device.upload(&tensor("x").samples_last()).unwrap();
            let dy = device.upload(&tensor("dy").samples_last()).unwrap();
            let (mut y, mut dx) = (unwritten(device, shape.output_len()), unwritten(device, shape.input_len()));
            shortcut_forward(device, &shape, None, x.view(), y.view_mut()).unwrap();
            shortcut_backward(device, &shape, None, dy.view(), dx.view_mut()).unwrap();
            let (y, dx) = (read(device, y.view()), read(device, dx.view()));
            // Values are only moved: exact.
            tensor("y").check_samples_last(&y, 0.0, &format!("{label}: {case}: y"));
            tensor("dx").check_samples_last(&dx, 0.0, &format!("{label}: {case}: dx"));
            results.extend([y, dx]);
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
        let (x, mut y) = (device.upload(&x).unwrap(), unwritten(device, shape.output_len()));
        shortcut_forward(device, &shape, None, x.view(), y.view_mut()).unwrap();
        let y = read(device, y.view());
        assert_eq!(y.iter().step_by(8).copied().collect::<Vec<_>>(), [0.0, 1.0, 25.0, 0.0, 0.0], "{label}");
        vec![y]
    });
}

#[test]
fn tensors_of_the_wrong_size_and_fewer_channels_are_refused() {
    let device = Device::open("host").unwrap();
    let shape = ShortcutShape::new([4, 8, 8], 8, 2, 5).unwrap();
    let (x, mut y) = (device.alloc(shape.input_len()).unwrap(), device.alloc(7).unwrap());
    let error = shortcut_forward(&device, &shape, None, x.view(), y.view_mut()).unwrap_err().to_string();
    assert!(error.contains("elements of y: expected 1024, got 7"), "{error}");
    let error = ShortcutShape::new([4, 8, 8], 3, 2, 5).err().unwrap().to_string();
    assert!(error.contains("output channels"), "{error}");
    assert!(ShortcutShape::new([4, 8, 8], 8, 0, 5).is_err());
}
