//! Image files decoded by one thread, as a training on files decodes them: images per second of processor time (elem/s).
//!
//! `DILT_BENCH_IMAGES=DIR cargo bench --bench decode [FILTER]`: all files of the folder, in turn, to 3x128x128 and to
//! 3x256x256.

mod cpu_time;

use std::hint::black_box;
use std::path::PathBuf;

use cpu_time::cpu_time;
use criterion::{Criterion, Throughput};
use dilt::data::image::decode;

fn main() {
    let Some(folder) = std::env::var_os("DILT_BENCH_IMAGES") else {
        eprintln!("skipped: DILT_BENCH_IMAGES names no folder of images");
        return;
    };
    let entries = std::fs::read_dir(&folder).expect("the folder that DILT_BENCH_IMAGES names");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry of the folder").path()).collect();
    files.sort();
    let bytes: u64 = files.iter().map(|path| path.metadata().expect("a file").len()).sum();
    println!("{} files of {} bytes on average", files.len(), bytes / files.len() as u64);
    let mut criterion = Criterion::default().sample_size(10).configure_from_args();
    let mut group = criterion.benchmark_group("decode");
    group.throughput(Throughput::Elements(1));
    for side in [128, 256] {
        let mut into = vec![0; 3 * side * side];
        let mut next = files.iter().cycle();
        group.bench_function(format!("to 3x{side}x{side}"), |bencher| {
            bencher.iter_custom(|count| {
                let begin = cpu_time();
                for path in next.by_ref().take(count as usize) {
                    decode(path, [3, side, side], black_box(&mut into)).expect("an image");
                }
                cpu_time() - begin
            });
        });
    }
    group.finish();
}
