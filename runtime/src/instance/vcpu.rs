//! The life of a vCPU thread: run the guest, serve its exits, stop at the gate.

use std::mem::ManuallyDrop;
use std::sync::MutexGuard;
use std::time::Duration;

use guest_abi::param::{Header, ParamPage};
use guest_abi::port;
use kvm_ioctls::VcpuExit;
use std::sync::atomic::Ordering;
use vm_memory::{Bytes, GuestAddress};

use super::Instance;
use super::haste::Haste;
use super::last_words::POOL_EMPTY;
use crate::device::{Answer, ports};
use crate::fork::{Engine, ForkCause, ForkError, Moment, Step};
use crate::kvm::{KvmError, Vcpu};
use crate::memory::{BackingKind, GuestRam};
use crate::proto::{CRASHED, Event};
use crate::sys::{chain, now_ns, realtime_ns};

/// How long a fork waits for a standby to be made.
const STANDBY_NS: u64 = 20_000_000_000;

/// How long a vCPU spins for the engine before it sleeps, and how often it looks from then on.
const ENGINE_SPIN_NS: u64 = 50_000;
const ENGINE_POLL: Duration = Duration::from_micros(100);

/// How often a vCPU whose dirty ring is full looks whether a sync round has emptied it.
const ROUND_POLL: Duration = Duration::from_micros(500);

/// How often a vCPU looks whether the owner has read something.
const OUTBOX_POLL: Duration = Duration::from_millis(1);

/// What an exit asks for.
#[derive(Debug)]
pub enum Action {
    /// Nothing more.
    Continue,
    /// A fork of that many children; the time is that of the exit.
    Fork { children: u32, doorbell_ns: u64 },
    /// A fork is expected within that many microseconds.
    Announce { window_us: u32 },
    /// The dirty ring is full: take its contents.
    Drain,
    /// Wait for a program newer than that.
    Park { seen: u32 },
    /// Wait that many microseconds.
    Pause { us: u32 },
    /// A program is done.
    Done { seq: u32 },
    /// The guest may be armed.
    Ready,
    /// End because of an exception that the guest cannot handle.
    TripleFault,
    /// End because KVM has given up.
    InternalError,
    /// End with this code.
    Exit { code: i32, reason: Option<String> },
}

impl Instance {
    /// Runs the leader to the end of the process.
    pub fn run_leader(&self, vcpu: Vcpu, first: Action) -> ! {
        self.run_vcpu(vcpu, first);
        // The control thread ends the process when the owner has been told how the instance ended,
        // however slowly that reads: otherwise it would take it for killed.
        loop {
            std::thread::park();
        }
    }

    /// Runs a vCPU until the instance ends. `first` is what its last exit asked for.
    pub fn run_vcpu(&self, vcpu: Vcpu, first: Action) {
        // Never dropped: others may reach for its kick for as long as the process lives.
        let mut vcpu = ManuallyDrop::new(vcpu);
        let index = vcpu.index() as usize;
        let mut action = first;
        let mut haste = Haste::default();
        loop {
            self.act(&mut vcpu, action, &mut haste);
            self.gate.disarm(index);
            if self.gate.quitting() {
                return;
            }
            if self.gate.is_closed() && !self.stop(&mut vcpu) {
                return;
            }
            haste.renew();
            let exit = vcpu.run();
            let now = now_ns();
            haste.end();
            action = self.after_exit_at(index, exit, now);
        }
    }

    /// What the exit of the first run of vCPU `index` asks for.
    pub fn after_exit(&self, index: usize, exit: Result<Option<VcpuExit<'_>>, KvmError>) -> Action {
        self.after_exit_at(index, exit, now_ns())
    }

    /// Saves the state and stops at the closed gate.
    fn stop(&self, vcpu: &mut Vcpu) -> bool {
        let index = vcpu.index() as usize;
        if !self.save(vcpu) {
            return false;
        }
        self.gate.leave(index);
        self.gate.stop_here(index);
        self.resumed(index);
        !self.gate.quitting()
    }

    /// vCPU `index` is about to enter the guest again after a fork.
    fn resumed(&self, index: usize) {
        self.link.fork().stamps.raise(Moment::Resumed, now_ns());
        self.gate.back(index);
    }

    fn save(&self, vcpu: &mut Vcpu) -> bool {
        let index = vcpu.index() as usize;
        let saved =
            vcpu.settle().and_then(|()| self.gate.with_saved(index, |state| vcpu.save(state)));
        if let Err(error) = saved {
            self.exit(1, Some(chain(&error)));
            return false;
        }
        true
    }

