//! The idx files of MNIST and Fashion-MNIST: what is read, and what is refused with which words.

use std::io::Write;
use std::path::Path;

use dilt::Result;
use dilt::data::{DataSet, idx};
use flate2::Compression;
use flate2::write::GzEncoder;

use crate::data::{bytes, load};

fn file(sizes: &[u32], values: &[u8]) -> Vec<u8> {
    let header = [0, 0, 8, sizes.len() as u8].into_iter().chain(sizes.iter().flat_map(|size| size.to_be_bytes()));
    header.chain(values.iter().copied()).collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Three training and two test images of 2 x 3 pixels, under names as given.
fn write(folder: &Path, train: [&str; 2], test: [&str; 2]) {
    let images = |n: u8| file(&[n.into(), 2, 3], &(0..6 * n).map(|i| i * 3).collect::<Vec<_>>());
    let files = [
        (train[0], images(3)),
        (train[1], file(&[3], &[2, 0, 1])),
        (test[0], images(2)),
        (test[1], file(&[2], &[4, 1])),
    ];
    for (name, bytes) in files {
        let bytes = if name.ends_with(".gz") { gzip(&bytes) } else { bytes };
        std::fs::write(folder.join(name), bytes).unwrap();
    }
}

const TRAIN: [&str; 2] = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"];
const TEST: [&str; 2] = ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"];

fn open(folder: &Path) -> Result<DataSet> {
    load(&format!("idx={}", folder.display()))
}

#[test]
fn plain_and_compressed_files_under_either_name_are_the_same_data() {
    let plain = tempfile::tempdir().unwrap();
    write(plain.path(), TRAIN, TEST);
    let data = open(plain.path()).unwrap();
    assert_eq!((data.name.as_str(), data.shape, data.stored, data.classes), ("idx", [1, 2, 3], [1, 2, 3], 5));
    assert_eq!((&data.train.labels, &data.test.labels), (&vec![2, 0, 1], &vec![4, 1]));
    assert_eq!(bytes(&data.train), (0..18).map(|i| i * 3).collect::<Vec<u8>>());
    assert_eq!(bytes(&data.test), (0..12).map(|i| i * 3).collect::<Vec<u8>>());
    assert!(data.val.is_empty());
    // 0, 3, ..., 51: mean 25.5, variance 9 (18² - 1) / 12.
    assert_eq!(data.mean, [0.1]);
    assert!((data.std[0] - (9.0f32 * 323.0 / 12.0).sqrt() / 255.0).abs() < 1e-7);

    let other = tempfile::tempdir().unwrap();
    let train = ["train-images.idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"];
    write(other.path(), train, ["t10k-images-idx3-ubyte.gz", "t10k-labels.idx1-ubyte"]);
    assert_eq!(open(other.path()).unwrap(), data);
}

#[test]
fn damaged_files_are_named_with_the_position() {
    let path = Path::new("images");
    let good = file(&[2, 2, 2], &[7; 8]);
    let compressed = gzip(&good);
    let mut flipped = compressed.clone();
    let checksum = flipped.len() - 8;
    flipped[checksum] ^= 1;
    let cut = compressed.len() / 2;
    let huge = file(&[u32::MAX, u32::MAX, u32::MAX], &[]);
    let cases: &[(&[u8], &[&str])] = &[
        (&[], &["begins with [00, 00, 08, 03], got []"]),
        (&good[..3], &["got [00, 00, 08]"]),
        (&good[..9], &["cut short", "a header of 16 bytes, got 9"]),
        (&good[..20], &["cut short", "[2, 2, 2]", "expected 24 bytes, got 20"]),
        (&[&good[..], &[0]].concat(), &["expected 24 bytes, but more follow"]),
        (&file(&[8], &[7; 8]), &["3 dimensions", "got [00, 00, 08, 01]"]),
        (&[&[0, 0, 13, 3], &good[4..]].concat(), &["of bytes", "got [00, 00, 0d, 03]"]),
        (b"<!DOCTYPE html>", &["expected an idx file"]),
        (&huge, &["from 1 to 4294967296 values"]),
        (&file(&[0, 28, 28], &[]), &["[0, 28, 28]", "from 1"]),
        (&file(&[65536, 256, 256], &[1; 100]), &["cut short", "expected 4294967312 bytes, got 116"]),
        (&gzip(&good[..20]), &["cut short", "expected 24 bytes of what is compressed in it, got 20"]),
        (&gzip(&[&good[..], &[0]].concat()), &["more follow"]),
        (&compressed[..cut], &["damaged at byte"]),
        (&compressed[..compressed.len() - 4], &["damaged at byte 24"]),
        (&flipped, &["damaged at byte 24", "checksum"]),
        (&[&compressed[..], b"x"].concat(), &["damaged at byte 24"]),
        (&[0x1f, 0x8b, 9, 9], &["damaged at byte 0"]),
    ];
    for (bytes, says) in cases {
        let error = idx::read::<3>(*bytes, path).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        let error = error.to_string();
        assert!(error.starts_with("images: ") && says.iter().all(|part| error.contains(part)), "{error}: not {says:?}");
    }
    assert_eq!(idx::read::<3>(&good[..], path).unwrap(), ([2, 2, 2], vec![7; 8]));
    assert_eq!(idx::read::<3>(&compressed[..], path).unwrap(), ([2, 2, 2], vec![7; 8]));
}

#[test]
fn a_small_file_that_inflates_without_end_stops_where_its_header_says() {
    let bomb = gzip(&file(&[1, 1, 4], &vec![0; 1 << 26]));
    assert!(bomb.len() < 1 << 17);
    let error = idx::read::<3>(&bomb[..], Path::new("bomb")).unwrap_err().to_string();
    assert!(error.contains("expected 20 bytes") && error.contains("more follow"), "{error}");
}

#[test]
fn files_that_do_not_fit_each_other_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |name: &str, bytes: Option<Vec<u8>>, says: &[&str]| {
        write(folder.path(), TRAIN, TEST);
        let path = folder.path().join(name);
        match bytes {
            Some(bytes) => std::fs::write(&path, bytes).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        let error = open(folder.path()).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        let error = error.to_string();
        assert!(says.iter().all(|part| error.contains(part)), "{error}: not {says:?}");
    };
    refused(TRAIN[1], Some(file(&[4], &[0; 4])), &[TRAIN[1], "4 labels of 3 images"]);
    refused(TEST[0], Some(file(&[2, 3, 2], &[0; 12])), &["2 x 3", "[3, 2]", "one size"]);
    refused(TEST[1], None, &["has no t10k-labels-idx1-ubyte (or t10k-labels-idx1-ubyte.gz)"]);
    refused(TRAIN[0], Some(file(&[3], &[0; 3])), &[TRAIN[0], "3 dimensions"]);
    write(folder.path(), TRAIN, TEST);
    std::fs::remove_file(folder.path().join(TRAIN[0])).unwrap();
    std::fs::create_dir(folder.path().join(TRAIN[0])).unwrap();
    let error = open(folder.path()).unwrap_err().to_string();
    assert!(error.contains(TRAIN[0]) && error.contains("directory"), "{error}");
}
