//! Between images and columns of tokens, `[features, n, row]`: patches, embedding and pooling (`kernels/tokens.cu`).
//! Padded tokens and the tokens of padded samples are written as zero.

use super::{Columns, SAMPLE_ALIGNMENT, check_len, check_precision, layouts_of, per_channel};
use crate::device::{
    Device, Launch, Policy, Ptr, Real, RealKernel, Reals, RealsMut, Slice, SliceMut, kernel_args, real_kernel,
};
use crate::error::{Error, Result};

kernel_args! {
    /// Shape of the patches of images: x `[c, h, w, n]`, y `[c * patch * patch, n, row]`.
    pub struct PatchShape { c: i32, h: i32, w: i32, patch: i32, prefix: i32, columns: Columns }
    struct PatchArgs { x: Ptr<Real>, y: Ptr<Real>, shape: PatchShape }
    /// Shape of an embedding of tokens: x and y `[features, n, row]`.
    pub struct EmbedShape { features: i32, prefix: i32, columns: Columns }
    struct EmbedForwardArgs {
        x: Ptr<Real>, token: Ptr<f32>, bias: Ptr<f32>, positions: Ptr<f32>, count: Ptr<u32>, y: Ptr<Real>,
        shape: EmbedShape,
    }
    struct EmbedBackwardArgs {
        dy: Ptr<Real>, dtoken: Ptr<f32>, dbias: Ptr<f32>, dpositions: Ptr<f32>, shape: EmbedShape,
    }
    /// Shape of a pool of tokens: x `[features, n, row]`, y `[features, n]`.
    pub struct TokenPoolShape { features: i32, prefix: i32, first: i32, columns: Columns }
    struct TokenPoolArgs { from: Ptr<Real>, to: Ptr<Real>, shape: TokenPoolShape }
}
layouts_of!(PatchShape, PatchArgs, EmbedShape, EmbedForwardArgs, EmbedBackwardArgs, TokenPoolShape, TokenPoolArgs,);

static PATCHES: RealKernel<PatchArgs> = real_kernel!("patches_forward");
static EMBED_FORWARD: RealKernel<EmbedForwardArgs> = real_kernel!("embed_forward");
static EMBED_BACKWARD: RealKernel<EmbedBackwardArgs> = real_kernel!("embed_backward");
static POOL_FORWARD: RealKernel<TokenPoolArgs> = real_kernel!("token_pool_forward");
static POOL_BACKWARD: RealKernel<TokenPoolArgs> = real_kernel!("token_pool_backward");

const THREADS: u32 = 256;
/// Rows `[features, n]` of a block of the pool, as in `kernels/tokens.cu`.
const POOL_ROWS: usize = 32;
/// Elements that one thread of a GPU transposes, over those of an elementwise one.
const SQUARE: usize = 16;
const MOST_FEATURES: usize = 65_535;

fn refuse<T>(op: &'static str, what: &str, expected: &str, got: String) -> Result<T> {
    Err(Error::Shape { op, what: what.into(), expected: expected.into(), got })
}

/// Checks what embedding and pooling have in common.
fn columns_of(op: &'static str, [features, tokens, prefix, n]: [usize; 4]) -> Result<Columns> {
    let got = || format!("{features} features, {tokens} tokens, {prefix} of them before the patches, {n} samples");
    if [features, tokens, n].contains(&0) || features > MOST_FEATURES || tokens >= 1 << 30 || n >= 1 << 30 {
        return refuse(op, "sizes", "none to be 0, and at most 65535 features", got());
    }
    if prefix > 1 || prefix >= tokens {
        return refuse(op, "tokens before the patches", "0 or 1, and a patch after them", got());
    }
    Columns::tokens(n, tokens)
}

impl PatchShape {
    /// The shape of the patches, `patch` pixels in each direction, of `n` images `[c, h, w]`, after `prefix` tokens of
    /// zeros.
    ///
    /// # Errors
    /// [`Error::Shape`] if the patch does not divide the image, or a size is 0 or too large for an index.
    pub fn new(image: [usize; 3], patch: usize, prefix: usize, n: usize) -> Result<Self> {
        let [c, h, w] = image;
        let op = "patches";
        let got = || format!("images {image:?}, patches of {patch} pixels, {prefix} tokens before them, {n} samples");
        if [c, h, w, patch, n].contains(&0) {
            return refuse(op, "sizes", "none to be 0", got());
        }
        if h % patch != 0 || w % patch != 0 {
            return refuse(op, "patch", "a divisor of both sides of the image", got());
        }
        let elements = [c, h, w, n.next_multiple_of(SAMPLE_ALIGNMENT)];
        let product = elements.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        if product.is_none_or(|product| product >= 1 << 40) || [c * patch * patch, h * w].iter().any(|&x| x >= 1 << 30)
        {
            return refuse(op, "sizes", "fewer than 2^40 elements, and 2^30 pixels or features", got());
        }
        if prefix > 1 {
            return refuse(op, "tokens before the patches", "0 or 1", got());
        }
        let columns = Columns::tokens(n, prefix + (h / patch) * (w / patch))?;
        let [c, h, w, patch, prefix] = [c, h, w, patch, prefix].map(|x| x as i32);
        Ok(PatchShape { c, h, w, patch, prefix, columns })
    }

