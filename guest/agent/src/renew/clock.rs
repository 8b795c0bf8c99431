//! The wall clock, set to the host's.
//!
//! A look at the host's clock takes a while, and so may what follows it: the guest's clock is read
//! before and after, so that what lies between is known to half of that time, and the look that took
//! least says most. When the clock was set it is looked at again.

use std::io;
use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use crate::console::say;
use crate::doorbell::Doorbell;

/// Looks at the host's clock, each time the difference is measured.
const LOOKS: u32 = 5;
/// A look that takes less says enough.
const QUICK_NS: i128 = 200_000;
/// A clock that is as near is right.
const NEAR_NS: i128 = 200_000;
/// How often it is set at most: where there is no processor for us, it stays as near as it came.
const SETTINGS: u32 = 16;
/// A clock that is further away is worth a word.
const FAR_NS: i128 = 1_000_000;

/// Sets it, unless it is right. Returns by how much it was wrong.
///
/// # Errors
///
/// The host does not tell its time, or the clock may not be set.
pub fn set(doorbell: &dyn Doorbell) -> io::Result<Duration> {
    let first = difference(doorbell)?;
    let mut now = first;
    for _ in 0..SETTINGS {
        let Difference { ahead_ns, uncertain_ns } = now;
        if ahead_ns.abs() <= uncertain_ns.max(NEAR_NS) {
            break;
        }
        clock_settime(ClockId::Realtime, timespec(realtime_ns() + ahead_ns))?;
        now = difference(doorbell)?;
    }
    if now.ahead_ns.abs() - now.uncertain_ns > FAR_NS {
        say(format_args!("the wall clock is {} us off the host's", now.ahead_ns / 1000));
    }
    let wrong = u64::try_from(first.ahead_ns.abs()).unwrap_or(u64::MAX);
    Ok(Duration::from_nanos(wrong))
}

/// Of the host's clock against this machine's.
#[derive(Clone, Copy, Debug)]
struct Difference {
    ahead_ns: i128,
    /// It may be so much more or less.
    uncertain_ns: i128,
}

fn difference(doorbell: &dyn Doorbell) -> io::Result<Difference> {
    let look = || {
        let before = realtime_ns();
        let host = i128::from(doorbell.clock_ns()?);
        let after = realtime_ns();
        let ahead_ns = host - i128::midpoint(before, after);
        io::Result::Ok(Difference { ahead_ns, uncertain_ns: (after - before) / 2 })
    };
    let mut best = look()?;
    for _ in 1..LOOKS {
        if best.uncertain_ns * 2 <= QUICK_NS {
            break;
        }
        let another = look()?;
        if another.uncertain_ns < best.uncertain_ns {
            best = another;
        }
    }
    Ok(best)
}

fn realtime_ns() -> i128 {
    let now = clock_gettime(ClockId::Realtime);
    i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec)
}

fn timespec(ns: i128) -> Timespec {
    let (seconds, ns) = (ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
    Timespec {
        tv_sec: i64::try_from(seconds).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(ns).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::doorbell::Words;

    /// A host whose clock is `ahead` of this machine's, and whose answers are late but for one.
    struct Host {
        ahead: i128,
        asked: AtomicU32,
        quick: u32,
    }

    impl Doorbell for Host {
        fn announce(&self, _: u32) -> io::Result<()> {
            Ok(())
        }

        fn fork(&self) -> io::Result<Words> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn ready(&self) -> io::Result<()> {
            Ok(())
        }

        fn exit(&self, _: u8) -> io::Result<()> {
            Ok(())
        }

        fn clock_ns(&self) -> io::Result<u64> {
            let now = realtime_ns() + self.ahead;
            if self.asked.fetch_add(1, Ordering::Relaxed) != self.quick {
                std::thread::sleep(Duration::from_millis(30));
            }
            u64::try_from(now).map_err(io::Error::other)
        }
    }

    #[test]
    fn the_look_that_took_least_is_believed() {
        for quick in 0..LOOKS {
            let host = Host { ahead: 5_000_000_000, asked: AtomicU32::new(0), quick };
            let Difference { ahead_ns, uncertain_ns } = difference(&host).unwrap();
            // A late answer alone would be 15 ms off.
            assert!((ahead_ns - host.ahead).abs() <= uncertain_ns, "{ahead_ns} {uncertain_ns}");
            assert!(uncertain_ns < 10_000_000, "{uncertain_ns}");
        }
    }

    /// The clock of the machine that this runs on stays as it is.
    #[test]
    fn a_clock_that_is_right_is_not_set() {
        let host = Host { ahead: 0, asked: AtomicU32::new(0), quick: 0 };
        assert!(set(&host).unwrap() < Duration::from_millis(15));
    }

    #[test]
    fn nanoseconds_become_a_time() {
        let time = timespec(1_700_000_000_123_456_789);
        assert_eq!((time.tv_sec, time.tv_nsec), (1_700_000_000, 123_456_789));
        let before = timespec(-1);
        assert_eq!((before.tv_sec, before.tv_nsec), (-1, 999_999_999));
        assert_eq!(timespec(i128::MAX).tv_sec, i64::MAX);
    }
}
