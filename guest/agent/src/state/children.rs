//! Children of this instance, as `vm/` shows them.
//!
//! ```text
//!  forked ──> alive ──stopped──> stopped ──> gone: ENOENT by name, ESTALE by what is still open
//!                                   │ everybody who waited has read the code, or
//!                                   │ the retention time has passed
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use uuid::Uuid;

/// Numbers of children have this many bits: they are part of inode numbers.
pub const NUMBER_BITS: u32 = 28;

/// The child is not there any more, or belonged to the parent: `ESTALE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// What does not change about a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Constants {
    /// The snapshot that it came from.
    pub snapshot: Uuid,
    /// Seconds since the epoch.
    pub creation_time: u64,
}

/// How far a child is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It has not stopped.
    Alive,
    /// It has stopped with this code.
    Stopped(i32),
}

/// A child.
#[derive(Debug)]
pub struct Child {
    /// Its name.
    pub uuid: Uuid,
    /// When it was forked, since boot.
    pub since: Duration,
    /// Once the host was asked.
    pub constants: Option<Constants>,
    exit: Option<(i32, Duration)>,
    /// Writes to `wait` that were let go, less the codes read.
    owed: u64,
    was_read: bool,
    /// Files opened on `wait` that have not been read.
    unread: BTreeSet<u64>,
}

impl Child {
    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.exit.map_or(Progress::Alive, |(code, _)| Progress::Stopped(code))
    }

    fn is_done(&self) -> bool {
        self.was_read && self.owed == 0 && self.unread.is_empty()
    }
}

/// All of them, by number. A number is never used again, not even after this machine became another.
#[derive(Debug)]
pub struct Children {
    table: BTreeMap<u32, Child>,
    next: u32,
    retention: Duration,
}

impl Children {
    pub(super) fn new(retention: Duration) -> Self {
        Self { table: BTreeMap::new(), next: 0, retention }
    }

    pub(super) fn add(&mut self, uuid: Uuid, since: Duration) -> u32 {
        let number = self.next;
        self.next = (self.next + 1) % (1 << NUMBER_BITS);
        let child = Child {
            uuid,
            since,
            constants: None,
            exit: None,
            owed: 0,
            was_read: false,
            unread: BTreeSet::new(),
        };
        self.table.insert(number, child);
        number
    }

    pub(super) fn clear(&mut self) {
        self.table.clear();
    }

    /// Number and child, in the order of their forks.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Child)> {
        self.table.iter().map(|(number, child)| (*number, child))
    }

    /// The number of the child with this UUID.
    #[must_use]
    pub fn find(&self, uuid: Uuid) -> Option<u32> {
        self.iter().find(|(_, child)| child.uuid == uuid).map(|(number, _)| number)
    }

    /// The child with this number.
    ///
    /// # Errors
    ///
    /// It is gone.
    pub fn get(&self, number: u32) -> Result<&Child, Gone> {
        self.table.get(&number).ok_or(Gone)
    }

    /// The host told what does not change.
    pub fn learned(&mut self, number: u32, constants: Constants) {
        if let Some(child) = self.table.get_mut(&number) {
            child.constants = Some(constants);
        }
    }

    /// It has stopped. The first code stays.
    pub fn stopped(&mut self, number: u32, code: i32, now: Duration) {
        if let Some(child) = self.table.get_mut(&number) {
            child.exit.get_or_insert((code, now));
        }
    }

    /// `wait` was opened for reading.
    pub fn opened(&mut self, number: u32, handle: u64) {
        if let Some(child) = self.table.get_mut(&number) {
            child.unread.insert(handle);
        }
    }

    /// It was closed.
    pub fn closed(&mut self, number: u32, handle: u64) {
        let Some(child) = self.table.get_mut(&number) else { return };
        child.unread.remove(&handle);
        self.tidy(number);
    }

    /// A write to `wait` returns: whoever made it will want to read the code.
    pub fn released(&mut self, number: u32) {
        if let Some(child) = self.table.get_mut(&number) {
            child.owed += 1;
        }
    }

    /// The exit code, for the reader with this handle. The child goes when nobody is left who waited
    /// for it and has not read.
    ///
    /// # Errors
    ///
    /// It is gone.
    pub fn read_code(&mut self, number: u32, handle: u64) -> Result<Progress, Gone> {
        let child = self.table.get_mut(&number).ok_or(Gone)?;
        let progress = child.progress();
        if let Progress::Stopped(_) = progress {
            child.unread.remove(&handle);
            child.owed = child.owed.saturating_sub(1);
            child.was_read = true;
            self.tidy(number);
        }
        Ok(progress)
    }

    /// The host does not know it. One that has stopped stays for those who wait.
    pub fn disown(&mut self, number: u32) {
        if self.table.get(&number).is_some_and(|child| child.exit.is_none()) {
            self.table.remove(&number);
        }
    }

    /// Removes those whose time has passed.
    pub fn expire(&mut self, now: Duration) {
        let retention = self.retention;
        self.table
            .retain(|_, child| child.exit.is_none_or(|(_, at)| now.saturating_sub(at) < retention));
    }

    /// When the next one's time passes.
    #[must_use]
    pub fn next_expiry(&self) -> Option<Duration> {
        let stops = self.table.values().filter_map(|child| child.exit);
        stops.map(|(_, at)| at.saturating_add(self.retention)).min()
    }

    fn tidy(&mut self, number: u32) {
        if self.table.get(&number).is_some_and(Child::is_done) {
            self.table.remove(&number);
        }
    }
}
