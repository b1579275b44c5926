//! Trainings side by side on one device.
//!
//! Each has a handle of its own, with its own stream and captured step, its own network and its own folder. What a training
//! computes depends on its settings alone, results are taken in the order of the jobs, and whatever several jobs need is
//! trained once: so the number of trainings at a time changes no bit of a run.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::channel;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::train::TicketArray;

/// Most trainings at a time.
pub const MOST: usize = 32;

/// Handles to one device, as many as trainings may run at a time.
pub struct Streams {
    count: usize,
    /// Handles that no job has.
    idle: Mutex<Vec<Device>>,
    given_back: Condvar,
    /// Stages that a job is at.
    begun: Mutex<BTreeSet<String>>,
    ended: Condvar,
    /// The first error of a job on a thread of its own: no other begins after it.
    failure: Mutex<Option<Error>>,
    array: Option<TicketArray>,
}

/// A handle that one job has, given back when dropped.
struct Handle<'a> {
    streams: &'a Streams,
    device: Device,
}

/// The right to work on a stage, until dropped.
#[must_use = "another job may begin the stage once this is dropped"]
pub struct Turn<'a> {
    streams: &'a Streams,
    stage: String,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Streams {
    /// Opens `count` handles to a device; a single one is `device` itself. With several, the pool of threads that the host
    /// device computes on must not count on the calling thread, which waits for its jobs, and trainings may do their steps
    /// together, as an `array`.
    ///
    /// # Errors
    /// [`Error::Usage`] for a number out of range; as [`Device::open`].
    pub fn open(device: &Device, count: usize, array: bool) -> Result<Self> {
        let idle = match count {
            1 => vec![device.clone()],
            // None of them is `device`: while one captures a step, masks are combined on that.
            2..=MOST => (0..count).map(|_| device.with_policy(device.policy())).collect::<Result<_>>()?,
            _ => return Err(Error::Usage(format!("--streams: expected a number from 1 to {MOST}, got {count}"))),
        };
        if array && count == 1 {
            return Err(Error::Usage("--array: expected --streams of at least 2 with it, got 1".into()));
        }
        let array = array.then(|| device.with_policy(device.policy()).map(TicketArray::new)).transpose()?;
        Ok(Streams {
            count,
            idle: Mutex::new(idle),
            given_back: Condvar::new(),
            begun: Mutex::default(),
            ended: Condvar::new(),
            failure: Mutex::default(),
            array,
        })
    }

    /// Most trainings at a time.
    pub fn count(&self) -> usize {
        self.count
    }

    /// What trainings do their steps in, if together.
    pub fn array(&self) -> Option<&TicketArray> {
        self.array.as_ref()
    }

    /// Does one job as soon as a handle is idle.
    ///
    /// # Errors
    /// That of the job; [`Error::Run`] if a job elsewhere has failed.
    pub fn one<R>(&self, work: impl FnOnce(&Device) -> Result<R>) -> Result<R> {
        let handle = self.handle()?;
        work(&handle)
    }

    /// Does jobs side by side, each with a handle of its own; `take` gets what comes out, in the order of the jobs. A job
    /// must not begin others: it would wait for a handle while it has one.
    ///
    /// # Errors
    /// That of a job that failed. No other begins after it, trainings stop after their chunk of steps, and this returns
    /// when they have: [`Error::Run`] where the job that failed is one of another call.
    pub fn each<J: Send, R: Send>(
        &self,
        jobs: impl IntoIterator<Item = J>,
        work: impl Fn(&Device, J) -> Result<R> + Sync,
        take: impl FnMut(R),
    ) -> Result<()> {
        self.in_order(jobs, |job| self.one(|device| work(device, job)), take)
    }

    /// Does jobs side by side that have no handle, but may call [`Streams::one`] and [`Streams::each`]. The outermost call.
    ///
    /// # Errors
    /// The first of all jobs, and of theirs.
    pub fn around<J: Send, R: Send>(
        &self,
        jobs: impl IntoIterator<Item = J>,
        work: impl Fn(J) -> Result<R> + Sync,
        take: impl FnMut(R),
    ) -> Result<()> {
        let result = self.in_order(jobs, work, take);
        lock(&self.failure).take().map_or(result, Err)
    }

    /// Waits until no other job works on a stage: what several need, the first trains and the others find done.
    ///
    /// # Errors
    /// [`Error::Run`] if a job has failed.
    pub fn turn(&self, stage: &str) -> Result<Turn<'_>> {
        let begun = lock(&self.begun);
        let others = |begun: &mut BTreeSet<String>| begun.contains(stage);
        let mut begun = self.ended.wait_while(begun, others).unwrap_or_else(PoisonError::into_inner);
        self.check()?;
        begun.insert(stage.into());
        Ok(Turn { streams: self, stage: stage.into() })
    }

    /// Whether a job has failed, so that the others should end.
    pub fn stopped(&self) -> bool {
        lock(&self.failure).is_some()
    }

    /// Refuses to go on after a job has failed.
    ///
    /// # Errors
    /// [`Error::Run`], in whose place [`Streams::around`] returns that job's error.
    pub fn check(&self) -> Result<()> {
        if self.stopped() { Err(Error::Run("stopped, since another training failed".into())) } else { Ok(()) }
    }

    /// The first error is the one that is told.
    fn stop(&self, error: Error) {
        lock(&self.failure).get_or_insert(error);
    }

    fn handle(&self) -> Result<Handle<'_>> {
        let idle = lock(&self.idle);
        let mut idle = self.given_back.wait_while(idle, |idle| idle.is_empty()).unwrap_or_else(PoisonError::into_inner);
        self.check()?;
        let device = idle.pop().expect("waited for one");
        Ok(Handle { streams: self, device })
    }

    fn in_order<J: Send, R: Send>(
        &self,
        jobs: impl IntoIterator<Item = J>,
        work: impl Fn(J) -> Result<R> + Sync,
        mut take: impl FnMut(R),
    ) -> Result<()> {
        let jobs: Vec<J> = jobs.into_iter().collect();
        let threads = self.count.min(jobs.len());
        if threads <= 1 {
            return jobs.into_iter().try_for_each(|job| work(job).map(&mut take));
        }
        let queue = Mutex::new(jobs.into_iter().enumerate());
        let next = || lock(&queue).next().filter(|_| !self.stopped());
        let (to_done, done) = channel();
        thread::scope(|scope| {
            for _ in 0..threads {
                let (to_done, next, work) = (to_done.clone(), &next, &work);
                let thread = move || {
                    while let Some((place, job)) = next() {
                        match catch_unwind(AssertUnwindSafe(|| work(job))) {
                            Ok(Ok(result)) => {
                                to_done.send((place, result)).expect("its other end outlives this thread")
                            }
                            Ok(Err(error)) => self.stop(error),
                            Err(panic) => {
                                self.stop(Error::Run("a training panicked".into()));
                                resume_unwind(panic);
                            }
                        }
                    }
                };
                if let Err(error) = thread::Builder::new().name("training".into()).spawn_scoped(scope, thread) {
                    self.stop(Error::Device(format!("a thread for a training cannot start: {error}; fewer --streams")));
                }
            }
            drop(to_done);
            let (mut early, mut turn) = (BTreeMap::new(), 0);
            for (place, result) in done.iter() {
                early.insert(place, result);
                while let Some(result) = early.remove(&turn) {
                    take(result);
                    turn += 1;
                }
            }
        });
        self.check()
    }
}

impl Deref for Handle<'_> {
    type Target = Device;

    fn deref(&self) -> &Device {
        &self.device
    }
}

impl Drop for Handle<'_> {
    fn drop(&mut self) {
        lock(&self.streams.idle).push(self.device.clone());
        self.streams.given_back.notify_one();
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.streams.begun).remove(&self.stage);
        self.streams.ended.notify_all();
    }
}
