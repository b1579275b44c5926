//! Which tiling a convolution takes on a GPU: rows x columns of a block's tile of the product, and the splits of a weight
//! gradient. Functions of the shape and the precision alone, so that a step has the same bits wherever it runs.
//! The tiles of f32 were chosen on an H200 (benches/results); bf16 has taken over the choice, which is not measured yet.

use super::conv::{ConvArgs, ConvWeightGradientArgs};
use super::conv_sparse::{ConvSparseArgs, ConvSparseGradientArgs};
use super::conv_wgmma::{ConvBoxesArgs, ConvGradientBoxesArgs};
use crate::device::{Kernel, Precision, RealKernel, real_kernel};

/// A kernel and what one of its blocks owns: features x columns of a product, filters x weights of a gradient.
pub(super) struct Tile<A: 'static> {
    pub kernel: Kernel<A>,
    pub rows: usize,
    pub columns: usize,
}

const fn tile<A>(name: &'static str, rows: usize, columns: usize) -> Tile<A> {
    Tile { kernel: Kernel::new(name), rows, columns }
}

/// The kernels of forward pass or input gradient.
pub(super) struct Product {
    /// By the features that one owns.
    f32: [Tile<ConvArgs>; 5],
    bf16: [Tile<ConvArgs>; 5],
    /// The last three in f32 for filters of one tap, where they are others.
    pointwise: Option<[Tile<ConvArgs>; 3]>,
    /// By wgmma; the last from as many blocks on as fill a GPU.
    wgmma: [Tile<ConvBoxesArgs>; 3],
    /// Of groups of rows in bf16, and of larger ones by wgmma.
    groups: [Tile<ConvSparseArgs>; 2],
    groups_wgmma: [Tile<ConvSparseArgs>; 2],
    /// Whether it is the input gradient.
    pub gradient: bool,
    /// The host's.
    pub direct: RealKernel<ConvArgs>,
}

/// The larger tiles of a product, after what stands before them.
macro_rules! products {
    ($name:literal, $precision:literal $(, $smaller:expr)*) => {
        [
            $($smaller,)*
            tile(concat!($name, "_64x64_", $precision), 64, 64),
            tile(concat!($name, "_64x128_", $precision), 64, 128),
            tile(concat!($name, "_128x128_", $precision), 128, 128),
        ]
    };
}
/// All tiles of a product.
macro_rules! all_products {
    ($name:literal, $precision:literal) => {
        products!(
            $name,
            $precision,
            tile(concat!($name, "_16x256_", $precision), 16, 256),
            tile(concat!($name, "_32x256_", $precision), 32, 256)
        )
    };
}
/// The tiles of a product by wgmma.
macro_rules! wgmma_products {
    ($name:literal) => {
        [
            tile(concat!($name, "_64x128_bf16"), 64, 128),
            tile(concat!($name, "_128x128_bf16"), 128, 128),
            tile(concat!($name, "_128x256_bf16"), 128, 256),
        ]
    };
}
/// The tiles of a product of groups.
macro_rules! group_products {
    ($name:literal) => {
        [tile(concat!($name, "_32x128_bf16"), 32, 128), tile(concat!($name, "_32x256_bf16"), 32, 256)]
    };
}
/// The same by wgmma.
macro_rules! group_products_wgmma {
    ($name:literal) => {
        [tile(concat!($name, "_64x128_bf16"), 64, 128), tile(concat!($name, "_64x256_bf16"), 64, 256)]
    };
}

pub(super) static FORWARD: Product = Product {
    f32: all_products!("conv_forward", "f32"),
    bf16: all_products!("conv_forward", "bf16"),
    pointwise: None,
    wgmma: wgmma_products!("conv_forward_wgmma"),
    groups: group_products!("conv_groups_forward"),
    groups_wgmma: group_products_wgmma!("conv_groups_forward_wgmma"),
    gradient: false,
    direct: real_kernel!("conv_forward_direct"),
};

pub(super) static INPUT_GRADIENT: Product = Product {
    f32: all_products!("conv_input_gradient", "f32"),
    bf16: all_products!("conv_input_gradient", "bf16"),
    pointwise: Some(products!("conv_input_gradient_pointwise", "f32")),
    wgmma: wgmma_products!("conv_input_gradient_wgmma"),
    groups: group_products!("conv_groups_input_gradient"),
    groups_wgmma: group_products_wgmma!("conv_groups_input_gradient_wgmma"),
    gradient: true,
    direct: real_kernel!("conv_input_gradient_direct"),
};

/// The tilings of the weight gradient, by the filters that one owns.
static WEIGHT_GRADIENT_F32: [Tile<ConvWeightGradientArgs>; 4] = [
    tile("conv_weight_gradient_16x96_f32", 16, 96),
    tile("conv_weight_gradient_32x96_f32", 32, 96),
    tile("conv_weight_gradient_64x96_f32", 64, 96),
    tile("conv_weight_gradient_128x96_f32", 128, 96),
];
static WEIGHT_GRADIENT_BF16: [Tile<ConvWeightGradientArgs>; 4] = [
    tile("conv_weight_gradient_16x128_bf16", 16, 128),
    tile("conv_weight_gradient_32x128_bf16", 32, 128),
    tile("conv_weight_gradient_64x128_bf16", 64, 128),
    tile("conv_weight_gradient_128x128_bf16", 128, 128),
];

