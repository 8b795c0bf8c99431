//! Which programs are attached where, the better ones first.

use std::path::{Path, PathBuf};

use aya::programs::perf_event::{PerfEventConfig, PerfEventScope, SamplePolicy, SoftwareEvent};
use aya::programs::uprobe::UProbeScope;
use aya::programs::{FExit, PerfEvent, ProgramError, RawTracePoint, UProbe};
use aya::{Btf, Ebpf};
use ebpf_common::Kind;
use rustix::io::Errno;

use crate::probes::{Attached, Level, Refused};

/// How a program is attached.
#[derive(Clone, Copy, Debug)]
pub(crate) enum How {
    /// At a tracepoint, which gives its arguments as they are.
    RawTracepoint(&'static str),
    /// At the end of a kernel function, called directly.
    FExit(&'static str),
    /// At a counter of the kernel, on each processor, for each event.
    Counter(SoftwareEvent),
    /// At the stages of a fork in this program.
    Stage,
}

impl How {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::RawTracepoint(_) => "raw_tp",
            Self::FExit(_) => "fexit",
            Self::Counter(_) => "perf_event",
            Self::Stage => "usdt",
        }
    }
}

/// A program and how it is attached.
pub(crate) type Program = (&'static str, How);

/// Programs that measure something together.
pub(crate) type Way = &'static [Program];

/// Something that is measured: the ways to do it, the best one first. A way needs all its programs.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) what: &'static str,
    pub(crate) ways: &'static [Way],
    /// What begins and ends in it: nothing that began before it was attached ends in it.
    pub(crate) kind: Option<Kind>,
    /// Without it the others are of no use.
    pub(crate) required: bool,
    pub(crate) level: Level,
}

/// The part that `FAULTS_END` is about.
pub(crate) const FAULTS_END: &str = "time of page faults";

use How::{Counter, FExit as AtExit, RawTracepoint as Raw, Stage};

/// Everything. What ends comes before what it ends: a beginning whose end is not seen would end with another.
pub(crate) const PARTS: [Part; 7] = [
    Part {
        what: "processes",
        ways: &[&[
            ("process_fork", Raw("sched_process_fork")),
            ("process_exec", Raw("sched_process_exec")),
            ("process_exit", Raw("sched_process_exit")),
        ]],
        kind: None,
        required: true,
        level: Level::On,
    },
    Part {
        what: FAULTS_END,
        ways: &[
            &[("fault_handled", AtExit("handle_mm_fault"))],
            &[
                ("fault_minor", Counter(SoftwareEvent::PageFaultsMin)),
                ("fault_major", Counter(SoftwareEvent::PageFaultsMaj)),
            ],
        ],
        kind: Some(Kind::Fault),
        required: false,
        level: Level::On,
    },
    Part {
        what: "page faults",
        ways: &[&[
            ("fault_user", Raw("page_fault_user")),
            ("fault_kernel", Raw("page_fault_kernel")),
        ]],
        kind: Some(Kind::Fault),
        required: true,
        level: Level::On,
    },
    Part {
        what: "faults of the guest",
        ways: &[
            &[
                ("kvm_entry", Raw("kvm_entry")),
                ("kvm_userspace_exit", Raw("kvm_userspace_exit")),
                ("kvm_set_spte", Raw("kvm_mmu_set_spte")),
                ("kvm_page_fault", Raw("kvm_page_fault")),
                ("kvm_walk", Raw("kvm_mmu_pagetable_walk")),
            ],
            &[
                ("kvm_entry", Raw("kvm_entry")),
                ("kvm_userspace_exit", Raw("kvm_userspace_exit")),
                ("kvm_page_fault", Raw("kvm_page_fault")),
            ],
        ],
        kind: Some(Kind::Kvm),
        required: false,
        level: Level::All,
    },
    Part {
        what: "time off CPU",
        ways: &[&[("sched_switch", Raw("sched_switch")), ("sched_waking", Raw("sched_waking"))]],
        kind: Some(Kind::Wake),
        required: false,
        level: Level::On,
    },
    Part {
        what: "calls to KVM",
        ways: &[&[("sys_exit", Raw("sys_exit")), ("sys_enter", Raw("sys_enter"))]],
        kind: Some(Kind::Call),
        required: false,
        level: Level::Trace,
    },
    Part {
        what: "stages of a fork",
        ways: &[&[("stage", Stage)]],
        kind: None,
        required: false,
        level: Level::Trace,
    },
];

