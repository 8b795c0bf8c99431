//! An exhausted pool of huge pages: another backing or one clear line, never SIGBUS.

use anyhow::{Context, Result, ensure};
use runtime::memory::BackingKind;
use runtime::owner::{Owner, OwnerError};
use runtime::proto::InstanceConfig;
use tests::case::Case;
use tests::host;
use tests::program::{check, dirty_row};
use tests::rig::{PATIENCE, Rig};

/// Huge pages of the image.
const IMAGE: u64 = 32;

pub fn cases() -> Vec<Case> {
    let without = host::without_huge_pages;
    vec![
        Case::new("faults::no_huge_pages_at_the_start", at_start).needs(without()),
        Case::new("faults::huge_pages_for_the_image_alone", image_alone).needs(without()),
        Case::new("faults::huge_pages_run_out_in_children", in_children).needs(without()),
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

/// Enough to start on, not enough to arm: an error in words, and the guest runs on.
fn image_alone() -> Result<()> {
    for spare in [0, 8, IMAGE] {
        let _pool = host::huge_pages(IMAGE + spare)?;
        let owner = Owner::new()?;
        let root = match owner.start(config()) {
            Ok(root) => root,
            Err(OwnerError::Ended { why: Some(_), .. }) => continue,
            Err(error) => anyhow::bail!("{spare} to spare, no clear line: {error}"),
        };
        let seq = owner.program(root, 0, &[tests::program::fill(1), check(0)])?;
        let before = owner.results(root, 0, seq, PATIENCE).context("before the fork")?;
        match owner.branch(root, 1) {
            Ok(_) => {}
            Err(error) => ensure!(error.fork_failure().is_some(), "no step is named: {error}"),
        }
        let seq = owner.program(root, 0, &[check(0)])?;
        let after = owner.results(root, 0, seq, PATIENCE).context("behind the fork")?;
        ensure!(before[1..] == after[1..] && before[0] == after[0], "{spare} to spare: its memory");
    }
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
