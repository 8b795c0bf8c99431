//! Each machine sees its own history of every page, and nobody else's.

use anyhow::{Context as _, Result, bail, ensure};
use runtime::kvm::DirtyMode;
use runtime::memory::BackingKind;
use runtime::proto::InstanceConfig;
use tests::case::Case;
use tests::census;
use tests::host;
use tests::memory::Memory;
use tests::program::{Forked, Side, check, dirty, dirty_row, fork, peek, poke};
use tests::rig::Rig;

/// Huge pages for an image of 64 MiB and the private copies of all machines of a test.
pub const POOL: u64 = 512;

pub fn cases() -> Vec<Case> {
    let of = |backing, dirty| InstanceConfig { memory_mib: 64, backing, dirty, ..<_>::default() };
    let small = move |dirty| of(BackingKind::Small, dirty);
    vec![
        Case::new("isolation::history_before_between_and_after_two_forks_4k_ring", move || {
            history(small(DirtyMode::Ring))
        }),
        Case::new("isolation::history_before_between_and_after_two_forks_4k_bitmap", move || {
            history(small(DirtyMode::Bitmap))
        }),
        Case::new("isolation::history_before_between_and_after_two_forks_thp", move || {
            let _thp = host::shmem_thp()?;
            history(of(BackingKind::Thp, DirtyMode::Ring))
        })
        .needs(host::without_thp()),
        Case::new("isolation::history_before_between_and_after_two_forks_hugetlb", move || {
            let _pool = host::huge_pages(POOL)?;
            history(of(BackingKind::Hugetlb, DirtyMode::Ring))
        })
        .needs(host::without_huge_pages()),
        Case::new("isolation::a_chain_six_deep_keeps_every_history", move || {
            chain(small(DirtyMode::Ring))
        }),
        Case::new("isolation::two_threads_apply_a_large_fork_4k", move || {
            two_threads(&small(DirtyMode::Ring))
        })
        .alone(),
        Case::new("isolation::two_threads_apply_a_large_fork_thp", move || {
            let _thp = host::shmem_thp()?;
            two_threads(&of(BackingKind::Thp, DirtyMode::Ring))
        })
        .alone()
        .needs(host::without_thp()),
        Case::new("isolation::a_large_fork_hugetlb", move || {
            let _pool = host::huge_pages(POOL)?;
            // Few large copies: the leader is done before help comes.
            large(of(BackingKind::Hugetlb, DirtyMode::Ring)).map(drop)
        })
        .needs(host::without_huge_pages()),
        Case::new("isolation::pages_that_nobody_has_touched_4k", move || {
            untouched(small(DirtyMode::Ring))
        }),
        Case::new("isolation::pages_that_nobody_has_touched_thp", move || {
            let _thp = host::shmem_thp()?;
            untouched(of(BackingKind::Thp, DirtyMode::Ring))
        })
        .needs(host::without_thp()),
        Case::new("isolation::pages_that_nobody_has_touched_hugetlb", move || {
            let _pool = host::huge_pages(POOL)?;
            untouched(of(BackingKind::Hugetlb, DirtyMode::Ring))
        })
        .needs(host::without_huge_pages()),
        Case::new("isolation::a_new_image_in_the_middle_of_a_history_4k", move || {
            consolidated(small(DirtyMode::Ring))
        }),
        Case::new("isolation::a_new_image_in_the_middle_of_a_history_thp", move || {
            let _thp = host::shmem_thp()?;
            consolidated(of(BackingKind::Thp, DirtyMode::Ring))
        })
        .needs(host::without_thp()),
        Case::new("isolation::a_word_written_by_one_is_seen_by_nobody_else", words),
        Case::new("isolation::the_model_tells_a_single_wrong_word", control),
    ]
}

