//! Children that could not be made another machine: they end, and their parents are told.

use anyhow::{Result, ensure};
use uuid::Uuid;

use super::guest::{one, told};
use crate::Inside;

pub fn cases() -> Vec<Inside> {
    vec![("identity::a_child_that_cannot_be_made_unique_ends_with_121", not_unique)]
}

/// What the agent ends such a machine with.
const NOT_UNIQUE: i32 = 121;

/// Steps that a folder in the place of a file makes fail.
fn not_unique() -> Result<()> {
    let guest = one()?;
    for (path, step) in [
        ("/run/ukp/generation.new", "write the generation"),
        ("/etc/machine-id", "write the machine id"),
    ] {
        let script = format!(
            "[ -e {path} ] && mv {path} {path}.kept; mkdir {path}
            echo 1 > /uk/libukp/fork; child=$(cat /uk/libukp/fork)
            rmdir {path}; [ -e {path}.kept ] && mv {path}.kept {path}
            if [ $child = 00000000-0000-0000-0000-000000000000 ]; then
                echo '@lives' > /dev/console; ukp exit 0; sleep 1000
            fi
            echo \"@child $child\"
            echo 1 > /uk/libukp/vm/$child/wait
            echo \"@code $(cat /uk/libukp/vm/$child/wait)\""
        );
        let said = guest.sh(guest.root, &script)?;
        let child: Uuid = told(&said, "child")?.parse()?;
        let (code, console) = guest.end_of(child)?;
        ensure!(code == NOT_UNIQUE, "{step}: it ended with {code}: {console}");
        ensure!(told(&said, "code")? == NOT_UNIQUE.to_string(), "{step}: {said}");
        ensure!(console.contains(&format!("step \"{step}\"")), "{step}: {console}");
        ensure!(!console.contains("@lives"), "{step}: the fork returned in it: {console}");
    }
    // The parent is unharmed.
    let child = guest.fork()?;
    guest.exit(child, 0)
}
