//! The `io_uring` of an instance: all that its devices do with the host.
//!
//! ```text
//!   device, with its slot's lock          devices' thread, without any
//!     work: queues <-> its own buffers
//!     asks --Ask, with buffer------------> submission queue ─┐ one system call hands over all that
//!                                                            │ is asked and waits for what is done
//!     done <-Done, buffer comes back------ completion queue <┘
//! ```
//!
//! **No operation knows guest memory.** What the guest sends is copied out of its buffers before these
//! are given back, and what it receives is copied in when it has come; operations have buffers of their
//! own, which belong to the ring from the asking to the end. So the state of the queues never depends on
//! what is under way: a fork waits for no operation and cancels none. In the parent they go on. A child
//! has a ring of its own, made with the standby, and nothing in it: its sockets are others, its
//! connections are over (see `vsock`), and what was to be told to the guest is told anew.
//!
//! Descriptors and buffers of operations under way are kept here, so that whoever asked may forget them.
//! Who wants an operation to end shuts its socket down.
#![expect(
    unsafe_code,
    reason = "the kernel reads and writes buffers while operations are under way"
)]

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::squeue::Entry;
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode};
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;

use crate::sys::{SysError, now_ns};

/// Operations handed over at once, at most.
const ENTRIES: u32 = 256;
/// Operations of the ring itself have numbers from here on.
const OWN: u64 = 1 << 63;

/// How long operations that are cancelled may take to end.
const FAREWELL_NS: u64 = 100_000_000;

/// What a device wants done. `number` is its own name for what this is about.
#[derive(Debug)]
pub enum Ask {
    /// Accept a connection.
    Accept {
        /// See there.
        number: u64,
        /// A socket that listens.
        socket: Arc<OwnedFd>,
    },
    /// Receive into all of the buffer, at most.
    Receive {
        /// See there.
        number: u64,
        /// A connected socket.
        socket: Arc<OwnedFd>,
        /// Where to.
        buffer: Vec<u8>,
    },
    /// Send what is in the buffer from an offset on, or a part of it.
    Send {
        /// See there.
        number: u64,
        /// A connected socket.
        socket: Arc<OwnedFd>,
        /// What.
        buffer: Vec<u8>,
        /// What has been sent of it.
        from: usize,
    },
    /// Tell when the other side is gone.
    HangUp {
        /// See there.
        number: u64,
        /// A connected socket.
        socket: Arc<OwnedFd>,
    },
    /// Tell when an eventfd was written; it is read.
    Ring {
        /// The eventfd.
        bell: Arc<EventFd>,
    },
}

/// What has been done.
#[derive(Debug)]
pub enum Done {
    /// Somebody has connected.
    Accepted(u64, Result<OwnedFd, Errno>),
    /// So many bytes have come.
    Received(u64, Result<usize, Errno>, Vec<u8>),
    /// So many bytes have gone.
    Sent(u64, Result<usize, Errno>, Vec<u8>),
    /// The other side is gone.
    HungUp(u64),
    /// The eventfd was written.
    Rang,
}

/// One operation under way, with all that the kernel needs of it.
#[derive(Debug)]
struct Flight {
    /// Who asked.
    slot: usize,
    ask: Ask,
    /// Where an eventfd's counter goes.
    count: Box<u64>,
}

/// See the module.
pub struct Ring {
    uring: IoUring,
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    /// What the kernel does not take before completions are taken from it (EBUSY, below Linux 5.19).
    waiting: VecDeque<Entry>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Ring").field("flights", &self.flights).finish_non_exhaustive()
    }
}

impl Ring {
    /// An empty ring.
    ///
    /// # Errors
    ///
    /// `ENOSYS`, `EPERM`: this kernel has none, or allows none; `EMFILE`.
    pub fn new() -> Result<Self, SysError> {
        let fail = |source| SysError { call: "io_uring_setup", source };
        let uring = IoUring::builder().build(ENTRIES).map_err(fail)?;
        // With this came polls that go on.
        if !uring.params().is_feature_resource_tagging() {
            return Err(fail(Errno::NOSYS.into()));
        }
        Ok(Self { uring, flights: Vec::new(), free: Vec::new(), waiting: VecDeque::new() })
    }

