//! What instances print, and what happens to them.
//!
//! One instance alone has its bytes passed on as they come. From the second one on output comes by
//! lines, with the instance's short id before each.

use std::collections::HashMap;
use std::io::{ErrorKind, Write};
use std::sync::{Arc, OnceLock};

use runtime::proto::Event;
use serde_json::{Value, json};
use uuid::Uuid;

use super::wire::short;

/// A line is cut here: a guest may never end it.
const LONGEST: usize = 4096;

/// How it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object for each event.
    Json,
}

/// Where it goes.
#[derive(Debug)]
pub struct Console<Out, Notes> {
    out: Out,
    notes: Notes,
    format: Format,
    /// Console output that is no line yet, or no character.
    lines: HashMap<Uuid, Vec<u8>>,
    instances: usize,
    /// The first instance: how it ends is said at the end.
    root: Option<Uuid>,
    /// The last byte that was passed on ended a line.
    at_start: bool,
    /// Why output could not be written.
    lost: Arc<OnceLock<String>>,
}

impl<Out: Write, Notes: Write> Console<Out, Notes> {
    /// Console output goes to `out`, the rest to `notes`.
    /// The first error of `out` is left in `lost`.
    pub fn new(out: Out, notes: Notes, format: Format, lost: Arc<OnceLock<String>>) -> Self {
        let (lines, instances, root, at_start) = (HashMap::new(), 0, None, true);
        Self { out, notes, format, lines, instances, root, at_start, lost }
    }

    /// Shows what `uuid` said.
    pub fn event(&mut self, uuid: Uuid, event: &Event) {
        if matches!(event, Event::Hello { .. }) {
            self.instances += 1;
            self.root = self.root.or(Some(uuid));
        }
        match self.format {
            Format::Json => {
                let whole = match event {
                    Event::Console { bytes } => match self.characters(uuid, bytes) {
                        bytes if bytes.is_empty() => return,
                        bytes => Some(Event::Console { bytes }),
                    },
                    Event::Exited { .. } => {
                        self.flush(uuid);
                        None
                    }
                    _ => None,
                };
                self.object(uuid, whole.as_ref().unwrap_or(event));
            }
            Format::Text => self.as_text(uuid, event),
        }
    }

    /// Prints what was left without an end of line.
    pub fn finish(&mut self) {
        let left: Vec<_> = self.lines.keys().copied().collect();
        for uuid in left {
            self.flush(uuid);
        }
    }

    /// One line for people, on the side.
    pub fn note(&mut self, text: &str) {
        // Nobody is left to be told.
        writeln!(self.notes, "note: {text}").unwrap_or(());
    }

    fn as_text(&mut self, uuid: Uuid, event: &Event) {
        match event {
            Event::Console { bytes } if self.instances < 2 => {
                self.put(bytes);
                self.at_start = bytes.ends_with(b"\n");
            }
            Event::Console { bytes } => self.collect(uuid, bytes),
            Event::Note { text } => self.note(&format!("{}: {text}", short(uuid))),
            Event::Forked(report) => {
                if let Some((step, errno)) = report.failed {
                    let cause = std::io::Error::from_raw_os_error(errno);
                    let (id, step) = (short(uuid), step.name());
                    self.note(&format!("{id}: fork failed at step {step}: {cause}"));
                }
            }
            Event::Exited { code, reason } => {
                self.flush(uuid);
                if let Some(reason) = reason
                    && self.root != Some(uuid)
                {
                    self.note(&format!("{}: ended with code {code}: {reason}", short(uuid)));
                }
            }
            Event::Hello { .. }
            | Event::Zygote { .. }
            | Event::Calls { .. }
            | Event::Reply { .. }
            | Event::Armed { .. }
            | Event::Done { .. } => {}
        }
    }

    fn collect(&mut self, uuid: Uuid, bytes: &[u8]) {
        let mut line = self.lines.remove(&uuid).unwrap_or_default();
        for byte in bytes {
            if *byte != b'\n' {
                line.push(*byte);
            }
            if *byte == b'\n' || line.len() >= LONGEST {
                self.line(uuid, &line);
                line.clear();
            }
        }
        if !line.is_empty() {
            self.lines.insert(uuid, line);
        }
    }

    fn flush(&mut self, uuid: Uuid) {
        if let Some(line) = self.lines.remove(&uuid) {
            match self.format {
                Format::Text => self.line(uuid, &line),
                Format::Json => self.object(uuid, &Event::Console { bytes: line }),
            }
        }
    }

    /// Output comes in pieces of any length: the beginning of a character waits for the rest of it.
    fn characters(&mut self, uuid: Uuid, bytes: &[u8]) -> Vec<u8> {
        let mut all = self.lines.remove(&uuid).unwrap_or_default();
        all.extend_from_slice(bytes);
        // Of four bytes three may be there.
        let begun = (1..=3).filter_map(|tail| all.len().checked_sub(tail)).find(|at| {
            let cut = std::str::from_utf8(&all[*at..]).err();
            cut.is_some_and(|cut| cut.valid_up_to() == 0 && cut.error_len().is_none())
        });
        if let Some(at) = begun {
            self.lines.insert(uuid, all.split_off(at));
        }
        all
    }

