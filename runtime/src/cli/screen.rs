//! Shows what happens, on a thread of its own: a terminal that is stopped, or a pipe that nobody
//! reads for a while, is no reason to leave instances without answers.

use std::io::{Write, stderr, stdout};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use runtime::proto::Event;
use runtime::sys::SysError;
use uuid::Uuid;

use super::console::{Console, Format};

/// How many events may wait to be shown. Who has more to say waits, and with it all instances: nothing
/// is left out.
const WAITING: usize = 4096;

/// How long output may take to be shown at the end, if somebody is in a hurry.
const LAST_OUTPUT: Duration = Duration::from_secs(1);
/// Between two looks whether there is room, or everything is shown.
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
    queue: Sender<Shown>,
    /// Events in it.
    waiting: Arc<AtomicUsize>,
    /// What finds no room is left out.
    hurried: AtomicBool,
    lost: Arc<OnceLock<String>>,
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
        let (queue, shown) = channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let (left, lost) = (waiting.clone(), Arc::new(OnceLock::new()));
        let console = Console::new(out, notes, format, lost.clone());
        let thread = std::thread::Builder::new()
            .name("screen".into())
            .spawn(move || show(&shown, &left, console))
            .map_err(|source| SysError { call: "starting the thread of the screen", source })?;
        Ok(Self {
            queue,
            waiting,
            hurried: AtomicBool::new(false),
            lost,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Shows what `uuid` said.
    pub fn event(&self, uuid: Uuid, event: &Event) {
        while self.waiting.load(Ordering::SeqCst) >= WAITING {
            if self.hurried.load(Ordering::SeqCst) {
                return;
            }
            std::thread::sleep(LOOK);
        }
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.show(Shown::Event(uuid, Box::new(event.clone())));
    }

    /// One line for people.
    pub fn note(&self, text: &str) {
        self.show(Shown::Note(text.to_owned()));
    }

    /// Why output could not be written, if it could not.
    pub fn lost(&self) -> Option<&str> {
        self.lost.get().map(String::as_str)
    }

    /// Nobody waits any more for what there is no room for: it is left out.
    pub fn hurry(&self) {
        self.hurried.store(true, Ordering::SeqCst);
    }

    /// Returns when everything is shown, or soon after [`Screen::hurry`]. What comes later is not.
    pub fn finish(&self) {
        let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return;
        };
        self.show(Shown::End);
        let mut hurried = Duration::ZERO;
        while !thread.is_finished() && hurried < LAST_OUTPUT {
            std::thread::sleep(LOOK);
            if self.hurried.load(Ordering::SeqCst) {
                hurried += LOOK;
            }
        }
    }

    fn show(&self, what: Shown) {
        // After the end nobody listens.
        self.queue.send(what).unwrap_or(());
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.finish();
    }
}

fn show<Out: Write, Notes: Write>(
    shown: &Receiver<Shown>,
    waiting: &AtomicUsize,
    mut console: Console<Out, Notes>,
) {
    for what in shown {
        match what {
            Shown::Event(uuid, event) => {
                console.event(uuid, &event);
                waiting.fetch_sub(1, Ordering::SeqCst);
            }
            Shown::Note(text) => console.note(&text),
            Shown::End => break,
        }
    }
    console.finish();
}

#[cfg(test)]
mod tests {
    use std::io::{Read, pipe};
    use std::time::Instant;

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
        screen.finish();
        assert_eq!(reader.join().expect("no panic").expect("readable"), 1_000_000);
    }

    /// A pipe that nobody reads is no reason to stay.
    #[test]
    fn in_a_hurry_the_end_comes() {
        let (reader, writer) = pipe().expect("a pipe");
        let screen = Screen::on(writer, std::io::sink(), Format::Text).expect("a thread");
        for _ in 0..WAITING {
            screen.event(Uuid::nil(), &Event::Console { bytes: vec![b'x'; 1000] });
        }
        let begin = Instant::now();
        screen.hurry();
        for _ in 0..WAITING {
            screen.event(Uuid::nil(), &Event::Console { bytes: vec![b'x'; 1000] });
        }
        screen.finish();
        assert!(begin.elapsed() < Duration::from_secs(5));
        drop(reader);
    }
}
