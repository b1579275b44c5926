//! Devices: memory, kernel launches, captured steps, events. Two kinds, one interface.
//!
//! | kind | memory | a launch | a captured step |
//! |---|---|---|---|
//! | `cuda` | GPU memory | on the handle's own stream, asynchronous | a CUDA graph |
//! | `host` | aligned heap memory | blocks on a thread pool, returns when done | a list of launches |
//!
//! Nothing above this module asks which kind it has, except through [`Device::policy`], which says how a kernel should
//! be cut into blocks. Only [`crate::ops`] launches.

mod asan;
mod buffer;
mod cuda;
mod fiber;
mod graph;
mod host;
mod kernel;
mod reals;
mod shared;
mod staging;
mod tensor_map;
mod tsan;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

pub use buffer::{Buffer, Slice, SliceMut};
pub use cuda::Gpu;
use graph::Work;
pub use graph::{Graph, Recording};
pub use host::{HostOptions, host_threads};
pub(crate) use kernel::kernel_args;
pub use kernel::{
    Kernel, KernelArgs, Launch, Layout, Ptr, embedded_archs, embedded_images, host_instruction_sets, kernel_files,
};
pub(crate) use reals::real_kernel;
pub use reals::{Precision, Real, RealBuffer, RealKernel, Reals, RealsMut};
pub use staging::Staging;
pub(crate) use tensor_map::TensorMap;

use crate::error::{Error, Result};

/// How kernels are cut into blocks on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Many threads a block, tiles staged through shared memory: the GPU's way.
    Staged,
    /// One thread a block, a register tile per thread, rows read where they lie: the host's way, whose cache stages.
    Direct,
}

/// A handle to a device: its memory, and a stream of its own. Clones share the stream.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    backend: Backend,
    policy: Policy,
    wgmma: bool,
    /// `DILT_SYNC=1`: synchronize after each launch, so that an error names its kernel.
    sync_each_launch: bool,
    recording: Mutex<Option<Vec<Work>>>,
    trace: Mutex<Option<Vec<Traced>>>,
    /// Recorded steps that may use memory of this handle.
    recorded: AtomicUsize,
    /// Memory that was dropped while there were such steps.
    deferred: Mutex<Vec<(u64, usize)>>,
}

enum Backend {
    Host(host::Host),
    Cuda(cuda::Cuda),
}

