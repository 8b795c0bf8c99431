//! What a measurement says while it runs, in this process or on a serial line.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::record::Sample;
use crate::session::{LabError, Progress, ScenarioRun};

/// One message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "told", rename_all = "snake_case")]
pub(super) enum Told {
    /// A new part begins.
    Phase { what: String, total: u64 },
    /// One step more is done.
    Step,
    /// A fork, with what was measured of it.
    Fork { values: Vec<(String, f64)> },
    /// A fork that failed.
    ForkFailed { why: String },
    /// Something that is not part of a fork.
    Apart { name: String, value: f64 },
    /// What is compared with.
    Baseline { name: String, value: f64 },
    /// A single figure.
    Value { name: String, value: f64 },
    /// A remark.
    Note { text: String },
    /// Wrong: nothing of this run counts.
    Void { why: String },
    /// It cannot go on.
    Failed { why: String },
}

/// Puts messages together.
pub(super) struct Listener<'a> {
    pub(super) run: ScenarioRun,
    progress: &'a mut dyn Progress,
    end: Option<Told>,
}

impl<'a> Listener<'a> {
    pub(super) fn new(progress: &'a mut dyn Progress) -> Self {
        let mut run = ScenarioRun { page_bytes: Some(4096), ..ScenarioRun::default() };
        [run.stages, run.child_stages] = crate::lab::stages();
        Self { run, progress, end: None }
    }

    pub(super) fn hear(&mut self, told: Told) {
        let recorder = &mut self.run.recorder;
        match told {
            Told::Phase { what, total } => self.progress.phase(&what, total),
            Told::Step => self.progress.advance(1),
            Told::Fork { values } => {
                let sample = values
                    .into_iter()
                    .fold(Sample::new(), |sample, (name, value)| sample.with(name, value));
                recorder.record(sample);
            }
            Told::ForkFailed { why } => recorder.record(Sample::failed(why)),
            Told::Apart { name, value } => recorder.record_apart(name, value),
            Told::Baseline { name, value } => {
                self.run.baselines_us.entry(name).or_default().push(value);
            }
            Told::Value { name, value } => drop(self.run.values.insert(name, value)),
            Told::Note { text } => self.run.notes.push(text),
            Told::Void { .. } | Told::Failed { .. } => {
                // What came first is the reason for the rest.
                self.end.get_or_insert(told);
            }
        }
    }

    /// What came of it.
    pub(super) fn finish(mut self, done: Result<()>) -> Result<ScenarioRun, LabError> {
        match (self.end, done) {
            (Some(Told::Void { why }), _) => return Err(LabError::Void { reason: why }),
            (Some(Told::Failed { why }), _) => {
                return Err(LabError::Failed(anyhow::Error::msg(why).into()));
            }
            (_, Err(error)) => return Err(LabError::Failed(error.into())),
            (_, Ok(())) => {}
        }
        // A scenario without forks has no stages either.
        if self.run.recorder.forks() == 0 {
            self.run.stages.clear();
            self.run.child_stages.clear();
        }
        Ok(self.run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::Silent;

    #[test]
    fn messages_survive_a_line_and_become_a_run() {
        let mut silent = Silent;
        let mut listener = Listener::new(&mut silent);
        let named = |name: &str, value| (name.to_owned(), value);
        for told in [
            Told::Phase { what: "forks".to_owned(), total: 2 },
            Told::Fork { values: vec![named("ready_us", 5.0), named("branch_us", 1.5)] },
            Told::Step,
            Told::ForkFailed { why: "apply: ENOMEM".to_owned() },
            Told::Apart { name: "boot_us".to_owned(), value: 7.0 },
            Told::Baseline { name: "guest_true_us".to_owned(), value: 9.0 },
        ] {
            let line = serde_json::to_string(&told).unwrap();
            assert!(!line.contains('\n'));
            listener.hear(serde_json::from_str(&line).unwrap());
        }
        let run = listener.finish(Ok(())).unwrap();
        assert_eq!(run.recorder.samples("ready_us"), [5.0, f64::INFINITY]);
        assert_eq!(run.recorder.samples("boot_us"), [7.0]);
        assert_eq!(run.baselines_us["guest_true_us"], [9.0]);
        assert!(!run.stages.is_empty());
    }

    #[test]
    fn the_first_end_is_the_reason() {
        let mut silent = Silent;
        let mut listener = Listener::new(&mut silent);
        listener.hear(Told::Void { why: "two children with one UUID".to_owned() });
        listener.hear(Told::Failed { why: "and then it fell over".to_owned() });
        let error = listener.finish(Err(anyhow::anyhow!("exit code 1"))).unwrap_err();
        assert!(matches!(error, LabError::Void { reason } if reason.contains("one UUID")));
    }
}