    /// Tokens of an image, those before the patches included.
    pub fn tokens(&self) -> usize {
        self.columns.tokens as usize
    }

    /// Features of a patch: pixels times channels.
    pub fn features(&self) -> usize {
        [self.c, self.patch, self.patch].map(|x| x as usize).iter().product()
    }

    /// Elements of x, `[c, h, w, n]`.
    pub fn input_len(&self) -> usize {
        [self.c, self.h, self.w, self.columns.n].map(|x| x as usize).iter().product()
    }

    /// Elements of y, `[features, n, row]`.
    pub fn output_len(&self) -> usize {
        self.features() * self.columns.len()
    }
}

impl EmbedShape {
    /// The shape of an embedding of `n` samples of `tokens` tokens, the first `prefix` (0 or 1) of which is a parameter.
    ///
    /// # Errors
    /// [`Error::Shape`] if a size is 0 or too large for an index, or there is no patch.
    pub fn new(features: usize, tokens: usize, prefix: usize, n: usize) -> Result<Self> {
        let columns = columns_of("embedding", [features, tokens, prefix, n])?;
        Ok(EmbedShape { features: features as i32, prefix: prefix as i32, columns })
    }

    /// Elements of x and of y.
    #[expect(clippy::len_without_is_empty, reason = "no shape is empty")]
    pub fn len(&self) -> usize {
        self.features as usize * self.columns.len()
    }

    /// Elements of the positions, `[tokens, features]`.
    pub fn positions_len(&self) -> usize {
        self.features as usize * self.columns.tokens as usize
    }

    /// Checks a token, which is there if and only if the shape has room for it, and a bias.
    fn check(&self, op: &'static str, token: Option<usize>, bias: Option<usize>, positions: usize) -> Result<()> {
        check_len(op, "token", token.unwrap_or(0), self.features as usize * self.prefix as usize)?;
        check_len(op, "bias", bias.unwrap_or(self.features as usize), self.features as usize)?;
        check_len(op, "positions", positions, self.positions_len())
    }
}

/// How the tokens of a sample become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenPool {
    /// Token 0.
    First,
    /// The mean of all tokens after the prefix.
    Mean,
}

impl TokenPoolShape {
    /// The shape of a pool of `n` samples of `tokens` tokens, `prefix` (0 or 1) of them before the patches.
    ///
    /// # Errors
    /// [`Error::Shape`] if a size is 0 or too large for an index, or there is no patch.
    pub fn new(features: usize, tokens: usize, prefix: usize, n: usize, pool: TokenPool) -> Result<Self> {
        let columns = columns_of("token pool", [features, tokens, prefix, n])?;
        let first = i32::from(pool == TokenPool::First);
        Ok(TokenPoolShape { features: features as i32, prefix: prefix as i32, first, columns })
    }

    /// Elements of x, `[features, n, row]`.
    pub fn input_len(&self) -> usize {
        self.features as usize * self.columns.len()
    }

    /// Elements of y, `[features, n]`.
    pub fn output_len(&self) -> usize {
        self.features as usize * self.columns.n as usize
    }
}

/// Patches: x `[c, h, w, n]` to y `[c * patch * patch, n, row]`, overwritten; features in the order of a filter
/// `[c, patch, patch]`, tokens in the order of rows of the image.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn patches_forward(device: &Device, shape: &PatchShape, x: Reals, y: RealsMut) -> Result<()> {
    let op = "patches_forward";
    check_len(op, "x", x.len(), shape.input_len())?;
    check_len(op, "y", y.len(), shape.output_len())?;
    let precision = check_precision(op, x, &[("y", y.view())])?;
    let args = PatchArgs { x: x.ptr(), y: y.ptr(), shape: *shape };
    let launch = device.elementwise(match device.policy() {
        Policy::Staged => shape.output_len() / SQUARE,
        Policy::Direct => shape.output_len(),
    });
    // SAFETY: the lengths of everything that `args` points to were checked against its shape.
    unsafe { device.launch(PATCHES.of(precision), launch, &args) }
}

/// What an embedding adds.
#[derive(Clone, Copy)]
pub struct EmbedParameters<'a> {
    /// Stands before the patches, `[features]`; `None` without prefix.
    pub token: Option<Slice<'a, f32>>,
    /// Added to patches, `[features]`.
    pub bias: Option<Slice<'a, f32>>,
    /// Added to every token, `[tokens, features]`.
    pub positions: Slice<'a, f32>,
}

