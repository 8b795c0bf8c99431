//! What each fuzz target does with its bytes. `./just fuzz` feeds them to the fuzzer, `cargo test`
//! replays the seeds and a few thousand random inputs.
//!
//! | target | what the bytes are |
//! | --- | --- |
//! | [`queue`] | guest memory, with a queue somewhere in it |
//! | [`mmio`] | reads and writes of device registers, and of the memory that they point to |
//! | [`vsock`] | packets of a guest, what processes on the host do meanwhile, and forks |
//! | [`serial`] | reads and writes of the serial line's registers, and of the power ports |
//! | [`doorbell`] | writes to the doorbell's ports, and a parameter page |
//! | [`wire`] | what agent and host say to each other |
//! | [`fuse`] | requests of a guest's kernel to the agent, forks, and answers of the host |
//! | [`archive`] | a tar archive, perhaps compressed |
//! | [`oci`] | an OCI layout whose digests are right |
//! | [`kernel`] | a kernel, an initramfs, a bare guest, a module |
//! | [`requests`] | messages of clients, owners and instances |

pub mod archive;
pub mod doorbell;
pub mod fuse;
pub mod kernel;
mod machine;
pub mod mmio;
pub mod oci;
pub mod queue;
pub mod requests;
pub mod serial;
pub mod vsock;
pub mod wire;

pub use machine::folder;

/// A target: its name, and what it does with bytes.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 11] = [
    ("queue", queue::run),
    ("mmio", mmio::run),
    ("vsock", vsock::run),
    ("serial", serial::run),
    ("doorbell", doorbell::run),
    ("wire", wire::run),
    ("fuse", fuse::run),
    ("archive", archive::run),
    ("oci", oci::run),
    ("kernel", kernel::run),
    ("requests", requests::run),
];
