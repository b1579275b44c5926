//! The threads of a block on the host: a plain loop where they never wait, coroutines where they do.
//!
//! A barrier or warp operation gives its place in the source to the scheduler and suspends. The scheduler runs each
//! warp until all its threads wait at a block barrier or have returned, then the next warp; when all threads of the
//! block wait at the same place it lets them go on. Threads that wait at different places, or wait for one that has
//! returned, are an error that names both places. A thread that waits for a phase of a barrier in shared memory goes on
//! when it is its turn and the phase is complete; where all wait for phases in vain, that is an error too.

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, c_char, c_void};
use std::num::NonZeroUsize;

use corosensei::stack::{Stack, StackPointer};
use corosensei::{Coroutine, CoroutineResult, Yielder};
use memmap2::MmapMut;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::kernel::{ArgBytes, HostIndex, HostKernel};
use super::shared::SharedMemory;
use super::{Launch, asan, tsan};

/// Stack of one GPU thread. Kernels keep their arrays in registers; sanitizers need room for their red zones.
const STACK_BYTES: usize = 256 * 1024;
/// Written at the end of each stack, and looked at after each block: a guard page per stack would use up the kernel's
/// table of mappings.
const CANARY: u64 = 0x5ca1_ab1e_0ddb_a115;
pub(super) const WARP: usize = 32;

/// A launch on the host; of several tickets, the blocks of one after those of the other.
pub(super) struct Grid<'a> {
    pub(super) kernel: &'a HostKernel,
    pub(super) args: &'a ArgBytes,
    pub(super) launch: Launch,
    pub(super) schedule: Option<u64>,
}

/// A seeded random order of `0..n`.
pub(super) fn permutation(seed: u64, n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    order
}

impl Grid<'_> {
    /// Runs these blocks, one after the other, on this thread.
    pub(super) fn run(&self, blocks: impl Iterator<Item = u64>) -> Result<(), String> {
        let tsan = tsan::Launch::begin();
        blocks.into_iter().try_for_each(|block| self.block(block, &tsan))
    }

    fn block(&self, block: u64, tsan: &tsan::Launch) -> Result<(), String> {
        let [x, y, z] = self.launch.grid.map(u64::from);
        let args = self.args.ticket((block / (x * y * z)) as usize);
        let mut shared = SharedMemory::new(self.kernel.shared_bytes as usize);
        let index = HostIndex {
            thread: [0; 3],
            block: [(block % x) as u32, (block / x % y) as u32, (block / (x * y) % z) as u32],
            block_dim: [self.launch.block, 1, 1],
            grid_dim: self.launch.grid,
            shared: shared.pointer(),
        };
        let threads = self.launch.block as usize;
        let result = if (threads == 1 || self.kernel.barrier_free != 0) && !cfg!(dilt_sanitize = "thread") {
            self.plain(args, index, threads, block)
        } else {
            self.coroutines(args, index, threads, block, tsan)
        };
        tsan.keep(shared);
        result
    }

    /// One thread after the other. Of a single thread, barriers ask nothing.
    fn plain(&self, args: *const c_void, index: HostIndex, threads: usize, block: u64) -> Result<(), String> {
        let one = |thread: usize| {
            let index = HostIndex { thread: [thread as u32, 0, 0], ..index };
            // SAFETY: the kernel's own contract, promised by the caller of Device::launch.
            unsafe { (self.kernel.thread)(args, &index) };
        };
        WAITED_AT.set(std::ptr::null());
        match self.schedule {
            Some(seed) => permutation(seed ^ block, threads).into_iter().for_each(one),
            None => (0..threads).for_each(one),
        }
        let site = WAITED_AT.replace(std::ptr::null());
        if threads > 1 && !site.is_null() {
            return Err(unexpected_wait(site));
        }
        Ok(())
    }

    fn coroutines(
        &self,
        args: *const c_void,
        index: HostIndex,
        threads: usize,
        block: u64,
        tsan: &tsan::Launch,
    ) -> Result<(), String> {
        STACKS.with_borrow_mut(|stacks| {
            stacks.reserve(threads)?;
            let state = Box::new(Block::new(tsan.block(threads), self.kernel.barrier_free != 0));
            let kernel = self.kernel.thread;
            let mut fibers: Vec<Fiber> = (0..threads)
                .map(|thread| {
                    let index = HostIndex { thread: [thread as u32, 0, 0], ..index };
                    let tsan = state.tsan[thread];
                    let state = &raw const *state;
                    let coroutine = Coroutine::with_stack(stacks.stack(thread), move |yielder: &Suspender, ()| {
                        // SAFETY: the block's state outlives its coroutines, which are dropped or reset before it.
                        unsafe { (&*state).suspenders[thread].set(yielder) };
                        tsan.begin();
                        // SAFETY: the kernel's own contract, promised by the caller of Device::launch.
                        unsafe { kernel(args, &index) };
                        tsan.end();
                    });
                    Fiber { coroutine, waits: None }
                })
                .collect();
            let previous = BLOCK.replace(&raw const *state);
            let mut order: Vec<usize> = (0..threads).collect();
            let mut draw = self.schedule.map(|seed| ChaCha8Rng::seed_from_u64(seed ^ block));
            let result = schedule(&state, &mut fibers, &mut order, &mut draw);
            BLOCK.set(previous);
            for (thread, fiber) in fibers.iter_mut().enumerate().filter(|(_, fiber)| !fiber.coroutine.done()) {
                // SAFETY: no destructor is on the stacks of suspended kernels: C++ without exceptions, and the two
                // functions of this file that suspend.
                unsafe { fiber.coroutine.force_reset() };
                asan::unpoison(stacks.stack(thread).limit.get() as u64, STACK_BYTES);
            }
            if result.is_err() {
                tsan.abandon();
            }
            let result = result.and(stacks.check(threads));
            if cfg!(dilt_sanitize = "thread") {
                // To ThreadSanitizer a stack that another thread takes over is a race; memory mapped anew is not.
                *stacks = Stacks::NONE;
            }
            result
        })
    }
}

