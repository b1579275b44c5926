//! A colour scale whose steps look equal, from dark to light.

/// The colour of a share from 0 (dark) to 1 (light), as `#rrggbb`: lightness rises evenly in OKLCH while the hue turns from
/// violet to yellow.
pub fn shade(share: f64) -> String {
    let t = share.clamp(0.0, 1.0);
    let lightness = 0.27 + 0.66 * t;
    let chroma = 0.09 + 0.06 * (std::f64::consts::PI * t).sin();
    let hue = (300.0 - 195.0 * t).to_radians();
    let [red, green, blue] = srgb(lightness, chroma * hue.cos(), chroma * hue.sin());
    format!("#{red:02x}{green:02x}{blue:02x}")
}

/// Whether dark text reads better on a share's colour.
pub fn wants_dark_text(share: f64) -> bool {
    share > 0.5
}

/// OKLab to sRGB, out of gamut clipped.
fn srgb(lightness: f64, a: f64, b: f64) -> [u8; 3] {
    let cone = |of_a: f64, of_b: f64| (lightness + of_a * a + of_b * b).powi(3);
    let cones = [cone(0.396_337_777_4, 0.215_803_757_3), cone(-0.105_561_345_8, -0.063_854_172_8), {
        cone(-0.089_484_177_5, -1.291_485_548_0)
    }];
    let linear = [
        [4.076_741_662_1, -3.307_711_591_3, 0.230_969_929_2],
        [-1.268_438_004_6, 2.609_757_401_1, -0.341_319_396_5],
        [-0.004_196_086_3, -0.703_418_614_7, 1.707_614_701_0],
    ];
    linear.map(|row| {
        let light: f64 = row.iter().zip(cones).map(|(weight, cone)| weight * cone).sum();
        let encoded = if light <= 0.003_130_8 { 12.92 * light } else { 1.055 * light.powf(1.0 / 2.4) - 0.055 };
        (encoded.clamp(0.0, 1.0) * 255.0).round() as u8
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grey_and_white_come_out_as_such() {
        assert_eq!(srgb(1.0, 0.0, 0.0), [255, 255, 255]);
        assert_eq!(srgb(0.0, 0.0, 0.0), [0, 0, 0]);
        let [red, green, blue] = srgb(0.6, 0.0, 0.0);
        assert!(red == green && green == blue);
    }

    #[test]
    fn lighter_is_more() {
        let luminance = |share: f64| {
            let text = shade(share);
            let part = |i: usize| f64::from(u8::from_str_radix(&text[i..i + 2], 16).unwrap());
            0.2126 * part(1) + 0.7152 * part(3) + 0.0722 * part(5)
        };
        let all: Vec<f64> = (0..=20).map(|i| luminance(f64::from(i) / 20.0)).collect();
        assert!(all.windows(2).all(|pair| pair[0] < pair[1]), "{all:?}");
    }
}