    fn act(&self, vcpu: &mut Vcpu, action: Action, haste: &mut Haste) {
        let index = vcpu.index() as usize;
        match action {
            Action::Continue => {}
            Action::Fork { children, doorbell_ns } => {
                self.fork(vcpu, children, doorbell_ns, haste);
            }
            Action::Announce { window_us } => self.announce(vcpu, window_us),
            Action::Drain => self.drain_ring(vcpu),
            Action::Park { seen } => {
                // The guest sees the lower half of the sequence number.
                let newer = || low(self.program_seq(index)) != seen;
                if !newer() && self.save(vcpu) {
                    self.gate.block(index, None, newer);
                }
            }
            Action::Pause { us } => {
                if us > 0 && self.save(vcpu) {
                    let time = Duration::from_micros(us.into());
                    self.gate.block(index, Some(time), || false);
                }
            }
            Action::Done { seq } => {
                self.wait_for_room(vcpu);
                self.done(vcpu.index(), seq);
            }
            Action::Ready => {
                self.ready.store(true, Ordering::SeqCst);
                self.link.ring();
            }
            Action::TripleFault => {
                let reason = "the guest stopped with a triple fault (an exception without handler)";
                self.exit(CRASHED, Some(format!("{reason}; {}", vcpu.whereabouts())));
            }
            Action::InternalError => {
                let reason = vcpu.internal_error();
                self.exit(CRASHED, Some(format!("{reason}; {}", vcpu.whereabouts())));
            }
            Action::Exit { code, reason } => self.exit(code, reason),
        }
    }

    /// Turns an exit into what it asks for. Everything in it comes from the guest.
    fn after_exit_at(
        &self,
        index: usize,
        exit: Result<Option<VcpuExit<'_>>, KvmError>,
        now: u64,
    ) -> Action {
        match exit {
            Ok(None | Some(VcpuExit::Hlt)) => Action::Continue,
            Ok(Some(VcpuExit::MmioWrite(address, data))) => {
                if let Some(devices) = &self.devices {
                    devices.write(address, data, &self.ram, self);
                }
                Action::Continue
            }
            Ok(Some(VcpuExit::IoOut(port, data))) => self.port_write(port, data, now),
            Ok(Some(VcpuExit::IoIn(port, data))) => {
                self.port_read(index, port, data);
                Action::Continue
            }
            Ok(Some(VcpuExit::MmioRead(address, data))) => {
                match &self.devices {
                    Some(devices) => devices.read(address, data),
                    None => data.fill(0xff),
                }
                Action::Continue
            }
            Ok(Some(VcpuExit::Unsupported(DIRTY_RING_FULL))) => Action::Drain,
            Ok(Some(VcpuExit::Shutdown)) => Action::TripleFault,
            Ok(Some(VcpuExit::InternalError)) => Action::InternalError,
            Ok(Some(VcpuExit::FailEntry(hardware, cpu))) => {
                let reason = format!(
                    "KVM cannot enter the guest: the hardware's reason is {hardware:#x}, on processor {cpu}"
                );
                Action::Exit { code: CRASHED, reason: Some(reason) }
            }
            Ok(Some(other)) => {
                Action::Exit { code: CRASHED, reason: Some(format!("unexpected exit {other:?}")) }
            }
            Err(error) => {
                // A hugetlb page that could not be had: KVM reports what a process would feel as
                // SIGBUS.
                let huge = self.mapping.kind() == BackingKind::Hugetlb;
                let reason = if huge && error.errno() == libc::EFAULT {
                    POOL_EMPTY.into()
                } else {
                    chain(&error)
                };
                Action::Exit { code: CRASHED, reason: Some(reason) }
            }
        }
    }

    fn port_read(&self, index: usize, port: u16, data: &mut [u8]) {
        let linux = self.config.is_linux();
        // Where there is nothing, Linux expects ones.
        data.fill(if linux { 0xff } else { 0 });
        match (port, port.wrapping_sub(ports::SERIAL), data) {
            (port::FORK, _, data) => {
                data.fill(0);
                self.read_answer(index, data);
            }
            (port::CLOCK, _, data) => {
                let now = realtime_ns().to_le_bytes();
                data.iter_mut().zip(now.into_iter().cycle()).for_each(|(to, byte)| *to = byte);
            }
            (_, offset @ 0..8, data) if linux => {
                // More than one: a string instruction, each of whose bytes is read at this port.
                data.fill_with(|| self.serial.read(low_byte(offset)));
                self.interrupt();
            }
            (ports::SLEEP, _, data) if linux => data.fill(0),
            _ => {}
        }
    }

