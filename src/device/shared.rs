//! The shared memory of a block on the host.

use std::ffi::c_void;

/// A block's shared memory: exactly its size, filled with NaN.
pub(super) struct SharedMemory {
    pointer: *mut u8,
    bytes: usize,
}

impl SharedMemory {
    pub(super) fn new(bytes: usize) -> Self {
        if bytes == 0 {
            return SharedMemory { pointer: std::ptr::null_mut(), bytes };
        }
        // SAFETY: the layout has at least one byte; the fill stays within it.
        unsafe {
            let pointer = std::alloc::alloc(Self::layout(bytes));
            if pointer.is_null() {
                std::alloc::handle_alloc_error(Self::layout(bytes));
            }
            pointer.write_bytes(0xff, bytes);
            SharedMemory { pointer, bytes }
        }
    }

    fn layout(bytes: usize) -> std::alloc::Layout {
        std::alloc::Layout::from_size_align(bytes, 1024).expect("shared memory is small")
    }

    pub(super) fn pointer(&mut self) -> *mut c_void {
        self.pointer.cast()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        if !self.pointer.is_null() {
            // SAFETY: allocated in `new` with this layout.
            unsafe { std::alloc::dealloc(self.pointer, Self::layout(self.bytes)) };
        }
    }
}
