//! The files of a comparison.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, TensorView, serialize};

use super::compare::{MeasuredNetwork, Similarity};
use crate::error::{Error, Result};
use crate::nn::atomic::{sweep, write_atomically};
use crate::report::page::Page;

/// Where a comparison is written.
pub enum Place {
    /// Numbers alone, in one file: its name ends with `.json` or `.safetensors`.
    File(PathBuf),
    /// Everything: numbers, heat maps and a page that shows them.
    Folder(PathBuf),
}

impl Place {
    /// The file or folder of this name.
    pub fn new(path: &Path) -> Self {
        match path.extension().and_then(OsStr::to_str) {
            Some("json" | "safetensors") if !path.is_dir() => Place::File(path.into()),
            _ => Place::Folder(path.into()),
        }
    }

    /// Makes the folder that it lies in, or is.
    ///
    /// # Errors
    /// [`Error::File`] if that cannot be made.
    pub fn make_folder(&self) -> Result<()> {
        let folder = match self {
            Place::File(file) => file.parent().unwrap_or(file),
            Place::Folder(folder) => folder,
        };
        let cannot = |error| Error::file(folder, format!("cannot be made: {error}; choose another --out"));
        if folder.as_os_str().is_empty() { Ok(()) } else { std::fs::create_dir_all(folder).map_err(cannot) }
    }

    /// Removes what a killed comparison was writing into its folder; for who has the lock of the pairs in it.
    pub fn clean(&self) {
        if let Place::Folder(folder) = self {
            sweep(folder);
        }
    }

    /// Where finished pairs are kept.
    pub fn pairs(&self) -> PathBuf {
        match self {
            Place::File(file) => file.with_extension("pairs.jsonl"),
            Place::Folder(folder) => folder.join("pairs.jsonl"),
        }
    }

    /// What a person opens.
    pub fn shown(&self) -> PathBuf {
        match self {
            Place::File(file) => file.clone(),
            Place::Folder(folder) => folder.join("similarity.html"),
        }
    }

    /// Writes the file, or into the folder `similarity.json`, `similarity.safetensors`, `similarity.html` and a file for
    /// each heat map.
    ///
    /// A safetensors file holds `gw`, `cka` and `identity`, F64 `[layers, layers]`, NaN where something is not defined, the
    /// layers' names as JSON in its metadata, and, of the layers that are given, `distances/NAME`, F32 `[n, n]`.
    ///
    /// # Errors
    /// [`Error::File`] if a file cannot be written.
    pub fn write(&self, similarity: &Similarity, distances: Option<&[MeasuredNetwork]>) -> Result<()> {
        let distances = distances.unwrap_or_default();
        let folder = match self {
            Place::File(file) if file.extension() == Some(OsStr::new("json")) => return write_json(file, similarity),
            Place::File(file) => return write_tensors(file, similarity, distances),
            Place::Folder(folder) => folder,
        };
        write_json(&folder.join("similarity.json"), similarity)?;
        write_tensors(&folder.join("similarity.safetensors"), similarity, distances)?;
        for picture in similarity.pictures() {
            write_bytes(&folder.join(format!("{}.svg", picture.name)), picture.svg.as_bytes())?;
        }
        let mut page = Page::new("Similarity of layers");
        similarity.add_to(&mut page);
        write_bytes(&self.shown(), page.to_html().as_bytes())
    }
}

fn write_json(path: &Path, similarity: &Similarity) -> Result<()> {
    let json = serde_json::to_string_pretty(similarity)
        .map_err(|error| Error::Run(format!("cannot be written as JSON: {error}")))?;
    write_bytes(path, json.as_bytes())
}

fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomically(path, |file| file.write_all(bytes))
}

fn write_tensors(path: &Path, similarity: &Similarity, networks: &[MeasuredNetwork]) -> Result<()> {
    let refused = |error: &dyn std::fmt::Display| Error::file(path, format!("not written: {error}"));
    let layers = similarity.layers.len();
    let holes = |rows: &[Vec<Option<f64>>]| -> Vec<u8> {
        rows.iter().flatten().flat_map(|value| value.unwrap_or(f64::NAN).to_le_bytes()).collect()
    };
    let gw: Vec<u8> = similarity.gw.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
    let square = [("gw", gw), ("cka", holes(&similarity.cka)), ("identity", holes(&similarity.identity))];
    let mut tensors: Vec<_> =
        square.into_iter().map(|(name, bytes)| (name.to_owned(), Dtype::F64, layers, bytes)).collect();
    let measured = networks.iter().flat_map(|network| &network.layers).zip(&similarity.layers);
    tensors.extend(measured.map(|(layer, name)| {
        let bytes = layer.distances.matrix.iter().flat_map(|distance| distance.to_le_bytes()).collect();
        (format!("distances/{name}"), Dtype::F32, layer.n(), bytes)
    }));
    let names = serde_json::to_string(&similarity.layers).map_err(|error| refused(&error))?;
    let views: Vec<_> = tensors
        .iter()
        .map(|(name, dtype, n, bytes)| Ok((name, TensorView::new(*dtype, vec![*n, *n], bytes)?)))
        .collect::<std::result::Result<_, safetensors::SafeTensorError>>()
        .map_err(|error| refused(&error))?;
    // One key: several would come in an order of their own each time.
    let metadata = Some([("layers".to_owned(), names)].into());
    let bytes = serialize(views, metadata).map_err(|error| refused(&error))?;
    write_bytes(path, &bytes)
}
