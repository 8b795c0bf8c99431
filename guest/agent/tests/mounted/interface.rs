//! The rest of the interface.

use std::fs;

use anyhow::{Result, ensure};
use uuid::Uuid;

use crate::Case;
use crate::rig::{Fork, LIMIT, Rig, errno};

pub const CASES: &[Case] = &[
    ("interface::the_folder_lists_its_files", the_folder_lists_its_files),
    ("interface::scale_to_zero_is_counted", scale_to_zero_is_counted),
    ("interface::a_write_to_template_instance_returns_in_the_clone", template),
    ("interface::a_template_that_was_not_noted_yet_makes_none_of_its_clone", unread_template),
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

/// The agent reads the write only when it is another machine already: the clone's, where it returns.
fn unread_template() -> Result<()> {
    let rig = Rig::new()?;
    let results = rig.write_at_birth("template_instance");
    rig.next(Fork::Become(Uuid::new_v4(), 1));
    fs::write(rig.path("fork"), "1")?;
    ensure!(results.recv_timeout(LIMIT)? == 0);
    ensure!(rig.host.templates() == 0, "the clone became a template");
    Ok(())
}

fn template() -> Result<()> {
    let rig = Rig::new()?;
    let path = rig.path("template_instance");
    ensure!(errno(fs::write(&path, "what?")) == libc::EINVAL);
    ensure!(fs::read(&path)?.is_empty());
    let writer = std::thread::spawn(move || fs::write(path, "1\n"));
    let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while rig.host.templates() == 0 {
        ensure!(std::time::Instant::now() < end, "the host is not told");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    rig.next(crate::rig::Fork::Child(uuid::Uuid::new_v4()));
    fs::write(rig.path("fork"), "1")?;
    ensure!(!writer.is_finished(), "it has returned in the template");
    rig.next(crate::rig::Fork::Become(uuid::Uuid::new_v4(), 5));
    fs::write(rig.path("fork"), "1")?;
    writer.join().map_err(|_| anyhow::anyhow!("panicked"))??;
    ensure!(rig.host.templates() == 1);
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
