//! An exhausted pool of huge pages: another backing or one clear line, never SIGBUS.

use anyhow::{Context, Result, ensure};
use runtime::fork::Step;
use runtime::memory::BackingKind;
use runtime::proto::{InstanceConfig, Request};
use tests::case::Case;
use tests::host;
use tests::program::{Forked, check, dirty_row, fork};
use tests::rig::{PATIENCE, Rig};

/// Huge pages of the image.
const IMAGE: u64 = 32;

pub fn cases() -> Vec<Case> {
    let without = host::without_huge_pages;
    vec![
        Case::new("faults::no_huge_pages_at_the_start", at_start).needs(without()),
        Case::new("faults::huge_pages_for_the_image_alone", image_alone).needs(without()),
        Case::new("faults::huge_pages_run_out_in_children", in_children).needs(without()),
        Case::new("faults::huge_pages_run_out_in_standbys", in_standbys).needs(without()),
        Case::new("leaks::huge_pages_come_back", come_back).needs(without()),
    ]
}

fn config() -> InstanceConfig {
    InstanceConfig { memory_mib: 64, backing: BackingKind::Hugetlb, ..<_>::default() }
}

fn at_start() -> Result<()> {
    let _pool = host::huge_pages(IMAGE / 2)?;
    let rig = Rig::new(config())?;
    let notes = rig.owner.with(rig.root, |known| known.notes.clone())?;
    ensure!(notes.len() == 1, "one line says that there is no pool: {notes:?}");
    ensure!(notes[0].contains("huge page") && notes[0].contains("nr_hugepages"), "{notes:?}");
    let child = rig.branch(rig.root, 1)?[0];
    rig.compare(child, &rig.memory(), "a child on ordinary pages")
}

/// Two machines on a pool in which there is room to start both and to arm one. The other one's fork
/// fails in words, it runs on and writes all of its memory, and it forks once the first is gone.
fn image_alone() -> Result<()> {
    // Images and the first's two reservations; then none is left for the second's own memory, or
    // none for its zygote's.
    for (pages, what) in [(IMAGE * 4, "its memory"), (IMAGE * 5, "its zygote")] {
        let _pool = host::huge_pages(pages)?;
        let config = InstanceConfig { standbys: 0, ring_entries: 1024, ..config() };
        let first = Rig::unarmed(config.clone())?;
        let rig = Rig::unarmed(config).context(what)?;
        ensure!(rig.owner.with(rig.root, |known| known.notes.is_empty())?, "not on huge pages");
        first.owner.ask(first.root, Request::Arm)?;
        let mut memory = rig.memory();
        for round in 1..=2_u64 {
            fails_to_arm(&rig, round == 1).with_context(|| what.to_owned())?;
            // More pages than its dirty ring has entries.
            rig.run(rig.root, &[dirty_row(rig.work_pages, round, 0)]).context("writing on")?;
            memory.dirty_row(rig.work_pages, round, 0);
            rig.compare(rig.root, &memory, "a machine that could not be armed")?;
        }
        drop(first);
        let free = || host::pool("free_hugepages") - host::pool("resv_hugepages");
        let room = tests::census::eventually(PATIENCE, || free() == 3 * IMAGE);
        ensure!(room, "the first machine's pages do not come back");
        for child in rig.branch(rig.root, 1).context("with room again")? {
            rig.compare(child, &memory, "its child")?;
        }
        rig.compare(rig.root, &memory, "its parent")?;
    }
    Ok(())
}

fn fails_to_arm(rig: &Rig, from_guest: bool) -> Result<()> {
    const ENOMEM: u32 = 12;
    if from_guest {
        let forked = Forked::read(&rig.run(rig.root, &[fork(1, 10)])?, 10)?;
        ensure!(forked.status == ENOMEM && forked.step() == Some(Step::Arm), "{forked:?}");
        return Ok(());
    }
    let error = match rig.owner.branch(rig.root, 1) {
        Ok(made) => anyhow::bail!("it could be armed: {made:?}"),
        Err(error) => error,
    };
    let failure = error.fork_failure().map(|(step, errno)| (step, errno.cast_unsigned()));
    ensure!(failure == Some((Step::Arm, ENOMEM)), "{error}");
    Ok(())
}

/// Everything is armed and forked; then children want more private pages than there are.
fn in_children() -> Result<()> {
    let _pool = host::huge_pages(IMAGE * 4)?;
    let rig = Rig::new(config())?;
    let mut ends = Vec::new();
    for _ in 0..4 {
        let made = match rig.owner.branch(rig.root, 1) {
            Ok(made) => made,
            Err(error) => {
                ensure!(error.fork_failure().is_some(), "no step is named: {error}");
                break;
            }
        };
        for child in made {
            let pages = rig.work_pages;
            let run = rig.run(child, &[dirty_row(pages, 3, 0), check(0)]);
            let Err(error) = run else { continue };
            // An instance that ends by itself says why; one that was killed by a signal cannot.
            let (code, why) = rig.owner.wait_exit(child, PATIENCE)?;
            ensure!(why.is_some(), "a child ended with {code} without a word: {error:#}");
            ends.push(why);
        }
    }
    rig.compare(rig.root, &rig.memory(), "the root")?;
    let ends = ends.into_iter().flatten().collect::<Vec<_>>();
    ensure!(ends.iter().all(|why| why.contains("huge page")), "no clear line: {ends:?}");
    Ok(())
}

/// Armed, and then nothing is left for what a standby has to write: the error says of what.
fn in_standbys() -> Result<()> {
    const ENOMEM: i32 = 12;
    // Enough for the pages in which the guest itself writes.
    let _pool = host::huge_pages(IMAGE * 3 + 4)?;
    let rig = Rig::new(config())?;
    let mut memory = rig.memory();
    rig.owner.ask(rig.root, Request::Sync { on: false })?;
    for round in 1..=3_u64 {
        rig.run(rig.root, &[dirty_row(rig.work_pages, round, 0)])?;
        memory.dirty_row(rig.work_pages, round, 0);
        match rig.owner.branch(rig.root, 1) {
            // Then the journal was full, and what was dirty is the zygote's, which has room for it.
            Ok(made) => {
                ensure!(round == 3, "round {round}: there was room for {made:?}");
                rig.compare(made[0], &memory, "a child without pages of its own")?;
            }
            Err(error) => {
                let failure = error.fork_failure();
                let (_, errno) = failure.with_context(|| format!("no step: {error}"))?;
                let text = error.to_string();
                ensure!(
                    errno == ENOMEM && text.contains("huge page pool"),
                    "round {round}: {text}"
                );
            }
        }
        rig.compare(rig.root, &memory, "the parent")?;
    }
    Ok(())
}

fn come_back() -> Result<()> {
    let _pool = host::huge_pages(IMAGE * 8)?;
    let free = || (host::pool("free_hugepages"), host::pool("resv_hugepages"));
    let before = free();
    {
        let rig = Rig::new(config())?;
        ensure!(free() != before, "huge pages are not used");
        for child in rig.branch(rig.root, 2)? {
            rig.run(child, &[dirty_row(2000, 3, 0)])?;
            rig.kill(child)?;
        }
    }
    let back = tests::census::eventually(PATIENCE, || free() == before);
    ensure!(back, "{:?} instead of {before:?}", free());
    Ok(())
}
