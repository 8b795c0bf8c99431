//! Every sentence of the specification about `/uk/libukp` that needs no file system to be checked.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const RETENTION: Duration = Duration::from_mins(1);

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn machine(queue: usize) -> Machine<u32> {
    Machine::new(queue, RETENTION)
}

/// Forks as thread 1 of process 1, at second `seconds`.
fn fork(machine: &mut Machine<u32>, seconds: u64) -> (Uuid, u32) {
    let uuid = Uuid::new_v4();
    machine.queue.submit(0).unwrap();
    machine.queue.take().unwrap();
    (uuid, machine.forked(1, 1, at(seconds), uuid))
}

#[derive(Default)]
struct Table(BTreeMap<u32, Process>);

impl Table {
    fn with(mut self, tid: u32, tgid: u32, parent: u32, started: u64) -> Self {
        self.0.insert(tid, Process { tgid, parent, started: at(started) });
        self
    }
}

impl Processes for Table {
    fn thread(&self, tid: u32) -> Option<Process> {
        self.0.get(&tid).copied()
    }
}

#[test]
fn one_fork_at_a_time_and_the_others_in_order() {
    let mut queue = Queue::new(2);
    queue.submit(1).unwrap();
    assert_eq!(queue.take(), Some(1));
    queue.submit(2).unwrap();
    queue.submit(3).unwrap();
    assert_eq!(queue.take(), None, "one at a time");
    queue.done();
    assert_eq!(queue.take(), Some(2));
    queue.done();
    assert_eq!(queue.take(), Some(3));
    queue.done();
    assert_eq!(queue.take(), None);
}

#[test]
fn a_full_queue_is_busy() {
    let mut queue = Queue::new(1);
    queue.submit(1).unwrap();
    queue.submit(2).unwrap();
    assert_eq!(queue.submit(3), Err((3, Refused::Full)), "before the first was taken");
    assert_eq!(queue.take(), Some(1));
    assert_eq!(queue.submit(3), Err((3, Refused::Full)));
    queue.done();
    assert_eq!(queue.take(), Some(2));
    queue.submit(3).unwrap();
}

#[test]
fn before_any_fork_it_reads_as_empty() {
    let processes = Table::default().with(1, 1, 0, 0);
    assert_eq!(machine(1).readers.read(1, &processes), ForkValue::Empty);
}

#[test]
fn two_threads_read_the_uuid_of_their_own_child() {
    let mut machine = machine(2);
    let processes = Table::default().with(10, 10, 1, 0).with(11, 10, 1, 0).with(1, 1, 0, 0);
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    machine.forked(10, 10, at(5), a);
    machine.forked(11, 10, at(6), b);
    assert_eq!(machine.readers.read(10, &processes), ForkValue::Parent(a));
    assert_eq!(machine.readers.read(11, &processes), ForkValue::Parent(b));
}

#[test]
fn another_thread_of_the_process_reads_its_last_child() {
    let mut machine = machine(2);
    let processes = Table::default().with(10, 10, 1, 0).with(12, 10, 1, 9).with(1, 1, 0, 0);
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    machine.forked(10, 10, at(5), a);
    machine.forked(11, 10, at(6), b);
    assert_eq!(machine.readers.read(12, &processes), ForkValue::Parent(b));
}

#[test]
fn what_a_shell_starts_reads_the_child_of_the_shell() {
    let mut machine = machine(2);
    // Two shells, and a cat in a subshell of each.
    let processes = Table::default()
        .with(1, 1, 0, 0)
        .with(20, 20, 1, 0)
        .with(21, 21, 20, 7)
        .with(22, 22, 21, 7)
        .with(30, 30, 1, 0)
        .with(31, 31, 30, 7);
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    machine.forked(20, 20, at(5), a);
    machine.forked(30, 30, at(6), b);
    assert_eq!(machine.readers.read(22, &processes), ForkValue::Parent(a));
    assert_eq!(machine.readers.read(31, &processes), ForkValue::Parent(b));
    assert_eq!(machine.readers.read(1, &processes), ForkValue::Parent(b), "else the last fork");
}

#[test]
fn a_process_number_used_again_is_not_the_one_that_forked() {
    let mut machine = machine(2);
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    machine.forked(40, 40, at(5), a);
    machine.forked(50, 50, at(6), b);
    let processes = Table::default().with(1, 1, 0, 0).with(40, 40, 1, 30);
    assert_eq!(machine.readers.read(40, &processes), ForkValue::Parent(b), "the last fork");
}

