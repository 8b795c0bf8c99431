//! `ukp-check`: asks of `/uk/libukp` what no shell can, for the nested tests, which pack it into
//! their images.
//!
//! ```text
//!  clocks        the clocks, in nanoseconds, for each line on the input
//!  shift MS      puts the wall clock forward
//!  forks N       threads fork at the same time, each by a file of its own: N, or until one is refused
//!  handles UUID  forks with files of that child open; what they say in the new child
//!  poll UUID     open files and poll(2) until that child has stopped
//!  spin          whether anything runs between the fork and the new generation, in the child
//!  early         the same, and keeps the agent waiting until it has
//!  watch         the generation file, watched across a fork
//!  vsock PORT    a connection to the host across a fork, and the context id
//!  load PORT     memory, registers, a pipe and a connection are worked with across a fork
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

mod clocks;
mod files;
mod garbage;
mod load;
mod measure;
mod say;
mod sockets;
mod spin;
mod threads;
mod vsocks;
mod watch;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

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
        "clocks" => clocks::stream(),
        "shift" => clocks::shift(value.parse().context("how many milliseconds?")?),
        "forks" => threads::forks(value.parse().context("how many threads?")?),
        "handles" => files::handles(&value),
        "poll" => files::poll_until_stopped(&value),
        "spin" => spin::until_another_machine(),
        "early" => spin::early(),
        "watch" => watch::across_a_fork(),
        "vsock" => vsocks::across_a_fork(value.parse().context("which port?")?),
        "garbage" => garbage::write(value.parse().context("how often?")?),
        "load" => load::across_a_fork(value.parse().context("which port?")?),
        "true" => measure::trues(value.parse().context("how often?")?),
        "init" => measure::init(),
        "serve" => sockets::serve(value.parse().context("at which port?")?),
        _ => bail!("no such check: {verb}"),
    }
}
