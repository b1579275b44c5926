//! JPEG and PNG files as Pillow and torchvision read and resize them, and damaged ones.

use std::io::Write;
use std::path::Path;

use dilt::data::image;
use flate2::Compression;
use flate2::write::ZlibEncoder;

use crate::support::{Golden, golden_dir};

/// Largest and mean difference that a decoder of JPEG may have: the standard leaves rounding of the transform and the
/// way in which colours are enlarged open.
const JPEG: (f64, f64) = (5.0, 0.75);
/// Of a PNG that is resized: rounding alone. One that is not is the same.
const PNG: (f64, f64) = (1.0, 0.5);

fn file(name: &str) -> Vec<u8> {
    std::fs::read(golden_dir().join("images").join(name)).unwrap()
}

fn parse(bytes: &[u8], shape: [usize; 3]) -> Result<Vec<u8>, String> {
    let mut into = vec![0; shape.iter().product()];
    image::parse(bytes, Path::new("some.file"), shape, &mut into).map_err(|error| {
        assert_eq!(error.exit_code(), 1);
        error.to_string()
    })?;
    Ok(into)
}

#[test]
fn files_of_every_kind_are_what_pillow_and_torchvision_make_of_them() {
    let golden = Golden::open("images");
    let cases = golden.cases();
    assert_eq!(cases.len(), 15);
    for case in cases {
        let bytes = file(&case);
        for tensor in ["rgb", "grey", "rgb_small", "rgb_wide"] {
            let expected = golden.get(&case, tensor);
            let got = parse(&bytes, expected.shape.clone().try_into().unwrap()).unwrap();
            let off: Vec<f64> = got.iter().zip(&expected.data).map(|(&a, b)| (f64::from(a) - b).abs()).collect();
            let (largest, mean) = (off.iter().copied().fold(0.0, f64::max), off.iter().sum::<f64>() / off.len() as f64);
            let exact = case.ends_with("png") && ["rgb", "grey"].contains(&tensor);
            let (most, most_mean) = match case.ends_with("jpg") {
                _ if exact => (0.0, 0.0),
                true => JPEG,
                false => PNG,
            };
            assert!(largest <= most && mean <= most_mean, "{case} {tensor}: {largest}, mean {mean}");
        }
    }
}

#[test]
fn a_file_that_is_cut_anywhere_is_refused() {
    for name in ["rgb.jpg", "progressive.jpg", "grey.jpg", "cmyk.jpg", "rgb.png", "interlaced.png", "palette.png"] {
        let bytes = file(name);
        for end in 0..bytes.len() {
            let error = parse(&bytes[..end], [3, 8, 8]).expect_err(&format!("{name} of {end} bytes"));
            assert!(error.starts_with("some.file: broken image: ") && error.contains("--skip-broken"), "{error}");
        }
        let longer = [&bytes[..], b"what some programs append"].concat();
        assert_eq!(parse(&longer, [3, 8, 8]).unwrap(), parse(&bytes, [3, 8, 8]).unwrap(), "{name}");
    }
}

#[test]
fn a_damaged_png_is_refused() {
    let good = file("rgb.png");
    for at in (0..good.len()).step_by(7) {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        assert!(parse(&bytes, [3, 8, 8]).is_err(), "byte {at}");
    }
}

#[test]
fn what_is_no_image_says_how_it_begins() {
    assert!(parse(b"", [3, 8, 8]).unwrap_err().contains("an empty file"));
    assert!(parse(b"GIF89a", [3, 8, 8]).unwrap_err().contains("expected JPEG or PNG, got a file that begins with"));
    assert!(parse(&[0xff, 0xd8, 0xff, 0xd9], [3, 8, 8]).is_err());
}

#[test]
fn other_than_grey_and_rgb_is_a_usage_error() {
    let error = image::parse(&file("rgb.png"), Path::new("x"), [2, 8, 8], &mut [0; 128]).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("--set image=[3,8,8]"), "{error}");
}

/// A black PNG of one bit a pixel.
fn plain(width: u32, height: u32) -> Vec<u8> {
    let row = vec![0; 1 + width.div_ceil(8) as usize];
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
    (0..height).for_each(|_| encoder.write_all(&row).unwrap());
    let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[1, 0, 0, 0, 0]].concat();
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    for (kind, data) in [(b"IHDR", header), (b"IDAT", encoder.finish().unwrap()), (b"IEND", vec![])] {
        let mut checksum = flate2::Crc::new();
        checksum.update(kind);
        checksum.update(&data);
        file.extend_from_slice(&(data.len() as u32).to_be_bytes());
        file.extend_from_slice(kind);
        file.extend_from_slice(&data);
        file.extend_from_slice(&checksum.sum().to_be_bytes());
    }
    file
}

#[test]
fn an_image_of_too_many_pixels_is_refused_before_it_is_decoded() {
    let start = std::time::Instant::now();
    let bomb = plain(30_000, 30_000);
    assert!(bomb.len() < 1 << 20);
    let made = start.elapsed();
    let error = parse(&bomb, [3, 8, 8]).unwrap_err();
    assert!(error.contains("got 30000 x 30000") && error.contains("134217728"), "{error}");
    assert!(start.elapsed() - made < std::time::Duration::from_millis(50), "{:?}", start.elapsed() - made);
    // A JPEG's header that says 65,535 x 65,535.
    let mut jpeg = file("rgb.jpg");
    let frame = jpeg.windows(2).position(|marker| marker == [0xff, 0xc0]).unwrap();
    jpeg[frame + 5..frame + 9].fill(0xff);
    assert!(parse(&jpeg, [3, 8, 8]).unwrap_err().contains("got 65535 x 65535"));
    // Long and thin: to cover the input it would have to be enlarged beyond the limit.
    assert!(parse(&plain(60_000, 1), [3, 224, 224]).unwrap_err().contains("pixels"));
    assert_eq!(parse(&plain(64, 48), [1, 4, 4]).unwrap(), [0; 16]);
}
