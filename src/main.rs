//! The `dilt` program: parses the command line, runs a command, prints its result, exits with its code.

mod cli;

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    // As many trainings as --streams allows have a queue of their own on a GPU; the driver makes eight unless it is asked.
    if std::env::var_os("CUDA_DEVICE_MAX_CONNECTIONS").is_none() {
        // SAFETY: there is no other thread yet.
        unsafe { std::env::set_var("CUDA_DEVICE_MAX_CONNECTIONS", "32") };
    }
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            let code = error.downcast_ref::<dilt::Error>().map_or(1, dilt::Error::exit_code);
            ExitCode::from(code as u8)
        }
    }
}
