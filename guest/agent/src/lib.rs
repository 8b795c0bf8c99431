//! What runs inside a Linux guest: its init, the file system `/uk/libukp`, the server of the host's
//! requests, and the command `ukp`.
//!
//! ```text
//!  init (PID 1) ─┬─ workload
//!                ├─ file system:  reader ──> fork thread ──> doorbell (I/O ports)
//!                │                  └──────> housekeeper
//!                ├─ host:         client of the long-lived connection (vsock)
//!                ├─ server:       ping, exec, copy, status (vsock), a thread per request
//!                └─ control:      a unix socket for `ukp exit` and `ukp status`
//! ```
//!
//! Everything that touches the machine is behind a trait ([`doorbell::Doorbell`], [`host::Host`],
//! [`renew::Renew`]), so that tests can mount the file system on any host.

#![warn(clippy::print_stdout)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test that fails should say where"))]

pub mod cli;
pub mod console;
pub mod control;
pub mod doorbell;
pub mod forker;
pub mod freezer;
pub mod fs;
pub mod haste;
pub mod host;
pub mod init;
pub mod processes;
pub mod reaper;
pub mod renew;
pub mod serve;
pub mod session;
pub mod state;
pub mod stats;
pub mod sync;
