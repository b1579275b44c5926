//! The binary version of CIFAR-10 and CIFAR-100: what is read, and what is refused with which words.

use std::path::Path;

use dilt::Result;
use dilt::data::cifar::{CIFAR10, CIFAR100, CIFAR100_COARSE, parse};
use dilt::data::{DataSet, partition};

use crate::data::{bytes, load};

const PIXELS: usize = 3072;

/// A record: its labels, and an image whose planes are `value`, `value + 1` and `value + 2`.
fn record(labels: &[u8], value: u8) -> Vec<u8> {
    let planes = (0..3).flat_map(|plane| [value + plane; PIXELS / 3]);
    labels.iter().copied().chain(planes).collect()
}

/// Two records in each training file and one to test on.
fn write_cifar10(folder: &Path) {
    for file in 0..5u8 {
        let records = [record(&[file], 10 * file), record(&[9 - file], 10 * file + 5)].concat();
        std::fs::write(folder.join(format!("data_batch_{}.bin", file + 1)), records).unwrap();
    }
    std::fs::write(folder.join("test_batch.bin"), record(&[7], 200)).unwrap();
}

fn open(kind: &str, folder: &Path) -> Result<DataSet> {
    load(&format!("{kind}={}", folder.display()))
}

#[test]
fn records_stay_in_the_order_of_the_files() {
    let folder = tempfile::tempdir().unwrap();
    write_cifar10(folder.path());
    let data = open("cifar10", folder.path()).unwrap();
    assert_eq!((data.name.as_str(), data.shape, data.classes, data.scale), ("cifar10", [3, 32, 32], 10, 255.0));
    assert_eq!(data.train.labels, [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]);
    let first: Vec<u8> = bytes(&data.train).chunks(PIXELS).map(|image| image[0]).collect();
    assert_eq!(first, [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]);
    assert_eq!((&data.test.labels, bytes(&data.test)), (&vec![7], &record(&[], 200)[..]));
    // Planes of 0, 5, ..., 45, and one and two more.
    for (channel, mean) in [22.5, 23.5, 24.5].into_iter().enumerate() {
        assert!((data.mean[channel] - mean / 255.0).abs() < 1e-7);
        assert!((data.std[channel] - (25.0f32 * 99.0 / 12.0).sqrt() / 255.0).abs() < 1e-7);
    }
    let parts = partition::Partition::Classes { parts: 2 }.split(&data.train.labels, data.classes).unwrap();
    assert_eq!(parts[1].examples, [1, 3, 5, 7, 9]);
}

#[test]
fn the_archives_own_folder_is_found() {
    let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_cifar10(inside.path());
    let inner = outside.path().join("cifar-10-batches-bin");
    std::fs::create_dir(&inner).unwrap();
    write_cifar10(&inner);
    assert_eq!(open("cifar10", outside.path()).unwrap(), open("cifar10", inside.path()).unwrap());
}

#[test]
fn cifar100_has_fine_or_coarse_labels() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("train.bin"), [record(&[19, 99], 1), record(&[0, 3], 2)].concat()).unwrap();
    std::fs::write(folder.path().join("test.bin"), record(&[4, 55], 3)).unwrap();
    let fine = open("cifar100", folder.path()).unwrap();
    assert_eq!((fine.name.as_str(), fine.classes), ("cifar100", 100));
    assert_eq!((fine.train.labels, fine.test.labels), (vec![99, 3], vec![55]));
    let coarse = open("cifar100-coarse", folder.path()).unwrap();
    assert_eq!((coarse.name.as_str(), coarse.classes), ("cifar100-coarse", 20));
    assert_eq!((coarse.train.labels, coarse.test.labels), (vec![19, 0], vec![4]));
    assert_eq!(coarse.train.images, fine.train.images);
}

#[test]
fn wrong_lengths_and_labels_are_named_with_record_and_byte() {
    let good = [record(&[1], 0), record(&[2], 0)].concat();
    let mut label = good.clone();
    label[3073] = 10;
    let fine = [record(&[19, 99], 0), record(&[19, 100], 0)].concat();
    let coarse = record(&[20, 5], 0);
    let cases: &[(&[u8], _, &[&str])] = &[
        (&[], &CIFAR10, &["records of 3073 bytes", "got 0 bytes"]),
        (&good[..6145], &CIFAR10, &["got 6145 bytes", "record 1, at byte 3073, is cut short"]),
        (&[&good[..], &[0]].concat(), &CIFAR10, &["record 2, at byte 6146"]),
        (&label, &CIFAR10, &["record 1, byte 3073: expected a label below 10, got 10", "cifar10"]),
        (&good, &CIFAR100, &["records of 3074 bytes", "2 of labels"]),
        (&fine, &CIFAR100, &["record 1, byte 3075: expected a label below 100, got 100"]),
        (&coarse, &CIFAR100, &["record 0, byte 0: expected a label below 20, got 20"]),
        (&fine, &CIFAR100_COARSE, &["byte 3075"]),
    ];
    for (bytes, format, says) in cases {
        let error = parse(bytes, format, Path::new("some.bin")).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        let error = error.to_string();
        assert!(
            error.starts_with("some.bin: ") && says.iter().all(|part| error.contains(part)),
            "{error}: not {says:?}"
        );
    }
    assert_eq!(parse(&good, &CIFAR10, Path::new("some.bin")).unwrap().1, [1, 2]);
}

#[test]
fn missing_files_say_what_to_unpack() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |kind: &str, says: &[&str]| {
        let error = open(kind, folder.path()).unwrap_err().to_string();
        assert!(says.iter().all(|part| error.contains(part)), "{error}: not {says:?}");
    };
    refused("cifar10", &["has no data_batch_1.bin", "binary version of cifar10", "test_batch.bin"]);
    std::fs::write(folder.path().join("cifar-10-binary.tar.gz"), "").unwrap();
    std::fs::write(folder.path().join("cifar-100-binary.tar.gz"), "").unwrap();
    refused("cifar10", &["unpack cifar-10-binary.tar.gz"]);
    refused("cifar100-coarse", &["has no train.bin", "unpack cifar-100-binary.tar.gz"]);
    std::fs::remove_file(folder.path().join("cifar-10-binary.tar.gz")).unwrap();
    write_cifar10(folder.path());
    std::fs::rename(folder.path().join("data_batch_4.bin"), folder.path().join("data_batch_4.bin.xz")).unwrap();
    refused("cifar10", &["has no data_batch_4.bin", "unpack data_batch_4.bin.xz"]);
    std::fs::create_dir(folder.path().join("data_batch_4.bin")).unwrap();
    refused("cifar10", &["data_batch_4.bin", "cannot be read", "directory"]);
}