/// A fork from inside, in which parent and children write right behind it; the UUIDs of the
/// children, and what each side must hold now.
pub fn fork_and_write(
    rig: &Rig,
    parent: uuid::Uuid,
    memory: &mut Memory,
    children: u64,
    generation: u64,
) -> Result<Vec<(uuid::Uuid, Memory)>> {
    fork_and_write_after(50, rig, parent, memory, children, generation)
}

/// The same, after `pages` pages were written.
fn fork_and_write_after(
    pages: u64,
    rig: &Rig,
    parent: uuid::Uuid,
    memory: &mut Memory,
    children: u64,
    generation: u64,
) -> Result<Vec<(uuid::Uuid, Memory)>> {
    let before = dirty(pages, generation, generation);
    let of_parent = dirty(60, generation + 1, generation + 1).in_parent();
    let of_child = dirty(60, generation + 2, generation + 2).in_child();
    let program = [before, fork(children, 10), of_parent, of_child, check(0)];
    let known = rig.owner.alive();
    let seq = rig.begin(parent, 0, &program)?;
    let results = rig.results(parent, 0, seq)?;
    let forked = Forked::read(&results, 10)?;
    ensure!(forked.status == 0, "the fork failed: {forked:?}");
    memory.dirty(pages, generation, generation);
    let mut theirs = memory.clone();
    theirs.dirty(60, generation + 2, generation + 2);
    memory.dirty(60, generation + 1, generation + 1);
    ensure!(results[0] == memory.sum(), "the parent's memory right after the fork");
    let all = usize::try_from(children)?;
    let made = rig.owner.wait_until("children", tests::rig::PATIENCE, |alive| {
        let new = alive.iter().copied().filter(|uuid| !known.contains(uuid));
        let new: Vec<_> = new.collect();
        (new.len() == all).then_some(new)
    });
    let made = made.with_context(|| format!("{children} of {parent}; {}", rig.everybody()))?;
    for child in &made {
        let results = rig.results(*child, 0, seq)?;
        ensure!(results[0] == theirs.sum(), "a child's memory right after the fork");
    }
    Ok(made.into_iter().map(|child| (child, theirs.clone())).collect())
}

/// A page written before, between and after two forks holds each machine's own history.
fn history(config: InstanceConfig) -> Result<()> {
    let backing = config.backing;
    let rig = Rig::new(config)?;
    let notes = rig.owner.with(rig.root, |known| known.notes.clone())?;
    ensure!(notes.is_empty(), "not on {backing:?}: {notes:?}");
    let mut memory = rig.memory();
    let mut machines = Vec::new();
    rig.run(rig.root, &[dirty_row(40, 1, 100)])?;
    memory.dirty_row(40, 1, 100);
    machines.extend(fork_and_write(&rig, rig.root, &mut memory, 2, 10)?);
    rig.run(rig.root, &[dirty_row(40, 2, 120)])?;
    memory.dirty_row(40, 2, 120);
    machines.extend(fork_and_write(&rig, rig.root, &mut memory, 2, 20)?);
    rig.run(rig.root, &[dirty_row(40, 3, 130)])?;
    memory.dirty_row(40, 3, 130);
    for (number, (uuid, memory)) in (100_u64..).step_by(10).zip(&mut machines) {
        rig.run(*uuid, &[dirty(30, number, number)])?;
        memory.dirty(30, number, number);
    }
    for (uuid, memory) in &machines {
        rig.compare(*uuid, memory, "a child")?;
    }
    rig.compare(rig.root, &memory, "the root")
}

/// Forks that have so much to apply that a second thread helps.
fn two_threads(config: &InstanceConfig) -> Result<()> {
    let one_processor = std::thread::available_parallelism()?.get() == 1;
    // It comes when there is a processor for it, and who else runs here is not known.
    for _ in 0..5 {
        if large(config.clone())? > 0 || one_processor {
            return Ok(());
        }
    }
    bail!("no page of thirty large forks was applied by a second thread")
}

