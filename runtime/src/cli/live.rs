//! The terminal view of `stats --live`.

use std::time::{Duration, Instant};

use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{Paragraph, Row, Table, TableState, Wrap};

use super::error::CliError;
use super::signals::Signals;
use super::stats::{HEADS, Seen, cells, counters, kvm_line, losses, remarks};

/// Columns of counters.
const COLUMNS: usize = 3;
const KEYS: &str = "q quit · ↑ ↓ scroll · e instance / those that have ended";

/// How long signals are waited for at a time.
const LONG: Duration = Duration::from_hours(1);

/// What the user looks at.
#[derive(Debug, Default)]
struct View {
    table: TableState,
    /// Those that have ended instead of the instance.
    ended: bool,
}

/// What a key asks for.
enum Wish {
    Nothing,
    Redraw,
    Quit,
}

/// Shows what `look` sees, every `interval`, until the user or the instance ends.
pub fn show(look: impl Fn() -> Result<Seen, CliError>, interval: Duration) -> Result<(), CliError> {
    let mut now = look()?;
    let mut before: Option<Seen> = None;
    let mut view = View::default();
    restore_when_ended(Signals::block()?)?;
    let broken = |error| CliError::internal(format!("the terminal cannot be used: {error}"));
    let mut terminal = ratatui::try_init().map_err(broken)?;
    let result = loop {
        if let Err(error) = terminal.draw(|frame| draw(frame, &now, before.as_ref(), &mut view)) {
            break Err(broken(error));
        }
        match wait(&mut view, now.at + interval) {
            Err(error) => break Err(broken(error)),
            Ok(Wish::Quit) => break Ok(()),
            Ok(Wish::Redraw) => continue,
            Ok(Wish::Nothing) => {}
        }
        match look() {
            Ok(seen) => before = Some(std::mem::replace(&mut now, seen)),
            Err(error) => break Err(error),
        }
    };
    ratatui::restore();
    result
}

/// Whoever ends this process from outside finds the terminal as it was.
fn restore_when_ended(signals: Signals) -> Result<(), CliError> {
    let wait = move || {
        let signal = loop {
            if let Some(signal) = signals.wait(LONG) {
                break signal;
            }
        };
        ratatui::restore();
        std::process::exit(128 + signal);
    };
    let thread = std::thread::Builder::new().name("signals".into()).spawn(wait);
    thread
        .map(drop)
        .map_err(|error| CliError::internal(format!("a thread cannot be started: {error}")))
}

/// Waits for a key or until `end`.
fn wait(view: &mut View, end: Instant) -> std::io::Result<Wish> {
    while event::poll(end.saturating_duration_since(Instant::now()))? {
        let key = match event::read()? {
            Event::Resize(..) => return Ok(Wish::Redraw),
            Event::Key(key) if key.kind == KeyEventKind::Press => key,
            _ => continue,
        };
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Ok(Wish::Quit),
            KeyCode::Char('c') if control => return Ok(Wish::Quit),
            KeyCode::Char('e') => view.ended = !view.ended,
            KeyCode::Down => view.table.scroll_down_by(1),
            KeyCode::Up => view.table.scroll_up_by(1),
            KeyCode::PageDown => view.table.scroll_down_by(10),
            KeyCode::PageUp => view.table.scroll_up_by(10),
            _ => continue,
        }
        return Ok(Wish::Redraw);
    }
    Ok(Wish::Nothing)
}

fn draw(frame: &mut Frame<'_>, now: &Seen, before: Option<&Seen>, view: &mut View) {
    let counters = counters(&now.stats);
    let lines = u16::try_from(counters.len().div_ceil(COLUMNS)).unwrap_or(u16::MAX);
    // What is most worth knowing first: there may be no room for all.
    let lost = &now.probed.lost;
    let mut below: Vec<String> = lost.any().then(|| losses(lost)).into_iter().collect();
    below.extend(kvm_line(&now.kvm));
    below.extend(remarks(&now.probed));
    let below_lines = if frame.area().height > 30 { 6 } else { 3 };
    let areas = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(lines),
        Constraint::Min(3),
        Constraint::Length(below_lines),
        Constraint::Length(1),
    ]);
    let [head, top, middle, bottom, foot] = areas.areas(frame.area());
    frame.render_widget(Line::from(format!("instance {}", now.uuid)).bold(), head);
    draw_counters(frame, &counters, top);
    draw_table(frame, now, before, view, middle);
    frame.render_widget(Paragraph::new(below.join("\n")).wrap(Wrap { trim: true }), bottom);
    frame.render_widget(Line::from(KEYS).dim(), foot);
}

