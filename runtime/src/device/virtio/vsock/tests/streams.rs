//! What goes over connections, in either direction.

use super::*;

#[test]
fn a_megabyte_each_way_over_a_connection_of_the_host() {
    for (taste, room) in [(PLAIN, 9_000), (LINUX, 256 * 1024), (ODD, 100)] {
        let folder = Folder::new();
        let mut guest = Guest::new(&folder.0, taste);
        let (host, mut end) = guest.accept(&folder.0, 52, room);
        carries(&mut guest, &mut end, host, if taste.tx.len() > 2 { 300 } else { 4096 });
    }
}

#[test]
fn a_megabyte_each_way_over_a_connection_of_the_guest() {
    for (own, taste) in [(true, LINUX), (false, LINUX), (false, PLAIN)] {
        let folder = Folder::new();
        let mut guest = Guest::new(&folder.0, taste);
        let name = if own { format!("{}.vsock_7", guest.uuid) } else { "port_7".into() };
        let server = UnixListener::bind(folder.0.join(name)).expect("bound");
        let mut end = guest.connect(1234, 7, 20_000);
        let (mut host, _) = server.accept().expect("connected");
        if !own {
            assert_eq!(line(&mut host), guest.uuid.to_string());
        }
        carries(&mut guest, &mut end, host, 3000);
    }
}

#[test]
fn nobody_listens() {
    let folder = Folder::new();
    let mut guest = Guest::new(&folder.0, PLAIN);
    let end = End { port: 9, host_port: 99, room: 1000, taken: 0 };
    guest.send(end.header(op::REQUEST, 0), &[]);
    let (answer, _) = guest.wait_op(op::RST);
    assert_eq!((answer.src_port, answer.dst_port, answer.dst_cid), (99, 9, guest.cid));
    // And in the guest.
    let mut host = UnixStream::connect(guest.listener(&folder.0)).expect("listening");
    host.write_all(b"CONNECT 5\n").expect("open");
    let (request, _) = guest.wait_op(op::REQUEST);
    let end = End { port: 5, host_port: request.src_port, room: 0, taken: 0 };
    guest.send(end.header(op::RST, 0), &[]);
    assert_eq!(host.read(&mut [0; 8]).expect("the end of file"), 0);
}

#[test]
fn whoever_says_nonsense_is_not_connected() {
    let folder = Folder::new();
    let guest = Guest::new(&folder.0, PLAIN);
    for text in ["CONNECT x\n", "CONNECT -1\n", "GET / HTTP/1.1\r\n", "CONNECT 4294967296\n", "\n"]
    {
        let mut host = UnixStream::connect(guest.listener(&folder.0)).expect("listening");
        host.set_read_timeout(Some(LIMIT)).expect("a socket");
        host.write_all(text.as_bytes()).expect("open");
        // The end of file, or a reset if not all was read.
        assert!(host.read(&mut [0; 8]).unwrap_or(0) == 0, "{text:?}");
    }
    let mut host = UnixStream::connect(guest.listener(&folder.0)).expect("listening");
    host.set_read_timeout(Some(LIMIT)).expect("a socket");
    host.write_all(&[b'C'; 100]).expect("open");
    assert!(host.read(&mut [0; 8]).unwrap_or(0) == 0);
}

#[test]
fn a_greeting_may_come_in_pieces_with_data_behind_it() {
    let folder = Folder::new();
    let mut guest = Guest::new(&folder.0, PLAIN);
    let mut host = UnixStream::connect(guest.listener(&folder.0)).expect("listening");
    for part in ["CON", "NECT 8", "0\nhel", "lo"] {
        host.write_all(part.as_bytes()).expect("open");
        std::thread::sleep(Duration::from_millis(5));
    }
    let (request, _) = guest.wait_op(op::REQUEST);
    assert_eq!(request.dst_port, 80);
    let mut end = End { port: 80, host_port: request.src_port, room: 5000, taken: 0 };
    guest.send(end.header(op::RESPONSE, 0), &[]);
    assert_eq!(guest.receive_all(&mut end, 5), b"hello");
}

#[test]
fn the_host_stops_sending_when_the_guest_has_no_room() {
    let folder = Folder::new();
    let mut guest = Guest::new(&folder.0, PLAIN);
    let (mut host, mut end) = guest.accept(&folder.0, 1, 100);
    host.write_all(&noise(1000, 1)).expect("written");
    let mut got = Vec::new();
    while got.len() < 100 {
        let (header, data) = guest.wait_op(op::RW);
        end.taken += header.len;
        got.extend(data);
    }
    assert_eq!(got.len(), 100, "more than there was room for");
    guest.wait_op(op::CREDIT_REQUEST);
    std::thread::sleep(Duration::from_millis(50));
    assert!(guest.poll().is_none(), "there is no room");
    guest.send(end.header(op::CREDIT_UPDATE, 0), &[]);
    let (header, _) = guest.wait_op(op::RW);
    assert_eq!(header.len, 100);
}

