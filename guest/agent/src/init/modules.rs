//! Kernel modules, in the order of a list: one path on each line.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use rustix::system::finit_module;

use crate::console::say;

/// Loads them. One that cannot be loaded is told, and left out; no list: none.
pub(super) fn load_all(list: &Path) {
    let text = match fs::read_to_string(list) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => return say(format_args!("cannot read {}: {error}", list.display())),
    };
    for path in paths(&text) {
        if let Err(error) = load(path) {
            say(format_args!("cannot load the module {path}: {error}"));
        }
    }
}

fn paths(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty())
}

fn load(path: &str) -> io::Result<()> {
    match finit_module(File::open(path)?, c"", 0) {
        // It is there already.
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_may_have_empty_lines() {
        let list = "/.uk/a.ko\n\n  /.uk/b.ko\r\n";
        assert_eq!(paths(list).collect::<Vec<_>>(), ["/.uk/a.ko", "/.uk/b.ko"]);
    }
}
