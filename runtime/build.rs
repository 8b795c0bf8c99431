//! Builds the bare guest, which is part of this library.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let root = here.parent().expect("this crate lies in the workspace");
    for path in [
        "guest/abi/src",
        "guest/abi/Cargo.toml",
        "guest/bare/src",
        "guest/bare/build.rs",
        "guest/bare/link.ld",
        "guest/bare/Cargo.toml",
        "Cargo.toml",
        "Cargo.lock",
    ] {
        println!("cargo:rerun-if-changed={}", root.join(path).display());
    }
    // A target folder of its own: the outer cargo holds the lock of the other one. Flags meant for
    // the host (target-cpu, coverage, a clippy wrapper) must not reach the guest.
    let target = out.join("guest");
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    cargo
        .args(["build", "--release", "--locked", "-p", "guest-bare", "--manifest-path"])
        .arg(root.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target);
    for name in [
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_BUILD_TARGET",
    ] {
        cargo.env_remove(name);
    }
    let status = cargo.status().expect("cargo runs");
    assert!(status.success(), "the bare guest could not be built");
    println!("cargo:rustc-env=BARE_GUEST={}", target.join("release/guest-bare").display());
}
