//! Too many, too much, and what nobody asked for.

use proptest::prelude::*;

use super::*;

#[test]
fn packets_of_no_connection_are_refused_and_refusals_are_not() {
    let folder = Folder::new();
    let mut guest = Guest::new(&folder.0, PLAIN);
    for (number, wrong) in (1..).zip([op::RW, op::RESPONSE, op::SHUTDOWN, op::CREDIT_REQUEST, 77]) {
        let end = End { port: number, host_port: 4, room: 0, taken: 0 };
        guest.send(end.header(wrong, 0), b"");
        let (answer, _) = guest.wait("a refusal", |header| header.dst_port == number);
        assert_eq!(answer.op, op::RST);
    }
    guest.send(End { port: 50, host_port: 4, room: 0, taken: 0 }.header(op::RST, 0), &[]);
    std::thread::sleep(Duration::from_millis(30));
    assert!(guest.poll().is_none());
}

#[test]
fn no_more_connections_than_there_may_be() {
    let folder = Folder::new();
    let mut guest = Guest::new(&folder.0, LINUX);
    let server = UnixListener::bind(folder.0.join("port_1")).expect("bound");
    let accepting = std::thread::spawn(move || {
        let hosts: Vec<_> = (0..1024).map(|_| server.accept().expect("connected").0).collect();
        (hosts, server)
    });
    for port in 0..1024 {
        let end = End { port, host_port: 1, room: 10, taken: 0 };
        guest.send(end.header(op::REQUEST, 0), &[]);
        // A unix socket's backlog is short.
        guest.wait("an answer", |header| header.dst_port == port && header.op == op::RESPONSE);
    }
    let (hosts, _server) = accepting.join().expect("all");
    guest.send(End { port: 2000, host_port: 1, room: 10, taken: 0 }.header(op::REQUEST, 0), &[]);
    let (answer, _) = guest.wait("an answer", |header| header.dst_port == 2000);
    assert_eq!(answer.op, op::RST);
    // The host waits at the door until one has left.
    let mut late = UnixStream::connect(guest.listener(&folder.0)).expect("listening");
    late.write_all(b"CONNECT 3\n").expect("open");
    std::thread::sleep(Duration::from_millis(30));
    assert!(guest.poll().is_none());
    guest.send(End { port: 0, host_port: 1, room: 10, taken: 0 }.header(op::RST, 0), &[]);
    guest.wait_op(op::REQUEST);
    drop(hosts);
}

#[test]
fn a_guest_that_has_no_buffers_gets_everything_when_it_has() {
    let folder = Folder::new();
    let mut guest = Guest::bare(&folder.0, LINUX);
    let mut host = UnixStream::connect(guest.listener(&folder.0)).expect("listening");
    host.write_all(b"CONNECT 3\n").expect("open");
    let end = End { port: 9, host_port: 99, room: 0, taken: 0 };
    guest.send(end.header(op::REQUEST, 0), &[]);
    std::thread::sleep(Duration::from_millis(30));
    guest.fill();
    guest.wait_op(op::REQUEST);
    guest.wait_op(op::RST);
}

#[test]
fn more_packets_than_there_is_room_for_refusals_wait_for_it() {
    let folder = Folder::new();
    let mut guest = Guest::bare(&folder.0, LINUX);
    for port in 0..300 {
        let end = End { port, host_port: 99, room: 0, taken: 0 };
        guest.send(end.header(op::RW, 0), b"x");
    }
    std::thread::sleep(Duration::from_millis(30));
    guest.fill();
    for port in 0..300 {
        guest.wait("a refusal", |header| header.dst_port == port && header.op == op::RST);
    }
}

#[test]
fn the_socket_goes_with_the_instance() {
    let folder = Folder::new();
    let guest = Guest::new(&folder.0, PLAIN);
    let path = guest.listener(&folder.0);
    assert!(path.exists());
    drop(guest);
    assert!(!path.exists());
    let long = Path::new("/").join("x".repeat(80));
    assert!(Vsock::new(&long, Uuid::new_v4()).is_err());
}

/// It is told in one line, and whoever has the path keeps it.
#[test]
fn a_socket_path_in_use_is_told_and_stays() {
    let folder = Folder::new();
    let uuid = Uuid::new_v4();
    let path = folder.0.join(format!("{uuid}.vsock"));
    let _theirs = UnixListener::bind(&path).expect("bound");
    let mut device = Vsock::new(&folder.0, uuid).expect("short");
    let error = crate::sys::chain(&device.open().expect_err("it is in use"));
    assert!(error.starts_with(&format!("cannot listen on {}", path.display())), "{error}");
    assert!(error.contains("in use") && !error.contains('\n'), "{error}");
    device.close();
    assert!(UnixStream::connect(&path).is_ok(), "it is theirs");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn whatever_packets_come_the_device_goes_on(
        packets in prop::collection::vec(
            (
                0_u32..6, prop_oneof![Just(7_u32), 0_u32..9], 0_u16..9, any::<u32>(), any::<u32>(),
                any::<u32>(), 0_usize..200, prop::option::weighted(0.2, any::<u32>()),
            ),
            1..80,
        ),
        raw in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let folder = Folder::new();
        let mut guest = Guest::new(&folder.0, LINUX);
        let _server = UnixListener::bind(folder.0.join("port_7")).expect("bound");
        for (src_port, dst_port, op, flags, buf_alloc, fwd_cnt, len, lie) in packets {
            let header = Header {
                src_cid: guest.cid, dst_cid: HOST, src_port, dst_port, op, flags, buf_alloc,
                fwd_cnt, kind: STREAM, len: lie.unwrap_or(u32::try_from(len).expect("small")),
            };
            let packet = [&header.bytes()[..], &vec![1; len]].concat();
            let ram = guest.ram();
            until("room", || {
                while guest.tx.take(&ram).is_some() {}
                guest.tx.add(&ram, Some(&packet)).is_some()
            });
            guest.rig.kick(1);
            while guest.poll().is_some() {}
        }
        let ram = guest.ram();
        until("room for what is no packet", || {
            while guest.tx.take(&ram).is_some() {}
            guest.tx.add(&ram, Some(&raw)).is_some()
        });
        guest.rig.kick(1);
        let (host, mut end) = guest.accept(&folder.0, 4000, 10_000);
        drop(host);
        let (header, _) = guest.wait("the end", |header| {
            header.op == op::SHUTDOWN && header.dst_port == 4000
        });
        end.hear(&header);
        prop_assert!(!guest.rig.is_broken());
    }
}
