//! The command line.

fn main() {
    runtime::owner::instance_if_asked();
}
