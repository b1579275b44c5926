//! Weights and ticket files: the same bits back, PyTorch's names, and a clear refusal of everything else.
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use dilt::mask::Mask;
use dilt::nn::weights::Weights;
use ndarray::{ArrayD, ShapeBuilder};
use proptest::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

/// A folder that is removed at the end, and a file in it.
fn scratch() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    (folder, path)
}

fn load_bytes(bytes: &[u8]) -> dilt::Result<Weights> {
    let (_folder, path) = scratch();
    std::fs::write(&path, bytes).unwrap();
    Weights::load(&path)
}

fn refused(bytes: &[u8], says: &[&str]) {
    let error = load_bytes(bytes).unwrap_err();
    assert!(matches!(error, dilt::Error::File { .. }));
    for part in ["w.safetensors"].iter().chain(says) {
        assert!(error.to_string().contains(part), "{error}\ndoes not say {part}");
    }
}

/// A file of this header, not padded, and these bytes.
fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// A file by the safetensors crate.
fn crate_file(tensors: &[(&str, Dtype, &[usize], &[u8])]) -> Vec<u8> {
    let view = |&(name, dtype, shape, data): &(_, _, &[usize], _)| {
        (name, TensorView::new(dtype, shape.to_vec(), data).unwrap())
    };
    safetensors::serialize(tensors.iter().map(view), None).unwrap()
}

