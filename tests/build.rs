//! Builds `ukp-check`, which the nested tests run in their guests.

fn main() {
    guest_build::Program {
        package: "guest-check",
        name: "ukp-check",
        sources: &["guest/check", "tests/build.rs"],
        linux: true,
    }
    .build("UKP_CHECK");
}
