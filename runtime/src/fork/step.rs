//! The steps of a fork: what is stamped, what can fail, and what a failure says.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::beacon;
use crate::instance::POOL_EMPTY;
use crate::kvm::KvmError;
use crate::memory::{BackingKind, MemoryError};
use crate::sys::{SysError, now_ns};

/// A step of a fork, in the order of the fork path. Its number is what the guest reads as
/// `FAILED_STEP`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u32)]
pub enum Step {
    /// Making the instance forkable: private memory, sealed image, dirty tracking, zygote.
    Arm = 1,
    /// Making a standby: its process, machine, rehearsal.
    Prewarm = 2,
    /// Taking enough standbys from the pool.
    Take = 3,
    /// Waking them.
    Wake = 4,
    /// Stopping the parent's other vCPUs.
    Quiesce = 5,
    /// Finishing the instruction that rang the doorbell.
    Settle = 6,
    /// Collecting dirty pages and copying them to the journal.
    CapturePages = 7,
    /// Reading vCPU and interrupt controller state.
    CaptureState = 8,
    /// In the child: writing the dirty pages to its memory.
    ApplyPages = 9,
    /// In the child: setting vCPU and interrupt controller state.
    RestoreState = 10,
    /// In the child: becoming somebody else.
    Identity = 11,
    /// In the child: agreeing with its siblings that all made it.
    Commit = 12,
}

impl Step {
    /// All steps.
    pub const ALL: [Self; 12] = [
        Self::Arm,
        Self::Prewarm,
        Self::Take,
        Self::Wake,
        Self::Quiesce,
        Self::Settle,
        Self::CapturePages,
        Self::CaptureState,
        Self::ApplyPages,
        Self::RestoreState,
        Self::Identity,
        Self::Commit,
    ];

    /// The step with that number.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|step| *step as u32 == number)
    }

    /// Its name in errors and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Arm => "arm",
            Self::Prewarm => "prewarm",
            Self::Take => "take",
            Self::Wake => "wake",
            Self::Quiesce => "quiesce",
            Self::Settle => "settle",
            Self::CapturePages => "capture_pages",
            Self::CaptureState => "capture_state",
            Self::ApplyPages => "apply_pages",
            Self::RestoreState => "restore_state",
            Self::Identity => "identity",
            Self::Commit => "commit",
        }
    }
}

/// A fork that failed. The parent runs on.
#[derive(Debug, thiserror::Error)]
#[error("fork failed at step {}", .step.name())]
pub struct ForkError {
    /// The step.
    pub step: Step,
    /// Why.
    #[source]
    pub cause: ForkCause,
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum ForkCause {
    /// A KVM call failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Memory could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Another system call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// A child reported this errno.
    #[error("a child reported: {}", std::io::Error::from_raw_os_error(*.errno))]
    Child {
        /// What the child reported.
        errno: i32,
    },
    /// There was no huge page for a child.
    #[error("{POOL_EMPTY}")]
    PoolEmpty,
    /// A child died before it could run.
    #[error("a standby died")]
    Died,
    /// The zygote is gone.
    #[error("the zygote is gone")]
    ZygoteGone,
    /// Nothing happened for too long.
    #[error("no answer within {waited_ms} ms")]
    Timeout {
        /// How long was waited.
        waited_ms: u64,
    },
    /// The journal has no room for more pages.
    #[error("{needed} dirty pages do not fit into the journal of {room}")]
    JournalFull {
        /// Pages to be shipped.
        needed: usize,
        /// Room for pages.
        room: usize,
    },
    /// More children were asked for than one fork can make.
    #[error("{requested} children were asked for, between 1 and {most} are possible")]
    Children {
        /// Children asked for.
        requested: u32,
        /// Most that can be.
        most: u32,
    },
    /// Injected by a test.
    #[error("injected: {}", std::io::Error::from_raw_os_error(*.errno))]
    Injected {
        /// The errno asked for.
        errno: i32,
    },
}

impl ForkCause {
    /// What a child of an instance whose memory is of that kind reported.
    #[must_use]
    pub fn of_child(errno: i32, kind: BackingKind) -> Self {
        match (errno, kind) {
            (libc::ENOMEM, BackingKind::Hugetlb) => Self::PoolEmpty,
            _ => Self::Child { errno },
        }
    }

    /// The errno that the guest is told.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Kvm(error) => error.errno(),
            Self::Memory(MemoryError::Sys(error)) | Self::Sys(error) => error.errno(),
            Self::Memory(MemoryError::Memfd { source, .. }) => {
                source.raw_os_error().unwrap_or(libc::EIO)
            }
            Self::Memory(MemoryError::PoolExhausted { .. } | MemoryError::ShmemThpOff) => {
                libc::ENOMEM
            }
            Self::PoolEmpty => libc::ENOMEM,
            Self::Child { errno } | Self::Injected { errno } => *errno,
            Self::Died | Self::ZygoteGone => libc::ECHILD,
            Self::Timeout { .. } => libc::ETIMEDOUT,
            Self::JournalFull { .. } => libc::ENOBUFS,
            Self::Children { .. } => libc::EINVAL,
        }
    }
}

impl ForkError {
    /// For `map_err`: the error of `step`.
    pub fn at<E: Into<ForkCause>>(step: Step) -> impl FnOnce(E) -> Self {
        move |cause| Self { step, cause: cause.into() }
    }
}

