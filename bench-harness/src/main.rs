//! The bench as a program; see [`bench_harness::cli`].

use std::process::ExitCode;

use bench_harness::cli::Purpose;
use bench_harness::gate::heap::{Marking, mark_if_asked};
use bench_harness::lab::{EngineLab, Options};

/// What forks allocate is counted by the gate.
#[global_allocator]
static ALLOCATOR: Marking = Marking;

fn main() -> ExitCode {
    mark_if_asked();
    // Instances are this same program: nothing may come before.
    runtime::owner::instance_if_asked();
    bench_harness::cli::main(&|purpose| {
        let whole = purpose == Purpose::Report;
        let options = Options { compare: whole, warm_memory: whole, ..Options::default() };
        Ok(Box::new(EngineLab::new(options)))
    })
}
