//! The bench as a program; see [`bench_harness::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    bench_harness::cli::main(&|| anyhow::bail!("this build has no laboratory"))
}
