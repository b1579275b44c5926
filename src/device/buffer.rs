//! Memory on a device: owned ranges, and borrowed views of them.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use super::{Device, Ptr, asan};

/// An allocation, freed when the last buffer cut from it is gone.
struct Memory {
    device: Device,
    address: u64,
    bytes: usize,
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.device.free(self.address, self.bytes);
    }
}

/// `len` elements of device memory that nothing else owns.
pub struct Buffer<T> {
    memory: Option<Arc<Memory>>,
    address: u64,
    len: usize,
    element: PhantomData<fn() -> T>,
}

/// A shared view of consecutive elements.
pub struct Slice<'a, T> {
    pub(super) address: u64,
    pub(super) len: usize,
    pub(super) element: PhantomData<&'a T>,
}

/// An exclusive view of consecutive elements.
pub struct SliceMut<'a, T> {
    pub(super) address: u64,
    pub(super) len: usize,
    pub(super) element: PhantomData<&'a mut T>,
}

impl<T> Clone for Slice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Slice<'_, T> {}

impl<T> Default for Buffer<T> {
    /// A buffer of no elements.
    fn default() -> Self {
        Buffer { memory: None, address: 0, len: 0, element: PhantomData }
    }
}

impl<T: bytemuck::Pod> Buffer<T> {
    pub(super) fn new(device: Device, address: u64, bytes: usize, len: usize) -> Self {
        let memory = Arc::new(Memory { device, address, bytes });
        Buffer { memory: Some(memory), address, len, element: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it.
    pub fn view(&self) -> Slice<'_, T> {
        Slice { address: self.address, len: self.len, element: PhantomData }
    }

    /// All of it, exclusively.
    pub fn view_mut(&mut self) -> SliceMut<'_, T> {
        SliceMut { address: self.address, len: self.len, element: PhantomData }
    }

    /// Elements `range`.
    ///
    /// # Panics
    /// If the range is not within the buffer.
    pub fn slice(&self, range: Range<usize>) -> Slice<'_, T> {
        check(&range, self.len);
        Slice { address: self.address + (range.start * size_of::<T>()) as u64, len: range.len(), element: PhantomData }
    }

    /// Elements `range`, exclusively.
    ///
    /// # Panics
    /// If the range is not within the buffer.
    pub fn slice_mut(&mut self, range: Range<usize>) -> SliceMut<'_, T> {
        let Slice { address, len, .. } = self.slice(range);
        SliceMut { address, len, element: PhantomData }
    }

    /// Two ranges that do not overlap, exclusively.
    ///
    /// # Panics
    /// As [`Buffer::disjoint_mut`].
    pub fn pair_mut(&mut self, a: Range<usize>, b: Range<usize>) -> (SliceMut<'_, T>, SliceMut<'_, T>) {
        self.disjoint_mut([a, b]).into()
    }

    /// Ranges of which no two overlap, exclusively.
    ///
    /// # Panics
    /// If two overlap, or one is not within the buffer.
    pub fn disjoint_mut<const N: usize>(&mut self, ranges: [Range<usize>; N]) -> [SliceMut<'_, T>; N] {
        for (i, a) in ranges.iter().enumerate() {
            let apart = |b: &Range<usize>| a.is_empty() || b.is_empty() || a.end <= b.start || b.end <= a.start;
            assert!(ranges[..i].iter().all(apart), "slices {ranges:?} overlap");
        }
        ranges.map(|range| {
            let Slice { address, len, .. } = self.slice(range);
            SliceMut { address, len, element: PhantomData }
        })
    }

    /// The same memory as elements of another type, as many as fit. Any bits are a value of either type.
    pub fn cast<U: bytemuck::Pod>(self) -> Buffer<U> {
        let len = self.len * size_of::<T>() / size_of::<U>();
        Buffer { memory: self.memory, address: self.address, len, element: PhantomData }
    }

    /// Cuts an arena into pieces, each an offset and a length in elements. Builds with AddressSanitizer report every
    /// use of what lies between them.
    ///
    /// # Panics
    /// If two pieces overlap, are out of order, or reach past the end.
    pub fn split(self, pieces: &[(usize, usize)]) -> Vec<Buffer<T>> {
        let address = |offset: usize| self.address + (offset * size_of::<T>()) as u64;
        let mut end = 0;
        let cut = |&(offset, len): &(usize, usize)| {
            assert!(offset >= end && offset + len <= self.len, "piece {offset}+{len} of {} elements", self.len);
            asan::poison(address(end), (offset - end) * size_of::<T>());
            end = offset + len;
            Buffer { memory: self.memory.clone(), address: address(offset), len, element: PhantomData }
        };
        let buffers = pieces.iter().map(cut).collect();
        asan::poison(address(end), (self.len - end) * size_of::<T>());
        buffers
    }
}

fn check(range: &Range<usize>, len: usize) {
    assert!(range.start <= range.end && range.end <= len, "slice {range:?} of {len} elements");
}

impl<'a, T> Slice<'a, T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// For a kernel's argument struct.
    pub(crate) fn ptr(&self) -> Ptr<T> {
        Ptr::new(self.address)
    }
}

impl<'a, T> SliceMut<'a, T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// For a kernel's argument struct.
    pub(crate) fn ptr(&self) -> Ptr<T> {
        Ptr::new(self.address)
    }

    /// A shared view of the same elements.
    pub fn view(&self) -> Slice<'_, T> {
        Slice { address: self.address, len: self.len, element: PhantomData }
    }

    /// The first `len` elements, and the others.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn split_at(self, len: usize) -> (Self, Self) {
        check(&(0..len), self.len);
        let rest = self.address + (len * size_of::<T>()) as u64;
        let part = |address, len| SliceMut { address, len, element: PhantomData };
        (part(self.address, len), part(rest, self.len - len))
    }

    /// An exclusive view of the same elements, for a shorter time.
    pub fn reborrow(&mut self) -> SliceMut<'_, T> {
        SliceMut { address: self.address, len: self.len, element: PhantomData }
    }
}
