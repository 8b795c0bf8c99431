//! The demo: a tree of instances, what each found in `/uk/libukp`, and whether that is what the host
//! saw.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::{Event, short};

/// What the root's shell runs.
pub const SCRIPT: &str = include_str!("demo.sh");
/// Paths of the instances that it makes.
const PATHS: [&str; 7] = ["", "1", "11", "12", "2", "21", "211"];
/// Begins the lines that are for the host.
const MARK: &str = "@demo ";

/// One instance. What it said is text: it is to be judged here.
#[derive(Debug, Default)]
struct Node {
    /// As the host knows it.
    parent: Option<Uuid>,
    /// As the host knows it.
    code: Option<i32>,
    /// How long the host took to make it.
    branch_us: Option<u64>,
    /// Which instance of the script it is; the root says none.
    path: String,
    /// What it read in `fork` as a child, and what was in `vm/` then.
    born: Option<(String, Vec<String>)>,
    /// Paths of its children and what it read in `fork` after each fork.
    forked: Vec<(String, String)>,
    /// What was in `vm/` after its last fork.
    vm: Option<Vec<String>>,
    /// What it read in `status`, by child.
    status: BTreeMap<String, String>,
    /// What it read in `wait`, by child.
    ended: BTreeMap<String, String>,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Tree {
    nodes: HashMap<Uuid, Node>,
    /// In the order in which they began.
    order: Vec<Uuid>,
    began: Option<Instant>,
    boot: Option<Duration>,
    forks: Option<Duration>,
}

impl Tree {
    /// Takes in what happened.
    pub fn event(&mut self, event: &Event, now: Instant) {
        match event {
            Event::Started { instance, parent } => {
                self.began.get_or_insert(now);
                self.order.push(*instance);
                self.nodes.entry(*instance).or_default().parent = *parent;
            }
            Event::Forked { children, branch_us, .. } => {
                for child in children {
                    self.nodes.entry(*child).or_default().branch_us = *branch_us;
                }
            }
            Event::Exited { instance, code, .. } => {
                self.nodes.entry(*instance).or_default().code = Some(*code);
            }
            Event::Console { .. } | Event::Note { .. } => {}
        }
    }

    /// Takes in a line of a console; returns whether it was one for the host.
    pub fn line(&mut self, instance: Uuid, line: &str, now: Instant) -> bool {
        let Some(said) = line.strip_prefix(MARK) else { return false };
        let words: Vec<String> = said.split_whitespace().map(str::to_owned).collect();
        let Some((verb, words)) = words.split_first() else { return false };
        let since = self.began.map(|began| now.duration_since(began));
        let node = self.nodes.entry(instance).or_default();
        match (verb.as_str(), words) {
            ("up", []) => self.boot = since,
            ("born", [path, read, vm @ ..]) => {
                path.clone_into(&mut node.path);
                node.born = Some((read.clone(), vm.to_vec()));
            }
            ("forked", [path, read]) => node.forked.push((path.clone(), read.clone())),
            ("vm", vm) => {
                node.vm = Some(vm.to_vec());
                self.forks = since.zip(self.boot).map(|(now, boot)| now.saturating_sub(boot));
            }
            ("status", [child, status @ ..]) => {
                node.status.insert(child.clone(), status.join(" "));
            }
            ("ended", [child, code @ ..]) => {
                node.ended.insert(child.clone(), code.join(" "));
            }
            _ => return false,
        }
        true
    }

    /// What does not fit together, one sentence each; nothing if all is well.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let roots = self.nodes.values().filter(|node| node.parent.is_none()).count();
        if roots != 1 {
            wrong.push(format!("there are {roots} instances without a parent, not 1"));
        }
        let mut paths: Vec<&str> = self.nodes.values().map(|node| node.path.as_str()).collect();
        paths.sort_unstable();
        if paths != PATHS {
            wrong.push(format!("the instances are {paths:?}, not {PATHS:?}"));
        }
        for id in &self.order {
            if let Some(node) = self.nodes.get(id) {
                let who = short(*id);
                wrong.extend(self.wrong(*id, node).into_iter().map(|what| format!("{who} {what}")));
            }
        }
        wrong
    }

