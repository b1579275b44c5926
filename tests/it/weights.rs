//! Weights and ticket files: the same bits back, PyTorch's names, and a clear refusal of everything else.
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use dilt::mask::Mask;
use dilt::nn::weights::{FloatType, Form, Weights};
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
fn in_memory_a_file_has_the_same_bytes_and_the_same_content() {
    let (_folder, path) = scratch();
    for (form, dtype) in
        [(Form::Pruning, FloatType::F32), (Form::Compact, FloatType::F32), (Form::Plain, FloatType::F32)]
    {
        sample().save_as(&path, form, dtype).unwrap();
        let bytes = sample().encode(form, dtype, &path).unwrap();
        assert_eq!(bytes, std::fs::read(&path).unwrap());
        assert_eq!(Weights::parse(&bytes, &path).unwrap(), Weights::load(&path).unwrap());
    }
    let error = sample().encode(Form::Pruning, FloatType::F16, Path::new("ticket")).unwrap_err().to_string();
    assert!(error.starts_with("ticket: not written") && error.contains("too large for F16"), "{error}");
    let error = Weights::parse(b"{}", Path::new("ticket")).unwrap_err().to_string();
    assert!(error.starts_with("ticket: ") && error.contains("cut short"), "{error}");
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
fn a_packed_mask_is_that_of_bytes_eight_to_one() {
    let (_folder, path) = scratch();
    let kept = [true, false, true, true, false, false, true, false, true, true];
    let weights = Weights {
        tensors: [("w".into(), array(&[2, 5], (0..10).map(|i| i as f32).collect()))].into(),
        masks: [("w".into(), Mask::from_fn(&[2, 5], |i| kept[i]))].into(),
        metadata: sample().metadata,
    };
    weights.save_as(&path, Form::Compact, FloatType::F32).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    let packed = theirs.tensor("w_bits").unwrap();
    assert_eq!((packed.dtype(), packed.shape(), packed.data()), (Dtype::U8, &[2][..], &[0b0100_1101, 0b11][..]));
    assert_eq!(theirs.tensor("w_orig").unwrap().shape(), [2, 5]);
    assert_eq!(theirs.names().len(), 2);
    assert_eq!(Weights::load(&path).unwrap(), weights);

    let orig = le(&[1.0; 10]);
    let with = |packed: &[u8]| {
        let bits = ("w_bits", Dtype::U8, &[packed.len()][..], packed);
        crate_file(&[("w_orig", Dtype::F32, &[2, 5], &orig), bits])
    };
    assert_eq!(load_bytes(&with(&[255, 3])).unwrap().masks["w"], Mask::ones(&[2, 5]));
    refused(&with(&[255]), &["\"w_bits\"", "expected 2 bytes", "10 weights, got 1"]);
    refused(&with(&[255, 3, 0]), &["\"w_bits\"", "expected 2 bytes", "got 3"]);
    refused(&with(&[255, 7]), &["\"w_bits\"", "expected zeros after the bits of 10 weights", "0x07"]);
    let (one, bit) = (le(&[1.0]), ("w_bits", Dtype::U8, &[1][..], &[1][..]));
    let orig = ("w_orig", Dtype::F32, &[1][..], &one[..]);
    refused(&crate_file(&[bit]), &["\"w_bits\" comes without \"w_orig\""]);
    refused(&crate_file(&[orig, bit, ("w_mask", Dtype::U8, &[1], &[1])]), &["mask of \"w\" comes twice"]);
    refused(&crate_file(&[orig, bit, ("w", Dtype::F32, &[1], &one)]), &["\"w\" comes both plain and as"]);
    refused(&crate_file(&[orig, ("w_bits", Dtype::I8, &[1], &[1])]), &["\"w_bits\"", "U8 [bytes]", "[1]"]);
    refused(&crate_file(&[orig, ("w_bits", Dtype::U8, &[1, 1], &[1])]), &["\"w_bits\"", "U8 [bytes]", "[1, 1]"]);
}

#[test]
fn half_types_are_rounded_as_ieee_says_and_what_is_too_large_is_refused() {
    let (_folder, path) = scratch();
    let weights = |values: &[f32]| Weights {
        tensors: [("w".into(), array(&[1, values.len()], values.to_vec()))].into(),
        ..Weights::default()
    };
    let stored = |dtype, values: &[f32]| {
        weights(values).save_as(&path, Form::Plain, dtype)?;
        dilt::Result::Ok(Weights::load(&path).unwrap().tensors["w"].iter().copied().collect::<Vec<f32>>())
    };
    // Halfway between two halves goes to the even one.
    let [low, high] = [1.0 + 2f32.powi(-11), 1.0 + 3.0 * 2f32.powi(-11)];
    assert_eq!(stored(FloatType::F16, &[low, high, -65504.0]).unwrap(), [1.0, 1.0 + 2f32.powi(-9), -65504.0]);
    let [low, high] = [1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8)];
    assert_eq!(stored(FloatType::Bf16, &[low, high, 1e38]).unwrap()[..2], [1.0, 1.0 + 2f32.powi(-6)]);
    let before = std::fs::read(&path).unwrap();
    for (dtype, value, name) in [(FloatType::F16, 65520.0, "F16"), (FloatType::Bf16, f32::MAX, "BF16")] {
        let error = stored(dtype, &[0.0, -value]).unwrap_err().to_string();
        for part in ["\"w\"", "[0, 1]", "too large", name] {
            assert!(error.contains(part), "{error}\ndoes not say {part}");
        }
    }
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

/// Writes files and an index that says what `map` does.
fn shards(files: &[(&str, Vec<u8>)], map: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    files.iter().for_each(|(name, bytes)| std::fs::write(folder.path().join(name), bytes).unwrap());
    let index = folder.path().join("model.safetensors.index.json");
    let map: BTreeMap<_, _> = map.iter().copied().collect();
    let text = serde_json::json!({ "metadata": { "total_size": 12 }, "weight_map": map }).to_string();
    std::fs::write(&index, text).unwrap();
    (folder, index)
}

#[test]
fn shards_are_read_as_one_file() {
    let first = crate_file(&[("a", Dtype::F16, &[1], &[0, 0x3c]), ("b_mask", Dtype::U8, &[2], &[0, 1])]);
    let second = crate_file(&[("b_orig", Dtype::F32, &[2], &le(&[3.0, 4.0])), ("c_bits", Dtype::U8, &[1], &[2])]);
    let third = crate_file(&[("c_orig", Dtype::BF16, &[2], &[0x80, 0xbf, 0, 0])]);
    let files = [("x", first.clone()), ("y", second.clone()), ("z", third)];
    let map = [("a", "x"), ("b_mask", "x"), ("b_orig", "y"), ("c_bits", "y"), ("c_orig", "z")];
    let (_folder, index) = shards(&files, &map);
    let weights = Weights::load(&index).unwrap();
    assert_eq!(weights.tensors["a"], array(&[1], vec![1.0]));
    assert_eq!(weights.tensors["b"], array(&[2], vec![3.0, 4.0]));
    assert_eq!(weights.tensors["c"], array(&[2], vec![-1.0, 0.0]));
    assert_eq!((weights.masks["b"].to_bytes(), weights.masks["c"].to_bytes()), (vec![0, 1], vec![0, 1]));

    type Map<'a> = &'a [(&'a str, &'a str)];
    let wrong = |files: &[(&str, Vec<u8>)], map: Map, at: &str, says: &[&str]| {
        let (folder, index) = shards(files, map);
        let error = Weights::load(&index).unwrap_err();
        assert_eq!(error.exit_code(), 1);
        let place = folder.path().join(at).display().to_string();
        for part in [place.as_str()].iter().chain(says) {
            assert!(error.to_string().contains(part), "{error}\ndoes not say {part}");
        }
    };
    let index = "model.safetensors.index.json";
    let one = crate_file(&[("a", Dtype::F32, &[1], &le(&[1.0]))]);
    let (both, x) = ([("x", one.clone()), ("y", one.clone())], [("x", one.clone())]);
    wrong(&x, &[("a", "x"), ("b", "y")], index, &["\"b\"", "in \"y\"", "No such file", "beside it"]);
    wrong(&x, &[("a", "x"), ("b", "x")], "x", &["places tensor \"b\" in \"x\"", "no such tensor"]);
    wrong(&files, &map[..4], index, &["\"c_bits\" comes without \"c_orig\""]);
    wrong(&files, &map[1..], "x", &["tensor \"a\" is in \"x\"", "does not name it"]);
    let two = crate_file(&[("a", Dtype::F32, &[1], &le(&[1.0])), ("b", Dtype::F32, &[1], &le(&[1.0]))]);
    wrong(&[both[0].clone(), ("y", two)], &[("a", "x"), ("b", "y")], "y", &["\"a\" is in \"y\"", "places it in \"x\""]);
    for name in ["../x", "/etc/passwd", "sub/x", "..", ".", "", "x/", "sub\\x"] {
        wrong(&x, &[("a", name)], index, &["tensor \"a\"", &format!("{name:?}"), "plain name"]);
    }
    wrong(&[("x", one[..20].to_vec())], &[("a", "x")], "x", &["cut short"]);
    wrong(&x, &[], index, &["names no tensors"]);
    let text = |text: &str, says: &str| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(index);
        std::fs::write(&path, text).unwrap();
        let error = Weights::load(&path).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains(index), "{error}\ndoes not say {says}");
    };
    text("", "not an index");
    text("[]", "not an index");
    text("{}", "missing field `weight_map`");
    text(r#"{"weight_map":{"a":5}}"#, "expected a string");
    text(r#"{"weight_map":{"a":"x","a":"y"}}"#, "\"a\" comes twice");
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
    let breakages: [Breakage; 8] = [
        ("NaN at [1, 0, 0, 2]", |w| w.tensors.get_mut("conv.weight").unwrap()[[1, 0, 0, 2]] = f32::NAN),
        ("there is no tensor", |w| drop(w.masks.insert("conv2.weight".into(), Mask::ones(&[1])))),
        ("[2, 1, 1, 3], got [6]", |w| drop(w.masks.insert("conv.weight".into(), Mask::ones(&[6])))),
        ("reserved", |w| drop(w.tensors.insert("fc_mask".into(), ArrayD::zeros(vec![1])))),
        ("reserved", |w| drop(w.tensors.insert("fc_bits".into(), ArrayD::zeros(vec![1])))),
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
    fn compact_files_hold_the_same_as_those_of_bytes(weights in any_weights()) {
        let (folder, path) = scratch();
        let other = folder.path().join("other");
        weights.save(&path).unwrap();
        weights.save_as(&other, Form::Compact, FloatType::F32).unwrap();
        let back = Weights::load(&other).unwrap();
        prop_assert_eq!(bits(&back), bits(&weights));
        back.save(&other).unwrap();
        prop_assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&other).unwrap());
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), framed in any::<bool>()) {
        let bytes = if framed { raw(&format!("{{{}", String::from_utf8_lossy(&bytes)), b"") } else { bytes };
        let _ = load_bytes(&bytes);
        let (_folder, index) = shards(&[], &[]);
        std::fs::write(&index, &bytes).unwrap();
        prop_assert!(Weights::load(&index).is_err());
    }

    #[test]
    fn a_damaged_file_never_panics(
        weights in any_weights(), cut in any::<prop::sample::Index>(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 0..6)
    ) {
        let (_folder, path) = scratch();
        let form = if flips.len() % 2 == 0 { Form::Pruning } else { Form::Compact };
        weights.save_as(&path, form, FloatType::F32).unwrap();
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
