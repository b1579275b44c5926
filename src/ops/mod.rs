//! Operations: each checks its arguments, fills a kernel's argument struct and launches it. One file per kernel file, or
//! for the few that an operation needs, same stem. Operations never allocate, never synchronize, never choose a stream;
//! outputs are `SliceMut` or, where they are activations, `RealsMut`, last.

pub mod attention;
pub mod augment;
pub mod bias;
pub mod ceiling;
pub mod conv;
pub mod conv_sparse;
mod conv_wgmma;
pub mod distances;
pub mod dropout;
pub mod epilogue;
#[cfg(dilt_sanitize)]
#[doc(hidden)]
#[path = "../../tests/faults/faults.rs"]
pub mod faults;
pub mod gelu;
pub mod gw;
pub mod kept;
pub mod layer_norm;
mod linear;
pub mod loss;
pub mod norm;
pub mod norm_join;
pub mod norm_pair;
pub mod norm_pool;
pub mod optimizer;
pub mod pointwise;
pub mod pool;
pub mod prune;
pub mod round;
pub mod row_map;
pub mod step;
mod tiles;
pub mod tokens;

use crate::device::{Device, Launch, Layout, Precision, Reals, kernel_args};
use crate::error::{Error, Result};

/// Samples of a row are padded to a multiple of this.
pub const SAMPLE_ALIGNMENT: usize = 8;

kernel_args! {
    /// The columns of a feature row: `n` samples of `row` columns each, the first `tokens` of them true, the others padding.
    pub struct Columns { n: i32, row: i32, tokens: i32 }
}

impl Columns {
    /// One column for each of `n` samples, rounded up to a multiple of 8.
    ///
    /// # Errors
    /// [`Error::Shape`] if a size is 0 or too large for an index.
    pub fn samples(n: usize) -> Result<Self> {
        Self::checked(n.next_multiple_of(SAMPLE_ALIGNMENT), 1, 1)
    }

    /// `tokens` columns for each of `n` samples: both rounded up to a multiple of 8.
    ///
    /// # Errors
    /// [`Error::Shape`] if a size is 0 or too large for an index.
    pub fn tokens(n: usize, tokens: usize) -> Result<Self> {
        Self::checked(n.next_multiple_of(SAMPLE_ALIGNMENT), tokens.next_multiple_of(SAMPLE_ALIGNMENT), tokens)
    }

    fn checked(n: usize, row: usize, tokens: usize) -> Result<Self> {
        let columns = n.checked_mul(row).filter(|&columns| columns > 0 && columns < 1 << 30);
        if columns.is_none() {
            let expected = "1 to 2^30 samples times tokens".into();
            let got = format!("{n} samples of {tokens} tokens");
            return Err(Error::Shape { op: "columns", what: "sizes".into(), expected, got });
        }
        Ok(Columns { n: n as i32, row: row as i32, tokens: tokens as i32 })
    }

    /// All columns, padding included.
    #[expect(clippy::len_without_is_empty, reason = "there is a column")]
    pub fn len(&self) -> usize {
        self.n as usize * self.row as usize
    }
}

/// The Rust side of every argument struct, nested ones included.
pub fn layouts() -> Vec<Layout> {
    let files = [
        attention::layouts(),
        augment::layouts(),
        bias::layouts(),
        ceiling::layouts(),
        conv::layouts(),
        conv_sparse::layouts(),
        conv_wgmma::layouts(),
        distances::layouts(),
        dropout::layouts(),
        epilogue::layouts(),
        #[cfg(dilt_sanitize)]
        faults::layouts(),
        gelu::layouts(),
        gw::layouts(),
        kept::layouts(),
        layer_norm::layouts(),
        linear::layouts(),
        loss::layouts(),
        norm::layouts(),
        norm_join::layouts(),
        norm_pair::layouts(),
        norm_pool::layouts(),
        optimizer::layouts(),
        pointwise::layouts(),
        pool::layouts(),
        prune::layouts(),
        round::layouts(),
        step::layouts(),
        tokens::layouts(),
    ];
    files.concat()
}

/// Refuses a tensor whose number of elements is not what the operation needs.
pub(crate) fn check_len(op: &'static str, tensor: &str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    let what = format!("number of elements of {tensor}");
    Err(Error::Shape { op, what, expected: expected.to_string(), got: got.to_string() })
}

/// Refuses tensors of an elementwise operation that differ in length, or whose length padding does not divide.
pub(crate) fn check_elementwise(op: &'static str, tensors: &[(&str, usize)]) -> Result<()> {
    let (first, length) = tensors[0];
    if !length.is_multiple_of(SAMPLE_ALIGNMENT) {
        let expected = format!("a multiple of {SAMPLE_ALIGNMENT}");
        return Err(Error::Shape {
            op,
            what: format!("number of elements of {first}"),
            expected,
            got: length.to_string(),
        });
    }
    tensors.iter().try_for_each(|&(name, len)| check_len(op, name, len, length))
}

/// Refuses activations of another precision than the first tensor's, which it returns.
pub(crate) fn check_precision(op: &'static str, first: Reals, others: &[(&str, Reals)]) -> Result<Precision> {
    let precision = first.precision();
    match others.iter().find(|(_, other)| other.precision() != precision) {
        None => Ok(precision),
        Some((name, other)) => {
            let (expected, got) = (precision.name().into(), other.precision().name().into());
            Err(Error::Shape { op, what: format!("precision of {name}"), expected, got })
        }
    }
}

/// The launch of an elementwise kernel over `row` elements of each channel: blocks for them in x, channels in y.
pub(crate) fn per_channel(device: &Device, row: usize, channels: i32) -> Launch {
    let Launch { grid: [blocks, ..], block } = device.elementwise(row);
    Launch::new([blocks, channels as u32, 1], block)
}

/// The layouts of some argument structs.
macro_rules! layouts_of {
    ($($name:ident),* $(,)?) => {
        /// The argument structs of this file's kernels.
        pub(crate) fn layouts() -> Vec<$crate::device::Layout> {
            vec![$(<$name as $crate::device::KernelArgs>::layout()),*]
        }
    };
}
pub(crate) use layouts_of;