#[test]
fn the_guest_has_as_much_room_as_it_was_told_and_not_more() {
    let folder = Folder::new();
    let mut guest = Guest::new(&folder.0, PLAIN);
    let (host, end) = guest.accept(&folder.0, 1, 1000);
    // The host does not read: its socket takes some, the device the rest.
    let mut sent = 0_usize;
    let (mut room, mut passed) = (64 * 1024_u32, 0_u32);
    loop {
        while let Some((header, _)) = guest.poll() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            (room, passed) = (header.buf_alloc, header.fwd_cnt);
        }
        let kept = u32::try_from(sent).expect("small") - passed;
        if kept + 4096 > room {
            std::thread::sleep(Duration::from_millis(50));
            match guest.poll() {
                Some((header, _)) => (room, passed) = (header.buf_alloc, header.fwd_cnt),
                None => break,
            }
            continue;
        }
        guest.send(end.header(op::RW, 0), &[7; 4096]);
        sent += 4096;
    }
    // One byte more than all that may be kept.
    for _ in 0..18 {
        guest.send(end.header(op::RW, 0), &[7; 4096]);
    }
    guest.wait_op(op::RST);
    drop(host);
}

#[test]
fn either_end_may_close_one_direction() {
    let folder = Folder::new();
    let mut guest = Guest::new(&folder.0, LINUX);
    let (mut host, mut end) = guest.accept(&folder.0, 1, 1000);
    // The host has said all, and still listens.
    host.write_all(b"question").expect("open");
    host.shutdown(Shutdown::Write).expect("open");
    assert_eq!(guest.receive_all(&mut end, 8), b"question");
    let (header, _) = guest.wait_op(op::SHUTDOWN);
    assert_eq!(header.flags, shutdown::SEND);
    guest.send(end.header(op::RW, 0), b"answer");
    guest.send(end.header(op::SHUTDOWN, shutdown::BOTH), &[]);
    guest.wait_op(op::RST);
    let mut text = String::new();
    host.read_to_string(&mut text).expect("the end of file");
    assert_eq!(text, "answer");
    // The other way round.
    let (mut host, mut end) = guest.accept(&folder.0, 2, 1000);
    guest.send(end.header(op::RW, 0), b"question");
    guest.send(end.header(op::SHUTDOWN, shutdown::SEND), &[]);
    text.clear();
    host.read_to_string(&mut text).expect("the end of file");
    assert_eq!(text, "question");
    host.write_all(b"answer").expect("open");
    drop(host);
    assert_eq!(guest.receive_all(&mut end, 6), b"answer");
    guest.wait("the end", |header| header.flags == shutdown::BOTH && header.dst_port == 2);
    guest.send(end.header(op::RST, 0), &[]);
}

#[test]
fn what_the_guest_wrote_before_it_left_is_read_by_a_slow_host() {
    let folder = Folder::new();
    let mut guest = Guest::new(&folder.0, LINUX);
    let (mut host, end) = guest.accept(&folder.0, 1, 1000);
    let data = noise(300_000, 9);
    let (left, has_left) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        // So slowly that there is something left to be read when the guest has left.
        while has_left.try_recv().is_err() {
            let mut some = [0; 1000];
            host.read_exact(&mut some).expect("the guest has not left");
            all.extend(some);
            std::thread::sleep(Duration::from_millis(1));
        }
        // Longer than anything else is waited for.
        std::thread::sleep(Duration::from_secs(11));
        host.read_to_end(&mut all).expect("the end of file");
        all
    });
    guest.send_all(&end, &data, 4096);
    guest.send(end.header(op::SHUTDOWN, shutdown::BOTH), &[]);
    guest.send(end.header(op::RST, 0), &[]);
    left.send(()).expect("it reads");
    assert!(reader.join().expect("read") == data);
}

#[test]
fn a_host_that_is_gone_is_told() {
    let folder = Folder::new();
    let mut guest = Guest::new(&folder.0, LINUX);
    let (host, end) = guest.accept(&folder.0, 1, 1000);
    drop(host);
    // That it said all may be noticed before.
    guest.wait("the end", |header| header.op == op::SHUTDOWN && header.flags == shutdown::BOTH);
    // What the guest has already sent is no reason to complain.
    guest.send(end.header(op::RW, 0), b"too late");
    guest.send(end.header(op::SHUTDOWN, shutdown::BOTH), &[]);
    guest.wait_op(op::RST);
}
