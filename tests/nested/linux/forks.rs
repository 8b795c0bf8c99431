//! `fork`, from a shell.

use std::sync::OnceLock;

use anyhow::{Context, Result, bail, ensure};
use uuid::Uuid;

use super::guest::{LONG, ZERO, all_told, one, told};
use crate::Inside;

pub fn cases() -> Vec<Inside> {
    vec![
        ("libukp::fork_is_empty_before_any_fork", empty_before),
        ("libukp::the_parent_reads_the_uuid_of_its_child", parent_reads),
        ("libukp::the_child_reads_the_zero_uuid", child_reads),
        ("libukp::vm_is_empty_in_the_child", empty_vm),
        ("libukp::a_forked_child_forks", nested_fork),
        ("libukp::a_child_is_read_by_who_did_not_fork_it", apart),
        ("libukp::wait_blocks_until_the_child_has_stopped", waits),
        ("libukp::a_child_is_gone_once_its_code_was_read", gone),
        ("libukp::the_shell_idiom_forks_in_a_loop", in_a_loop),
        ("identity::random_bytes_differ_right_after_the_fork", random),
    ]
}

/// What a user types, and what each of three machines says of it.
const SCRIPT: &str = r#"
zero=00000000-0000-0000-0000-000000000000
random() { head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n'; }
cd /uk/libukp
echo "@before $(cat fork | wc -c)"
echo 1 > fork
bytes=$(random)
child=$(cat fork)
if [ "$child" = "$zero" ]; then
    exec > /dev/console 2>&1
    echo "@read $child"
    echo "@random $bytes"
    echo "@vm $(ls vm | wc -l)"
    echo 1 > fork
    bytes=$(random)
    child=$(cat fork)
    if [ "$child" = "$zero" ]; then
        echo "@grandchild $child"
        echo "@grandchild-random $bytes"
        echo "@grandchild-vm $(ls vm | wc -l)"
        ukp exit 9
        sleep 1000
    fi
    echo "@forked $child"
    echo "@forked-vm $(ls vm)"
    echo 1 > vm/$child/wait
    echo "@code $(cat vm/$child/wait)"
    sleep 1
    ukp exit 3
    sleep 1000
fi
echo "@read $child"
echo "@random $bytes"
echo "@vm $(ls vm)"
echo 1 > vm/$child/wait
echo "@stopped $(cat vm/$child/status)"
echo "@code $(cat vm/$child/wait)"
echo "@after $(ls vm | wc -l)"
"#;

/// What came of it.
struct Story {
    root: Uuid,
    child: Uuid,
    /// Of the child, as the host knows it.
    parent: Option<Uuid>,
    /// Of the grandchild.
    grandparent: Option<Uuid>,
    in_root: String,
    in_child: String,
    in_grandchild: String,
    codes: (i32, i32),
}

fn story() -> Result<&'static Story> {
    static STORY: OnceLock<Result<Story, String>> = OnceLock::new();
    let happened = STORY.get_or_init(|| happens().map_err(|error| format!("{error:#}")));
    happened.as_ref().map_err(|error| anyhow::anyhow!("{error}"))
}

fn happens() -> Result<Story> {
    let guest = one()?;
    let in_root = guest.sh(guest.root, SCRIPT)?;
    let child: Uuid = told(&in_root, "read")?.parse().with_context(|| in_root.clone())?;
    let (code, in_child) = guest.end_of(child)?;
    let forked: Uuid = told(&in_child, "forked")?.parse().with_context(|| in_child.clone())?;
    let (forked_code, in_grandchild) = guest.end_of(forked)?;
    let parent = |uuid| guest.owner.with(uuid, |known| known.parent);
    Ok(Story {
        root: guest.root,
        child,
        parent: parent(child)?,
        grandparent: parent(forked)?,
        in_root,
        in_child,
        in_grandchild,
        codes: (code, forked_code),
    })
}

fn empty_before() -> Result<()> {
    all_told(&story()?.in_root, &[("before", "0")])
}

fn parent_reads() -> Result<()> {
    let Story { root, child, parent, in_root, .. } = story()?;
    ensure!(*parent == Some(*root), "the host knows {parent:?} as parent of {child}");
    let text = child.to_string();
    ensure!(child.get_version_num() == 4, "{child}");
    all_told(in_root, &[("read", &text), ("vm", &text)])
}