/// Runs the threads of a block to their end.
fn schedule(
    state: &Block,
    fibers: &mut [Fiber],
    order: &mut [usize],
    draw: &mut Option<ChaCha8Rng>,
) -> Result<(), String> {
    loop {
        if let Some(draw) = draw {
            // Warps in random order, and the threads within each: a warp's lanes stay together.
            let mut warps: Vec<Vec<usize>> =
                (0..fibers.len()).collect::<Vec<_>>().chunks(WARP).map(Vec::from).collect();
            warps.shuffle(draw);
            warps.iter_mut().for_each(|warp| warp.shuffle(draw));
            warps.concat().into_iter().zip(&mut *order).for_each(|(thread, place)| *place = thread);
        }
        let mut ran = false;
        for warp in order.chunks(WARP) {
            ran |= run_warp(state, fibers, warp)?;
        }
        if let Some(wait) = fibers.iter().filter_map(|fiber| fiber.waits).find(|wait| wait.phase.is_some()) {
            if ran {
                continue;
            }
            return Err(format!("threads wait for a phase that nothing completes: {}", place(wait.site)));
        }
        let mut waiting = fibers.iter().filter_map(|fiber| fiber.waits.as_ref());
        let Some(first) = waiting.next() else { return Ok(()) };
        if let Some(other) = waiting.find(|wait| wait.site != first.site) {
            let (here, there) = (place(first.site), place(other.site));
            return Err(format!("threads of a block wait at different barriers: {here} and {there}"));
        }
        if fibers.iter().any(|fiber| fiber.waits.is_none()) {
            return Err(format!("some threads wait at {}, others have returned", place(first.site)));
        }
        fibers.iter_mut().for_each(|fiber| fiber.waits = None);
        state.barrier.set(state.barrier.get() + 1);
    }
}

/// Runs a warp until each of its threads has returned or waits at a block barrier or for a phase; whether any of them ran.
fn run_warp(state: &Block, fibers: &mut [Fiber], warp: &[usize]) -> Result<bool, String> {
    let mut ran = false;
    loop {
        for &thread in warp {
            if fibers[thread].waits.and_then(|wait| wait.phase).is_some_and(|phase| phase.complete()) {
                fibers[thread].waits = None;
            }
            if fibers[thread].waits.is_none() && !fibers[thread].coroutine.done() {
                ran = true;
                state.current.set(thread);
                state.tsan[thread].enter();
                if let CoroutineResult::Yield(wait) = fibers[thread].coroutine.resume(()) {
                    if state.barrier_free {
                        return Err(unexpected_wait(wait.site));
                    }
                    fibers[thread].waits = Some(wait);
                }
            }
        }
        let lanes = |fibers: &[Fiber]| warp.iter().filter_map(|&t| fibers[t].waits).find(|wait| wait.lanes != 0);
        let Some(wait) = lanes(fibers) else { return Ok(ran) };
        let named = |&&thread: &&usize| wait.lanes >> (thread % WARP) & 1 == 1;
        if warp.iter().filter(named).any(|&thread| fibers[thread].waits.is_some_and(|other| other.phase.is_some())) {
            return Ok(ran);
        }
        for &thread in warp.iter().filter(named) {
            match &fibers[thread].waits {
                Some(other) if other.site == wait.site && other.lanes == wait.lanes => {}
                Some(other) => {
                    let (here, there) = (place(wait.site), place(other.site));
                    return Err(format!("lanes of a warp wait at different places: {here} and {there}"));
                }
                None => return Err(format!("a lane that {} waits for has returned", place(wait.site))),
            }
        }
        for &thread in warp.iter().filter(named) {
            fibers[thread].waits = None;
        }
    }
}