    /// Has something done for device `slot`.
    pub fn ask(&mut self, slot: usize, ask: Ask) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.flights.push(None);
            self.flights.len() - 1
        });
        let Some(place) = self.flights.get_mut(index) else { return };
        let flight = place.insert(Flight { slot, ask, count: Box::new(0) });
        let entry = flight.entry().user_data(index as u64);
        self.push(entry);
    }

    /// Behind what waits already.
    fn push(&mut self, entry: Entry) {
        self.waiting.push_back(entry);
        if !self.hand_over() {
            // There is room when the kernel has taken what is there. EINTR, EBUSY: the next time.
            self.uring.submit().unwrap_or(0);
            self.hand_over();
        }
    }

    /// Puts what waits where the kernel takes it; tells whether there was room for all of it.
    fn hand_over(&mut self) -> bool {
        while let Some(entry) = self.waiting.front() {
            // SAFETY: the entry's descriptor, buffer and counter belong to its flight, which is
            // dropped when the operation's last completion was seen, or never (see `drop`): until then
            // the buffer is neither moved nor freed nor looked at.
            if unsafe { self.uring.submission().push(entry) }.is_err() {
                return false;
            }
            self.waiting.pop_front();
        }
        true
    }

    /// Hands over what was asked for and waits until something is done, the time has come, or not at
    /// all; then tells what is done, and for which device.
    pub fn turn(&mut self, until_ns: Option<u64>, mut done: impl FnMut(usize, Done)) {
        self.hand_over();
        let waits = until_ns != Some(0) && self.uring.completion().is_empty();
        let result = if waits {
            let left = until_ns.map(|at| at.saturating_sub(now_ns()));
            let time = left.map(|left| {
                let nsec = u32::try_from(left % 1_000_000_000).unwrap_or(0);
                Timespec::new().sec(left / 1_000_000_000).nsec(nsec)
            });
            let args = SubmitArgs::new();
            let args = time.as_ref().map_or(args, |time| args.timespec(time));
            self.uring.submitter().submit_with_args(1, &args)
        } else if self.uring.submission().is_empty() {
            Ok(0)
        } else {
            self.uring.submit()
        };
        // ETIME, EINTR, EBUSY: what is done is told, and all else is tried again the next time.
        result.unwrap_or(0);
        let completions: Vec<_> = self.uring.completion().collect();
        for completion in completions {
            if let Some((slot, what)) = self.complete(&completion) {
                done(slot, what);
            }
        }
    }

    fn complete(&mut self, completion: &cqueue::Entry) -> Option<(usize, Done)> {
        let index = usize::try_from(completion.user_data()).ok()?;
        let result = match completion.result() {
            result @ 0.. => Ok(result.unsigned_abs()),
            result => Err(Errno::from_raw_os_error(result.wrapping_neg())),
        };
        if cqueue::more(completion.flags()) {
            // A poll that goes on: other ends than that of both directions are of no interest.
            let flight = self.flights.get(index)?.as_ref()?;
            let Ask::HangUp { number, .. } = flight.ask else { return None };
            let (slot, gone) = (flight.slot, is_hang_up(result));
            if gone {
                let remove = opcode::PollRemove::new(index as u64).build().user_data(OWN);
                self.push(remove);
            }
            return gone.then_some((slot, Done::HungUp(number)));
        }
        let Flight { slot, ask, .. } = self.flights.get_mut(index)?.take()?;
        self.free.push(index);
        let len = result.map(|len| len as usize);
        let done = match ask {
            Ask::Accept { number, .. } => Done::Accepted(
                number,
                // SAFETY: the kernel has just made it, for whoever asked.
                result.map(|fd| unsafe { OwnedFd::from_raw_fd(fd.cast_signed()) }),
            ),
            Ask::Receive { number, buffer, .. } => Done::Received(number, len, buffer),
            Ask::Send { number, buffer, .. } => Done::Sent(number, len, buffer),
            // Told before, if it was removed.
            Ask::HangUp { number, .. } if is_hang_up(result) => Done::HungUp(number),
            Ask::HangUp { .. } => return None,
            Ask::Ring { .. } => Done::Rang,
        };
        Some((slot, done))
    }
}

impl Flight {
    fn entry(&mut self) -> Entry {
        let length = |len: usize| u32::try_from(len).unwrap_or(u32::MAX);
        let no_signal = libc::MSG_NOSIGNAL;
        match &mut self.ask {
            Ask::Accept { socket, .. } => {
                let none = std::ptr::null_mut();
                let fd = Fd(socket.as_raw_fd());
                opcode::Accept::new(fd, none, none.cast()).flags(libc::SOCK_CLOEXEC).build()
            }
            Ask::Receive { socket, buffer, .. } => {
                let (start, len) = (buffer.as_mut_ptr(), length(buffer.len()));
                opcode::Recv::new(Fd(socket.as_raw_fd()), start, len).build()
            }
            Ask::Send { socket, buffer, from, .. } => {
                let part = buffer.get(*from..).unwrap_or_default();
                let (start, len) = (part.as_ptr(), length(part.len()));
                opcode::Send::new(Fd(socket.as_raw_fd()), start, len).flags(no_signal).build()
            }
            Ask::HangUp { socket, .. } => {
                // With both directions' ends come those of one (`IO_POLL_UNMASK`). A poll that goes on
                // tells each change once, where another would tell of one end again and again.
                let events = u32::from(libc::POLLHUP.cast_unsigned());
                opcode::PollAdd::new(Fd(socket.as_raw_fd()), events).multi(true).build()
            }
            Ask::Ring { bell, .. } => {
                let to = std::ptr::from_mut::<u64>(&mut self.count).cast();
                opcode::Read::new(Fd(bell.as_raw_fd()), to, 8).build()
            }
        }
    }
}

