//! What keeps a fork from doing more, or taking longer, than it did.
//!
//! ```text
//!   strace -f ──> trace ──> path: the calls of each fork, by role ──> budgets: as recorded?
//!      │
//!      └─ this program: workload (root, warm-up, forks), allocations marked by heap
//!
//!   results/BASE ──> base: built in a worktree ──> `ab`: base against this executable
//!
//!   prove: A against A stays quiet; 15 % more time, and one more ioctl, do not
//! ```
//!
//! The counts come from the kernel's side, not from counters of the engine: what the engine does
//! not know that it does is counted too. Heap allocations are made visible in the same trace by a
//! marking system call each, so there is one source and one order of events.

pub mod base;
pub mod budgets;
pub mod count;
pub mod heap;
pub mod path;
pub mod prove;
pub mod trace;
pub mod workload;
