//! A child's connections are its own.

use super::*;

/// What Linux does with the event of its birth: end its connections, give the buffer back.
fn understand(child: &mut Guest) {
    let ram = child.ram();
    let mut event = None;
    until("the event", || {
        event = child.events.take(&ram);
        event.is_some()
    });
    assert_eq!(event.expect("taken"), [0; 4], "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET");
    let mut config = [0; 8];
    let at = u64::from(child.rig.window.start + reg::VIRTIO_MMIO_CONFIG);
    child.rig.bus.read(at, &mut config);
    assert_ne!(u64::from_le_bytes(config), child.cid, "the CID is the parent's");
    child.cid = u64::from_le_bytes(config);
    assert_eq!(child.cid, u64::from(cid(child.uuid)));
    child.events.add(&ram, None).expect("free");
    child.rig.kick(2);
}

#[test]
fn a_child_loses_the_connections_of_its_parent_and_gets_its_own() {
    for taste in [PLAIN, LINUX] {
        let folder = Folder::new();
        let mut parent = Guest::new(&folder.0, taste);
        let (mut host, mut end) = parent.accept(&folder.0, 52, 5000);
        parent.send(end.header(op::RW, 0), b"before");
        let mut text = [0; 6];
        host.read_exact(&mut text).expect("read");
        assert_eq!(&text, b"before");
        let mut child = parent.fork(&folder.0);
        child.rig.go();
        // A packet of the old connection, sent before the guest has understood.
        child.send(end.header(op::RW, 0), b"lost");
        let (answer, _) = child.wait_op(op::RST);
        assert_eq!((answer.dst_port, answer.dst_cid), (52, parent.cid));
        // Who connects before it has is let in afterwards.
        let path = child.listener(&folder.0);
        let mut early = UnixStream::connect(path).expect("listening");
        early.write_all(b"CONNECT 52\n").expect("open");
        std::thread::sleep(Duration::from_millis(20));
        assert!(child.poll().is_none(), "let in too early");
        understand(&mut child);
        let (request, _) = child.wait_op(op::REQUEST);
        assert_eq!((request.dst_port, request.dst_cid), (52, child.cid));
        // It is the first connection in either machine, and the child's guest knows the other, too.
        assert_ne!(request.src_port, end.host_port);
        let (host_of_child, mut own) = child.accept(&folder.0, 53, 5000);
        carries(&mut child, &mut own, host_of_child, 4000);
        // The parent's goes on.
        parent.send(end.header(op::RW, 0), b" and after");
        let mut text = [0; 10];
        host.read_exact(&mut text).expect("read");
        assert_eq!(&text, b" and after");
        host.write_all(b"yes").expect("open");
        assert_eq!(parent.receive_all(&mut end, 3), b"yes");
        assert!(parent.events.take(&parent.ram()).is_none(), "the parent was not born");
    }
}

#[test]
fn packets_on_their_way_at_the_fork_are_answered_in_the_child() {
    let folder = Folder::new();
    let mut parent = Guest::new(&folder.0, LINUX);
    let (mut host, end) = parent.accept(&folder.0, 52, 5000);
    let header = Header {
        src_cid: parent.cid,
        dst_cid: HOST,
        len: 5,
        kind: STREAM,
        ..end.header(op::RW, 0)
    };
    let packet = [&header.bytes()[..], b"hello"].concat();
    // The driver has put them into the queue, and even asked whether the device wants to know.
    let mut child = parent.fork_after(&folder.0, |tx, ram| {
        while tx.take(ram).is_some() {}
        for _ in 0..3 {
            tx.add(ram, Some(&packet)).expect("free");
        }
        tx.wants_kick(ram, true);
    });
    child.rig.go();
    for _ in 0..3 {
        child.wait_op(op::RST);
    }
    let ram = child.ram();
    until("the buffers", || child.tx.take(&ram).is_some());
    // And the next packet, which the driver notifies the device of only if it was asked to.
    child.send(end.header(op::RW, 0), b"again");
    child.wait_op(op::RST);
    // The parent's device was not disturbed.
    parent.rig.kick(1);
    let mut text = [0; 15];
    host.read_exact(&mut text).expect("read");
    assert_eq!(&text, b"hellohellohello");
}

#[test]
fn a_child_without_buffers_hears_of_its_birth_when_it_has() {
    let folder = Folder::new();
    let mut parent = Guest::bare(&folder.0, LINUX);
    let mut child = parent.fork(&folder.0);
    child.rig.go();
    let end = End { port: 1, host_port: 1, room: 0, taken: 0 };
    child.send(end.header(op::RW, 0), b"x");
    std::thread::sleep(Duration::from_millis(20));
    child.fill();
    child.wait_op(op::RST);
    child.events.add(&child.ram(), None).expect("free");
    child.rig.kick(2);
    understand(&mut child);
    // Half used queues: a grandchild of it.
    let (_host, own) = child.accept(&folder.0, 7, 100);
    let mut grandchild = child.fork(&folder.0);
    grandchild.rig.go();
    grandchild.events.add(&grandchild.ram(), None);
    grandchild.rig.kick(2);
    understand(&mut grandchild);
    grandchild.send(own.header(op::RW, 0), b"x");
    grandchild.wait_op(op::RST);
    let (host, mut end) = grandchild.accept(&folder.0, 8, 1000);
    carries(&mut grandchild, &mut end, host, 1000);
}

#[test]
fn a_guest_that_never_understands_is_connected_all_the_same() {
    let folder = Folder::new();
    let mut parent = Guest::new(&folder.0, PLAIN);
    let mut child = parent.fork(&folder.0);
    child.rig.go();
    let path = child.listener(&folder.0);
    let mut host = UnixStream::connect(path).expect("listening");
    host.write_all(b"CONNECT 1\n").expect("open");
    child.wait_op(op::REQUEST);
}