    fn wrong(&self, id: Uuid, node: &Node) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut check = |fits: bool, what: String| {
            if !fits {
                wrong.push(what);
            }
        };
        match (&node.born, node.parent) {
            (Some((read, vm)), Some(_)) => {
                let zero = Uuid::nil().to_string();
                check(*read == zero, format!("is a child and read {read:?} in fork, not zeros"));
                check(vm.is_empty(), format!("was born with children in vm/: {vm:?}"));
            }
            (None, None) => {}
            (None, Some(_)) => check(false, "did not say that it is a child".to_owned()),
            (Some(_), None) => check(false, "is the root and took itself for a child".to_owned()),
        }
        let children = self.children(id);
        let known: BTreeSet<String> = children.iter().map(Uuid::to_string).collect();
        let read: BTreeSet<String> = node.forked.iter().map(|(_, read)| read.clone()).collect();
        check(read == known, format!("read {read:?} in fork, but its children are {known:?}"));
        let vm: Option<BTreeSet<_>> = node.vm.clone().map(BTreeSet::from_iter);
        check(
            vm.as_ref() == Some(&known),
            format!("saw {vm:?} in vm/, but its children are {known:?}"),
        );
        for child in &children {
            let (Some(of), name) = (self.nodes.get(child), child.to_string()) else { continue };
            let named = node.forked.iter().find(|(_, read)| *read == name).map(|(path, _)| path);
            check(named == Some(&of.path), format!("took {name} for {named:?}: {:?}", of.path));
            let code = of.code.map(|code| code.to_string());
            let read = node.ended.get(&name);
            check(read == code.as_ref(), format!("read {read:?} in wait of {name}: {code:?}"));
            let status = node.status.get(&name).map(String::as_str);
            check(
                matches!(status, Some("Starting" | "Running" | "Stopping" | "Stopped")),
                format!("read {status:?} in status of {name}"),
            );
        }
        let expected = node.path.parse().unwrap_or(0);
        check(
            node.code == Some(expected),
            format!("ended with {:?} instead of {expected}", node.code),
        );
        wrong
    }

    fn children(&self, id: Uuid) -> Vec<Uuid> {
        let parent = |child: &&Uuid| self.nodes.get(child).is_some_and(|n| n.parent == Some(id));
        self.order.iter().filter(parent).copied().collect()
    }

    /// The tree, for people.
    #[must_use]
    pub fn drawn(&self) -> String {
        let mut rows = vec![
            ["instance", "cat fork", "ls vm", "status", "wait", "ended with", "branch"]
                .map(str::to_owned),
        ];
        for root in
            self.order.iter().filter(|id| self.nodes.get(id).is_some_and(|n| n.parent.is_none()))
        {
            self.draw(*root, "", "", &mut rows);
        }
        let widths: Vec<usize> = (0..rows[0].len())
            .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
            .collect();
        let shown = rows.iter().map(|row| {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
        });
        shown.collect()
    }

    fn draw(&self, id: Uuid, own: &str, below: &str, rows: &mut Vec<[String; 7]>) {
        let Some(node) = self.nodes.get(&id) else { return };
        let parent = node.parent.and_then(|parent| self.nodes.get(&parent));
        let name = id.to_string();
        let read = node.born.iter().map(|(read, _)| read);
        let read = read.chain(node.forked.iter().map(|(_, read)| read));
        let of_parent = |values: fn(&Node) -> &BTreeMap<String, String>| {
            parent.and_then(|parent| values(parent).get(&name).cloned()).unwrap_or_default()
        };
        rows.push([
            format!("{own}{}", short(id)),
            cut(read),
            cut(node.vm.iter().flatten()),
            of_parent(|parent| &parent.status),
            of_parent(|parent| &parent.ended),
            node.code.map(|code| code.to_string()).unwrap_or_default(),
            node.branch_us.map(milliseconds).unwrap_or_default(),
        ]);
        let children = self.children(id);
        for (index, child) in children.iter().enumerate() {
            let (mark, bar) = if index + 1 == children.len() {
                ("└── ", "    ")
            } else {
                ("├── ", "│   ")
            };
            self.draw(*child, &format!("{below}{mark}"), &format!("{below}{bar}"), rows);
        }
    }

    /// How long it took, in a sentence.
    #[must_use]
    pub fn times(&self) -> String {
        let seconds = |time: Option<Duration>| {
            time.map_or("?".to_owned(), |time| format!("{:.1}", time.as_secs_f64()))
        };
        let forks = self.nodes.values().filter(|node| node.branch_us.is_some()).count();
        format!(
            "Linux was up {} s after its start; the last of {forks} forks was done {} s later",
            seconds(self.boot),
            seconds(self.forks),
        )
    }
}

fn cut<'a>(names: impl Iterator<Item = &'a String>) -> String {
    names.map(|name| name.chars().take(8).collect()).collect::<Vec<String>>().join(" ")
}

fn milliseconds(us: u64) -> String {
    format!("{}.{} ms", us / 1000, us % 1000 / 100)
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
