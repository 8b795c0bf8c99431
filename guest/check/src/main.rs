//! `ukp-check`: asks of `/uk/libukp` what no shell can, for the nested tests, which pack it into
//! their images.
//!
//! ```text
//!  clock         the clocks, in nanoseconds
//!  forks N       N threads fork at the same time, each by a file of its own
//!  handles UUID  forks with files of that child open; what they say in the new child
//!  poll UUID     open files and poll(2) until that child has stopped
//!  spin          how long nothing ran between the fork and the new generation, in the child
//!  vsock PORT    a connection to the host across a fork, and the context id
//!  load SECONDS  memory, registers and a pipe are worked with, and are right in every machine
//!  garbage N     writes garbage to every register of every device, N times each part
//!
//!  true N        fork, exec and wait of /bin/true, N times: how long each took, in µs
//!  init          as PID 1: says that it is there, and then each line that it reads
//!  serve PORT    sends and receives by sockets of the machine as it is asked to
//! ```
//!
//! The last three are for the bench; `init` and `serve` may be the first process of a machine.
//!
//! What it finds are lines `@name value`: on its output, and in a machine that became a child
//! meanwhile on the console, after which the machine ends with code 0.

mod files;
mod garbage;
mod load;
mod measure;
mod say;
mod sockets;
mod spin;
mod threads;
mod vsocks;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use rustix::time::{ClockId, clock_gettime};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ukp-check: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let verb = arguments.next().context("what?")?;
    let value = arguments.next().unwrap_or_default();
    match verb.as_str() {
        "clock" => clock(),
        "forks" => threads::forks(value.parse().context("how many threads?")?),
        "handles" => files::handles(&value),
        "poll" => files::poll_until_stopped(&value),
        "spin" => spin::until_another_machine(),
        "vsock" => vsocks::across_a_fork(value.parse().context("which port?")?),
        "garbage" => garbage::write(value.parse().context("how often?")?),
        "load" => load::work(value.parse().context("how many seconds?")?),
        "true" => measure::trues(value.parse().context("how often?")?),
        "init" => measure::init(),
        "serve" => sockets::serve(value.parse().context("at which port?")?),
        _ => bail!("no such check: {verb}"),
    }
}

fn clock() -> Result<()> {
    let ns = |id| {
        let time = clock_gettime(id);
        time.tv_sec * 1_000_000_000 + time.tv_nsec
    };
    let (real, monotonic) = (ns(ClockId::Realtime), ns(ClockId::Monotonic));
    say::here(&[("clock", format!("{real} {monotonic}"))])
}
