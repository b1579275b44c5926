//! What each layer does in the backward pass.

use std::ops::Range;

use super::{Norms, lists_of, moments};
use crate::device::{Precision, RealBuffer, Reals, RealsMut};
use crate::error::Result;
use crate::nn::fusion::{Fusion, NormBefore};
use crate::nn::model::{BatchNorm, Layer, Model, ParameterId, ValueId};
use crate::nn::network::Network;
use crate::nn::plan::Plan;
use crate::ops::attention::{AttentionInput, AttentionSaved, attention_backward};
use crate::ops::conv::{conv_input_gradient, conv_weight_gradient};
use crate::ops::conv_sparse::{conv_sparse_input_gradient, conv_sparse_weight_gradient};
use crate::ops::dropout::{Draw, dropout_backward, residual_backward};
use crate::ops::epilogue::{AddedNorm, BeforeNorm, Dx};
use crate::ops::gelu::gelu_backward;
use crate::ops::kept::Pass;
use crate::ops::layer_norm::{LayerNormBackward, layer_norm_backward};
use crate::ops::norm::{NormBackward, NormGradient, NormGradients, norm_backward};
use crate::ops::norm_join::norm_join_gradient;
use crate::ops::norm_pair::{NormPair, NormPairGradient, norm_pair_backward};
use crate::ops::norm_pool::norm_pool_backward;
use crate::ops::pointwise::shortcut_backward;
use crate::ops::pool::{max_pool_backward, mean_pool_backward};
use crate::ops::tokens::{EmbedGradients, embed_backward, token_pool_backward};

impl Network {
    pub(super) fn layer_backward(&mut self, index: usize, gradient: &mut RealBuffer) -> Result<()> {
        let Network {
            device,
            computed: model,
            plan,
            n,
            parameters,
            gradients,
            values,
            value_gradients,
            saved,
            scratch,
            kept,
            pool_indices,
            count,
            step,
            seed,
            heads: flags,
            fusions,
            maps,
            ..
        } = self;
        let dy = gradient.view();
        let (n, layer, accumulate) = (*n, &model.layers[index], plan.accumulates[index]);
        let value = |id: ValueId| values[plan.value_slots[id]].view();
        let parameter = |id: ParameterId| parameters.slice(plan.range(id));
        let range = |id: ParameterId| plan.range(id);
        let slot = |id: ValueId| plan.gradient_slots[id];
        let count = count.view();
        let draw = |rate: f32| Draw { rate, seed: *seed, stream: index as u32, step: step.view() };
        match *layer {
            Layer::Conv { .. } => self.conv_backward(index, dy),
            Layer::Norm { .. } => self.batch_norm_backward(index, gradient),
            Layer::MaxPool { input, .. } => {
                let (shape, picked) = (model.pool_shape(layer, n)?, pool_indices[plan.kept_slots[index]].view());
                let Some(norm) = fusions[index].pooled_norm else {
                    return max_pool_backward(device, &shape, dy, picked, at(value_gradients, slot(input)));
                };
                let x = model.batch_norm(norm).input;
                let [dgamma, dbeta] = gradients.disjoint_mut(affine(model, plan, norm));
                let to = NormGradients { dgamma, dbeta, dx: at(value_gradients, slot(x)) };
                let norms = Norms { model, plan, values, parameters, saved, maps, fusions };
                let (of_norm, norm) = (model.norm_shape(x, n)?, norms.pooled(norm, count));
                norm_pool_backward(device, &of_norm, &shape, norm, dy, picked, scratch.view_mut(), to)
            }
            Layer::Shortcut { input, .. } => {
                let (map, dx) = (maps[index].as_ref(), at(value_gradients, slot(input)));
                shortcut_backward(device, &model.shortcut_shape(layer, n)?, map, dy, dx)
            }
            Layer::MeanPool { input, .. } => {
                mean_pool_backward(device, &model.mean_pool_shape(input, n)?, dy, at(value_gradients, slot(input)))
            }
            Layer::Patches { .. } => unreachable!("an image has no gradient"),
            // The gradient of what it reads lies where its own does.
            Layer::Embed { token, bias, positions, .. } => {
                let part = |id: Option<ParameterId>| id.map_or(0..0, range);
                let parts = [part(token), part(bias), range(positions)];
                let [dtoken, dbias, positions] = gradients.disjoint_mut(parts);
                let (token, bias) = (token.map(|_| dtoken), bias.map(|_| dbias));
                let gradients = EmbedGradients { token, bias, positions };
                embed_backward(device, &model.embed_shape(layer, n)?, dy, gradients)
            }
            Layer::LayerNorm { scale, shift, input, .. } => {
                let shape = model.layer_norm_shape(input, n)?;
                let [mean, invstd] = moments(shape.columns()).map(|range| kept[plan.kept_slots[index]].slice(range));
                let (x, dy, gamma) = (value(input), dy, parameter(scale));
                let norm = LayerNormBackward { x, dy, gamma, mean, invstd, count, accumulate };
                let (dgamma, dbeta) = gradients.pair_mut(range(scale), range(shift));
                layer_norm_backward(
                    device,
                    &shape,
                    norm,
                    scratch.view_mut(),
                    dgamma,
                    dbeta,
                    at(value_gradients, slot(input)),
                )
            }
            Layer::Attention { heads, input, output, .. } => {
                let shape = model.attention_shape(layer, n)?;
                let live = flags.slice(plan.heads[index]..plan.heads[index] + heads);
                let qkv = AttentionInput { qkv: value(input), live, count };
                let saved = AttentionSaved { y: value(output), lse: kept[plan.kept_slots[index]].view() };
                attention_backward(device, &shape, qkv, saved, dy, scratch.view_mut(), at(value_gradients, slot(input)))
            }
            Layer::Gelu { .. } if fusions[index].elsewhere => Ok(()),
            // The gradient of what it reads lies where its own does.
            Layer::Gelu { input, .. } => gelu_backward(device, value(input), gradient.view_mut()),
            // That of what it reads does here too, and that of a plain branch.
            Layer::Residual { .. } if layer.adds_plainly() => Ok(()),
            Layer::Residual { scale, drop, branch, .. } => {
                let (shape, drop) = (model.residual_shape(branch, n)?, (drop > 0.0).then(|| draw(drop)));
                let dgamma = scale.map(|scale| gradients.slice_mut(range(scale)));
                let gamma = scale.map(parameter);
                residual_backward(
                    device,
                    &shape,
                    value(branch),
                    dy,
                    gamma,
                    drop,
                    dgamma,
                    at(value_gradients, slot(branch)),
                )
            }
            Layer::Dropout { rate, input, .. } => {
                dropout_backward(device, dy, draw(rate), at(value_gradients, slot(input)))
            }
            Layer::TokenPool { input, .. } => {
                token_pool_backward(device, &model.token_pool_shape(layer, n)?, dy, at(value_gradients, slot(input)))
            }
        }
    }

