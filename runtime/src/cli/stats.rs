//! `stats`: counters of an instance, and what the probes counted of it.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::time::Duration;

use ebpf_loader::{Lost, Metric, Role, Row};
use runtime::proto::Stats;
use serde_json::json;
use uuid::Uuid;

use super::args::StatsArgs;
use super::client::Line;
use super::error::CliError;
use super::verbs::{alive, unexpected};
use super::wire::{Answer, Ask, Probed};
use super::{print, print_json};

/// Clears the terminal, without what scrolled out of it.
const CLEAR: &str = "\x1b[H\x1b[J";

pub fn stats(args: &StatsArgs) -> Result<u8, CliError> {
    let (line, instance) = alive(&args.instance)?;
    let uuid = instance.uuid;
    let mut earlier: Option<Probed> = None;
    loop {
        let Answer::Stats(stats) = line.ask(&Ask::Stats { instance: uuid })? else {
            return Err(unexpected());
        };
        let probed = probed(&line, uuid)?;
        if args.json {
            print_json(&json!({ "instance": uuid, "stats": stats, "probes": probed }))?;
        } else if args.prometheus {
            print(super::prometheus::text(uuid, &stats, &probed)?.as_bytes())?;
        } else if args.live {
            let clear = if std::io::stdout().is_terminal() { CLEAR } else { "" };
            let text = format!("{clear}{uuid}\n{}", table(&stats, &probed, earlier.as_ref()));
            print(text.as_bytes())?;
        } else {
            print(table(&stats, &probed, None).as_bytes())?;
        }
        if !args.live {
            return Ok(0);
        }
        earlier = Some(probed);
        std::thread::sleep(Duration::from_millis(args.interval));
    }
}

fn probed(line: &Line, instance: Uuid) -> Result<Probed, CliError> {
    match line.ask(&Ask::Probes { instance })? {
        Answer::Probes(probed) => Ok(probed),
        _ => Err(unexpected()),
    }
}

fn table(stats: &Stats, probed: &Probed, earlier: Option<&Probed>) -> String {
    let ms = |ns: u64| format!("{}.{:03} ms", ns / 1_000_000, ns / 1000 % 1000);
    let rows = [
        ("forks made", stats.forks.to_string()),
        ("forks failed", stats.failed.to_string()),
        ("standbys ready", stats.standbys.to_string()),
        ("standbys in the making", stats.preparing.to_string()),
        ("time to make the last one", ms(stats.prewarm_ns)),
        ("sync rounds", stats.rounds.to_string()),
        ("pages synced", stats.synced_pages.to_string()),
        ("pages a fork would copy now", stats.pending_pages.to_string()),
        ("CPU time", ms(stats.cpu_ns)),
        ("CPU time of its zygote", ms(stats.zygote_cpu_ns)),
        ("process of its zygote", stats.zygote_pid.to_string()),
    ];
    let mut text = String::new();
    for (name, value) in rows {
        line(&mut text, format_args!("{name:28} {value}"));
    }
    if let Some(off) = &probed.off {
        line(&mut text, format_args!("{:28} off: {off}", "probes"));
        return text;
    }
    let (counted, times) = ("count", ["p50 µs", "p99 µs", "max µs", "all ms"]);
    let [p50, p99, max, all] = times;
    line(&mut text, format_args!(""));
    let since = if earlier.is_some() { "new" } else { "" };
    line(
        &mut text,
        format_args!(
            "{:8} {:26} {counted:>10} {since:>8} {p50:>9} {p99:>9} {max:>9} {all:>10}",
            "role", "what"
        ),
    );
    for row in &probed.rows {
        let before = earlier.map(|earlier| find(earlier, row.role, row.metric));
        for (what, count, times) in described(row) {
            let new = before.as_ref().map_or(String::new(), |before| {
                let was = before.iter().find(|(name, _)| *name == what).map_or(0, |(_, n)| *n);
                (count - was.min(count)).to_string()
            });
            line(
                &mut text,
                format_args!("{:8} {what:26} {count:>10} {new:>8} {times}", row.role.name()),
            );
        }
    }
    if probed.lost.any() {
        line(&mut text, format_args!("{}", losses(&probed.lost)));
    }
    text
}

fn find(probed: &Probed, role: Role, metric: Metric) -> Vec<(String, u64)> {
    let row = probed.rows.iter().find(|row| row.role == role && row.metric == metric);
    row.into_iter().flat_map(described).map(|(what, count, _)| (what, count)).collect()
}

/// A row of the table, or one for each reason: what, how often, times.
fn described(row: &Row) -> Vec<(String, u64, String)> {
    if row.metric == Metric::Exits {
        let of = |reason: u16| format!("exit: {}", exit_name(reason));
        let cells = row.histogram.cells();
        return cells.map(|(reason, _, _, cell)| (of(reason), cell.count, String::new())).collect();
    }
    let histogram = &row.histogram;
    let at = |per_mille| us(histogram.per_mille_ns(per_mille).unwrap_or(0));
    let all = histogram.sum_ns();
    let times = format!(
        "{:>9} {:>9} {:>9} {:>10}",
        at(500),
        at(990),
        at(1000),
        format!("{}.{:03}", all / 1_000_000, all / 1000 % 1000)
    );
    vec![(metric_name(row.metric).to_owned(), histogram.count(), times)]
}

/// µs with one digit.
pub fn us(ns: u64) -> String {
    format!("{}.{}", ns / 1000, ns / 100 % 10)
}

/// A metric in words.
pub fn metric_name(metric: Metric) -> &'static str {
    match metric {
        Metric::GuestCow => "fault: guest page copied",
        Metric::GuestMinor => "fault: guest page mapped",
        Metric::GuestMajor => "fault: guest page read",
        Metric::OwnCow => "fault: own page copied",
        Metric::OwnMinor => "fault: own page mapped",
        Metric::OwnMajor => "fault: own page read",
        Metric::KvmFault => "fault of the guest, by KVM",
        Metric::Exits => "exit",
        Metric::OffCpu => "woken, not yet running",
        Metric::Ioctl => "call to KVM",
    }
}

/// A reason of `kvm_run`, as KVM's header has it.
pub fn exit_name(reason: u16) -> String {
    let name = match reason {
        1 => "exception",
        2 => "io",
        3 => "hypercall",
        4 => "debug",
        5 => "hlt",
        6 => "mmio",
        8 => "shutdown",
        9 => "fail_entry",
        10 => "intr",
        17 => "internal_error",
        24 => "system_event",
        29 => "x86_rdmsr",
        30 => "x86_wrmsr",
        31 => "dirty_ring_full",
        0xff => "interrupted",
        other => return format!("reason {other}"),
    };
    name.to_owned()
}

pub fn losses(lost: &Lost) -> String {
    let Lost { values, events, processes, begun } = *lost;
    format!(
        "lost for want of room: {values} values, {events} events, {processes} processes, {begun} \
         beginnings"
    )
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    writeln!(text, "{arguments}").unwrap_or(());
}
