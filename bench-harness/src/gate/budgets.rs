//! What forks are allowed to do: `budgets.toml`.
//!
//! ```toml
//! [quiet.parent]
//! "ioctl KVM_GET_MSRS" = 1
//! "futex wait with time limit" = { at_most = 64 }
//! ```

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use super::count::{Seen, agreed, mostly_at_most};
use super::path::TIMING;

/// Limits are multiples of this, so that recording twice gives one text.
const LIMIT: u64 = 64;

/// What is written above the tables.
const HEADER: &str = "\
# What one fork does, counted by strace (bench-harness/METHODOLOGY.md, \"Exact counts\").
#
# `parent` is the vCPU thread that rang the doorbell, until it is in the guest again; `children` are
# all vCPU threads of all children, until their first run is over; `pages` are the report's.
# A plain number is exact. `at_most` is for calls that depend on who was faster.
#
# A change of this file is a decision. `./just gate` says which number differs; correct it here, or
# with `bench-harness gate --record`, in the commit that changes it, and say why in its body. A
# number that went down is recorded as well.
";

/// How often something may happen in one fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Budget {
    /// Exactly so often.
    Exactly(u64),
    /// It depends on timing.
    Limit {
        /// At most so often, in nine of ten forks.
        at_most: u64,
    },
}

/// Budgets by workload, role and name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Budgets(BTreeMap<String, BTreeMap<String, BTreeMap<String, Budget>>>);

impl Budgets {
    /// Reads the file's text.
    ///
    /// # Errors
    ///
    /// Where it is not what is expected.
    pub fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }

    /// The file's text.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = HEADER.to_owned();
        for (workload, roles) in &self.0 {
            for (role, budgets) in roles {
                // Writing to a String cannot fail.
                let mut line = |line: String| text.write_str(&line).unwrap_or(());
                line(format!("\n[{workload}.{role}]\n"));
                for (name, budget) in budgets {
                    line(match budget {
                        Budget::Exactly(count) => format!("\"{name}\" = {count}\n"),
                        Budget::Limit { at_most } => {
                            format!("\"{name}\" = {{ at_most = {at_most} }}\n")
                        }
                    });
                }
            }
        }
        text
    }

    /// Takes what was seen as the budget of a workload. A limit written by hand in `old` stays, if it
    /// holds.
    ///
    /// # Errors
    ///
    /// The counts on which forks do not agree: they cannot be recorded.
    pub fn record(&mut self, workload: &str, seen: &Seen, old: &Self) -> Result<(), Vec<String>> {
        let mut roles: BTreeMap<String, BTreeMap<String, Budget>> = BTreeMap::new();
        let mut wavering = Vec::new();
        for ((role, name), values) in &seen.exact {
            if let Some(limit @ Budget::Limit { at_most }) = old.recorded(workload, role, name)
                && mostly_at_most(values) <= at_most
            {
                roles.entry((*role).to_owned()).or_default().insert(name.clone(), limit);
                continue;
            }
            match agreed(values) {
                Some(0) => {}
                Some(count) => {
                    let budgets = roles.entry((*role).to_owned()).or_default();
                    budgets.insert(name.clone(), Budget::Exactly(count));
                }
                None => wavering.push(format!("{workload} {role}: {name}: {values:?}")),
            }
        }
        for ((role, name), values) in &seen.timing {
            let most = values.iter().copied().max().unwrap_or(0);
            // Twice that: a slower machine may sleep where this one did not have to.
            let budgets = roles.entry((*role).to_owned()).or_default();
            let limit = Budget::Limit { at_most: (most * 2).next_multiple_of(LIMIT) };
            budgets.insert(name.clone(), limit);
        }
        for role in ["parent", "children"] {
            let budgets = roles.entry(role.to_owned()).or_default();
            for name in TIMING {
                // It did not happen here.
                budgets.entry(name.to_owned()).or_insert(Budget::Limit { at_most: LIMIT });
            }
        }
        self.0.insert(workload.to_owned(), roles);
        if wavering.is_empty() { Ok(()) } else { Err(wavering) }
    }

    fn recorded(&self, workload: &str, role: &str, name: &str) -> Option<Budget> {
        self.0.get(workload)?.get(role)?.get(name).copied()
    }

    /// Compares: one line for each count that is not as recorded.
    #[must_use]
    pub fn differences(&self, workload: &str, seen: &Seen) -> Vec<String> {
        let Some(roles) = self.0.get(workload) else {
            return vec![format!("{workload}: nothing is recorded")];
        };
        let mut lines = Vec::new();
        for ((role, name), values) in &seen.exact {
            let wanted = match self.recorded(workload, role, name) {
                Some(Budget::Exactly(count)) => count,
                // Written by hand, for a call that depends on who was faster in this workload alone.
                Some(Budget::Limit { at_most }) if mostly_at_most(values) <= at_most => continue,
                _ => 0,
            };
            if agreed(values) != Some(wanted) {
                let seen = agreed(values).map_or(format!("{values:?}"), |count| count.to_string());
                lines.push(format!("{workload} {role}: {name}: {wanted} recorded, {seen} seen"));
            }
        }
        for ((role, name), values) in &seen.timing {
            let limit = match self.recorded(workload, role, name) {
                Some(Budget::Limit { at_most }) => at_most,
                _ => 0,
            };
            let most = mostly_at_most(values);
            if most > limit {
                lines.push(format!(
                    "{workload} {role}: {name}: at most {limit} recorded, {most} seen"
                ));
            }
        }
        for (role, budgets) in roles {
            for (name, budget) in budgets {
                let is_seen = seen.exact.keys().any(|(r, n)| r == role && n == name);
                if let (Budget::Exactly(count @ 1..), false) = (budget, is_seen) {
                    lines.push(format!("{workload} {role}: {name}: {count} recorded, 0 seen"));
                }
            }
        }
        lines
    }
}

