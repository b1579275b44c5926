//! The single layers that dilt and its peers are measured at, `peers/jobs.jsonl` has them too: the 3x3 convolutions of ResNet-20
//! and ResNet-18 on 32x32 images at batch 128, linear layers of DeiT-Ti at batch 8 and of ViT-S at batch 64. A module of
//! `crossover.rs` and of the test that compares both lists.

use dilt::ops::Columns;
use dilt::ops::conv::ConvShape;

/// Name and shape of each.
pub fn layers() -> dilt::Result<Vec<(String, ConvShape)>> {
    let mut layers = Vec::new();
    for (channels, image, filters, stride) in [
        (16, 32, 16, 1),
        (32, 16, 32, 1),
        (64, 8, 64, 1),
        (64, 32, 64, 1),
        (128, 16, 128, 1),
        (256, 8, 256, 1),
        (512, 4, 512, 1),
        (64, 32, 128, 2),
    ] {
        let shape = ConvShape::new([channels, image, image], filters, [3, 3], stride, 1, 128)?;
        let by = if stride == 1 { String::new() } else { format!(" by {stride}") };
        layers.push((format!("conv 3x3 {channels}x{image}x{image} to {filters}{by}"), shape));
    }
    for (inputs, outputs, samples) in
        [(192, 576, 8), (192, 768, 8), (768, 192, 8), (384, 1152, 64), (384, 1536, 64), (1536, 384, 64)]
    {
        let columns = Columns::tokens(samples, 197)?.len();
        layers.push((
            format!("linear {inputs} to {outputs} ({samples} samples)"),
            ConvShape::new([inputs, 1, 1], outputs, [1, 1], 1, 0, columns)?,
        ));
    }
    Ok(layers)
}
