//! The bench of the fork engine.
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test that fails should say where"))]

pub mod plot;
pub mod record;
pub mod scenario;
pub mod stats;
