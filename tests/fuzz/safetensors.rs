//! Weights files, byte by byte: read or refused.
#![no_main]

use std::path::Path;

use dilt::nn::weights::Weights;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = Weights::parse(bytes, Path::new("fuzz"));
});