fn is_hang_up(result: Result<u32, Errno>) -> bool {
    let hang_up = u32::from((libc::POLLHUP | libc::POLLERR).cast_unsigned());
    // A poll that failed will not tell any more.
    result.map_or_else(|errno| errno != Errno::CANCELED, |events| events & hang_up != 0)
}

impl Drop for Ring {
    fn drop(&mut self) {
        // Closing the ring ends operations some time later: until then the kernel uses what is theirs.
        for index in 0..self.flights.len() {
            if self.flights.get(index).is_some_and(Option::is_some) {
                self.push(opcode::AsyncCancel::new(index as u64).build().user_data(OWN));
            }
        }
        let end = now_ns() + FAREWELL_NS;
        while self.flights.iter().any(Option::is_some) && now_ns() < end {
            self.turn(Some(end), |_, _| ());
        }
        // What one that does not end uses stays for good.
        self.flights.drain(..).flatten().for_each(std::mem::forget);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (UnixStream, Arc<OwnedFd>) {
        let (one, two) = UnixStream::pair().expect("sockets");
        (one, Arc::new(two.into()))
    }

    /// The next thing that is done, in a second.
    fn next(ring: &mut Ring) -> Option<(usize, Done)> {
        let end = now_ns() + 1_000_000_000;
        let mut all = Vec::new();
        while all.is_empty() && now_ns() < end {
            ring.turn(Some(end), |slot, done| all.push((slot, done)));
        }
        assert!(all.len() < 2, "{all:?}");
        all.pop()
    }

    #[test]
    fn bytes_come_and_go_and_buffers_come_back() {
        let mut ring = Ring::new().expect("a ring");
        let (mut other, socket) = pair();
        ring.ask(3, Ask::Receive { number: 7, socket: socket.clone(), buffer: vec![0; 8] });
        other.write_all(b"hello").expect("room");
        let received = next(&mut ring);
        let Some((3, Done::Received(7, Ok(5), buffer))) = received else { panic!("{received:?}") };
        assert_eq!(&buffer[..5], b"hello");
        ring.ask(3, Ask::Send { number: 8, socket, buffer: b"xxbye".to_vec(), from: 2 });
        let sent = next(&mut ring);
        assert!(matches!(sent, Some((3, Done::Sent(8, Ok(3), _)))), "{sent:?}");
        let mut read = [0; 3];
        other.read_exact(&mut read).expect("sent");
        assert_eq!(&read, b"bye");
    }

    #[test]
    fn an_end_of_one_direction_is_no_hang_up_and_that_of_both_is_told_once() {
        let mut ring = Ring::new().expect("a ring");
        let (other, socket) = pair();
        ring.ask(0, Ask::HangUp { number: 1, socket });
        ring.turn(Some(0), |_, done| panic!("{done:?}"));
        other.shutdown(std::net::Shutdown::Write).expect("open");
        let soon = now_ns() + 50_000_000;
        while now_ns() < soon {
            ring.turn(Some(soon), |_, done| panic!("{done:?}"));
        }
        drop(other);
        assert!(matches!(next(&mut ring), Some((0, Done::HungUp(1)))));
        let soon = now_ns() + 50_000_000;
        while now_ns() < soon {
            ring.turn(Some(soon), |_, done| panic!("{done:?}"));
        }
        assert!(ring.flights.iter().all(Option::is_none), "{ring:?}");
    }

    #[test]
    fn nothing_is_left_of_operations_under_way() {
        let mut ring = Ring::new().expect("a ring");
        let bell = Arc::new(EventFd::new(libc::EFD_CLOEXEC).expect("an eventfd"));
        let (_other, socket) = pair();
        ring.ask(0, Ask::Ring { bell: bell.clone() });
        ring.ask(0, Ask::Receive { number: 1, socket: socket.clone(), buffer: vec![0; 8] });
        ring.ask(0, Ask::HangUp { number: 2, socket: socket.clone() });
        ring.turn(Some(0), |_, done| panic!("{done:?}"));
        // One that the kernel has not been told of.
        ring.ask(0, Ask::Receive { number: 3, socket: socket.clone(), buffer: vec![0; 8] });
        drop(ring);
        assert_eq!((Arc::strong_count(&bell), Arc::strong_count(&socket)), (1, 1));
    }

    #[test]
    fn more_may_be_asked_than_fits_at_once() {
        let mut ring = Ring::new().expect("a ring");
        let mut pairs: Vec<_> = (0..600).map(|_| pair()).collect();
        for (number, (_, socket)) in (0..).zip(&pairs) {
            let (socket, buffer) = (socket.clone(), vec![0; 4]);
            ring.ask(0, Ask::Receive { number, socket, buffer });
        }
        for (other, _) in &mut pairs {
            other.write_all(b"four").expect("room");
        }
        let (mut count, end) = (0, now_ns() + 5_000_000_000);
        while count < 600 && now_ns() < end {
            ring.turn(Some(end), |_, done| {
                assert!(matches!(done, Done::Received(_, Ok(4), _)), "{done:?}");
                count += 1;
            });
        }
        assert_eq!(count, 600);
    }
}
