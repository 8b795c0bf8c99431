//! The fork engine on a standard KVM.

use anyhow::{Result, ensure};
use runtime::doctor::{HostKind, host_kind};
use runtime::memory::BackingKind;
use runtime::proto::InstanceConfig;
use tests::program::{check, dirty};
use tests::rig::Rig;

use super::Inside;

pub fn cases() -> Vec<Inside> {
    vec![
        ("forks::this_is_a_nested_host", kind),
        ("forks::a_bare_guest_forks_and_memory_is_its_own", isolated),
    ]
}

fn kind() -> Result<()> {
    let kind = host_kind()?;
    ensure!(kind == HostKind::Nested, "this is a host of kind {}", kind.name());
    Ok(())
}

/// At depth two, with two vCPUs: each machine has what it wrote and nothing else.
fn isolated() -> Result<()> {
    let config = InstanceConfig {
        memory_mib: 16,
        vcpus: 2,
        backing: BackingKind::Small,
        child_standbys: 1,
        ..<_>::default()
    };
    let rig = Rig::new(config)?;
    let mut of_root = rig.memory();
    rig.run(rig.root, &[dirty(50, 1, 1)])?;
    of_root.dirty(50, 1, 1);
    let child = rig.branch(rig.root, 1)?[0];
    let mut of_child = of_root.clone();
    rig.run(rig.root, &[dirty(50, 2, 2)])?;
    of_root.dirty(50, 2, 2);
    rig.run(child, &[dirty(50, 3, 3)])?;
    of_child.dirty(50, 3, 3);
    let grandchild = rig.branch(child, 1)?[0];
    for (machine, memory, what) in [
        (rig.root, &of_root, "the root"),
        (child, &of_child, "the child"),
        (grandchild, &of_child, "the grandchild"),
    ] {
        let found = rig.run(machine, &[check(0)])?[0];
        ensure!(found == memory.sum(), "the memory of {what} is not its own");
    }
    Ok(())
}
