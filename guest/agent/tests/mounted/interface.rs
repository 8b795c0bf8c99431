//! The rest of the interface.

use std::fs;

use anyhow::{Result, ensure};

use crate::Case;
use crate::rig::{Rig, errno};

pub const CASES: &[Case] = &[
    ("interface::the_folder_lists_its_files", the_folder_lists_its_files),
    ("interface::scale_to_zero_is_counted", scale_to_zero_is_counted),
    ("interface::templates_are_not_made_yet", templates_are_not_made_yet),
    ("interface::any_user_may_fork", any_user_may_fork),
    ("interface::ukp_forks_and_waits", ukp_forks_and_waits),
];

fn the_folder_lists_its_files() -> Result<()> {
    let rig = Rig::new()?;
    let listed = rig.shell("cd $UKP; ls; [ -d vm ]; [ -w fork ]; stat -f . > /dev/null")?;
    ensure!(listed == "fork\nscale_to_zero_disable\ntemplate_instance\nvm\n", "{listed}");
    Ok(())
}

fn scale_to_zero_is_counted() -> Result<()> {
    let rig = Rig::new()?;
    let script = "cd $UKP; cat scale_to_zero_disable; echo + > scale_to_zero_disable
        echo + > scale_to_zero_disable; echo - > scale_to_zero_disable; cat scale_to_zero_disable
        echo =5 > scale_to_zero_disable; cat scale_to_zero_disable";
    ensure!(rig.shell(script)? == "0\n1\n5\n");
    ensure!(errno(fs::write(rig.path("scale_to_zero_disable"), "what?")) == libc::EINVAL);
    Ok(())
}

fn templates_are_not_made_yet() -> Result<()> {
    let rig = Rig::new()?;
    ensure!(errno(fs::write(rig.path("template_instance"), "1")) == libc::EOPNOTSUPP);
    ensure!(fs::read(rig.path("template_instance"))?.is_empty());
    Ok(())
}

fn any_user_may_fork() -> Result<()> {
    use std::os::unix::process::CommandExt;
    let rig = Rig::new()?;
    let uuid = uuid::Uuid::new_v4();
    rig.next(crate::rig::Fork::Child(uuid));
    let mut shell = std::process::Command::new("/bin/sh");
    shell.args(["-ec", "echo 1 > $UKP/fork; cat $UKP/fork"]).env("UKP", &rig.at).uid(65534);
    let output = shell.output()?;
    ensure!(output.stdout == format!("{uuid}\n").into_bytes(), "{output:?}");
    Ok(())
}

fn ukp_forks_and_waits() -> Result<()> {
    use guest_agent::cli;
    let rig = Rig::new()?;
    let uuid = uuid::Uuid::new_v4();
    rig.next(crate::rig::Fork::Child(uuid));
    ensure!(cli::fork(&rig.at)?.0 == uuid.to_string());
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| cli::wait(&rig.at, uuid));
        std::thread::sleep(std::time::Duration::from_millis(50));
        rig.host.stop(uuid, 137);
        ensure!(waiter.join().map_err(|_| anyhow::anyhow!("panicked"))?? == 137);
        Ok(())
    })?;
    let error = cli::wait(&rig.at, uuid).err().map(|error| error.to_string());
    ensure!(error == Some(format!("cannot wait for {uuid}")));
    Ok(())
}
