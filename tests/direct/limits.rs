//! Limits of the host: a clear error, an unharmed parent, and all is well when they are raised.

use anyhow::{Context, Result, ensure};
use runtime::fork::Step;
use runtime::owner::OwnerError;
use runtime::proto::InstanceConfig;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use tests::case::Case;
use tests::census;
use tests::program::{Forked, fork};
use tests::rig::Rig;

const EMFILE: u32 = 24;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("faults::descriptors_of_the_instance_run_out", || descriptors(false)),
        Case::new("faults::descriptors_of_the_zygote_run_out", || descriptors(true)),
    ]
}

/// `RLIMIT_NOFILE` of a process, put back when this is dropped.
struct Limit {
    pid: Option<Pid>,
    before: Rlimit,
}

impl Limit {
    fn new(pid: i32, files: u64) -> Result<Self> {
        let pid = Pid::from_raw(pid);
        // It inherited ours; to change the hard limit, too, would need a privilege.
        let maximum = getrlimit(Resource::Nofile).maximum;
        let before = prlimit(pid, Resource::Nofile, Rlimit { current: Some(files), maximum })?;
        Ok(Self { pid, before })
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        if let Err(errno) = prlimit(self.pid, Resource::Nofile, self.before) {
            eprintln!("RLIMIT_NOFILE was not put back: {errno}");
        }
    }
}

fn descriptors(of_zygote: bool) -> Result<()> {
    let rig = Rig::new(InstanceConfig { memory_mib: 16, ..<_>::default() })?;
    for child in rig.branch(rig.root, 1)? {
        rig.kill(child)?;
    }
    rig.standbys(0)?;
    let settled = census::eventually(tests::rig::PATIENCE, || {
        rig.owner.stats(rig.root).is_ok_and(|stats| stats.standbys == 0)
    });
    ensure!(settled, "standbys are left");
    let pid = if of_zygote { rig.zygote()? } else { rig.pid(rig.root)? };
    let before = rig.census()?;
    {
        // What is open stays open; the next one is refused.
        let _limit = Limit::new(pid, 3)?;
        for _ in 0..3 {
            let forked = Forked::read(&rig.run(rig.root, &[fork(2, 10)])?, 10)?;
            // A zygote that is of no use may be replaced by one without the limit.
            let replaced = of_zygote && forked.status == 0;
            ensure!(replaced || forked.step() == Some(Step::Prewarm), "{forked:?}");
            ensure!(of_zygote || forked.status == EMFILE, "{forked:?}");
            rig.kill_children()?;
            match rig.branch(rig.root, 1) {
                Ok(made) => {
                    ensure!(of_zygote, "the fork succeeded");
                    made.into_iter().try_for_each(|child| rig.kill(child))?;
                }
                Err(error) => {
                    let refused = error.downcast_ref::<OwnerError>();
                    let failure = refused.and_then(OwnerError::fork_failure);
                    let (step, errno) = failure.with_context(|| format!("no step: {error:#}"))?;
                    ensure!(step == Step::Prewarm, "{error}");
                    ensure!(of_zygote || errno.cast_unsigned() == EMFILE, "{error}");
                }
            }
            rig.compare(rig.root, &rig.memory(), "the parent without descriptors")?;
        }
    }
    rig.settles_at(before, "after running out of descriptors")?;
    for child in rig.branch(rig.root, 2).context("with descriptors again")? {
        rig.compare(child, &rig.memory(), "a child")?;
    }
    Ok(())
}
