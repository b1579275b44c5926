//! The `dilt` program: parses the command line, runs a command, prints its result, exits with its code.

mod cli;

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            let code = error.downcast_ref::<dilt::Error>().map_or(1, dilt::Error::exit_code);
            ExitCode::from(code as u8)
        }
    }
}
