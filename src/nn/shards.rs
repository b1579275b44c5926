//! The files that weights are spread over: one safetensors file, or several that an index names.
//!
//! An index is Hugging Face's `*.safetensors.index.json`: `{"metadata": {...}, "weight_map": {tensor: file}}`. Each
//! tensor lies in exactly the file that the map names, beside the index; the files hold no others.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::container::{self, Header, MAX_HEADER_BYTES, UniqueMap};
use crate::{Error, Result};

const INDEX: &str = ".index.json";

/// A safetensors file whose header has been read, and whose tensors come next.
pub(super) struct Shard<R = BufReader<File>> {
    pub path: PathBuf,
    pub header: Header,
    pub reader: R,
}

#[derive(Deserialize)]
struct Index {
    weight_map: UniqueMap<String>,
}

/// Opens a safetensors file, or all files of an index.
///
/// # Errors
/// [`Error::File`] if a file cannot be read or is damaged, the index names a file that is not beside it, or the files do
/// not hold exactly the tensors that the index places in them.
pub(super) fn open(path: &Path) -> Result<Vec<Shard>> {
    if path.to_string_lossy().ends_with(INDEX) {
        return open_index(path);
    }
    let (file, bytes) = open_file(path).map_err(|problem| Error::file(path, problem + "; check its path"))?;
    Ok(vec![Shard::read(path, BufReader::new(file), bytes)?])
}

impl<R: Read> Shard<R> {
    /// Reads the header of a file of `bytes` bytes.
    pub(super) fn read(path: &Path, mut reader: R, bytes: u64) -> Result<Self> {
        let header = container::read_header(&mut reader, bytes).map_err(|problem| Error::file(path, problem))?;
        Ok(Shard { path: path.into(), header, reader })
    }
}

/// Opens a file that is no folder or device, and says how many bytes it has.
fn open_file(path: &Path) -> std::result::Result<(File, u64), String> {
    let cannot = |error: std::io::Error| format!("cannot read it: {error}");
    // Asked before it is opened: opening a pipe would wait for a writer.
    if !std::fs::metadata(path).map_err(cannot)?.is_file() {
        return Err("expected a safetensors file, got a folder or device".into());
    }
    let file = File::open(path).map_err(cannot)?;
    let bytes = file.metadata().map_err(cannot)?.len();
    Ok((file, bytes))
}

fn open_index(path: &Path) -> Result<Vec<Shard>> {
    let wrong = |problem: String| Error::file(path, problem);
    let (file, bytes) = open_file(path).map_err(|problem| wrong(problem + "; check its path"))?;
    if bytes > MAX_HEADER_BYTES {
        return Err(wrong(format!(
            "the index has {bytes} bytes: expected at most {MAX_HEADER_BYTES}; download it again"
        )));
    }
    let Index { weight_map: UniqueMap(map) } = serde_json::from_reader(BufReader::new(file)).map_err(|error| {
        wrong(format!("not an index of safetensors files, {{\"weight_map\": {{tensor: file}}}}: {error}"))
    })?;
    if map.is_empty() {
        return Err(wrong("the index names no tensors; download it again".into()));
    }
    let mut tensors_of: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (tensor, file) in &map {
        tensors_of.entry(file).or_default().insert(tensor);
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let open_shard = |(name, tensors): (&str, BTreeSet<&str>)| {
        let first = tensors.first().expect("a file is known from a tensor");
        let place = format!("tensor {first:?}: the index places it in {name:?}");
        if Path::new(name).file_name() != Some(OsStr::new(name)) || name.contains('\\') {
            return Err(wrong(format!("{place}: expected the plain name of a file in the index's folder")));
        }
        let shard = folder.join(name);
        let (file, bytes) = open_file(&shard)
            .map_err(|problem| wrong(format!("{place}: {problem}; put every file that the index names beside it")))?;
        let shard = Shard::read(&shard, BufReader::new(file), bytes)?;
        check_tensors(&shard, name, &tensors, &map)?;
        Ok(shard)
    };
    tensors_of.into_iter().map(open_shard).collect()
}

/// Checks that a file holds the `tensors` that the index places in it, and no others.
fn check_tensors(shard: &Shard, name: &str, tensors: &BTreeSet<&str>, map: &BTreeMap<String, String>) -> Result<()> {
    let held: BTreeSet<&str> = shard.header.entries.iter().map(|entry| entry.name.as_str()).collect();
    let wrong = |problem: String| Err(Error::file(&shard.path, problem));
    if let Some(tensor) = tensors.difference(&held).next() {
        return wrong(format!("the index places tensor {tensor:?} in {name:?}, which has no such tensor"));
    }
    match held.difference(tensors).next() {
        None => Ok(()),
        Some(&tensor) => match map.get(tensor) {
            Some(other) => wrong(format!(
                "tensor {tensor:?} is in {name:?}, but the index places it in {other:?}; a tensor belongs to one file"
            )),
            None => wrong(format!("tensor {tensor:?} is in {name:?}, but the index does not name it")),
        },
    }
}
