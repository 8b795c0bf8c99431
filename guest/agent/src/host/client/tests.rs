use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};

use guest_wire::Status;

use super::*;

/// A client whose connections come out of the receiver, on the host's side, not welcomed yet.
fn client() -> (Client, Receiver<UnixStream>) {
    let (sender, receiver): (Sender<UnixStream>, _) = channel();
    let sender = Mutex::new(sender);
    let connect: Connect = Box::new(move || {
        let (ours, theirs) = UnixStream::pair()?;
        theirs.set_read_timeout(Some(Duration::from_secs(10)))?;
        lock(&sender).send(theirs).map_err(io::Error::other)?;
        Ok(ours.into())
    });
    (Client::start(connect, Box::new(|_| true)).unwrap(), receiver)
}

fn accept(connections: &Receiver<UnixStream>) -> UnixStream {
    let mut stream = connections.recv_timeout(Duration::from_secs(10)).unwrap();
    write_control(&mut stream, &Answer::Welcome { uuid: Uuid::new_v4() }).unwrap();
    stream
}

fn question_of(stream: &mut UnixStream) -> Question {
    read_control(stream).unwrap().unwrap()
}

#[test]
fn answers_come_in_any_order() {
    let (client, connections) = client();
    let mut host = accept(&connections);
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    let (sender, codes) = channel();
    let wait = |uuid| {
        let sender = sender.clone();
        client.wait(uuid, Box::new(move |code| sender.send((uuid, code)).unwrap()));
    };
    wait(a);
    wait(b);
    let (Question::Wait { id: id_a, .. }, Question::Wait { id: id_b, uuid }) =
        (question_of(&mut host), question_of(&mut host))
    else {
        panic!("not what was asked")
    };
    assert_eq!(uuid, b);
    write_control(&mut host, &Answer::Stopped { id: id_b, code: 2 }).unwrap();
    assert_eq!(codes.recv_timeout(Duration::from_secs(10)), Ok((b, Ok(2))));
    write_control(&mut host, &Answer::Unknown { id: id_a }).unwrap();
    assert_eq!(codes.recv_timeout(Duration::from_secs(10)), Ok((a, Err(HostError::Unknown))));
    client.close();
}

#[test]
fn open_questions_are_asked_again_after_a_reset() {
    let (client, connections) = client();
    let mut host = accept(&connections);
    let uuid = Uuid::new_v4();
    let (sender, infos) = channel();
    client.child(uuid, Box::new(move |info| sender.send(info).unwrap()));
    let asked = question_of(&mut host);
    drop(host);
    let mut host = accept(&connections);
    assert_eq!(question_of(&mut host), asked);
    let Question::Child { id, .. } = asked else { panic!("not what was asked") };
    let info = ChildInfo { status: Status::Running, creation_time: 1, snapshot: uuid, exit: None };
    write_control(&mut host, &Answer::Child { id, info }).unwrap();
    assert_eq!(infos.recv_timeout(Duration::from_secs(10)), Ok(Ok(info)));
    client.close();
}

#[test]
fn a_child_gives_up_the_questions_of_its_parent() {
    let (client, connections) = client();
    let mut host = accept(&connections);
    let (sender, codes) = channel();
    client.wait(Uuid::new_v4(), Box::new(move |code| sender.send(code).unwrap()));
    question_of(&mut host);
    client.became_child();
    assert_eq!(codes.recv_timeout(Duration::from_secs(10)), Ok(Err(HostError::OfParent)));
    let mut host = accept(&connections);
    host.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(read_control::<Question>(&mut host).is_err(), "nothing is asked again");
    client.close();
}

#[test]
fn a_host_that_talks_nonsense_is_left_and_tried_again() {
    let (client, connections) = client();
    let mut host = accept(&connections);
    io::Write::write_all(&mut host, &[0xff; 32]).unwrap();
    accept(&connections);
    client.close();
}
