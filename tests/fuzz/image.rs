//! JPEG and PNG files: read or refused, in grey and in colour, enlarged and reduced.
#![no_main]

use std::path::Path;

use dilt::data::image;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    for shape in [[3, 16, 12], [1, 4, 9]] {
        let _ = image::parse(bytes, Path::new("fuzz"), shape, &mut vec![0; shape.iter().product()]);
    }
});
