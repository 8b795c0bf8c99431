//! Requests over a pair of sockets, as the host makes them.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Instant;

use guest_wire::{Input, Terminal, read_frame};

use super::*;

fn server() -> Arc<Server> {
    let env = BTreeMap::from([("PATH".into(), "/usr/bin:/bin".into()), ("A".into(), "b".into())]);
    Arc::new(Server {
        service: Service::new(1, Duration::ZERO),
        reaper: Reaper::of_process(),
        env,
        cwd: "/".into(),
        group: None,
        workload: Arc::new(Mutex::new(WorkloadState::Running { pid: 7 })),
        libukp: "/no/such/folder".into(),
        requests: AtomicUsize::new(0),
    })
}

fn ask(server: &Arc<Server>, request: &Request) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    server.accept(theirs.into());
    write_control(&mut &ours, request).unwrap();
    ours
}

fn program(script: &str) -> Request {
    exec(script, None, None)
}

fn on_terminal(script: &str) -> Request {
    exec(script, Some("/tmp".into()), Some(Terminal { rows: 30, cols: 90 }))
}

fn exec(script: &str, cwd: Option<String>, tty: Option<Terminal>) -> Request {
    let argv = ["sh", "-c", script].map(String::from).to_vec();
    Request::Exec { argv, env: BTreeMap::new(), cwd, tty }
}

/// Output, error output and the last message.
fn to_end(stream: &UnixStream) -> (String, String, Reply) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        let frame = read_frame(&mut &*stream).unwrap().unwrap();
        match frame.kind {
            Kind::Stdout => out.extend(frame.payload),
            Kind::Stderr => err.extend(frame.payload),
            Kind::Data => panic!("data"),
            Kind::Control if matches!(guest_wire::control(&frame), Ok(Reply::Started { .. })) => {}
            Kind::Control => {
                let text = |bytes| String::from_utf8(bytes).unwrap();
                return (text(out), text(err), guest_wire::control(&frame).unwrap());
            }
        }
    }
}

fn started(stream: &UnixStream) -> u32 {
    let Reply::Started { pid } = reply(stream) else { panic!("it did not start") };
    pid
}

fn reply(stream: &UnixStream) -> Reply {
    read_control(&mut &*stream).unwrap().unwrap()
}

#[test]
fn ping_tells_who_this_is() {
    let server = server();
    let stream = ask(&server, &Request::Ping);
    assert_eq!(reply(&stream), Reply::Pong { uuid: uuid::Uuid::nil(), generation: 0 });
    let own = uuid::Uuid::new_v4();
    server.service.welcomed(own);
    assert_eq!(reply(&ask(&server, &Request::Ping)), Reply::Pong { uuid: own, generation: 0 });
    let Reply::Status { workload, uptime_ms } = reply(&ask(&server, &Request::Status)) else {
        panic!("no status")
    };
    assert!(workload == WorkloadState::Running { pid: 7 } && uptime_ms > 0);
}

#[test]
fn output_error_output_and_exit_code() {
    let server = server();
    let stream = ask(&server, &program("echo $A; pwd; echo no >&2; exit 5"));
    assert_eq!(to_end(&stream), ("b\n/\n".into(), "no\n".into(), Reply::Exited { code: 5 }));
    assert_eq!(to_end(&ask(&server, &program("kill -15 $$"))).2, Reply::Exited { code: 143 });
}

#[test]
fn input_is_streamed_and_ended() {
    let server = server();
    let stream = ask(&server, &program("wc -c; echo end"));
    let sender = stream.try_clone().unwrap();
    let writer = thread::spawn(move || {
        for _ in 0..20 {
            write_frame(&mut &sender, Kind::Data, &vec![b'x'; 50_000]).unwrap();
        }
        write_frame(&mut &sender, Kind::Data, &[]).unwrap();
    });
    let (out, _, exit) = to_end(&stream);
    assert_eq!((out.as_str(), exit), ("1000000\nend\n", Reply::Exited { code: 0 }));
    writer.join().unwrap();
}

