//! idx files, as they are and compressed: what is read has the bytes that its header says.
#![no_main]

use std::io::Write;
use std::path::Path;

use dilt::data::idx;
use flate2::Compression;
use flate2::write::GzEncoder;

fn check(bytes: &[u8]) -> (bool, bool) {
    let path = Path::new("fuzz");
    let images = idx::read::<3>(bytes, path);
    let labels = idx::read::<1>(bytes, path);
    if let Ok(([n, height, width], values)) = &images {
        assert_eq!(n * height * width, values.len());
    }
    if let Ok(([n], values)) = &labels {
        assert_eq!(*n, values.len());
    }
    (images.is_ok(), labels.is_ok())
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let plain = check(bytes);
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("memory");
    let compressed = check(&encoder.finish().expect("memory"));
    // What is gzip already is then gzip twice.
    assert!(bytes.starts_with(&[0x1f, 0x8b]) || plain == compressed);
});
