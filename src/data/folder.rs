//! A folder of image files, JPEG and PNG: `train/CLASS/*`, and `test/CLASS/*` or `val/CLASS/*`.
//!
//! As torchvision's `ImageFolder`: classes are the folders of `train`, sorted by name, and so are the files of each.
//! Unlike it, nothing is left out of account but hidden files and what file managers leave behind. Links are followed.

use std::fs::Metadata;
use std::path::Path;

use rayon::prelude::*;

use super::{DataSet, Examples, Files, Pixels, Reading, image};
use crate::error::{Error, Result};
use crate::report::progress::Progress;

const EXTENSIONS: [&str; 3] = ["jpg", "jpeg", "png"];
const LITTER: [&str; 2] = ["Thumbs.db", "desktop.ini"];
/// Largest number of files that one error names.
const MOST_NAMED: usize = 5;
/// Largest number of images, and of their bytes, that are decoded between two looks at the progress.
const CHUNK: usize = 256;
const CHUNK_BYTES: usize = 1 << 26;

/// ImageNet's moments, as torchvision's models have them, and their means for grey images.
const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const STD: [f32; 3] = [0.229, 0.224, 0.225];
const GREY: [f32; 2] = [0.449, 0.226];

/// The data set in a folder, its images still in their files.
pub(super) fn list(root: &Path, reading: &Reading, progress: &Progress) -> Result<DataSet> {
    let shape = reading.input;
    image::check_channels(shape)?;
    let stored = stored(shape, reading.resize)?;
    let mut strays = Vec::new();
    let classes: Vec<String> = entries(root, "train")?.into_iter().filter(|e| e.1.is_dir()).map(|e| e.0).collect();
    if classes.len() < 2 {
        let message = format!("expected a folder for each of at least 2 classes, got {classes:?}");
        return Err(Error::file(root.join("train"), message));
    }
    let train = split(root, "train", &classes, &mut strays)?;
    let (has_test, has_val) = (root.join("test").exists(), root.join("val").exists());
    let test = split(root, if has_val && !has_test { "val" } else { "test" }, &classes, &mut strays)?;
    let val = match has_test && has_val {
        true => split(root, "val", &classes, &mut strays)?,
        false => Examples::default(),
    };
    refuse_or_name(root, &strays, reading, progress)?;
    let (mean, std) = match shape[0] {
        1 => (vec![GREY[0]], vec![GREY[1]]),
        _ => (MEAN.to_vec(), STD.to_vec()),
    };
    Ok(DataSet {
        name: "folder".into(),
        shape,
        stored,
        classes: classes.len(),
        scale: 255.0,
        mean,
        std,
        train,
        val,
        test,
    })
}

/// Decodes all files if they fit in memory; else looks for broken ones if those are to be left out.
pub(super) fn decode(data: &mut DataSet, root: &Path, reading: &Reading, progress: &Progress) -> Result<()> {
    let (stored, size) = (data.stored, data.stored.iter().product::<usize>());
    let count = data.train.len() + data.val.len() + data.test.len();
    let in_memory = (count as u64).checked_mul(size as u64).is_some_and(|bytes| bytes <= reading.resident_bytes);
    if !in_memory && !reading.skip_broken {
        return Ok(());
    }
    let stage = progress.images("decode", count);
    let chunk = (CHUNK_BYTES / size).clamp(1, CHUNK);
    let (mut done, mut broken) = (0, Vec::new());
    for split in [&mut data.train, &mut data.val, &mut data.test] {
        let Pixels::Files(files) = &split.images else { continue };
        let mut bytes = zeros(if in_memory { split.len() * size } else { chunk * size })?;
        let mut good = Vec::new();
        for start in (0..split.len()).step_by(chunk) {
            let end = (start + chunk).min(split.len());
            let into = &mut bytes[if in_memory { start * size } else { 0 }..][..(end - start) * size];
            let images = into.par_chunks_exact_mut(size).zip(start..end);
            let results: Vec<_> = images.map(|(into, i)| files.decode(i, stored, into)).collect();
            for (i, result) in (start..end).zip(results) {
                match result {
                    Ok(()) => good.push(i as u32),
                    Err(error) => broken.push(error.to_string()),
                }
            }
            done += end - start;
            stage.show_count(done);
        }
        if reading.skip_broken {
            check_classes(root, split, &good)?;
        }
        if in_memory {
            split.images = Pixels::Bytes(bytes);
        }
        if good.len() < split.len() {
            *split = split.select(&good, size);
        }
    }
    refuse_or_name(root, &broken, reading, progress)
}

