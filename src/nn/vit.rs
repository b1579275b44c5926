//! Vision transformers (Dosovitskiy et al. 2021, arXiv 2010.11929; DeiT, arXiv 2012.12877), with timm's names, order of
//! parameters and defaults.

use super::config::{ModelConfig, Pool, VitConfig};
use super::model::{Init, Layer, Model, ParameterKind, Shape, ValueId};
use crate::error::{Error, Result};
use crate::ops::tokens::TokenPool;

/// Builds the vision transformer of a model file.
///
/// # Errors
/// [`Error::Usage`] if the patches do not divide the images.
pub(super) fn build(file: &ModelConfig, config: &VitConfig) -> Result<Model> {
    let [_, height, width] = file.image;
    let patch = config.patch;
    if height % patch != 0 || width % patch != 0 {
        return Err(Error::Usage(format!(
            "model {}: expected images whose height and width are multiples of the patch, {patch}, got {height}x{width}; \
             choose another --image-size, or --set patch=...",
            file.name
        )));
    }
    let layer_scale = config.layer_scale.unwrap_or(1.0) as f32;
    let mut model = Model::new(file, Init::Transformer { layer_scale });
    let prefix = usize::from(config.class_token);
    let mut x = model.embedding(config, prefix);
    x = model.dropout("pos_drop", x, config.dropout);
    if config.pre_norm {
        x = model.layer_norm("norm_pre", x, config.norm_eps);
    }
    for block in 0..config.depth {
        let name = format!("blocks.{block}");
        let drop = config.stochastic_depth * block as f32 / (config.depth - 1).max(1) as f32;
        x = model.attention_branch(config, &name, x, drop);
        x = model.perceptron_branch(config, &name, x, drop);
    }
    let pool = match config.pool() {
        Pool::Token => TokenPool::First,
        Pool::Mean => TokenPool::Mean,
    };
    // A norm of single tokens may as well come after one of them is chosen.
    let norm_after = config.fc_norm.unwrap_or(pool == TokenPool::Mean);
    let name = if norm_after { "fc_norm" } else { "norm" };
    if norm_after || pool == TokenPool::First {
        x = model.token_pool(x, pool, prefix);
        x = model.layer_norm(name, x, config.norm_eps);
    } else {
        x = model.layer_norm(name, x, config.norm_eps);
        x = model.token_pool(x, pool, prefix);
    }
    model.classifier("head", x);
    Ok(model)
}

/// The pieces of a vision transformer.
impl Model {
    /// Patches, their linear embedding, the class token, and positions.
    fn embedding(&mut self, config: &VitConfig, prefix: usize) -> ValueId {
        let VitConfig { patch, dim, .. } = *config;
        let [channels, height, width] = self.image;
        let tokens = prefix + (height / patch) * (width / patch);
        let token = config.class_token.then(|| self.parameter("cls_token".into(), vec![1, 1, dim], ParameterKind::ClassToken));
        let positions = self.parameter("pos_embed".into(), vec![1, tokens, dim], ParameterKind::Positions);
        let shape = vec![dim, channels, patch, patch];
        let weight = self.parameter("patch_embed.proj.weight".into(), shape, ParameterKind::PatchEmbedding);
        let bias = (!config.pre_norm)
            .then(|| self.parameter("patch_embed.proj.bias".into(), vec![dim], ParameterKind::PatchBias));

        let features = channels * patch * patch;
        let patches = self.value("patches", Shape::Tokens { features, tokens });
        self.layers.push(Layer::Patches { patch, prefix, input: 0, output: patches });
        let embedded = self.value("patch_embed", Shape::Tokens { features: dim, tokens });
        // Its bias is added with the positions, since it is not the class token's.
        self.layers.push(Layer::Conv { weight, bias: None, stride: 1, pad: 0, input: patches, output: embedded });
        let output = self.value("pos_embed", Shape::Tokens { features: dim, tokens });
        self.layers.push(Layer::Embed { token, bias, positions, input: embedded, output });
        output
    }

