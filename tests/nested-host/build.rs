//! Builds `ukp-check`, which tests and bench run in their guests.

fn main() {
    guest_build::Program {
        package: "guest-check",
        name: "ukp-check",
        sources: &["guest/check", "tests/nested-host/build.rs"],
        linux: true,
    }
    .build("UKP_CHECK");
}
