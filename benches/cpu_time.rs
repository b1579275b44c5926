//! The processor time that the benches read.

use std::time::Duration;

/// Processor time of this process, all threads, which others on the machine change less than the wall's.
pub fn cpu_time() -> Duration {
    // SAFETY: rusage is plain data, filled by the call.
    let usage = unsafe {
        let mut usage = std::mem::zeroed::<libc::rusage>();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let of = |time: libc::timeval| Duration::from_micros(time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64);
    of(usage.ru_utime) + of(usage.ru_stime)
}