/// By wgmma, weights counted in boxes of 64 channels at a tap.
static WGMMA_WEIGHT_GRADIENT: [Tile<ConvGradientBoxesArgs>; 2] = [
    tile("conv_weight_gradient_wgmma_64x128_bf16", 64, 128),
    tile("conv_weight_gradient_wgmma_128x128_bf16", 128, 128),
];

/// Of groups of rows in bf16, by a group's entries, and of larger groups by wgmma.
static GROUP_GRADIENT: Tile<ConvSparseGradientArgs> = tile("conv_groups_weight_gradient_32x128_bf16", 32, 128);
static WGMMA_GROUP_GRADIENT: Tile<ConvSparseGradientArgs> =
    tile("conv_groups_weight_gradient_wgmma_64x128_bf16", 64, 128);

/// Blocks from which on a larger tile of a product pays: they fill most of 132 multiprocessors twice.
const PRODUCT_BLOCKS: usize = 200;
/// The same of the largest tile by wgmma, of which a multiprocessor holds one.
const WGMMA_BLOCKS: usize = 132;
/// Blocks that a weight gradient aims for: two for each of 132 multiprocessors.
const GRADIENT_BLOCKS: usize = 264;
/// The same of groups of 32, whose blocks are smaller: three for each.
const GROUP_GRADIENT_BLOCKS: usize = 396;

impl Product {
    /// The tile for a result of so many rows and columns, of filters of one tap or of more.
    pub(super) fn of(&self, precision: Precision, rows: usize, columns: usize, one_tap: bool) -> &Tile<ConvArgs> {
        let tiles = match precision {
            Precision::F32 => &self.f32,
            Precision::Bf16 => &self.bf16,
        };
        let fills = |&tile: &usize| {
            let Tile { rows: height, columns: width, .. } = tiles[tile];
            rows.div_ceil(height) * columns.div_ceil(width) >= PRODUCT_BLOCKS
        };
        let (smallest, larger): (usize, &[usize]) = match rows {
            0..=16 => (0, &[]),
            17..=32 => (1, &[]),
            33..=64 => (2, &[3]),
            _ => (2, &[4, 3]),
        };
        let tile = larger.iter().copied().find(fills).unwrap_or(smallest);
        match &self.pointwise {
            Some(others) if one_tap && tile >= 2 && precision == Precision::F32 => &others[tile - 2],
            _ => &tiles[tile],
        }
    }

    /// The tile by wgmma for a result of so many rows and columns.
    pub(super) fn wgmma_tile(&self, rows: usize, columns: usize) -> &Tile<ConvBoxesArgs> {
        let [small, middle, large] = &self.wgmma;
        match rows {
            0..=64 => small,
            _ if rows.div_ceil(large.rows) * columns.div_ceil(large.columns) >= WGMMA_BLOCKS => large,
            _ => middle,
        }
    }

    /// The tile for so many groups of rows, classes of pixels apart, with `columns` each.
    pub(super) fn group_tile(&self, wgmma: bool, groups: usize, columns: usize) -> &Tile<ConvSparseArgs> {
        let ([narrow, wide], blocks) =
            if wgmma { (&self.groups_wgmma, WGMMA_BLOCKS) } else { (&self.groups, PRODUCT_BLOCKS) };
        if groups * columns.div_ceil(wide.columns) >= blocks { wide } else { narrow }
    }
}

/// The tile for the gradient of so many filters of so many weights, and the splits of its `columns`.
pub(super) fn weight_gradient(
    precision: Precision,
    filters: usize,
    weights: usize,
    columns: usize,
) -> (&'static Tile<ConvWeightGradientArgs>, usize) {
    let tiles = match precision {
        Precision::F32 => &WEIGHT_GRADIENT_F32,
        Precision::Bf16 => &WEIGHT_GRADIENT_BF16,
    };
    let tile = tiles.iter().find(|tile| filters <= tile.rows).unwrap_or(&tiles[3]);
    let blocks = filters.div_ceil(tile.rows) * weights.div_ceil(tile.columns);
    (tile, (GRADIENT_BLOCKS / blocks).min(columns / 256).max(1))
}

/// The same by wgmma, for whole boxes of weights.
pub(super) fn wgmma_weight_gradient(
    filters: usize,
    weights: usize,
    columns: usize,
) -> (&'static Tile<ConvGradientBoxesArgs>, usize) {
    let [small, large] = &WGMMA_WEIGHT_GRADIENT;
    let tile = if filters <= small.rows { small } else { large };
    let blocks = filters.div_ceil(tile.rows) * weights.div_ceil(tile.columns);
    (tile, (GRADIENT_BLOCKS / blocks).min(columns / 512).max(1))
}

/// The tile for the weight gradient of groups.
pub(super) fn group_gradient(wgmma: bool) -> &'static Tile<ConvSparseGradientArgs> {
    if wgmma { &WGMMA_GROUP_GRADIENT } else { &GROUP_GRADIENT }
}

/// The splits of the `columns` of a weight gradient of so many chunks of groups.
pub(super) fn group_gradient_splits(wgmma: bool, chunks: usize, columns: usize) -> usize {
    let (blocks, least) = if wgmma { (GRADIENT_BLOCKS, 512) } else { (GROUP_GRADIENT_BLOCKS, 256) };
    (blocks / chunks.max(1)).min(columns / least).max(1)
}
