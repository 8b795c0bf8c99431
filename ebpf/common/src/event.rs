//! One thing that happened, as it is sent for `runtime trace`.

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EventKind {
    /// A page fault of the process; `what` is the address, in guest memory the offset in its image;
    /// `detail` the error code, the number of a [`Metric`](crate::Metric) in the upper half.
    Fault = 0,
    /// A fault of the guest that KVM resolved; `what` is the guest physical address (where the
    /// processor walks shadow page tables, the virtual one: it is what KVM tells then).
    KvmFault = 1,
    /// An exit to user space; `what` is the reason.
    Exit = 2,
    /// A thread that had been woken runs.
    OffCpu = 3,
    /// An `ioctl` to KVM; `what` is its number.
    Ioctl = 4,
    /// A stage of a fork begins; `what` is the engine's number of it.
    Stage = 5,
}

impl EventKind {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Fault, Self::KvmFault, Self::Exit, Self::OffCpu, Self::Ioctl, Self::Stage];

    /// The kind with that number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == number)
    }
}

/// One thing that happened. Written by the kernel, so its numbers need not be known here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    /// When it ended, in ns of the monotonic clock.
    pub ns: u64,
    /// How long it took, in ns.
    pub took_ns: u64,
    /// See [`EventKind`].
    pub what: u64,
    /// See [`EventKind`].
    pub detail: u64,
    /// The process.
    pub pid: u32,
    /// The thread.
    pub tid: u32,
    /// An [`EventKind`].
    pub kind: u8,
    /// A [`Role`](crate::Role).
    pub role: u8,
    /// The stage of the fork.
    pub stage: u16,
    /// Fills the eight bytes.
    pub unused: u32,
}

impl Event {
    /// Reads one from a record of the ring buffer; `None` if it is too short.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let half = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        Some(Self {
            ns: word(0)?,
            took_ns: word(8)?,
            what: word(16)?,
            detail: word(24)?,
            pid: half(32)?,
            tid: half(36)?,
            kind: *bytes.get(40)?,
            role: *bytes.get(41)?,
            stage: u16::from_ne_bytes(bytes.get(42..44)?.try_into().ok()?),
            unused: half(44)?,
        })
    }
}

const _: () = assert!(size_of::<Event>() == 48);