    fn attention_branch(&mut self, config: &VitConfig, block: &str, x: ValueId, drop: f32) -> ValueId {
        let VitConfig { dim, heads, .. } = *config;
        let y = self.layer_norm(&format!("{block}.norm1"), x, config.norm_eps);
        // A linear layer's weights are the next parameter.
        let qkv = self.parameters.len();
        let input = self.linear(&format!("{block}.attn.qkv"), y, 3 * dim, config.qkv_bias);
        let output = self.value(&format!("{block}.attn"), self.tokens_like(input, dim));
        let projection = self.parameters.len();
        self.layers.push(Layer::Attention { heads, qkv, projection, input, output });
        let y = self.linear(&format!("{block}.attn.proj"), output, dim, true);
        let y = self.dropout(&format!("{block}.attn.proj_drop"), y, config.dropout);
        self.residual(config, &format!("{block}.ls1"), x, y, drop)
    }

    fn perceptron_branch(&mut self, config: &VitConfig, block: &str, x: ValueId, drop: f32) -> ValueId {
        let y = self.layer_norm(&format!("{block}.norm2"), x, config.norm_eps);
        let y = self.linear(&format!("{block}.mlp.fc1"), y, config.hidden(), true);
        let y = self.gelu(&format!("{block}.mlp.act"), y);
        let y = self.dropout(&format!("{block}.mlp.drop1"), y, config.dropout);
        let y = self.linear(&format!("{block}.mlp.fc2"), y, config.dim, true);
        let y = self.dropout(&format!("{block}.mlp.drop2"), y, config.dropout);
        self.residual(config, &format!("{block}.ls2"), x, y, drop)
    }

    /// The shape of a value with another number of features.
    fn tokens_like(&self, x: ValueId, features: usize) -> Shape {
        match self.values[x].shape {
            Shape::Tokens { tokens, .. } => Shape::Tokens { features, tokens },
            Shape::Image(_) => Shape::Image([features, 1, 1]),
        }
    }

    fn layer_norm(&mut self, name: &str, x: ValueId, epsilon: f32) -> ValueId {
        let features = self.values[x].features();
        let scale = self.parameter(format!("{name}.weight"), vec![features], ParameterKind::NormScale);
        let shift = self.parameter(format!("{name}.bias"), vec![features], ParameterKind::NormShift);
        let output = self.value(name, self.values[x].shape);
        self.layers.push(Layer::LayerNorm { scale, shift, epsilon, input: x, output });
        output
    }

    fn linear(&mut self, name: &str, x: ValueId, outputs: usize, bias: bool) -> ValueId {
        let inputs = self.values[x].features();
        let weight = self.parameter(format!("{name}.weight"), vec![outputs, inputs], ParameterKind::Linear);
        let bias = bias.then(|| self.parameter(format!("{name}.bias"), vec![outputs], ParameterKind::Bias));
        let output = self.value(name, self.tokens_like(x, outputs));
        self.layers.push(Layer::Conv { weight, bias, stride: 1, pad: 0, input: x, output });
        output
    }

    fn gelu(&mut self, name: &str, x: ValueId) -> ValueId {
        let output = self.value(name, self.values[x].shape);
        self.layers.push(Layer::Gelu { input: x, output });
        output
    }

    fn dropout(&mut self, name: &str, x: ValueId, rate: f32) -> ValueId {
        if rate == 0.0 {
            return x;
        }
        let output = self.value(name, self.values[x].shape);
        self.layers.push(Layer::Dropout { rate, input: x, output });
        output
    }

    fn residual(&mut self, config: &VitConfig, name: &str, x: ValueId, branch: ValueId, drop: f32) -> ValueId {
        let gamma = |model: &mut Self| {
            model.parameter(format!("{name}.gamma"), vec![config.dim], ParameterKind::LayerScale)
        };
        let scale = config.layer_scale.is_some().then(|| gamma(self));
        let output = self.value(name, self.values[x].shape);
        self.layers.push(Layer::Residual { scale, drop, input: x, branch, output });
        output
    }

    fn token_pool(&mut self, x: ValueId, pool: TokenPool, prefix: usize) -> ValueId {
        let output = self.value("pool", Shape::Image([self.values[x].features(), 1, 1]));
        self.layers.push(Layer::TokenPool { pool, prefix, input: x, output });
        output
    }
}
