//! Whether a change made forks slower, on a machine whose speed drifts by a factor of two.
//!
//! # The problem
//!
//! On a shared two-core machine the same binary measures 65 µs now and 112 µs in twenty minutes,
//! because of neighbours that nobody can see. Single samples are therefore not independent: they
//! share the mood of the machine, and of the instance that they were taken from. A test that
//! shuffles single samples takes 2,000 forks for 2,000 facts and cries wolf all day (a test in
//! `tests/calibration.rs` shows it).
//!
//! # The design
//!
//! ```text
//! unit 1        unit 2        unit 3            A, B: one batch = one fresh instance,
//! A B B A       B A A B       A B B A   …             some forks
//! └─ d₁ ─┘      └─ d₂ ─┘      └─ d₃ ─┘          d = mean ln q(B) − mean ln q(A)
//! ```
//!
//! 1. The **batch** is the smallest thing that counts. Each starts a fresh process and a fresh
//!    instance, so that the luck of one memory layout is drawn anew and not booked to a revision.
//!    Of its forks only a quantile remains (the median): the tail cannot pull it.
//! 2. The **unit** is four batches, `ABBA` or `BAAB`. Its difference of logarithms cancels any
//!    factor that is constant over the unit, and any that moves linearly.
//! 3. **A coin decides** which of the two a unit is ([`mod@interleave`]). If A and B are the same, the
//!    four times would have been what they were whichever way the coin fell; the only thing that
//!    the labels change is the sign of d. So the 2ᵏ sign patterns of k units are equally likely,
//!    *whatever the machine did*: drift, jumps, autocorrelation and heavy tails included. This is
//!    the randomisation test of R. A. Fisher, and it needs no model of the noise.
//! 4. The statistic over the units is Wilcoxon's **signed-rank** sum: one wild unit has the rank k
//!    and not its size, and the distribution over all 2ᵏ patterns is counted exactly
//!    ([`signed_rank`]), so the same samples always give the same verdict. The size of the
//!    difference is the Hodges–Lehmann estimate that belongs to it.
//! 5. The gate ([`gate`]) alarms only if **all three** thresholds are passed: p, relative size,
//!    absolute size. p alone would alarm for a real difference of 0.5 % that comes from where the
//!    linker put a loop.
//!
//! Exact counts (ioctls, system calls, allocations) do not need any of this: every difference from
//! those recorded is an alarm ([`crate::gate`]).

pub mod bootstrap;
pub mod gate;
pub mod interleave;
pub mod rng;
pub mod signed_rank;

pub use gate::{Judgement, MetricVerdict, Thresholds, Verdict, judge};
pub use interleave::{Batch, Plan, Side, Unit, interleave};
