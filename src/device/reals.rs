//! Memory of activations, which are f32 or bf16: the precision of a network, known when it runs.

use std::marker::PhantomData;

use half::bf16;
use serde::{Deserialize, Serialize};

use super::{Buffer, Device, Kernel, Ptr, Slice, SliceMut};
use crate::error::{Error, Result};

/// What activations, their gradients, and weights as products read them, are stored as. Sums, statistics, the weights
/// that are trained and their gradients are f32 in both.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits: the reference.
    #[default]
    F32,
    /// The upper 16 bits of an f32, rounded to nearest, ties to even; products on tensor cores where there are some.
    Bf16,
}

impl Precision {
    /// Both.
    pub const ALL: [Precision; 2] = [Precision::F32, Precision::Bf16];

    /// Whether it is [`Precision::F32`].
    pub fn is_f32(&self) -> bool {
        *self == Precision::F32
    }

    /// `f32` or `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }

    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Precision::F32 => 4,
            Precision::Bf16 => 2,
        }
    }
}

/// An element of [`Reals`], as a field of an argument struct points to it.
pub enum Real {}

/// A shared view of activations.
#[derive(Clone, Copy)]
pub struct Reals<'a> {
    address: u64,
    len: usize,
    precision: Precision,
    element: PhantomData<&'a Real>,
}

/// An exclusive view of activations.
pub struct RealsMut<'a> {
    address: u64,
    len: usize,
    precision: Precision,
    element: PhantomData<&'a mut Real>,
}

/// Memory of activations that nothing else owns.
#[derive(Default)]
pub struct RealBuffer {
    words: Buffer<u32>,
    len: usize,
    precision: Precision,
}

impl RealBuffer {
    /// The first `len` elements of some memory.
    ///
    /// # Panics
    /// If it is too small.
    pub fn new(words: Buffer<u32>, len: usize, precision: Precision) -> Self {
        assert!(len * precision.bytes() <= words.len() * 4, "{len} elements in {} words", words.len());
        RealBuffer { words, len, precision }
    }

    /// All of it.
    pub fn view(&self) -> Reals<'_> {
        let address = self.words.view().ptr().address();
        Reals { address, len: self.len, precision: self.precision, element: PhantomData }
    }

    /// All of it, exclusively.
    pub fn view_mut(&mut self) -> RealsMut<'_> {
        let address = self.words.view().ptr().address();
        RealsMut { address, len: self.len, precision: self.precision, element: PhantomData }
    }
}

macro_rules! of_slices {
    ($($type:ty: $precision:ident),*) => {$(
        impl<'a> From<Slice<'a, $type>> for Reals<'a> {
            fn from(slice: Slice<'a, $type>) -> Self {
                let (address, precision) = (slice.ptr().address(), Precision::$precision);
                Reals { address, len: slice.len(), precision, element: PhantomData }
            }
        }

        impl<'a> From<SliceMut<'a, $type>> for RealsMut<'a> {
            fn from(slice: SliceMut<'a, $type>) -> Self {
                let (address, precision) = (slice.ptr().address(), Precision::$precision);
                RealsMut { address, len: slice.len(), precision, element: PhantomData }
            }
        }
    )*};
}
of_slices!(f32: F32, bf16: Bf16);

impl<'a> Reals<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What they are stored as.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The same elements, if they are f32.
    ///
    /// # Errors
    /// [`Error::Shape`] names the operation that has no other form.
    pub fn f32(self, op: &'static str) -> Result<Slice<'a, f32>> {
        self.precision.expect(op, Precision::F32)?;
        Ok(Slice { address: self.address, len: self.len, element: PhantomData })
    }

    /// For a kernel's argument struct.
    pub(crate) fn ptr(&self) -> Ptr<Real> {
        Ptr::new(self.address)
    }
}

