//! One image file, JPEG or PNG, as the bytes of an image of a given size.
//!
//! As torchvision's `Resize` and `CenterCrop` on Pillow's images: converted to grey or RGB, resized (bilinear, with
//! antialiasing) to the smallest size that covers the one asked for, and cropped at the centre. An alpha channel and
//! an orientation in the file's metadata are left out of account.

use std::io::Cursor;
use std::path::Path;

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use crate::error::{Error, Result};

/// Most pixels of a file's image: what it decodes to may be thousands of times its size.
pub const MOST_PIXELS: usize = 1 << 27;
/// Longest file that is read, in bytes.
const MOST_BYTES: u64 = 1 << 30;

/// Rows of pixels, `[height, width, channels]`.
struct Raster {
    pixels: Vec<u8>,
    height: usize,
    width: usize,
}

/// Decodes an image file to `into`, bytes `[channels, height, width]` with 1 channel (grey) or 3 (RGB).
///
/// # Errors
/// [`Error::File`] if it cannot be read; else as [`parse`].
pub fn decode(path: &Path, shape: [usize; 3], into: &mut [u8]) -> Result<()> {
    let unreadable = |error: std::io::Error| Error::file(path, format!("cannot be read: {error}"));
    let length = std::fs::metadata(path).map_err(unreadable)?.len();
    if length > MOST_BYTES {
        return Err(Error::file(path, format!("expected an image of at most {MOST_BYTES} bytes, got {length}")));
    }
    parse(&std::fs::read(path).map_err(unreadable)?, path, shape, into)
}

/// Decodes the bytes of an image file, as [`decode`]. `path` names it in errors.
///
/// # Errors
/// [`Error::File`] if it is neither JPEG nor PNG, is damaged or cut short, or has more than [`MOST_PIXELS`] pixels;
/// [`Error::Usage`] for another number of channels.
pub fn parse(bytes: &[u8], path: &Path, shape: [usize; 3], into: &mut [u8]) -> Result<()> {
    let [channels, height, width] = shape;
    check_channels(shape)?;
    let raster = match bytes {
        [0xff, 0xd8, 0xff, ..] => jpeg(bytes, channels),
        [0x89, b'P', b'N', b'G', ..] => png(bytes, channels),
        [] => Err("an empty file".into()),
        _ => Err(format!("expected JPEG or PNG, got a file that begins with {:02x?}", &bytes[..bytes.len().min(4)])),
    };
    let raster = raster.and_then(|raster| cover(raster, channels, height, width));
    let raster =
        raster.map_err(|what| Error::file(path, format!("broken image: {what}; replace it, or use --skip-broken")))?;
    let (top, left) = (centre(raster.height, height), centre(raster.width, width));
    for (c, plane) in into.chunks_exact_mut(height * width).enumerate() {
        for (y, row) in plane.chunks_exact_mut(width).enumerate() {
            let from = &raster.pixels[((top + y) * raster.width + left) * channels..];
            row.iter_mut().enumerate().for_each(|(x, byte)| *byte = from[x * channels + c]);
        }
    }
    Ok(())
}

/// Refuses images that are neither grey nor RGB.
pub(super) fn check_channels([channels, height, width]: [usize; 3]) -> Result<()> {
    match channels {
        1 | 3 => Ok(()),
        _ => Err(Error::Usage(format!(
            "images of {channels} channels: files are read as grey (1) or RGB (3); set the model's with --set \
             image=[3,{height},{width}]"
        ))),
    }
}

/// Where the middle `part` of `whole` begins, as torchvision rounds it: half to even.
fn centre(whole: usize, part: usize) -> usize {
    ((whole - part) as f64 / 2.0).round_ties_even() as usize
}

fn check_pixels(height: usize, width: usize) -> std::result::Result<(), String> {
    match height.checked_mul(width) {
        Some(1..=MOST_PIXELS) => Ok(()),
        _ => Err(format!("expected from 1 to {MOST_PIXELS} pixels, got {width} x {height}")),
    }
}

/// Whether a JPEG has its end marker. The decoder does not miss the last bytes before it.
fn has_end(bytes: &[u8]) -> bool {
    let mut rest = bytes;
    loop {
        let step = match rest {
            [0xff, 0xd9, ..] => return true,
            [0xff, 0xff, ..] => 1,
            // A byte of coded data, the start of the image, and restarts have no length.
            [0xff, 0x00 | 0x01 | 0xd0..=0xd8, ..] => 2,
            [0xff, _, high, low, ..] => 2 + usize::from(u16::from_be_bytes([*high, *low])),
            [_, _, ..] => 1,
            _ => return false,
        };
        rest = rest.get(step..).unwrap_or_default();
    }
}

