//! Random histories of a tree of machines, compared with a model.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use proptest::collection::vec;
use proptest::prelude::{Just, Strategy};
use proptest::prop_oneof;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use runtime::kvm::DirtyMode;
use runtime::memory::BackingKind;
use runtime::proto::InstanceConfig;
use tests::case::Case;
use tests::host;
use tests::memory::Memory;
use tests::program::{dirty, rate, step, work};
use tests::rig::Rig;
use uuid::Uuid;

use crate::isolation::{POOL, fork_and_write};

/// Machines alive at once.
const MOST: usize = 9;
/// How long a child may take to end a program that its parent has ended.
const LATE: Duration = Duration::from_millis(1500);

/// One event; machines are picked among those alive.
#[derive(Clone, Debug)]
enum Event {
    Write {
        machine: Index,
        pages: u64,
    },
    Work {
        machine: Index,
        first: Index,
        pages: u64,
    },
    /// From inside; both sides write right behind it.
    Fork {
        machine: Index,
        children: u64,
    },
    Branch {
        machine: Index,
        children: u32,
    },
    /// From the host, while the guest writes.
    BranchBusy {
        machine: Index,
        children: u32,
        per_second: u64,
    },
    Kill {
        machine: Index,
    },
    Check {
        machine: Index,
    },
    Wait {
        ms: u64,
    },
}

fn event() -> impl Strategy<Value = Event> {
    let machine = || proptest::arbitrary::any::<Index>();
    prop_oneof![
        5 => (machine(), 1..300_u64).prop_map(|(machine, pages)| Event::Write { machine, pages }),
        2 => (machine(), machine(), 1..100_u64)
            .prop_map(|(machine, first, pages)| Event::Work { machine, first, pages }),
        4 => (machine(), 1..=3_u64)
            .prop_map(|(machine, children)| Event::Fork { machine, children }),
        3 => (machine(), 1..=3_u32)
            .prop_map(|(machine, children)| Event::Branch { machine, children }),
        3 => (machine(), 1..=2_u32, prop_oneof![Just(2_000_u64), Just(20_000), Just(200_000)])
            .prop_map(|(machine, children, per_second)| {
                Event::BranchBusy { machine, children, per_second }
            }),
        2 => machine().prop_map(|machine| Event::Kill { machine }),
        2 => machine().prop_map(|machine| Event::Check { machine }),
        1 => (0..30_u64).prop_map(|ms| Event::Wait { ms }),
    ]
}

pub fn cases() -> Vec<Case> {
    let of = |backing, dirty| InstanceConfig { memory_mib: 32, backing, dirty, ..<_>::default() };
    let standbys = move |child_standbys, rehearse, sync| InstanceConfig {
        child_standbys,
        rehearse,
        sync,
        ..of(BackingKind::Small, DirtyMode::Ring)
    };
    vec![
        Case::new("isolation::random_histories_4k_ring", move || {
            histories(&of(BackingKind::Small, DirtyMode::Ring), 8)
        }),
        Case::new("isolation::random_histories_4k_bitmap", move || {
            histories(&of(BackingKind::Small, DirtyMode::Bitmap), 5)
        }),
        Case::new("isolation::random_histories_standbys_in_children", move || {
            histories(&standbys(1, true, true), 4)
        }),
        Case::new("isolation::random_histories_without_rehearsal", move || {
            histories(&standbys(0, false, true), 3)
        }),
        Case::new("isolation::random_histories_without_sync", move || {
            histories(&standbys(0, true, false), 3)
        }),
        Case::new("isolation::random_histories_small_rings", move || {
            let config = of(BackingKind::Small, DirtyMode::Ring);
            histories(&InstanceConfig { ring_entries: 1024, child_ring_entries: 1024, ..config }, 4)
        }),
        Case::new("isolation::random_histories_thp", move || {
            let _thp = host::shmem_thp()?;
            histories(&of(BackingKind::Thp, DirtyMode::Ring), 4)
        })
        .needs(host::without_thp()),
        Case::new("isolation::random_histories_hugetlb", move || {
            let _pool = host::huge_pages(POOL)?;
            histories(&of(BackingKind::Hugetlb, DirtyMode::Ring), 4)
        })
        .needs(host::without_huge_pages()),
    ]
}

/// Runs `cases` random histories; `UKP_SEED` chooses others, `UKP_SOAK=1` runs ten times as many.
fn histories(config: &InstanceConfig, cases: u32) -> Result<()> {
    let seed: u64 = std::env::var("UKP_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let settings = Config {
        cases: if host::soak() { cases * 10 } else { cases },
        max_shrink_iters: 40,
        max_shrink_time: 30_000,
        failure_persistence: None,
        ..Config::default()
    };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let outcome = TestRunner::new_with_rng(settings, rng).run(&vec(event(), 8..28), |events| {
        Tree::run(config, &events).map_err(|error| TestCaseError::fail(format!("{error:#}")))
    });
    match outcome {
        Ok(()) => Ok(()),
        Err(TestError::Fail(why, events)) => {
            anyhow::bail!("UKP_SEED={seed}: {why}\nhistory: {events:#?}")
        }
        Err(other) => anyhow::bail!("UKP_SEED={seed}: {other}"),
    }
}

