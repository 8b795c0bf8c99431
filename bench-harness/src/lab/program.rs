//! What the guest of a scenario does around one fork, as a program of `guest_abi::param`.

use guest_abi::entry::{PAGE, ram_page};
use guest_abi::param::{op, who};
use guest_abi::pattern::WORK_WORD;
use guest_abi::port::answer;
use runtime::proto::WireStep;
use uuid::Uuid;

/// First result words of the steps.
mod slot {
    pub(super) const FORK: u16 = 0;
    pub(super) const CHECK_DIRTY: u16 = 16;
    pub(super) const CHECK_OTHERS: u16 = 17;
    pub(super) const WORK: u16 = 18;
    pub(super) const RATE: u16 = 20;
    pub(super) const PEEK: u16 = 22;
    pub(super) const SPIN: u16 = 24;
}

/// How long the guest spins before anything else, so that the messages that started its program are
/// over when it forks.
const SETTLE_US: u64 = 500;
/// How long it waits between announcing a fork and ringing the doorbell, at most.
const AHEAD_US: u64 = 300;

/// What is known of a guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guest {
    /// Its instance.
    pub(super) uuid: Uuid,
    /// Address of the first work page.
    pub(super) work_start: u64,
    /// Number of work pages.
    pub(super) work_pages: u64,
    /// Ticks in a millisecond.
    pub(super) tsc_khz: u64,
}

impl Guest {
    /// Ticks in `us` µs.
    pub(super) fn ticks(&self, us: u64) -> u64 {
        us * self.tsc_khz / 1000
    }

    /// µs in `ticks`.
    #[expect(clippy::cast_precision_loss, reason = "2^53 ticks are a month")]
    pub(super) fn us(&self, ticks: u64) -> f64 {
        ticks as f64 * 1e3 / self.tsc_khz.max(1) as f64
    }
}

/// A step.
pub(super) fn step(op: u32, who: u16, result: u16, args: [u64; 4]) -> WireStep {
    WireStep { op, who, result, args }
}

/// Random pages picked by a seed; all pages, if `count` is 0.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pick {
    pub(super) count: u64,
    pub(super) seed: u64,
}

/// Pages dirtied at a rate.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rate {
    pub(super) us: u64,
    pub(super) per_second: u64,
    pub(super) seed: u64,
}

/// Work after the fork, over the first pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    /// [`who::PARENT`] or [`who::CHILD`].
    pub(super) who: u16,
    pub(super) pages: u64,
    pub(super) passes: u64,
}

/// One fork with everything around it, in the order in which it happens.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Plan {
    /// Do not spin first: the fork has been due since its message was sent.
    pub(super) at_once: bool,
    pub(super) rate: Option<Rate>,
    pub(super) dirty: Option<Pick>,
    /// Generation that pages are dirtied with.
    pub(super) generation: u64,
    pub(super) announce_us: u64,
    pub(super) children: u32,
    pub(super) work: Option<Work>,
    /// Pages that were dirtied and that the child checks.
    pub(super) check_dirty: Option<Pick>,
    pub(super) check_others: Option<Pick>,
}

impl Plan {
    /// The program.
    pub(super) fn steps(&self, guest: &Guest) -> Vec<WireStep> {
        let mut steps = Vec::new();
        let mut add = |op, who, result, args| steps.push(step(op, who, result, args));
        if !self.at_once {
            add(op::SPIN, who::ALL, slot::SPIN, [guest.ticks(SETTLE_US), 0, 0, 0]);
        }
        if let Some(Rate { us, per_second, seed }) = self.rate {
            let args = [guest.ticks(us), self.generation, seed, per_second];
            add(op::RATE, who::ALL, slot::RATE, args);
        }
        if let Some(Pick { count, seed }) = self.dirty {
            add(op::DIRTY_RANDOM, who::ALL, 0, [count, self.generation, seed, 0]);
        }
        let ahead = guest.ticks(AHEAD_US.min(self.announce_us / 2));
        let args = [self.children.into(), self.announce_us, ahead, 0];
        add(op::FORK, who::ALL, slot::FORK, args);
        if let Some(Work { who, pages, passes }) = self.work {
            add(op::WORK, who, slot::WORK, [0, pages, passes, 0]);
            let last = ram_page(guest.work_start, pages - 1);
            debug_assert_eq!(last % PAGE, 0);
            add(op::PEEK, who::CHILD, slot::PEEK, [last + WORK_WORD * 8, 0, 0, 0]);
        }
        for (pick, result) in
            [(self.check_dirty, slot::CHECK_DIRTY), (self.check_others, slot::CHECK_OTHERS)]
        {
            if let Some(Pick { count, seed }) = pick {
                add(op::CHECK, who::CHILD, result, [count, 0, seed, 0]);
            }
        }
        steps
    }
}

/// Result words of a program.
#[derive(Clone, Debug)]
pub(super) struct Words(pub(super) Vec<u64>);

impl Words {
    /// Result word `index`. Zeroes at the end are not sent.
    pub(super) fn at(&self, index: u16) -> u64 {
        self.0.get(usize::from(index)).copied().unwrap_or(0)
    }

    /// Word `index` of the answer to the fork.
    fn answer(&self, index: usize) -> u32 {
        let pair = u16::try_from(3 + index / 2).map_or(0, |at| self.at(slot::FORK + at));
        let [low, high] = [pair & 0xffff_ffff, pair >> 32];
        u32::try_from(if index.is_multiple_of(2) { low } else { high }).unwrap_or(0)
    }

