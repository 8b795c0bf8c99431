//! The program `runtime`; see [`cli`].

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    // Before anything else: an instance is this same program.
    runtime::owner::instance_if_asked();
    cli::main()
}
