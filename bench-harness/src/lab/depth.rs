//! Kind `depth`: the child forks, and its child, and so on.

use uuid::Uuid;

use super::bench::Bench;
use crate::session::LabError;

/// `forks` chains of `depth` forks. All machines of a chain stay alive until it is done.
pub(super) fn depth(bench: &mut Bench<'_>) -> Result<(), LabError> {
    bench.warm_up()?;
    let scenario = bench.scenario;
    let total = u64::from(scenario.forks) * u64::from(scenario.depth);
    bench.progress.phase("forks", total);
    let root = bench.guest;
    for _ in 0..scenario.forks {
        let mut history = None;
        let mut chain: Vec<Uuid> = Vec::new();
        for depth in 1..=scenario.depth {
            let plan = bench.plan();
            let mut round = bench.fork(&plan)?;
            bench.record_with(&mut round, |sample| sample.with("depth", depth.into()));
            bench.progress.advance(1);
            // What follows is written by the child, and is no history of the root's.
            history.get_or_insert_with(|| bench.model.clone());
            let Some(child) = round.children.first().copied() else { break };
            chain.push(child);
            // Everything else that is known of a guest is the same in its child.
            bench.guest.uuid = child;
            if depth < scenario.depth {
                bench.rig.ready(child, 1)?;
            }
        }
        bench.guest = root;
        if let Some(history) = history {
            bench.model = history;
        }
        bench.rig.end_all(&chain)?;
        bench.rig.ready(root.uuid, 1)?;
    }
    Ok(())
}