    /// What Linux writes to ports of its own; `None`: it is none of them. More than one byte come of
    /// a string instruction, which writes each of them to this port.
    fn linux_write(&self, port: u16, data: &[u8]) -> Option<Action> {
        let byte = *data.last()?;
        let end = |code| Some(Action::Exit { code, reason: None });
        match (port, port.wrapping_sub(ports::SERIAL)) {
            (_, offset @ 0..8) => {
                let said = self.serial.write_all(low_byte(offset), data);
                if !said.is_empty() {
                    self.post_console(&said);
                }
                self.interrupt();
                match (byte, self.serial.panic()) {
                    // It would stand still from here on.
                    (b'\n', Some((reason, true))) => Some(panicked(&reason)),
                    _ => Some(Action::Continue),
                }
            }
            _ => match ports::Power::of(port, byte)? {
                ports::Power::Stays => Some(Action::Continue),
                ports::Power::Restarts => match self.serial.last_panic() {
                    Some(reason) => Some(panicked(&reason)),
                    None => end(0),
                },
                ports::Power::Off => end(0),
            },
        }
    }

    /// Interrupts the guest if its serial line wants that.
    fn interrupt(&self) {
        if self.serial.interrupts() {
            // It cannot fail for a line that the interrupt controllers have.
            self.machine.pulse(ports::SERIAL_GSI).unwrap_or(());
        }
    }

    fn port_write(&self, port: u16, data: &[u8], now: u64) -> Action {
        if self.config.is_linux()
            && let Some(action) = self.linux_write(port, data)
        {
            return action;
        }
        if port == port::CONSOLE {
            self.post_console(data);
            return Action::Continue;
        }
        Action::of_doorbell(port, data, now)
    }

