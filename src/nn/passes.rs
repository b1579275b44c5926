//! The forward and the backward pass of a network, layer by layer.

use std::ops::Range;

use super::fusion::{self, FusedNorm, Fusion, NormBefore};
use super::model::{Layer, Model, ParameterId, ValueId};
use super::network::{Mode, Network};
use super::plan::{Plan, aligned};
use super::ways::Lists;
use crate::device::{Buffer, Precision, RealBuffer, Reals, RealsMut};
use crate::error::Result;
use crate::ops::attention::{AttentionInput, AttentionSaved, attention_backward, attention_forward};
use crate::ops::conv::{conv_forward, conv_input_gradient, conv_weight_gradient};
use crate::ops::conv_sparse::{conv_sparse_forward, conv_sparse_input_gradient, conv_sparse_weight_gradient};
use crate::ops::dropout::{Draw, dropout_backward, dropout_forward, residual_backward, residual_forward};
use crate::ops::epilogue::{AddedNorm, BeforeNorm, Beside, Bias, Dx, Epilogue, TileStatistics};
use crate::ops::gelu::{gelu_backward, gelu_forward};
use crate::ops::kept::{KeptWeights, Pass};
use crate::ops::layer_norm::{
    LayerNormAffine, LayerNormBackward, LayerNormStatistics, layer_norm_backward, layer_norm_forward,
};
use crate::ops::norm::{
    NormAffine, NormBackward, NormGradient, NormGradients, NormInput, NormRunning, NormSaved, Normalised, Normed,
    norm_apply, norm_backward, norm_eval, norm_forward,
};
use crate::ops::norm_join::{norm_join, norm_join_gradient, norm_statistics};
use crate::ops::norm_pair::{NormPair, NormPairGradient, norm_pair_backward, norm_pair_forward};
use crate::ops::norm_pool::{NormPool, norm_pool_backward, norm_pool_forward};
use crate::ops::pointwise::{shortcut_backward, shortcut_forward};
use crate::ops::pool::{max_pool_backward, max_pool_forward, mean_pool_backward, mean_pool_forward};
use crate::ops::tokens::{
    EmbedGradients, EmbedParameters, embed_backward, embed_forward, patches_forward, token_pool_backward,
    token_pool_forward,
};
use crate::profile::range;

/// Added to a batch norm's variance before its root is taken; PyTorch's default.
const NORM_EPSILON: f32 = 1e-5;
/// Share of the batch's statistics in the running ones; PyTorch's default.
const NORM_MOMENTUM: f32 = 0.1;

impl Network {
    /// The forward pass: in training with batch statistics, which also move the running ones, and with what is drawn at
    /// random; else with running statistics alone.
    ///
    /// # Errors
    /// [`crate::Error::Launch`] if the device fails.
    pub fn forward(&mut self, mode: Mode) -> Result<()> {
        self.forward_with(mode, |_, _| Ok(()))
    }

    /// The same; after each layer `done` is told its index in [`Network::computed`] and what it wrote, which later layers
    /// may write over. In training the result of a norm that another adds or a max pool reads is not written.
    ///
    /// # Errors
    /// [`crate::Error::Launch`] if the device fails; what `done` returns.
    pub fn forward_with(&mut self, mode: Mode, mut done: impl FnMut(usize, Reals) -> Result<()>) -> Result<()> {
        for index in 0..self.computed.layers.len() {
            let slots = &self.plan.value_slots;
            let slot = slots[self.computed.layers[index].output()];
            let beside_slot = self.fusions[index].beside.map(|beside| slots[beside.to()]);
            // Taken out, so that the others can be read while they are written.
            let mut y = std::mem::take(&mut self.values[slot]);
            let mut beside = beside_slot.map(|slot| std::mem::take(&mut self.values[slot]));
            let _range = range(format_args!("{} forward", self.layer_name(index)));
            let is_left_out = self.fusions[index].is_within && mode == Mode::Train;
            let written = self
                .layer_forward(index, mode, y.view_mut(), beside.as_mut().map(RealBuffer::view_mut))
                .and_then(|()| if is_left_out { Ok(()) } else { done(index, y.view()) });
            self.values[slot] = y;
            if let (Some(slot), Some(beside)) = (beside_slot, beside) {
                self.values[slot] = beside;
            }
            written?;
        }
        Ok(())
    }

    fn layer_name(&self, index: usize) -> &str {
        &self.computed.values[self.computed.layers[index].output()].name
    }