#[test]
fn a_circle_of_ancestors_ends() {
    let mut machine = machine(2);
    machine.forked(99, 99, at(5), Uuid::new_v4());
    machine.became_child((Uuid::new_v4(), 1), (90, 90), at(5), false);
    let last = Uuid::new_v4();
    machine.forked(98, 98, at(5), last);
    let processes = Table::default().with(2, 2, 3, 0).with(3, 3, 2, 0);
    assert_eq!(machine.readers.read(2, &processes), ForkValue::Parent(last));
}

#[test]
fn a_child_reads_the_zero_uuid_until_it_forks_itself() {
    let mut machine = machine(2);
    let processes = Table::default().with(1, 1, 0, 0).with(2, 2, 1, 0);
    fork(&mut machine, 5);
    machine.became_child((Uuid::new_v4(), 7), (90, 90), at(5), true);
    assert_eq!(machine.readers.read(1, &processes), ForkValue::Child);
    machine.queue.barrier_passed();
    let (uuid, _) = fork(&mut machine, 6);
    assert_eq!(machine.readers.read(1, &processes), ForkValue::Parent(uuid));
}

/// The agent, process 1, forks when the host asks, and is everybody's ancestor.
#[test]
fn what_the_host_forks_is_nobodys_fork_in_a_child() {
    let mut machine = machine(2);
    let processes = Table::default().with(1, 1, 0, 0).with(8, 1, 0, 0).with(20, 20, 1, 0);
    machine.became_child((Uuid::new_v4(), 1), (20, 20), at(3), false);
    machine.forked(8, 1, at(5), Uuid::new_v4());
    assert_eq!(machine.readers.read(20, &processes), ForkValue::Child);
    let processes = processes.with(30, 30, 1, 6);
    assert_eq!(machine.readers.read(30, &processes), ForkValue::Child, "started since");
}

/// `echo 1 | tee fork; cat fork`: neither is the other's ancestor. So it is with two programs that the
/// host runs one after the other.
#[test]
fn a_fork_of_an_unrelated_process_is_read_in_a_child_as_in_a_root() {
    let mut machine = machine(2);
    let processes = Table::default().with(1, 1, 0, 0).with(20, 20, 1, 0).with(31, 31, 20, 6);
    let (tee, another) = ((25, 25), (26, 26));
    machine.became_child((Uuid::new_v4(), 1), tee, at(3), false);
    assert_eq!(machine.readers.read(31, &processes), ForkValue::Child);
    let child = Uuid::new_v4();
    machine.forked(another.0, another.1, at(5), child);
    assert_eq!(machine.readers.read(31, &processes), ForkValue::Parent(child));
}

/// Another process may fork before the one that this machine comes from has read what it is.
#[test]
fn who_asked_for_the_fork_that_a_child_comes_from_reads_zero_until_it_forks() {
    let mut machine = machine(2);
    let processes = Table::default().with(1, 1, 0, 0).with(20, 20, 1, 0).with(21, 21, 20, 6);
    machine.became_child((Uuid::new_v4(), 1), (20, 20), at(3), false);
    machine.forked(40, 40, at(5), Uuid::new_v4());
    assert_eq!(machine.readers.read(20, &processes), ForkValue::Child);
    assert_eq!(machine.readers.read(21, &processes), ForkValue::Child, "what it starts");
    let child = Uuid::new_v4();
    machine.forked(20, 20, at(6), child);
    assert_eq!(machine.readers.read(21, &processes), ForkValue::Parent(child));
}

#[test]
fn in_a_child_vm_is_empty_and_what_was_queued_fails() {
    let mut machine = machine(4);
    let (uuid, number) = fork(&mut machine, 5);
    machine.queue.submit(1).unwrap();
    machine.queue.take().unwrap();
    machine.queue.submit(2).unwrap();
    machine.queue.submit(3).unwrap();
    let own = Uuid::new_v4();
    assert_eq!(machine.became_child((own, 9), (90, 90), at(5), true), [2, 3]);
    assert_eq!((machine.own(), machine.generation(), machine.epoch()), (own, 9, 1));
    assert_eq!(machine.children.iter().count(), 0);
    assert_eq!(machine.children.find(uuid), None);
    assert_eq!(machine.children.get(number).err(), Some(Gone));
    assert_eq!(machine.queue.submit(4), Err((4, Refused::OfParent)), "before the barrier");
    machine.queue.barrier_passed();
    machine.queue.submit(5).unwrap();
    assert_eq!(machine.queue.take(), Some(5));
}

