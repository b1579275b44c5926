//! Kernels as Rust sees them: a name, one argument struct, a launch shape.

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::sync::OnceLock;

use super::Device;
use crate::error::Result;

/// Name and fields of an argument struct, as a kernel file declares it.
type CppStruct = (&'static str, &'static [&'static str]);

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// One constant per kernel and instruction set, made by the KERNEL macro of `kernels/lib/host.cuh`.
#[repr(C)]
pub(crate) struct HostKernel {
    pub(super) thread: unsafe extern "C" fn(args: *const c_void, index: *const HostIndex),
    pub(super) args_bytes: u64,
    pub(super) shared_bytes: u32,
    pub(super) max_threads: u32,
    pub(super) barrier_free: u32,
}

/// Where a thread stands, as `kernels/lib/host.cuh` declares it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct HostIndex {
    pub(super) thread: [u32; 3],
    pub(super) block: [u32; 3],
    pub(super) block_dim: [u32; 3],
    pub(super) grid_dim: [u32; 3],
    pub(super) shared: *mut c_void,
}

/// The host entries of a kernel, one for each instruction set.
pub(super) fn host_kernel(name: &str) -> Option<&'static [&'static HostKernel]> {
    static KERNELS: OnceLock<HashMap<&str, &[&HostKernel]>> = OnceLock::new();
    KERNELS.get_or_init(|| HOST_KERNELS.iter().copied().collect()).get(name).copied()
}

/// A kernel of `kernels/*.cu` and the type of its one argument.
pub struct Kernel<A> {
    pub(crate) name: &'static str,
    args: PhantomData<fn(A)>,
}

impl<A> Kernel<A> {
    /// The kernel of this name. [`crate::ops::layouts`] is tested against the C++ structs; names are tested by use.
    pub const fn new(name: &'static str) -> Self {
        Kernel { name, args: PhantomData }
    }
}

/// Blocks, and threads of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
}

impl Launch {
    /// A launch of `grid` blocks of `block` threads.
    pub fn new(grid: [u32; 3], block: u32) -> Self {
        Launch { grid, block }
    }
}

/// An address in device memory, as a field of an argument struct.
#[repr(transparent)]
pub struct Ptr<T>(u64, PhantomData<fn() -> T>);

impl<T> Default for Ptr<T> {
    fn default() -> Self {
        Ptr::null()
    }
}

impl<T> Ptr<T> {
    pub(super) fn new(address: u64) -> Self {
        Ptr(address, PhantomData)
    }

    /// No memory: the kernel leaves out what it would read or write there.
    pub fn null() -> Self {
        Ptr(0, PhantomData)
    }

    pub(super) fn address(self) -> u64 {
        self.0
    }
}

impl<T> Clone for Ptr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Ptr<T> {}

impl<T> fmt::Debug for Ptr<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Name, size and fields of an argument struct.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Name, the same in C++.
    pub name: &'static str,
    /// Size in bytes.
    pub size: usize,
    /// Name, offset and size of each field, in order.
    pub fields: Vec<(&'static str, usize, usize)>,
}

/// A plain `repr(C)` struct that a kernel takes by value.
///
/// # Safety
/// The struct is `repr(C)` and has the layout of the C++ struct of the same name; `kernel_args!` implements this, and
/// a test compares the layouts.
pub unsafe trait KernelArgs: Copy + fmt::Debug + Send + Sync + 'static {
    /// The Rust side of the layout.
    fn layout() -> Layout;
}

/// Declares argument structs, with the names and the order of fields of their C++ side.
macro_rules! kernel_args {
    ($($(#[$meta:meta])* $vis:vis struct $name:ident {
        $($field_vis:vis $field:ident: $type:ty),* $(,)?
    })*) => {$(
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        $vis struct $name { $($field_vis $field: $type),* }

        // SAFETY: repr(C) is set above; the layout test compares the fields with the C++ struct's.
        unsafe impl $crate::device::KernelArgs for $name {
            fn layout() -> $crate::device::Layout {
                fn size_of_field<S, F>(_: impl Fn(&S) -> &F) -> usize { size_of::<F>() }
                $crate::device::Layout {
                    name: stringify!($name),
                    size: size_of::<$name>(),
                    fields: vec![$((
                        stringify!($field),
                        std::mem::offset_of!($name, $field),
                        size_of_field(|s: &$name| &s.$field),
                    )),*],
                }
            }
        }
    )*};
}
pub(crate) use kernel_args;

/// The bytes of an argument struct, as aligned as any struct is; or of several, of the tickets of one launch.
#[derive(Clone)]
pub(super) struct ArgBytes {
    lines: Box<[Line]>,
    /// Of one struct.
    bytes: usize,
    tickets: usize,
}

