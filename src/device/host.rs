//! The host device: kernels compiled for the CPU, blocks on a thread pool.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};

use rayon::prelude::*;

use super::graph::Work;
use super::kernel::{ArgBytes, HOST_SETS, host_kernel};
use super::{Launch, Policy, fiber};
use crate::error::{Error, Result};
use crate::profile::range;

/// Memory is aligned so that a row of samples starts on a cache line, on any machine.
const ALIGNMENT: usize = 256;

/// How the host device runs kernels.
#[derive(Clone, Copy, Debug)]
pub struct HostOptions {
    /// How kernels are cut into blocks.
    pub policy: Policy,
    /// Runs threads and blocks in a random order drawn from this seed (`DILT_HOST_SCHEDULE`), to show results that
    /// depend on order.
    pub schedule: Option<u64>,
    /// The instruction set (`DILT_HOST_ISA`: base, v3, v4); the best that this machine has if not given.
    pub isa: Option<&'static str>,
    /// Multiplies in bf16 as a Hopper GPU does where that pays there (`DILT_WGMMA`).
    pub wgmma: bool,
}

impl Default for HostOptions {
    fn default() -> Self {
        HostOptions { policy: Policy::Direct, schedule: None, isa: None, wgmma: false }
    }
}

impl HostOptions {
    /// What `DILT_HOST_SCHEDULE`, `DILT_HOST_ISA`, `DILT_HOST_POLICY` (`direct`, `staged`) and `DILT_WGMMA` (`0`, `1`) say.
    ///
    /// # Errors
    /// [`Error::Usage`] for a value that is not understood.
    pub fn from_environment() -> Result<Self> {
        let read = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let wrong = |name: &str, expected: &str, got: &str| {
            Error::Usage(format!("environment variable {name}: expected {expected}, got '{got}'"))
        };
        let mut options = HostOptions { wgmma: super::wgmma_from_environment()?, ..HostOptions::default() };
        if let Some(text) = read("DILT_HOST_SCHEDULE") {
            let seed = text.parse().map_err(|_| wrong("DILT_HOST_SCHEDULE", "a whole number", &text))?;
            options.schedule = Some(seed);
        }
        if let Some(text) = read("DILT_HOST_ISA") {
            let set = HOST_SETS.iter().find(|set| **set == text);
            options.isa = Some(set.ok_or_else(|| wrong("DILT_HOST_ISA", &HOST_SETS.join(", "), &text))?);
        }
        options.policy = match read("DILT_HOST_POLICY").as_deref() {
            None | Some("direct") => Policy::Direct,
            Some("staged") => Policy::Staged,
            Some(text) => return Err(wrong("DILT_HOST_POLICY", "direct or staged", text)),
        };
        Ok(options)
    }
}

#[derive(Clone)]
pub(super) struct Host {
    set: usize,
    schedule: Option<u64>,
}

/// Whether this machine can run the kernels of an instruction set.
fn supported(set: &str) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let v3 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("lzcnt")
            && is_x86_feature_detected!("movbe");
        let v4 = v3
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512cd")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        match set {
            "v4" => v4,
            "v3" => v3,
            _ => true,
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        set == "base"
    }
}

/// Threads that share the blocks of a launch.
pub fn host_threads() -> usize {
    rayon::current_num_threads()
}

impl Host {
    pub(super) fn new(options: HostOptions) -> Result<Self> {
        let set = match options.isa {
            None => HOST_SETS.iter().rposition(|set| supported(set)),
            Some(name) => HOST_SETS.iter().position(|set| *set == name && supported(set)),
        };
        let set = set.ok_or_else(|| {
            let wanted = options.isa.unwrap_or("base");
            Error::Usage(format!("host device: this machine cannot run the instruction set '{wanted}'"))
        })?;
        Ok(Host { set, schedule: options.schedule })
    }

    pub(super) fn description(&self) -> String {
        format!("host {}", HOST_SETS[self.set])
    }

