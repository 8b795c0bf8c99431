//! What can be wrong with a program.

use core::fmt;

/// A program that cannot be run as it is.
pub(crate) enum Bad {
    /// No such operation.
    Op(u32),
    /// A step for nobody, or for somebody who does not exist.
    Who(u16),
    /// Result words that do not exist.
    Results { first: u16, count: usize },
    /// An argument that is larger than it may be.
    Argument { name: char, value: u64, most: u64 },
    /// A rate of nothing, or without a known clock.
    Rate { pages_per_second: u64, tsc_khz: u64 },
    /// A work area over the guest's own image, in the hole or beyond the page tables.
    WorkArea { start: u64, pages: u64 },
    /// An address outside the area that the operation may use, or not aligned to 8.
    Address { address: u64 },
    /// A kvmclock that never holds still.
    Clock,
}

impl fmt::Display for Bad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Op(op) => write!(f, "unknown operation {op}"),
            Self::Who(who) => write!(f, "unknown set of machines {who}"),
            Self::Results { first, count } => {
                write!(f, "{count} result words from {first} on do not fit")
            }
            Self::Argument { name, value, most } => {
                write!(f, "argument {name} is {value}, at most {most} is possible")
            }
            Self::Rate { pages_per_second, tsc_khz } => {
                write!(
                    f,
                    "cannot pace {pages_per_second} pages a second with a TSC of {tsc_khz} kHz"
                )
            }
            Self::WorkArea { start, pages } => {
                write!(f, "work area of {pages} pages at {start:#x} is not usable")
            }
            Self::Address { address } => {
                write!(f, "no usable word at {address:#x}")
            }
            Self::Clock => write!(f, "kvmclock never holds still"),
        }
    }
}
