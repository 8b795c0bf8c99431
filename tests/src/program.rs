//! Programs of the bundled guest, step by step, and the answers that it reads.

use anyhow::{Result, ensure};
use guest_abi::param::{RESULTS, op, who};
use guest_abi::port::answer;
use runtime::fork::Step;
use runtime::proto::WireStep;
use uuid::Uuid;

/// Steps for one side of the last fork only.
pub trait Side: Sized {
    /// The parent alone does it.
    #[must_use]
    fn in_parent(self) -> Self;
    /// The children alone do it.
    #[must_use]
    fn in_child(self) -> Self;
}

impl Side for WireStep {
    fn in_parent(self) -> Self {
        Self { who: who::PARENT, ..self }
    }

    fn in_child(self) -> Self {
        Self { who: who::CHILD, ..self }
    }
}

/// A step for everybody.
#[must_use]
pub fn step(op: u32, result: u16, args: [u64; 4]) -> WireStep {
    WireStep { op, who: who::ALL, result, args }
}

/// Base pattern of `seed` to all work pages.
#[must_use]
pub fn fill(seed: u64) -> WireStep {
    step(op::FILL, 0, [seed, 0, 0, 0])
}

/// `generation` to `count` random pages picked by `seed`.
#[must_use]
pub fn dirty(count: u64, generation: u64, seed: u64) -> WireStep {
    step(op::DIRTY_RANDOM, 0, [count, generation, seed, 0])
}

/// `generation` to the `count` pages from `first` on.
#[must_use]
pub fn dirty_row(count: u64, generation: u64, first: u64) -> WireStep {
    step(op::DIRTY_STRIDE, 0, [count, generation, first, 1])
}

/// Sum over all work pages, one word.
#[must_use]
pub fn check(result: u16) -> WireStep {
    step(op::CHECK, result, [0; 4])
}

/// Forks; [`Forked::WORDS`] words.
#[must_use]
pub fn fork(children: u64, result: u16) -> WireStep {
    step(op::FORK, result, [children, 0, 0, 0])
}

/// Back to step `target` until it was reached `times` times.
#[must_use]
pub fn again(target: u64, times: u64) -> WireStep {
    step(op::LOOP, 0, [target, times, 0, 0])
}

/// The word at `address`.
#[must_use]
pub fn peek(address: u64, result: u16) -> WireStep {
    step(op::PEEK, result, [address, 0, 0, 0])
}

/// `value` to the word at `address`.
#[must_use]
pub fn poke(address: u64, value: u64) -> WireStep {
    step(op::POKE, 0, [address, value, 0, 0])
}

/// Sleeps.
#[must_use]
pub fn pause(us: u64) -> WireStep {
    step(op::PAUSE, 0, [us, 0, 0, 0])
}

/// Counts in the word at `address` for `ticks`, without leaving the guest.
#[must_use]
pub fn count(ticks: u64, address: u64, result: u16) -> WireStep {
    step(op::COUNT, result, [ticks, address, 0, 0])
}

/// Dirties `per_second` pages a second for `ticks`; two words, the first is how many it were.
#[must_use]
pub fn rate(ticks: u64, generation: u64, seed: u64, per_second: u64, result: u16) -> WireStep {
    step(op::RATE, result, [ticks, generation, seed, per_second])
}

/// Adds 1 to the counter of the `count` pages from `first` on; two words.
#[must_use]
pub fn work(first: u64, count: u64, result: u16) -> WireStep {
    step(op::WORK, result, [first, count, 1, 0])
}

/// TSC, kvmclock in ns, TSC: three words.
#[must_use]
pub fn clock(result: u16) -> WireStep {
    step(op::CLOCK, result, [0; 4])
}

/// Ends the instance.
#[must_use]
pub fn exit(code: u64) -> WireStep {
    step(op::EXIT, 0, [code, 0, 0, 0])
}

/// What a machine reads of a fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forked {
    /// TSC before the doorbell.
    pub tsc_before: u64,
    /// TSC behind it.
    pub tsc_after: u64,
    /// Whether all registers survived.
    pub registers: bool,
    /// 0 or an errno.
    pub status: u32,
    /// 0 in the parent.
    pub role: u32,
    /// First child; nil in a child.
    pub child: Uuid,
    /// This machine.
    pub own: Uuid,
    /// Generation id.
    pub generation: u64,
    /// Entropy.
    pub entropy: [u64; 4],
    /// Wall clock.
    pub realtime_ns: u64,
    /// Number of the step that failed.
    pub failed_step: u32,
    /// Number of children.
    pub children: u32,
}

impl Forked {
    /// Result words of a fork.
    pub const WORDS: usize = 3 + answer::WORDS / 2;

    /// Reads the answer whose first result word is `results[first]`.
    ///
    /// # Errors
    ///
    /// If it does not lie in the results.
    pub fn read(results: &[u64], first: u16) -> Result<Self> {
        let first = usize::from(first);
        ensure!(first + Self::WORDS <= RESULTS, "an answer beyond the results");
        let at = |word: usize| results.get(first + word).copied().unwrap_or(0);
        let half = |word: usize| {
            let pair = at(3 + word / 2);
            if word.is_multiple_of(2) { low(pair) } else { low(pair >> 32) }
        };
        let wide = |word: usize| u64::from(half(word)) | u64::from(half(word + 1)) << 32;
        let uuid = |word: usize| {
            let mut bytes = [0; 16];
            for (index, chunk) in bytes.chunks_mut(4).enumerate() {
                chunk.copy_from_slice(&half(word + index).to_le_bytes());
            }
            Uuid::from_bytes(bytes)
        };
        Ok(Self {
            tsc_before: at(0),
            tsc_after: at(1),
            registers: at(2) == 1,
            status: half(answer::STATUS),
            role: half(answer::ROLE),
            child: uuid(answer::CHILD_UUID),
            own: uuid(answer::OWN_UUID),
            generation: wide(answer::GENERATION),
            entropy: [0, 2, 4, 6].map(|word| wide(answer::ENTROPY + word)),
            realtime_ns: wide(answer::REALTIME_NS),
            failed_step: half(answer::FAILED_STEP),
            children: half(answer::CHILDREN),
        })
    }

    /// The step that failed.
    #[must_use]
    pub fn step(&self) -> Option<Step> {
        Step::from_number(self.failed_step)
    }
}

fn low(word: u64) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "the lower half is what is asked for")]
    let half = word as u32;
    half
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_from_the_words_that_the_guest_stores() -> Result<()> {
        let mut results = vec![0; 40];
        results[10] = 100;
        results[11] = 200;
        results[12] = 1;
        results[13] = 2 << 32 | 0xc; // status, role
        results[14] = 0x0706_0504_0302_0100; // first half of the child's UUID
        results[13 + answer::FAILED_STEP / 2] = 0x7 | 3 << 32;
        let forked = Forked::read(&results, 10)?;
        assert_eq!((forked.tsc_before, forked.tsc_after, forked.registers), (100, 200, true));
        assert_eq!((forked.status, forked.role), (12, 2));
        assert_eq!(&forked.child.as_bytes()[..8], &[0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!((forked.step(), forked.children), (Some(Step::CapturePages), 3));
        assert!(Forked::read(&results, 190).is_err());
        Ok(())
    }
}
