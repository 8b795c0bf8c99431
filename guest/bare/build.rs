//! Links the guest as a static ELF at fixed addresses with the host's tool chain.
//!
//! The target is the host's own (`x86_64-unknown-linux-gnu`), so that a fresh machine needs no
//! second one; what makes it a Linux program is taken away here, flag by flag.

use std::{env, path::Path};

fn main() {
    let manifest = env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let script = Path::new(&manifest).join("link.ld");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=link.ld");

    let arguments = [
        // No C runtime: the entry point is ours and there is nobody to return to.
        "-nostartfiles",
        "-nostdlib",
        // rustc asks for a dynamic position-independent executable; the last word counts. The
        // loader of the runtime does not relocate.
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,norelro",
        "-Wl,-z,max-page-size=4096",
        // The ELF is embedded in the runtime: symbols stay for the debugger, line tables go.
        "-Wl,--strip-debug",
    ];
    for argument in arguments {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
    println!("cargo:rustc-link-arg-bins=-Wl,-T,{}", script.display());
}
