//! The files of a comparison.

use std::io::Write;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView, serialize};

use super::compare::{MeasuredNetwork, Similarity};
use crate::error::{Error, Result};
use crate::nn::atomic::write_atomically;
use crate::report::page::Page;

/// Writes `similarity.json`, `similarity.safetensors`, `similarity.html` and a file for each heat map into a folder.
///
/// The safetensors file holds `gw`, `cka` and `identity`, F64 `[layers, layers]`, NaN where something is not defined, the
/// layers' names as JSON in its metadata, and, of the layers that are given, `distances/NAME`, F32 `[n, n]`.
///
/// # Errors
/// [`Error::File`] if a file cannot be written.
pub fn write(folder: &Path, similarity: &Similarity, distances: Option<&[MeasuredNetwork]>) -> Result<()> {
    let json = serde_json::to_string_pretty(similarity)
        .map_err(|error| Error::Run(format!("cannot be written as JSON: {error}")))?;
    write_bytes(&folder.join("similarity.json"), json.as_bytes())?;
    write_tensors(&folder.join("similarity.safetensors"), similarity, distances.unwrap_or_default())?;
    for picture in similarity.pictures() {
        write_bytes(&folder.join(format!("{}.svg", picture.name)), picture.svg.as_bytes())?;
    }
    let mut page = Page::new("Similarity of layers");
    similarity.add_to(&mut page);
    write_bytes(&folder.join("similarity.html"), page.to_html().as_bytes())
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
