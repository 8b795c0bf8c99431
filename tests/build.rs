//! Builds `ukp-check`, which the nested tests run in their guests: static, for it meets no C library
//! there.

use std::env;
use std::path::PathBuf;
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let root = here.parent().expect("this crate lies in the workspace");
    for path in ["guest/check", "tests/build.rs", "Cargo.toml", "Cargo.lock"] {
        println!("cargo:rerun-if-changed={}", root.join(path).display());
    }
    // As in `guest/image/build.rs`: a folder of its own, and no flags that are meant for the host.
    let target = out.join("check");
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets CARGO"));
    cargo
        .args(["build", "--release", "--locked", "-p", "guest-check", "--bin", "ukp-check"])
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
    cargo.env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols");
    let status = cargo.status().expect("cargo runs");
    assert!(status.success(), "what the tests run in guests could not be built");
    let check = target.join(TARGET).join("release/ukp-check");
    println!("cargo:rustc-env=UKP_CHECK={}", check.display());
}