#[test]
fn much_output_comes_whole() {
    let server = server();
    let stream = ask(&server, &program("head -c 3000000 /dev/zero | tr '\\0' y"));
    let (out, _, exit) = to_end(&stream);
    assert_eq!((out.len(), exit), (3_000_000, Reply::Exited { code: 0 }));
}

#[test]
fn signals_reach_the_process_group() {
    let server = server();
    let stream = ask(&server, &program("echo ready; sleep 100; echo not reached"));
    let pid = started(&stream);
    assert_eq!(read_frame(&mut &stream).unwrap().unwrap().payload, b"ready\n");
    // It takes no input, and this is more than the pipe and the connection have room for.
    let writing = stream.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        let all = |_| write_frame(&mut &writing, Kind::Data, &vec![0; 30_000]);
        (0..100).try_for_each(all).unwrap_or_default();
    });
    std::thread::sleep(Duration::from_millis(100));
    assert!(!writer.is_finished());
    let signal = |number| reply(&ask(&server, &Request::Signal { pid, number }));
    assert!(matches!(signal(999), Reply::Failed { errno: libc::EINVAL, .. }));
    assert_eq!(signal(9), Reply::Done);
    assert_eq!(to_end(&stream), (String::new(), String::new(), Reply::Exited { code: 137 }));
    // The rest of its input is read for nothing or refused, whichever of two threads is first; but
    // who writes it does not stand still.
    writer.join().unwrap();
    assert_eq!(signal(9), Reply::Done, "it has ended");
}

#[test]
fn a_terminal_has_a_size_and_an_end_of_input() {
    let server = server();
    let stream =
        ask(&server, &on_terminal("test -t 0 && test -t 2; stty size; pwd; cat; stty size"));
    write_control(&mut &stream, &Input::Resize(Terminal { rows: 31, cols: 91 })).unwrap();
    write_frame(&mut &stream, Kind::Data, b"line\n").unwrap();
    write_frame(&mut &stream, Kind::Data, &[]).unwrap();
    let (out, err, exit) = to_end(&stream);
    assert_eq!((err.as_str(), exit), ("", Reply::Exited { code: 0 }));
    assert!(out.contains("/tmp\r\n") && out.contains("line\r\n"), "{out:?}");
    assert!(out.ends_with("31 91\r\n"), "{out:?}");
}

#[test]
fn the_terminals_interrupt_character_works() {
    let server = server();
    // A shell that is just starting a program may miss it.
    let stream = ask(&server, &on_terminal("echo ready; exec sleep 100"));
    started(&stream);
    assert_eq!(read_frame(&mut &stream).unwrap().unwrap().payload, b"ready\r\n");
    write_frame(&mut &stream, Kind::Data, &[3]).unwrap();
    assert_eq!(to_end(&stream).2, Reply::Exited { code: 130 });
}

#[test]
fn what_cannot_be_run_is_told() {
    let server = server();
    let run = |argv: &[&str], cwd: Option<&str>| {
        let argv = argv.iter().map(ToString::to_string).collect();
        let cwd = cwd.map(String::from);
        to_end(&ask(&server, &Request::Exec { argv, env: BTreeMap::new(), cwd, tty: None })).2
    };
    let Reply::Failed { errno, message } = run(&["no-such-program"], None) else { panic!("ran") };
    assert!(errno == libc::ENOENT && message.starts_with("no-such-program: "), "{message}");
    assert!(
        matches!(run(&[], None), Reply::Failed { errno: _, message } if message.contains("name a"))
    );
    assert!(matches!(run(&["true"], Some("/nowhere")), Reply::Failed { errno: libc::ENOENT, .. }));
    assert!(matches!(run(&["a\0b"], None), Reply::Failed { .. }));
}

/// The program has ended long before the host has taken what it wrote.
#[test]
fn what_was_written_comes_whole_however_late_it_is_taken() {
    let server = server();
    let stream = ask(&server, &program("head -c 250000 /dev/zero; exit 3"));
    thread::sleep(3 * Duration::from_millis(500));
    let (out, _, exit) = to_end(&stream);
    assert_eq!((out.len(), exit), (250_000, Reply::Exited { code: 3 }));
}

