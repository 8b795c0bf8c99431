//! Builds the guest's agent, which is part of every image.

use std::env;
use std::path::PathBuf;
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let root = here.ancestors().nth(2).expect("this crate lies in the workspace");
    for path in [
        "guest/abi",
        "guest/agent",
        "guest/wire",
        "guest/image/build.rs",
        "Cargo.toml",
        "Cargo.lock",
    ] {
        println!("cargo:rerun-if-changed={}", root.join(path).display());
    }
    // A target folder of its own: the outer cargo holds the lock of the other one. Flags meant for
    // the host (target-cpu, coverage, a clippy wrapper) must not reach the guest.
    let target = out.join("agent");
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    cargo
        .args(["build", "--release", "--locked", "-p", "guest-agent", "--bin", "ukp-agent"])
        .args(["--target", TARGET, "--manifest-path"])
        .arg(root.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target);
    for name in [
        "CARGO_ENCODED_RUSTFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_BUILD_TARGET",
    ] {
        cargo.env_remove(name);
    }
    // Static, because a guest need not have a C library, or the same one; without a table of
    // symbols, because it lies in the memory of every guest.
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols");
    let status = cargo.status().expect("cargo runs");
    assert!(status.success(), "the guest's agent could not be built");
    let agent = target.join(TARGET).join("release/ukp-agent");
    println!("cargo:rustc-env=UKP_AGENT={}", agent.display());
}