/// Height and width in which images are stored: the input's, or larger ones of its proportions to cut it out of.
fn stored([channels, height, width]: [usize; 3], resize: Option<usize>) -> Result<[usize; 3]> {
    let to = match resize {
        Some(to) if to < height => {
            return Err(Error::Usage(format!("--resize: expected at least the input's height, {height}, got {to}")));
        }
        Some(to) => to,
        None if height < 128 => height,
        None => (height * 8 + 3) / 7,
    };
    let wide = to.checked_mul(width).map(|product| (product + height / 2) / height);
    match wide.and_then(|wide| to.checked_mul(wide).map(|pixels| (wide, pixels))) {
        Some((wide, 1..=image::MOST_PIXELS)) => Ok([channels, to, wide]),
        _ => Err(Error::Usage(format!(
            "images of {height} x {width} resized to a height of {to}: expected at most {} pixels",
            image::MOST_PIXELS
        ))),
    }
}

/// Names and kinds of what lies in a folder, sorted by name.
fn entries(root: &Path, folder: &str) -> Result<Vec<(String, Metadata)>> {
    let folder = root.join(folder);
    let unreadable = |path: &Path, error: std::io::Error| Error::file(path, format!("cannot be read: {error}"));
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(&folder).map_err(|error| unreadable(&folder, error))? {
        let path = entry.map_err(|error| unreadable(&folder, error))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            return Err(Error::file(&path, "its name is not UTF-8; rename it"));
        };
        if name.starts_with('.') || LITTER.contains(&name) {
            continue;
        }
        let about = std::fs::metadata(&path).map_err(|error| unreadable(&path, error))?;
        entries.push((name.to_owned(), about));
    }
    entries.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    Ok(entries)
}

/// The files of a split. What is neither a class folder nor an image goes to `strays`.
fn split(root: &Path, split: &str, classes: &[String], strays: &mut Vec<String>) -> Result<Examples> {
    let (mut files, mut labels) = (Vec::new(), Vec::new());
    for (class, about) in entries(root, split)? {
        let folder = format!("{split}/{class}");
        if !about.is_dir() {
            strays.push(format!("{}: is in no class folder", root.join(folder).display()));
            continue;
        }
        let Ok(label) = classes.binary_search(&class) else {
            let message = format!("expected a class of train (there are {}), got {class}", classes.len());
            return Err(Error::file(root.join(folder), message));
        };
        let before = files.len();
        for (name, about) in entries(root, &folder)? {
            let file = format!("{folder}/{name}");
            let extension = Path::new(&name).extension().and_then(|extension| extension.to_str()).unwrap_or_default();
            if about.is_dir() {
                strays.push(format!("{}: is a folder, expected an image", root.join(file).display()));
            } else if EXTENSIONS.iter().any(|known| extension.eq_ignore_ascii_case(known)) {
                files.push((file, about.len()));
                labels.push(label as u32);
            } else {
                strays.push(format!("{}: is no image, expected .jpg, .jpeg or .png", root.join(file).display()));
            }
        }
        if files.len() == before {
            let message = format!("the class {class} has no images; expected .jpg, .jpeg or .png files in its folder");
            return Err(Error::file(root.join(folder), message));
        }
    }
    if files.is_empty() {
        return Err(Error::file(root.join(split), "has no class folders; expected one for each class"));
    }
    Ok(Examples { images: Pixels::Files(Files { root: root.to_path_buf(), files }), labels })
}

/// Files that cannot be used: an error that names the first, or, with `--skip-broken`, a message for each.
fn refuse_or_name(root: &Path, broken: &[String], reading: &Reading, progress: &Progress) -> Result<()> {
    if broken.is_empty() {
        return Ok(());
    }
    let count = broken.len();
    if reading.skip_broken {
        broken.iter().for_each(|what| progress.warn(&format!("left out: {what}")));
        progress.warn(&format!("files left out of {}: {count}", root.display()));
        return Ok(());
    }
    let named = broken[..count.min(MOST_NAMED)].join("\n  ");
    let more = if count > MOST_NAMED { format!("\n  and {} more", count - MOST_NAMED) } else { String::new() };
    let message =
        format!("files that cannot be used: {count}; remove or replace them, or use --skip-broken\n  {named}{more}");
    Err(Error::file(root, message))
}

/// Refuses to leave out all images of a class: `good` are the indices of those that stay.
fn check_classes(root: &Path, split: &Examples, good: &[u32]) -> Result<()> {
    let stays: std::collections::BTreeSet<u32> = good.iter().map(|&i| split.labels[i as usize]).collect();
    let Some(gone) = split.labels.iter().position(|label| !stays.contains(label)) else { return Ok(()) };
    let Pixels::Files(Files { files, .. }) = &split.images else { return Ok(()) };
    let class = Path::new(&files[gone].0).parent().unwrap_or(root);
    Err(Error::file(root.join(class), "every image of this class is broken; replace some"))
}

/// Memory for decoded images.
fn zeros(bytes: usize) -> Result<Vec<u8>> {
    let mut zeros = Vec::new();
    zeros.try_reserve_exact(bytes).map_err(|_| {
        Error::Device(format!("out of memory: {bytes} bytes for images; use a smaller --resident or --resize"))
    })?;
    zeros.resize(bytes, 0);
    Ok(zeros)
}