/// Forks with much to apply; the number of pages that a second thread applied.
fn large(config: InstanceConfig) -> Result<u32> {
    let rig = Rig::new(config)?;
    let mut memory = rig.memory();
    let mut machines = Vec::new();
    for round in 1..=6 {
        let from = round * 100;
        machines.extend(fork_and_write_after(3000, &rig, rig.root, &mut memory, 1, from)?);
    }
    for (uuid, memory) in &machines {
        rig.compare(*uuid, memory, "a child")?;
    }
    rig.compare(rig.root, &memory, "the root")?;
    let helped = rig.owner.with(rig.root, |known| {
        let children = known.forks.iter().flat_map(|fork| &fork.children);
        children.map(|child| child.helped_pages).sum()
    })?;
    Ok(helped)
}

/// Each child forks once more: from inside and from the host in turn.
fn chain(config: InstanceConfig) -> Result<()> {
    let rig = Rig::new(config)?;
    let mut line = vec![(rig.root, rig.memory())];
    for depth in 1..=6_u64 {
        let mut grown = Vec::new();
        if let Some((uuid, memory)) = line.last_mut() {
            rig.run(*uuid, &[dirty(40, depth * 100, depth)])?;
            memory.dirty(40, depth * 100, depth);
            if depth % 2 == 0 {
                for child in rig.branch(*uuid, 2)? {
                    grown.push((child, memory.clone()));
                }
            } else {
                grown = fork_and_write(&rig, *uuid, memory, 2, depth * 100 + 10)?;
            }
        }
        line.extend(grown);
    }
    // Everybody writes once more, then everybody is compared.
    for (number, (uuid, memory)) in (10_000_u64..).zip(&mut line) {
        rig.run(*uuid, &[dirty(20, number, number)])?;
        memory.dirty(20, number, number);
    }
    ensure!(line.len() == 13);
    line.iter().try_for_each(|(uuid, memory)| rig.compare(*uuid, memory, "a link of the chain"))
}

/// Holes of the image. Parent, child, grandchild and its sibling each write to pages of their own, and
/// some are read by all before anybody has written to them.
fn untouched(config: InstanceConfig) -> Result<()> {
    const EACH: u64 = 4;
    /// 2 MiB apart, so that each is in a huge page of its own.
    const APART: u64 = 512;
    let rig = Rig::blank(config)?;
    let page = |writer: u64, number: u64| rig.address((writer * EACH + number) * APART + 7, 3);
    let writes = |uuid, writer: u64| {
        let steps: Vec<_> =
            (0..EACH).map(|number| poke(page(writer, number), 100 * writer + number + 1)).collect();
        rig.run(uuid, &steps).map(drop)
    };
    // Of each writer half are read first, which maps the hole.
    let reads = |uuid, of: &[(u64, bool)], what: &str| -> Result<()> {
        for (writer, written) in of {
            let places = (0_u16..).zip((0..EACH).map(|number| page(*writer, number)));
            let steps: Vec<_> = places.map(|(at, address)| peek(address, at)).collect();
            let words = rig.run(uuid, &steps)?;
            for (number, word) in (0..EACH).zip(words) {
                let wanted = if *written { 100 * writer + number + 1 } else { 0 };
                ensure!(word == wanted, "{what}: page {number} of {writer}: {word}, not {wanted}");
            }
        }
        Ok(())
    };
    reads(rig.root, &[(0, false), (2, false)], "the root at first")?;
    let child = rig.branch(rig.root, 1)?[0];
    writes(rig.root, 0)?;
    reads(child, &[(0, false), (1, false)], "the child of an untouched root")?;
    writes(child, 1)?;
    let grandchild = rig.branch(child, 1)?[0];
    writes(grandchild, 2)?;
    let sibling = rig.branch(rig.root, 1)?[0];
    writes(sibling, 3)?;
    let [none, all] = [false, true];
    reads(rig.root, &[(0, all), (1, none), (2, none), (3, none), (4, none)], "the root")?;
    reads(child, &[(0, none), (1, all), (2, none), (3, none), (4, none)], "the child")?;
    reads(grandchild, &[(0, none), (1, all), (2, all), (3, none), (4, none)], "the grandchild")?;
    reads(sibling, &[(0, all), (1, none), (2, none), (3, all), (4, none)], "the sibling")
}

