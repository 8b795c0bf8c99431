//! Stopping and resuming vCPU threads.
//!
//! ```text
//!            +--------- release --------------+
//!            v                                |
//!   RUNNING --- kick, seen at the gate ---> STOPPED
//!      |  ^                                   ^
//!  block  unblock                             | stop
//!      v  |                                   |
//!   BLOCKED ------------- stop ------------> HELD --- release ---> BLOCKED
//! ```
//!
//! A vCPU that waits in the runtime (for a program, for a pause to end) has saved its state before:
//! it is `BLOCKED`, and stopping it costs one compare-and-swap instead of a wake-up.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::kvm::{Kick, VcpuState};
use crate::sys::{self, futex_wait, futex_wake, now_ns};

const RUNNING: u32 = 0;
const STOPPED: u32 = 1;
const BLOCKED: u32 = 2;
const HELD: u32 = 3;
/// The thread has not come to the gate yet.
const STARTING: u32 = 4;

/// How long a stop spins before it sleeps: longer than a vCPU needs to leave the guest.
const SPIN_NS: u64 = 100_000;

/// The threads of an instance's vCPUs.
#[derive(Debug)]
pub struct Gate {
    /// How many want it closed: vCPUs stop at the gate while this is not 0.
    closed: AtomicU32,
    /// Held while it is closed by one more, and while it opens: who closes it anew must not take a
    /// vCPU for held that is being let go.
    turning: Mutex<()>,
    /// Futex: changes when a vCPU stops.
    stops: AtomicU32,
    quit: AtomicBool,
    vcpus: Vec<Seat>,
}

#[derive(Debug)]
struct Seat {
    kick: Kick,
    tid: AtomicI32,
    state: AtomicU32,
    /// Futex of a blocked vCPU.
    bell: AtomicU32,
    /// A held vCPU whose condition came true sleeps until it is released.
    waits_for_release: AtomicBool,
    /// It left the guest for a fork, and is not back yet.
    away: AtomicBool,
    /// State at the last stop; written by the vCPU's thread, read by whoever stopped it.
    saved: Mutex<Box<VcpuState>>,
}

/// All other vCPUs are stopped; dropping it lets them go.
#[derive(Debug)]
#[must_use]
pub struct Stopped<'a> {
    gate: &'a Gate,
    /// Whether there is a vCPU besides the one that stopped the others.
    others: bool,
}

impl Gate {
    /// A gate for vCPUs with these kicks.
    #[must_use]
    pub fn new(kicks: impl Iterator<Item = Kick>) -> Self {
        let seat = |kick| Seat {
            kick,
            tid: AtomicI32::new(0),
            state: AtomicU32::new(STARTING),
            bell: AtomicU32::new(0),
            waits_for_release: AtomicBool::new(false),
            away: AtomicBool::new(false),
            saved: Mutex::default(),
        };
        Self {
            closed: AtomicU32::new(0),
            turning: Mutex::default(),
            stops: AtomicU32::new(0),
            quit: AtomicBool::new(false),
            vcpus: kicks.map(seat).collect(),
        }
    }

    /// Called once by the thread of vCPU `index` before it first enters the guest.
    pub fn enter(&self, index: usize) {
        let seat = &self.vcpus[index];
        seat.tid.store(sys::thread_id(), Ordering::Release);
        seat.state.store(RUNNING, Ordering::SeqCst);
        if self.is_closed() {
            // Whoever closed it did not know of this thread.
            seat.kick.arm();
        }
    }

    /// Whether the instance is to end.
    #[must_use]
    pub fn quitting(&self) -> bool {
        self.quit.load(Ordering::Acquire)
    }

    /// Makes all vCPU threads end.
    pub fn quit(&self) {
        self.quit.store(true, Ordering::SeqCst);
        for seat in &self.vcpus {
            seat.kick.arm();
            let tid = seat.tid.load(Ordering::Acquire);
            if tid != 0 {
                sys::kick(tid);
            }
            seat.bell.fetch_add(1, Ordering::SeqCst);
            futex_wake(&seat.bell);
        }
    }

    /// Waits until the vCPUs that were stopped are on their way into the guest again.
    pub fn wait_resumed(&self) {
        let begin = now_ns();
        let stopped = |seat: &Seat| seat.state.load(Ordering::SeqCst) == STOPPED;
        while self.vcpus.iter().any(stopped) && now_ns() - begin < 10 * SPIN_NS {
            std::hint::spin_loop();
        }
    }

    /// From now on vCPU `index` is out of the guest because of a fork.
    pub fn leave(&self, index: usize) {
        self.vcpus[index].away.store(true, Ordering::SeqCst);
    }

    /// It has done what it had to, and has stamped when.
    pub fn back(&self, index: usize) {
        self.vcpus[index].away.store(false, Ordering::SeqCst);
    }

    /// Whether no vCPU is out of the guest because of a fork. Of those that wait in the runtime for
    /// something else, none is; nor while somebody keeps the gate closed after the fork.
    #[must_use]
    pub fn all_back(&self) -> bool {
        self.is_closed() || self.vcpus.iter().all(|seat| !seat.away.load(Ordering::SeqCst))
    }

