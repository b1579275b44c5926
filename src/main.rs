//! The `dilt` program: parses the command line, runs a command, prints its result, exits with its code.

mod cli;

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    // This thread is one of the pool that host kernels run on: otherwise each launch puts it to sleep and wakes it. An
    // error means that there is a pool already, which serves as well.
    let _ = rayon::ThreadPoolBuilder::new().use_current_thread().build_global();
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            let code = error.downcast_ref::<dilt::Error>().map_or(1, dilt::Error::exit_code);
            ExitCode::from(code as u8)
        }
    }
}