/// Pages that the zygote owns become a new image, again and again; children made before, meanwhile and
/// after hold what they held.
fn consolidated(config: InstanceConfig) -> Result<()> {
    const IMAGES: usize = 2;
    let config = InstanceConfig { memory_mib: 24, consolidate_pages: 300, ..config };
    let rig = Rig::new(config)?;
    let mut memory = rig.memory();
    let mut machines = Vec::new();
    let mut images = vec![census::mapped_memfds(rig.zygote()?, "guest-ram")];
    for round in 1..=60_u64 {
        let from = round * 100;
        let mut made = fork_and_write_after(200, &rig, rig.root, &mut memory, 1, from)?;
        rig.standbys(1)?;
        let now = census::mapped_memfds(rig.zygote()?, "guest-ram");
        let changed = images.last() != Some(&now);
        if changed {
            images.push(now);
        }
        if changed || round % 8 == 1 {
            machines.append(&mut made);
        }
        made.into_iter().try_for_each(|(uuid, _)| rig.kill(uuid))?;
        if images.len() > IMAGES {
            break;
        }
    }
    ensure!(images.len() > IMAGES, "its zygote made {} new images", images.len() - 1);
    for (number, (uuid, memory)) in (100_000_u64..).step_by(10).zip(&mut machines) {
        rig.run(*uuid, &[dirty(30, number, number)])?;
        memory.dirty(30, number, number);
        // From the image that its own parent's zygote had.
        let child = rig.branch(*uuid, 1)?[0];
        rig.compare(child, memory, "a child's child")?;
        rig.kill(child)?;
    }
    for (uuid, memory) in &machines {
        rig.compare(*uuid, memory, "a child")?;
    }
    rig.compare(rig.root, &memory, "the root")
}

fn words() -> Result<()> {
    let rig = Rig::new(InstanceConfig { memory_mib: 32, ..<_>::default() })?;
    // The second word lies in a page that nobody touched since it was filled.
    let (hot, cold) = (rig.address(5, 7), rig.address(700, 9));
    let filled = rig.run(rig.root, &[poke(hot, 1), peek(cold, 1)])?[1];
    let children = rig.branch(rig.root, 3)?;
    rig.run(rig.root, &[poke(hot, 2), poke(cold, 2)])?;
    for (value, child) in (10_u64..).zip(&children) {
        let seen = rig.run(*child, &[peek(hot, 0), peek(cold, 1)])?;
        ensure!(seen[..2] == [1, filled], "child {value} sees {:?}", &seen[..2]);
        rig.run(*child, &[poke(hot, value), poke(cold, value)])?;
    }
    for (value, child) in (10_u64..).zip(&children) {
        let seen = rig.run(*child, &[peek(hot, 0), peek(cold, 1)])?;
        ensure!(seen[..2] == [value, value], "child {value} sees {:?}", &seen[..2]);
    }
    let seen = rig.run(rig.root, &[peek(hot, 0), peek(cold, 1)])?;
    ensure!(seen[..2] == [2, 2], "the parent sees {:?}", &seen[..2]);
    Ok(())
}

/// Negative control: the comparison that all of these rest on sees one changed word.
fn control() -> Result<()> {
    let rig = Rig::unarmed(InstanceConfig { memory_mib: 16, ..<_>::default() })?;
    let memory = rig.memory();
    rig.compare(rig.root, &memory, "filled")?;
    rig.run(rig.root, &[poke(rig.address(9, 300), 1)])?;
    ensure!(rig.compare(rig.root, &memory, "changed").is_err(), "a wrong word went unseen");
    Ok(())
}
