//! Sources that are wrong, or mean harm: each is refused with a reason, and nothing is left.

mod common;

use std::fs;
use std::os::unix::fs::symlink;

use common::{Bench, Tar, gzip, named, why, zstd};
use guest_image::Options;
use tar::EntryType;

#[test]
fn paths_stay_in_the_image() {
    let bench = Bench::new();
    let refusal = |tar: Tar| bench.refusal(&tar.done());
    assert_eq!(
        refusal(Tar::new().file("../outside", "")),
        "entry `../outside` of source.tar: its path has `..`, which could lead out of the image"
    );
    assert_eq!(
        refusal(Tar::new().file("a", "").link("b", "../../etc/passwd")),
        "entry `b` of source.tar: its path has `..`, which could lead out of the image"
    );
    assert_eq!(
        refusal(Tar::new().link("b", "/etc/passwd")),
        "entry `b` of source.tar: it is a hard link to `/etc/passwd`, which is not there before \
         it, or is a directory"
    );
    assert_eq!(
        refusal(Tar::new().symlink("a", "b").symlink("b", "a").file("a/c", "")),
        "entry `a/c` of source.tar: its path leads through more than 40 symbolic links"
    );
    assert_eq!(
        refusal(Tar::new().file("a", "").file("a/b", "")),
        "entry `a/b` of source.tar: its path leads through `a`, which is not a directory"
    );
    // What leads out on the host leads to the image's own directories.
    let outside = bench.path("outside");
    fs::create_dir(&outside).expect("a folder");
    let tar = Tar::new()
        .symlink("way", &outside.to_string_lossy())
        .file("way/file", "1")
        .symlink("up", "../../..")
        .file("up/top", "2")
        .file("/absolute", "3");
    let entries = bench.entries(&tar.done());
    assert_eq!(named(&entries, "absolute").bytes, b"3");
    assert_eq!(named(&entries, "top").bytes, b"2");
    let inside = format!("{}/file", outside.to_string_lossy().trim_start_matches('/'));
    assert_eq!(named(&entries, &inside).bytes, b"1");
    assert_eq!(fs::read_dir(&outside).expect("a folder").count(), 0);
}

#[test]
fn what_is_kept_for_the_runtime_is_refused() {
    let bench = Bench::new();
    for tar in [
        Tar::new().file(".uk/init", ""),
        Tar::new().directory("./.uk/"),
        Tar::new().symlink(".uk", "/tmp"),
        Tar::new().symlink("way", ".uk").file("way/init", ""),
    ] {
        let said = bench.refusal(&tar.done());
        assert!(
            said.ends_with("`/.uk` is kept for the runtime's own files; remove it from the source"),
            "{said}"
        );
    }
    let root = bench.path("root");
    fs::create_dir_all(root.join(".uk")).expect("a folder");
    let said = why(&bench.image(&root).expect_err("a refusal"));
    assert!(said.starts_with("entry `.uk` of "), "{said}");
    for place in ["proc", "dev", "uk"] {
        let said = bench.refusal(&Tar::new().symlink(place, "/").done());
        assert_eq!(
            said,
            format!(
                "entry `{place}` of source.tar: its path leads through `/{place}`, which is not a \
                 directory"
            )
        );
    }
    let said = bench.refusal(&Tar::new().file("TRAILER!!!", "").file("b", "").done());
    assert!(said.ends_with("would end the initramfs; remove it from the source"), "{said}");
}

