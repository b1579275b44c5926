//! Trainings that do their steps together.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::device::{Device, Graph, Recording};
use crate::error::{Error, Result};

/// An array of tickets: trainings on threads of their own whose steps are done together, so that what they launch alike is
/// one launch ([`Device::together`]). Steps begin when all that have a seat want theirs; who writes metrics, say, is waited
/// for. What each computes is what it computes alone.
pub struct TicketArray {
    device: Device,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    members: BTreeMap<usize, Member>,
    seats_given: usize,
    /// The steps of those that did the last ones together.
    together: Option<Together>,
    /// A member does the steps of all.
    running: bool,
}

struct Member {
    step: Recording,
    /// Steps that it waits for.
    wanted: usize,
    /// Why they failed.
    failed: Option<String>,
}

struct Together {
    seats: Vec<usize>,
    graph: Graph,
}

/// The place of a training in an array, until dropped.
pub(super) struct Seat<'a> {
    array: &'a TicketArray,
    number: usize,
}

impl TicketArray {
    /// An array on a handle that no training has.
    pub fn new(device: Device) -> Self {
        TicketArray { device, state: Mutex::default(), changed: Condvar::new() }
    }

    /// A place for a training with this step. From now on the others wait for it, so it must not wait for them elsewhere.
    pub(super) fn join(&self, step: Recording) -> Seat<'_> {
        let mut state = self.lock();
        let number = state.seats_given;
        state.seats_given += 1;
        state.members.insert(number, Member { step, wanted: 0, failed: None });
        Seat { array: self, number }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As many steps as each member wants at least; others may wait, or join, meanwhile.
    fn run<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let seats: Vec<usize> = state.members.keys().copied().collect();
        let steps = state.members.values().map(|member| member.wanted).min().unwrap_or(0);
        let together = match state.together.take() {
            Some(together) if together.seats == seats => Ok(together),
            _ => {
                let recordings: Vec<&Recording> = state.members.values().map(|member| &member.step).collect();
                self.device.together(&recordings).map(|graph| Together { seats: seats.clone(), graph })
            }
        };
        state.running = true;
        drop(state);
        let work = || {
            let together = together?;
            (0..steps).try_for_each(|_| together.graph.replay())?;
            self.device.synchronize()?;
            Ok(together)
        };
        let result: std::thread::Result<Result<Together>> = catch_unwind(AssertUnwindSafe(work));
        let mut state = self.lock();
        state.running = false;
        let failed = match &result {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("a step panicked".into()),
        };
        for seat in &seats {
            let member = state.members.get_mut(seat).expect("waits here for its steps");
            member.wanted = if failed.is_some() { 0 } else { member.wanted - steps };
            member.failed.clone_from(&failed);
        }
        self.changed.notify_all();
        match result {
            Ok(done) => state.together = done.ok(),
            Err(panic) => resume_unwind(panic),
        }
        state
    }
}

impl Seat<'_> {
    /// Does steps of this training, which are more than none, with those of the others. All that it has launched on its own
    /// handle must be done.
    ///
    /// # Errors
    /// [`Error::Device`] if the steps of any of them fail.
    pub(super) fn replay(&self, steps: usize) -> Result<()> {
        let mut state = self.array.lock();
        self.member(&mut state).wanted = steps;
        loop {
            let member = self.member(&mut state);
            if let Some(problem) = member.failed.take() {
                return Err(Error::Device(format!("steps of several trainings together: {problem}")));
            }
            if member.wanted == 0 {
                return Ok(());
            }
            let all_wait = state.members.values().all(|member| member.wanted > 0);
            state = if all_wait && !state.running {
                self.array.run(state)
            } else {
                self.array.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
            };
        }
    }

    fn member<'s>(&self, state: &'s mut State) -> &'s mut Member {
        state.members.get_mut(&self.number).expect("there until the seat is dropped")
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        let mut state = self.array.lock();
        state.members.remove(&self.number);
        // What the training has allocated goes next.
        state.together.take_if(|together| together.seats.contains(&self.number));
        drop(state);
        self.array.changed.notify_all();
    }
}
