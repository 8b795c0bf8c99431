//! `ps`: the tree of instances.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;

use uuid::Uuid;

use super::args::PsArgs;
use super::client;
use super::error::CliError;
use super::wire::{Listed, State};
use super::{print, print_json, print_lines};

pub fn run(args: &PsArgs) -> Result<u8, CliError> {
    let all: Vec<_> = client::all()?.into_iter().flat_map(|(_, listed)| listed).collect();
    let shown = select(all, args.all);
    if args.json {
        print_json(&shown)?;
    } else if args.quiet {
        print_lines(shown.iter().map(|one| one.uuid))?;
    } else {
        print(table(&shown).as_bytes())?;
    }
    Ok(0)
}

/// Those that live, or all.
fn select(all: Vec<Listed>, ended: bool) -> Vec<Listed> {
    all.into_iter().filter(|one| ended || one.lives()).collect()
}

/// One row for each instance, children below their parent. Where the parent is not shown (it has
/// ended), the child stands at the margin.
fn table(listed: &[Listed]) -> String {
    let shown: HashSet<Uuid> = listed.iter().map(|one| one.uuid).collect();
    let mut children: HashMap<Option<Uuid>, Vec<&Listed>> = HashMap::new();
    for one in listed {
        let parent = one.parent.filter(|parent| shown.contains(parent));
        children.entry(parent).or_default().push(one);
    }
    let mut rows = Vec::new();
    let mut stack: Vec<(String, String, &Listed)> = Vec::new();
    push(&mut stack, &mut children, None, "");
    while let Some((branch, below, one)) = stack.pop() {
        rows.push((format!("{branch}{}", one.uuid), one));
        push(&mut stack, &mut children, Some(one.uuid), &below);
    }
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).max(8);
    let mut text = format!(
        "{:width$}  {:>8}  {:12} {:>8} {:>8} {:>9} {:>5}\n",
        "INSTANCE", "PID", "STATE", "AGE", "MEMORY", "RESIDENT", "VCPUS"
    );
    for (name, one) in rows {
        let row = writeln!(
            text,
            "{name:width$}  {:>8}  {:12} {:>8} {:>8} {:>9} {:>5}",
            one.pid,
            state(one),
            age(one.age_ms),
            size(u64::from(one.memory_mib) << 10),
            size(one.resident_kib),
            one.vcpus,
        );
        // Writing to a string does not fail.
        row.unwrap_or(());
    }
    text
}

/// Puts the children of `parent` on the stack, the first one on top.
fn push<'a>(
    stack: &mut Vec<(String, String, &'a Listed)>,
    children: &mut HashMap<Option<Uuid>, Vec<&'a Listed>>,
    parent: Option<Uuid>,
    indent: &str,
) {
    let mut last = true;
    for one in children.remove(&parent).unwrap_or_default().into_iter().rev() {
        let (branch, below) = match (parent, last) {
            (None, _) => (String::new(), String::new()),
            (Some(_), true) => (format!("{indent}└─ "), format!("{indent}   ")),
            (Some(_), false) => (format!("{indent}├─ "), format!("{indent}│  ")),
        };
        stack.push((branch, below, one));
        last = false;
    }
}

fn state(one: &Listed) -> String {
    match (one.state, one.code) {
        (State::Running, _) => "Running".into(),
        (State::Paused, _) => "Paused".into(),
        (State::Stopped, Some(code)) => format!("Stopped {code}"),
        (State::Stopped, None) => "Stopped".into(),
    }
}

fn age(ms: u64) -> String {
    match ms / 1000 {
        0 => format!("{ms} ms"),
        seconds @ 1..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86400),
    }
}

fn size(kib: u64) -> String {
    match kib {
        0..10_240 => format!("{kib}K"),
        10_240..10_485_760 => format!("{}M", kib >> 10),
        _ => format!("{}G", kib >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(number: u128, parent: Option<u128>, state: State) -> Listed {
        Listed {
            uuid: Uuid::from_u128(number),
            parent: parent.map(Uuid::from_u128),
            pid: 1,
            state,
            code: (state == State::Stopped).then_some(3),
            why: None,
            age_ms: 61_000,
            memory_mib: 512,
            vcpus: 1,
            resident_kib: 4,
        }
    }

    #[test]
    fn children_stand_below_their_parents() {
        let all = vec![
            one(1, None, State::Running),
            one(2, Some(1), State::Running),
            one(3, Some(2), State::Paused),
            one(4, Some(1), State::Running),
        ];
        let text = table(&all);
        let rows: Vec<_> = text.lines().skip(1).collect();
        let starts = ["000", "├─ 000", "│  └─ 000", "└─ 000"];
        assert!(rows.iter().zip(starts).all(|(row, start)| row.starts_with(start)), "{text}");
        assert!(rows[2].contains("Paused"), "{text}");
        assert!(rows[0].contains("61 s") && rows[0].contains("512M"), "{text}");
    }

    #[test]
    fn an_orphan_is_shown_all_the_same() {
        let all = vec![one(1, None, State::Stopped), one(2, Some(1), State::Running)];
        assert_eq!(table(&select(all.clone(), true)).lines().count(), 3);
        let text = table(&select(all, false));
        assert_eq!(text.lines().count(), 2);
        assert!(text.lines().nth(1).is_some_and(|row| row.starts_with("0000")), "{text}");
    }

    #[test]
    fn a_deep_tree_needs_no_deep_stack() {
        let chain: Vec<_> = (1..=1000)
            .map(|number| one(number, (number > 1).then(|| number - 1), State::Running))
            .collect();
        assert_eq!(table(&chain).lines().count(), 1001);
    }
}
