//! Training and evaluation of a network on labelled images: recipe, loop, metrics, checkpoints.
//!
//! Time is counted in steps. Steps are done in chunks of an epoch's; for each chunk the host writes a table of sample
//! counts, learning rates and example indices, then replays one captured step per row. Losses come back in a table
//! too, so that nothing waits for the device within a chunk, unless the images are files: then each step's are decoded
//! ahead by other threads, and copied when the step before is done.

mod array;
mod batches;
mod checkpoint;
mod decode;
mod evaluate;
mod feed;
mod labelled;
mod metrics;
mod recipe;
mod run;

pub use array::TicketArray;
pub use checkpoint::Checkpoint;
pub use evaluate::{Score, evaluate, observe, refresh_statistics, row_magnitudes};
pub use labelled::{Images, Labelled};
pub use metrics::MetricsFile;
pub use recipe::{Augmentation, MOST_BATCH, MOST_SAMPLES, Recipe, Schedule};
pub use run::{Chunk, Observer, Training};