    fn conv_backward(&mut self, index: usize, dy: Reals) -> Result<()> {
        let Network {
            device,
            computed: model,
            plan,
            n,
            parameters,
            rounded,
            gradients,
            values,
            value_gradients,
            saved,
            scratch,
            paths,
            fusions,
            maps,
            ..
        } = self;
        let (layer, accumulate) = (&model.layers[index], plan.accumulates[index]);
        let Layer::Conv { weight, bias, input, .. } = *layer else { unreachable!("a convolution") };
        let value = |id: ValueId| values[plan.value_slots[id]].view();
        let range = |id: ParameterId| plan.range(id);
        let (shape, x) = (model.conv_shape(layer, *n)?, value(input));
        let [dw, dbias] = gradients.disjoint_mut([range(weight), bias.map_or(0..0, range)]);
        let dbias = bias.map(|_| dbias);
        match lists_of(paths, index, Pass::WeightGradient) {
            Some(kept) => conv_sparse_weight_gradient(device, kept, x, dy, dw, dbias)?,
            None => conv_weight_gradient(device, &shape, x, dy, scratch.view_mut(), dw, dbias)?,
        }
        let Some(slot) = plan.gradient_slots[input] else { return Ok(()) };
        let norms = Norms { model, plan, values, parameters, saved, maps, fusions };
        let norm_before = fusions[index].norm_before;
        let how = match (fusions[index].gelu_before, norm_before) {
            (Some(x), _) => Dx::BeforeGelu(value(x)),
            (None, Some(NormBefore { layer, tiles })) => {
                let (sums, of_added) = scratch.view_mut().split_at(2 * shape.channels() * tiles);
                let added = fusions[layer].added_norm;
                let added = added.map(|added| AddedNorm { norm: norms.normalised(added), sums: of_added });
                Dx::BeforeNorm(BeforeNorm { normed: norms.normed(layer), added, add: accumulate, sums })
            }
            (None, None) if accumulate => Dx::Add,
            (None, None) => Dx::Set,
        };
        let dx = value_gradients[slot].view_mut();
        match lists_of(paths, index, Pass::InputGradient) {
            Some(kept) => conv_sparse_input_gradient(device, kept, dy, how, dx)?,
            None => {
                let w = match model.precision {
                    Precision::F32 => parameters.slice(range(weight)).into(),
                    Precision::Bf16 => rounded.slice(plan.rounded.place(index)).into(),
                };
                conv_input_gradient(device, &shape, dy, w, how, dx)?;
            }
        }
        let Some(NormBefore { layer, tiles }) = norm_before else { return Ok(()) };
        let mut sums = scratch.view_mut();
        for norm in [Some(layer), fusions[layer].added_norm].into_iter().flatten() {
            let [dgamma, dbeta] = gradients.disjoint_mut(affine(model, plan, norm));
            let own;
            (own, sums) = sums.split_at(2 * dgamma.len() * tiles);
            norm_join_gradient(device, own.view(), tiles, dgamma, dbeta)?;
        }
        Ok(())
    }