fn le(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn array(shape: &[usize], values: Vec<f32>) -> ArrayD<f32> {
    ArrayD::from_shape_vec(shape, values).unwrap()
}

fn sample() -> Weights {
    let conv = array(&[2, 1, 1, 3], vec![1.0, -0.0, f32::MIN_POSITIVE / 2.0, f32::MAX, -1.5, 0.0]);
    Weights {
        masks: [("conv.weight".into(), Mask::from_fn(conv.shape(), |i| i % 2 == 0))].into(),
        tensors: [("conv.weight".into(), conv), ("bn.bias".into(), array(&[0], vec![]))].into(),
        metadata: [("method", "lth"), ("seed", "0"), ("\"quoted\"\n", "é")].map(|(k, v)| (k.into(), v.into())).into(),
    }
}

fn bits(weights: &Weights) -> Vec<u32> {
    weights.tensors.values().flatten().map(|v| v.to_bits()).collect()
}

#[test]
fn a_ticket_comes_back_bit_by_bit_under_pytorchs_names() {
    let (_folder, path) = scratch();
    sample().save(&path).unwrap();
    let back = Weights::load(&path).unwrap();
    assert_eq!(back, sample());
    assert_eq!(bits(&back), bits(&sample()));

    let bytes = std::fs::read(&path).unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = theirs.names();
    names.sort_unstable();
    assert_eq!(names, ["bn.bias", "conv.weight_mask", "conv.weight_orig"]);
    assert_eq!(theirs.tensor("conv.weight_mask").unwrap().data(), [1, 0, 1, 0, 1, 0]);
    assert_eq!(theirs.tensor("conv.weight_mask").unwrap().dtype(), Dtype::U8);
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata: HashMap<String, String> = sample().metadata.into_iter().collect();
    assert_eq!(header.metadata().as_ref(), Some(&metadata));
}

#[test]
fn equal_content_gives_equal_bytes_whatever_the_memory_layout() {
    let (_folder, path) = scratch();
    let metadata: BTreeMap<String, String> = (0..50).map(|i| (format!("key{i}"), i.to_string())).collect();
    let rows = ArrayD::from_shape_fn(vec![3, 4], |i| (4 * i[0] + i[1]) as f32);
    let mut columns = ArrayD::zeros(vec![3, 4].f());
    columns.assign(&rows);
    let files = [rows, columns].map(|tensor| {
        let weights =
            Weights { tensors: [("w".into(), tensor)].into(), metadata: metadata.clone(), ..Weights::default() };
        weights.save(&path).unwrap();
        std::fs::read(&path).unwrap()
    });
    assert_eq!(files[0], files[1]);
    assert_eq!(load_bytes(&files[0]).unwrap().metadata, metadata);
}

#[test]
fn every_float_type_is_read_and_step_counters_are_passed_over() {
    let file = crate_file(&[
        ("f16", Dtype::F16, &[2], &[0, 0x3c, 1, 0]),
        ("bf16", Dtype::BF16, &[1], &[0x80, 0xbf]),
        ("f64", Dtype::F64, &[], &0.1f64.to_le_bytes()),
        ("a_orig", Dtype::F32, &[2], &le(&[3.0, 4.0])),
        ("a_mask", Dtype::F32, &[2], &le(&[0.0, 1.0])),
        ("b_orig", Dtype::F32, &[1], &le(&[5.0])),
        ("b_mask", Dtype::BOOL, &[1], &[1]),
        ("bn.num_batches_tracked", Dtype::I64, &[], &[9; 8]),
    ]);
    let weights = load_bytes(&file).unwrap();
    let names: Vec<&str> = weights.tensors.keys().map(String::as_str).collect();
    assert_eq!(names, ["a", "b", "bf16", "f16", "f64"]);
    assert_eq!(weights.tensors["f16"], array(&[2], vec![1.0, 2f32.powi(-24)]));
    assert_eq!(weights.tensors["bf16"], array(&[1], vec![-1.0]));
    assert_eq!(weights.tensors["f64"], array(&[], vec![0.1]));
    assert_eq!(weights.tensors["a"], array(&[2], vec![3.0, 4.0]));
    assert_eq!(weights.masks["a"].to_bytes(), [0, 1]);
    assert_eq!(weights.masks["b"].to_bytes(), [1]);
}

#[test]
fn damaged_files_are_refused_with_the_reason() {
    let one = |dtype: &str, shape: &str, offsets: &str| {
        format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let two = |first: &str, second: &str| {
        format!(
            r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":{first}}},"b":{{"dtype":"U8","shape":[4],"data_offsets":{second}}}}}"#
        )
    };
    refused(b"", &["empty"]);
    refused(b"1234567", &["cut short", "got 7"]);
    refused(&raw(&one("F32", "[1]", "[0,4]"), &[0; 3]), &["cut short", "\"a\" ends at byte 4", "only 3"]);
    refused(&raw(&one("F32", "[1]", "[0,4]"), &[0; 5]), &["1 bytes follow the last tensor"]);
    refused(&[&u64::MAX.to_le_bytes()[..], b"{}"].concat(), &["header of 18446744073709551615 bytes", "only 2"]);
    refused(&vec![0; 40 << 20], &["does not begin with {"]);
    refused(&[&(33u64 << 20).to_le_bytes()[..], vec![b' '; 34 << 20].as_slice()].concat(), &["at most 33554432"]);
    refused(&raw("{\"a\":", b""), &["not that of a safetensors file"]);
    refused(&raw(&format!("{}{}", "{\"a\":".repeat(500), "}".repeat(500)), b""), &["not that of a safetensors file"]);
    refused(&raw(r#"{"a":5}"#, b""), &["expected an object"]);
    refused(&raw(r#"{"__metadata__":{"k":5}}"#, b""), &["metadata \"k\"", "expected text, got 5"]);
    refused(&raw(r#"{"a":{"dtype":"F32","shape":[]}}"#, b""), &["\"a\"", "no \"data_offsets\""]);
    refused(&raw(&one("F8_E4M3", "[1]", "[0,1]"), &[0]), &["\"a\"", "F8_E4M3", "convert"]);
    refused(&raw(&one("F32", "[-1]", "[0,4]"), &[0; 4]), &["\"a\": shape [-1]"]);
    refused(&raw(&one("F32", "[1.5]", "[0,4]"), &[0; 4]), &["\"a\": shape [1.5]"]);
    refused(&raw(&one("F32", "[2]", "[0,4]"), &[0; 4]), &["shape [2] of F32 needs 8 bytes", "[0, 4]"]);
    refused(&raw(&one("F32", "[1]", "[4,0]"), &[0; 4]), &["needs 4 bytes", "[4, 0]"]);
    refused(&raw(&one("F32", "[4294967296,4294967296]", "[0,0]"), b""), &["overflows"]);
    refused(&raw(&one("U8", "[0,9223372036854775808,2]", "[0,0]"), b""), &["overflows"]);
    refused(&raw(&one("U8", "[9223372036854775807]", "[0,9223372036854775807]"), b""), &["cut short"]);
    refused(&raw(&one("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]"), &[0; 4]), &["at most 8 dimensions, got 9"]);
    refused(&raw(&two("[0,4]", "[2,6]"), &[0; 6]), &["\"b\" overlaps", "byte 4, got 2"]);
    refused(&raw(&two("[0,4]", "[5,9]"), &[0; 9]), &["\"b\" leaves a hole", "byte 4, got 5"]);
    refused(&raw(&two("[0,4]", "[0,4]"), &[0; 4]), &["\"b\" overlaps"]);
    refused(&raw(&two("[0,4]", "[4,8]").replace("\"b\"", "\"a\""), &[0; 8]), &["name \"a\" comes twice"]);
    let twice = raw(&two("[0,4]", "[0,4]").replace("\"b\"", "\"a\""), &[0; 4]);
    assert!(SafeTensors::deserialize(&twice).is_ok(), "the crate takes either: one reason to have our own reader");
    refused(&twice, &["name \"a\" comes twice"]);
    let offsets_that_wrap = "[18446744073709551500,18446744073709551504]";
    refused(&raw(&two(offsets_that_wrap, "[0,4]"), &[0; 4]), &["\"a\" leaves a hole"]);
}

#[test]
fn wrong_content_is_refused_with_name_and_index() {
    let masked = |orig: &[f32], shape: &[usize], dtype, mask_shape: &[usize], mask: &[u8]| {
        crate_file(&[("w_orig", Dtype::F32, shape, &le(orig)), ("w_mask", dtype, mask_shape, mask)])
    };
    let mut weights = [0.0; 6];
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        weights[5] = bad;
        refused(&crate_file(&[("w", Dtype::F32, &[2, 3], &le(&weights))]), &["\"w\"", "[1, 2]", &bad.to_string()]);
    }
    refused(&crate_file(&[("w", Dtype::F64, &[1], &1e300f64.to_le_bytes())]), &["\"w\"", "fit f32"]);
    refused(&crate_file(&[("w", Dtype::I32, &[1], &[0; 4])]), &["\"w\"", "an integer type of 32 bits"]);
    refused(&masked(&[1.0; 2], &[2], Dtype::U8, &[2], &[1, 2]), &["w_mask", "0 and 1 only, got 2 at [1]"]);
    refused(&masked(&[1.0], &[1], Dtype::F32, &[1], &le(&[0.5])), &["w_mask", "got 0.5 at [0]"]);
    refused(&masked(&[1.0], &[1], Dtype::F32, &[1], &le(&[f32::NAN])), &["w_mask", "got NaN"]);
    refused(&masked(&[1.0], &[1], Dtype::I32, &[1], &[0; 4]), &["w_mask", "an integer type"]);
    refused(&masked(&[1.0; 2], &[2, 1], Dtype::U8, &[1, 2], &[1, 1]), &["\"w\"", "[2, 1], got [1, 2]"]);
    let one = le(&[1.0]);
    let w = |name| (name, Dtype::F32, &[1][..], &one[..]);
    refused(&crate_file(&[w("w_orig")]), &["\"w_orig\" comes without \"w_mask\""]);
    refused(&crate_file(&[w("w_mask")]), &["\"w_mask\" comes without \"w_orig\""]);
    refused(&crate_file(&[w("w"), w("w_mask")]), &["\"w_mask\" comes without", "rename \"w\" to \"w_orig\""]);
    refused(&crate_file(&[w("w"), w("w_mask"), w("w_orig")]), &["\"w\" comes both plain and as"]);
}

#[test]
fn what_is_not_a_file_is_refused() {
    for (path, says) in [("/nowhere/w", "cannot read it"), ("/tmp", "got a folder"), ("/dev/zero", "folder or device")]
    {
        let error = Weights::load(Path::new(path)).unwrap_err().to_string();
        assert!(error.contains(path) && error.contains(says), "{error}");
    }
}

#[test]
fn a_file_that_could_not_be_read_back_is_not_written() {
    let (_folder, path) = scratch();
    sample().save(&path).unwrap();
    let before = std::fs::read(&path).unwrap();
    type Breakage = (&'static str, fn(&mut Weights));
    let breakages: [Breakage; 7] = [
        ("NaN at [1, 0, 0, 2]", |w| w.tensors.get_mut("conv.weight").unwrap()[[1, 0, 0, 2]] = f32::NAN),
        ("there is no tensor", |w| drop(w.masks.insert("conv2.weight".into(), Mask::ones(&[1])))),
        ("[2, 1, 1, 3], got [6]", |w| drop(w.masks.insert("conv.weight".into(), Mask::ones(&[6])))),
        ("reserved", |w| drop(w.tensors.insert("fc_mask".into(), ArrayD::zeros(vec![1])))),
        ("reserved", |w| drop(w.tensors.insert("bn.num_batches_tracked".into(), ArrayD::zeros(vec![1])))),
        ("__metadata__", |w| drop(w.tensors.insert("__metadata__".into(), ArrayD::zeros(vec![1])))),
        ("at most 8 dimensions", |w| drop(w.tensors.insert("fc".into(), ArrayD::zeros(vec![1; 9])))),
    ];
    for (says, damage) in breakages {
        let mut weights = sample();
        damage(&mut weights);
        let error = weights.save(&path).unwrap_err().to_string();
        assert!(error.contains("w.safetensors") && error.contains(says), "{error}\ndoes not say {says}");
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error_and_nothing_is_left_behind() {
    let (folder, path) = scratch();
    sample().save(&path).unwrap();
    for bad in [folder.path().join("no/w"), path.join("w"), folder.path().to_path_buf(), "/proc/w".into(), "/".into()] {
        let error = sample().save(&bad).unwrap_err().to_string();
        assert!(error.starts_with(&bad.display().to_string()) && error.contains("nothing was changed"), "{error}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_model_takes_its_own_tensors_only_and_all_differences_are_listed() {
    let tensors = ["conv1.weight", "layer1.0.bn1.wieght", "module.fc.bias", "zzz"];
    let weights = Weights {
        tensors: tensors.map(|name| (name.to_string(), ArrayD::zeros(vec![2, 3]))).into(),
        ..Weights::default()
    };
    let expected = |names: &[&str], shape: &[usize]| -> Vec<(String, Vec<usize>)> {
        names.iter().map(|name| (name.to_string(), shape.to_vec())).collect()
    };
    weights.check_against(&expected(&tensors, &[2, 3])).unwrap();
    let names = ["conv1.weight", "layer1.0.bn1.weight", "fc.bias", "another"];
    let error = weights.check_against(&expected(&names, &[3, 2])).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    for line in [
        "missing     \"another\", expected [3, 2]",
        "missing     \"fc.bias\", expected [3, 2]",
        "unexpected  \"layer1.0.bn1.wieght\", got [2, 3]; is it \"layer1.0.bn1.weight\"?",
        "unexpected  \"module.fc.bias\", got [2, 3]; is it \"fc.bias\"?",
        "unexpected  \"zzz\", got [2, 3]\n",
        "wrong shape \"conv1.weight\", expected [3, 2], got [2, 3]",
    ] {
        assert!(format!("{error}\n").contains(line), "{error}\nlacks {line}");
    }
}

fn any_weights() -> impl Strategy<Value = Weights> {
    let finite = any::<u32>().prop_map(f32::from_bits).prop_map(|v| if v.is_finite() { v } else { -0.0 });
    let tensor = (prop::collection::vec(0usize..4, 0..5), prop::collection::vec(finite, 256), any::<Option<u32>>());
    let metadata = prop::collection::btree_map(any::<String>(), any::<String>(), 0..3);
    (prop::collection::btree_map("[a-z.\"\\\\é]{0,6}", tensor, 0..5), metadata).prop_map(|(tensors, metadata)| {
        let mut weights = Weights { metadata, ..Weights::default() };
        for (name, (shape, values, seed)) in tensors {
            if let Some(seed) = seed {
                let mask = Mask::from_fn(&shape, |i| seed.rotate_left(i as u32 % 32) & 1 == 1);
                weights.masks.insert(name.clone(), mask);
            }
            let n = shape.iter().product();
            weights.tensors.insert(name, array(&shape, values[..n].to_vec()));
        }
        weights
    })
}

proptest! {
    #[test]
    fn any_weights_round_trip_bit_by_bit(weights in any_weights()) {
        let (_folder, path) = scratch();
        weights.save(&path).unwrap();
        let back = Weights::load(&path).unwrap();
        prop_assert_eq!(bits(&back), bits(&weights));
        prop_assert_eq!(&back, &weights);
        let bytes = std::fs::read(&path).unwrap();
        prop_assert!(SafeTensors::deserialize(&bytes).is_ok());
        back.save(&path).unwrap();
        prop_assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), framed in any::<bool>()) {
        let bytes = if framed { raw(&format!("{{{}", String::from_utf8_lossy(&bytes)), b"") } else { bytes };
        let _ = load_bytes(&bytes);
    }

    #[test]
    fn a_damaged_file_never_panics(
        weights in any_weights(), cut in any::<prop::sample::Index>(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 0..6)
    ) {
        let (_folder, path) = scratch();
        weights.save(&path).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        for (at, bit) in &flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        let _ = load_bytes(&bytes);
        bytes.truncate(cut.index(bytes.len()));
        prop_assert!(load_bytes(&bytes).is_err());
    }
}