    fn object(&mut self, uuid: Uuid, event: &Event) {
        if let Some(value) = as_json(uuid, event) {
            self.put(format!("{value}\n").as_bytes());
        }
    }

    fn line(&mut self, uuid: Uuid, line: &[u8]) {
        let start: &[u8] = if self.at_start { b"" } else { b"\n" };
        let id = short(uuid);
        let whole = [start, id.as_bytes(), b" | ", line, b"\n"].concat();
        self.at_start = true;
        self.put(&whole);
    }

    fn put(&mut self, bytes: &[u8]) {
        // It does not end the machines, and a reader that has gone away (`| head`) is no error.
        if let Err(error) = self.out.write_all(bytes).and_then(|()| self.out.flush())
            && error.kind() != ErrorKind::BrokenPipe
            && self.lost.set(error.to_string()).is_ok()
        {
            self.note(&format!("cannot write the output, which is lost from here on: {error}"));
        }
    }
}

fn as_json(uuid: Uuid, event: &Event) -> Option<Value> {
    Some(match event {
        Event::Hello { parent, pid, .. } => {
            json!({ "event": "started", "instance": uuid, "parent": parent, "pid": pid })
        }
        Event::Console { bytes } => {
            let text = String::from_utf8_lossy(bytes);
            json!({ "event": "console", "instance": uuid, "text": text })
        }
        Event::Note { text } => json!({ "event": "note", "instance": uuid, "text": text }),
        Event::Forked(report) => {
            let children: Vec<_> = report.children.iter().map(|child| child.uuid).collect();
            let failed = report.failed.map(|(step, errno)| json!({ "step": step, "errno": errno }));
            json!({
                "event": "forked",
                "instance": uuid,
                "children": children,
                "branch_us": report.branch_ns().map(|ns| ns / 1000),
                "failed": failed,
            })
        }
        Event::Exited { code, reason } => {
            json!({ "event": "exited", "instance": uuid, "code": code, "reason": reason })
        }
        Event::Zygote { .. }
        | Event::Calls { .. }
        | Event::Reply { .. }
        | Event::Armed { .. }
        | Event::Done { .. } => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Uuid = Uuid::from_u128(0xaaaa_aaaa << 96);
    const B: Uuid = Uuid::from_u128(0xbbbb_bbbb << 96);

    fn shown(format: Format, events: &[(Uuid, Event)]) -> String {
        let (mut out, mut notes) = (Vec::new(), Vec::new());
        let mut console = Console::new(&mut out, &mut notes, format, Arc::default());
        for (uuid, event) in events {
            console.event(*uuid, event);
        }
        console.finish();
        String::from_utf8(out).expect("it was text")
    }

    fn hello(uuid: Uuid) -> (Uuid, Event) {
        (uuid, Event::Hello { uuid, parent: None, pid: 1, vcpus: 1, memory_mib: 8, linux: false })
    }

    fn says(uuid: Uuid, text: &str) -> (Uuid, Event) {
        (uuid, Event::Console { bytes: text.into() })
    }

    #[test]
    fn one_instance_is_passed_on_at_once() {
        assert_eq!(shown(Format::Text, &[hello(A), says(A, "x> "), says(A, "y")]), "x> y");
    }

    #[test]
    fn several_instances_are_told_apart_by_line() {
        let events = [
            hello(A),
            says(A, "begun"),
            hello(B),
            says(B, "one\ntw"),
            says(A, "other\n"),
            says(B, "o\n"),
            says(A, "end"),
        ];
        let expected = "begun\nbbbbbbbb | one\naaaaaaaa | other\nbbbbbbbb | two\naaaaaaaa | end\n";
        assert_eq!(shown(Format::Text, &events), expected);
    }

    #[test]
    fn output_that_cannot_be_written_is_told_once() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let (mut notes, lost) = (Vec::new(), Arc::new(OnceLock::new()));
        let mut console = Console::new(Full, &mut notes, Format::Text, lost.clone());
        for (uuid, event) in [hello(A), says(A, "x"), says(A, "y")] {
            console.event(uuid, &event);
        }
        drop(console);
        assert!(lost.get().is_some());
        assert_eq!(String::from_utf8(notes).expect("text").lines().count(), 1);
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let events = [hello(A), hello(B), says(B, &"x".repeat(LONGEST + 1))];
        assert_eq!(shown(Format::Text, &events).lines().count(), 2);
    }

    #[test]
    fn json_is_one_object_for_each_event() {
        let text = shown(Format::Json, &[hello(A), says(A, "a\nb")]);
        let values: Vec<Value> =
            text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(values[0]["event"], "started");
        assert_eq!(values[1]["text"], "a\nb");
    }

    #[test]
    fn json_does_not_cut_characters() {
        let piece = |bytes: &[u8]| (A, Event::Console { bytes: bytes.into() });
        let events =
            [hello(A), piece(b"a\xf0\x9f"), piece(b"\x8d"), piece(b"\x92\xc3"), piece(b"x\xc3")];
        let text = shown(Format::Json, &events);
        let texts: Vec<Value> = text
            .lines()
            .skip(1)
            .map(|line| serde_json::from_str::<Value>(line).expect("JSON")["text"].clone())
            .collect();
        assert_eq!(texts, ["a", "\u{1f352}", "\u{fffd}x", "\u{fffd}"]);
    }
}
