//! CIFAR files: what is read is whole records of labels within range.
#![no_main]

use std::path::Path;

use dilt::data::cifar::{CIFAR10, CIFAR100, CIFAR100_COARSE, Format, parse};

fn check(bytes: &[u8], format: &Format) -> bool {
    let Ok((images, labels)) = parse(bytes, format, Path::new("fuzz")) else { return false };
    assert_eq!(images.len(), 3072 * labels.len());
    assert_eq!(bytes.len(), (3072 + format.classes.len()) * labels.len());
    assert!(labels.iter().all(|&label| (label as usize) < *format.classes.iter().max().expect("labels")));
    true
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    for format in [&CIFAR10, &CIFAR100, &CIFAR100_COARSE] {
        check(bytes, format);
        // Up to three records of these labels: to find their length would take the fuzzer long.
        let labels = bytes.chunks_exact(format.classes.len()).take(3);
        let mut file = Vec::new();
        for labels in labels.clone() {
            file.extend_from_slice(labels);
            file.extend_from_slice(&[7; 3072]);
        }
        let in_range = |labels: &[u8]| labels.iter().zip(format.classes).all(|(&label, &n)| usize::from(label) < n);
        assert_eq!(check(&file, format), !file.is_empty() && labels.clone().all(in_range));
    }
});