impl<'a> RealsMut<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What they are stored as.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The same elements, if they are f32.
    ///
    /// # Errors
    /// [`Error::Shape`] names the operation that has no other form.
    pub fn f32(self, op: &'static str) -> Result<SliceMut<'a, f32>> {
        self.precision.expect(op, Precision::F32)?;
        Ok(SliceMut { address: self.address, len: self.len, element: PhantomData })
    }

    /// A shared view of the same elements.
    pub fn view(&self) -> Reals<'_> {
        Reals { address: self.address, len: self.len, precision: self.precision, element: PhantomData }
    }

    /// An exclusive view of the same elements, for a shorter time.
    pub fn reborrow(&mut self) -> RealsMut<'_> {
        RealsMut { address: self.address, len: self.len, precision: self.precision, element: PhantomData }
    }

    /// For a kernel's argument struct.
    pub(crate) fn ptr(&self) -> Ptr<Real> {
        Ptr::new(self.address)
    }
}

impl Precision {
    /// Refuses another precision than this.
    pub(crate) fn expect(self, op: &'static str, expected: Precision) -> Result<()> {
        if self == expected {
            return Ok(());
        }
        let (expected, got) = (expected.name().into(), self.name().into());
        Err(Error::Shape { op, what: "precision".into(), expected, got })
    }
}

impl Device {
    /// Zeroed memory for activations.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn alloc_reals(&self, len: usize, precision: Precision) -> Result<RealBuffer> {
        Ok(RealBuffer::new(self.alloc((len * precision.bytes()).div_ceil(4))?, len, precision))
    }

    /// Memory with these values, rounded to the precision.
    ///
    /// # Errors
    /// As [`Device::alloc`] and [`Device::write`].
    pub fn upload_reals(&self, values: &[f32], precision: Precision) -> Result<RealBuffer> {
        let mut buffer = self.alloc_reals(values.len(), precision)?;
        self.write_reals(values, buffer.view_mut())?;
        Ok(buffer)
    }

    /// [`Device::write`] of values, rounded to the precision of what they are written to.
    ///
    /// # Errors
    /// As [`Device::write`].
    pub fn write_reals(&self, values: &[f32], to: RealsMut) -> Result<()> {
        match to.precision {
            Precision::F32 => self.write(values, SliceMut { address: to.address, len: to.len, element: PhantomData }),
            Precision::Bf16 => {
                let rounded: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
                self.write(&rounded, SliceMut { address: to.address, len: to.len, element: PhantomData })
            }
        }
    }

    /// [`Device::read`] of activations, as f32.
    ///
    /// # Errors
    /// As [`Device::read`].
    pub fn read_reals(&self, from: Reals) -> Result<Vec<f32>> {
        match from.precision {
            Precision::F32 => self.read::<f32>(Slice { address: from.address, len: from.len, element: PhantomData }),
            Precision::Bf16 => {
                let values: Vec<bf16> =
                    self.read(Slice { address: from.address, len: from.len, element: PhantomData })?;
                Ok(values.into_iter().map(bf16::to_f32).collect())
            }
        }
    }
}

/// A kernel that is compiled for each precision.
pub struct RealKernel<A> {
    f32: Kernel<A>,
    bf16: Kernel<A>,
}

impl<A> RealKernel<A> {
    /// The kernels of these names.
    pub const fn new(f32: &'static str, bf16: &'static str) -> Self {
        RealKernel { f32: Kernel::new(f32), bf16: Kernel::new(bf16) }
    }

    /// The one for activations of this precision.
    pub(crate) fn of(&self, precision: Precision) -> &Kernel<A> {
        match precision {
            Precision::F32 => &self.f32,
            Precision::Bf16 => &self.bf16,
        }
    }
}

/// The two kernels that a kernel file names `REAL(name)`.
macro_rules! real_kernel {
    ($name:literal) => {
        $crate::device::RealKernel::new(concat!($name, "_f32"), concat!($name, "_bf16"))
    };
}
pub(crate) use real_kernel;
