//! For build scripts: builds the programs that run in guests, which other crates embed.

use std::env;
use std::path::PathBuf;
use std::process::Command;

/// What a static program for Linux guests is built for.
const LINUX: &str = "x86_64-unknown-linux-gnu";
/// Flags meant for the host (target-cpu, coverage, a clippy wrapper) must not reach a guest.
const OF_THE_HOST: [&str; 5] = [
    "RUSTFLAGS",
    "CARGO_ENCODED_RUSTFLAGS",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "CARGO_BUILD_TARGET",
];

/// A program of this workspace.
#[derive(Clone, Copy, Debug)]
pub struct Program<'a> {
    /// Its package.
    pub package: &'a str,
    /// The name of the executable.
    pub name: &'a str,
    /// What it is made of, from the workspace's folder, besides the workspace's own files.
    pub sources: &'a [&'a str],
    /// Whether it runs on Linux. Then it is static, because a guest need not have a C library, or the
    /// same one; without a table of symbols, because it lies in the memory of every guest.
    pub linux: bool,
}

impl Program<'_> {
    /// Builds it, and sets `variable` for the crate whose build script calls this to its path.
    ///
    /// # Panics
    ///
    /// If it cannot be built: so the build of that crate ends.
    pub fn build(&self, variable: &str) {
        let of_cargo = |name| env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"));
        let here = PathBuf::from(of_cargo("CARGO_MANIFEST_DIR"));
        let root = here.ancestors().find(|folder| folder.join("Cargo.lock").exists());
        let root = root.unwrap_or_else(|| panic!("{} is in no workspace", here.display()));
        for path in self.sources.iter().chain(&["Cargo.toml", "Cargo.lock"]) {
            println!("cargo:rerun-if-changed={}", root.join(path).display());
        }
        // A target folder of its own: the outer cargo holds the lock of the other one.
        let target = PathBuf::from(of_cargo("OUT_DIR")).join(self.name);
        let mut cargo = Command::new(of_cargo("CARGO"));
        cargo.args(["build", "--release", "--locked", "-p", self.package, "--bin", self.name]);
        cargo.arg("--manifest-path").arg(root.join("Cargo.toml"));
        cargo.arg("--target-dir").arg(&target);
        for name in OF_THE_HOST {
            cargo.env_remove(name);
        }
        let mut folder = target;
        if self.linux {
            cargo.args(["--target", LINUX]);
            cargo.env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols");
            folder.push(LINUX);
        }
        let built = cargo.status().is_ok_and(|status| status.success());
        assert!(built, "{} could not be built", self.name);
        let path = folder.join("release").join(self.name);
        println!("cargo:rustc-env={variable}={}", path.display());
    }
}