fn child_reads() -> Result<()> {
    all_told(&story()?.in_child, &[("read", ZERO)])
}

fn empty_vm() -> Result<()> {
    let Story { in_child, in_grandchild, .. } = story()?;
    all_told(in_child, &[("vm", "0")])?;
    all_told(in_grandchild, &[("grandchild-vm", "0")])
}

fn nested_fork() -> Result<()> {
    let Story { child, grandparent, in_child, in_grandchild, codes, .. } = story()?;
    ensure!(*grandparent == Some(*child), "the host knows {grandparent:?} as its parent");
    let forked = told(in_child, "forked")?;
    all_told(in_child, &[("forked-vm", forked), ("code", "9")])?;
    all_told(in_grandchild, &[("grandchild", ZERO)])?;
    ensure!(codes.1 == 9, "the host heard {}", codes.1);
    Ok(())
}

fn waits() -> Result<()> {
    let Story { in_root, codes, .. } = story()?;
    ensure!(codes.0 == 3, "the host heard {}", codes.0);
    all_told(in_root, &[("stopped", "Stopped"), ("code", "3")])
}

fn gone() -> Result<()> {
    all_told(&story()?.in_root, &[("after", "0")])
}

fn random() -> Result<()> {
    let Story { in_root, in_child, in_grandchild, .. } = story()?;
    let all = [
        told(in_root, "random")?,
        told(in_child, "random")?,
        told(in_grandchild, "grandchild-random")?,
    ];
    ensure!(all.iter().all(|bytes| bytes.len() == 32), "{all:?}");
    ensure!(all[0] != all[1] && all[1] != all[2] && all[0] != all[2], "{all:?}");
    Ok(())
}

/// As the specification writes it: fork, read, wait, read.
fn in_a_loop() -> Result<()> {
    let guest = one()?;
    let script = r#"
cd /uk/libukp
echo "@before $(echo $(ls vm))"
for i in 1 2 3 4 5 6 7 8; do
    echo 1 > fork
    child=$(cat fork)
    if [ "$child" = 00000000-0000-0000-0000-000000000000 ]; then
        ukp exit $i
        sleep 1000
    fi
    all="$all $child"
done
echo "@all" $all
echo "@vm" $(ls vm)
for child in $all; do
    echo 1 > vm/$child/wait
    codes="$codes $(cat vm/$child/wait)"
done
echo "@codes" $codes
"#;
    let said = guest.run_long(guest.root, script, LONG * 3)?.out;
    let uuids = |name: &str| -> Result<Vec<Uuid>> {
        Ok(told(&said, name)?.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
    };
    let (all, before, mut listed) = (uuids("all")?, uuids("before")?, uuids("vm")?);
    // Those of other tests, whose codes nobody has read.
    listed.retain(|child| !before.contains(child));
    let mut apart = all.clone();
    apart.sort_unstable();
    apart.dedup();
    listed.sort_unstable();
    ensure!(apart.len() == 8 && listed == apart, "{all:?}, listed {listed:?}");
    all_told(&said, &[("codes", "1 2 3 4 5 6 7 8")])?;
    for (child, expected) in all.into_iter().zip(1..) {
        let (code, _) = guest.end_of(child)?;
        if code != expected {
            bail!("the host heard {code} of child {expected}");
        }
    }
    Ok(())
}

/// Programs that the host runs, of which none started another, in a child. What the host forks there
/// says nothing to them; what one of them forks does to the next, as it would in a root.
fn apart() -> Result<()> {
    let guest = one()?;
    let child = guest.fork()?;
    let read = |instance| guest.sh(instance, "cat /uk/libukp/fork");
    let by_host = *guest.owner.branch(child, 1)?.first().context("no child")?;
    guest.ready(by_host)?;
    ensure!(read(child)?.trim() == ZERO, "the host forked it");
    guest.sh(child, "echo 1 > /uk/libukp/fork")?;
    let grandchild: Uuid = read(child)?.trim().parse()?;
    guest.ready(grandchild)?;
    ensure!(!grandchild.is_nil() && grandchild != by_host, "{grandchild}");
    ensure!(read(grandchild)?.trim() == ZERO, "the grandchild");
    for instance in [grandchild, by_host, child] {
        guest.exit(instance, 0)?;
    }
    // Others look at what is in `vm/`: a child is gone from it once its code was read.
    guest.sh(guest.root, &format!("ukp wait {child}")).map(drop)
}
