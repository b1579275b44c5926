//! Threads that decode image files ahead of the steps that need them.
//!
//! A piece of work is a batch. A thread takes a free buffer first, then the next batch: so the buffers bound the memory, and
//! the batch that is needed next always has one, whatever the order in which the threads end. Nothing waits for ever.

use std::collections::BTreeMap;
use std::iter::Enumerate;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use super::batches::Batches;
use crate::data::Files;
use crate::device::{Device, Staging};
use crate::error::{Error, Result};

/// Buffers beyond one for each thread: batches that are ready while every thread is at work.
const SPARE_BUFFERS: usize = 2;

/// What is decoded, and to what.
pub(super) struct Decoding {
    pub(super) files: Arc<Files>,
    /// Channels, height and width of a decoded image.
    pub(super) stored: [usize; 3],
    /// Most examples of a batch.
    pub(super) batch: usize,
}

/// A batch: as many images as it has examples.
pub(super) struct Decoded {
    pub(super) bytes: Staging,
    pub(super) examples: Vec<u32>,
}

/// What the threads share.
struct Shared {
    decoding: Decoding,
    batches: Mutex<Enumerate<Batches>>,
    free: Mutex<Receiver<Staging>>,
    stop: AtomicBool,
}

/// Decodes batches on threads of its own, and hands them over in their order.
pub(super) struct Decoders {
    shared: Arc<Shared>,
    /// Where buffers go back to; the threads end when it is gone.
    free: Option<Sender<Staging>>,
    done: Receiver<(usize, Result<Decoded>)>,
    /// Batches that are ready before their turn.
    early: BTreeMap<usize, Result<Decoded>>,
    turn: usize,
    threads: Vec<JoinHandle<()>>,
}

impl Decoders {
    /// Starts at most `workers` threads.
    ///
    /// # Errors
    /// [`Error::Device`] when memory or threads run out.
    pub(super) fn start(device: &Device, decoding: Decoding, batches: Batches, workers: usize) -> Result<Self> {
        let count = batches.len();
        let workers = workers.min(count);
        let (free, from_free) = channel();
        for _ in 0..count.min(workers + SPARE_BUFFERS) {
            let bytes = device.staging(decoding.batch * decoding.stored.iter().product::<usize>())?;
            free.send(bytes).expect("its other end is here");
        }
        let (batches, from_free) = (Mutex::new(batches.enumerate()), Mutex::new(from_free));
        let shared = Arc::new(Shared { decoding, batches, free: from_free, stop: AtomicBool::new(false) });
        let (to_done, done) = channel();
        let (free, early, threads) = (Some(free), BTreeMap::new(), Vec::new());
        let mut decoders = Decoders { shared, free, done, early, turn: 0, threads };
        for worker in 0..workers {
            let (shared, to_done) = (decoders.shared.clone(), to_done.clone());
            let thread = Builder::new().name(format!("decode {worker}")).spawn(move || shared.work(&to_done));
            let failed = |error| Error::Device(format!("a thread to decode images cannot start: {error}"));
            decoders.threads.push(thread.map_err(failed)?);
        }
        Ok(decoders)
    }

    /// Waits for the next batch.
    ///
    /// # Errors
    /// [`Error::File`] for the first of its files that cannot be decoded.
    pub(super) fn next(&mut self) -> Result<Decoded> {
        loop {
            if let Some(decoded) = self.early.remove(&self.turn) {
                self.turn += 1;
                return decoded;
            }
            let ended = |_| Error::Run(format!("batch {} was never decoded: there are no more", self.turn));
            let (number, decoded) = self.done.recv().map_err(ended)?;
            self.early.insert(number, decoded);
        }
    }

    /// Takes the buffer of a batch that is no longer needed.
    pub(super) fn take_back(&self, bytes: Staging) {
        if let Some(free) = &self.free {
            // When the last batch is at work no thread takes buffers any more.
            let _ = free.send(bytes);
        }
    }
}

impl Drop for Decoders {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.free = None;
        for thread in self.threads.drain(..) {
            // What a thread has to say, it says by what it hands over.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self, done: &Sender<(usize, Result<Decoded>)>) {
        loop {
            let Ok(mut bytes) = self.free.lock().unwrap_or_else(PoisonError::into_inner).recv() else { return };
            let next = self.batches.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((number, examples)) = next else { return };
            let decoded = self.decode(&examples, &mut bytes).map(|()| Decoded { bytes, examples });
            if self.stop.load(Ordering::Relaxed) || done.send((number, decoded)).is_err() {
                return;
            }
        }
    }

    /// Decodes a batch, or the beginning of one that nobody will take.
    fn decode(&self, examples: &[u32], bytes: &mut [u8]) -> Result<()> {
        let Decoding { files, stored, .. } = &self.decoding;
        let images = bytes.chunks_exact_mut(stored.iter().product());
        for (&example, image) in examples.iter().zip(images) {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            let index = example as usize;
            // A decoder that panics would leave the training waiting for its batch.
            let decoded = catch_unwind(AssertUnwindSafe(|| files.decode(index, *stored, image)));
            decoded.unwrap_or_else(|_| {
                let path = files.root.join(&files.files[index].0);
                Err(Error::file(path, "broken image: its decoder panicked; replace it, or use --skip-broken"))
            })?;
        }
        Ok(())
    }
}
