//! Ticket files, in text: a header, a zero, the tensors. What is read is written and read back as the same.
#![no_main]

use std::path::Path;

use dilt::nn::weights::{FloatType, Form, Weights};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    let (header, tensors) = (&bytes[..end], bytes.get(end + 1..).unwrap_or_default());
    let file = [&(header.len() as u64).to_le_bytes(), header, tensors].concat();
    let path = Path::new("fuzz");
    let Ok(weights) = Weights::parse(&file, path) else { return };
    for form in [Form::Pruning, Form::Compact] {
        let written = weights.encode(form, FloatType::F32, path).expect("what was read can be written");
        let again = Weights::parse(&written, path).expect("what was written can be read");
        assert_eq!(again, weights);
        assert_eq!(again.encode(form, FloatType::F32, path).expect("again"), written);
    }
    for (form, dtype) in
        [(Form::Plain, FloatType::F32), (Form::Compact, FloatType::F16), (Form::Plain, FloatType::Bf16)]
    {
        if let Ok(written) = weights.encode(form, dtype, path) {
            Weights::parse(&written, path).expect("what was written can be read");
        }
    }
});