#[test]
fn a_number_is_not_used_again_in_a_child() {
    let mut machine = machine(4);
    let (_, number) = fork(&mut machine, 5);
    machine.became_child((Uuid::new_v4(), 1), (90, 90), at(5), false);
    assert_ne!(fork(&mut machine, 6).1, number);
}

#[test]
fn a_child_is_there_until_its_code_was_read() {
    let mut machine = machine(1);
    let (uuid, number) = fork(&mut machine, 5);
    machine.children.opened(number, 1);
    assert_eq!(machine.children.read_code(number, 1), Ok(Progress::Alive));
    machine.children.stopped(number, 3, at(10));
    machine.children.stopped(number, 4, at(11));
    assert_eq!(machine.children.find(uuid), Some(number));
    assert_eq!(machine.children.read_code(number, 1), Ok(Progress::Stopped(3)));
    assert_eq!(machine.children.find(uuid), None);
    assert_eq!(machine.children.read_code(number, 1), Err(Gone));
}

#[test]
fn everybody_who_waited_reads_the_code() {
    let mut machine = machine(1);
    let (uuid, number) = fork(&mut machine, 5);
    // A poller has the file open, two shells wrote and will open it again.
    machine.children.opened(number, 1);
    machine.children.stopped(number, 0, at(6));
    machine.children.released(number);
    machine.children.released(number);
    for handle in [2, 3] {
        machine.children.opened(number, handle);
        assert_eq!(machine.children.read_code(number, handle), Ok(Progress::Stopped(0)));
        machine.children.closed(number, handle);
    }
    assert_eq!(machine.children.find(uuid), Some(number), "the poller has not read");
    machine.children.closed(number, 1);
    assert_eq!(machine.children.find(uuid), None);
}

#[test]
fn a_child_goes_when_the_retention_time_has_passed() {
    let mut machine = machine(1);
    let (_, stopped) = fork(&mut machine, 5);
    let (_, alive) = fork(&mut machine, 5);
    assert_eq!(machine.children.next_expiry(), None);
    machine.children.stopped(stopped, 0, at(100));
    assert_eq!(machine.children.next_expiry(), Some(at(160)));
    machine.children.expire(at(159));
    assert!(machine.children.get(stopped).is_ok());
    machine.children.expire(at(160));
    assert_eq!(machine.children.get(stopped).err(), Some(Gone));
    assert!(machine.children.get(alive).is_ok());
}

#[test]
fn the_scale_to_zero_counter() {
    let mut machine = machine(1);
    for (text, taken, value) in [
        ("+", true, 1),
        ("+\n", true, 2),
        ("-", true, 1),
        ("=7\n", true, 7),
        ("=-1", false, 7),
        ("= 3", false, 7),
        ("", false, 7),
        ("=99999999999999999999", false, 7),
        ("=0", true, 0),
        ("-", false, 0),
    ] {
        assert_eq!(machine.set_scale_to_zero(text), taken, "{text:?}");
        assert_eq!(machine.scale_to_zero_disable, value, "{text:?}");
    }
}

#[test]
fn the_first_name_that_the_host_gives_stays() {
    let mut machine = machine(1);
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    assert!(machine.welcomed(a));
    assert!(machine.welcomed(a));
    assert!(!machine.welcomed(b));
    machine.became_child((b, 1), (90, 90), at(5), false);
    assert!(machine.welcomed(b));
}

proptest! {
    #[test]
    fn the_counter_takes_any_text(text in ".*") {
        let mut machine = machine(1);
        machine.set_scale_to_zero(&text);
        prop_assert!(machine.scale_to_zero_disable >= 0);
    }

    #[test]
    fn no_request_is_lost_or_done_twice(steps in proptest::collection::vec(0_u8..5, 0..80)) {
        let mut queue = Queue::new(3);
        let (mut next, mut taken, mut ended) = (0_u32, Vec::new(), Vec::new());
        for step in steps {
            match step {
                0 | 1 => { if queue.submit(next).is_ok() { taken.push(next); } next += 1; }
                2 => ended.extend(queue.take()),
                3 => queue.done(),
                _ => ended.extend(queue.became_child(false)),
            }
            prop_assert!(queue.waiting() <= 4);
        }
        ended.extend(queue.became_child(false));
        prop_assert_eq!(ended, taken);
    }
}
