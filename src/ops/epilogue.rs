//! What a product does with its sums beside storing them: the epilogues of tensor cores (`kernels/conv_mma.cuh`), or what kernels
//! of their own do after it.

use super::conv::ConvShape;
use super::dropout::{ResidualShape, residual_forward};
use super::gelu::{gelu_backward, gelu_forward};
use super::norm::{NormShape, Normalised, NormalisedArgs, Normed};
use super::row_map::RowMap;
use super::{Columns, check_len, check_precision, layouts_of};
use crate::device::{Device, Ptr, Real, Reals, RealsMut, Slice, SliceMut, kernel_args};
use crate::error::{Error, Result};

kernel_args! {
    #[derive(Default)]
    struct NormBeforeArgs {
        norms: [NormalisedArgs; 2], y: Ptr<Real>, source: Ptr<u32>, sums: [Ptr<f32>; 2], relu: i32,
    }
    pub(super) struct EpilogueArgs {
        bias: Ptr<f32>, count: Ptr<u32>, statistics: Ptr<f32>, beside: Ptr<Real>, operand: Ptr<Real>,
        norm: NormBeforeArgs, columns: Columns, accumulate: i32,
    }
}
layouts_of!(NormBeforeArgs, EpilogueArgs);

/// What a forward pass does beside storing `y = w * x`; nothing by default.
#[derive(Default)]
pub struct Epilogue<'a> {
    /// Added to each row before it is stored.
    pub bias: Option<Bias<'a>>,
    /// What is summed of y as it is stored.
    pub statistics: Option<TileStatistics<'a>>,
    /// What is written of y as it is stored; by a kernel of its own where no tensor cores multiply.
    pub beside: Option<Beside<'a>>,
}

/// A bias `[k]` and which columns get it: padded columns of y are set to zero.
#[derive(Clone, Copy)]
pub struct Bias<'a> {
    /// One value per output channel.
    pub bias: Slice<'a, f32>,
    /// What the shape's `n` is made of: [`Columns::samples`] in a layer of images, [`Columns::tokens`] in one of tokens.
    pub columns: Columns,
    /// Number of true samples, on the device.
    pub count: Slice<'a, u32>,
}

/// Where a forward pass on tensor cores writes the mean and the squared deviations of y as it is stored, over the true samples
/// of each row of a tile: for [`norm_join`](super::norm_join::norm_join).
pub struct TileStatistics<'a> {
    /// Number of true samples, on the device.
    pub count: Slice<'a, u32>,
    /// `[k, tiles of a row, 2]`: [`ConvShape::statistics_len`] elements or more of tiles of [`ConvShape::statistics_tile`]
    /// columns.
    pub tiles: SliceMut<'a, f32>,
}

/// What a forward pass writes beside y: a second tensor `[k, p, q, n]`, overwritten.
pub enum Beside<'a> {
    /// [GELU](super::gelu::gelu_forward) of y.
    Gelu(RealsMut<'a>),
    /// `to = x + y`, a residual sum.
    Sum {
        /// `[k, p, q, n]`.
        x: Reals<'a>,
        /// What is written.
        to: RealsMut<'a>,
    },
}

/// What an input gradient does with its sums.
#[expect(clippy::large_enum_variant, reason = "there is one at a time")]
pub enum Dx<'a> {
    /// Overwrites dx.
    Set,
    /// Adds them to what dx holds.
    Add,
    /// Overwrites dx with them through [GELU](super::gelu::gelu_backward), whose result the layer has read: of this x,
    /// `[c, h, w, n]`. By a kernel of its own where no tensor cores multiply.
    BeforeGelu(Reals<'a>),
    /// With what dx holds or without, they are all that comes to the result of a batch norm, which the layer has read.
    BeforeNorm(BeforeNorm<'a>),
}

/// What an input gradient on tensor cores does of a batch norm's backward pass, or of that of a sum of two: dx becomes dz, what of
/// it goes through ReLU, as [`NormGradient::Summed`](super::norm::NormGradient::Summed) and
/// [`norm_pair_backward`](super::norm_pair::norm_pair_backward) take it.
pub struct BeforeNorm<'a> {
    /// What the norm did: its y is what the layer has read.
    pub normed: Normed<'a>,
    /// A second norm, whose result was added to that of the first before ReLU: neither has a map then, and both x say what y was.
    pub added: Option<AddedNorm<'a>>,
    /// Whether dx holds what other layers have written of the gradient.
    pub add: bool,
    /// Where the sums of dz and of dz x̂ over each tile of a row are written, `[features, tiles, 2]`, for
    /// [`norm_join_gradient`](super::norm_join::norm_join_gradient): with [`ConvShape::gradient_tiles`], or more elements.
    pub sums: SliceMut<'a, f32>,
}

