//! Linux guests: they boot, and they fork.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use runtime::owner::Owner;
use runtime::proto::{InstanceConfig, Request};
use tests::nested::FILES;
use uuid::Uuid;

use super::Inside;

/// What the guest runs. It counts, so that it is seen to go on where it was.
pub const INIT: &str = "#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc p /proc; $b mount -t devtmpfs d /dev
echo \"@guest up $($b cut -d' ' -f1 /proc/uptime)\"
i=0
while $b true; do
    i=$((i+1)); echo \"@guest count $i\"
    $b sleep 1
done
";

/// How long a boot may take: the guest's kernel is emulated twice.
const BOOT: Duration = Duration::from_secs(100);

pub fn cases() -> Vec<Inside> {
    vec![("linux::it_boots_and_its_child_goes_on_where_it_was", boots)]
}

/// What an instance has written so far.
fn console(owner: &Owner, uuid: Uuid) -> Result<String> {
    let bytes = owner.with(uuid, |known| known.console.clone())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Waits for a line; returns the console until then.
fn wait_for(owner: &Owner, uuid: Uuid, wanted: &str, limit: Duration) -> Result<String> {
    let end = Instant::now() + limit;
    loop {
        let text = console(owner, uuid)?;
        if text.contains(wanted) {
            return Ok(text);
        }
        let exit = owner.with(uuid, |known| known.exit.clone())?;
        if exit.is_some() || Instant::now() > end {
            let last: Vec<&str> = text.lines().rev().take(20).collect();
            let last: Vec<&str> = last.into_iter().rev().collect();
            bail!("no {wanted:?}; exit {exit:?}; the console ends with {last:#?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The highest count on a console.
fn count(text: &str) -> Option<u32> {
    let counts = text.lines().filter_map(|line| line.trim().strip_prefix("@guest count "));
    counts.filter_map(|count| count.parse().ok()).max()
}

fn boots() -> Result<()> {
    let owner = Owner::new()?;
    let file = |name: &str| Path::new(FILES).join(name);
    let begin = Instant::now();
    let root = owner.start(InstanceConfig {
        memory_mib: 256,
        kernel: file("vmlinuz"),
        initrd: file("guest.gz"),
        cmdline: "console=ttyS0 panic=-1 reboot=t".to_owned(),
        ..<_>::default()
    })?;
    wait_for(&owner, root, "@guest count 2", BOOT)?;
    println!("Linux counts after {:?}", begin.elapsed());
    owner.ask(root, Request::Arm).context("arming")?;
    owner.ask(root, Request::Standbys { count: 1 }).context("making standbys")?;
    let at_fork = count(&console(&owner, root)?).context("no count")?;
    let child = owner.branch(root, 1)?[0];
    let begin = Instant::now();
    owner.wait_for(child, BOOT)?;
    let next = format!("@guest count {}", at_fork + 3);
    let said = wait_for(&owner, child, &next, BOOT)?;
    println!("its child counts on after {:?}", begin.elapsed());
    ensure!(!said.contains("@guest up"), "the child has booted: {said}");
    let first = said.lines().find_map(|line| line.trim().strip_prefix("@guest count "));
    let first: u32 = first.context("no count")?.trim().parse()?;
    ensure!((at_fork..=at_fork + 2).contains(&first), "forked at {at_fork}, goes on at {first}");
    wait_for(&owner, root, &next, BOOT).context("the parent")?;
    Ok(())
}