/// Forks that did not do what the others did, by role: how many, of how many.
#[must_use]
pub fn stragglers(seen: &Seen) -> Vec<String> {
    let mut lines = Vec::new();
    for ((role, name), values) in &seen.exact {
        if let Some(count) = agreed(values) {
            let others: Vec<_> = values.iter().filter(|value| **value != count).collect();
            if !others.is_empty() {
                lines.push(format!("{role}: {name}: {count}, but {others:?} once each"));
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(exact: &[(&str, u64)], timing: &[(&str, u64)]) -> Seen {
        let values = |list: &[(&str, u64)]| {
            list.iter().map(|(name, n)| (("parent", (*name).to_owned()), vec![*n; 12])).collect()
        };
        Seen { forks: 12, exact: values(exact), timing: values(timing) }
    }

    #[test]
    fn what_was_recorded_is_read_again_and_passes() {
        let seen = seen(&[("ioctl KVM_GET_MSRS", 1), ("sendto", 0)], &[("futex of a lock", 2)]);
        let mut budgets = Budgets::default();
        budgets.record("quiet", &seen, &Budgets::default()).unwrap();
        let text = budgets.text();
        assert!(
            text.contains("[quiet.parent]\n\"futex of a lock\" = { at_most = 64 }\n"),
            "{text}"
        );
        let again = Budgets::parse(&text).unwrap();
        assert_eq!(again, budgets);
        assert_eq!(again.differences("quiet", &seen), [""; 0]);
    }

    #[test]
    fn each_difference_is_a_line() {
        let mut budgets = Budgets::default();
        let before = seen(&[("ioctl A", 1), ("ioctl B", 1)], &[("futex of a lock", 1)]);
        budgets.record("quiet", &before, &Budgets::default()).unwrap();
        let after = seen(&[("ioctl A", 2), ("ioctl C", 1)], &[("futex of a lock", 65)]);
        assert_eq!(
            budgets.differences("quiet", &after),
            [
                "quiet parent: ioctl A: 1 recorded, 2 seen",
                "quiet parent: ioctl C: 0 recorded, 1 seen",
                "quiet parent: futex of a lock: at most 64 recorded, 65 seen",
                "quiet parent: ioctl B: 1 recorded, 0 seen",
            ]
        );
        assert_eq!(budgets.differences("other", &after), ["other: nothing is recorded"]);
    }

    #[test]
    fn a_count_that_wavers_is_not_recorded_and_does_not_pass() {
        let mut wavering = seen(&[("ioctl A", 1)], &[]);
        for value in wavering.exact.values_mut().flatten().step_by(3) {
            *value = 2;
        }
        let mut budgets = Budgets::default();
        assert_eq!(budgets.record("quiet", &wavering, &Budgets::default()).unwrap_err().len(), 1);
        assert_eq!(budgets.differences("quiet", &wavering).len(), 1);
    }

    /// One that wavers has to have its limit written by hand, and more than that does not pass.
    #[test]
    fn a_limit_written_by_hand_holds_for_any_call() {
        let limit = "[quiet.parent]\n\"futex wake\" = { at_most = 3 }\n";
        let mut budgets = Budgets::parse(limit).unwrap();
        let old = budgets.clone();
        let mut wavering = seen(&[("futex wake", 2)], &[]);
        for value in wavering.exact.values_mut().flatten().step_by(3) {
            *value = 3;
        }
        assert_eq!(budgets.differences("quiet", &wavering), [""; 0]);
        let more = seen(&[("futex wake", 4)], &[]);
        assert_eq!(budgets.differences("quiet", &more).len(), 1);
        budgets.record("quiet", &wavering, &old).unwrap();
        assert!(
            budgets.text().contains("\"futex wake\" = { at_most = 3 }\n"),
            "{}",
            budgets.text()
        );
        budgets.record("quiet", &more, &old).unwrap();
        assert!(budgets.text().contains("\"futex wake\" = 4\n"), "{}", budgets.text());
    }
}
