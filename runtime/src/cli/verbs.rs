//! The verbs that ask an owner for one thing.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use indicatif::ProgressBar;
use serde_json::json;

use super::args::{BranchArgs, InstanceArgs, KillArgs, StopArgs};
use super::client::{self, Line};
use super::error::{CliError, exit_code};
use super::parse::Prefix;
use super::wire::{Answer, Ask, Listed};
use super::{print_json, print_line, print_lines, tell};

/// Something that takes longer than this shows that it goes on.
const PATIENCE: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(100);

pub fn branch(args: &BranchArgs) -> Result<u8, CliError> {
    let (line, parent) = alive(&args.instance)?;
    let BranchArgs { children, unaware, .. } = *args;
    let ask = Ask::Branch { instance: parent.uuid, children, unaware };
    let text = match args.children {
        1 => "forking".to_owned(),
        children => format!("forking {children} children"),
    };
    let Answer::Children(children) = with_progress(&text, || line.ask(&ask))? else {
        return Err(unexpected());
    };
    if args.json {
        print_json(&json!({ "parent": parent.uuid, "children": children }))?;
    } else {
        print_lines(children)?;
    }
    Ok(0)
}

pub fn wait(args: &InstanceArgs) -> Result<u8, CliError> {
    let (line, instance) = client::find(&args.instance)?;
    let Answer::Exited { code, why } = line.ask(&Ask::Wait { instance: instance.uuid })? else {
        return Err(unexpected());
    };
    if args.json {
        print_json(&json!({ "instance": instance.uuid, "code": code, "reason": why }))?;
    } else {
        print_line(&code.to_string())?;
        if let Some(why) = why {
            tell(&format!("note: {}: {why}", instance.uuid));
        }
    }
    Ok(exit_code(code))
}

pub fn stop(args: &StopArgs) -> Result<u8, CliError> {
    let (line, instance) = alive(&args.instance)?;
    let ask = Ask::Stop { instance: instance.uuid, code: args.code, drain_s: args.drain };
    let Answer::Exited { code, .. } = with_progress("stopping", || line.ask(&ask))? else {
        return Err(unexpected());
    };
    if args.json {
        print_json(&json!({ "instance": instance.uuid, "code": code }))?;
    }
    Ok(0)
}

pub fn kill(args: &KillArgs) -> Result<u8, CliError> {
    // The descendants of an instance that has ended can still be killed.
    let (line, instance) = client::find(&args.instance)?;
    if !args.recursive {
        check_alive(&instance)?;
    }
    let ask = Ask::Kill { instance: instance.uuid, recursive: args.recursive };
    let Answer::Killed(killed) = with_progress("killing", || line.ask(&ask))? else {
        return Err(unexpected());
    };
    if args.json {
        print_json(&json!({ "instance": instance.uuid, "killed": killed }))?;
    }
    Ok(0)
}

pub fn pause(args: &InstanceArgs) -> Result<u8, CliError> {
    simple(args, |instance| Ask::Pause { instance: instance.uuid }, "Paused")
}

pub fn resume(args: &InstanceArgs) -> Result<u8, CliError> {
    simple(args, |instance| Ask::Resume { instance: instance.uuid }, "Running")
}

fn simple(
    args: &InstanceArgs,
    ask: impl FnOnce(&Listed) -> Ask,
    state: &str,
) -> Result<u8, CliError> {
    let (line, instance) = alive(&args.instance)?;
    line.ask(&ask(&instance))?;
    if args.json {
        print_json(&json!({ "instance": instance.uuid, "state": state }))?;
    }
    Ok(0)
}

pub fn alive(prefix: &Prefix) -> Result<(Line, Listed), CliError> {
    let (line, instance) = client::find(prefix)?;
    check_alive(&instance)?;
    Ok((line, instance))
}

fn check_alive(instance: &Listed) -> Result<(), CliError> {
    match instance.code {
        None => Ok(()),
        Some(code) => {
            let uuid = instance.uuid;
            Err(CliError::usage(format!("instance {uuid} has ended, with code {code}")))
        }
    }
}

pub fn unexpected() -> CliError {
    CliError::internal("the answer does not fit the question; is another version running?")
}

/// Runs `work`; shows a line on the terminal if it takes long.
pub fn with_progress<R>(text: &str, work: impl FnOnce() -> R) -> R {
    std::thread::scope(|scope| {
        let (done, watched) = channel::<()>();
        scope.spawn(move || {
            if watched.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                // On stderr, and only if that is a terminal.
                let bar = ProgressBar::new_spinner().with_message(text.to_owned());
                bar.enable_steady_tick(TICK);
                // An error: the sender is gone, which is what is waited for.
                watched.recv().unwrap_or(());
                bar.finish_and_clear();
            }
        });
        let result = work();
        drop(done);
        result
    })
}
