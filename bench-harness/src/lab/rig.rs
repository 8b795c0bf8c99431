//! Instances of one scenario: started, asked, forked, ended, and counted at the end.

use std::time::{Duration, Instant};

use ebpf_loader::{Level, Probes};
use guest_abi::entry::param_page;
use guest_abi::param::{Header, op, who};
use runtime::fork::{FAULT_DELAY, ForkReport, Step};
use runtime::owner::{Owner, OwnerError};
use runtime::proto::{InstanceConfig, Request, WireStep};
use rustix::process::{Pid, Signal};
use uuid::Uuid;

use super::error::{Trouble, engine, void};
use super::host;
use super::process;
use super::program::{Guest, Plan, Words, step};
use crate::session::LabError;

/// Seed of the base pattern.
pub(super) const SEED: u64 = 7;
/// How long a fork may take before it is an error, the wait for standbys included.
const FORK: Duration = Duration::from_mins(1);
/// How long a child may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long the end of an instance may take.
const END: Duration = Duration::from_secs(30);

/// What became of a fork.
pub(super) enum Outcome {
    /// Report, result words of the parent, and of each child in the order of the report.
    Made { report: Box<ForkReport>, parent: Words, children: Vec<Words>, reported: Instant },
    /// Step and errno. The parent runs on.
    Failed { step: String, errno: i32, parent: Words },
}

/// The instances of a scenario, with their owner. All of them end with it.
pub(super) struct Rig {
    owner: Option<Owner>,
    /// Process groups of the roots: everything that comes out of a root stays in its group.
    groups: Vec<i32>,
}

impl Rig {
    /// An owner without instances.
    pub(super) fn new() -> Result<Self, Trouble> {
        Ok(Self { owner: Some(Owner::new()?), groups: Vec::new() })
    }

    fn owner(&self) -> &Owner {
        // It is taken only by `end`, after which nobody has `self`.
        self.owner.as_ref().unwrap_or_else(|| unreachable!("a rig that has ended"))
    }

    /// Starts a root whose memory is filled.
    pub(super) fn start(&mut self, config: InstanceConfig) -> Result<Guest, Trouble> {
        let uuid = self.owner().start(config).map_err(engine("starting an instance"))?;
        let pid = self.pid(uuid)?;
        self.groups.push(pid);
        let header = param_page(0);
        let peek = |offset: usize, result| {
            step(op::PEEK, who::ALL, result, [header + offset as u64, 0, 0, 0])
        };
        let steps = [
            peek(std::mem::offset_of!(Header, work_start), 0),
            peek(std::mem::offset_of!(Header, work_pages), 1),
            peek(std::mem::offset_of!(Header, tsc_khz), 2),
            step(op::FILL, who::ALL, 3, [SEED, 0, 0, 0]),
        ];
        let words = self.run(uuid, &steps)?.0;
        let [work_start, work_pages, tsc_khz, _filled] = words[..] else {
            return Err(Trouble::Guest { words: words.len(), needed: steps.len() });
        };
        Ok(Guest { uuid, work_start, work_pages, tsc_khz })
    }

    /// Measures what is started from now on.
    pub(super) fn probe(&self, level: Level) -> Result<(), LabError> {
        let unavailable = |error| LabError::Unavailable { reason: runtime::sys::chain(&error) };
        self.owner().probe(level).map_err(unavailable)
    }

    /// What `f` makes of the probes.
    pub(super) fn probes<R>(&self, f: impl FnOnce(&mut Probes) -> R) -> Option<R> {
        self.owner().probes(f)
    }

    /// Process of an instance.
    pub(super) fn pid(&self, uuid: Uuid) -> Result<i32, Trouble> {
        self.owner().with(uuid, |known| known.pid).map_err(engine("looking for an instance"))
    }

    /// What an instance has said that is for people.
    pub(super) fn notes(&self, uuid: Uuid) -> Vec<String> {
        self.owner().with(uuid, |known| known.notes.clone()).unwrap_or_default()
    }

    /// How long arming took, in µs.
    pub(super) fn armed_us(&self, uuid: Uuid) -> Option<u64> {
        self.owner().with(uuid, |known| known.armed_us).ok().flatten()
    }

    /// Makes an instance forkable.
    pub(super) fn arm(&self, uuid: Uuid) -> Result<(), Trouble> {
        self.ask(uuid, Request::Arm, "arming an instance")
    }

    /// Makes each fork of an instance slower.
    pub(super) fn delay(&self, uuid: Uuid, us: u32) -> Result<(), Trouble> {
        let fault = Request::Fault { step: Some(Step::Wake), errno: FAULT_DELAY, delay_us: us };
        self.ask(uuid, fault, "making forks slower")
    }

