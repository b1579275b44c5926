//! What a ticket keeps of each attention head.

use serde::{Deserialize, Serialize};

use crate::mask::set::MaskSet;
use crate::nn::model::{Layer, Model};

/// The heads of an attention layer under a ticket's masks.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct HeadDensities {
    /// The layer, e.g. `blocks.0.attn`.
    pub layer: String,
    /// Kept / all weights of each head: the rows of its queries, keys and values, and the columns of the projection that
    /// read it.
    pub density: Vec<f64>,
}

/// The heads of each attention layer whose weights have a mask; none of networks without attention.
pub fn head_densities(model: &Model, masks: &MaskSet) -> Vec<HeadDensities> {
    let of_layer = |layer: &Layer| {
        let &Layer::Attention { heads, qkv, projection, output, .. } = layer else { return None };
        let [qkv, projection] = [qkv, projection].map(|id| &model.parameters[id]);
        let (inputs, dim) = (qkv.fan_in(), projection.fan_in());
        let head = dim / heads;
        let (mut kept, mut all) = (vec![0usize; heads], vec![0usize; heads]);
        let mut count = |of: usize, keep: bool| (kept[of], all[of]) = (kept[of] + usize::from(keep), all[of] + 1);
        let [of_qkv, of_projection] = [qkv, projection].map(|parameter| masks.get(&parameter.name));
        if of_qkv.is_none() && of_projection.is_none() {
            return None;
        }
        if let Some(mask) = of_qkv {
            mask.iter().enumerate().for_each(|(i, keep)| count(i / inputs % dim / head, keep));
        }
        if let Some(mask) = of_projection {
            mask.iter().enumerate().for_each(|(i, keep)| count(i % dim / head, keep));
        }
        let density = kept.iter().zip(all).map(|(&kept, all)| kept as f64 / all as f64).collect();
        Some(HeadDensities { layer: model.values[output].name.clone(), density })
    };
    model.layers.iter().filter_map(of_layer).collect()
}
