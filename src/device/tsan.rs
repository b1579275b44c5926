//! What ThreadSanitizer must be told of the threads of a GPU, so that it finds their races on the host device.
//!
//! In a build with `DILT_SANITIZE=thread` each GPU thread is a fiber of its own to ThreadSanitizer, and switching
//! between fibers orders nothing. What orders: a launch before all its threads, a block barrier between the threads of
//! its block, all threads before the end of the launch. Shared memory lives until the launch ends, so that no address is
//! reused within it. Launches of several OS threads take turns. In other builds everything here is empty.
//!
//! Rust's own synchronisation is not instrumented, so calls from there (malloc, memcpy) are left out: the option below.
//! What a kernel copies by a call of memcpy, which for a few bytes is no call, is left out with them.

use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::fiber::WARP;
use super::shared::SharedMemory;

const ON: bool = cfg!(dilt_sanitize = "thread");
/// ThreadSanitizer knows about 8,000 threads at a time, and is slower the more there are.
const MOST_FIBERS: usize = 2048;
/// Flag of a switch that orders nothing.
const NO_SYNC: u32 = 1;

#[cfg(dilt_sanitize = "thread")]
unsafe extern "C" {
    fn __tsan_get_current_fiber() -> *mut c_void;
    fn __tsan_create_fiber(flags: u32) -> *mut c_void;
    fn __tsan_destroy_fiber(fiber: *mut c_void);
    fn __tsan_switch_to_fiber(fiber: *mut c_void, flags: u32);
    fn __tsan_acquire(object: *const c_void);
    fn __tsan_release(object: *const c_void);
}

#[cfg(dilt_sanitize = "thread")]
#[unsafe(no_mangle)]
extern "C" fn __tsan_default_options() -> *const std::ffi::c_char {
    // A short history of each fiber: with longer ones a few thousand take gigabytes.
    c"ignore_interceptors_accesses=1:history_size=0".as_ptr()
}

#[cfg(not(dilt_sanitize = "thread"))]
mod off {
    use super::c_void;
    pub(super) unsafe fn __tsan_get_current_fiber() -> *mut c_void {
        std::ptr::null_mut()
    }
    pub(super) unsafe fn __tsan_create_fiber(_: u32) -> *mut c_void {
        std::ptr::null_mut()
    }
    pub(super) unsafe fn __tsan_destroy_fiber(_: *mut c_void) {}
    pub(super) unsafe fn __tsan_switch_to_fiber(_: *mut c_void, _: u32) {}
    pub(super) unsafe fn __tsan_acquire(_: *const c_void) {}
    pub(super) unsafe fn __tsan_release(_: *const c_void) {}
}
#[cfg(not(dilt_sanitize = "thread"))]
use off::*;

thread_local! {
    static SCHEDULER: Cell<*mut c_void> = const { Cell::new(std::ptr::null_mut()) };
}

/// A pair of addresses that stand for synchronisation objects.
type Objects = Box<[u64; 2]>;

/// The fibers that all launches use in turn, since making one costs a tenth of a millisecond. A launch is after every
/// earlier one, so a fiber's past orders nothing within it.
static FIBERS: Mutex<Fibers> = Mutex::new(Fibers(Vec::new()));

struct Fibers(Vec<*mut c_void>);

// SAFETY: fibers belong to no OS thread, and the mutex lets one at a time use them.
unsafe impl Send for Fibers {}

/// A launch: what is before all its threads and after all of them.
pub(super) struct Launch {
    running: Option<RefCell<Running>>,
}

struct Running {
    fibers: MutexGuard<'static, Fibers>,
    /// Before the threads, after the threads.
    objects: Objects,
    blocks: usize,
    shared: Vec<SharedMemory>,
    /// Of each block: its barriers, then those of each warp.
    barriers: Vec<Box<[[u64; 2]]>>,
}

/// Called on a thread that what was released on `object` is before from now on.
pub(super) fn acquire(object: *const c_void) {
    // SAFETY: only the address is used.
    unsafe { __tsan_acquire(object) };
}

/// Whose barrier a thread comes to.
#[derive(Clone, Copy)]
pub(super) enum Barrier {
    Block,
    Warp,
}

/// What a GPU thread needs of its launch and block.
#[derive(Clone, Copy)]
pub(super) struct Thread {
    launch: *const [u64; 2],
    barriers: *const [u64; 2],
    warp: *const [u64; 2],
    fiber: *mut c_void,
}

fn address(objects: *const [u64; 2], which: usize) -> *const c_void {
    objects.cast::<u64>().wrapping_add(which).cast()
}