    /// Whether vCPU `index` has to stop before it enters the guest again.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst) != 0
    }

    /// Forgets a kick that has been seen. Called by the vCPU's thread before it looks at the gate.
    pub fn disarm(&self, index: usize) {
        self.vcpus[index].kick.disarm();
    }

    /// Puts the state of vCPU `index` where whoever stops it finds it.
    pub fn with_saved<R>(&self, index: usize, f: impl FnOnce(&mut VcpuState) -> R) -> R {
        let mut saved = self.vcpus[index].saved.lock().unwrap_or_else(PoisonError::into_inner);
        f(&mut saved)
    }

    /// Whether vCPU `index`, which is stopped, had saved its state before anybody wanted to stop it.
    #[must_use]
    pub fn is_held(&self, index: usize) -> bool {
        self.vcpus[index].state.load(Ordering::SeqCst) == HELD
    }

    /// Stops at the closed gate. The state has been saved.
    pub fn stop_here(&self, index: usize) {
        let seat = &self.vcpus[index];
        loop {
            seat.state.store(STOPPED, Ordering::SeqCst);
            self.announce_stop();
            loop {
                let closed = self.closed.load(Ordering::SeqCst);
                if closed == 0 || self.quitting() {
                    break;
                }
                futex_wait(&self.closed, closed, None);
            }
            seat.state.store(RUNNING, Ordering::SeqCst);
            // Whoever closed it again meanwhile may have taken this vCPU for stopped.
            if !self.is_closed() || self.quitting() {
                return;
            }
        }
    }

    fn announce_stop(&self) {
        self.stops.fetch_add(1, Ordering::SeqCst);
        futex_wake(&self.stops);
    }

    /// Waits until `ready` holds, the timeout ends, or the instance ends. The state of vCPU `index`
    /// has been saved and does not change meanwhile.
    pub fn block(&self, index: usize, timeout: Option<Duration>, ready: impl Fn() -> bool) {
        let seat = &self.vcpus[index];
        let end =
            timeout.map(|timeout| now_ns() + u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX));
        seat.state.store(BLOCKED, Ordering::SeqCst);
        self.announce_stop();
        loop {
            let bell = seat.bell.load(Ordering::SeqCst);
            let left = end.map(|end| end.saturating_sub(now_ns()));
            if self.quitting() || ready() || left == Some(0) {
                // Twice: the stop that holds it may end between the first try and the flag.
                for _ in 0..2 {
                    let swap = seat.state.compare_exchange(
                        BLOCKED,
                        RUNNING,
                        Ordering::SeqCst,
                        Ordering::SeqCst,
                    );
                    if swap.is_ok() || self.quitting() {
                        seat.waits_for_release.store(false, Ordering::SeqCst);
                        return;
                    }
                    seat.waits_for_release.store(true, Ordering::SeqCst);
                }
                futex_wait(&seat.bell, bell, None);
            } else {
                futex_wait(&seat.bell, bell, left.map(Duration::from_nanos));
            }
        }
    }

    /// Sleeps for `time`, or less. Whoever stops vCPU `index` waits for it.
    pub fn nap(&self, index: usize, time: Duration) {
        let bell = &self.vcpus[index].bell;
        futex_wait(bell, bell.load(Ordering::SeqCst), Some(time));
    }

    /// Makes all blocked vCPUs look at their conditions again.
    pub fn unblock_all(&self) {
        for index in 0..self.vcpus.len() {
            self.unblock(index);
        }
    }

    /// Makes a blocked vCPU look at its condition again.
    pub fn unblock(&self, index: usize) {
        let seat = &self.vcpus[index];
        seat.bell.fetch_add(1, Ordering::SeqCst);
        futex_wake(&seat.bell);
    }

    /// Stops every vCPU but `own` and returns when all have stopped and saved their state.
    /// `None` if they did not within `timeout`; they are let go then.
    pub fn stop(&self, own: Option<usize>, timeout: Duration) -> Option<Stopped<'_>> {
        let turning = self.turning.lock().unwrap_or_else(PoisonError::into_inner);
        self.closed.fetch_add(1, Ordering::SeqCst);
        drop(turning);
        let stopped = Stopped { gate: self, others: self.others(own).next().is_some() };
        for (_, seat) in self.others(own) {
            let state = &seat.state;
            let held =
                state.compare_exchange(BLOCKED, HELD, Ordering::SeqCst, Ordering::SeqCst).is_ok();
            if !held && state.load(Ordering::SeqCst) == RUNNING {
                seat.kick.arm();
                sys::kick(seat.tid.load(Ordering::Acquire));
            }
        }
        let begin = now_ns();
        let limit = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
        loop {
            let stops = self.stops.load(Ordering::SeqCst);
            let waiting = self.others(own).any(|(_, seat)| !Self::hold(seat));
            if !waiting {
                return Some(stopped);
            }
            let waited = now_ns() - begin;
            // Threads that are ending do not stop any more.
            if waited > limit || self.quitting() {
                return None;
            }
            if waited > SPIN_NS {
                futex_wait(&self.stops, stops, Some(Duration::from_millis(1)));
            }
            std::hint::spin_loop();
        }
    }

    fn hold(seat: &Seat) -> bool {
        match seat.state.load(Ordering::SeqCst) {
            STOPPED | HELD => true,
            BLOCKED => seat
                .state
                .compare_exchange(BLOCKED, HELD, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok(),
            _ => false,
        }
    }

    fn others(&self, own: Option<usize>) -> impl Iterator<Item = (usize, &Seat)> {
        self.vcpus.iter().enumerate().filter(move |(index, _)| Some(*index) != own)
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        let gate = self.gate;
        let _turning = gate.turning.lock().unwrap_or_else(PoisonError::into_inner);
        if gate.closed.fetch_sub(1, Ordering::SeqCst) > 1 {
            return;
        }
        for seat in &gate.vcpus {
            let held =
                seat.state.compare_exchange(HELD, BLOCKED, Ordering::SeqCst, Ordering::SeqCst);
            if held.is_ok() && seat.waits_for_release.load(Ordering::SeqCst) {
                seat.bell.fetch_add(1, Ordering::SeqCst);
                futex_wake(&seat.bell);
            }
        }
        if self.others {
            futex_wake(&gate.closed);
        }
    }
}
