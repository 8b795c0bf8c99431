//! What only the host knows: how children are, and when they end.

use std::sync::MutexGuard;
use std::time::Duration;

use fuser::{Errno, ReplyData};
use guest_wire::{ChildInfo, Status};
use uuid::Uuid;

use super::house::notify;
use super::node::{ChildFile, status_text};
use super::service::{Inner, Service, Waiter};
use crate::host::HostError;
use crate::processes::since_boot;
use crate::state::Constants;

/// How long the host may take to tell about a child.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// For so long after a fork the host may not know the child yet, and is asked again now and then.
/// The host itself waits for some seconds before it says so, and on a busy one a child may be late.
const AMNESTY: Duration = Duration::from_secs(8);
const AGAIN: Duration = Duration::from_millis(100);
/// When too many ends are waited for, the next are asked for after this time.
const LATER: Duration = Duration::from_secs(2);

/// A read of something that only the host knows.
pub(super) struct Asked {
    pub(super) child: u32,
    file: ChildFile,
    handle: u64,
    pub(super) limit: Duration,
    size: u32,
    pub(super) reply: ReplyData,
}

/// A question that the host is to be asked, or asked again.
#[derive(Clone, Copy)]
pub(super) enum Again {
    /// For the end of this child.
    Wait(u32),
    /// For the read with this number.
    Read(u64),
}

impl Service {
    /// Asks the host for the contents of a file, and answers the read when it knows.
    pub(super) fn ask(
        &self,
        mut inner: MutexGuard<'_, Inner>,
        (child, file): (u32, ChildFile),
        uuid: Uuid,
        (handle, size): (u64, u32),
        reply: ReplyData,
    ) {
        let id = inner.next_asked;
        inner.next_asked += 1;
        let limit = since_boot().saturating_add(ANSWER_LIMIT);
        inner.asked.insert(id, Asked { child, file, handle, limit, size, reply });
        self.tick.notify_one();
        drop(inner);
        self.ask_for_read(id, uuid);
    }

    pub(super) fn ask_for_end(&self, number: u32, child: Uuid) {
        let (Some(host), this) = (self.host(), self.this.clone()) else { return };
        let then = move |code| {
            if let Some(service) = this.upgrade() {
                service.ended(number, code);
            }
        };
        host.wait(child, Box::new(then));
    }

    pub(super) fn ask_for_read(&self, id: u64, child: Uuid) {
        let (Some(host), this) = (self.host(), self.this.clone()) else { return };
        let then = move |info| {
            if let Some(service) = this.upgrade() {
                service.answered(id, info);
            }
        };
        host.child(child, Box::new(then));
    }

    fn answered(&self, id: u64, info: Result<ChildInfo, HostError>) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        let Some(asked) = inner.asked.remove(&id) else { return };
        let info = match info {
            Ok(info) => info,
            Err(HostError::Unknown) if inner.is_young(asked.child) => {
                inner.asked.insert(id, asked);
                inner.again.push((since_boot().saturating_add(AGAIN), Again::Read(id)));
                self.tick.notify_one();
                return;
            }
            Err(error) => {
                drop(guard);
                return asked.reply.error(errno(error));
            }
        };
        let constants = Constants { snapshot: info.snapshot, creation_time: info.creation_time };
        inner.machine.children.learned(asked.child, constants);
        let text = match asked.file {
            ChildFile::Status => status_text(info.status),
            file => constant_text(constants, file),
        };
        let text = text.as_bytes();
        if let Some(handle) = inner.handles.get(asked.handle) {
            handle.keep(text);
        }
        drop(guard);
        let size = usize::try_from(asked.size).unwrap_or(usize::MAX);
        asked.reply.data(text.get(..size).unwrap_or(text));
        if let (Status::Stopped, Some(code)) = (info.status, info.exit) {
            self.ended(asked.child, Ok(code));
        }
    }

    /// A child has stopped, or the host does not know it.
    fn ended(&self, child: u32, code: Result<i32, HostError>) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        match code {
            Ok(code) => inner.machine.children.stopped(child, code, since_boot()),
            Err(HostError::Unknown) if inner.is_young(child) => {
                inner.again.push((since_boot().saturating_add(AGAIN), Again::Wait(child)));
                self.tick.notify_one();
                return;
            }
            Err(HostError::Unknown) => inner.machine.children.disown(child),
            Err(HostError::TooMany) => {
                inner.again.push((since_boot().saturating_add(LATER), Again::Wait(child)));
                self.tick.notify_one();
                return;
            }
            Err(HostError::OfParent) => return,
        }
        let is_there = inner.machine.children.get(child).is_ok();
        let (let_go, stay) =
            std::mem::take(&mut inner.waiters).into_iter().partition(|w| w.child == child);
        let let_go: Vec<Waiter> = let_go;
        inner.waiters = stay;
        for _ in &let_go {
            inner.machine.children.released(child);
        }
        let polls = inner.take_polls(child);
        self.tick.notify_one();
        drop(guard);
        for waiter in let_go {
            if is_there {
                waiter.reply.written(waiter.len_bytes);
            } else {
                waiter.reply.error(Errno::ESTALE);
            }
        }
        notify(polls);
    }
}

impl Inner {
    /// Whether the host may not know the child yet.
    fn is_young(&self, child: u32) -> bool {
        let known = self.machine.children.get(child);
        known.is_ok_and(|known| since_boot().saturating_sub(known.since) < AMNESTY)
    }

    /// What is to be asked again now, and about whom.
    pub(super) fn take_again(&mut self, now: Duration) -> Vec<(Again, Uuid)> {
        let due = self.again.extract_if(.., |(at, _)| *at <= now).collect::<Vec<_>>();
        let whom = |what| {
            let number = match what {
                Again::Wait(number) => Some(number),
                Again::Read(id) => self.asked.get(&id).map(|asked| asked.child),
            };
            let child = self.machine.children.get(number?).ok()?;
            Some((what, child.uuid))
        };
        due.into_iter().filter_map(|(_, what)| whom(what)).collect()
    }

    pub(super) fn take_late(&mut self, now: Duration) -> Vec<Asked> {
        self.asked.extract_if(.., |_, asked| asked.limit <= now).map(|(_, asked)| asked).collect()
    }
}

/// What the files show that do not change.
pub(super) fn constant_text(constants: Constants, file: ChildFile) -> String {
    match file {
        ChildFile::Snapshot => format!("{}\n", constants.snapshot),
        ChildFile::CreationTime => format!("{}\n", constants.creation_time),
        ChildFile::Status | ChildFile::Wait => String::new(),
    }
}

fn errno(error: HostError) -> Errno {
    match error {
        HostError::Unknown | HostError::OfParent => Errno::ESTALE,
        HostError::TooMany => Errno::EIO,
    }
}
