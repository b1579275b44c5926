//! Steps that are recorded once and done again and again; those of several trainings together.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use super::kernel::ArgBytes;
use super::{Backend, Device, Launch, cuda, lock};
use crate::error::{Error, Result};

/// A piece of work.
#[derive(Clone)]
pub(super) enum Work {
    /// Of one ticket, or of several that launch the same kernel in the same shape, each with its own arguments.
    Launch {
        kernel: &'static str,
        launch: Launch,
        args: ArgBytes,
    },
    Copy {
        from: u64,
        to: u64,
        bytes: usize,
    },
    Zero {
        to: u64,
        bytes: usize,
    },
}

/// What a step launches, copies and zeroes, in order: to be replayed alone, or together with others.
pub struct Recording {
    work: Vec<Work>,
    memory: KeptMemory,
}

/// While this lives, memory that is dropped stays where it is: a recorded step may use it.
struct KeptMemory(Device);

impl KeptMemory {
    fn of(device: &Device) -> Self {
        device.0.recorded.fetch_add(1, Ordering::SeqCst);
        KeptMemory(device.clone())
    }
}

impl Drop for KeptMemory {
    fn drop(&mut self) {
        let device = &self.0;
        if device.0.recorded.fetch_sub(1, Ordering::SeqCst) == 1 {
            // What the step was using may still run; an error here would have shown, or will show, elsewhere.
            let _ = device.synchronize();
            let deferred = std::mem::take(&mut *lock(&device.0.deferred));
            deferred.into_iter().for_each(|(address, bytes)| device.free(address, bytes));
        }
    }
}

/// A step, or several together, to be done again and again.
pub struct Graph {
    device: Device,
    captured: Captured,
    launches: Vec<(&'static str, usize)>,
    _memory: Vec<KeptMemory>,
}

enum Captured {
    Host(Vec<Work>),
    Cuda(cuda::Graph),
}

impl Device {
    /// Records the launches, copies and zeroings of `step` without doing them. Run the step once before, so that an error
    /// of a launch shows there. Nothing may be allocated, written or read inside.
    ///
    /// # Errors
    /// What `step` returns, or [`Error::Device`] if a step is being recorded already.
    pub fn record(&self, step: impl FnOnce() -> Result<()>) -> Result<Recording> {
        if lock(&self.0.recording).is_some() {
            return Err(Error::Device("capture: a step is being captured already".into()));
        }
        *lock(&self.0.recording) = Some(Vec::new());
        let result = step();
        let work = lock(&self.0.recording).take().unwrap_or_default();
        result.map(|()| Recording { work, memory: KeptMemory::of(self) })
    }

    /// A recorded step by itself.
    ///
    /// # Errors
    /// As [`Device::record`] and [`Device::together`].
    pub fn capture(&self, step: impl FnOnce() -> Result<()>) -> Result<Graph> {
        self.together(&[&self.record(step)?])
    }

    /// Steps of several trainings as one, on this handle's stream: each in its own order, and what they launch at the same
    /// place and in the same shape as one launch, so that many small ones fill the device as a large one does. The steps
    /// must not depend on each other, and before a replay all must be done that was launched on the handles of their own. What
    /// each computes is what it computes alone, to the bit.
    ///
    /// # Errors
    /// [`Error::Device`] if the device fails.
    pub fn together(&self, steps: &[&Recording]) -> Result<Graph> {
        let lists: Vec<&[Work]> = steps.iter().map(|step| &step.work[..]).collect();
        let work = merged(&lists, |kernel, launch| match &self.0.backend {
            Backend::Host(_) => true,
            Backend::Cuda(cuda) => cuda.launches_arrays(kernel, launch),
        });
        let launches = work.iter().filter_map(Work::launched).collect();
        let captured = match &self.0.backend {
            Backend::Host(_) => Captured::Host(work),
            Backend::Cuda(cuda) => Captured::Cuda(cuda.capture(&work)?),
        };
        let memory = steps.iter().map(|step| KeptMemory::of(&step.memory.0)).collect();
        Ok(Graph { device: self.clone(), captured, launches, _memory: memory })
    }
}

/// The work of several lists in one, each in its order. Of lists that are equally long, what is alike at a place is one launch
/// if `arrays` says that its kernel can, of as many tickets as fit.
fn merged(lists: &[&[Work]], arrays: impl Fn(&str, &Launch) -> bool) -> Vec<Work> {
    let mut by_length = BTreeMap::<usize, Vec<&[Work]>>::new();
    lists.iter().for_each(|list| by_length.entry(list.len()).or_default().push(list));
    let mut work = Vec::new();
    for (length, lists) in by_length {
        for place in 0..length {
            let mut left: Vec<&Work> = lists.iter().map(|list| &list[place]).collect();
            while let Some(&first) = left.first() {
                let (alike, others): (Vec<&Work>, _) = left.into_iter().partition(|other| other.is_like(first));
                match first {
                    Work::Launch { kernel, launch, args } if alike.len() > 1 && arrays(kernel, launch) => {
                        let all: Vec<&ArgBytes> = alike.into_iter().filter_map(Work::args).collect();
                        work.extend(all.chunks(ArgBytes::most_tickets(args.len())).map(|tickets| {
                            let args = ArgBytes::array(tickets, launch.grid[1]);
                            Work::Launch { kernel, launch: *launch, args }
                        }));
                    }
                    _ => work.extend(alike.into_iter().cloned()),
                }
                left = others;
            }
        }
    }
    work
}

impl Work {
    /// Whether both are launches of one kernel in one shape, or the very same.
    fn is_like(&self, other: &Work) -> bool {
        match (self, other) {
            (Work::Launch { kernel: one, launch: here, .. }, Work::Launch { kernel: another, launch: there, .. }) => {
                one == another && here == there
            }
            _ => std::ptr::eq(self, other),
        }
    }

    fn args(&self) -> Option<&ArgBytes> {
        match self {
            Work::Launch { args, .. } => Some(args),
            _ => None,
        }
    }

    fn launched(&self) -> Option<(&'static str, usize)> {
        match self {
            Work::Launch { kernel, args, .. } => Some((kernel, args.tickets())),
            _ => None,
        }
    }

    /// An error with what it is of.
    pub(super) fn named(&self, error: Error) -> Error {
        match self {
            Work::Launch { kernel, launch: Launch { grid, block }, args } => {
                let tickets = args.tickets();
                Error::Device(format!("kernel {kernel}, grid {grid:?}, block {block}, {tickets} at once: {error}"))
            }
            _ => error,
        }
    }
}

impl Graph {
    /// Does the steps once more.
    ///
    /// # Errors
    /// [`Error::Device`] if the device fails.
    pub fn replay(&self) -> Result<()> {
        match (&self.captured, &self.device.0.backend) {
            (Captured::Host(list), Backend::Host(host)) => list.iter().try_for_each(|work| host.run(work)),
            (Captured::Cuda(graph), Backend::Cuda(cuda)) => cuda.replay(graph),
            _ => unreachable!("a graph is captured and replayed by the same device"),
        }
    }

    /// Waits until all replays are done.
    ///
    /// # Errors
    /// As [`Device::synchronize`].
    pub fn synchronize(&self) -> Result<()> {
        self.device.synchronize()
    }

    /// Kernel of each launch, in order, and of how many of the steps it is.
    pub fn launches(&self) -> &[(&'static str, usize)] {
        &self.launches
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // Before the memory goes that it uses, which may be of other handles: they know nothing of this one's stream.
        let _ = self.device.synchronize();
    }
}
