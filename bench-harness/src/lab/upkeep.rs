//! Kind `upkeep`: what happens off the path, measured all the same.

use std::time::{Duration, Instant};

use runtime::sys::SysError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal};
use uuid::Uuid;

use super::bench::Bench;
use super::error::Trouble;
use super::host;
use super::process;
use crate::session::LabError;

/// How long an instance is left alone to see what it does.
const IDLE: Duration = Duration::from_secs(3);
/// Instances that are armed, at most: each is a fresh one.
const ARMED: u32 = 5;

/// `forks` rounds of prewarming and teardown, some of arming, and one of idleness.
pub(super) fn upkeep(bench: &mut Bench<'_>) -> Result<(), LabError> {
    bench.warm_up()?;
    idle(bench)?;
    let scenario = bench.scenario;
    bench.progress.phase("rounds", scenario.forks.into());
    for _ in 0..scenario.forks {
        let plan = bench.plan();
        let mut round = bench.fork(&plan)?;
        bench.record(&mut round);
        for child in &round.children {
            let us = tear_down(bench, *child)?;
            bench.run.recorder.record_apart("teardown_us", us);
        }
        bench.rig.ready(bench.guest.uuid, 1)?;
        bench.progress.advance(1);
    }
    let rounds = scenario.forks.min(ARMED);
    bench.progress.phase("arming", rounds.into());
    if let Some(us) = bench.rig.armed_us(bench.guest.uuid) {
        record_arm(bench, us);
    }
    for _ in 0..rounds {
        host::go_on()?;
        let guest = bench.rig.start(bench.config.clone())?;
        bench.rig.arm(guest.uuid)?;
        if let Some(us) = bench.rig.armed_us(guest.uuid) {
            record_arm(bench, us);
        }
        bench.rig.end_all(&[guest.uuid])?;
        bench.progress.advance(1);
    }
    Ok(())
}

fn record_arm(bench: &mut Bench<'_>, us: u64) {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52 µs")]
    bench.run.recorder.record_apart("arm_us", us as f64);
}

/// µs from the signal to the end of the instance's process, its memory and machine included.
fn tear_down(bench: &Bench<'_>, uuid: Uuid) -> Result<f64, Trouble> {
    let pid = bench.rig.pid(uuid)?;
    let sys = |call| move |errno| Trouble::from(SysError::new(call)(errno));
    let pid = Pid::from_raw(pid).ok_or(Trouble::Sys(SysError::last("pidfd_open")))?;
    let process =
        rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(sys("pidfd_open"))?;
    let begin = Instant::now();
    rustix::process::pidfd_send_signal(&process, Signal::KILL).map_err(sys("pidfd_send_signal"))?;
    let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
    poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)).map_err(sys("poll"))?;
    let us = begin.elapsed().as_secs_f64() * 1e6;
    bench.rig.end_all(&[uuid])?;
    Ok(us)
}

/// CPU time of the instance, its zygote and its standby while nobody asks anything of them.
fn idle(bench: &mut Bench<'_>) -> Result<(), LabError> {
    bench.progress.phase("idle", 1);
    // What the last fork left to do is over by then.
    std::thread::sleep(Duration::from_millis(500));
    let processes = process::tree(bench.rig.pid(bench.guest.uuid)?);
    let cpu_ns = || processes.iter().map(|pid| process::cpu_ns(*pid)).sum::<Option<u64>>();
    let (before, begin) = (cpu_ns(), Instant::now());
    while begin.elapsed() < IDLE {
        host::go_on()?;
        std::thread::sleep(Duration::from_millis(100));
    }
    let elapsed = begin.elapsed().as_secs_f64();
    // Less than before: a thread has ended, and taken its time along.
    if let Some(ns) = before.zip(cpu_ns()).and_then(|(before, after)| after.checked_sub(before)) {
        let ratio = super::sample::us(ns) / 1e6 / elapsed;
        bench.run.values.insert("idle_cpu_ratio".to_owned(), ratio);
    }
    Ok(())
}
