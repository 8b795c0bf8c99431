//! Where Linux guests run on a machine whose own KVM runs none, and what they boot: for tests, the
//! bench, and `./just guest`.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`machine`] | a machine under software emulation with a standard KVM |
//! | [`image`] | a Linux image with busybox |
//! | [`place`] | here, or there |

pub mod image;
pub mod machine;
pub mod place;

pub use machine::{
    Ended, FILES, Program, Stalled, end_with_this_process, folder_prefix, kernel_folder, missing,
    run,
};
pub use place::Place;

/// `ukp-check`, a static program that does in a guest what no shell can.
pub static CHECK: &[u8] = include_bytes!(env!("UKP_CHECK"));
