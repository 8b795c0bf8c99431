//! `trace`: one fork, stage by stage, with what happened in it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use ebpf_loader::{EventKind, Metric};
use runtime::fork::{ForkReport, Moment};
use serde_json::json;

use super::args::TraceArgs;
use super::error::CliError;
use super::stats::{exit_name, losses, metric_name, us};
use super::verbs::{alive, unexpected, with_progress};
use super::wire::{Traced, TracedEvent, short};
use super::{print, print_json};

pub fn trace(args: &TraceArgs) -> Result<u8, CliError> {
    let (line, instance) = alive(&args.instance)?;
    let waiting = if args.branch { "forking" } else { "waiting for the guest's next fork" };
    let traced = with_progress(waiting, || line.traced(instance.uuid, args.branch))?;
    let traced = traced.ok_or_else(unexpected)?;
    if args.json {
        print_json(&json!({ "instance": instance.uuid, "trace": traced }))?;
    } else {
        print(text(&traced).as_bytes())?;
    }
    Ok(0)
}

/// Moments of a report in ns after the doorbell, with whose they are.
fn moments(report: &ForkReport) -> Vec<(u64, String, &'static str)> {
    let parent = &report.parent;
    let of_parent = [
        (0, Moment::Doorbell),
        (parent.woken, Moment::Woken),
        (parent.quiesced, Moment::Quiesced),
        (parent.settled, Moment::Settled),
        (parent.pages, Moment::Pages),
        (parent.released, Moment::Released),
        (parent.resumed, Moment::Resumed),
    ];
    let mut all: Vec<_> = of_parent
        .into_iter()
        .map(|(at, moment)| (at, "parent".to_owned(), moment.name()))
        .collect();
    for child in &report.children {
        let of_child = [
            (child.awake, Moment::Awake),
            (child.applied, Moment::Applied),
            (child.restored, Moment::Restored),
            (child.entered, Moment::Entered),
            (child.exited, Moment::Exited),
        ];
        let name = short(child.uuid);
        all.extend(of_child.into_iter().map(|(at, moment)| (at, name.clone(), moment.name())));
    }
    all
}

fn text(traced: &Traced) -> String {
    let mut text = String::new();
    let report = &traced.report;
    let mut line = |arguments: std::fmt::Arguments<'_>| {
        // Writing to a string cannot fail.
        writeln!(text, "{arguments}").unwrap_or(());
    };
    let children = report.children.len();
    match (report.failed, report.branch_ns()) {
        (Some((step, errno)), _) => line(format_args!(
            "fork {} failed at step {}: {}",
            report.number,
            step.name(),
            std::io::Error::from_raw_os_error(errno)
        )),
        (None, branch) => line(format_args!(
            "fork {}: {children} children, {} pages captured, branch {} µs, pause {} µs",
            report.number,
            report.captured_pages,
            branch.map_or("?".to_owned(), us),
            us(report.parent.resumed)
        )),
    }
    line(format_args!(""));
    line(format_args!("{:>10} {:10} {:>8}  {}", "µs", "who", "took µs", "what"));
    let mut rows: BTreeMap<(i64, usize), String> = BTreeMap::new();
    let mut add = |at: i64, row: String| {
        let next = rows.len();
        rows.insert((at, next), row);
    };
    for (at, who, name) in moments(report) {
        let at = i64::try_from(at).unwrap_or(i64::MAX);
        add(at, format!("{who:10} {:>8}  ── {name}", ""));
    }
    for event in traced.events.iter().filter(|event| event.kind != EventKind::Stage as u8) {
        let parent = event.pid == traced.parent_pid;
        let who = if parent { "parent".to_owned() } else { short(event.instance) };
        let took = if event.took_ns > 0 { us(event.took_ns) } else { String::new() };
        add(event.at_ns, format!("{who:10} {took:>8}  {}", what(event)));
    }
    for ((at, _), row) in rows {
        let sign = if at < 0 { "-" } else { "" };
        line(format_args!("{:>10} {row}", format!("{sign}{}", us(at.unsigned_abs()))));
    }
    if traced.cut {
        line(format_args!("so much happened that the beginning is missing"));
    }
    for missing in &traced.missing {
        line(format_args!("not measured here: {missing}"));
    }
    if traced.lost.any() {
        line(format_args!("{}", losses(&traced.lost)));
    }
    text
}

fn what(event: &TracedEvent) -> String {
    match EventKind::from_number(event.kind) {
        Some(EventKind::Fault) => {
            let metric = u8::try_from(event.detail >> 32).ok().and_then(Metric::from_number);
            let name = metric.map_or("fault", metric_name);
            match metric {
                Some(Metric::GuestCow | Metric::GuestMinor | Metric::GuestMajor) => {
                    format!("{name}: guest page {}", event.what >> 12)
                }
                _ => format!("{name}: {:#x}", event.what),
            }
        }
        Some(EventKind::KvmFault) => {
            format!("{}: guest page {}", metric_name(Metric::KvmFault), event.what >> 12)
        }
        Some(EventKind::Exit) => {
            format!("exit: {}", exit_name(u16::try_from(event.what).unwrap_or(u16::MAX)))
        }
        Some(EventKind::OffCpu) => metric_name(Metric::OffCpu).to_owned(),
        Some(EventKind::Ioctl) => format!("ioctl: {}", ioctl_name(event.what)),
        Some(EventKind::Stage) | None => format!("event {}", event.kind),
    }
}

/// The calls of a fork, by their number.
fn ioctl_name(number: u64) -> String {
    let name = match number {
        0x80 => "KVM_RUN",
        0x81 => "KVM_GET_REGS",
        0x82 => "KVM_SET_REGS",
        0x83 => "KVM_GET_SREGS",
        0x84 => "KVM_SET_SREGS",
        0x88 => "KVM_GET_MSRS",
        0x89 => "KVM_SET_MSRS",
        0x8c => "KVM_GET_FPU",
        0x8d => "KVM_SET_FPU",
        0x8e => "KVM_GET_LAPIC",
        0x8f => "KVM_SET_LAPIC",
        0x42 => "KVM_GET_DIRTY_LOG",
        0x62 => "KVM_GET_IRQCHIP",
        0x63 => "KVM_SET_IRQCHIP",
        0x9f => "KVM_GET_VCPU_EVENTS",
        0xa0 => "KVM_SET_VCPU_EVENTS",
        0xa4 => "KVM_GET_XSAVE",
        0xa5 => "KVM_SET_XSAVE",
        0xa6 => "KVM_GET_XCRS",
        0xa7 => "KVM_SET_XCRS",
        0xad => "KVM_KVMCLOCK_CTRL",
        0xc7 => "KVM_RESET_DIRTY_RINGS",
        0x98 => "KVM_GET_MP_STATE",
        0x99 => "KVM_SET_MP_STATE",
        other => return format!("number {other:#x}"),
    };
    name.to_owned()
}
