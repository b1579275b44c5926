//! Data sets by name, and the digits that are part of the program.

use dilt::data::{self, DataSet, Examples, Pixels, Reading};
use dilt::report::progress::{Progress, Verbosity};

pub fn load(spec: &str) -> dilt::Result<DataSet> {
    data::load(spec, &Reading::default(), &Progress::new(Verbosity::Quiet))
}

pub fn bytes(examples: &Examples) -> &[u8] {
    match &examples.images {
        Pixels::Bytes(bytes) => bytes,
        Pixels::Files(_) => panic!("expected images in memory"),
    }
}

/// FNV-1a, to hold a split still without storing it.
fn hash(values: impl Iterator<Item = u32>) -> u64 {
    values.fold(0xcbf2_9ce4_8422_2325, |h, v| (h ^ u64::from(v)).wrapping_mul(0x0100_0000_01b3))
}

#[test]
fn digits_are_complete_and_their_split_never_changes() {
    let digits = load("digits").unwrap();
    assert_eq!((digits.shape, digits.classes, digits.scale), ([1, 8, 8], 10, 16.0));
    assert_eq!((digits.train.len(), digits.test.len()), (1352, 445));
    let mut per_class = [[0; 2]; 10];
    for (split, examples) in [&digits.train, &digits.test].into_iter().enumerate() {
        assert_eq!(bytes(examples).len(), 64 * examples.len());
        assert!(bytes(examples).iter().all(|&byte| byte <= 16));
        examples.labels.iter().for_each(|&label| per_class[label as usize][split] += 1);
    }
    let all = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180];
    assert_eq!(per_class, all.map(|n| [n - n / 4, n / 4]));
    // The sum of all pixels of scikit-learn's load_digits().data.
    let ink = |images: &[u8]| images.iter().map(|&byte| u64::from(byte)).sum::<u64>();
    assert_eq!(ink(bytes(&digits.train)) + ink(bytes(&digits.test)), 561_718);
    assert_eq!(hash(digits.test.labels.iter().copied()), TEST_LABELS);
    assert_eq!(hash(bytes(&digits.test).iter().map(|&byte| byte.into())), TEST_IMAGES);
    assert_eq!(digits, load("digits").unwrap());
}

const TEST_LABELS: u64 = 10_514_924_293_535_823_805;
const TEST_IMAGES: u64 = 9_081_017_536_210_975_552;

#[test]
fn digits_normalise_to_mean_zero_and_deviation_one() {
    let digits = load("digits").unwrap();
    let value = |&byte: &u8| f64::from((f32::from(byte) / digits.scale - digits.mean[0]) / digits.std[0]);
    let n = bytes(&digits.train).len() as f64;
    let mean = bytes(&digits.train).iter().map(value).sum::<f64>() / n;
    let variance = bytes(&digits.train).iter().map(|b| value(b).powi(2)).sum::<f64>() / n;
    assert!(mean.abs() < 1e-6 && (variance - 1.0).abs() < 1e-6, "{mean} {variance}");
}

#[test]
fn digits_normalise_with_the_moments_of_their_values_in_f64() {
    let digits = load("digits").unwrap();
    let values = || bytes(&digits.train).iter().map(|&byte| f64::from(byte) / 16.0);
    let n = values().count() as f64;
    let mean = values().sum::<f64>() / n;
    let variance = values().map(|value| (value - mean).powi(2)).sum::<f64>() / n;
    assert_eq!((digits.mean[0], digits.std[0]), (mean as f32, variance.sqrt() as f32));
}

#[test]
fn other_names_say_what_exists() {
    for spec in ["", "digit", "=", "digits=/data", "imagenet", "cifar=/x", "idx", "cifar10=", "cifar100"] {
        let error = load(spec).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let expected = if spec.starts_with("idx") || spec.starts_with("cifar1") { "=DIR" } else { "digits" };
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn a_folder_that_is_none_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    for kind in ["idx", "cifar10", "cifar100", "cifar100-coarse"] {
        let error = load(&format!("{kind}={}", file.display())).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains("file: expected the folder"), "{error}");
        let error = load(&format!("{kind}={}", folder.path().join("none").display())).unwrap_err().to_string();
        assert!(error.contains("none") && error.contains("No such file"), "{error}");
    }
}

#[test]
fn options_for_image_files_are_refused_elsewhere() {
    let resized = Reading { resize: Some(40), ..Reading::default() };
    let skipping = Reading { skip_broken: true, ..Reading::default() };
    for (reading, option) in [(resized, "--resize"), (skipping, "--skip-broken")] {
        let error = data::load("digits", &reading, &Progress::new(Verbosity::Quiet)).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(option), "{error}");
    }
}