/// A place where a test can make a step fail. Lives in shared memory: it is set in the parent and
/// works in the standbys too. Costs one load per step.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Fault {
    step: AtomicU32,
    errno: AtomicU32,
    delay_us: AtomicU32,
}

/// Instead of returning an error, the process that reaches the step is killed.
pub const FAULT_KILL: u32 = u32::MAX;
/// Instead of failing, the step takes longer.
pub const FAULT_DELAY: u32 = u32::MAX - 1;
/// What is left of a delay when it is waited for to the microsecond.
const LONG_NS: u64 = 2_000_000;

/// Instead of returning this errno, KVM handles fewer MSRs than it was asked to.
pub const FAULT_SHORT_MSRS: u32 = u32::MAX - 2;

impl Fault {
    /// Makes the next arrival at `step` fail with `errno` (or [`FAULT_KILL`], [`FAULT_SHORT_MSRS`]);
    /// with [`FAULT_DELAY`] every arrival takes `delay_us` longer, or until it is taken back.
    pub fn set(&self, step: Step, errno: u32, delay_us: u32) {
        self.errno.store(errno, Ordering::Relaxed);
        self.delay_us.store(delay_us, Ordering::Relaxed);
        self.step.store(step as u32, Ordering::Release);
    }

    /// Takes it back.
    pub fn clear(&self) {
        self.step.store(0, Ordering::Release);
    }

    /// Called at the beginning of `step`.
    ///
    /// # Errors
    ///
    /// The injected one.
    pub fn check(&self, step: Step) -> Result<(), ForkError> {
        if self.step.load(Ordering::Acquire) == step as u32 { self.strike(step) } else { Ok(()) }
    }

    #[cold]
    fn strike(&self, step: Step) -> Result<(), ForkError> {
        let errno = self.errno.load(Ordering::Relaxed);
        if errno == FAULT_DELAY {
            let end = now_ns() + u64::from(self.delay_us.load(Ordering::Relaxed)) * 1000;
            // Until it is over, or taken back. A long one leaves the processor to others.
            while now_ns() < end && self.step.load(Ordering::Acquire) == step as u32 {
                if end - now_ns().min(end) > LONG_NS {
                    std::thread::sleep(Duration::from_nanos(LONG_NS / 2));
                } else {
                    std::hint::spin_loop();
                }
            }
            return Ok(());
        }
        self.clear();
        if errno == FAULT_KILL {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
                .unwrap_or(());
        }
        if errno == FAULT_SHORT_MSRS {
            let short =
                KvmError::ShortMsrs { name: "KVM_GET_MSRS", applied: 1, requested: 2, index: 0 };
            return Err(ForkError { step, cause: short.into() });
        }
        Err(ForkError { step, cause: ForkCause::Injected { errno: errno.cast_signed() } })
    }
}

/// Moments of a fork, in nanoseconds of the monotonic clock; 0 where it did not happen.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Stamps {
    at: [AtomicU64; Moment::COUNT],
}

/// A moment that is stamped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
pub enum Moment {
    /// Parent: the vCPU is out of the guest with the request (or the host's request arrived).
    Doorbell = 0,
    /// Parent: standbys are taken and woken.
    Woken,
    /// Parent: all other vCPUs are stopped.
    Quiesced,
    /// Parent: the doorbell's instruction is finished.
    Settled,
    /// Parent: dirty pages are in the journal.
    Pages,
    /// Parent: vCPU state is captured and released to the children.
    Released,
    /// Parent: the vCPU is about to enter the guest again.
    Resumed,
    /// Child: awake.
    Awake,
    /// Child: all pages are in its memory.
    Applied,
    /// Child: state and identity are set.
    Restored,
    /// Child: all siblings agreed; about to enter the guest.
    Entered,
    /// Child: out of the guest for the first time.
    Exited,
}

impl Moment {
    const COUNT: usize = 12;

    /// Its name in a trace.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Doorbell => "doorbell",
            Self::Woken => "standbys woken",
            Self::Quiesced => "other vCPUs stopped",
            Self::Settled => "doorbell instruction finished",
            Self::Pages => "dirty pages captured",
            Self::Released => "state captured",
            Self::Resumed => "about to enter the guest again",
            Self::Awake => "awake",
            Self::Applied => "pages applied",
            Self::Restored => "state and identity restored",
            Self::Entered => "all agreed; about to enter the guest",
            Self::Exited => "out of the guest for the first time",
        }
    }
}

impl Stamps {
    /// Stamps `moment` with the time now.
    pub fn stamp(&self, moment: Moment) {
        self.put(moment, now_ns());
    }

    /// Stamps `moment` with a time taken before.
    pub fn put(&self, moment: Moment, ns: u64) {
        self.at[moment as usize].store(ns, Ordering::Relaxed);
        beacon::moment(moment, ns);
    }

    /// Stamps `moment` with a time taken before, unless a later one is there.
    pub fn raise(&self, moment: Moment, ns: u64) {
        self.at[moment as usize].fetch_max(ns, Ordering::Relaxed);
        beacon::moment(moment, ns);
    }

    /// When it was.
    #[must_use]
    pub fn get(&self, moment: Moment) -> u64 {
        self.at[moment as usize].load(Ordering::Relaxed)
    }

    /// Forgets all moments.
    pub fn clear(&self) {
        for at in &self.at {
            at.store(0, Ordering::Relaxed);
        }
    }
}
