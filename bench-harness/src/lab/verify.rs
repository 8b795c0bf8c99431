//! Whether a fork had the right outcome: who answers, and what is in memory.

use std::collections::HashSet;

use runtime::fork::ForkReport;

use super::model::Model;
use super::program::{Guest, Pick, Plan, Words};

/// Looks at every machine of a fork. `model` is the parent at the moment of the fork, `child` what
/// a child has in memory when it checks it.
///
/// # Errors
///
/// What is wrong, with the numbers.
pub(super) fn verify(
    guest: &Guest,
    plan: &Plan,
    child: &Model,
    (report, parent, children): (&ForkReport, &Words, &[Words]),
    generations: &mut HashSet<u64>,
) -> Result<(), String> {
    let number = report.number;
    let asked = usize::try_from(plan.children).unwrap_or(0);
    if children.len() != asked {
        return Err(format!("fork {number} made {} children of {asked}", children.len()));
    }
    check_parent(guest, report, parent).map_err(|why| format!("parent of fork {number}: {why}"))?;
    generations.insert(parent.generation());
    for (known, words) in report.children.iter().zip(children) {
        check_identity(known.index, words, generations)
            .and_then(|()| same("its id", words.own_uuid(), known.uuid))
            .and_then(|()| same("the number of children", words.children(), plan.children))
            .and_then(|()| check_memory(plan, child, words))
            .map_err(|why| format!("child {} of fork {number}: {why}", known.index))?;
    }
    Ok(())
}

fn same<T: Copy + PartialEq + std::fmt::Display>(
    what: &str,
    is: T,
    should: T,
) -> Result<(), String> {
    if is == should { Ok(()) } else { Err(format!("{what} is {is}, not {should}")) }
}

fn check_parent(guest: &Guest, report: &ForkReport, words: &Words) -> Result<(), String> {
    same("the status", words.status(), 0)?;
    same("the role", words.role(), 0)?;
    same("its id", words.own_uuid(), guest.uuid)?;
    let first = report.children.iter().find(|child| child.index == 1);
    let first = first.map_or(uuid::Uuid::nil(), |child| child.uuid);
    same("the id of the child", words.child_uuid(), first)?;
    same("that all registers survived", words.registers_survived(), true)
}

fn check_identity(index: u32, words: &Words, generations: &mut HashSet<u64>) -> Result<(), String> {
    same("the status", words.status(), 0)?;
    same("the role", words.role(), index)?;
    same("the id of the child", words.child_uuid(), uuid::Uuid::nil())?;
    same("that all registers survived", words.registers_survived(), true)?;
    if !generations.insert(words.generation()) {
        return Err(format!("the generation id {:#x} is not new", words.generation()));
    }
    Ok(())
}

fn check_memory(plan: &Plan, model: &Model, words: &Words) -> Result<(), String> {
    let check = |what: &str, pick: Option<Pick>, sum: u64| {
        let Some(Pick { count, seed }) = pick else { return Ok(()) };
        let expected = model.check(count, seed);
        same(&format!("the checksum of {count} {what} (seed {seed})"), sum, expected)
    };
    check("dirty pages", plan.check_dirty, words.sum_of_dirty())?;
    check("pages", plan.check_others, words.sum_of_others())?;
    match plan.work {
        Some(work) => same("the counter", words.counter(), model.counter(work.pages - 1)),
        None => Ok(()),
    }
}
