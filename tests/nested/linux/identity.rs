//! A child is somebody else, and lives at the same time.

use std::sync::OnceLock;

use anyhow::{Result, ensure};
use uuid::Uuid;

use super::guest::{Guest, one, shell, told};
use crate::Inside;

pub fn cases() -> Vec<Inside> {
    vec![
        ("identity::a_child_answers_with_its_own_uuid", pings),
        ("identity::machine_ids_are_the_uuids_of_children", machine_ids),
        ("identity::a_machine_id_that_is_read_only_is_another_all_the_same", read_only_id),
        ("identity::host_names_have_the_uuid_in_them", host_names),
        ("identity::random_bytes_and_uuids_differ_in_all_machines", random),
        ("identity::the_generation_is_another_in_a_child", generations),
        ("identity::the_acpi_generation_id_is_another_in_each_machine", acpi_generations),
        ("identity::the_boot_id_is_the_parent_s", boot_ids),
    ]
}

/// What is known of a machine.
#[derive(Debug)]
struct Machine {
    uuid: Uuid,
    generation: u64,
    said: String,
}

/// The root before it forks, and two children.
fn machines() -> Result<&'static [Machine]> {
    static MACHINES: OnceLock<Result<Vec<Machine>, String>> = OnceLock::new();
    let machines = MACHINES.get_or_init(|| three().map_err(|error| format!("{error:#}")));
    machines.as_deref().map_err(|error| anyhow::anyhow!("{error}"))
}

fn three() -> Result<Vec<Machine>> {
    let guest = one()?;
    let mut machines = vec![machine(&guest, guest.root)?];
    for _ in 0..2 {
        let child = guest.fork()?;
        machines.push(machine(&guest, child)?);
        guest.exit(child, 0)?;
    }
    Ok(machines)
}

fn machine(guest: &Guest, uuid: Uuid) -> Result<Machine> {
    let script = r#"
echo "@generation $(cat /run/ukp/generation)"
echo "@machine-id $(cat /etc/machine-id)"
echo "@host-name $(hostname)"
echo "@random $(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')"
echo "@uuid $(cat /proc/sys/kernel/random/uuid)"
echo "@acpi $(cat /sys/bus/acpi/devices/UKPF0001:00/modalias)"
echo "@acpi-id $(dd if=/dev/mem bs=16 skip=$((0xfe000 / 16)) count=1 2>&- | od -An -tx1 | tr -d ' \n')"
echo "@acpi-events $(awk '/ACPI:Ged/ { print $2 }' /proc/interrupts)"
echo "@boot $(cat /proc/sys/kernel/random/boot_id)"
"#;
    let generation = guest.ready(uuid)?;
    let said = guest.sh(uuid, script)?;
    Ok(Machine { uuid, generation, said })
}

fn differ(name: &str) -> Result<()> {
    let machines = machines()?;
    let mut values =
        machines.iter().map(|machine| told(&machine.said, name)).collect::<Result<Vec<_>>>()?;
    values.sort_unstable();
    values.dedup();
    ensure!(values.len() == machines.len(), "{name}: {values:?}");
    Ok(())
}

fn pings() -> Result<()> {
    // `machine` has heard each of them.
    let machines = machines()?;
    ensure!(machines[0].uuid != machines[1].uuid && machines[1].uuid != machines[2].uuid);
    Ok(())
}

/// The kernel makes it once, and has no way to set it: `guest/agent/README.md` says what to use. If
/// this fails, something has been done about it, and that has to say so, too.
fn boot_ids() -> Result<()> {
    let machines = machines()?;
    let root = told(&machines[0].said, "boot")?;
    ensure!(root.parse::<Uuid>().is_ok_and(|id| id.get_version_num() == 4), "{root}");
    for Machine { uuid, said, .. } in &machines[1..] {
        let boot = told(said, "boot")?;
        ensure!(boot == root, "{uuid} has {boot}, the root {root}");
    }
    let set = "echo 00000000-0000-4000-8000-000000000000 > /proc/sys/kernel/random/boot_id";
    let guest = one()?;
    let output = guest.run(guest.root, &shell(set), &[])?;
    ensure!(output.code != 0, "it can be set: {output:?}");
    // What that file offers to those who want another.
    let over = "cat /proc/sys/kernel/random/uuid > /run/boot_id &&
        mount --bind /run/boot_id /proc/sys/kernel/random/boot_id
        cat /proc/sys/kernel/random/boot_id";
    let other = guest.sh(guest.root, &format!("unshare -m sh -c '{over}'"))?;
    ensure!(other.trim() != root && other.trim().parse::<Uuid>().is_ok(), "{other}");
    Ok(())
}

fn machine_ids() -> Result<()> {
    differ("machine-id")?;
    for machine in &machines()?[1..] {
        let id = told(&machine.said, "machine-id")?;
        ensure!(id == machine.uuid.simple().to_string(), "{} has {id}", machine.uuid);
    }
    Ok(())
}

fn read_only_id() -> Result<()> {
    let guest = one()?;
    let child = guest.fork()?;
    let fork = "mkdir /run/etc && cp -a /etc/. /run/etc && mount --bind /run/etc /etc &&
        mount -o remount,bind,ro /etc && ! touch /etc/machine-id 2>&- &&
        echo 1 > /uk/libukp/fork && cat /uk/libukp/fork";
    let mut machine = child;
    // What was mounted for the first is written to for the second.
    for script in [fork, "echo 1 > /uk/libukp/fork && cat /uk/libukp/fork"] {
        let parent = machine;
        machine = guest.sh(parent, script)?.trim().parse()?;
        guest.ready(machine)?;
        let id = |machine| guest.sh(machine, "cat /etc/machine-id");
        ensure!(id(machine)?.trim() == machine.simple().to_string(), "{machine}");
        ensure!(id(parent)?.trim() == parent.simple().to_string(), "{parent}");
    }
    guest.exit(machine, 0)?;
    guest.exit(child, 0)
}

fn host_names() -> Result<()> {
    for machine in machines()? {
        let name = told(&machine.said, "host-name")?;
        ensure!(name == format!("node-{}", machine.uuid), "{} has {name}", machine.uuid);
    }
    Ok(())
}

fn random() -> Result<()> {
    differ("random")?;
    differ("uuid")
}

fn generations() -> Result<()> {
    let machines = machines()?;
    for machine in machines {
        let read = told(&machine.said, "generation")?;
        ensure!(read == machine.generation.to_string(), "{read}, pinged {}", machine.generation);
    }
    let of = |at: usize| machines[at].generation;
    ensure!(of(0) == 0 && of(1) != 0 && of(2) != 0, "{} {} {}", of(0), of(1), of(2));
    Ok(())
}

/// Debian's cloud kernel has no driver for it, but one for the event that tells of it.
fn acpi_generations() -> Result<()> {
    differ("acpi-id")?;
    for (machine, events) in machines()?.iter().zip(["0", "1", "1"]) {
        let (id, device) = (told(&machine.said, "acpi-id")?, told(&machine.said, "acpi")?);
        ensure!(id.len() == 32 && id != "0".repeat(32), "{id}");
        ensure!(device == "acpi:UKPF0001:VM_GEN_COUNTER:", "{device}");
        let seen = told(&machine.said, "acpi-events")?;
        ensure!(seen == events, "{seen} events in {}", machine.uuid);
    }
    Ok(())
}
