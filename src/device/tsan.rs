//! What ThreadSanitizer must be told of the threads of a GPU, so that it finds their races on the host device.
//!
//! In a build with `DILT_SANITIZE=thread` each GPU thread is a fiber of its own to ThreadSanitizer, and switching
//! between fibers orders nothing. What orders: a launch before all its threads, a block barrier between the threads of
//! its block, all threads before the end of the launch. Fibers and shared memory live until the launch ends, so that
//! nothing is reused within it. Launches of several OS threads take turns. In other builds everything here is empty.
//!
//! Rust's own synchronisation is not instrumented, so calls from there (malloc, memcpy) are left out: the option below.
//! What a kernel copies by a call of memcpy, which for a few bytes is no call, is left out with them.

use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::fiber::SharedMemory;

const ON: bool = cfg!(dilt_sanitize = "thread");
/// ThreadSanitizer knows about 8,000 threads at a time; past this many, finished ones are given back early.
const MOST_FIBERS: usize = 6000;
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
    c"ignore_interceptors_accesses=1".as_ptr()
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

/// Held during a launch, so that all launches together stay under [`MOST_FIBERS`].
static ALONE: Mutex<()> = Mutex::new(());

/// A launch: what is before all its threads and after all of them.
pub(super) struct Launch {
    _alone: Option<MutexGuard<'static, ()>>,
    /// Before the threads, after the threads.
    objects: Option<Objects>,
    kept: RefCell<Kept>,
}

#[derive(Default)]
struct Kept {
    shared: Vec<SharedMemory>,
    barriers: Vec<Objects>,
    fibers: Vec<*mut c_void>,
}

/// What a GPU thread needs of its launch and block.
#[derive(Clone, Copy)]
pub(super) struct Thread {
    launch: *const [u64; 2],
    barriers: *const [u64; 2],
    fiber: *mut c_void,
}

fn address(objects: *const [u64; 2], which: usize) -> *const c_void {
    objects.cast::<u64>().wrapping_add(which).cast()
}

impl Launch {
    pub(super) fn begin() -> Self {
        let alone = ON.then(|| ALONE.lock().unwrap_or_else(PoisonError::into_inner));
        let objects = ON.then(Objects::default);
        if let Some(objects) = &objects {
            // SAFETY: only addresses are used, of memory that lives as long as the launch.
            unsafe {
                SCHEDULER.set(__tsan_get_current_fiber());
                __tsan_release(address(&raw const **objects, 0));
            }
        }
        Launch { _alone: alone, objects, kept: RefCell::default() }
    }

    /// The threads of one more block.
    pub(super) fn block(&self, threads: usize) -> Vec<Thread> {
        let none = Thread { launch: std::ptr::null(), barriers: std::ptr::null(), fiber: std::ptr::null_mut() };
        let Some(launch) = &self.objects else { return vec![none; threads] };
        if self.kept.borrow().fibers.len() + threads > MOST_FIBERS {
            self.give_back();
        }
        let barriers = Objects::default();
        let thread = Thread { launch: &raw const **launch, barriers: &raw const *barriers, ..none };
        let mut kept = self.kept.borrow_mut();
        kept.barriers.push(barriers);
        // SAFETY: creating a fiber asks nothing.
        let block: Vec<_> =
            (0..threads).map(|_| Thread { fiber: unsafe { __tsan_create_fiber(0) }, ..thread }).collect();
        kept.fibers.extend(block.iter().map(|thread| thread.fiber));
        block
    }

    /// Keeps a block's shared memory until the launch ends, so that no other block gets the same addresses.
    pub(super) fn keep(&self, shared: SharedMemory) {
        if ON {
            self.kept.borrow_mut().shared.push(shared);
        }
    }

    fn give_back(&self) {
        let Some(objects) = &self.objects else { return };
        let kept = self.kept.take();
        // SAFETY: the fibers' threads have returned or were abandoned, and we are on the scheduler's.
        unsafe {
            __tsan_acquire(address(&raw const **objects, 1));
            kept.fibers.into_iter().for_each(|fiber| __tsan_destroy_fiber(fiber));
        }
    }
}

impl Drop for Launch {
    fn drop(&mut self) {
        self.give_back();
    }
}

impl Thread {
    /// Called by the scheduler before it resumes this thread.
    pub(super) fn enter(self) {
        // SAFETY: the fiber lives until the launch ends.
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

    /// Called on this thread when it comes to the block's barrier number `turn`.
    pub(super) fn arrive(self, turn: usize) {
        // SAFETY: the block's objects live until the launch ends.
        unsafe { __tsan_release(address(self.barriers, turn % 2)) };
        self.leave();
    }

    /// Called on this thread when the barrier lets it go on.
    pub(super) fn pass(self, turn: usize) {
        // SAFETY: as in `arrive`.
        unsafe { __tsan_acquire(address(self.barriers, turn % 2)) };
    }
}