fn jpeg(bytes: &[u8], channels: usize) -> std::result::Result<Raster, String> {
    if !has_end(bytes) {
        return Err("a JPEG that is cut short: its end marker is missing".into());
    }
    // Strict: without it, what a damaged file lacks would silently be grey.
    let options = DecoderOptions::default().set_strict_mode(true).set_max_width(1 << 16).set_max_height(1 << 16);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(|error| format!("{error:?}"))?;
    let (width, height) = decoder.dimensions().ok_or("it has no dimensions")?;
    check_pixels(height, width)?;
    // Colours are made grey after they are decoded, as by Pillow: saturated ones differ from the file's own luma.
    let (space, has) = match decoder.input_colorspace() {
        Some(ColorSpace::Luma) => (ColorSpace::Luma, 1),
        _ => (ColorSpace::RGB, 3),
    };
    decoder.set_options(options.jpeg_set_out_colorspace(space));
    let pixels = decoder.decode().map_err(|error| format!("{error:?}"))?;
    if pixels.len() != height * width * has {
        return Err(format!("expected {} bytes of pixels, got {}", height * width * has, pixels.len()));
    }
    Ok(Raster { pixels: convert(pixels, has, channels), height, width })
}

fn png(bytes: &[u8], channels: usize) -> std::result::Result<Raster, String> {
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), png::Limits { bytes: 8 * MOST_PIXELS });
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let (width, height) = decoder.read_header_info().map_err(|error| error.to_string())?.size();
    let (width, height) = (width as usize, height as usize);
    check_pixels(height, width)?;
    let mut reader = decoder.read_info().map_err(|error| error.to_string())?;
    let mut pixels = vec![0; reader.output_buffer_size().ok_or("its size overflows")?];
    let info = reader.next_frame(&mut pixels).map_err(|error| error.to_string())?;
    // To the end of the file, so that a cut or damaged one shows.
    reader.finish().map_err(|error| error.to_string())?;
    pixels.truncate(info.buffer_size());
    Ok(Raster { pixels: convert(pixels, info.color_type.samples(), channels), height, width })
}

/// Pixels of 1 to 4 samples (grey, grey and alpha, RGB, RGB and alpha) as grey or RGB.
fn convert(pixels: Vec<u8>, has: usize, channels: usize) -> Vec<u8> {
    if has == channels {
        return pixels;
    }
    let convert = |pixel: &[u8]| match (has, channels) {
        (1 | 2, _) => [pixel[0]; 3],
        (_, 1) => [luma(pixel); 3],
        _ => [pixel[0], pixel[1], pixel[2]],
    };
    pixels.chunks_exact(has).flat_map(|pixel| convert(pixel).into_iter().take(channels)).collect()
}

/// ITU-R 601-2 luma, in Pillow's integers.
fn luma(rgb: &[u8]) -> u8 {
    let [r, g, b] = [rgb[0], rgb[1], rgb[2]].map(u32::from);
    ((19_595 * r + 38_470 * g + 7_471 * b + 0x8000) >> 16) as u8
}

/// Resizes to the smallest size of the same proportions that covers `height` x `width`, the longer side rounded down.
fn cover(raster: Raster, channels: usize, height: usize, width: usize) -> std::result::Result<Raster, String> {
    let (h, w) = (raster.height, raster.width);
    let (to_h, to_w) = if height * w >= width * h {
        (height, (height * w / h).max(width)) // the height decides
    } else {
        ((width * h / w).max(height), width)
    };
    if (to_h, to_w) == (h, w) {
        return Ok(raster);
    }
    check_pixels(to_h, to_w)?;
    let pixel = if channels == 1 { PixelType::U8 } else { PixelType::U8x3 };
    let from = ImageRef::new(w as u32, h as u32, &raster.pixels, pixel).map_err(|error| error.to_string())?;
    let mut to = Image::new(to_w as u32, to_h as u32, pixel);
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear));
    Resizer::new().resize(&from, &mut to, &options).map_err(|error| error.to_string())?;
    Ok(Raster { pixels: to.into_vec(), height: to_h, width: to_w })
}
