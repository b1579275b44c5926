//! The safetensors container: a header that names tensors, then their bytes.
//!
//! ```text
//! u64 LE: length of the header | JSON, padded with spaces to 8 bytes | tensors, in the order of their offsets
//! {"__metadata__": {key: text}, "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
//! ```
//!
//! Not read with the `safetensors` crate, because it silently takes one of two tensors of the same name, does not say
//! which tensor is wrong, and writes metadata in the random order of a hash map. The tests check that it and this
//! module read each other's files.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;

use serde::de::{Deserialize, DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::Value;

/// Longest header that is read, in bytes. A network of ten thousand tensors needs about one million.
pub(super) const MAX_HEADER_BYTES: u64 = 32 << 20;
/// Most dimensions of a tensor that are accepted; a convolution has four.
const MAX_DIMENSIONS: usize = 8;
const METADATA: &str = "__metadata__";

/// A result, or what is wrong with the file; whoever knows its path adds it.
pub(super) type Checked<T> = Result<T, String>;

/// Type of a tensor's elements in a file, little endian; booleans are one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dtype {
    Bool,
    U8,
    F16,
    BF16,
    F32,
    F64,
    /// Another integer, of this many bytes: read past, never converted.
    Integer(u64),
}

impl Dtype {
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "BOOL" => Dtype::Bool,
            "U8" => Dtype::U8,
            "F16" => Dtype::F16,
            "BF16" => Dtype::BF16,
            "F32" => Dtype::F32,
            "F64" => Dtype::F64,
            "I8" => Dtype::Integer(1),
            "I16" | "U16" => Dtype::Integer(2),
            "I32" | "U32" => Dtype::Integer(4),
            "I64" | "U64" => Dtype::Integer(8),
            _ => return None,
        })
    }

    /// Bytes of one element.
    pub(super) fn bytes(self) -> u64 {
        match self {
            Dtype::Bool | Dtype::U8 => 1,
            Dtype::F16 | Dtype::BF16 => 2,
            Dtype::F32 => 4,
            Dtype::F64 => 8,
            Dtype::Integer(bytes) => bytes,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dtype::Bool => f.write_str("BOOL"),
            Dtype::Integer(bytes) => write!(f, "an integer type of {} bits", 8 * bytes),
            other => write!(f, "{other:?}"),
        }
    }
}

/// One tensor of a header, its extent already proven to lie in the file and to fit its type and shape.
#[derive(Debug)]
pub(super) struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// First byte after the header.
    begin: u64,
    end: u64,
}

impl Entry {
    /// Size in the file, which has at least that many bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.end - self.begin
    }
}

/// A header: tensors in the order of their bytes, which follow without hole or overlap, and metadata.
#[derive(Debug)]
pub(super) struct Header {
    pub entries: Vec<Entry>,
    pub metadata: BTreeMap<String, String>,
}

/// Reads the header of a file of `file_bytes` bytes; the reader is left at the first tensor's first byte.
///
/// # Errors
/// What is wrong with the header, and where. Nothing larger than the file is ever allocated.
pub(super) fn read_header(reader: &mut impl Read, file_bytes: u64) -> Checked<Header> {
    if file_bytes < 10 {
        let kind = if file_bytes == 0 { "empty" } else { "cut short" };
        return Err(format!("the file is {kind}: a safetensors file has at least 10 bytes, got {file_bytes}; {AGAIN}"));
    }
    let mut length = [0; 8];
    reader.read_exact(&mut length).map_err(|e| format!("cannot read the header's length: {e}"))?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > file_bytes - 8 {
        return Err(format!(
            "the file is cut short or not safetensors: its first 8 bytes announce a header of {header_bytes} bytes, \
             but only {} follow; {AGAIN}",
            file_bytes - 8
        ));
    }
    if header_bytes > MAX_HEADER_BYTES {
        return Err(format!("the header has {header_bytes} bytes: expected at most {MAX_HEADER_BYTES}; {AGAIN}"));
    }
    let mut text = vec![0; header_bytes as usize];
    reader.read_exact(&mut text).map_err(|e| format!("cannot read the header of {header_bytes} bytes: {e}"))?;
    if text.first() != Some(&b'{') {
        return Err(format!("not a safetensors file: its header does not begin with {{; {AGAIN}"));
    }
    let UniqueMap(mut tensors) = serde_json::from_slice::<UniqueMap<UniqueMap<Value>>>(&text)
        .map_err(|e| format!("the header is not that of a safetensors file: {e}; {AGAIN}"))?;

    let mut metadata = BTreeMap::new();
    for (key, value) in tensors.remove(METADATA).unwrap_or_default().0 {
        let Value::String(value) = value else {
            return Err(format!("metadata {key:?}: expected text, got {}", shorten(&value)));
        };
        metadata.insert(key, value);
    }
    let mut entries = tensors.into_iter().map(|(name, fields)| entry(name, &fields.0)).collect::<Checked<Vec<_>>>()?;
    entries.sort_by(|a, b| (a.begin, a.end, &a.name).cmp(&(b.begin, b.end, &b.name)));
    check_extents(&entries, file_bytes - 8 - header_bytes)?;
    Ok(Header { entries, metadata })
}

const AGAIN: &str = "copy, download or convert it again";