/// Why a thread waits: the place in the source, and a phase, or the lanes of its warp (0: the whole block).
#[derive(Clone, Copy)]
struct Wait {
    site: *const c_char,
    lanes: u32,
    phase: Option<Phase>,
}

/// A phase of a barrier in shared memory: complete when the barrier's parity is the other one.
#[derive(Clone, Copy)]
struct Phase {
    current: *const u8,
    parity: u8,
}

impl Phase {
    fn complete(self) -> bool {
        // SAFETY: the block's shared memory outlives its threads, which run one at a time.
        unsafe { self.current.read_volatile() != self.parity }
    }
}

/// What a lane gives to its warp: registers of a fragment, or a smaller value in the first element.
type Given = [u64; 4];

type Suspender = Yielder<(), Wait>;

struct Fiber {
    coroutine: Coroutine<(), Wait, (), SlabStack>,
    waits: Option<Wait>,
}

/// What the waiting words of `kernels/lib/host.cuh` need of the block that runs on this OS thread.
struct Block {
    /// The kernel was declared so: only ThreadSanitizer makes coroutines of its threads.
    barrier_free: bool,
    current: Cell<usize>,
    suspenders: Vec<Cell<*const Suspender>>,
    /// What each lane gave to the last two warp operations: two, since a lane may reach the next operation before
    /// another has read the last.
    given: [Vec<Cell<Given>>; 2],
    turn: Vec<Cell<usize>>,
    /// Block barriers passed so far.
    barrier: Cell<usize>,
    /// Barriers of its warp that each thread has come to so far.
    warp_barrier: Vec<Cell<usize>>,
    tsan: Vec<tsan::Thread>,
}

thread_local! {
    static BLOCK: Cell<*const Block> = const { Cell::new(std::ptr::null()) };
    /// Where a kernel without coroutines waited last.
    static WAITED_AT: Cell<*const c_char> = const { Cell::new(std::ptr::null()) };
    static STACKS: RefCell<Stacks> = const { RefCell::new(Stacks::NONE) };
}

impl Block {
    fn new(tsan: Vec<tsan::Thread>, barrier_free: bool) -> Self {
        let threads = tsan.len();
        Block {
            barrier_free,
            current: Cell::new(0),
            suspenders: vec![Cell::new(std::ptr::null()); threads],
            given: [vec![Cell::new([0; 4]); threads], vec![Cell::new([0; 4]); threads]],
            turn: vec![Cell::new(0); threads],
            barrier: Cell::new(0),
            warp_barrier: vec![Cell::new(0); threads],
            tsan,
        }
    }

    fn wait(&self, thread: usize, wait: Wait) {
        let suspender = self.suspenders[thread].get();
        // SAFETY: set by this thread's coroutine when it began; it lives on that coroutine's stack, which is ours.
        unsafe { (*suspender).suspend(wait) };
    }
}

/// The block whose coroutines run on this OS thread; none while a kernel runs as a plain loop.
fn running_block<'a>() -> Option<&'a Block> {
    // SAFETY: set while the block's coroutines run, and only read from within them.
    unsafe { BLOCK.get().as_ref() }
}

#[unsafe(no_mangle)]
extern "C" fn dilt_host_barrier(site: *const c_char) {
    let Some(block) = running_block() else { return WAITED_AT.set(site) };
    let thread = block.current.get();
    let turn = block.barrier.get();
    block.tsan[thread].arrive(tsan::Barrier::Block, turn);
    block.wait(thread, Wait { site, lanes: 0, phase: None });
    block.tsan[thread].pass(tsan::Barrier::Block, turn);
}

#[unsafe(no_mangle)]
extern "C" fn dilt_host_warp_barrier(site: *const c_char) {
    let Some(block) = running_block() else { return WAITED_AT.set(site) };
    let thread = block.current.get();
    let turn = block.warp_barrier[thread].get();
    block.warp_barrier[thread].set(turn + 1);
    block.tsan[thread].arrive(tsan::Barrier::Warp, turn);
    block.wait(thread, Wait { site, lanes: u32::MAX, phase: None });
    block.tsan[thread].pass(tsan::Barrier::Warp, turn);
}

/// Waits until the barrier `object`, whose parity lies at `current`, has completed the phase of this parity.
#[unsafe(no_mangle)]
extern "C" fn dilt_host_phase(site: *const c_char, current: *const u8, parity: u32, object: *const c_void) {
    let Some(block) = running_block() else { return WAITED_AT.set(site) };
    let thread = block.current.get();
    let phase = Phase { current, parity: parity as u8 };
    if !phase.complete() {
        block.tsan[thread].leave();
        block.wait(thread, Wait { site, lanes: 0, phase: Some(phase) });
    }
    tsan::acquire(object);
}

