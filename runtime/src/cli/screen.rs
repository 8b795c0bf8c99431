//! Shows what happens, on a thread of its own: a terminal that is stopped, or a pipe that nobody
//! reads for a while, is no reason to leave instances without answers.

use std::io::{Write, stderr, stdout};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use runtime::proto::Event;
use runtime::sys::SysError;
use uuid::Uuid;

use super::console::{Console, Format};

/// How much may wait to be shown. Who has more to say waits, and with it all instances: nothing is
/// left out.
const WAITING: usize = 4096;

/// Between two looks whether everything is shown.
const LOOK: Duration = Duration::from_millis(2);

#[derive(Debug)]
enum Shown {
    Event(Uuid, Box<Event>),
    Note(String),
    End,
}

/// Where instances' output goes, for any thread.
#[derive(Debug)]
pub struct Screen {
    queue: SyncSender<Shown>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Screen {
    /// Begins to show things on this program's output.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if there are too many threads.
    pub fn start(format: Format) -> Result<Self, SysError> {
        Self::on(stdout(), stderr(), format)
    }

    fn on(
        out: impl Write + Send + 'static,
        notes: impl Write + Send + 'static,
        format: Format,
    ) -> Result<Self, SysError> {
        let (queue, shown) = sync_channel(WAITING);
        let thread = std::thread::Builder::new()
            .name("screen".into())
            .spawn(move || show(&shown, Console::new(out, notes, format)))
            .map_err(|source| SysError { call: "starting the thread of the screen", source })?;
        Ok(Self { queue, thread: Mutex::new(Some(thread)) })
    }

    /// Shows what `uuid` said.
    pub fn event(&self, uuid: Uuid, event: &Event) {
        self.show(Shown::Event(uuid, Box::new(event.clone())));
    }

    /// One line for people.
    pub fn note(&self, text: &str) {
        self.show(Shown::Note(text.to_owned()));
    }

    /// Returns when everything is shown, within `limit` if there is one. What comes later is not.
    pub fn finish(&self, limit: Option<Duration>) {
        let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return;
        };
        let Some(limit) = limit else {
            self.show(Shown::End);
            return thread.join().unwrap_or(());
        };
        let end = Instant::now() + limit;
        let mut told = false;
        while !thread.is_finished() && Instant::now() < end {
            // It may be full.
            told = told || self.queue.try_send(Shown::End).is_ok();
            std::thread::sleep(LOOK);
        }
    }

    fn show(&self, what: Shown) {
        // After the end nobody listens.
        self.queue.send(what).unwrap_or(());
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.finish(None);
    }
}

fn show<Out: Write, Notes: Write>(shown: &Receiver<Shown>, mut console: Console<Out, Notes>) {
    for what in shown {
        match what {
            Shown::Event(uuid, event) => console.event(uuid, &event),
            Shown::Note(text) => console.note(&text),
            Shown::End => break,
        }
    }
    console.finish();
}

#[cfg(test)]
mod tests {
    use std::io::{Read, pipe};

    use super::*;

    /// More than a pipe holds is said while nobody reads, and all of it comes.
    #[test]
    fn nobody_waits_for_a_reader() {
        let (mut reader, writer) = pipe().expect("a pipe");
        let screen = Screen::on(writer, std::io::sink(), Format::Text).expect("a thread");
        for _ in 0..1000 {
            screen.event(Uuid::nil(), &Event::Console { bytes: vec![b'x'; 1000] });
        }
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).map(|_| all.len())
        });
        screen.finish(None);
        assert_eq!(reader.join().expect("no panic").expect("readable"), 1_000_000);
    }

    /// A pipe that nobody reads is no reason to stay.
    #[test]
    fn an_end_within_a_limit_comes() {
        let (reader, writer) = pipe().expect("a pipe");
        let screen = Screen::on(writer, std::io::sink(), Format::Text).expect("a thread");
        for _ in 0..WAITING {
            screen.event(Uuid::nil(), &Event::Console { bytes: vec![b'x'; 1000] });
        }
        let begin = Instant::now();
        screen.finish(Some(Duration::from_millis(50)));
        assert!(begin.elapsed() < Duration::from_secs(5));
        drop(reader);
    }
}
