//! A child is somebody else, and lives at the same time.

use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use uuid::Uuid;

use super::guest::{Guest, one, since_epoch, told};
use crate::Inside;

pub fn cases() -> Vec<Inside> {
    vec![
        ("identity::a_child_answers_with_its_own_uuid", pings),
        ("identity::machine_ids_are_the_uuids_of_children", machine_ids),
        ("identity::host_names_have_the_uuid_in_them", host_names),
        ("identity::random_bytes_and_uuids_differ_in_all_machines", random),
        ("identity::the_generation_is_another_in_a_child", generations),
        ("identity::the_acpi_generation_id_is_another_in_each_machine", acpi_generations),
        ("identity::the_wall_clock_is_that_of_the_host", wall_clock),
        ("identity::the_monotonic_clock_goes_on", monotonic),
    ]
}

/// A clock may differ so much from the host's, beyond the time that asking takes: this host's own
/// clock is that of an emulator.
const BOUND: Duration = Duration::from_millis(5);

/// When a guest's clocks were read, by the host's.
#[derive(Clone, Copy, Debug)]
struct Clock {
    before: Duration,
    real: Duration,
    monotonic: Duration,
    after: Duration,
}

/// What is known of a machine.
#[derive(Debug)]
struct Machine {
    uuid: Uuid,
    generation: u64,
    said: String,
    clock: Clock,
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
    Ok(Machine { uuid, generation, said, clock: clock(guest, uuid)? })
}

fn clock(guest: &Guest, uuid: Uuid) -> Result<Clock> {
    let before = since_epoch()?;
    let said = guest.sh(uuid, "ukp-check clock")?;
    let after = since_epoch()?;
    let (real, monotonic) = told(&said, "clock")?.split_once(' ').context("two clocks")?;
    let time = |ns: &str| ns.parse().map(Duration::from_nanos);
    Ok(Clock { before, real: time(real)?, monotonic: time(monotonic)?, after })
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
    let boots: Vec<_> = machines.iter().map(|machine| told(&machine.said, "boot").ok()).collect();
    ensure!(boots[0].is_some() && boots[0] == boots[1] && boots[0] == boots[2], "{boots:?}");
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

fn wall_clock() -> Result<()> {
    for machine in &machines()?[1..] {
        let Clock { before, real, after, .. } = machine.clock;
        let (early, late) = (before.saturating_sub(real), real.saturating_sub(after));
        println!(
            "the wall clock of a child: {early:?} early, {late:?} late, asked in {:?}",
            after.saturating_sub(before)
        );
        ensure!(early <= BOUND && late <= BOUND, "{:?}", machine.clock);
    }
    Ok(())
}

/// As much time has passed as on the host since the root was asked, also across the fork.
fn monotonic() -> Result<()> {
    let machines = machines()?;
    let root = machines[0].clock;
    for Machine { clock, .. } in &machines[1..] {
        let passed = clock.monotonic.checked_sub(root.monotonic).context("it went back")?;
        let (least, most) =
            (clock.before.saturating_sub(root.after), clock.after.saturating_sub(root.before));
        println!("the monotonic clock went on by {passed:?}, the host's by {least:?} to {most:?}");
        ensure!(passed + BOUND >= least && passed <= most + BOUND, "{root:?}, {clock:?}");
    }
    Ok(())
}
