//! Builds the bare guest, which is part of this library.

fn main() {
    guest_build::Program {
        package: "guest-bare",
        name: "guest-bare",
        sources: &[
            "guest/abi/src",
            "guest/abi/Cargo.toml",
            "guest/bare/src",
            "guest/bare/build.rs",
            "guest/bare/link.ld",
            "guest/bare/Cargo.toml",
        ],
        linux: false,
    }
    .build("BARE_GUEST");
}
