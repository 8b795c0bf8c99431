//! I/O ports of the doorbell device. All registers are 32 bits wide unless stated.
//!
//! | port | direction | meaning |
//! | --- | --- | --- |
//! | [`FORK`] | write | fork now; the value is the number of children, 1 to [`MAX_CHILDREN`] |
//! | [`FORK`] | read, also `rep insd` | the [`answer`] to the last fork, word after word; a write to [`FORK`] rewinds. The first read in the parent waits until the outcome is known |
//! | [`ANNOUNCE`] | write | a fork is expected within this many microseconds (at most [`MAX_ANNOUNCE_US`]): the standby is woken and spins for it |
//! | [`EXIT`] | write | stop the instance with this exit code (lowest 8 bits) |
//! | [`CONSOLE`] | write, 8 bits, also `rep outsb` | console output |
//! | [`PARK`] | write | block this vCPU until the parameter page's sequence number differs from the value |
//! | [`DONE`] | write | the program with this sequence number is finished, its results are in the parameter page |
//! | [`READY`] | write | this instance may be armed: from here on it is forkable |
//! | [`PAUSE`] | write | block this vCPU for this many microseconds |
//! | [`CLOCK`] | read by `rep insd` of two words | the host's wall clock at this moment, nanoseconds since the epoch, low word first |

/// Fork doorbell and its answer.
pub const FORK: u16 = 0xd00;
/// Announces a fork.
pub const ANNOUNCE: u16 = 0xd04;
/// Stops the instance.
pub const EXIT: u16 = 0xd08;
/// Console output, one byte at a time.
pub const CONSOLE: u16 = 0xd0c;
/// Waits for a program.
pub const PARK: u16 = 0xd10;
/// Reports the end of a program.
pub const DONE: u16 = 0xd14;
/// Reports that the guest may be armed.
pub const READY: u16 = 0xd18;
/// Sleeps.
pub const PAUSE: u16 = 0xd1c;
/// The host's wall clock; the same port, read.
pub const CLOCK: u16 = PAUSE;

/// Most children that one fork may ask for.
pub const MAX_CHILDREN: u32 = 128;
/// Longest window, in microseconds, that an announcement may open.
pub const MAX_ANNOUNCE_US: u32 = 10_000;

/// Word positions in the answer to a fork.
pub mod answer {
    /// 0, or the errno with which the fork failed.
    pub const STATUS: usize = 0;
    /// 0 in the parent, 1 to n in the children.
    pub const ROLE: usize = 1;
    /// UUID (4 words, big-endian byte order in memory) of the first child; in a child, the zero UUID.
    pub const CHILD_UUID: usize = 2;
    /// UUID (4 words) of this instance.
    pub const OWN_UUID: usize = 6;
    /// Generation id (2 words, low first); differs between any two machines that share a history.
    pub const GENERATION: usize = 10;
    /// 32 bytes of fresh entropy, for this machine alone.
    pub const ENTROPY: usize = 12;
    /// Host wall clock, nanoseconds since the epoch (2 words, low first).
    pub const REALTIME_NS: usize = 20;
    /// Number of the step that failed, 0 if none did.
    pub const FAILED_STEP: usize = 22;
    /// Number of children of this fork; in the parent their UUIDs follow, 4 words each.
    pub const CHILDREN: usize = 23;
    /// Words before the list of children.
    pub const WORDS: usize = 24;
}

/// Exit codes that the bundled guest uses by itself.
pub mod exit_code {
    /// A program that breaks the rules of [`crate::param`]; the console says which step and why.
    pub const BAD_PROGRAM: u32 = 70;
    /// A panic in the guest; the console has its message.
    pub const PANIC: u32 = 71;
}
