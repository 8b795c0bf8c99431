//! Builds the probes, where this machine has what that takes; elsewhere the loader says that it has
//! none.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Debian's, with a core library for BPF; `UKP_BPF_RUSTC` names another one that has it.
const RUSTC: &str = "/usr/bin/rustc";
const TARGET: &str = "bpfel-unknown-none";
/// The linker for that target; `./just` keeps one in its cache.
const LINKER: &str = "bpf-linker";
/// A stable rustc lets this crate use what it needs of the unstable.
const BOOTSTRAP: &str = "aya_ebpf";

fn main() {
    println!("cargo:rustc-check-cfg=cfg(probes)");
    for name in ["UKP_BPF_RUSTC", "UKP_CACHE"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let root = here.parent().and_then(Path::parent).expect("this crate lies in the workspace");
    for path in [
        "ebpf/common/src",
        "ebpf/common/Cargo.toml",
        "ebpf/probes/src",
        "ebpf/probes/Cargo.toml",
        "Cargo.toml",
        "Cargo.lock",
    ] {
        println!("cargo:rerun-if-changed={}", root.join(path).display());
    }
    let rustc = env::var("UKP_BPF_RUSTC").unwrap_or_else(|_| RUSTC.to_owned());
    match tools(&rustc) {
        Ok(linker) => build(root, &rustc, &linker),
        Err(missing) => {
            println!("cargo:rustc-env=PROBES_MISSING={missing}");
            println!("cargo:warning=built without probes: {missing}; ./just build installs it");
        }
    }
}

/// The linker; or what is not there, in words.
fn tools(rustc: &str) -> Result<PathBuf, String> {
    let libraries = ["--print", "target-libdir", "--target", TARGET];
    let libraries = output(Command::new(rustc).args(libraries));
    // A path that is not there is looked for at each build.
    println!("cargo:rerun-if-changed={rustc}");
    if !libraries.is_some_and(|folder| Path::new(folder.trim()).is_dir()) {
        return Err(format!("{rustc} has no core library for {TARGET}"));
    }
    let cache = env::var_os("UKP_CACHE").map(PathBuf::from).or_else(|| {
        let home = || env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
        let caches = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
        caches.map(|caches| caches.join("ukp-runtime"))
    });
    let cache = cache.unwrap_or_default();
    let folders = cache.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
    let fetched = folders.map(|folder| folder.join("bin").join(LINKER));
    let mut linkers: Vec<PathBuf> = fetched.filter(|path| path.is_file()).collect();
    linkers.sort();
    let fetched = linkers.pop();
    // The folder only while there is nothing in it: cargo looks at all that it holds, and images and
    // locks of other programs change there.
    println!("cargo:rerun-if-changed={}", fetched.as_ref().unwrap_or(&cache).display());
    let linker = fetched.unwrap_or_else(|| LINKER.into());
    match output(Command::new(&linker).arg("--version")) {
        Some(_) => Ok(linker),
        None => Err(format!("{LINKER} is neither in {} nor in PATH", cache.display())),
    }
}

fn output(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn build(root: &Path, rustc: &str, linker: &Path) {
    // A target folder of its own: the outer cargo holds the lock of the other one. Flags meant for
    // the host (target-cpu, coverage, a clippy wrapper) must not reach the kernel.
    let target = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("probes");
    let architecture = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets it");
    let flags = [
        format!("--cfg=bpf_target_arch=\"{architecture}\""),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        format!("-Clinker={}", linker.display()),
    ];
    let mut cargo = Command::new(env::var_os("CARGO").expect("cargo sets it"));
    cargo
        .args(["build", "--quiet", "--release", "--locked", "-p", "ebpf-probes"])
        .args(["--target", TARGET, "--manifest-path"])
        .arg(root.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target)
        .env("RUSTC", rustc)
        .env("RUSTC_BOOTSTRAP", BOOTSTRAP)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    for name in ["RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CARGO_BUILD_TARGET"] {
        cargo.env_remove(name);
    }
    let status = cargo.status().expect("cargo runs");
    assert!(status.success(), "the probes could not be built");
    let object = target.join(TARGET).join("release/ebpf-probes");
    println!("cargo:rustc-env=PROBES={}", object.display());
    println!("cargo:rustc-cfg=probes");
}