#[test]
fn odd_entries_are_taken_as_they_are_meant() {
    let bench = Bench::new();
    let device = |kind, name: &str, tar: Tar| {
        tar.put(kind, name, "", b"", |header| {
            header.set_device_major(1).expect("a field");
            header.set_device_minor(3).expect("a field");
        })
    };
    let tar = Tar::new().file("twice", "first").file("twice", "last").file("old/", "");
    let tar = device(EntryType::Char, "null", device(EntryType::Block, "disk", tar));
    let tar = tar
        .put(EntryType::Fifo, "pipe", "", b"", |_| {})
        .put(EntryType::XGlobalHeader, "g", "", b"11 comment=\n", |_| {})
        .put(EntryType::Regular, "late", "", b"", |header| header.set_mtime(1 << 33));
    let tar = tar.link("hard", "twice").file("twice", "after");
    let entries = bench.entries(&tar.done());
    assert_eq!(named(&entries, "twice").bytes, b"after");
    assert_eq!(named(&entries, "hard").bytes, b"last");
    assert_eq!(named(&entries, "hard").owner, (1000, 100));
    assert_eq!(named(&entries, "old").mode, 0o040_644);
    assert_eq!((named(&entries, "null").mode, named(&entries, "null").device), (0o020_644, (1, 3)));
    assert_eq!(named(&entries, "disk").mode, 0o060_644);
    assert_eq!(named(&entries, "pipe").mode, 0o010_644);
    assert_eq!(named(&entries, "late").mtime, u32::MAX);
    assert!(!entries.iter().any(|entry| entry.name == "g"));
}

#[test]
fn extensions_of_the_format_are_read() {
    let bench = Bench::new();
    let (long, target) = (format!("{}/x", "n".repeat(200)), "t".repeat(300));
    let mut tar = Tar::new();
    let mut header = tar::Header::new_gnu();
    header.set_size(2);
    header.set_mode(0o600);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    tar.0.append_data(&mut header, &long, &b"ab"[..]).expect("a long name");
    header.set_size(0);
    header.set_entry_type(EntryType::Symlink);
    tar.0.append_link(&mut header, "link", &target).expect("a long link");
    tar.0
        .append_pax_extensions([("path", &b"pax/name"[..]), ("uid", b"70000"), ("size", b"3")])
        .expect("pax headers");
    let tar = tar.put(EntryType::Regular, "short", "", b"abc", |header| header.set_uid(0));
    let entries = bench.entries(&tar.done());
    assert_eq!(named(&entries, &long).bytes, b"ab");
    assert_eq!(named(&entries, "link").bytes, target.as_bytes());
    assert_eq!(named(&entries, "pax/name").bytes, b"abc");
    assert_eq!(named(&entries, "pax/name").owner.0, 70_000);
}

#[test]
fn sparse_files_are_filled() {
    let bench = Bench::new();
    let sparse = |real: u64| {
        Tar::new().put(EntryType::GNUSparse, "sparse", "", b"data", |header| {
            let gnu = header.as_gnu_mut().expect("a header of GNU");
            gnu.set_real_size(real);
            gnu.sparse[0].set_offset(1000);
            gnu.sparse[0].set_length(4);
            gnu.sparse[1].set_offset(real);
            gnu.sparse[1].set_length(0);
        })
    };
    let entries = bench.entries(&sparse(2000).file("after", "b").done());
    let bytes = &named(&entries, "sparse").bytes;
    assert_eq!((bytes.len(), &bytes[1000..1004]), (2000, &b"data"[..]));
    assert_eq!(named(&entries, "after").bytes, b"b");
    assert_eq!(
        bench.refusal(&sparse(1 << 40).done()),
        "entry `sparse` of source.tar: it has 1099511627776 bytes; an initramfs takes files below \
         4 GiB"
    );
    let mut tar = Tar::new();
    tar.0.append_pax_extensions([("GNU.sparse.major", &b"1"[..])]).expect("pax headers");
    let said = bench.refusal(&tar.file("a", "").done());
    assert!(said.contains("it is a sparse file in pax format"), "{said}");
}