/// Gradients of an embedding's parameters, overwritten.
pub struct EmbedGradients<'a> {
    /// `[features]`; `None` without prefix.
    pub token: Option<SliceMut<'a, f32>>,
    /// `[features]`.
    pub bias: Option<SliceMut<'a, f32>>,
    /// `[tokens, features]`.
    pub positions: SliceMut<'a, f32>,
}

/// Embedding: `y = (x + bias, or token) + positions`; x and y `[features, n, row]`, y overwritten, count `[1]` true
/// samples. What x holds before the patches is not read.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn embed_forward(
    device: &Device,
    shape: &EmbedShape,
    x: Reals,
    parameters: EmbedParameters,
    count: Slice<u32>,
    y: RealsMut,
) -> Result<()> {
    let op = "embed_forward";
    let EmbedParameters { token, bias, positions } = parameters;
    check_len(op, "x", x.len(), shape.len())?;
    shape.check(op, token.map(|token| token.len()), bias.map(|bias| bias.len()), positions.len())?;
    check_len(op, "count", count.len(), 1)?;
    check_len(op, "y", y.len(), shape.len())?;
    let precision = check_precision(op, x, &[("y", y.view())])?;
    let args = EmbedForwardArgs {
        x: x.ptr(),
        token: token.map_or(Ptr::null(), |token| token.ptr()),
        bias: bias.map_or(Ptr::null(), |bias| bias.ptr()),
        positions: positions.ptr(),
        count: count.ptr(),
        y: y.ptr(),
        shape: *shape,
    };
    // SAFETY: the lengths of everything that `args` points to were checked against its shape.
    unsafe {
        device.launch(EMBED_FORWARD.of(precision), per_channel(device, shape.columns.len(), shape.features), &args)
    }
}

/// Gradients of an embedding's parameters; dy `[features, n, row]`, zero in padded samples, is the gradient of x too.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn embed_backward(device: &Device, shape: &EmbedShape, dy: Reals, gradients: EmbedGradients) -> Result<()> {
    let op = "embed_backward";
    let EmbedGradients { token, bias, positions } = gradients;
    check_len(op, "dy", dy.len(), shape.len())?;
    let lens = [token.as_ref(), bias.as_ref()].map(|gradient| gradient.map(|gradient| gradient.len()));
    shape.check(op, lens[0], lens[1], positions.len())?;
    let args = EmbedBackwardArgs {
        dy: dy.ptr(),
        dtoken: token.map_or(Ptr::null(), |token| token.ptr()),
        dbias: bias.map_or(Ptr::null(), |bias| bias.ptr()),
        dpositions: positions.ptr(),
        shape: *shape,
    };
    let launch = Launch::new([shape.features as u32, 1, 1], device.threads(THREADS));
    // SAFETY: the lengths of everything that `args` points to were checked against its shape.
    unsafe { device.launch(EMBED_BACKWARD.of(dy.precision()), launch, &args) }
}

/// Pool of tokens: x `[features, n, row]`, y `[features, n]`, overwritten.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn token_pool_forward(device: &Device, shape: &TokenPoolShape, x: Reals, y: RealsMut) -> Result<()> {
    let op = "token_pool_forward";
    check_len(op, "x", x.len(), shape.input_len())?;
    check_len(op, "y", y.len(), shape.output_len())?;
    let precision = check_precision(op, x, &[("y", y.view())])?;
    let args = TokenPoolArgs { from: x.ptr(), to: y.ptr(), shape: *shape };
    let blocks = shape.output_len().div_ceil(POOL_ROWS) as u32;
    // SAFETY: the lengths of everything that `args` points to were checked against its shape.
    unsafe { device.launch(POOL_FORWARD.of(precision), Launch::new([blocks, 1, 1], device.threads(THREADS)), &args) }
}

/// Gradient of a pool of tokens: dy `[features, n]`, dx `[features, n, row]`, overwritten.
///
/// # Errors
/// [`Error::Shape`] names the argument, what was expected and what it got.
pub fn token_pool_backward(device: &Device, shape: &TokenPoolShape, dy: Reals, dx: RealsMut) -> Result<()> {
    let op = "token_pool_backward";
    check_len(op, "dy", dy.len(), shape.output_len())?;
    check_len(op, "dx", dx.len(), shape.input_len())?;
    let precision = check_precision(op, dy, &[("dx", dx.view())])?;
    let args = TokenPoolArgs { from: dy.ptr(), to: dx.ptr(), shape: *shape };
    // SAFETY: the lengths of everything that `args` points to were checked against its shape.
    unsafe {
        device.launch(POOL_BACKWARD.of(precision), per_channel(device, shape.columns.len(), shape.features), &args)
    }
}
