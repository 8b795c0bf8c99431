# Every task of this repository. `./just` fetches what a fresh machine lacks
# and runs these; CI runs `./just ci`.

set shell := ["bash", "-euo", "pipefail", "-c"]
set positional-arguments

target := env('CARGO_TARGET_DIR', justfile_directory() / 'target')
release := target / 'release'
runtime := quote(release / 'runtime')
harness := quote(release / 'bench-harness')
guest := quote(release / 'guest')
just := quote(just_executable())

# List the recipes
[private]
default:
    @{{ just }} --list --unsorted

# Build the runtime and the bench harness, optimised
[group('build')]
build:
    cargo build --release --locked -p runtime -p bench-harness

# Say what this host can do, and what would make forks faster
[group('build')]
doctor *ARGS: build
    @{{ runtime }} doctor "$@"

# Run a shell command in a fresh Linux instance (--image SOURCE, --memory SIZE, --vcpus N)
[group('guest')]
[no-exit-message]
guest *ARGS: _guest
    @{{ guest }} run "$@"

# Fork a Linux instance from inside, let the children fork, and show the tree
[group('guest')]
[no-exit-message]
demo *ARGS: _guest
    @{{ guest }} demo "$@"

[private]
_guest:
    @cargo build --release --locked -p runtime -p nested-host -p tests --bins

# Remove what was built (results/ stays)
[group('build')]
clean:
    cargo clean

# Fork machines and say how long every part took (about 3 minutes)
[group('bench')]
bench *ARGS: _kvm build
    {{ harness }} run --set default "$@"

# The same with every scenario of the bench's own guest
[group('bench')]
bench-all *ARGS: _kvm build
    {{ harness }} run --set all "$@"

# Forks, boots and sockets of Linux guests beside QEMU's; emulated where this KVM runs no Linux
[group('bench')]
bench-linux *ARGS: build
    {{ harness }} run --set linux "$@"

# Run one scenario; the last line on stdout is its result as JSON
[group('bench')]
bench-json SCENARIO: _kvm
    @cargo build --quiet --release --locked -p runtime -p bench-harness
    @{{ harness }} json "$1"

# Compare two revisions, interleaved on this machine (about 8 minutes)
[group('bench')]
bench-ab REV_A REV_B *ARGS: _kvm build
    {{ harness }} ab "$@"

# Run every test; what this host cannot run is listed as ignored
[group('check')]
test *ARGS: build
    cargo test --workspace --locked --release "$@"

# The loader as it is built where there is no tool chain for BPF
[group('check')]
test-without-probes:
    UKP_BPF_RUSTC=/no/such/rustc cargo test --locked -p ebpf-loader --lib \
        --target-dir target/without-probes

# The fuzz targets, without the fuzzer, on the bytes they begin with
[group('check')]
test-seeds:
    cargo test --manifest-path tests/fuzz/Cargo.toml --locked --release \
        --target-dir "${CARGO_TARGET_DIR:-target}"

# Random bytes for every parser of what guests, files and clients say ([TARGET] [--seconds N])
[group('check')]
[no-exit-message]
fuzz *ARGS:
    @tests/fuzz/run "$@"

# Format the code
[group('check')]
fmt:
    cargo fmt --all

# Check format, lints and docs; a warning is an error
[group('check')]
lint:
    cargo fmt --all --check
    cargo fmt --manifest-path tests/fuzz/Cargo.toml --check
    cargo clippy --workspace --all-targets --locked -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --workspace --locked

# Fail if a fork does more work, or takes longer, than recorded
[group('check')]
gate *ARGS: _kvm build
    {{ harness }} gate "$@"

# What CI runs: lint, all tests, gate
[group('check')]
[no-exit-message]
ci:
    #!/usr/bin/env bash
    set -euo pipefail
    part() {
        local name=$1 start=$SECONDS status=0
        shift
        printf '\n=== %s\n' "$name"
        "$@" || status=$?
        printf '=== %s: exit code %d, %d s\n' "$name" "$status" "$((SECONDS - start))"
        if ((status)); then exit "$status"; fi
    }
    part lint {{ just }} lint
    part test {{ just }} test --no-fail-fast
    part 'test without probes' {{ just }} test-without-probes
    part 'fuzz targets on their seeds' {{ just }} test-seeds
    if [[ -e /dev/kvm ]]; then
        part gate {{ just }} gate
    else
        printf '\n=== gate: NOT run: there is no /dev/kvm\n'
    fi

# Fail with one clear line where no virtual machine can be made
[no-exit-message]
_kvm:
    #!/usr/bin/env bash
    if [[ ! -e /dev/kvm ]]; then
        echo 'just: /dev/kvm is not there: switch virtualisation on in the firmware (or for this' \
            'machine, if it is virtual itself), then: modprobe kvm_intel, or kvm_amd' >&2
        exit 69
    elif [[ ! -r /dev/kvm || ! -w /dev/kvm ]]; then
        echo "just: no permission on /dev/kvm: as root, usermod -aG kvm $(id -un), then log in" \
            "again (or, at once: setfacl -m u:$(id -un):rw /dev/kvm)" >&2
        exit 77
    fi