/// What `DILT_WGMMA` says.
fn wgmma_from_environment() -> Result<bool> {
    match std::env::var("DILT_WGMMA").as_deref() {
        Err(_) | Ok("" | "0") => Ok(false),
        Ok("1") => Ok(true),
        Ok(text) => Err(Error::Usage(format!("environment variable DILT_WGMMA: expected 0 or 1, got '{text}'"))),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Device {
    /// Opens `auto` (the first GPU if there is one, else the host), `cuda`, `cuda:INDEX` or `host`.
    ///
    /// # Errors
    /// [`Error::Usage`] for another name; [`Error::Device`] when the device asked for is not there.
    pub fn open(name: &str) -> Result<Self> {
        match name {
            "host" => Self::host(HostOptions::from_environment()?),
            "auto" if cuda::count() > 0 => Self::cuda(0),
            "auto" => Self::host(HostOptions::from_environment()?),
            "cuda" => Self::cuda(0),
            _ => match name.strip_prefix("cuda:").and_then(|index| index.parse().ok()) {
                Some(index) => Self::cuda(index),
                None => Err(Error::Usage(format!("device: expected auto, cuda, cuda:INDEX or host, got '{name}'"))),
            },
        }
    }

    /// The host device with these options.
    ///
    /// # Errors
    /// [`Error::Usage`] if this machine lacks the instruction set asked for.
    pub fn host(options: HostOptions) -> Result<Self> {
        let HostOptions { policy, wgmma, .. } = options;
        if wgmma && policy == Policy::Direct {
            let problem = "host device: products by wgmma are staged: they need DILT_HOST_POLICY=staged";
            return Err(Error::Usage(problem.into()));
        }
        Ok(Self::new(Backend::Host(host::Host::new(options)?), policy, wgmma))
    }

    fn cuda(index: usize) -> Result<Self> {
        let device = Self::new(Backend::Cuda(cuda::Cuda::open(index)?), Policy::Staged, false);
        if wgmma_from_environment()? { device.with_wgmma() } else { Ok(device) }
    }

    fn new(backend: Backend, policy: Policy, wgmma: bool) -> Self {
        let sync_each_launch = std::env::var("DILT_SYNC").is_ok_and(|value| !value.is_empty() && value != "0");
        Device(Arc::new(Inner {
            backend,
            policy,
            wgmma,
            sync_each_launch,
            recording: Mutex::new(None),
            trace: Mutex::new(None),
            recorded: AtomicUsize::new(0),
            deferred: Mutex::new(Vec::new()),
        }))
    }

    /// Another handle to the same device, with a stream of its own, whose kernels are cut into blocks by `policy`.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn with_policy(&self, policy: Policy) -> Result<Self> {
        Ok(Self::new(self.backend_again()?, policy, self.0.wgmma && policy == Policy::Staged))
    }

    /// Another handle to the same device, with a stream of its own, whose products in bf16 go by TMA and wgmma where these
    /// pay ([`Device::wgmma`]).
    ///
    /// # Errors
    /// [`Error::Usage`] where [`Device::has_wgmma`] says no; else as [`Device::open`].
    pub fn with_wgmma(&self) -> Result<Self> {
        if !self.has_wgmma() {
            let name = self.description();
            return Err(Error::Usage(format!("products by wgmma need a Hopper GPU and code for sm_90a, not '{name}'")));
        }
        Ok(Self::new(self.backend_again()?, Policy::Staged, true))
    }

    fn backend_again(&self) -> Result<Backend> {
        Ok(match &self.0.backend {
            Backend::Host(host) => Backend::Host(host.clone()),
            Backend::Cuda(cuda) => Backend::Cuda(cuda.reopen()?),
        })
    }

    /// Number of GPUs that can be used; 0 without a driver.
    pub fn cuda_count() -> usize {
        cuda::count()
    }

    /// The GPUs that can be used.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver fails.
    pub fn gpus() -> Result<Vec<Gpu>> {
        (0..cuda::count()).map(Gpu::find).collect()
    }

    /// Why [`Device::cuda_count`] is 0, or the driver's version.
    pub fn cuda_status() -> String {
        cuda::status()
    }

    /// What kernels compute with, for people and for the record of a run: `host v4`, `cuda sm_90 NVIDIA H200`.
    pub fn description(&self) -> String {
        let name = match &self.0.backend {
            Backend::Host(host) => host.description(),
            Backend::Cuda(cuda) => cuda.description(),
        };
        if self.0.wgmma { name + ", wgmma" } else { name }
    }

    /// Bytes of memory that can be allocated now, as far as the system says.
    pub fn free_memory(&self) -> Option<usize> {
        match &self.0.backend {
            Backend::Host(_) => host::free_memory(),
            Backend::Cuda(cuda) => cuda.free_memory(),
        }
    }

    /// How kernels are cut into blocks here.
    pub fn policy(&self) -> Policy {
        self.0.policy
    }

    /// Whether products in bf16 go by TMA and wgmma where these pay: `DILT_WGMMA=1`, or [`Device::with_wgmma`].
    pub fn wgmma(&self) -> bool {
        self.0.wgmma
    }

    /// Whether they could: on a Hopper GPU with its own code, and on the host, which can do everything.
    pub fn has_wgmma(&self) -> bool {
        match &self.0.backend {
            Backend::Host(_) => true,
            Backend::Cuda(cuda) => cuda.has_wgmma(),
        }
    }

    /// Whether a block of the kernel of this name has the shared memory that it needs: always on the host; smaller GPUs have
    /// less.
    pub(crate) fn has_shared_memory_for(&self, kernel: &str) -> bool {
        match &self.0.backend {
            Backend::Host(_) => true,
            Backend::Cuda(cuda) => cuda.has_shared_memory_for(kernel),
        }
    }

    /// Threads for a block that shares rows or elements among `staged` threads: `staged`, or 1 with direct policy.
    pub fn threads(&self, staged: u32) -> u32 {
        match self.0.policy {
            Policy::Staged => staged,
            Policy::Direct => 1,
        }
    }

    /// The launch of an elementwise kernel (`EACH`) over `count` elements.
    pub fn elementwise(&self, count: usize) -> Launch {
        let (threads, per_thread, most) = match self.0.policy {
            Policy::Staged => (256, 1, 4096),
            Policy::Direct => (1, 16_384, 1024),
        };
        Launch::new([count.div_ceil(threads * per_thread).clamp(1, most) as u32, 1, 1], threads as u32)
    }

    /// Memory for `len` elements, zeroed.
    ///
    /// # Errors
    /// [`Error::Device`] when memory runs out.
    pub fn alloc<T: bytemuck::Pod>(&self, len: usize) -> Result<Buffer<T>> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| Error::Device(format!("{len} elements overflow")))?;
        let address = match &self.0.backend {
            Backend::Host(_) => host::alloc(bytes)?,
            Backend::Cuda(cuda) => cuda.alloc(bytes)?,
        };
        Ok(Buffer::new(self.clone(), address, bytes, len))
    }

    /// Memory with the contents of `data`.
    ///
    /// # Errors
    /// As [`Device::alloc`] and [`Device::write`].
    pub fn upload<T: bytemuck::Pod>(&self, data: &[T]) -> Result<Buffer<T>> {
        let mut buffer = self.alloc(data.len())?;
        self.write(data, buffer.view_mut())?;
        Ok(buffer)
    }

    /// Copies `data` to the device; returns when `data` may change again.
    ///
    /// # Errors
    /// [`Error::Shape`] if the lengths differ, [`Error::Device`] if the copy fails or a step is being captured.
    pub fn write<T: bytemuck::Pod>(&self, data: &[T], to: SliceMut<T>) -> Result<()> {
        self.check_copy("write", data.len(), to.len())?;
        let bytes: &[u8] = bytemuck::cast_slice(data);
        match &self.0.backend {
            // SAFETY: `to` is valid for `to.len()` elements and exclusively borrowed; lengths are equal.
            Backend::Host(_) => unsafe { host::write(bytes, to.ptr().address()) },
            Backend::Cuda(cuda) => cuda.write(bytes, to.ptr().address())?,
        }
        Ok(())
    }

    /// Copies a slice from the device, after everything launched before.
    ///
    /// # Errors
    /// [`Error::Device`] if the copy fails or a step is being captured.
    pub fn read<T: bytemuck::Pod>(&self, from: Slice<T>) -> Result<Vec<T>> {
        self.check_copy("read", from.len(), from.len())?;
        let mut data = vec![T::zeroed(); from.len()];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut data);
        match &self.0.backend {
            // SAFETY: `from` is valid for `from.len()` elements, which is the length of `data`.
            Backend::Host(_) => unsafe { host::read(from.ptr().address(), bytes) },
            Backend::Cuda(cuda) => cuda.read(from.ptr().address(), bytes)?,
        }
        Ok(data)
    }

    fn check_copy(&self, op: &'static str, got: usize, expected: usize) -> Result<()> {
        if got != expected {
            let (expected, got) = (expected.to_string(), got.to_string());
            return Err(Error::Shape { op, what: "number of elements".into(), expected, got });
        }
        if lock(&self.0.recording).is_some() {
            return Err(Error::Device(format!("{op}: not possible while a step is being captured")));
        }
        Ok(())
    }

    /// Copies between two places on the device. Can be captured.
    ///
    /// # Errors
    /// [`Error::Shape`] if the lengths differ, [`Error::Device`] if the copy fails.
    pub fn copy<T: bytemuck::Pod>(&self, from: Slice<T>, to: SliceMut<T>) -> Result<()> {
        if from.len() != to.len() {
            let (expected, got) = (to.len().to_string(), from.len().to_string());
            return Err(Error::Shape { op: "copy", what: "number of elements".into(), expected, got });
        }
        let bytes = from.len() * size_of::<T>();
        self.submit(Work::Copy { from: from.ptr().address(), to: to.ptr().address(), bytes })
    }

    /// Sets every byte to zero. Can be captured.
    ///
    /// # Errors
    /// [`Error::Device`] if the device fails.
    pub fn zero<T: bytemuck::Pod>(&self, to: SliceMut<T>) -> Result<()> {
        self.submit(Work::Zero { to: to.ptr().address(), bytes: to.len() * size_of::<T>() })
    }

    /// Launches a kernel.
    ///
    /// # Errors
    /// [`Error::Launch`] with the kernel's name, grid and arguments.
    ///
    /// # Safety
    /// Every pointer in `args` is valid on this device for what the kernel reads and writes through it, and nothing
    /// else is written through two of them.
    pub(crate) unsafe fn launch<A: KernelArgs>(&self, kernel: &Kernel<A>, launch: Launch, args: &A) -> Result<()> {
        let fail = |problem: String| Error::Launch {
            kernel: kernel.name,
            grid: launch.grid,
            block: [launch.block, 1, 1],
            args: format!("{args:?}"),
            problem,
        };
        if launch.grid.contains(&0) || launch.grid[1].max(launch.grid[2]) > 65_535 {
            return Err(fail("the grid is empty, or has more than 65535 blocks in y or z".into()));
        }
        let args = kernel::ArgBytes::new(args);
        let submit = || self.submit(Work::Launch { kernel: kernel.name, launch, args });
        let result = if lock(&self.0.trace).is_some() { self.timed(kernel.name, submit) } else { submit() };
        result.map_err(|error| match error {
            Error::Device(problem) => fail(problem),
            other => other,
        })
    }

    /// Does a launch that is traced, and waits for it.
    fn timed(&self, kernel: &'static str, submit: impl FnOnce() -> Result<()>) -> Result<()> {
        let begun = self.event()?;
        let ms = submit().and_then(|()| self.event()?.elapsed_ms(&begun));
        let traced = Traced { kernel, ms: ms.as_ref().ok().copied() };
        lock(&self.0.trace).get_or_insert_default().push(traced);
        ms.map(drop)
    }

    /// Does `work`, waiting after each launch on this handle, and tells which kernels it launched, in order. Not while
    /// a step is being captured, whose launches are not done.
    pub fn trace(&self, work: impl FnOnce() -> Result<()>) -> (Vec<Traced>, Result<()>) {
        *lock(&self.0.trace) = Some(Vec::new());
        let result = work();
        (lock(&self.0.trace).take().unwrap_or_default(), result)
    }

    /// Does a piece of work now, or adds it to the step that is being recorded.
    fn submit(&self, work: Work) -> Result<()> {
        if let Some(list) = lock(&self.0.recording).as_mut() {
            list.push(work);
            return Ok(());
        }
        match &self.0.backend {
            Backend::Host(host) => host.run(&work),
            Backend::Cuda(cuda) => {
                cuda.run(&work)?;
                if self.0.sync_each_launch { cuda.synchronize() } else { Ok(()) }
            }
        }
    }

    /// Waits until everything launched has finished.
    ///
    /// # Errors
    /// [`Error::Device`] with the error of a kernel that failed since.
    pub fn synchronize(&self) -> Result<()> {
        match &self.0.backend {
            Backend::Host(_) => Ok(()),
            Backend::Cuda(cuda) => cuda.synchronize(),
        }
    }

    /// A point in time on this handle's stream.
    ///
    /// # Errors
    /// [`Error::Device`] if the device fails.
    pub fn event(&self) -> Result<Event> {
        Ok(match &self.0.backend {
            Backend::Host(_) => Event::Host(Instant::now()),
            Backend::Cuda(cuda) => Event::Cuda(cuda.event()?),
        })
    }

    fn free(&self, address: u64, bytes: usize) {
        if self.0.recorded.load(Ordering::SeqCst) > 0 {
            lock(&self.0.deferred).push((address, bytes));
            return;
        }
        match &self.0.backend {
            Backend::Host(_) => host::free(address, bytes),
            Backend::Cuda(cuda) => cuda.free(address),
        }
    }
}

/// A launch that [`Device::trace`] saw.
#[derive(Clone, Copy, Debug)]
pub struct Traced {
    /// Name in `kernels/`.
    pub kernel: &'static str,
    /// Milliseconds from submission to end; `None` if it failed.
    pub ms: Option<f64>,
}

/// A point in time on a stream; see [`Device::event`].
pub enum Event {
    #[doc(hidden)]
    Host(Instant),
    #[doc(hidden)]
    Cuda(cuda::Event),
}

impl Event {
    /// Milliseconds from `earlier` to this event; waits for both.
    ///
    /// # Errors
    /// [`Error::Device`] if the events are of different devices, or the device fails.
    pub fn elapsed_ms(&self, earlier: &Event) -> Result<f64> {
        match (earlier, self) {
            (Event::Host(from), Event::Host(to)) => Ok((*to - *from).as_secs_f64() * 1e3),
            (Event::Cuda(from), Event::Cuda(to)) => to.elapsed_ms(from),
            _ => Err(Error::Device("elapsed_ms: events of two devices".into())),
        }
    }
}
