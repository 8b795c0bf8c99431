//! The same tree as a directory, an archive and an OCI layout, and what an image has besides.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use common::{Bench, Tar, gzip, named, of_source, read, touch, zstd};
use guest_image::{Config, Options, config_segment};

const LONG: &str = "a-name-with-more-than-one-hundred-bytes-as-only-extensions-of-the-format-have-room-\
                    for-in-their-headers-and-in-no-other-place";

/// A tree with everything that can be made without privileges.
fn fill(root: &Path) {
    for folder in ["bin", "etc", "empty", "etc/deep/er"] {
        fs::create_dir_all(root.join(folder)).expect(folder);
    }
    for (file, text) in
        [("bin/program", "x"), ("etc/hosts", "localhost\n"), ("etc/none", ""), (LONG, "long")]
    {
        fs::write(root.join(file), text).expect(file);
    }
    fs::write(root.join("etc/large"), vec![7; 1 << 20]).expect("a file");
    fs::hard_link(root.join("bin/program"), root.join("bin/again")).expect("a link");
    symlink("../etc/hosts", root.join("bin/hosts")).expect("a link");
    symlink("/nowhere", root.join("dangling")).expect("a link");
    fs::set_permissions(root.join("bin/program"), fs::Permissions::from_mode(0o4755)).expect("it");
    for name in ["bin/program", "etc/hosts", "etc/none", "etc/large", LONG] {
        touch(&root.join(name), 1_000_000);
    }
    for name in ["etc/deep/er", "etc/deep", "etc", "empty", "bin"] {
        touch(&root.join(name), 2_000_000);
    }
}

/// The tree as `tar` packs it.
fn pack(root: &Path) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    tar.follow_symlinks(false);
    tar.append_dir_all(".", root).expect("a tree");
    let mut header = tar::Header::new_gnu();
    header.set_metadata(&fs::metadata(root.join("bin/program")).expect("it"));
    header.set_entry_type(tar::EntryType::Link);
    header.set_size(0);
    // The builder knows no hard links: the one that it has written as a file is replaced.
    tar.append_link(&mut header, "bin/again", "bin/program").expect("a link");
    tar.into_inner().expect("an archive")
}

#[test]
fn one_tree_of_every_kind_makes_the_same_image() {
    let bench = Bench::new();
    let root = bench.path("root");
    fill(&root);
    let tar = pack(&root);
    let (built, image) = bench.image(&root).expect("of a directory");
    assert_eq!(image, bench.image(&root).expect("once more").1);
    assert_eq!(built.blake3, blake3::hash(&image).to_hex().to_string());
    assert_eq!(built.bytes, image.len() as u64);
    assert_eq!(built.entries, read(&image).0.len() as u64);
    let frames =
        [zstd(&tar[..1000]), b"\x50\x2a\x4d\x18\x03\0\0\0abc".to_vec(), zstd(&tar[1000..])];
    let members = [gzip(&tar[..5000]), gzip(&tar[5000..])];
    for (name, bytes) in [
        ("plain", tar.clone()),
        ("gz", gzip(&tar)),
        ("members", members.concat()),
        ("zst", zstd(&tar)),
        ("frames", frames.concat()),
    ] {
        let source = bench.write(name, &bytes);
        let (_, other) = bench.image(&source).expect(name);
        assert!(of_source(&image) == of_source(&other), "{name}");
        assert!(image == other, "{name}");
    }
}

#[test]
fn an_image_has_what_the_source_has() {
    let bench = Bench::new();
    let root = bench.path("root");
    fill(&root);
    let image = bench.image(&root).expect("an image").1;
    let (entries, end) = read(&image);
    assert_eq!((image.len() % 512, end <= image.len()), (0, true));
    assert!(entries.iter().map(|entry| &entry.name).is_sorted());
    let owner = fs::metadata(&root).map(|found| (found.uid(), found.gid())).expect("it");
    let hosts = named(&entries, "etc/hosts");
    assert_eq!((hosts.mode, hosts.owner, hosts.mtime), (0o100_644, owner, 1_000_000));
    assert_eq!(hosts.bytes, b"localhost\n");
    assert_eq!(named(&entries, "etc/large").bytes, vec![7; 1 << 20]);
    assert_eq!(named(&entries, LONG).bytes, b"long");
    assert_eq!(named(&entries, "bin/hosts").bytes, b"../etc/hosts");
    assert_eq!(named(&entries, "bin/hosts").mode & 0o170_000, 0o120_000);
    assert_eq!(named(&entries, "empty").mtime, 2_000_000);
    // The contents come with the first of two names.
    let (first, second) = (named(&entries, "bin/again"), named(&entries, "bin/program"));
    assert_eq!((first.links, second.links, first.ino), (2, 2, second.ino));
    assert_eq!((&*first.bytes, &*second.bytes), (&b"x"[..], &b""[..]));
    assert_eq!(second.mode, 0o104_755);
    assert_eq!(named(&entries, ".").mode, 0o040_755);
}