#[repr(align(128))]
#[derive(Clone, Copy)]
struct Line(#[expect(dead_code, reason = "read through a pointer")] [u64; 16]);

impl ArgBytes {
    pub(super) fn new<A: KernelArgs>(args: &A) -> Self {
        const { assert!(align_of::<A>() <= align_of::<Line>()) };
        let mut lines = Self::lines(size_of::<A>());
        // SAFETY: the lines are large enough and aligned for `A`, which is `Copy`, and live as long as the box.
        unsafe { lines.as_mut_ptr().cast::<A>().write(*args) };
        ArgBytes { lines, bytes: size_of::<A>(), tickets: 1 }
    }

    fn lines(bytes: usize) -> Box<[Line]> {
        vec![Line([0; 16]); bytes.div_ceil(size_of::<Line>())].into_boxed_slice()
    }

    /// Most structs of so many bytes that one launch takes: `ArrayArgs` of `kernels/lib/device.cuh`, whose 4 KiB are the most
    /// that every driver takes.
    pub(super) fn most_tickets(bytes: usize) -> usize {
        ((4096 - size_of::<Line>()) / bytes).min(16)
    }

    /// The `ArrayArgs` of some tickets, of structs of one kernel: these, room up to the most, and blocks in y of each.
    pub(super) fn array(tickets: &[&ArgBytes], height: u32) -> Self {
        let bytes = tickets[0].bytes;
        let most = Self::most_tickets(bytes);
        assert!(tickets.len() <= most && tickets.iter().all(|ticket| ticket.bytes == bytes && ticket.tickets == 1));
        let mut lines = Self::lines(most * bytes + size_of::<u32>());
        let to = lines.as_mut_ptr().cast::<u8>();
        for (place, ticket) in tickets.iter().enumerate() {
            // SAFETY: the lines have room for `most` structs and a number.
            unsafe { to.add(place * bytes).copy_from_nonoverlapping(ticket.as_ptr().cast(), bytes) };
        }
        // SAFETY: as above; structs are as aligned as the number is.
        unsafe { to.add(most * bytes).cast::<u32>().write(height) };
        ArgBytes { lines, bytes, tickets: tickets.len() }
    }

    pub(super) fn as_ptr(&self) -> *const c_void {
        self.lines.as_ptr().cast()
    }

    /// The struct of a ticket.
    pub(super) fn ticket(&self, ticket: usize) -> *const c_void {
        assert!(ticket < self.tickets);
        // SAFETY: so many structs lie there.
        unsafe { self.as_ptr().byte_add(ticket * self.bytes) }
    }

    /// Bytes of one struct.
    pub(super) fn len(&self) -> usize {
        self.bytes
    }

    pub(super) fn tickets(&self) -> usize {
        self.tickets
    }
}

/// Stem and bytes of each embedded fat binary; empty in a build without nvcc.
pub fn embedded_images() -> impl Iterator<Item = (&'static str, &'static [u8])> {
    CUDA_IMAGES.iter().copied()
}

/// The GPU architectures that every embedded image has machine code for, as nvcc names them; the first as PTX too.
pub fn embedded_archs() -> &'static [&'static str] {
    CUDA_ARCHS
}

/// The instruction sets that the host kernels are compiled for, best last.
pub fn host_instruction_sets() -> &'static [&'static str] {
    HOST_SETS
}

/// Stem of each kernel file and the kernels in it.
pub fn kernel_files() -> impl Iterator<Item = (&'static str, &'static [&'static str])> {
    KERNEL_FILES.iter().copied()
}

kernel_args! {
    /// Argument of the generated `layout_<stem>` kernels.
    struct LayoutArgs { out: Ptr<u32> }
}

impl Device {
    /// The C++ side of every argument struct, as this device's kernels see it; once if all files that include it agree.
    ///
    /// # Errors
    /// As [`Device::alloc`] and [`Device::read`].
    pub fn cpp_layouts(&self) -> Result<Vec<Layout>> {
        let mut layouts = Vec::new();
        for &(stem, structs) in STRUCTS {
            let numbers: usize = structs.iter().map(|(_, fields)| 1 + 2 * fields.len()).sum();
            let mut out = self.alloc::<u32>(numbers)?;
            let kernels = KERNEL_FILES.iter().find(|(file, _)| *file == stem).map_or(&[][..], |(_, kernels)| kernels);
            let name = kernels.last().expect("the generated kernel comes last");
            let args = LayoutArgs { out: out.view_mut().ptr() };
            // SAFETY: the kernel writes one number per struct and two per field, which is the length of `out`.
            unsafe { self.launch(&Kernel::<LayoutArgs>::new(name), Launch::new([1; 3], 1), &args)? };
            let mut numbers = self.read(out.view())?.into_iter().map(|number| number as usize);
            let mut next = || numbers.next().expect("counted above");
            for &(name, fields) in structs {
                let size = next();
                let fields = fields.iter().map(|&field| (field, next(), next())).collect();
                let layout = Layout { name, size, fields };
                if !layouts.contains(&layout) {
                    layouts.push(layout);
                }
            }
        }
        Ok(layouts)
    }
}
