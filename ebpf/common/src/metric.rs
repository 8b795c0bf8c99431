//! What is counted, and whose it is.

/// Numbers and names of the variants of an enumeration.
macro_rules! named {
    ($type:ident { $($variant:ident: $name:literal,)+ }) => {
        impl $type {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The one with that number.
            #[must_use]
            pub fn from_number(number: u8) -> Option<Self> {
                Self::ALL.iter().copied().find(|one| *one as u8 == number)
            }

            /// The one of that name.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|one| one.name() == name)
            }

            /// Its name in output.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name),+
                }
            }
        }
    };
}

/// Who a process is at the moment of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Role {
    /// It has not said so.
    Unknown = 0,
    /// An instance whose guest has been running for a millisecond and more.
    Parent = 1,
    /// A process that standbys are forked from.
    Zygote = 2,
    /// A standby that is being made, sleeps, or takes in what its parent wrote.
    Standby = 3,
    /// From its wake-up for a fork to the first exit of its guest.
    Child = 4,
    /// The first millisecond of its guest after that.
    Young = 5,
}

impl Role {
    /// How long an instance is young, in ns.
    pub const YOUNG_NS: u64 = 1_000_000;
}

named!(Role {
    Unknown: "unknown",
    Parent: "parent",
    Zygote: "zygote",
    Standby: "standby",
    Child: "child",
    Young: "young",
});

/// What is counted. Times are in ns.
///
/// Page faults are told apart by what the processor says when they begin (the bits *present* and
/// *write* of the error code) and by whether the kernel calls them major when they end:
///
/// - *copy on write*: a write to a page that was mapped, but not for writing. As a rule a page that is shared is
///   copied then; the last owner of one gets it without a copy.
/// - *minor*: the page was not mapped. The first write to a page of a private mapping that was not
///   read before is one of these, though it copies the page, too: nothing at hand tells it apart.
/// - *major*: whatever it was, somebody waited for a disk.
///
/// A page is what the kernel maps at a time, 4 KiB or 2 MiB, and where a file's neighbouring pages are
/// in memory, a read maps up to 16 of them (`fault_around_bytes`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Metric {
    /// Page faults of the process in guest memory: writes to a page that was mapped for reading.
    GuestCow = 0,
    /// Others in guest memory that needed no disk.
    GuestMinor = 1,
    /// Those in guest memory that needed one.
    GuestMajor = 2,
    /// Page faults outside guest memory: writes to a page that was mapped for reading.
    OwnCow = 3,
    /// Others outside guest memory that needed no disk.
    OwnMinor = 4,
    /// Those outside guest memory that needed one.
    OwnMajor = 5,
    /// Faults of the guest that KVM resolved.
    KvmFault = 6,
    /// Exits to user space by reason: no time, the bucket is the reason. Instances count their own.
    Exits = 7,
    /// From the wake-up of a thread until it ran.
    OffCpu = 8,
    /// `ioctl` calls to KVM, but for `KVM_RUN`. Instances time their own; the probes do so, too, at
    /// the level for single forks.
    Ioctl = 9,
    /// Stages of a fork in the parent, from the engine's report.
    StageTakeWake = Self::STAGES + 2,
    /// Until the other vCPUs are stopped.
    StageQuiesce = Self::STAGES + 3,
    /// Until the doorbell's instruction is finished.
    StageSettle = Self::STAGES + 4,
    /// Until dirty pages are in the journal.
    StageCapturePages = Self::STAGES + 5,
    /// Until state is captured.
    StageCaptureState = Self::STAGES + 6,
    /// Until the parent goes on.
    StageResume = Self::STAGES + 7,
    /// Stages in the child: until all pages are in its memory.
    StageApply = Self::STAGES + 9,
    /// Until its state is set.
    StageRestore = Self::STAGES + 10,
    /// Until all siblings agree.
    StageCommit = Self::STAGES + 11,
    /// Until it is out of the guest for the first time.
    StageRun = Self::STAGES + 12,
}

impl Metric {
    /// The moment of the engine that ends a stage (see [`Beacon::stage`](crate::Beacon::stage)) and
    /// this number are the stage's.
    const STAGES: u8 = 16;
    /// Page faults of the process in guest memory.
    pub const GUEST_FAULTS: [Self; 3] = [Self::GuestCow, Self::GuestMinor, Self::GuestMajor];
    /// Page faults of the process.
    pub const PROCESS_FAULTS: [Self; 6] = [
        Self::GuestCow,
        Self::GuestMinor,
        Self::GuestMajor,
        Self::OwnCow,
        Self::OwnMinor,
        Self::OwnMajor,
    ];
}

named!(Metric {
    GuestCow: "guest_cow",
    GuestMinor: "guest_minor",
    GuestMajor: "guest_major",
    OwnCow: "own_cow",
    OwnMinor: "own_minor",
    OwnMajor: "own_major",
    KvmFault: "kvm_fault",
    Exits: "exits",
    OffCpu: "off_cpu",
    Ioctl: "ioctl",
    StageTakeWake: "stage_take_wake",
    StageQuiesce: "stage_quiesce",
    StageSettle: "stage_settle",
    StageCapturePages: "stage_capture_pages",
    StageCaptureState: "stage_capture_state",
    StageResume: "stage_resume",
    StageApply: "stage_apply",
    StageRestore: "stage_restore",
    StageCommit: "stage_commit",
    StageRun: "stage_run",
});
