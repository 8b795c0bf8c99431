//! Limits of the host: a clear error, an unharmed parent, and all is well when they are raised.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use runtime::fork::Step;
use runtime::owner::OwnerError;
use runtime::proto::InstanceConfig;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tests::case::Case;
use tests::census;
use tests::host;
use tests::program::{Forked, fork};
use tests::rig::Rig;

const EMFILE: u32 = 24;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("faults::descriptors_of_the_instance_run_out", || descriptors(false)),
        Case::new("faults::descriptors_of_the_zygote_run_out", || descriptors(true)),
        Case::new("limits::a_tree_stays_on_the_processors_of_its_owner", processors),
        Case::new("limits::a_program_with_capabilities_forks_for_another_user", capabilities)
            .alone()
            .needs(host::without_root()),
    ]
}

/// `RLIMIT_NOFILE` of a process, put back when this is dropped.
struct Limit {
    pid: Option<Pid>,
    before: Rlimit,
}

impl Limit {
    fn new(pid: i32, files: u64) -> Result<Self> {
        let pid = Pid::from_raw(pid);
        // It inherited ours; to change the hard limit, too, would need a privilege.
        let maximum = getrlimit(Resource::Nofile).maximum;
        let before = prlimit(pid, Resource::Nofile, Rlimit { current: Some(files), maximum })?;
        Ok(Self { pid, before })
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        if let Err(errno) = prlimit(self.pid, Resource::Nofile, self.before) {
            eprintln!("RLIMIT_NOFILE was not put back: {errno}");
        }
    }
}

fn descriptors(of_zygote: bool) -> Result<()> {
    let rig = Rig::new(InstanceConfig { memory_mib: 16, ..<_>::default() })?;
    for child in rig.branch(rig.root, 1)? {
        rig.kill(child)?;
    }
    rig.standbys(0)?;
    let settled = census::eventually(tests::rig::PATIENCE, || {
        rig.owner.stats(rig.root).is_ok_and(|stats| stats.standbys == 0)
    });
    ensure!(settled, "standbys are left");
    let pid = if of_zygote { rig.zygote()? } else { rig.pid(rig.root)? };
    let before = rig.census()?;
    {
        // What is open stays open; the next one is refused.
        let _limit = Limit::new(pid, 3)?;
        for _ in 0..3 {
            let forked = Forked::read(&rig.run(rig.root, &[fork(2, 10)])?, 10)?;
            // A zygote that is of no use may be replaced by one without the limit.
            let replaced = of_zygote && forked.status == 0;
            ensure!(replaced || forked.step() == Some(Step::Prewarm), "{forked:?}");
            ensure!(of_zygote || forked.status == EMFILE, "{forked:?}");
            rig.kill_children()?;
            match rig.branch(rig.root, 1) {
                Ok(made) => {
                    ensure!(of_zygote, "the fork succeeded");
                    made.into_iter().try_for_each(|child| rig.kill(child))?;
                }
                Err(error) => {
                    let refused = error.downcast_ref::<OwnerError>();
                    let failure = refused.and_then(OwnerError::fork_failure);
                    let (step, errno) = failure.with_context(|| format!("no step: {error:#}"))?;
                    ensure!(step == Step::Prewarm, "{error}");
                    ensure!(of_zygote || errno.cast_unsigned() == EMFILE, "{error}");
                }
            }
            rig.compare(rig.root, &rig.memory(), "the parent without descriptors")?;
        }
    }
    rig.settles_at(before, "after running out of descriptors")?;
    for child in rig.branch(rig.root, 2).context("with descriptors again")? {
        rig.compare(child, &rig.memory(), "a child")?;
    }
    Ok(())
}

/// As under `taskset(1)`: all threads of parent, child and grandchild.
fn processors() -> Result<()> {
    let one = {
        let all = sched_getaffinity(None)?;
        let first = (0..CpuSet::MAX_CPU).find(|cpu| all.is_set(*cpu)).context("no processor")?;
        let mut one = CpuSet::new();
        one.set(first);
        sched_setaffinity(None, &one)?;
        first
    };
    // This thread ends with its test, so it need not be put back.
    let rig = Rig::new(InstanceConfig { memory_mib: 16, vcpus: 2, ..<_>::default() })?;
    let child = rig.branch(rig.root, 1)?[0];
    let grandchild = rig.branch(child, 1)?[0];
    for uuid in [rig.root, child, grandchild] {
        rig.run(uuid, &[tests::program::pause(1000)])?;
        let pid = rig.pid(uuid)?;
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            let status = std::fs::read_to_string(task.path().join("status"))?;
            let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
            let name = status.lines().next().unwrap_or_default();
            let allowed = line.unwrap_or_default().trim();
            ensure!(allowed == one.to_string(), "{name} may run on {allowed}, not on {one} alone");
        }
    }
    Ok(())
}

/// What `setcap cap_bpf,cap_perfmon,cap_sys_resource+ep` makes of a program, as far as there are these
/// capabilities here: of this one, which then runs tests that look at other processes' memory and at
/// /proc/self.
fn capabilities() -> Result<()> {
    const NOBODY: u32 = 65534;
    let folder = tempfile::tempdir()?;
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777))?;
    let program = folder.path().join("direct");
    std::fs::copy(std::env::current_exe()?, &program)?;
    // One that is not among those that this container may have could not be executed.
    let status = std::fs::read_to_string("/proc/self/status")?;
    let bounds = status.lines().find_map(|line| line.strip_prefix("CapBnd:"));
    let bounds = u64::from_str_radix(bounds.context("no CapBnd")?.trim(), 16)?;
    let [nice, resource, perfmon, bpf] = [23, 24, 38, 39].map(|number| 1_u64 << number);
    let given = bounds & (nice | resource | perfmon | bpf);
    ensure!(given != 0, "there are no capabilities to give: {bounds:#x}");
    // struct vfs_cap_data: revision 2 and "effective", then permitted and inheritable, twice.
    let [low, high] = [given & u64::from(u32::MAX), given >> 32].map(u32::try_from);
    let words = [0x0200_0001_u32, low?, 0, high?, 0];
    let attribute: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(&program, "security.capability", &attribute, flags)
        .context("giving a file capabilities")?;
    let _kvm = host::KvmForAll::new()?;
    for test in ["direct::forks::fan_out_of_2", "direct::faults::the_zygote_is_killed"] {
        let output = Command::new(&program)
            .args([test, "--exact"])
            .env("TMPDIR", folder.path())
            .env_remove("XDG_RUNTIME_DIR")
            .current_dir("/")
            .gid(NOBODY)
            .uid(NOBODY)
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        let passed = said.contains("1 passed");
        ensure!(passed, "{test}: {said}{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
