//! What only another process can show: its wake-up, and the first run of its rehearsed vCPU.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use runtime::kvm::{DirtyMode, Host, Machine};
use runtime::memory::{Image, RamLayout, Sealed};
use runtime::sys::{affinity, now_ns, set_affinity};

use super::super::board::Board;
use super::super::child::{Child, answer, park};
use super::super::{BaselineError, Figure, Rounds, guest, us_between};
use super::{FloorConfig, Standby};

const SAMPLES: usize = 120;
const WARM_UP: usize = 5;
/// How long a standby sleeps before it is woken: long enough for its processor to have done, or
/// slept through, something else.
const PARKED: Duration = Duration::from_millis(2);
/// How long it spins before the fork: the time between an announcement and its doorbell.
const SPINNING: Duration = Duration::from_micros(200);
/// A spinning process that has not looked for so long is not running: it looks every 0.1 µs, and a
/// switch to another process takes longer than this.
const ABSENT_NS: u64 = 1_000;
/// Times that one standby is woken and run before it is replaced by a fresh one. The first of these
/// runs takes as long as the last (47 to 63 µs and 53 to 88 µs, position by position, in no order):
/// the rehearsal made everything that there is to make.
const RUNS_PER_STANDBY: usize = 12;

/// From the order to the first statement of the process that waits for it.
///
/// Where processors are short, a process that means to spin may be off its processor when the order
/// comes. What it did before the order decides that, not how long it then took: such samples are of
/// something else, and are left out with a note.
pub(super) fn wake_up(
    standby: Standby,
    limit: Duration,
    notes: &mut Vec<String>,
) -> Result<Figure, BaselineError> {
    let (wait, spin) = match standby {
        Standby::Parked => (PARKED, 0),
        Standby::Spinning => (SPINNING, 1),
    };
    let elsewhere = affinity() & !(1 << rustix::thread::sched_getcpu().min(63));
    let child = Child::start("waiting", |board| {
        board.spin.store(spin, Ordering::Relaxed);
        // Two that spin on one processor wait for its scheduler and for nothing else; a fork that
        // keeps its standby spinning keeps it elsewhere too.
        if standby == Standby::Spinning && elsewhere != 0 {
            set_affinity(elsewhere)?;
        }
        let mut order = 0;
        loop {
            order = park(board, order);
            stamp(board, 0);
            answer(board, order);
        }
    })?;
    let (mut samples, mut absent) = (Vec::with_capacity(SAMPLES), Vec::new());
    for counts in Rounds::new(WARM_UP, SAMPLES, limit) {
        child.ready()?;
        keep_busy(wait);
        let start = child.order()?;
        let looked = child.board().looked_ns.load(Ordering::Relaxed);
        let is_absent = standby == Standby::Spinning && looked + ABSENT_NS < start;
        if counts {
            let sample = us_between(start, stamped(child.board(), 0));
            if is_absent { absent.push(sample) } else { samples.push(sample) }
        }
    }
    if !absent.is_empty() {
        let (absent, all) = (absent.len(), absent.len() + samples.len());
        notes
            .push(format!("the spinning process was off its processor in {absent} of {all} waits"));
    }
    Figure::of("wake-up", if samples.is_empty() { &absent } else { &samples })
}

/// From `KVM_RUN` to the first exit in a process that made its machine, rehearsed once, slept and
/// was woken.
pub(super) fn first_run(
    host: &Host,
    image: &Image<Sealed>,
    config: &FloorConfig,
    limit: Duration,
) -> Result<Figure, BaselineError> {
    let mut samples = Vec::with_capacity(SAMPLES);
    for _ in Rounds::new(0, SAMPLES / RUNS_PER_STANDBY, limit) {
        let child = Child::start("rehearsed", |board| rehearsed(board, host, image, config))?;
        for _ in 0..RUNS_PER_STANDBY {
            child.ready()?;
            keep_busy(PARKED);
            child.order()?;
            samples.push(us_between(stamped(child.board(), 0), stamped(child.board(), 1)));
        }
        // It is gone before the next one is made: KVM's slow end of a machine is not to run into a
        // sample, and its reservation of huge pages is needed again.
        drop(child);
    }
    Figure::of("first run", &samples)
}

fn rehearsed(
    board: &Board,
    host: &Host,
    image: &Image<Sealed>,
    config: &FloorConfig,
) -> Result<(), BaselineError> {
    let layout = RamLayout::new(config.memory_mib);
    let mapping = image.map_private()?;
    let machine = guest::machine(layout, config.vcpus, DirtyMode::Ring);
    let (_machine, mut vcpus, _log) = Machine::new(host, machine, &mapping, true)?;
    let vcpu = vcpus.first_mut().ok_or(BaselineError::NoSamples { what: "a machine's vCPU" })?;
    guest::boot(vcpu)?;
    guest::run(vcpu)?;
    let mut order = 0;
    loop {
        // The port write of the last run is finished here, not in the run that is timed.
        vcpu.settle()?;
        order = park(board, order);
        stamp(board, 0);
        guest::run(vcpu)?;
        stamp(board, 1);
        answer(board, order);
    }
}

/// Lets time pass as the parent of a fork does: running. Its processor stays its own, and the
/// standby's, with nothing to do, goes to sleep.
fn keep_busy(time: Duration) {
    let until = Instant::now() + time;
    while Instant::now() < until {
        std::hint::spin_loop();
    }
}

fn stamp(board: &Board, index: usize) {
    board.stamps.0[index].store(now_ns(), Ordering::Relaxed);
}

fn stamped(board: &Board, index: usize) -> u64 {
    board.stamps.0[index].load(Ordering::Relaxed)
}