#[test]
fn sizes_are_not_believed() {
    let bench = Bench::new();
    let huge =
        |size| Tar::new().put(EntryType::Regular, "a", "", b"", |header| header.set_size(size));
    let said = bench.refusal(&huge(1 << 50).done());
    assert!(
        said.ends_with("it has 1125899906842624 bytes; an initramfs takes files below 4 GiB"),
        "{said}"
    );
    for tar in [huge(1 << 31).done(), gzip(&huge(1 << 31).done())] {
        let said = bench.refusal(&tar);
        assert_eq!(said, "source.tar is cut off: its end is missing; fetch or export it again");
    }
    // Headers go into memory.
    let long = vec![b'n'; 5 << 20];
    let tar = Tar::new().put(EntryType::GNULongName, "", "", &long, |_| {}).file("a", "");
    let said = bench.refusal(&zstd(&tar.done()));
    assert!(said.ends_with(": the headers of an entry take more than 4 MiB"), "{said}");
    let tar = Tar::new().file("a", &"a".repeat(1000)).file("b", &"b".repeat(1000)).done();
    let options = Options { limit_bytes: 1999, ..Options::default() };
    for bytes in [gzip(&tar), tar] {
        let path = bench.write("source.tar", &bytes);
        let said = why(&bench.image_with(&path, &options).expect_err("a refusal"));
        assert!(said.starts_with("the contents take more than 1999 bytes"), "{said}");
    }
}

#[test]
fn an_archive_that_is_cut_off_is_refused_wherever_it_is() {
    let bench = Bench::new();
    let tar = Tar::new().file("a", &"a".repeat(700)).directory("d").file("d/b", "b").done();
    // Without the blocks at its end: all contents are there, but who knows.
    let whole = tar.len() - 1024;
    for cut in [0, 1, 511, 512, 600, 1024, 1536, 2048, whole] {
        let said = bench.refusal(&tar[..cut]);
        assert!(said.starts_with("source.tar is cut off"), "{cut}: {said}");
        let said = bench.refusal(&gzip(&tar[..cut]));
        assert!(said.starts_with("source.tar is cut off"), "{cut}: {said}");
    }
    for packed in [gzip(&tar), zstd(&tar)] {
        for cut in [5, packed.len() / 2, packed.len() - 1] {
            let said = bench.refusal(&packed[..cut]);
            assert!(said.starts_with("source.tar is cut off"), "{cut}: {said}");
        }
    }
}

#[test]
fn damage_is_found() {
    let bench = Bench::new();
    let tar = Tar::new().file("a", &"abcdefgh".repeat(700)).done();
    let no_tar =
        "source.tar cannot be read as a tar archive (plain, or compressed with gzip or zstd)";
    assert!(bench.refusal(&[b'x'; 4096]).starts_with(no_tar));
    assert!(bench.refusal(b"\xfd7zXZ\0rest").ends_with(": it is compressed with xz"));
    let mut packed = gzip(&tar);
    let checksum = packed.len() - 6;
    packed[checksum] ^= 1;
    assert!(bench.refusal(&packed).starts_with(no_tar));
    let mut packed = zstd(&tar);
    let checksum = packed.len() - 2;
    packed[checksum] ^= 1;
    assert_eq!(bench.refusal(&packed), format!("{no_tar}: its checksum is wrong"));
    let said = bench.refusal(&Tar::new().put(EntryType::new(b'Z'), "a", "", b"", |_| {}).done());
    assert_eq!(said, "entry `a` of source.tar: it is of a kind that is not known (type 0x5a)");
    let said = bench.refusal(&Tar::new().file("oci-layout", "{}").file("index.json", "{}").done());
    assert!(said.starts_with("source.tar is a saved image, not a file system"), "{said}");
}

#[test]
fn other_things_than_files_are_refused() {
    let bench = Bench::new();
    let said = why(&bench.image(&bench.path("none")).expect_err("a refusal"));
    assert!(said.starts_with("cannot look at ") && said.contains("No such file"), "{said}");
    let said = why(&bench.image("/dev/null".as_ref()).expect_err("a refusal"));
    assert!(
        said.starts_with("/dev/null is neither a file nor a directory; a directory,"),
        "{said}"
    );
    let root = bench.path("root");
    fs::create_dir(&root).expect("a folder");
    symlink("/etc/hostname", root.join("link")).expect("a link");
    let entries = bench.image(&root).expect("an image").1;
    assert_eq!(named(&common::read(&entries).0, "link").bytes, b"/etc/hostname");
}