#[unsafe(no_mangle)]
extern "C" fn dilt_host_exchange(site: *const c_char, lanes: u32, value: u64, xor: u32, add: u32) -> u64 {
    let Some(block) = running_block() else {
        WAITED_AT.set(site);
        return value;
    };
    let thread = block.current.get();
    let given = give(block, thread, site, lanes, [value, 0, 0, 0]);
    let source = ((thread % WARP) ^ xor as usize) + add as usize;
    match given.get(thread / WARP * WARP + source) {
        Some(from) if source < WARP => from.get()[0],
        _ => value,
    }
}

#[unsafe(no_mangle)]
extern "C" fn dilt_host_ballot(site: *const c_char, lanes: u32, predicate: u32) -> u32 {
    let Some(block) = running_block() else {
        WAITED_AT.set(site);
        return predicate;
    };
    let thread = block.current.get();
    let given = give(block, thread, site, lanes, [u64::from(predicate), 0, 0, 0]);
    let warp = given[thread / WARP * WARP..].iter().take(WARP).enumerate();
    warp.filter(|(lane, _)| lanes >> lane & 1 == 1)
        .fold(0, |votes, (lane, vote)| votes | (vote.get()[0] as u32) << lane)
}

/// What all 32 lanes of the warp give, each the four words at `value`; the result lies there until the lane's next but one
/// warp operation.
#[unsafe(no_mangle)]
extern "C" fn dilt_host_gather(site: *const c_char, value: *const Given) -> *const Given {
    static NOTHING: [Given; WARP] = [[0; 4]; WARP];
    let Some(block) = running_block() else {
        WAITED_AT.set(site);
        return NOTHING.as_ptr();
    };
    let thread = block.current.get();
    // SAFETY: the caller's own array.
    let given = give(block, thread, site, u32::MAX, unsafe { *value });
    given[thread / WARP * WARP..].as_ptr().cast()
}

/// Gives a value to the warp, waits for the lanes, returns what all have given.
fn give(block: &Block, thread: usize, site: *const c_char, lanes: u32, value: Given) -> &[Cell<Given>] {
    let turn = block.turn[thread].get();
    block.turn[thread].set(1 - turn);
    block.given[turn][thread].set(value);
    // A warp operation exchanges values, but orders no memory.
    block.tsan[thread].leave();
    block.wait(thread, Wait { site, lanes, phase: None });
    &block.given[turn]
}

fn unexpected_wait(site: *const c_char) -> String {
    format!("declared free of barriers, but waits at {}", place(site))
}

fn place(site: *const c_char) -> String {
    // SAFETY: sites are string literals of the kernels.
    unsafe { CStr::from_ptr(site) }.to_string_lossy().into_owned()
}

/// Stacks of one worker's coroutines, in one mapping.
struct Stacks {
    memory: Option<MmapMut>,
    count: usize,
}

/// A piece of [`Stacks`].
struct SlabStack {
    limit: NonZeroUsize,
}

// SAFETY: the stack is 256 KiB. In place of a guard page it has a canary at its end, looked at after each block, since
// a page per stack would exhaust the kernel's mappings; kernels use a few KiB.
unsafe impl Stack for SlabStack {
    fn base(&self) -> StackPointer {
        self.limit.checked_add(STACK_BYTES).expect("within the mapping")
    }

    fn limit(&self) -> StackPointer {
        self.limit
    }
}

impl Stacks {
    const NONE: Stacks = Stacks { memory: None, count: 0 };

    fn reserve(&mut self, count: usize) -> Result<(), String> {
        if count > self.count {
            let mut memory = MmapMut::map_anon(count * STACK_BYTES)
                .map_err(|error| format!("no memory for the stacks of {count} threads: {error}"))?;
            for stack in memory.chunks_mut(STACK_BYTES) {
                stack[..8].copy_from_slice(&CANARY.to_ne_bytes());
            }
            (self.memory, self.count) = (Some(memory), count);
        }
        Ok(())
    }

    fn stack(&mut self, thread: usize) -> SlabStack {
        let memory = self.memory.as_mut().expect("reserved before").as_mut_ptr();
        SlabStack { limit: NonZeroUsize::new(memory as usize + thread * STACK_BYTES).expect("a mapping is not at 0") }
    }

    fn check(&self, count: usize) -> Result<(), String> {
        let memory = self.memory.as_ref().expect("reserved before");
        let broken = memory.chunks(STACK_BYTES).take(count).position(|stack| stack[..8] != CANARY.to_ne_bytes());
        broken.map_or(Ok(()), |thread| {
            // The neighbour's stack is already damaged: nothing can be trusted from here on.
            eprintln!("dilt: host device: thread {thread} of a block used more than {STACK_BYTES} bytes of stack");
            std::process::abort()
        })
    }
}