    /// The engine, for a vCPU that has left the guest. Whoever has it may be forking, and waits for
    /// this vCPU to stop: so it waits like one that is blocked.
    fn engine_for(&self, vcpu: &mut Vcpu) -> MutexGuard<'_, Engine> {
        let index = vcpu.index() as usize;
        let begin = now_ns();
        let mut saved = false;
        loop {
            if let Some(engine) = self.try_engine() {
                if saved {
                    self.resumed(index);
                }
                return engine;
            }
            if self.gate.is_closed() {
                saved = saved || self.save(vcpu);
                self.gate.leave(index);
                self.gate.block(index, Some(ENGINE_POLL), || false);
            } else if now_ns() - begin > ENGINE_SPIN_NS {
                self.gate.nap(index, ENGINE_POLL);
            }
            std::hint::spin_loop();
        }
    }

    /// Takes the contents of the full dirty ring, so that the guest can go on.
    fn drain_ring(&self, vcpu: &mut Vcpu) {
        let drained = self.engine_for(vcpu).drain(self);
        match drained {
            Ok(true) => {}
            Ok(false) => {
                if self.save(vcpu) {
                    self.gate.block(vcpu.index() as usize, Some(ROUND_POLL), || false);
                }
            }
            Err(cause) => self.exit(CRASHED, Some(chain(&cause))),
        }
    }

    /// A guest that says more than the owner reads waits, and can be stopped meanwhile.
    fn wait_for_room(&self, vcpu: &mut Vcpu) {
        if self.is_outbox_full() && self.save(vcpu) {
            while self.is_outbox_full() && !self.gate.quitting() {
                self.gate.block(vcpu.index() as usize, Some(OUTBOX_POLL), || false);
            }
        }
    }

    fn announce(&self, vcpu: &mut Vcpu, window_us: u32) {
        self.engine_for(vcpu).announce(&self.link, window_us);
    }

    /// A fork that the guest asked for.
    fn fork(&self, vcpu: &mut Vcpu, children: u32, doorbell_ns: u64, haste: &mut Haste) {
        let index = vcpu.index() as usize;
        let mut asked = false;
        let wait = |vcpu: &mut Option<&mut Vcpu>| {
            let news = self.news.load(Ordering::SeqCst);
            if !asked && let Some(vcpu) = vcpu {
                // Once: it does not change while this vCPU waits.
                asked = self.save(vcpu);
            }
            // Each time: what was asked for may have gone to somebody else.
            self.link.ring();
            // The root is armed meanwhile, for which all vCPUs have to be stopped.
            let changed = || self.news.load(Ordering::SeqCst) != news;
            self.gate.block(index, Some(Duration::from_millis(50)), changed);
        };
        let result = self.fork_children(Some(&mut *vcpu), children, doorbell_ns, wait, || {
            // Other vCPUs have to run too, if only to stop.
            if self.config.realtime && self.vcpus == 1 {
                haste.begin();
            }
        });
        if let Err(error) = &result {
            self.engine_for(vcpu).forget_waiting();
            self.wait_for_room(vcpu);
            self.post(Event::Note { text: chain(error) });
        }
        if let Err(error) = result {
            let answer = Answer::failed(&self.identity, error.cause.errno(), error.step as u32);
            self.set_answer(index, answer);
        }
        self.resumed(index);
    }

    /// Forks: waits for enough standbys by calling `wait` again and again, then calls `hurry` and
    /// takes the fork path.
    ///
    /// # Errors
    ///
    /// The step that failed; the instance is as before.
    pub(super) fn fork_children(
        &self,
        mut vcpu: Option<&mut Vcpu>,
        children: u32,
        doorbell_ns: u64,
        mut wait: impl FnMut(&mut Option<&mut Vcpu>),
        mut hurry: impl FnMut(),
    ) -> Result<Vec<crate::fork::Identity>, ForkError> {
        if children == 0 || children > port::MAX_CHILDREN {
            let cause = ForkCause::Children { requested: children, most: port::MAX_CHILDREN };
            return Err(ForkError { step: Step::Take, cause });
        }
        let own = vcpu.as_ref().map(|vcpu| vcpu.index() as usize);
        let lock = |vcpu: &mut Option<&mut Vcpu>| match vcpu {
            Some(vcpu) => self.engine_for(vcpu),
            None => self.engine(),
        };
        let mut again = true;
        loop {
            let mut engine = lock(&mut vcpu);
            let failures = engine.prewarm_failures();
            while !engine.take(self, children as usize, own, doorbell_ns)? {
                let waited = now_ns() - doorbell_ns;
                if waited > STANDBY_NS || self.gate.quitting() {
                    let cause = ForkCause::Timeout { waited_ms: waited / 1_000_000 };
                    return Err(ForkError { step: Step::Take, cause });
                }
                drop(engine);
                wait(&mut vcpu);
                engine = lock(&mut vcpu);
                // Also if the next try has succeeded meanwhile: whether this is told is no matter of luck.
                if let Some(error) = engine.prewarm_failure_after(self, failures) {
                    return Err(error);
                }
            }
            hurry();
            if let Some(own) = own {
                self.gate.leave(own);
            }
            let error = match engine.fork(self, vcpu.as_deref_mut(), doorbell_ns) {
                Ok(()) => return self.forked(&mut engine, own),
                Err(error) => error,
            };
            engine.abort(self, &error);
            self.link.ring();
            if !again || !matches!(error.cause, ForkCause::JournalFull { .. }) {
                return Err(error);
            }
            // The other vCPUs wrote faster than could be known before they stopped. Once: a round
            // makes room for twice what they had written.
            again = false;
            engine.want_round();
        }
    }

    /// The parent's side of the fork is made: what there is to say to who asked for it.
    fn forked(
        &self,
        engine: &mut Engine,
        own: Option<usize>,
    ) -> Result<Vec<crate::fork::Identity>, ForkError> {
        let identities = engine.children();
        if let Some(own) = own {
            // While nobody else can conclude the fork.
            self.set_answer(own, Answer::parent(&self.identity, &identities));
            return Ok(identities);
        }
        // The host asks once, and hears how it ended: before anybody else forks.
        self.gate.wait_resumed();
        self.link.fork().stamps.raise(Moment::Resumed, now_ns());
        engine.conclude(self);
        match engine.last_failure() {
            None => Ok(identities),
            Some((step, errno)) => {
                Err(ForkError { step, cause: ForkCause::of_child(errno, self.mapping.kind()) })
            }
        }
    }

    /// The parent learns here whether its children made it.
    fn read_answer(&self, index: usize, data: &mut [u8]) {
        // The read cannot be interrupted: it would be complete with nothing in it. Nor need it be,
        // for whoever has the engine in order to fork has concluded this vCPU's fork before.
        while let Some(mut answer) = self.answer(index) {
            if !answer.is_pending() {
                answer.read(data);
                return;
            }
            drop(answer);
            match self.try_engine() {
                Some(mut engine) => engine.conclude(self),
                None => std::thread::yield_now(),
            }
        }
    }

    fn done(&self, vcpu: u32, seq: u32) {
        let results = results(&self.ram, vcpu);
        self.post(Event::Done { vcpu, seq: seq.into(), results });
    }

    /// Sequence number of the last program of a vCPU. It lives in guest memory alone, so a child goes
    /// on where its parent was.
    fn program_seq(&self, index: usize) -> u64 {
        program_seq(&self.ram, index as u64)
    }

    /// Gives a program to a vCPU of a bare guest. Returns its sequence number.
    pub(super) fn give_program(
        &self,
        vcpu: u32,
        steps: &[crate::proto::WireStep],
    ) -> Result<u64, String> {
        if vcpu as usize >= self.vcpus {
            return Err(format!("there is no vCPU {vcpu}"));
        }
        if steps.len() > super::MAX_STEPS {
            return Err(format!("a program has at most {} steps", super::MAX_STEPS));
        }
        let page = guest_abi::entry::param_page(vcpu.into());
        let write = |offset: usize, words: &[u64]| -> Result<(), String> {
            for (index, word) in (0_u64..).zip(words) {
                self.ram
                    .write_obj(*word, GuestAddress(page + offset as u64 + index * 8))
                    .map_err(|error| error.to_string())?;
            }
            Ok(())
        };
        let next = self.program_seq(vcpu as usize).wrapping_add(1);
        write(std::mem::offset_of!(ParamPage, results), &[0; guest_abi::param::RESULTS])?;
        let blank = crate::proto::WireStep::default();
        for index in 0..super::MAX_STEPS {
            let step = steps.get(index).unwrap_or(&blank);
            let head =
                u64::from(step.op) | u64::from(step.who) << 32 | u64::from(step.result) << 48;
            let offset = std::mem::offset_of!(ParamPage, steps)
                + index * size_of::<guest_abi::param::Step>();
            let [a, b, c, d] = step.args;
            write(offset, &[head, a, b, c, d])?;
        }
        write(std::mem::offset_of!(Header, seq), &[next])?;
        self.gate.unblock(vcpu as usize);
        Ok(next)
    }
}