/// Machines and what each must hold.
struct Tree {
    rig: Rig,
    alive: Vec<(Uuid, Memory)>,
    generation: u64,
}

impl Tree {
    fn run(config: &InstanceConfig, events: &[Event]) -> Result<()> {
        let rig = Rig::new(config.clone())?;
        let alive = vec![(rig.root, rig.memory())];
        let mut tree = Self { rig, alive, generation: 0 };
        for (number, event) in events.iter().enumerate() {
            tree.happen(event).with_context(|| format!("event {number}, {event:?}"))?;
        }
        let Self { rig, alive, .. } = &tree;
        alive.iter().try_for_each(|(uuid, memory)| rig.compare(*uuid, memory, "at the end"))
    }

    fn happen(&mut self, event: &Event) -> Result<()> {
        self.generation += 10;
        let generation = self.generation;
        let room = MOST - self.alive.len();
        let Self { rig, alive, .. } = self;
        let count = alive.len();
        let machine = |index: &Index| index.index(count);
        match event {
            Event::Write { machine: index, pages } => {
                let (uuid, memory) = &mut alive[machine(index)];
                rig.run(*uuid, &[dirty(*pages, generation, generation)])?;
                memory.dirty(*pages, generation, generation);
            }
            Event::Work { machine: index, first, pages } => {
                let (uuid, memory) = &mut alive[machine(index)];
                let first = first.index(usize::try_from(memory.pages() - pages)?) as u64;
                rig.run(*uuid, &[work(first, *pages, 0)])?;
                memory.work(first, *pages);
            }
            Event::Fork { machine: index, children } => {
                let children = (*children).min(room as u64);
                if children > 0 {
                    let (uuid, memory) = &mut alive[machine(index)];
                    let made = fork_and_write(rig, *uuid, memory, children, generation)?;
                    alive.extend(made);
                }
            }
            Event::Branch { machine: index, children } => {
                let children = (*children).min(u32::try_from(room)?);
                if children > 0 {
                    let (uuid, memory) = alive[machine(index)].clone();
                    let made = rig.branch(uuid, children)?;
                    ensure!(made.len() == children as usize, "{} children", made.len());
                    alive.extend(made.into_iter().map(|child| (child, memory.clone())));
                }
            }
            Event::BranchBusy { machine: index, children, per_second } => {
                let children = (*children).min(u32::try_from(room)?);
                if children > 0 {
                    let at = machine(index);
                    branch_busy(rig, alive, at, children, *per_second, generation)?;
                }
            }
            Event::Kill { machine: index } => {
                if count > 1 {
                    let (uuid, _) = alive.swap_remove(machine(index));
                    rig.kill(uuid)?;
                }
            }
            Event::Check { machine: index } => {
                let (uuid, memory) = &alive[machine(index)];
                rig.compare(*uuid, memory, "in between")?;
            }
            Event::Wait { ms } => std::thread::sleep(Duration::from_millis(*ms)),
        }
        Ok(())
    }
}

/// The guest writes for 60 ms; how far it came, each machine tells itself. Where the fork came so
/// late that the writing was over, the children tell nothing, and have what the parent has.
fn branch_busy(
    rig: &Rig,
    alive: &mut Vec<(Uuid, Memory)>,
    at: usize,
    children: u32,
    per_second: u64,
    generation: u64,
) -> Result<()> {
    let (uuid, mut memory) = alive[at].clone();
    let seed = generation;
    let writing = rate(rig.ticks(60), generation, seed, per_second, 0);
    let seq = rig.begin(uuid, 0, &[writing, step(guest_abi::param::op::CHECK, 2, [0; 4])])?;
    std::thread::sleep(Duration::from_millis(4));
    let made = rig.branch(uuid, children)?;
    let before = memory.clone();
    let results = rig.results(uuid, 0, seq)?;
    memory.dirty(results[0], generation, seed);
    ensure!(results[2] == memory.sum(), "the parent that wrote {} pages", results[0]);
    for child in made {
        let Ok(results) = rig.owner.results(child, 0, seq, LATE) else {
            rig.compare(child, &memory, "a child that came when the writing was over")?;
            alive.push((child, memory.clone()));
            continue;
        };
        let mut memory = before.clone();
        memory.dirty(results[0], generation, seed);
        ensure!(results.get(2) == Some(&memory.sum()), "a child that wrote {} pages", results[0]);
        alive.push((child, memory));
    }
    alive[at].1 = memory;
    Ok(())
}