/// The second of two batch norms that are summed.
pub struct AddedNorm<'a> {
    /// What it read, and how it changed that.
    pub norm: Normalised<'a>,
    /// As the first one's.
    pub sums: SliceMut<'a, f32>,
}

impl<'a> From<Option<Bias<'a>>> for Epilogue<'a> {
    fn from(bias: Option<Bias<'a>>) -> Self {
        Epilogue { bias, ..Epilogue::default() }
    }
}

impl EpilogueArgs {
    /// One that does nothing, of a shape of such columns.
    fn of(columns: Columns) -> Self {
        EpilogueArgs {
            bias: Ptr::null(),
            count: Ptr::null(),
            statistics: Ptr::null(),
            beside: Ptr::null(),
            operand: Ptr::null(),
            norm: NormBeforeArgs::default(),
            columns,
            accumulate: 0,
        }
    }
}

impl Epilogue<'_> {
    /// Checks it against the shape of a layer that reads x; statistics are those of tiles of so many columns.
    pub(super) fn check(&self, op: &'static str, shape: &ConvShape, x: Reals, tile: Option<usize>) -> Result<()> {
        if let Some(Bias { bias, columns, count }) = self.bias {
            check_len(op, "bias", bias.len(), shape.k as usize)?;
            check_len(op, "columns", columns.len(), shape.n as usize)?;
            check_len(op, "count", count.len(), 1)?;
        }
        if let Some(statistics) = &self.statistics {
            statistics.check(op, shape, self.bias, tile)?;
        }
        match &self.beside {
            None => {}
            Some(Beside::Gelu(to)) => {
                check_len(op, "GELU", to.len(), shape.output_len())?;
                check_precision(op, x, &[("GELU", to.view())])?;
            }
            Some(Beside::Sum { x: added, to }) => {
                check_len(op, "x of the sum", added.len(), shape.output_len())?;
                check_len(op, "sum", to.len(), shape.output_len())?;
                check_precision(op, x, &[("x of the sum", *added), ("sum", to.view())])?;
            }
        }
        Ok(())
    }

    /// For a kernel, on tensor cores or not.
    pub(super) fn args(&self, shape: &ConvShape, tensor_cores: bool) -> Result<EpilogueArgs> {
        let columns = self.bias.map_or_else(|| Columns::samples(shape.n as usize), |bias| Ok(bias.columns))?;
        let mut args = EpilogueArgs::of(columns);
        if let Some(statistics) = &self.statistics {
            (args.statistics, args.count) = (statistics.tiles.ptr(), statistics.count.ptr());
        }
        if let Some(bias) = &self.bias {
            (args.bias, args.count) = (bias.bias.ptr(), bias.count.ptr());
        }
        match self.beside.as_ref().filter(|_| tensor_cores) {
            None => {}
            Some(Beside::Gelu(to)) => args.beside = to.ptr(),
            Some(Beside::Sum { x, to }) => (args.beside, args.operand) = (to.ptr(), x.ptr()),
        }
        Ok(args)
    }

    /// Does what that kernel has left.
    pub(super) fn finish(self, device: &Device, shape: &ConvShape, tensor_cores: bool, y: Reals) -> Result<()> {
        match self.beside.filter(|_| !tensor_cores) {
            None => Ok(()),
            Some(Beside::Gelu(to)) => gelu_forward(device, y, to),
            Some(Beside::Sum { x, to }) => {
                let shape = ResidualShape::new(shape.filters(), Columns::samples(shape.output_columns())?)?;
                residual_forward(device, &shape, x, y, None, None, to)
            }
        }
    }
}