    fn batch_norm_backward(&mut self, index: usize, gradient: &mut RealBuffer) -> Result<()> {
        let Network {
            device,
            computed: model,
            plan,
            n,
            parameters,
            gradients,
            values,
            value_gradients,
            saved,
            scratch,
            count,
            fusions,
            maps,
            ..
        } = self;
        let BatchNorm { input, residual, relu, .. } = model.batch_norm(index);
        let Fusion { added_norm, gradient_is_summed, .. } = fusions[index];
        let norms = Norms { model, plan, values, parameters, saved, maps, fusions };
        let (shape, count) = (model.norm_shape(input, *n)?, count.view());
        let slot = |id: ValueId| plan.gradient_slots[id];
        let [gamma, beta] = affine(model, plan, index);
        if let Some(added) = added_norm {
            let pair = NormPair { norms: [index, added].map(|norm| norms.normalised(norm)), relu, count };
            let dy = gradient.view();
            let dy = if gradient_is_summed { NormPairGradient::Summed(dy) } else { NormPairGradient::Whole(dy) };
            let [added_gamma, added_beta] = affine(model, plan, added);
            let [dgamma, dbeta, added_dgamma, added_dbeta] =
                gradients.disjoint_mut([gamma, beta, added_gamma, added_beta]);
            let inputs = [input, model.batch_norm(added).input];
            let slots = inputs.map(|x| slot(x).expect("a layer after a parameter"));
            let [dx, added_dx] = value_gradients.get_disjoint_mut(slots).expect("each has its own");
            let to = [
                NormGradients { dgamma, dbeta, dx: dx.view_mut() },
                NormGradients { dgamma: added_dgamma, dbeta: added_dbeta, dx: added_dx.view_mut() },
            ];
            return norm_pair_backward(device, &shape, pair, dy, scratch.view_mut(), to);
        }
        let dy = match residual.and_then(slot) {
            _ if gradient_is_summed => NormGradient::Summed(gradient.view()),
            // The residual's gradient lies where this one does.
            Some(_) => NormGradient::OfResidual(gradient.view_mut()),
            None => NormGradient::Kept(gradient.view()),
        };
        let norm = NormBackward { normed: norms.normed(index), dy, training: true, count };
        let [dgamma, dbeta] = gradients.disjoint_mut([gamma, beta]);
        let to = NormGradients { dgamma, dbeta, dx: at(value_gradients, slot(input)) };
        norm_backward(device, &shape, norm, scratch.view_mut(), to)
    }
}

/// Where a batch norm's scale and shift lie among the parameters, and their gradients among the gradients.
fn affine(model: &Model, plan: &Plan, norm: usize) -> [Range<usize>; 2] {
    let BatchNorm { scale, shift, .. } = model.batch_norm(norm);
    [scale, shift].map(|id| plan.range(id))
}

/// Where the gradient of what a layer reads lies.
fn at(gradients: &mut [RealBuffer], slot: Option<usize>) -> RealsMut<'_> {
    gradients[slot.expect("a layer after a parameter")].view_mut()
}
