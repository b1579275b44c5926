//! Data sets by name, and the digits that are part of the program.

use dilt::data::{self, DataSet, Examples, Pixels, Reading};
use dilt::report::progress::{Progress, Verbosity};

fn load(spec: &str) -> dilt::Result<DataSet> {
    data::load(spec, &Reading::default(), &Progress::new(Verbosity::Quiet))
}

fn bytes(examples: &Examples) -> &[u8] {
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
fn other_names_say_what_exists_and_what_is_not_built_yet() {
    for spec in ["idx=/data", "idx", "cifar10=x", "cifar100=", "folder=/data/a=b"] {
        let error = load(spec).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("not built yet"), "{error}");
    }
    for spec in ["", "digit", "=", "digits=/data", "imagenet"] {
        let error = load(spec).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("digits"), "{error}");
    }
}
