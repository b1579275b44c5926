//! What each layer does in the forward pass.

use std::ops::Range;

use super::{Norms, lists_of, moments};
use crate::device::{Buffer, Precision, RealsMut};
use crate::error::Result;
use crate::nn::fusion::{self, FusedNorm, Fusion};
use crate::nn::model::{Layer, ParameterId, ValueId};
use crate::nn::network::{Mode, Network};
use crate::ops::attention::{AttentionInput, attention_forward};
use crate::ops::conv::conv_forward;
use crate::ops::conv_sparse::conv_sparse_forward;
use crate::ops::dropout::{Draw, dropout_forward, residual_forward};
use crate::ops::epilogue::{Beside, Bias, Epilogue, TileStatistics};
use crate::ops::gelu::gelu_forward;
use crate::ops::kept::Pass;
use crate::ops::layer_norm::{LayerNormAffine, LayerNormStatistics, layer_norm_forward};
use crate::ops::norm::{NormAffine, NormInput, NormRunning, NormSaved, norm_apply, norm_eval, norm_forward};
use crate::ops::norm_join::{norm_join, norm_statistics};
use crate::ops::norm_pair::{NormPair, norm_pair_forward};
use crate::ops::norm_pool::norm_pool_forward;
use crate::ops::pointwise::shortcut_forward;
use crate::ops::pool::{max_pool_forward, mean_pool_forward};
use crate::ops::tokens::{EmbedParameters, embed_forward, patches_forward, token_pool_forward};

/// Added to a batch norm's variance before its root is taken; PyTorch's default.
const NORM_EPSILON: f32 = 1e-5;
/// Share of the batch's statistics in the running ones; PyTorch's default.
const NORM_MOMENTUM: f32 = 0.1;