impl Launch {
    pub(super) fn begin() -> Self {
        let running = ON.then(|| {
            let fibers = FIBERS.lock().unwrap_or_else(PoisonError::into_inner);
            let objects = Objects::default();
            // SAFETY: only addresses are used, of memory that lives as long as the launch.
            unsafe {
                SCHEDULER.set(__tsan_get_current_fiber());
                __tsan_release(address(&raw const *objects, 0));
            }
            RefCell::new(Running { fibers, objects, blocks: 0, shared: Vec::new(), barriers: Vec::new() })
        });
        Launch { running }
    }

    /// The threads of one more block.
    pub(super) fn block(&self, threads: usize) -> Vec<Thread> {
        let null = std::ptr::null();
        let none = Thread { launch: null, barriers: null, warp: null, fiber: std::ptr::null_mut() };
        let Some(running) = &self.running else { return vec![none; threads] };
        let running = &mut *running.borrow_mut();
        let first = threads * place(running.blocks, MOST_FIBERS / threads);
        running.blocks += 1;
        while running.fibers.0.len() < first + threads {
            // SAFETY: creating a fiber asks nothing.
            running.fibers.0.push(unsafe { __tsan_create_fiber(0) });
        }
        running.barriers.push(vec![[0; 2]; 1 + threads.div_ceil(WARP)].into_boxed_slice());
        let barriers = running.barriers.last().expect("just pushed");
        let launch = &raw const *running.objects;
        let fibers = running.fibers.0[first..][..threads].iter().enumerate();
        let thread = |(thread, &fiber)| Thread {
            launch,
            barriers: &raw const barriers[0],
            warp: &raw const barriers[1 + thread / WARP],
            fiber,
        };
        fibers.map(thread).collect()
    }

    /// Keeps a block's shared memory until the launch ends, so that no other block gets the same addresses.
    pub(super) fn keep(&self, shared: SharedMemory) {
        if let Some(running) = &self.running {
            running.borrow_mut().shared.push(shared);
        }
    }

    /// Ends the use of all fibers, whose threads were abandoned in the middle of a kernel.
    pub(super) fn abandon(&self) {
        if let Some(running) = &self.running {
            for fiber in running.borrow_mut().fibers.0.drain(..) {
                // SAFETY: we are on the scheduler's fiber, and nothing goes on with these.
                unsafe { __tsan_destroy_fiber(fiber) };
            }
        }
    }
}

/// Which of `places` ranges of fibers a launch's block number `block` uses. Races between two blocks on one range are
/// not seen, so once all are used, the ranges follow no pattern that the blocks of a kernel might have.
fn place(block: usize, places: usize) -> usize {
    if block < places {
        return block;
    }
    ((block as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize % places
}

impl Drop for Launch {
    fn drop(&mut self) {
        if let Some(running) = &mut self.running {
            // SAFETY: the object lives until the end of this function.
            unsafe { __tsan_acquire(address(&raw const *running.get_mut().objects, 1)) };
        }
    }
}

impl Thread {
    /// Called by the scheduler before it resumes this thread.
    pub(super) fn enter(self) {
        // SAFETY: the fiber lives at least until the launch ends.
        unsafe { __tsan_switch_to_fiber(self.fiber, NO_SYNC) };
    }

    /// Called on this thread before control goes back to the scheduler.
    pub(super) fn leave(self) {
        // SAFETY: the scheduler's fiber is that of the OS thread.
        unsafe { __tsan_switch_to_fiber(SCHEDULER.get(), NO_SYNC) };
    }

    /// Called on this thread first.
    pub(super) fn begin(self) {
        // SAFETY: the launch's objects outlive its threads.
        unsafe { __tsan_acquire(address(self.launch, 0)) };
    }

    /// Called on this thread last.
    pub(super) fn end(self) {
        // SAFETY: as in `begin`.
        unsafe { __tsan_release(address(self.launch, 1)) };
        self.leave();
    }

    /// Called on this thread when it comes to barrier number `turn` of its block or warp.
    pub(super) fn arrive(self, of: Barrier, turn: usize) {
        // SAFETY: the block's objects live until the launch ends.
        unsafe { __tsan_release(address(self.objects(of), turn % 2)) };
        self.leave();
    }

    /// Called on this thread when the barrier lets it go on.
    pub(super) fn pass(self, of: Barrier, turn: usize) {
        // SAFETY: as in `arrive`.
        unsafe { __tsan_acquire(address(self.objects(of), turn % 2)) };
    }

    fn objects(self, of: Barrier) -> *const [u64; 2] {
        match of {
            Barrier::Block => self.barriers,
            Barrier::Warp => self.warp,
        }
    }
}
