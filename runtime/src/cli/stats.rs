//! `stats`: counters of an instance, KVM's own statistics of it, and what the probes counted.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use ebpf_loader::{Lost, Metric, Row, Shortfall};
use runtime::proto::Stats;
use serde_json::json;
use uuid::Uuid;

use super::args::StatsArgs;
use super::client::Line;
use super::error::CliError;
use super::verbs::{alive, unexpected};
use super::wire::{Answer, Ask, Probed};
use super::{live, print, print_json};

/// Everything that is known of an instance at a time.
#[derive(Debug)]
pub struct Seen {
    /// Who it is.
    pub uuid: Uuid,
    /// Its counters.
    pub stats: Stats,
    /// KVM's own statistics.
    pub kvm: BTreeMap<String, u64>,
    /// What the probes counted of it.
    pub probed: Probed,
    /// And of all instances of its owner that have ended.
    pub ended: Vec<Row>,
    /// When.
    pub at: Instant,
}

pub fn stats(args: &StatsArgs) -> Result<u8, CliError> {
    let (line, instance) = alive(&args.instance)?;
    line.hurry()?;
    let interval = Duration::from_millis(args.interval);
    let look = || look(&line, instance.uuid);
    if args.live && !args.json && std::io::stdout().is_terminal() {
        live::show(look, interval)?;
        return Ok(0);
    }
    let mut earlier: Option<Seen> = None;
    loop {
        let seen = look()?;
        if args.json {
            let Seen { uuid, stats, kvm, probed, ended, .. } = &seen;
            print_json(&json!({
                "instance": uuid, "stats": stats, "kvm": kvm, "probes": probed, "ended": ended
            }))?;
        } else if args.prometheus {
            print(super::prometheus::text(&seen)?.as_bytes())?;
        } else {
            print(text(&seen, earlier.as_ref()).as_bytes())?;
        }
        if !args.live {
            return Ok(0);
        }
        earlier = Some(seen);
        std::thread::sleep(interval);
    }
}

fn look(line: &Line, uuid: Uuid) -> Result<Seen, CliError> {
    let Answer::Stats { stats, kvm } = line.ask(&Ask::Stats { instance: uuid })? else {
        return Err(unexpected());
    };
    let (probed, ended) = line.probed(uuid)?;
    Ok(Seen { uuid, stats, kvm, probed, ended, at: Instant::now() })
}

/// Names and values of the counters.
pub fn counters(stats: &Stats) -> Vec<(&'static str, String)> {
    let ms = |ns: u64| format!("{}.{:03} ms", ns / 1_000_000, ns / 1000 % 1000);
    vec![
        ("backing", stats.backing.backing().name().to_owned()),
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
    ]
}

/// Heads of the columns of [`cells`].
pub const HEADS: [&str; 8] =
    ["role", "what", "count", "per s", "p50 µs", "p99 µs", "max µs", "all ms"];

/// A table of what the probes counted, with what came since `earlier`.
pub fn cells(rows: &[Row], earlier: Option<(&[Row], Duration)>) -> Vec<[String; 8]> {
    let mut all = Vec::new();
    for row in rows {
        let before = earlier.map(|(earlier, time)| {
            let same = |it: &&Row| it.role == row.role && it.metric == row.metric;
            (earlier.iter().find(same).map(described).unwrap_or_default(), time)
        });
        for (what, count, [p50, p99, max, sum]) in described(row) {
            let rate = before.as_ref().map_or(String::new(), |(before, time)| {
                let was = before.iter().find(|(name, ..)| *name == what).map_or(0, |(_, n, _)| *n);
                let ms = time.as_millis().max(1);
                (u128::from(count.saturating_sub(was)) * 1000).div_ceil(ms).to_string()
            });
            let role = row.role.name().to_owned();
            all.push([role, what, count.to_string(), rate, p50, p99, max, sum]);
        }
    }
    all
}

/// Lines below the table: what is measured how, and what is missing.
pub fn remarks(probed: &Probed) -> Vec<String> {
    let mut lines = Vec::new();
    lines.extend(probed.off.as_ref().map(|off| format!("probes are off: {off}")));
    if !probed.measured.is_empty() {
        lines.push(format!("measured: {}", probed.measured.join(", ")));
    }
    lines.extend(probed.refused.iter().map(|refused| format!("refused here: {refused}")));
    if probed.lost.any() {
        lines.push(losses(&probed.lost));
    }
    let unread = probed.unread.iter();
    lines.extend(unread.map(|why| format!("what has ended stays in the kernel: {why}")));
    lines
}

