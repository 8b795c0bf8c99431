//! What is counted, and whose it is.

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
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Unknown, Self::Parent, Self::Zygote, Self::Standby, Self::Child, Self::Young];
    /// How long an instance is young, in ns.
    pub const YOUNG_NS: u64 = 1_000_000;

    /// The role with that number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|role| *role as u8 == number)
    }

    /// The role of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }

    /// Its name in output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Parent => "parent",
            Self::Zygote => "zygote",
            Self::Standby => "standby",
            Self::Child => "child",
            Self::Young => "young",
        }
    }
}

/// What is counted. Times are in ns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Metric {
    /// Page faults of the process in guest memory that copied a page.
    GuestCow = 0,
    /// Others in guest memory that needed no disk.
    GuestMinor = 1,
    /// Those in guest memory that needed one.
    GuestMajor = 2,
    /// Page faults outside guest memory that copied a page.
    OwnCow = 3,
    /// Others outside guest memory that needed no disk.
    OwnMinor = 4,
    /// Those outside guest memory that needed one.
    OwnMajor = 5,
    /// Faults of the guest that KVM resolved.
    KvmFault = 6,
    /// Exits to user space by reason: no time, the bucket is the reason.
    Exits = 7,
    /// From the wake-up of a thread until it ran.
    OffCpu = 8,
    /// `ioctl` calls to KVM.
    Ioctl = 9,
}

impl Metric {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::GuestCow,
        Self::GuestMinor,
        Self::GuestMajor,
        Self::OwnCow,
        Self::OwnMinor,
        Self::OwnMajor,
        Self::KvmFault,
        Self::Exits,
        Self::OffCpu,
        Self::Ioctl,
    ];

    /// The metric with that number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|metric| *metric as u8 == number)
    }

    /// The metric of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|metric| metric.name() == name)
    }

    /// Its name in output.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::GuestCow => "guest_cow",
            Self::GuestMinor => "guest_minor",
            Self::GuestMajor => "guest_major",
            Self::OwnCow => "own_cow",
            Self::OwnMinor => "own_minor",
            Self::OwnMajor => "own_major",
            Self::KvmFault => "kvm_fault",
            Self::Exits => "exits",
            Self::OffCpu => "off_cpu",
            Self::Ioctl => "ioctl",
        }
    }
}
