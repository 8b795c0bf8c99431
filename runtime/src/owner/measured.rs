//! What an owner measures: by probes in the kernel, by what instances count of themselves, and by
//! the reports of their forks.

use std::collections::BTreeMap;

use ebpf_loader::{Counted, Level, ProbeError, Probes};
use uuid::Uuid;

use super::{Owner, OwnerError};
use crate::proto::{Reply, Request, Stats};

impl Owner {
    /// Measures every instance that is started from now on, with what it forks.
    ///
    /// # Errors
    ///
    /// Why that cannot be. Everything else works.
    pub fn probe(&self, level: Level) -> Result<(), ProbeError> {
        self.shared.watch.load(level)
    }

    /// What `f` makes of the probes; `None` if there are none.
    pub fn probes<R>(&self, f: impl FnOnce(&mut Probes) -> R) -> Option<R> {
        self.shared.watch.lock().as_mut().map(f)
    }

    /// Why what was counted of processes that have ended stays in the kernel, where there will be no
    /// room for more, if it does.
    #[must_use]
    pub fn probes_unread(&self) -> Option<String> {
        self.shared.watch.unread()
    }

    /// Counters of an instance.
    ///
    /// # Errors
    ///
    /// That it is gone.
    pub fn stats(&self, uuid: Uuid) -> Result<Stats, OwnerError> {
        match self.ask(uuid, Request::Stats)? {
            Reply::Stats(stats) => Ok(stats),
            _ => Ok(Stats::default()),
        }
    }

    /// KVM's own statistics of an instance, over all vCPUs: what KVM calls them, and how much. Empty
    /// where KVM keeps none.
    ///
    /// # Errors
    ///
    /// That it is gone.
    pub fn kvm_stats(&self, uuid: Uuid) -> Result<BTreeMap<String, u64>, OwnerError> {
        match self.ask(uuid, Request::KvmStats)? {
            Reply::KvmStats(statistics) => Ok(statistics),
            _ => Ok(BTreeMap::new()),
        }
    }

    /// Calls to KVM that an instance made, and stages of its forks, those in its children with them.
    ///
    /// # Errors
    ///
    /// That it is gone.
    pub fn counted(&self, uuid: Uuid) -> Result<Counted, OwnerError> {
        let mut counted = match self.ask(uuid, Request::Calls)? {
            Reply::Calls(rows) => ebpf_loader::counted(&rows),
            _ => Counted::new(),
        };
        let stages = self.with(uuid, |known| known.counted.clone())?;
        ebpf_loader::merge(&mut counted, &stages);
        Ok(counted)
    }

    /// The same of all instances that have ended. One that was killed could not tell its calls.
    #[must_use]
    pub fn counted_of_ended(&self) -> Counted {
        self.shared.state().counted_of_ended.clone()
    }
}