/// Loads and attaches a part the best way that this kernel allows. `None`: no way.
pub(crate) fn attach(
    ebpf: &mut Ebpf,
    part: &Part,
    refused: &mut Vec<Refused>,
) -> Option<(Attached, Way)> {
    let of_part = |name: &str| part.ways.iter().any(|way| way.iter().any(|(it, _)| *it == name));
    refused.retain(|refused| !refused.passing || !of_part(refused.program));
    for way in part.ways {
        // What was refused once for good need not be tried again.
        if way.iter().any(|(name, _)| refused.iter().any(|refused| refused.program == *name)) {
            continue;
        }
        let mut done: Vec<&'static str> = Vec::new();
        let failed = way.iter().find_map(|(name, how)| match one(ebpf, name, *how) {
            Ok(()) => {
                done.push(name);
                None
            }
            Err(No { reason, passing }) => {
                Some(Refused { program: name, how: how.name(), reason, passing })
            }
        });
        let Some(failed) = failed else {
            let how = way.first().map_or("nothing", |(_, how)| how.name());
            return Some((Attached { what: part.what, how, level: part.level }, way));
        };
        // It may have been attached in part.
        done.push(failed.program);
        refused.push(failed);
        for name in done {
            unload(ebpf, name);
        }
    }
    None
}

/// Loads and attaches each program by itself and takes it off again: what the kernel said of each.
pub(crate) fn each(ebpf: &mut Ebpf) -> Vec<(Program, Result<(), No>)> {
    let programs = PARTS.iter().flat_map(|part| part.ways).flat_map(|way| way.iter());
    let mut seen = std::collections::BTreeSet::new();
    let mut results = Vec::new();
    for program in programs.filter(|(name, _)| seen.insert(*name)) {
        let (name, how) = *program;
        results.push((*program, one(ebpf, name, how)));
        unload(ebpf, name);
    }
    results
}

/// Takes programs off again.
pub(crate) fn detach(ebpf: &mut Ebpf, way: Way) {
    for (name, _) in way {
        unload(ebpf, name);
    }
}

/// Why a program is not attached.
#[derive(Debug)]
pub(crate) struct No {
    pub(crate) reason: String,
    /// It may be otherwise the next time.
    passing: bool,
}

impl No {
    fn new(error: impl std::error::Error + 'static) -> Self {
        Self { passing: is_passing(&error), reason: text(error) }
    }

    fn because(reason: &str) -> Self {
        Self { reason: reason.to_owned(), passing: false }
    }
}

