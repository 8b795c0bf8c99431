//! Every machine is somebody of its own.

use std::collections::HashSet;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use runtime::proto::InstanceConfig;
use tests::case::Case;
use tests::program::{Forked, fork};
use tests::rig::{PATIENCE, Rig};
use uuid::{Uuid, Version};

const ROUNDS: usize = 25;
const CHILDREN: usize = 8;
/// The host's clock may have been set meanwhile.
const LATE_NS: u64 = 1_000_000_000;

pub fn cases() -> Vec<Case> {
    vec![Case::new("identity::two_hundred_children_are_all_distinct", distinct)]
}

fn now_ns() -> Result<u64> {
    Ok(u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos())?)
}

fn distinct() -> Result<()> {
    let rig = Rig::new(InstanceConfig { memory_mib: 16, standbys: 8, ..<_>::default() })?;
    let mut uuids = HashSet::from([rig.root]);
    let mut generations = HashSet::new();
    let mut entropy = HashSet::new();
    for _ in 0..ROUNDS {
        let begin = now_ns()?;
        let seq = rig.begin(rig.root, 0, &[fork(CHILDREN as u64, 0)])?;
        let root = Forked::read(&rig.results(rig.root, 0, seq)?, 0)?;
        ensure!(root.status == 0 && root.role == 0, "{root:?}");
        ensure!(root.own == rig.root && root.children as usize == CHILDREN, "{root:?}");
        ensure!(root.entropy == [0; 4], "the parent is not reseeded");
        generations.insert(root.generation);
        let children = rig.owner.wait_until("children", PATIENCE, |alive| {
            (alive.len() == CHILDREN + 1).then(|| alive.to_vec())
        })?;
        let mut roles = HashSet::new();
        for child in children.into_iter().filter(|uuid| *uuid != rig.root) {
            let forked = Forked::read(&rig.results(child, 0, seq)?, 0)?;
            ensure!(forked.own == child, "it reads another UUID than it says: {forked:?}");
            ensure!(forked.child == Uuid::nil(), "a child reads the zero UUID: {forked:?}");
            ensure!(child.get_version() == Some(Version::Random), "{child} is not version 4");
            ensure!((forked.role == 1) == (root.child == child), "the first child: {forked:?}");
            ensure!(forked.children as usize == CHILDREN, "{forked:?}");
            ensure!(uuids.insert(child), "a UUID came twice");
            ensure!(generations.insert(forked.generation), "a generation came twice");
            ensure!(forked.entropy.iter().all(|word| *word != 0), "{forked:?}");
            // Word by word: halves of two seeds must not be the same either.
            for word in forked.entropy {
                ensure!(entropy.insert(word), "entropy came twice");
            }
            roles.insert(forked.role);
            ensure!(
                (begin..now_ns()? + LATE_NS).contains(&forked.realtime_ns),
                "the wall clock of a child says {}, it was {begin} before",
                forked.realtime_ns
            );
            let parent = rig.owner.with(child, |known| known.parent)?;
            ensure!(parent == Some(rig.root), "its parent is {parent:?}");
        }
        ensure!(roles == (1..=8).collect(), "roles {roles:?}");
        rig.kill_children()?;
    }
    ensure!(uuids.len() == ROUNDS * CHILDREN + 1, "{} machines", uuids.len());
    // The parent stays who it was.
    ensure!(generations.len() == ROUNDS * CHILDREN + 1, "{} generations", generations.len());
    Ok(())
}