/// One line about what the probes do not measure the best way.
pub fn shortfall(all: &[Shortfall]) -> Option<String> {
    let part = |shortfall: &Shortfall| match shortfall.instead {
        Some(how) => format!("{} by {how}", shortfall.what),
        None => format!("no {}", shortfall.what),
    };
    let all: Vec<_> = all.iter().map(part).collect();
    let why = "`runtime doctor` tells why";
    (!all.is_empty()).then(|| format!("probes do less than they could: {}; {why}", all.join(", ")))
}

/// KVM's statistics that are not 0, in one line.
pub fn kvm_line(kvm: &BTreeMap<String, u64>) -> Option<String> {
    let counted = kvm.iter().filter(|(_, value)| **value > 0);
    let counted: Vec<_> = counted.map(|(name, value)| format!("{name} {value}")).collect();
    (!counted.is_empty()).then(|| format!("KVM's own: {}", counted.join(", ")))
}

fn text(seen: &Seen, earlier: Option<&Seen>) -> String {
    let mut text = String::new();
    for (name, value) in counters(&seen.stats) {
        line(&mut text, format_args!("{name:28} {value}"));
    }
    if let Some(words) = kvm_line(&seen.kvm) {
        line(&mut text, format_args!("{words}"));
    }
    let since = |of: fn(&Seen) -> &[Row]| {
        earlier.map(|earlier| (of(earlier), seen.at.saturating_duration_since(earlier.at)))
    };
    line(&mut text, format_args!(""));
    table(&mut text, &cells(&seen.probed.rows, since(|seen| &seen.probed.rows)));
    if !seen.ended.is_empty() {
        line(&mut text, format_args!("\ninstances that have ended, and their zygotes"));
        table(&mut text, &cells(&seen.ended, since(|seen| &seen.ended)));
    }
    line(&mut text, format_args!(""));
    for remark in remarks(&seen.probed) {
        line(&mut text, format_args!("{remark}"));
    }
    text
}

fn table(text: &mut String, rows: &[[String; 8]]) {
    let heads = HEADS.map(str::to_owned);
    for [role, what, count, rate, p50, p99, max, all] in std::iter::once(&heads).chain(rows) {
        let row = format!(
            "{role:8} {what:26} {count:>10} {rate:>8} {p50:>9} {p99:>9} {max:>9} {all:>10}"
        );
        line(text, format_args!("{}", row.trim_end()));
    }
}

/// A row of the table, or one for each reason: what, how often, times.
fn described(row: &Row) -> Vec<(String, u64, [String; 4])> {
    if row.metric == Metric::Exits {
        let of = |reason: u16| format!("exit: {}", exit_name(reason));
        let cells = row.histogram.cells();
        let none = || std::array::from_fn(|_| String::new());
        return cells.map(|(reason, _, _, cell)| (of(reason), cell.count, none())).collect();
    }
    let histogram = &row.histogram;
    let at = |per_mille| us(histogram.per_mille_ns(per_mille).unwrap_or(0));
    let all = histogram.sum_ns();
    let all = format!("{}.{:03}", all / 1_000_000, all / 1000 % 1000);
    vec![(metric_name(row.metric).to_owned(), histogram.count(), [at(500), at(990), at(1000), all])]
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
        Metric::StageTakeWake => "fork: take and wake",
        Metric::StageQuiesce => "fork: quiesce",
        Metric::StageSettle => "fork: settle",
        Metric::StageCapturePages => "fork: capture pages",
        Metric::StageCaptureState => "fork: capture state",
        Metric::StageResume => "fork: resume",
        Metric::StageApply => "fork: apply",
        Metric::StageRestore => "fork: restore",
        Metric::StageCommit => "fork: commit",
        Metric::StageRun => "fork: run",
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
    let Lost { values, events, processes, threads } = *lost;
    format!(
        "lost for want of room: {values} values, {events} events, {processes} processes, {threads} \
         threads"
    )
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    writeln!(text, "{arguments}").unwrap_or(());
}