impl Network {
    /// Writes a layer's value, and what a convolution writes beside it.
    pub(super) fn layer_forward(
        &mut self,
        index: usize,
        mode: Mode,
        y: RealsMut,
        beside: Option<RealsMut>,
    ) -> Result<()> {
        let Network {
            device,
            computed: model,
            plan,
            n,
            parameters,
            rounded,
            values,
            statistics,
            saved,
            scratch,
            kept,
            pool_indices,
            count,
            step,
            seed,
            heads: flags,
            paths,
            fusions,
            maps,
            ..
        } = self;
        let (n, layer, train) = (*n, &model.layers[index], mode == Mode::Train);
        let fused_norm = fusions[index].norm.filter(|_| train);
        let value = |id: ValueId| values[plan.value_slots[id]].view();
        let parameter = |id: ParameterId| parameters.slice(plan.range(id));
        let read_weight = |id: ParameterId| match model.precision {
            Precision::F32 => parameter(id).into(),
            Precision::Bf16 => rounded.slice(plan.rounded.place(index)).into(),
        };
        let count = count.view();
        // Nothing is left out in evaluation.
        let draw = |rate: f32| Draw {
            rate: if train { rate } else { 0.0 },
            seed: *seed,
            stream: index as u32,
            step: step.view(),
        };
        match *layer {
            Layer::Conv { weight, bias, input, output, .. } => {
                let columns = model.values[output].columns(n)?;
                let bias = bias.map(|bias| Bias { bias: parameter(bias), columns, count });
                if let Some(lists) = &mut paths[index] {
                    lists.gather(device, parameter(weight))?;
                }
                let tiles = fused_norm.map(|_| TileStatistics { count, tiles: scratch.view_mut() });
                let beside = fusions[index].beside.zip(beside).map(|(what, to)| match what {
                    fusion::Beside::Gelu(_) => Beside::Gelu(to),
                    fusion::Beside::Sum { x, .. } => Beside::Sum { x: value(x), to },
                });
                let epilogue = Epilogue { bias, statistics: tiles, beside };
                let x = value(input);
                match lists_of(paths, index, Pass::Forward) {
                    Some(kept) => conv_sparse_forward(device, kept, x, epilogue, y)?,
                    None => conv_forward(device, &model.conv_shape(layer, n)?, x, read_weight(weight), epilogue, y)?,
                }
                let Some(FusedNorm { tile, statistics: own }) = fused_norm else { return Ok(()) };
                let (running, saved) = batch_statistics(statistics, saved, plan.statistic_ranges(model, own));
                let shape = model.norm_shape(output, n)?;
                norm_join(device, &shape, scratch.view(), tile, count, NORM_EPSILON, running, saved)
            }
            Layer::Norm { scale, shift, statistics: own, input, residual, relu, .. } => {
                let shape = model.norm_shape(input, n)?;
                let ranges = plan.statistic_ranges(model, own);
                let (x, map) = (value(input), maps[index].as_ref());
                let residual = residual.map(value);
                let norm = NormInput { x, residual, map, relu, count };
                let affine = NormAffine { gamma: parameter(scale), beta: parameter(shift), epsilon: NORM_EPSILON };
                if !train {
                    let [mean, var] = ranges.map(|range| statistics.slice(range));
                    return norm_eval(device, &shape, norm, affine, mean, var, y);
                }
                let Fusion { added_norm, is_within, .. } = fusions[index];
                if (added_norm.is_some() || is_within) && fused_norm.is_none() {
                    let (running, saved) = batch_statistics(statistics, saved, ranges.clone());
                    norm_statistics(device, &shape, x, count, NORM_EPSILON, running, saved, scratch.view_mut())?;
                }
                if is_within {
                    return Ok(());
                }
                if let Some(added) = added_norm {
                    let norms = Norms { model, plan, values, parameters, saved, maps, fusions };
                    let norms = [index, added].map(|norm| norms.normalised(norm));
                    return norm_pair_forward(device, &shape, NormPair { norms, relu, count }, y);
                }
                if fused_norm.is_some() {
                    let [mean, invstd] = ranges.map(|range| saved.slice(range));
                    return norm_apply(device, &shape, norm, affine, mean, invstd, y);
                }
                let (running, saved) = batch_statistics(statistics, saved, ranges);
                norm_forward(device, &shape, norm, affine, running, saved, scratch.view_mut(), y)
            }
            Layer::Shortcut { input, .. } => {
                let map = maps[index].as_ref();
                shortcut_forward(device, &model.shortcut_shape(layer, n)?, map, value(input), y)
            }
            Layer::MaxPool { input, .. } => {
                let (shape, picked) = (model.pool_shape(layer, n)?, pool_indices[plan.kept_slots[index]].view_mut());
                let Some(norm) = fusions[index].pooled_norm.filter(|_| train) else {
                    return max_pool_forward(device, &shape, value(input), picked, y);
                };
                let norms = Norms { model, plan, values, parameters, saved, maps, fusions };
                let of_norm = model.norm_shape(model.batch_norm(norm).input, n)?;
                norm_pool_forward(device, &of_norm, &shape, norms.pooled(norm, count), picked, y)
            }
            Layer::MeanPool { input, .. } => {
                mean_pool_forward(device, &model.mean_pool_shape(input, n)?, value(input), y)
            }
            Layer::Patches { input, .. } => patches_forward(device, &model.patch_shape(layer, n)?, value(input), y),
            Layer::Embed { token, bias, positions, input, .. } => {
                let (token, bias, positions) = (token.map(parameter), bias.map(parameter), parameter(positions));
                let parameters = EmbedParameters { token, bias, positions };
                embed_forward(device, &model.embed_shape(layer, n)?, value(input), parameters, count, y)
            }
            Layer::LayerNorm { scale, shift, epsilon, input, .. } => {
                let shape = model.layer_norm_shape(input, n)?;
                let affine = LayerNormAffine { gamma: parameter(scale), beta: parameter(shift), epsilon };
                // A network that is only evaluated keeps nothing.
                let saved = kept.get_mut(plan.kept_slots[index]).map(|kept| {
                    let [mean, invstd] = moments(shape.columns());
                    let (mean, invstd) = kept.pair_mut(mean, invstd);
                    LayerNormStatistics { mean, invstd }
                });
                layer_norm_forward(device, &shape, value(input), affine, count, saved, y)
            }
            Layer::Attention { heads, input, .. } => {
                let shape = model.attention_shape(layer, n)?;
                let live = flags.slice(plan.heads[index]..plan.heads[index] + heads);
                let lse = kept.get_mut(plan.kept_slots[index]).map(|kept| kept.view_mut());
                attention_forward(device, &shape, AttentionInput { qkv: value(input), live, count }, lse, y)
            }
            Layer::Gelu { .. } | Layer::Residual { .. } if fusions[index].elsewhere => Ok(()),
            Layer::Gelu { input, .. } => gelu_forward(device, value(input), y),
            Layer::Residual { scale, drop, input, branch, .. } => {
                let drop = (drop > 0.0 && train).then(|| draw(drop));
                let shape = model.residual_shape(input, n)?;
                residual_forward(device, &shape, value(input), value(branch), scale.map(parameter), drop, y)
            }
            Layer::Dropout { rate, input, .. } => dropout_forward(device, value(input), draw(rate), y),
            Layer::TokenPool { input, .. } => {
                token_pool_forward(device, &model.token_pool_shape(layer, n)?, value(input), y)
            }
        }
    }
}

/// What a batch norm writes of its batch.
fn batch_statistics<'a>(
    running: &'a mut Buffer<f32>,
    saved: &'a mut Buffer<f32>,
    [first, second]: [Range<usize>; 2],
) -> (NormRunning<'a>, NormSaved<'a>) {
    let (mean, var) = running.pair_mut(first.clone(), second.clone());
    let running = NormRunning { mean, var, momentum: NORM_MOMENTUM };
    let (mean, invstd) = saved.pair_mut(first, second);
    (running, NormSaved { mean, invstd })
}