/// Whether the kernel, or this process, had no room for it or no time.
fn is_passing(error: &(dyn std::error::Error + 'static)) -> bool {
    const PASSING: [Errno; 7] = [
        Errno::MFILE,
        Errno::NFILE,
        Errno::NOMEM,
        Errno::AGAIN,
        Errno::INTR,
        Errno::BUSY,
        Errno::NOSPC,
    ];
    // It passes for the error in it, and has none as its source.
    if let Some(ProgramError::IOError(inner)) = error.downcast_ref() {
        return is_passing(inner);
    }
    let of_kernel = error.downcast_ref::<std::io::Error>().and_then(Errno::from_io_error);
    match (of_kernel, error.source()) {
        (Some(errno), _) => PASSING.contains(&errno),
        (None, Some(source)) => is_passing(source),
        (None, None) => false,
    }
}

/// Loads and attaches one program.
fn one(ebpf: &mut Ebpf, name: &str, how: How) -> Result<(), No> {
    let missing = || No::because("it is not among the probes");
    let program = ebpf.program_mut(name).ok_or_else(missing)?;
    let result = match how {
        How::RawTracepoint(at) => {
            let program: &mut RawTracePoint = program.try_into().map_err(No::new)?;
            program.load().and_then(|()| program.attach(at).map(drop))
        }
        How::FExit(at) => {
            let btf = Btf::from_sys_fs().map_err(No::new)?;
            let program: &mut FExit = program.try_into().map_err(No::new)?;
            program.load(at, &btf).and_then(|()| program.attach().map(drop))
        }
        How::Counter(event) => {
            let program: &mut PerfEvent = program.try_into().map_err(No::new)?;
            program.load().and_then(|()| on_every_processor(program, event))
        }
        How::Stage => {
            let unmarked = || No::because("this program has no mark ukp:stage");
            let (path, offset) = stage_site().ok_or_else(unmarked)?;
            let program: &mut UProbe = program.try_into().map_err(No::new)?;
            program
                .load()
                .and_then(|()| program.attach(offset, path, UProbeScope::AllProcesses).map(drop))
        }
    };
    result.map_err(No::new)
}

fn on_every_processor(program: &mut PerfEvent, event: SoftwareEvent) -> Result<(), ProgramError> {
    let processors = aya::util::online_cpus().map_err(|(_, error)| ProgramError::IOError(error))?;
    for cpu in processors {
        program.attach(
            PerfEventConfig::Software(event),
            PerfEventScope::AllProcessesOneCpu { cpu },
            SamplePolicy::Period(1),
            false,
        )?;
    }
    Ok(())
}

fn unload(ebpf: &mut Ebpf, name: &str) {
    use aya::programs::Program;
    // It was loaded a moment ago; if it cannot be unloaded, it goes with this process.
    match ebpf.program_mut(name) {
        Some(Program::RawTracePoint(program)) => program.unload().unwrap_or(()),
        Some(Program::FExit(program)) => program.unload().unwrap_or(()),
        Some(Program::PerfEvent(program)) => program.unload().unwrap_or(()),
        Some(Program::UProbe(program)) => program.unload().unwrap_or(()),
        _ => {}
    }
}

/// Characters of a reason. The verifier can say millions.
const LONGEST: usize = 600;

/// The kernel's words, with the verifier's last ones if it had any.
fn text(error: impl std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        source = inner.source();
    }
    // The log of the verifier comes with line breaks; what it says at the end is the reason.
    let text = text.lines().filter(|line| !line.trim().is_empty()).collect::<Vec<_>>().join(" | ");
    // Nor need it have said anything.
    let text = text.trim_end().trim_end_matches(". Verifier output:");
    let count = text.chars().count();
    if count <= LONGEST {
        return text.to_owned();
    }
    let first: String = text.chars().take(LONGEST / 3).collect();
    let last: String = text.chars().skip(count - LONGEST / 3 * 2).collect();
    format!("{first} [...] {last}")
}

/// Where this program marks the stages of a fork: file and offset.
fn stage_site() -> Option<(PathBuf, u64)> {
    let path = std::env::current_exe().ok()?;
    let offset = crate::usdt::offset(Path::new(&path), "ukp", "stage")?;
    Some((path, offset))
}

#[cfg(test)]
mod tests {
    use aya::sys::SyscallError;

    use super::*;

    #[test]
    fn only_want_of_room_or_time_is_passing() {
        let no = |errno: Errno| No::new(ProgramError::IOError(errno.into()));
        assert!(no(Errno::MFILE).passing && no(Errno::NOMEM).passing);
        let call = |errno: Errno| {
            let io_error = errno.into();
            No::new(ProgramError::SyscallError(SyscallError { call: "bpf_link_create", io_error }))
        };
        assert!(call(Errno::MFILE).passing && !call(Errno::PERM).passing);
        assert!(!no(Errno::PERM).passing && !no(Errno::INVAL).passing);
        assert!(!No::because("it is not among the probes").passing);
    }
}