    pub(super) fn run(&self, work: &Work) -> Result<()> {
        match work {
            Work::Launch { kernel, launch, args } => {
                let _range = range(kernel);
                self.launch(kernel, *launch, args).map_err(Error::Device)
            }
            // SAFETY: the caller of Device::copy and Device::zero holds views of both ranges, which do not overlap
            // since one of them is exclusive.
            Work::Copy { from, to, bytes } => unsafe {
                std::ptr::copy_nonoverlapping(*from as *const u8, *to as *mut u8, *bytes);
                Ok(())
            },
            // SAFETY: as above.
            Work::Zero { to, bytes } => unsafe {
                std::ptr::write_bytes(*to as *mut u8, 0, *bytes);
                Ok(())
            },
        }
    }

    fn launch(&self, name: &str, launch: Launch, args: &ArgBytes) -> std::result::Result<(), String> {
        let sets = host_kernel(name).ok_or("there is no kernel of this name in kernels/")?;
        let kernel = sets[self.set];
        if launch.block == 0 || launch.block > kernel.max_threads {
            return Err(format!("expected 1 to {} threads a block", kernel.max_threads));
        }
        if args.len() as u64 != kernel.args_bytes {
            return Err(format!("its argument has {} bytes in C++, {} in Rust", kernel.args_bytes, args.len()));
        }
        let [x, y, z] = launch.grid.map(u64::from);
        let blocks = x * y * z * args.tickets() as u64;
        let grid = fiber::Grid { kernel, args, launch, schedule: self.schedule };
        // Blocks of a launch are independent, so their order is free; with a schedule it is random, on one thread.
        match self.schedule {
            Some(seed) => {
                let order = fiber::permutation(seed ^ blocks, blocks as usize);
                grid.run(order.iter().map(|&block| block as u64))
            }
            None if blocks == 1 || cfg!(dilt_sanitize = "thread") => grid.run(0..blocks),
            None => {
                // A few pieces for each worker: cheap launches stay cheap, uneven blocks still balance.
                let pieces = (host_threads() as u64 * 8).min(blocks);
                (0..pieces)
                    .into_par_iter()
                    .try_for_each(|piece| grid.run(blocks * piece / pieces..blocks * (piece + 1) / pieces))
            }
        }
    }
}

fn layout(bytes: usize) -> Option<Layout> {
    Layout::from_size_align(bytes.max(1), ALIGNMENT).ok()
}

pub(super) fn alloc(bytes: usize) -> Result<u64> {
    let layout = layout(bytes).ok_or_else(|| Error::Device(format!("{bytes} bytes cannot be allocated")))?;
    // SAFETY: the layout has at least one byte.
    let memory = unsafe { alloc_zeroed(layout) };
    if memory.is_null() {
        if bytes < 1 << 20 {
            handle_alloc_error(layout);
        }
        return Err(Error::Device(format!("out of memory: {bytes} bytes asked for; try a smaller --batch")));
    }
    Ok(memory as u64)
}

pub(super) fn free(address: u64, bytes: usize) {
    let layout = layout(bytes).expect("was valid when allocated");
    // SAFETY: the address came from `alloc` with the same number of bytes.
    unsafe { dealloc(address as *mut u8, layout) };
}

/// What Linux says is available; nothing elsewhere.
pub(super) fn free_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// # Safety
/// `to` is valid for writing `data.len()` bytes.
pub(super) unsafe fn write(data: &[u8], to: u64) {
    // SAFETY: promised by the caller.
    unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to as *mut u8, data.len()) };
}

/// # Safety
/// `from` is valid for reading `data.len()` bytes.
pub(super) unsafe fn read(from: u64, data: &mut [u8]) {
    // SAFETY: promised by the caller.
    unsafe { std::ptr::copy_nonoverlapping(from as *const u8, data.as_mut_ptr(), data.len()) };
}