impl TileStatistics<'_> {
    /// Checks what is written of tiles of so many columns; there are none where no tensor cores multiply.
    fn check(&self, op: &'static str, shape: &ConvShape, bias: Option<Bias>, tile: Option<usize>) -> Result<()> {
        let tile = tile.filter(|_| bias.is_none_or(|b| b.columns.row == 1));
        let Some(tile) = tile else {
            let (what, expected) = ("statistics".into(), "none but of images that tensor cores multiply".into());
            return Err(Error::Shape { op, what, expected, got: shape.to_string() });
        };
        let needed = shape.statistics_len(tile);
        if self.tiles.len() < needed {
            check_len(op, "statistics", self.tiles.len(), needed)?;
        }
        check_len(op, "count", self.count.len(), 1)
    }
}

impl BeforeNorm<'_> {
    /// Checks it against the shape of a layer; so many tiles of a row are summed, none where no tensor cores multiply.
    fn check(&self, op: &'static str, shape: &ConvShape, dy: Reals, tiles: Option<usize>) -> Result<()> {
        let Some(tiles) = tiles else {
            let (what, expected) =
                ("sums for a norm".into(), "none but by tensor cores, of pixels that the stride divides");
            return Err(Error::Shape { op, what, expected: expected.into(), got: shape.to_string() });
        };
        let features = self.normed.map.map_or(shape.channels(), RowMap::inputs);
        let norm = NormShape::new(features, (shape.h * shape.w) as usize, shape.n as usize)?;
        self.normed.check(op, &norm, shape.input_len())?;
        let Normed { norm: Normalised { x, .. }, y, map, .. } = self.normed;
        check_precision(op, dy, &[("x of the norm", x), ("y of the norm", y.unwrap_or(x))])?;
        let needed = 2 * features * tiles;
        let check_sums = |name: &str, sums: &SliceMut<f32>| {
            if sums.len() < needed { check_len(op, name, sums.len(), needed) } else { Ok(()) }
        };
        if let Some(added) = &self.added {
            if map.is_some() || y.is_some() {
                let (what, expected) = ("a sum of two norms".into(), "no map, and no y, which both x say");
                return Err(Error::Shape { op, what, expected: expected.into(), got: "one".into() });
            }
            added.norm.check(op, &norm, None, shape.input_len())?;
            check_precision(op, dy, &[("x of the added norm", added.norm.x)])?;
            check_sums("sums of the added norm", &added.sums)?;
        }
        check_sums("sums", &self.sums)
    }

    fn args(&self) -> NormBeforeArgs {
        let Normed { norm, y, relu, .. } = self.normed;
        let added = self.added.as_ref();
        NormBeforeArgs {
            norms: [norm.args(), added.map_or_else(NormalisedArgs::default, |added| added.norm.args())],
            y: y.map_or(Ptr::null(), |y| y.ptr()),
            source: self.normed.source(),
            sums: [self.sums.ptr(), added.map_or(Ptr::null(), |added| added.sums.ptr())],
            relu: i32::from(relu),
        }
    }
}

impl Dx<'_> {
    /// Checks it against the shape of a layer that is given dy; so many tiles of a row can be summed.
    pub(super) fn check(&self, op: &'static str, shape: &ConvShape, dy: Reals, tiles: Option<usize>) -> Result<()> {
        match self {
            Dx::Set | Dx::Add => Ok(()),
            Dx::BeforeGelu(x) => {
                check_len(op, "x of GELU", x.len(), shape.input_len())?;
                check_precision(op, dy, &[("x of GELU", *x)]).map(|_| ())
            }
            Dx::BeforeNorm(norm) => norm.check(op, shape, dy, tiles),
        }
    }

    /// For a kernel, on tensor cores or not.
    pub(super) fn args(&self, shape: &ConvShape, tensor_cores: bool) -> Result<EpilogueArgs> {
        let mut args = EpilogueArgs::of(Columns::samples(shape.n as usize)?);
        match self {
            Dx::Add => args.accumulate = 1,
            Dx::BeforeGelu(x) if tensor_cores => args.operand = x.ptr(),
            Dx::Set | Dx::BeforeGelu(_) => {}
            Dx::BeforeNorm(norm) => (args.norm, args.accumulate) = (norm.args(), i32::from(norm.add)),
        }
        Ok(args)
    }

    /// Does what that kernel has left.
    pub(super) fn finish(self, device: &Device, tensor_cores: bool, dx: RealsMut) -> Result<()> {
        match self {
            Dx::BeforeGelu(x) if !tensor_cores => gelu_backward(device, x, dx),
            _ => Ok(()),
        }
    }
}