/// One tensor's entry; its size is checked against type and shape, its place in the file not yet.
fn entry(name: String, fields: &BTreeMap<String, Value>) -> Checked<Entry> {
    let wrong = |problem: String| format!("tensor {name:?}: {problem}");
    let dtype_name: String = field(fields, "dtype").map_err(wrong)?;
    let Some(dtype) = Dtype::parse(&dtype_name) else {
        return Err(wrong(format!(
            "expected dtype F32, F16, BF16 or F64 (or U8, BOOL for a mask), got {dtype_name:?}; convert it to F32"
        )));
    };
    let shape: Vec<usize> = field(fields, "shape").map_err(wrong)?;
    if shape.len() > MAX_DIMENSIONS {
        return Err(wrong(format!("expected at most {MAX_DIMENSIONS} dimensions, got {}", shape.len())));
    }
    let [begin, end]: [u64; 2] = field(fields, "data_offsets").map_err(wrong)?;
    // As ndarray counts: also a tensor without elements must not have strides that overflow.
    let product = shape.iter().filter(|&&d| d > 0).try_fold(1u64, |n, &d| n.checked_mul(d as u64));
    let size = product.and_then(|n| n.checked_mul(dtype.bytes())).filter(|&n| n <= isize::MAX as u64);
    let Some(mut bytes) = size else {
        return Err(wrong(format!("shape {shape:?} of {dtype} overflows 64 bits; the file is damaged, {AGAIN}")));
    };
    if shape.contains(&0) {
        bytes = 0;
    }
    if end.checked_sub(begin) != Some(bytes) {
        return Err(wrong(format!(
            "shape {shape:?} of {dtype} needs {bytes} bytes, but its offsets are [{begin}, {end}]; {AGAIN}"
        )));
    }
    Ok(Entry { name, dtype, shape, begin, end })
}

/// Checks that sorted entries cover exactly `data_bytes`, without hole or overlap.
fn check_extents(entries: &[Entry], data_bytes: u64) -> Checked<()> {
    let mut expected = 0;
    for Entry { name, begin, end, .. } in entries {
        if *begin != expected {
            let kind = if *begin < expected { "overlaps the tensor before it" } else { "leaves a hole before it" };
            return Err(format!("tensor {name:?} {kind}: expected it at byte {expected}, got {begin}; {AGAIN}"));
        }
        if *end > data_bytes {
            return Err(format!(
                "the file is cut short: tensor {name:?} ends at byte {end} after the header, but only {data_bytes} follow; {AGAIN}"
            ));
        }
        expected = *end;
    }
    if expected != data_bytes {
        return Err(format!("{} bytes follow the last tensor: expected none; {AGAIN}", data_bytes - expected));
    }
    Ok(())
}

/// A field of a tensor's entry, as the type wanted of it.
fn field<T: DeserializeOwned>(fields: &BTreeMap<String, Value>, name: &str) -> Checked<T> {
    let value = fields.get(name).ok_or_else(|| format!("its entry in the header has no {name:?}; {AGAIN}"))?;
    T::deserialize(value).map_err(|e| format!("{name} {}: {e}; {AGAIN}", shorten(value)))
}

/// JSON for a message: a hostile value can be megabytes long.
fn shorten(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 80 { text } else { text.chars().take(77).collect::<String>() + "..." }
}

/// A JSON object in which no key may come twice.
pub(super) struct UniqueMap<V>(pub BTreeMap<String, V>);

impl<V> Default for UniqueMap<V> {
    fn default() -> Self {
        UniqueMap(BTreeMap::new())
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys<V>(std::marker::PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Keys<V> {
            type Value = UniqueMap<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<UniqueMap<V>, A::Error> {
                let mut map = BTreeMap::new();
                while let Some(key) = access.next_key::<String>()? {
                    if map.contains_key(&key) {
                        return Err(serde::de::Error::custom(format!("the name {key:?} comes twice")));
                    }
                    map.insert(key, access.next_value()?);
                }
                Ok(UniqueMap(map))
            }
        }
        deserializer.deserialize_map(Keys(std::marker::PhantomData))
    }
}

/// The bytes before the tensors of a file with `metadata` and these tensors (name, type as a file names it, shape,
/// bytes), which must be written in this order. Floats go before U8, so that each is aligned.
///
/// # Errors
/// The file would be one that [`read_header`] refuses.
pub(super) fn header(
    metadata: &BTreeMap<String, String>,
    tensors: impl IntoIterator<Item = (String, &'static str, Vec<usize>, usize)>,
) -> Checked<Vec<u8>> {
    let mut items = Vec::new();
    if !metadata.is_empty() {
        items.push(format!("{:?}:{}", METADATA, serde_json::json!(metadata)));
    }
    let mut begin = 0;
    for (name, dtype, shape, bytes) in tensors {
        if name == METADATA {
            return Err(format!("a tensor cannot be named {name:?}; rename it"));
        }
        if shape.len() > MAX_DIMENSIONS {
            return Err(format!("tensor {name:?}: at most {MAX_DIMENSIONS} dimensions, got {}", shape.len()));
        }
        let end = begin + bytes;
        let name = Value::String(name);
        items.push(format!(r#"{name}:{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#));
        begin = end;
    }
    let mut text = format!("{{{}}}", items.join(","));
    text += &" ".repeat(text.len().next_multiple_of(8) - text.len());
    if text.len() as u64 > MAX_HEADER_BYTES {
        return Err(format!("its header would have {} bytes: at most {MAX_HEADER_BYTES}", text.len()));
    }
    Ok([&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat())
}