fn draw_counters(frame: &mut Frame<'_>, counters: &[(&str, String)], area: Rect) {
    let columns: [Rect; COLUMNS] = Layout::horizontal([Constraint::Fill(1); COLUMNS]).areas(area);
    let each = counters.len().div_ceil(COLUMNS);
    for (column, part) in columns.into_iter().zip(counters.chunks(each)) {
        let lines = part.iter().map(|(name, value)| format!("{name}: {value}"));
        frame.render_widget(Paragraph::new(lines.collect::<Vec<_>>().join("\n")), column);
    }
}

/// Of the instance, or of those that have ended.
fn rows_of(seen: &Seen, ended: bool) -> &[ebpf_loader::Row] {
    if ended { &seen.ended } else { &seen.probed.rows }
}

fn draw_table(
    frame: &mut Frame<'_>,
    now: &Seen,
    before: Option<&Seen>,
    view: &mut View,
    area: Rect,
) {
    let ended = view.ended;
    let of = |seen| rows_of(seen, ended);
    let earlier = before.map(|before| (of(before), now.at.saturating_duration_since(before.at)));
    let rows = cells(of(now), earlier).into_iter().map(Row::new);
    let widths = [8, 28, 10, 8, 9, 9, 9, 10].map(Constraint::Length);
    let whose = if view.ended { "ended" } else { HEADS[0] };
    let heads = std::iter::once(whose).chain(HEADS.into_iter().skip(1));
    let table =
        Table::new(rows, widths).header(Row::new(heads).style(Style::new().bold().underlined()));
    frame.render_stateful_widget(table, area, &mut view.table);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ebpf_loader::{Histogram, Lost, Metric, Role, Row};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use runtime::proto::Stats;
    use uuid::Uuid;

    use super::super::wire::Probed;
    use super::*;

    fn seen(role: Role, count: u64, at: Instant) -> Seen {
        let histogram = Histogram::from(vec![(200, count, count * 10_000)]);
        let rows = vec![Row { role, metric: Metric::OwnCow, histogram }];
        let probed = Probed {
            rows,
            measured: vec!["page faults by raw_tp".into(); 8],
            lost: Lost { values: 5, ..Lost::default() },
            ..<_>::default()
        };
        Seen {
            uuid: Uuid::from_u128(7),
            stats: Stats { forks: 12, ..Stats::default() },
            kvm: BTreeMap::from([("exits".to_owned(), 34)]),
            ended: Vec::new(),
            probed,
            at,
        }
    }

    fn screen(width: u16, height: u16, view: &mut View) -> String {
        let at = Instant::now();
        let before = seen(Role::Child, 100, at);
        let now = seen(Role::Child, 300, at + Duration::from_secs(2));
        let backend = TestBackend::new(width, height);
        let mut terminal = Terminal::new(backend).expect("it needs nothing");
        terminal.draw(|frame| draw(frame, &now, Some(&before), view)).expect("it cannot fail");
        terminal.backend().to_string()
    }

    #[test]
    fn counters_rates_and_keys_are_on_the_screen() {
        let screen = screen(110, 30, &mut View::default());
        for wanted in [
            "forks made: 12",
            "child",
            "own page copied",
            " 300 ",
            " 100 ",
            "exits 34",
            "q quit",
            "5 values",
        ] {
            assert!(screen.contains(wanted), "no {wanted:?} in\n{screen}");
        }
    }

    #[test]
    fn a_small_terminal_and_an_empty_table_do_no_harm() {
        let mut view = View { ended: true, ..View::default() };
        assert!(screen(110, 30, &mut view).contains("ended"));
        for (width, height) in [(1, 1), (20, 3), (80, 8)] {
            screen(width, height, &mut view);
        }
    }
}
