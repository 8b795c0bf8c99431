//! Builds the guest's agent, which is part of every image.

fn main() {
    guest_build::Program {
        package: "guest-agent",
        name: "ukp-agent",
        sources: &["guest/abi", "guest/agent", "guest/wire", "guest/image/build.rs"],
        linux: true,
    }
    .build("UKP_AGENT");
}