    fn uuid(&self, first: usize) -> Uuid {
        let mut bytes = [0; 16];
        for (index, to) in bytes.chunks_exact_mut(4).enumerate() {
            to.copy_from_slice(&self.answer(first + index).to_le_bytes());
        }
        Uuid::from_bytes(bytes)
    }

    /// Whether all registers survived the fork.
    pub(super) fn registers_survived(&self) -> bool {
        self.at(slot::FORK + 2) == 1
    }

    /// 0, or the errno of a fork that failed.
    pub(super) fn status(&self) -> u32 {
        self.answer(answer::STATUS)
    }

    /// Step that failed.
    pub(super) fn failed_step(&self) -> u32 {
        self.answer(answer::FAILED_STEP)
    }

    /// 0 in the parent, 1 to n in the children.
    pub(super) fn role(&self) -> u32 {
        self.answer(answer::ROLE)
    }

    /// UUID of the first child, zero in a child.
    pub(super) fn child_uuid(&self) -> Uuid {
        self.uuid(answer::CHILD_UUID)
    }

    /// UUID of the machine that answers.
    pub(super) fn own_uuid(&self) -> Uuid {
        self.uuid(answer::OWN_UUID)
    }

    /// Generation id.
    pub(super) fn generation(&self) -> u64 {
        u64::from(self.answer(answer::GENERATION))
            | u64::from(self.answer(answer::GENERATION + 1)) << 32
    }

    /// Number of children of the fork.
    pub(super) fn children(&self) -> u32 {
        self.answer(answer::CHILDREN)
    }

    /// Checksum of the pages that were dirtied.
    pub(super) fn sum_of_dirty(&self) -> u64 {
        self.at(slot::CHECK_DIRTY)
    }

    /// Checksum of other pages.
    pub(super) fn sum_of_others(&self) -> u64 {
        self.at(slot::CHECK_OTHERS)
    }

    /// Ticks of the first pass of WORK and of all.
    pub(super) fn work_ticks(&self) -> [u64; 2] {
        [self.at(slot::WORK), self.at(slot::WORK + 1)]
    }

    /// The counter of the last page that WORK counts in.
    pub(super) fn counter(&self) -> u64 {
        self.at(slot::PEEK)
    }

    /// Pages that RATE came to, and ticks that it was behind.
    pub(super) fn rate(&self) -> (u64, u64) {
        (self.at(slot::RATE), self.at(slot::RATE + 1))
    }
}

/// The program of a vCPU that is really running some of the time: it counts for 50 µs in work page
/// `page` and sleeps for 200 µs, for ever.
pub(super) fn restless(guest: &Guest, page: u64) -> Vec<WireStep> {
    let word = ram_page(guest.work_start, page) + 64;
    vec![
        step(op::COUNT, who::ALL, 0, [guest.ticks(50), word, 0, 0]),
        step(op::PAUSE, who::ALL, 0, [200, 0, 0, 0]),
        step(op::LOOP, who::ALL, 0, [0, u64::MAX, 0, 0]),
    ]
}

/// RATE alone, without a fork.
pub(super) fn rate_only(guest: &Guest, rate: Rate, generation: u64) -> Vec<WireStep> {
    let args = [guest.ticks(rate.us), generation, rate.seed, rate.per_second];
    vec![
        step(op::SPIN, who::ALL, slot::SPIN, [guest.ticks(SETTLE_US), 0, 0, 0]),
        step(op::RATE, who::ALL, slot::RATE, args),
    ]
}

/// WORK alone, without a fork.
pub(super) fn work_only(guest: &Guest, work: Work) -> Vec<WireStep> {
    vec![
        step(op::SPIN, who::ALL, slot::SPIN, [guest.ticks(SETTLE_US), 0, 0, 0]),
        step(op::WORK, who::ALL, slot::WORK, [0, work.pages, work.passes, 0]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_abi::param::{RESULTS, STEPS};

    const GUEST: Guest =
        Guest { uuid: Uuid::nil(), work_start: 0x20_0000, work_pages: 1000, tsc_khz: 2_000_000 };

    #[test]
    fn the_longest_program_fits() {
        let pick = Some(Pick { count: 1, seed: 2 });
        let plan = Plan {
            rate: Some(Rate { us: 1, per_second: 1, seed: 1 }),
            dirty: pick,
            children: 1,
            work: Some(Work { who: who::PARENT, pages: 1, passes: 1 }),
            check_dirty: pick,
            check_others: pick,
            ..Plan::default()
        };
        let steps = plan.steps(&GUEST);
        assert!(steps.len() < STEPS, "{}", steps.len());
        assert!(usize::from(slot::SPIN) + 4 <= RESULTS);
    }

    #[test]
    fn ticks_and_us_are_the_same_time() {
        assert_eq!(GUEST.ticks(500), 1_000_000);
        assert!((GUEST.us(1_000_000) - 500.0).abs() < 1e-9);
    }

    #[test]
    fn a_uuid_is_read_as_it_lies_in_memory() {
        let uuid = Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);
        let mut answers = [0_u32; answer::WORDS];
        for (word, bytes) in
            answers[answer::OWN_UUID..].iter_mut().zip(uuid.as_bytes().chunks_exact(4))
        {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        answers[answer::ROLE] = 3;
        let pairs = answers.chunks_exact(2).map(|p| u64::from(p[0]) | u64::from(p[1]) << 32);
        let words = Words([1, 2, 1].into_iter().chain(pairs).collect());
        assert_eq!((words.own_uuid(), words.role(), words.status()), (uuid, 3, 0));
        assert!(words.registers_survived() && words.child_uuid().is_nil());
    }
}