#[test]
fn an_image_has_what_a_guest_needs() {
    let bench = Bench::new();
    let root = bench.path("root");
    fs::create_dir_all(root.join("dev")).expect("a folder");
    // As an exported container has it.
    fs::write(root.join("dev/console"), "").expect("a file");
    symlink("var/run", root.join("run")).expect("a link");
    let (built, image) = bench.image(&root).expect("an image");
    let (entries, _) = read(&image);
    assert_eq!(named(&entries, ".uk/init").bytes[..4], *b"\x7fELF");
    assert_eq!(named(&entries, ".uk/init").mode, 0o100_755);
    assert_eq!(named(&entries, ".uk/ukp").bytes, b"init");
    for (name, mode) in [("proc", 0o555), ("sys", 0o555), ("tmp", 0o1777), ("uk/libukp", 0o555)] {
        assert_eq!(named(&entries, name).mode, 0o040_000 | mode, "{name}");
    }
    let console = named(&entries, "dev/console");
    assert_eq!((console.mode, console.device), (0o020_600, (5, 1)));
    assert_eq!(named(&entries, "run").bytes, b"var/run");
    assert!(!entries.iter().any(|entry| entry.name == ".uk/config.json"));
    let list = "virtio_ring virtio virtio_mmio rng_core virtio_rng \
                virtio_console vsock vmw_vsock_virtio_transport overlay";
    let list: Vec<_> = list.split(' ').map(|name| format!("/.uk/m/{name}.ko")).collect();
    assert_eq!(built.modules, list);
    assert_eq!(named(&entries, ".uk/modules").bytes, format!("{}\n", list.join("\n")).into_bytes());
    assert_eq!(named(&entries, ".uk/m/overlay.ko").bytes, common::module(""));
}

#[test]
fn a_command_goes_into_the_image_or_behind_it() {
    let bench = Bench::new();
    let tar = bench.write("source", &Tar::new().file("a", "").done());
    let command = ["sh".to_owned(), "-c".to_owned(), "echo \"ä\"\n".to_owned()];
    let options = Options { command: Some(&command), ..Options::default() };
    let (built, mut image) = bench.image_with(&tar, &options).expect("an image");
    let config = Config::command(command.to_vec());
    assert_eq!(built.config.as_ref(), Some(&config));
    let (entries, end) = read(&image);
    let within = &named(&entries, ".uk/config.json").bytes;
    let said: Config = serde_json::from_slice(within).expect("JSON");
    assert_eq!(said, config);

    let other = Config { cwd: "/a".into(), env: [("A".into(), "=".into())].into(), ..config };
    let segment = config_segment(&other).expect("a segment");
    assert_eq!(segment.len() % 512, 0);
    let begin = image.len();
    assert!(image[end..].iter().all(|byte| *byte == 0));
    image.extend(&segment);
    let (second, _) = read(&image[begin..]);
    assert_eq!(second.len(), 1);
    assert_eq!(second[0].name, ".uk/config.json");
    let text = r#"{"argv":["sh","-c","echo \"ä\"\n"],"cwd":"/a","env":{"A":"="}}"#;
    assert_eq!(second[0].bytes, text.as_bytes());

    let whole = Config {
        hostname: Some("n-{uuid}".into()),
        fork_queue: Some(3),
        retention_s: Some(4),
        freeze: true,
        ..other
    };
    let segment = config_segment(&whole).expect("a segment");
    let (alone, _) = read(&segment);
    let said: Config = serde_json::from_slice(&alone[0].bytes).expect("JSON");
    assert_eq!(said, whole);
}

#[test]
fn a_kernel_folder_has_to_be_one() {
    let bench = Bench::new();
    let tar = bench.write("source", &Tar::new().done());
    let refusal = || common::why(&bench.image(&tar).expect_err("a refusal"));
    fs::write(bench.path("kernel/virtio.ko"), "no module").expect("a file");
    assert!(refusal().contains("kernel/virtio.ko is not a kernel module: "), "{}", refusal());
    fs::rename(bench.path("kernel/virtio.ko"), bench.path("kernel/virtio.ko.xz")).expect("it");
    let text = refusal();
    assert!(text.contains("has no module virtio, and its kernel does not have it"), "{text}");
    assert!(text.ends_with("; unpack compressed modules with xz -d"), "{text}");
    fs::remove_file(bench.path("kernel/vmlinuz")).expect("it");
    let text = refusal();
    assert!(text.starts_with("there is no kernel for guests in "), "{text}");
    assert!(text.contains("./just") && text.contains("--kernel-dir"), "{text}");
}
