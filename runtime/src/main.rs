//! The command line.
use guest_abi::param::{op, who};
use runtime::proto::*;
use std::time::Duration;
fn st(op: u32, w: u16, result: u16, args: [u64; 4]) -> WireStep {
    WireStep { op, who: w, result, args }
}
fn main() {
    runtime::owner::instance_if_asked();
    let a: Vec<u64> = std::env::args().skip(1).map(|x| x.parse().unwrap()).collect();
    let (n, mib, dirty, ann) = (a[0], a[1], a[2], a[3]);
    let owner = runtime::owner::Owner::new().unwrap();
    let mut c = InstanceConfig { memory_mib: mib as u32, ..Default::default() };
    c.vcpu_cpus = std::env::var("VCPU").map_or(0, |x| x.parse().unwrap());
    c.standby_cpus = std::env::var("SB").map_or(0, |x| x.parse().unwrap());
    c.realtime = std::env::var("RT").map_or(true, |x| x == "1");
    c.rehearse = std::env::var("REH").map_or(true, |x| x == "1");
    let root = owner.start(c).unwrap();
    println!("root {root}");
    let r = owner.run(root, &[st(op::FILL, who::ALL, 0, [7, 0, 0, 0])]).unwrap();
    println!("fill {r:?}");
    owner.ask(root, Request::Arm).unwrap();
    owner.ask(root, Request::Standbys { count: 1 }).unwrap();
    println!("armed {:?}", owner.with(root, |k| (k.armed_us, k.notes.clone())));
    let mut all: Vec<(u64, String)> = Vec::new();
    for i in 0..n {
        let seq = owner
            .program(root, 0, &[
                st(op::DIRTY_RANDOM, who::ALL, 0, [dirty, i + 1, i * 77 + 1, 0]),
                st(op::FORK, who::ALL, 10, [1, ann, ann * 2000, 0]),
                st(op::CHECK, who::CHILD, 0, [100, 0, 3, 0]),
            ])
            .unwrap();
        let rep = owner.next_fork(root, Duration::from_secs(10)).unwrap();
        if rep.failed.is_some() { println!("failed {rep:?}"); continue; }
        let ch = rep.children[0];
        owner.wait_for(ch.uuid, Duration::from_secs(5)).unwrap();
        let rr = owner.results(ch.uuid, 0, seq, Duration::from_secs(5)).unwrap();
        let pr = owner.results(root, 0, seq, Duration::from_secs(5)).unwrap();
        if i < 2 { println!("{rep:?}\n child {rr:x?}\n parent {pr:x?}"); }
        let p = rep.parent;
        all.push((rep.branch_ns().unwrap(), format!("woken {} set {} pages {} rel {} res {} | awake {} appl {} rest {} ent {} exit {} cap {} app {} priv {} flt {} pre {}", p.woken, p.settled, p.pages, p.released, p.resumed, ch.awake, ch.applied, ch.restored, ch.entered, ch.exited, rep.captured_pages, ch.applied_pages, ch.private_pages, ch.faults, ch.prewarm_ns/1000)));
        owner.kill(ch.uuid).unwrap();
        owner.wait_exit(ch.uuid, Duration::from_secs(5)).unwrap();
        owner.forget(ch.uuid);
        owner.ask(root, Request::Standbys { count: 1 }).unwrap();
        std::thread::sleep(Duration::from_millis(3));
    }
    all.sort();
    for q in [0, 10, 50, 90, 99] { let x = &all[(all.len() * q / 100).min(all.len() - 1)]; println!("p{q} {} {}", x.0, x.1); }
    println!("stats {:?}", owner.stats(root).unwrap());
}
