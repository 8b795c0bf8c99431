//! What instances have said on their consoles lately, for `logs` and `console`.

use std::collections::{HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use runtime::proto::Event;
use uuid::Uuid;

/// Bytes that are kept of each instance.
const KEPT: usize = 128 * 1024;
/// Instances that have ended whose output is still kept.
const ENDED: usize = 256;

/// What was said after some point.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins, counted from the first byte that the instance said: behind that point if what
    /// was there is no longer kept.
    pub at: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Nothing follows: the instance has ended.
    pub last: bool,
}

#[derive(Debug, Default)]
struct Log {
    /// Place of the first byte that is kept.
    first: u64,
    bytes: VecDeque<u8>,
    ended: bool,
}

#[derive(Debug, Default)]
struct Inner {
    logs: HashMap<Uuid, Log>,
    /// In the order in which they ended.
    ended: VecDeque<Uuid>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Logs {
    inner: Mutex<Inner>,
    more: Condvar,
}

impl Logs {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of what `instance` says.
    pub fn event(&self, instance: Uuid, event: &Event) {
        let mut inner = self.lock();
        match event {
            Event::Hello { .. } => {
                inner.logs.entry(instance).or_default();
            }
            Event::Console { bytes } => {
                let log = inner.logs.entry(instance).or_default();
                log.bytes.extend(bytes);
                let over = log.bytes.len().saturating_sub(KEPT);
                log.bytes.drain(..over);
                log.first += over as u64;
            }
            Event::Exited { .. } => inner.end(instance),
            _ => return,
        }
        drop(inner);
        self.more.notify_all();
    }

    /// How much `instance` has said so far.
    pub fn end(&self, instance: Uuid) -> Option<u64> {
        self.lock().logs.get(&instance).map(Log::end)
    }

    /// At most `most` bytes of what `instance` has said from byte `from` on, once there is something
    /// or it has ended; nothing new after `time`. `None`: nothing is kept of it.
    pub fn read(&self, instance: Uuid, from: u64, most: usize, time: Duration) -> Option<Piece> {
        let inner = self.lock();
        let waits = |inner: &mut Inner| {
            let log = inner.logs.get(&instance);
            log.is_some_and(|log| !log.ended && log.end() <= from)
        };
        let waited = self.more.wait_timeout_while(inner, time, waits);
        let (inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let log = inner.logs.get(&instance)?;
        let at = from.clamp(log.first, log.end());
        let skip = usize::try_from(at - log.first).unwrap_or(usize::MAX);
        let bytes: Vec<u8> = log.bytes.iter().skip(skip).take(most).copied().collect();
        let last = log.ended && at + bytes.len() as u64 == log.end();
        Some(Piece { at, bytes, last })
    }
}

impl Log {
    fn end(&self) -> u64 {
        self.first + self.bytes.len() as u64
    }
}

impl Inner {
    fn end(&mut self, instance: Uuid) {
        let Some(log) = self.logs.get_mut(&instance) else { return };
        if std::mem::replace(&mut log.ended, true) {
            return;
        }
        self.ended.push_back(instance);
        if self.ended.len() > ENDED
            && let Some(oldest) = self.ended.pop_front()
        {
            self.logs.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    fn says(logs: &Logs, instance: Uuid, bytes: &[u8]) {
        logs.event(instance, &Event::Console { bytes: bytes.into() });
    }

    fn exited() -> Event {
        Event::Exited { code: 0, reason: None }
    }

    #[test]
    fn what_was_said_is_read_in_pieces() {
        let (logs, one) = (Logs::default(), Uuid::new_v4());
        assert_eq!(logs.read(one, 0, 10, NOW), None);
        says(&logs, one, b"hello ");
        says(&logs, one, b"world");
        let piece = |from, most| logs.read(one, from, most, NOW).expect("it is known");
        assert_eq!(piece(0, 8), Piece { at: 0, bytes: b"hello wo".into(), last: false });
        assert_eq!(piece(8, 8), Piece { at: 8, bytes: b"rld".into(), last: false });
        logs.event(one, &exited());
        assert_eq!(piece(0, 8), Piece { at: 0, bytes: b"hello wo".into(), last: false });
        assert_eq!(piece(8, 8), Piece { at: 8, bytes: b"rld".into(), last: true });
        // A place that nobody has come to yet.
        assert_eq!(piece(99, 8), Piece { at: 11, bytes: Vec::new(), last: true });
    }

    #[test]
    fn the_end_of_much_is_kept() {
        let (logs, one) = (Logs::default(), Uuid::new_v4());
        let all: Vec<u8> = (0..=255).cycle().take(3 * KEPT + 5).collect();
        for part in all.chunks(1000) {
            says(&logs, one, part);
        }
        let piece = logs.read(one, 0, usize::MAX, NOW).expect("it is known");
        assert_eq!(piece.at, 2 * KEPT as u64 + 5);
        assert!(piece.bytes == all[2 * KEPT + 5..]);
    }

    #[test]
    fn who_waits_hears_what_comes_and_of_the_end() {
        let (logs, one) = (Logs::default(), Uuid::new_v4());
        logs.event(
            one,
            &Event::Hello {
                uuid: one,
                parent: None,
                pid: 1,
                vcpus: 1,
                memory_mib: 1,
                linux: false,
            },
        );
        let long = Duration::from_secs(20);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| logs.read(one, 0, 10, long));
            std::thread::sleep(Duration::from_millis(20));
            says(&logs, one, b"x");
            let piece = waiting.join().expect("no panic").expect("it is known");
            assert_eq!(piece, Piece { at: 0, bytes: b"x".into(), last: false });
            let waiting = scope.spawn(|| logs.read(one, 1, 10, long));
            std::thread::sleep(Duration::from_millis(20));
            logs.event(one, &exited());
            assert!(waiting.join().expect("no panic").expect("it is known").last);
        });
    }

    #[test]
    fn not_all_that_have_ended_are_kept() {
        let logs = Logs::default();
        let all: Vec<Uuid> = (0..ENDED + 3).map(|_| Uuid::new_v4()).collect();
        for one in &all {
            says(&logs, *one, b"x");
            logs.event(*one, &exited());
            logs.event(*one, &exited());
        }
        let kept = all.iter().filter(|one| logs.read(**one, 0, 1, NOW).is_some()).count();
        assert_eq!(kept, ENDED);
    }
}
