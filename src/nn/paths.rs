//! How a layer multiplies under its mask: with all of its weights, pruned ones being zeros, or with the kept ones alone.

use crate::device::{Device, Policy};
use crate::error::Result;
use crate::mask::Mask;
use crate::ops::conv::ConvShape;
use crate::ops::conv_sparse::KeptWeights;

/// Largest density at which the kept weights alone are multiplied on the host.
const HOST_DENSITY: f64 = 0.25;

/// The kept weights of a layer of this shape, where multiplying them alone is expected to be the faster way: a function
/// of shape, mask and policy alone, since the bits of a training depend on it. None of a GPU yet, where it has not been
/// measured.
pub(super) fn kept_weights(
    device: &Device,
    shape: &ConvShape,
    mask: &Mask,
    train: bool,
) -> Result<Option<KeptWeights>> {
    if device.policy() == Policy::Staged || mask.density() > HOST_DENSITY || !KeptWeights::reach(shape) {
        return Ok(None);
    }
    let kept: Vec<u32> = (0u32..).zip(mask.iter()).filter(|&(_, kept)| kept).map(|(place, _)| place).collect();
    KeptWeights::new(device, shape, &kept, train).map(Some)
}