    /// Has an instance keep `count` standbys, and waits until they are ready.
    pub(super) fn ready(&self, uuid: Uuid, count: u32) -> Result<(), Trouble> {
        self.ask(uuid, Request::Standbys { count }, "waiting for a standby")
    }

    fn ask(&self, uuid: Uuid, request: Request, doing: &'static str) -> Result<(), Trouble> {
        self.owner().ask(uuid, request).map(drop).map_err(engine(doing))
    }

    /// Runs a program to its end.
    pub(super) fn run(&self, uuid: Uuid, steps: &[WireStep]) -> Result<Words, Trouble> {
        self.owner().run(uuid, steps).map(Words).map_err(engine("running a program"))
    }

    /// Starts a program on another vCPU and leaves it alone.
    pub(super) fn leave(&self, uuid: Uuid, vcpu: u32, steps: &[WireStep]) -> Result<(), Trouble> {
        let started = self.owner().program(uuid, vcpu, steps);
        started.map(drop).map_err(engine("starting a program"))
    }

    /// Carries out a plan.
    pub(super) fn fork(&self, guest: &Guest, plan: &Plan) -> Result<Outcome, LabError> {
        host::go_on()?;
        let owner = self.owner();
        let uuid = guest.uuid;
        let seq = owner
            .program(uuid, 0, &plan.steps(guest))
            .map_err(engine("starting a program that forks"))?;
        let begin = Instant::now();
        let report = loop {
            match owner.next_fork(uuid, Duration::from_millis(500)) {
                Ok(report) => break report,
                // A fork that failed before it took a standby has no report: the guest knows.
                Err(OwnerError::Timeout { .. }) if begin.elapsed() < FORK => {
                    if let Ok(words) = owner.results(uuid, 0, seq, Duration::ZERO) {
                        return Ok(failure(Words(words)));
                    }
                }
                Err(error) => return Err(engine("waiting for a fork")(error).into()),
            }
        };
        let reported = Instant::now();
        let all = plan.check_others.is_some_and(|pick| pick.count == 0);
        let patience = if all { FORK } else { ANSWER };
        let results = |uuid: Uuid| owner.results(uuid, 0, seq, patience).map(Words);
        let parent = results(uuid).map_err(engine("waiting for the parent after a fork"))?;
        if let Some((step, errno)) = report.failed {
            return Ok(Outcome::Failed { step: step.name().into(), errno, parent });
        }
        let mut children = Vec::with_capacity(report.children.len());
        for child in &report.children {
            let answer = results(child.uuid).map_err(|error| {
                void(format!(
                    "child {} of fork {} did not answer: {error}",
                    child.uuid, report.number
                ))
            })?;
            children.push(answer);
        }
        Ok(Outcome::Made { report: Box::new(report), parent, children, reported })
    }

    /// Ends instances and waits until they are gone.
    pub(super) fn end_all(&self, uuids: &[Uuid]) -> Result<(), Trouble> {
        let owner = self.owner();
        for uuid in uuids {
            owner.kill(*uuid).map_err(engine("ending an instance"))?;
        }
        for uuid in uuids {
            owner.wait_exit(*uuid, END).map_err(engine("waiting for the end of an instance"))?;
            owner.forget(*uuid);
        }
        Ok(())
    }

    /// Ends everything and looks whether anything is left.
    pub(super) fn end(mut self) -> Result<(), Trouble> {
        self.close()
    }

    fn close(&mut self) -> Result<(), Trouble> {
        // Kills all instances and waits for them.
        drop(self.owner.take());
        let groups = std::mem::take(&mut self.groups);
        let end = Instant::now() + END;
        loop {
            let left: Vec<_> = groups.iter().flat_map(|group| process::group(*group)).collect();
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() > end {
                for group in groups.into_iter().filter_map(Pid::from_raw) {
                    // ESRCH: it has ended since.
                    rustix::process::kill_process_group(group, Signal::KILL).unwrap_or(());
                }
                let mut names: Vec<String> =
                    left.iter().map(|it| format!("{} ({})", it.name, it.state)).collect();
                names.truncate(8);
                return Err(Trouble::Leftover { count: left.len(), names: names.join(", ") });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // After `end` there is nothing to do; on the way out of an error that error is told.
        self.close().unwrap_or(());
    }
}

/// A fork that failed, as its parent heard of it.
fn failure(parent: Words) -> Outcome {
    let step = runtime::fork::Step::from_number(parent.failed_step())
        .map_or("unknown step", runtime::fork::Step::name);
    let errno = i32::try_from(parent.status()).unwrap_or(0);
    Outcome::Failed { step: step.into(), errno, parent }
}