impl Action {
    /// What a write to a port of the doorbell asks for. Any bytes at any port ask for something, or
    /// for nothing.
    pub(super) fn of_doorbell(port: u16, data: &[u8], now: u64) -> Self {
        let mut word = [0; 4];
        for (to, from) in word.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(word);
        match port {
            port::FORK => Self::Fork { children: value, doorbell_ns: now },
            port::ANNOUNCE => Self::Announce { window_us: value.min(port::MAX_ANNOUNCE_US) },
            port::PARK => Self::Park { seen: value },
            port::PAUSE => Self::Pause { us: value },
            port::DONE => Self::Done { seq: value },
            port::READY => Self::Ready,
            port::EXIT => Self::Exit { code: i32::from(word[0]), reason: None },
            _ => Self::Continue,
        }
    }
}

/// What a program left in the parameter page of a vCPU, without the zeroes behind it.
pub(super) fn results(ram: &GuestRam, vcpu: u32) -> Vec<u64> {
    let page = guest_abi::entry::param_page(vcpu.into());
    let at = page + std::mem::offset_of!(ParamPage, results) as u64;
    let word = |index| ram.read_obj(GuestAddress(at + index * 8)).unwrap_or(0);
    let mut words: Vec<u64> = (0..guest_abi::param::RESULTS as u64).map(word).collect();
    while words.len() > 1 && words.last() == Some(&0) {
        words.pop();
    }
    words
}

/// The sequence number in it.
pub(super) fn program_seq(ram: &GuestRam, vcpu: u64) -> u64 {
    let page = guest_abi::entry::param_page(vcpu);
    let offset = std::mem::offset_of!(Header, seq) as u64;
    ram.read_obj(GuestAddress(page + offset)).unwrap_or(0)
}

/// The end of an instance whose kernel panicked.
fn panicked(reason: &str) -> Action {
    let reason = format!("its kernel stopped: {reason}; the console has more");
    Action::Exit { code: CRASHED, reason: Some(reason) }
}

/// A port's distance from another, below eight.
fn low_byte(offset: u16) -> u8 {
    u8::try_from(offset & 7).unwrap_or(0)
}

/// The lower half of a word.
fn low(word: u64) -> u32 {
    u32::try_from(word & u64::from(u32::MAX)).unwrap_or(0)
}

/// `KVM_EXIT_DIRTY_RING_FULL`.
const DIRTY_RING_FULL: u32 = 31;
