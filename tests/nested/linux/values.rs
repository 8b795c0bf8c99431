//! What is read and written, byte by byte, and the first thing that a workload does.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use uuid::Uuid;

use super::guest::{all_told, frozen, one, told};
use crate::Inside;

pub fn cases() -> Vec<Inside> {
    vec![
        ("libukp::every_value_ends_in_a_newline", newline),
        ("libukp::any_value_forks", any_value),
        ("libukp::the_workload_forks_as_its_first_act", first_act),
    ]
}

fn newline() -> Result<()> {
    let guest = one()?;
    let script = r#"
cd /uk/libukp; echo =0 > scale_to_zero_disable
echo 1 > fork; child=$(cat fork)
[ $child = 00000000-0000-0000-0000-000000000000 ] && { ukp exit 7; sleep 1000; }
echo 1 > vm/$child/wait
echo "@child $child"
for file in fork scale_to_zero_disable vm/$child/snapshot vm/$child/creation_time vm/$child/status \
    vm/$child/wait; do
    echo "@${file##*/} $(cat $file | od -An -c | tr -d ' \n')"
done
"#;
    let said = guest.sh(guest.root, script)?;
    let child = told(&said, "child")?;
    all_told(
        &said,
        &[
            ("fork", &format!("{child}\\n")),
            ("scale_to_zero_disable", "0\\n"),
            ("status", "Stopped\\n"),
            ("wait", "7\\n"),
        ],
    )?;
    for (file, length) in [("snapshot", 36), ("creation_time", 10)] {
        let value = told(&said, file)?;
        ensure!(value.strip_suffix("\\n").is_some_and(|value| value.len() == length), "{said}");
    }
    Ok(())
}

/// One write each. A longer one than a page is one fork, too; dd(1) has made it, so that the shell does
/// not read its child.
fn any_value() -> Result<()> {
    let guest = one()?;
    let script = r#"
cd /uk/libukp
head -c 6000 /dev/zero | tr '\0' x > /tmp/long
ls vm > /tmp/before
in_child() { [ $(cat fork) = 00000000-0000-0000-0000-000000000000 ] && { ukp exit $1; sleep 1000; }; }
printf 0 > fork; in_child 11
echo hello > fork; in_child 12
dd if=/tmp/long of=fork bs=6000 count=1 conv=notrunc 2> /tmp/dd; in_child 13
for child in $(ls vm); do grep -q $child /tmp/before || new="$new $child"; done
echo "@dd $(tr '\n' ' ' < /tmp/dd)"
echo "@new$new"
"#;
    let said = guest.sh(guest.root, script)?;
    let new = told(&said, "new")?.split(' ').map(str::parse).collect::<Result<Vec<Uuid>, _>>()?;
    let ends = new.into_iter().map(|child| Ok(guest.end_of(child)?.0));
    let mut codes = ends.collect::<Result<Vec<i32>>>()?;
    codes.sort_unstable();
    ensure!(codes == [11, 12, 13], "{codes:?}: {said}");
    Ok(())
}

/// The workload of this guest forks before it does anything else.
fn first_act() -> Result<()> {
    let guest = frozen()?;
    let end = Instant::now() + super::guest::LONG;
    let said = loop {
        let said = guest.sh(guest.root, "cat /run/first 2> /dev/null || true")?;
        if !said.is_empty() {
            break said;
        }
        ensure!(Instant::now() < end, "it has not forked: {}", guest.console(guest.root)?);
        std::thread::sleep(Duration::from_millis(200));
    };
    all_told(&said, &[("mounted", "1")])?;
    let child: Uuid = told(&said, "child")?.parse()?;
    let (code, console) = guest.end_of(child)?;
    // Its workload went on in it, and its code is the machine's.
    ensure!(code == 66, "the child ended with {code}: {console}");
    Ok(())
}
