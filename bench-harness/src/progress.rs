//! What a person sees while a bench runs: a bar on a terminal, one line per scenario elsewhere.
//!
//! All of it goes to stderr; stdout is for results.

use std::io::{self, IsTerminal as _};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::record::Micros;
use crate::scenario::Scenario;
use crate::session::{Outcome, Progress, Watcher};

/// Drawing more often than this, per second, would take CPU from what is measured.
const DRAWS_PER_SECOND: u8 = 4;

/// Shows a session on stderr.
#[derive(Debug)]
pub struct Terminal {
    bar: ProgressBar,
    begun: Instant,
    heading: String,
}

impl Default for Terminal {
    fn default() -> Self {
        Self::new()
    }
}

impl Terminal {
    /// A bar if stderr is a terminal, else lines.
    #[must_use]
    pub fn new() -> Self {
        let target = if io::stderr().is_terminal() {
            ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND)
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        // A template that does not parse would be noticed by the test below; the plain bar does.
        if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
            bar.set_style(style.progress_chars("█▉▊▋▌▍▎▏ "));
        }
        Self { bar, begun: Instant::now(), heading: String::new() }
    }

    /// Says what is under way.
    pub fn title(&mut self, title: &str) {
        self.bar.reset_elapsed();
        self.bar.set_prefix(title.to_owned());
    }

    #[expect(clippy::print_stderr, reason = "the one line per scenario where there is no bar")]
    fn line(&self, text: &str) {
        if self.bar.is_hidden() {
            eprintln!("{text}");
        } else {
            self.bar.println(text);
        }
    }
}

const TEMPLATE: &str = "{prefix:<28} {bar:30.cyan/dim} {pos:>6}/{len:<6} {msg:<12} {elapsed:>4}";

impl Progress for Terminal {
    fn phase(&mut self, what: &str, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(0);
        self.bar.set_message(what.to_owned());
    }

    fn advance(&mut self, steps: u64) {
        self.bar.inc(steps);
    }
}

impl Watcher for Terminal {
    fn begin(&mut self, scenario: &Scenario, index: usize, of: usize) {
        self.heading = format!("[{:>2}/{of}] {}", index + 1, scenario.name);
        self.begun = Instant::now();
        self.title(&self.heading.clone());
    }

    fn end(&mut self, _scenario: &Scenario, outcome: &Outcome) {
        let text = format!("{:<28} {}", self.heading, describe(outcome, self.begun.elapsed()));
        self.line(&text);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn describe(outcome: &Outcome, took: Duration) -> String {
    let run = match outcome {
        Outcome::Unavailable(reason) => return format!("not run: {reason}"),
        Outcome::Done(run) => run,
    };
    let seconds = took.as_secs_f64();
    let Some(branch) = run.recorder.summary("branch_us") else {
        return format!("done in {seconds:.1} s");
    };
    let failed = match run.recorder.failed() {
        0 => String::new(),
        failed => format!(", {failed} FAILED"),
    };
    let floor = run.floor_us.map_or(String::new(), |us| format!(", floor {}", Micros(us)));
    format!(
        "p50 {} µs, p99 {} µs, n = {}{failed}{floor} ({seconds:.1} s)",
        branch.p50, branch.p99, branch.n
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Sample;
    use crate::session::ScenarioRun;

    #[test]
    fn the_template_parses() {
        assert!(ProgressStyle::with_template(TEMPLATE).is_ok());
    }

    #[test]
    fn one_line_says_how_it_went() {
        let mut run = ScenarioRun { floor_us: Some(60.0), ..ScenarioRun::default() };
        run.recorder.record(Sample::new().with("branch_us", 76.0));
        run.recorder.record(Sample::failed("apply: ENOMEM"));
        let text = describe(&Outcome::Done(Box::new(run)), Duration::from_millis(1500));
        assert_eq!(text, "p50 76.0 µs, p99 inf µs, n = 2, 1 FAILED, floor 60.0 (1.5 s)");
        let text = describe(&Outcome::Unavailable("no pool".into()), Duration::ZERO);
        assert_eq!(text, "not run: no pool");
    }
}