    /// Writes a layer's value, and what a convolution writes beside it.
    fn layer_forward(&mut self, index: usize, mode: Mode, y: RealsMut, beside: Option<RealsMut>) -> Result<()> {
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
                    let norms = [index, added].map(|norm| normalised(model, plan, values, parameters, saved, norm));
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
                let Layer::Norm { input, relu, .. } = model.layers[norm] else { unreachable!("a batch norm") };
                let map = maps[norm].as_ref();
                let norm = normalised(model, plan, values, parameters, saved, norm);
                let norm = NormPool { norm, relu, map, count };
                norm_pool_forward(device, &model.norm_shape(input, n)?, &shape, norm, picked, y)
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

    /// The backward pass, from the gradient of the logits to the gradients of all parameters.
    ///
    /// # Errors
    /// [`crate::Error::Launch`] if the device fails.
    pub fn backward(&mut self) -> Result<()> {
        for index in (0..self.computed.layers.len()).rev() {
            // What no parameter comes before has no gradient, nor what a norm makes whose backward pass is another layer's.
            let Some(slot) = self.plan.gradient_slots[self.computed.layers[index].output()] else { continue };
            let mut dy = std::mem::take(&mut self.value_gradients[slot]);
            let _range = range(format_args!("{} backward", self.layer_name(index)));
            self.layer_backward(index, &mut dy)?;
            self.value_gradients[slot] = dy;
        }
        Ok(())
    }

    fn layer_backward(&mut self, index: usize, gradient: &mut RealBuffer) -> Result<()> {
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
        let dy = gradient.view();
        let (n, layer, accumulate) = (*n, &model.layers[index], plan.accumulates[index]);
        let value = |id: ValueId| values[plan.value_slots[id]].view();
        let parameter = |id: ParameterId| parameters.slice(plan.range(id));
        let read_weight = |id: ParameterId| match model.precision {
            Precision::F32 => parameter(id).into(),
            Precision::Bf16 => rounded.slice(plan.rounded.place(index)).into(),
        };
        let range = |id: ParameterId| plan.range(id);
        let slot = |id: ValueId| plan.gradient_slots[id];
        let count = count.view();
        let draw = |rate: f32| Draw { rate, seed: *seed, stream: index as u32, step: step.view() };
        let normalised = |norm: usize| normalised(model, plan, values, parameters, saved, norm);
        let affine = |norm: usize| {
            let Layer::Norm { scale, shift, .. } = model.layers[norm] else { unreachable!("a batch norm") };
            [scale, shift].map(range)
        };
        let normed = |norm: usize| {
            let Layer::Norm { residual, relu, output, .. } = model.layers[norm] else { unreachable!("a batch norm") };
            let reads_y = relu && residual.is_some() && fusions[norm].added_norm.is_none();
            let y = reads_y.then(|| value(output));
            Normed { norm: normalised(norm), y, relu, map: maps[norm].as_ref() }
        };
        match *layer {
            Layer::Conv { weight, bias, input, .. } => {
                let (shape, x) = (model.conv_shape(layer, n)?, value(input));
                let (dw, dbias) = match bias {
                    Some(bias) => {
                        let (dw, dbias) = gradients.pair_mut(range(weight), range(bias));
                        (dw, Some(dbias))
                    }
                    None => (gradients.slice_mut(range(weight)), None),
                };
                match lists_of(paths, index, Pass::WeightGradient) {
                    Some(kept) => conv_sparse_weight_gradient(device, kept, x, dy, dw, dbias)?,
                    None => conv_weight_gradient(device, &shape, x, dy, scratch.view_mut(), dw, dbias)?,
                }
                if slot(input).is_none() {
                    return Ok(());
                }
                let norm_before = fusions[index].norm_before;
                let how = match (fusions[index].gelu_before, norm_before) {
                    (Some(x), _) => Dx::BeforeGelu(value(x)),
                    (None, Some(NormBefore { layer, tiles })) => {
                        let (sums, of_added) = scratch.view_mut().split_at(2 * shape.channels() * tiles);
                        let added = fusions[layer].added_norm;
                        let added = added.map(|added| AddedNorm { norm: normalised(added), sums: of_added });
                        Dx::BeforeNorm(BeforeNorm { normed: normed(layer), added, add: accumulate, sums })
                    }
                    (None, None) if accumulate => Dx::Add,
                    (None, None) => Dx::Set,
                };
                let dx = at(value_gradients, slot(input));
                match lists_of(paths, index, Pass::InputGradient) {
                    Some(kept) => conv_sparse_input_gradient(device, kept, dy, how, dx)?,
                    None => conv_input_gradient(device, &shape, dy, read_weight(weight), how, dx)?,
                }
                let Some(NormBefore { layer, tiles }) = norm_before else { return Ok(()) };
                let mut sums = scratch.view_mut();
                for norm in [Some(layer), fusions[layer].added_norm].into_iter().flatten() {
                    let [dgamma, dbeta] = gradients.disjoint_mut(affine(norm));
                    let own;
                    (own, sums) = sums.split_at(2 * dgamma.len() * tiles);
                    norm_join_gradient(device, own.view(), tiles, dgamma, dbeta)?;
                }
                Ok(())
            }
            Layer::Norm { scale, shift, input, residual, relu, .. } => {
                let Fusion { added_norm, gradient_is_summed, .. } = fusions[index];
                let shape = model.norm_shape(input, n)?;
                if let Some(added) = added_norm {
                    let both = [index, added];
                    let pair = NormPair { norms: both.map(normalised), relu, count };
                    let dy =
                        if gradient_is_summed { NormPairGradient::Summed(dy) } else { NormPairGradient::Whole(dy) };
                    let [[gamma, beta], [added_gamma, added_beta]] = both.map(affine);
                    let [dgamma, dbeta, added_dgamma, added_dbeta] =
                        gradients.disjoint_mut([gamma, beta, added_gamma, added_beta]);
                    let Layer::Norm { input: also, .. } = model.layers[added] else { unreachable!("a batch norm") };
                    let slots = [input, also].map(|x| slot(x).expect("a layer after a parameter"));
                    let [dx, added_dx] = value_gradients.get_disjoint_mut(slots).expect("each has its own");
                    let to = [
                        NormGradients { dgamma, dbeta, dx: dx.view_mut() },
                        NormGradients { dgamma: added_dgamma, dbeta: added_dbeta, dx: added_dx.view_mut() },
                    ];
                    return norm_pair_backward(device, &shape, pair, dy, scratch.view_mut(), to);
                }
                let dy = match residual.and_then(slot) {
                    _ if gradient_is_summed => NormGradient::Summed(dy),
                    // The residual's gradient lies where this one does.
                    Some(_) => NormGradient::OfResidual(gradient.view_mut()),
                    None => NormGradient::Kept(dy),
                };
                let norm = NormBackward { normed: normed(index), dy, training: true, count };
                let (dgamma, dbeta) = gradients.pair_mut(range(scale), range(shift));
                let dx = at(value_gradients, slot(input));
                norm_backward(device, &shape, norm, scratch.view_mut(), dgamma, dbeta, dx)
            }
            Layer::Shortcut { input, .. } => {
                let (map, dx) = (maps[index].as_ref(), at(value_gradients, slot(input)));
                shortcut_backward(device, &model.shortcut_shape(layer, n)?, map, dy, dx)
            }
            Layer::MaxPool { input, .. } => {
                let (shape, picked) = (model.pool_shape(layer, n)?, pool_indices[plan.kept_slots[index]].view());
                let Some(norm) = fusions[index].pooled_norm else {
                    return max_pool_backward(device, &shape, dy, picked, at(value_gradients, slot(input)));
                };
                let Layer::Norm { input: x, relu, .. } = model.layers[norm] else { unreachable!("a batch norm") };
                let [dgamma, dbeta] = gradients.disjoint_mut(affine(norm));
                let to = NormGradients { dgamma, dbeta, dx: at(value_gradients, slot(x)) };
                let norm = NormPool { norm: normalised(norm), relu, map: maps[norm].as_ref(), count };
                let of_norm = model.norm_shape(x, n)?;
                norm_pool_backward(device, &of_norm, &shape, norm, dy, picked, scratch.view_mut(), to)
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
}

/// What a batch norm reads, and how it changed that in training.
fn normalised<'a>(
    model: &Model,
    plan: &Plan,
    values: &'a [RealBuffer],
    parameters: &'a Buffer<f32>,
    saved: &'a Buffer<f32>,
    norm: usize,
) -> Normalised<'a> {
    let Layer::Norm { scale, shift, statistics, input, .. } = model.layers[norm] else { unreachable!("a batch norm") };
    let [mean, invstd] = plan.statistic_ranges(model, statistics).map(|range| saved.slice(range));
    let [gamma, beta] = [scale, shift].map(|id| parameters.slice(plan.range(id)));
    Normalised { x: values[plan.value_slots[input]].view(), gamma, beta, mean, invstd }
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

/// Where the gradient of what a layer reads lies.
fn at(gradients: &mut [RealBuffer], slot: Option<usize>) -> RealsMut<'_> {
    gradients[slot.expect("a layer after a parameter")].view_mut()
}

/// Where means and inverse deviations of so many columns lie in what a layer norm keeps.
fn moments(columns: usize) -> [Range<usize>; 2] {
    [0..columns, aligned(columns)..aligned(columns) + columns]
}

/// The lists that a pass of a layer multiplies with; none where it takes all weights.
fn lists_of(paths: &mut [Option<Lists>], index: usize, pass: Pass) -> Option<&mut KeptWeights> {
    paths[index].as_mut().and_then(|lists| lists.of(pass))
}
