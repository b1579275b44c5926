//! Host memory that a device copies from at its full speed.

use std::ops::{Deref, DerefMut};

use super::{Backend, Device};
use crate::error::Result;

/// Bytes on the host: page-locked for a GPU, ordinary memory for the host device. Can be filled by any thread.
pub struct Staging(Memory);

enum Memory {
    Host(Box<[u8]>),
    Cuda { device: Device, address: *mut u8, len: usize },
}

// SAFETY: nothing else holds the address, and the device's handle may be used from any thread.
unsafe impl Send for Staging {}

impl Device {
    /// `len` bytes of zeros on the host, from which [`Device::write`] copies without another copy on the way.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when memory that can be locked runs out.
    pub fn staging(&self, len: usize) -> Result<Staging> {
        Ok(Staging(match &self.0.backend {
            Backend::Host(_) => Memory::Host(vec![0; len].into()),
            Backend::Cuda(cuda) => Memory::Cuda { device: self.clone(), address: cuda.alloc_host(len)?, len },
        }))
    }
}

impl Deref for Staging {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Memory::Host(bytes) => bytes,
            // SAFETY: `len` bytes were allocated there and set to zero, and are owned by this value.
            Memory::Cuda { address, len, .. } => unsafe { std::slice::from_raw_parts(*address, *len) },
        }
    }
}

impl DerefMut for Staging {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Memory::Host(bytes) => bytes,
            // SAFETY: as above; exclusively borrowed.
            Memory::Cuda { address, len, .. } => unsafe { std::slice::from_raw_parts_mut(*address, *len) },
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Memory::Cuda { device, address, .. } = &self.0
            && let Backend::Cuda(cuda) = &device.0.backend
        {
            cuda.free_host(*address);
        }
    }
}