/// Who goes on writing does not keep the exit code for ever.
#[test]
fn others_that_never_stop_writing_do_not_keep_the_exit_code() {
    let server = server();
    let script = "(for i in $(seq 400); do echo x; sleep 0.05; done) & echo done; exit 4";
    let begin = Instant::now();
    let (out, _, exit) = to_end(&ask(&server, &program(script)));
    assert_eq!(exit, Reply::Exited { code: 4 });
    assert!(out.contains("done\n") && begin.elapsed() < Duration::from_secs(10), "{out:?}");
}

#[test]
fn others_that_keep_the_output_do_not_keep_the_exit_code() {
    let server = server();
    let (out, _, exit) = to_end(&ask(&server, &program("sleep 5 & echo done; exit 2")));
    assert_eq!((out.as_str(), exit), ("done\n", Reply::Exited { code: 2 }));
}

#[test]
fn a_program_goes_on_without_its_connection() {
    let server = server();
    let path = std::env::temp_dir().join(format!("guest-agent-goes-on-{}", std::process::id()));
    let script =
        format!("echo ready; cat; sleep 0.2; head -c 200000 /dev/zero; echo > {}", path.display());
    let stream = ask(&server, &program(&script));
    started(&stream);
    assert_eq!(read_frame(&mut &stream).unwrap().unwrap().payload, b"ready\n");
    drop(stream);
    let start = std::time::Instant::now();
    while !path.exists() {
        assert!(start.elapsed() < Duration::from_secs(20));
        thread::sleep(Duration::from_millis(10));
    }
    std::fs::remove_file(path).unwrap();
}

#[test]
fn files_go_both_ways() {
    let server = server();
    let path = std::env::temp_dir().join(format!("guest-agent-file-{}", std::process::id()));
    let name = path.to_str().unwrap().to_owned();
    let contents: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    let stream = ask(&server, &Request::Write { path: name.clone(), mode: 0o100_751 });
    for part in contents.chunks(60_000) {
        write_frame(&mut &stream, Kind::Data, part).unwrap();
    }
    write_frame(&mut &stream, Kind::Data, &[]).unwrap();
    assert_eq!(reply(&stream), Reply::Done);
    let stream = ask(&server, &Request::Read { path: name });
    assert_eq!(reply(&stream), Reply::File { mode: 0o751, size: 800_000 });
    let mut read = Vec::new();
    loop {
        let frame = read_frame(&mut &stream).unwrap().unwrap();
        assert_eq!(frame.kind, Kind::Data);
        if frame.payload.is_empty() {
            break;
        }
        read.extend(frame.payload);
    }
    assert!(read == contents);
    std::fs::remove_file(path).unwrap();
}

#[test]
fn what_cannot_be_copied_is_told() {
    let server = server();
    let failed = |stream: &UnixStream| match reply(stream) {
        Reply::Failed { message, .. } => message,
        other => panic!("{other:?}"),
    };
    let read = |path: &str| failed(&ask(&server, &Request::Read { path: path.into() }));
    assert!(read("/").contains("directory"));
    assert!(read("relative").contains("absolute"));
    assert!(read("/dev/zero").contains("regular"));
    assert!(read("/no/such/file").contains("No such file"));
    assert!(Path::new("/").is_dir());
    let stream = ask(&server, &Request::Write { path: "/tmp".into(), mode: 0o600 });
    for _ in 0..100 {
        write_frame(&mut &stream, Kind::Data, &vec![1; 60_000]).unwrap();
    }
    write_frame(&mut &stream, Kind::Data, &[]).unwrap();
    assert!(failed(&stream).contains("directory"));
}

#[test]
fn nonsense_is_told() {
    let server = server();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    server.accept(theirs.into());
    io::Write::write_all(&mut ours, &[7; 64]).unwrap();
    assert!(matches!(reply(&ours), Reply::Failed { errno: libc::EINVAL, .. }));
}

#[test]
fn a_fork_that_fails_says_why() {
    let Reply::Failed { errno, message } = reply(&ask(&server(), &Request::Fork)) else {
        panic!("it forked")
    };
    assert_eq!(errno, libc::ENOENT);
    assert!(message.contains("/no/such/folder/fork"), "{message}");
}
