//! Images that are kept: made once, made again when damaged.

mod common;

use std::cell::Cell;
use std::fs;
use std::path::Path;

use common::{Bench, Tar, why};
use guest_image::{Built, ImageError, Options, Progress, Source, build};

fn kept(bench: &Bench, source: &Path, command: Option<&[String]>) -> Result<Built, ImageError> {
    let (cache, kernel) = (bench.path("cache"), bench.path("kernel"));
    let options = Options {
        cache_dir: Some(&cache),
        kernel_dir: Some(&kernel),
        command,
        ..Options::default()
    };
    build(&Source::find(source)?, &options)
}

fn files(bench: &Bench) -> usize {
    fs::read_dir(bench.path("cache/images")).expect("a folder").count()
}

#[test]
fn an_image_is_made_once() {
    let bench = Bench::new();
    let root = bench.path("root");
    fs::create_dir(&root).expect("a folder");
    fs::write(root.join("a"), "1").expect("a file");
    let tar = bench.write("source.tar", &Tar::new().file("a", "1").done());
    for source in [&root, &tar] {
        let first = kept(&bench, source, None).expect("an image");
        assert!(!first.cached && first.path.starts_with(bench.path("cache/images")));
        let again = kept(&bench, source, None).expect("the same");
        assert_eq!(again, Built { cached: true, ..first });
    }
    // What a killed process leaves goes when it is old.
    for name in [".new-old", ".new-young"] {
        fs::write(bench.path("cache/images").join(name), "begun").expect("a file");
    }
    common::touch(&bench.path("cache/images/.new-old"), 1);
    kept(&bench, &root, None).expect("the same");
    assert!(bench.path("cache/images/.new-young").exists());
    assert_eq!(files(&bench), 5);
}

#[test]
fn whatever_goes_into_an_image_makes_it_another() {
    let bench = Bench::new();
    let source = bench.path("source");
    fs::create_dir(&source).expect("a folder");
    fs::write(source.join("a"), "1").expect("a file");
    let mut seen = vec![kept(&bench, &source, None).expect("an image").path];
    let mut other = |command: Option<&[String]>| {
        let built = kept(&bench, &source, command).expect("an image");
        assert!(!built.cached && !seen.contains(&built.path), "{seen:?}");
        seen.push(built.path);
    };
    common::touch(&source.join("a"), 1);
    other(None);
    fs::write(source.join("a"), "2").expect("a file");
    common::touch(&source.join("a"), 1);
    other(None);
    other(Some(&["a".to_owned(), "b".to_owned()]));
    other(Some(&["a b".to_owned()]));
    fs::write(bench.path("kernel/rng-core.ko"), common::module("vsock")).expect("a file");
    other(None);
}

#[test]
fn a_damaged_image_is_made_again() {
    let bench = Bench::new();
    let source = bench.write("source.tar", &Tar::new().file("a", "text").done());
    let first = kept(&bench, &source, None).expect("an image");
    let whole = fs::read(&first.path).expect("it");
    let beside = first.path.with_extension("json");
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    let damages: [(&Path, &[u8]); 5] = [
        (&first.path, &flipped),
        (&first.path, &whole[..whole.len() - 1]),
        (&first.path, b""),
        (&beside, b"{"),
        (&beside, b""),
    ];
    for (path, bytes) in damages {
        fs::write(path, bytes).expect("a file");
        assert_eq!(kept(&bench, &source, None).expect("an image"), first);
        assert!(fs::read(&first.path).expect("it") == whole);
        assert!(kept(&bench, &source, None).expect("an image").cached);
    }
    fs::remove_file(&beside).expect("it");
    assert!(!kept(&bench, &source, None).expect("an image").cached);
    assert_eq!(files(&bench), 2);
}

#[test]
fn what_fails_leaves_nothing() {
    let bench = Bench::new();
    let tar = Tar::new().file("a", &"a".repeat(5000)).done();
    let source = bench.write("source.tar", &common::gzip(&tar[..2000]));
    let said = why(&kept(&bench, &source, None).expect_err("a refusal"));
    assert!(said.contains("source.tar is cut off"), "{said}");
    assert_eq!(files(&bench), 0);
    // A file that somebody writes to, between being found and being read.
    let root = bench.path("root");
    fs::create_dir(&root).expect("a folder");
    fs::write(root.join("a"), vec![0; 1000]).expect("a file");
    fs::write(root.join("b"), "1").expect("a file");
    let (out, kernel) = (bench.path("out.cpio"), bench.path("kernel"));
    let changed = Cell::new(false);
    let progress = |told| {
        if matches!(told, Progress::Written(_)) && !changed.replace(true) {
            fs::write(root.join("b"), "other").expect("a file");
        }
    };
    let options = Options {
        output: Some(&out),
        kernel_dir: Some(&kernel),
        progress: &progress,
        ..Options::default()
    };
    let said = why(&build(&Source::Directory(root.clone()), &options).expect_err("a refusal"));
    assert!(said.contains("root/b changed while it was read"), "{said}");
    assert!(!out.exists());
}

#[test]
fn progress_tells_all_that_is_read() {
    let bench = Bench::new();
    let source = bench.write("source.tar", &Tar::new().file("a", &"a".repeat(5000)).done());
    let (out, kernel) = (bench.path("out.cpio"), bench.path("kernel"));
    let (total, read, written) = (Cell::new(0), Cell::new(0), Cell::new(0));
    let progress = |told| match told {
        Progress::Source(bytes) => total.set(bytes),
        Progress::Read(bytes) => read.set(read.get() + bytes),
        Progress::Written(bytes) => written.set(written.get() + bytes),
    };
    let options = Options {
        output: Some(&out),
        kernel_dir: Some(&kernel),
        progress: &progress,
        ..Options::default()
    };
    let built = build(&Source::find(&source).expect("a source"), &options).expect("an image");
    assert_eq!(total.get(), fs::metadata(&source).expect("it").len());
    assert!(read.get() > 5000 && read.get() <= total.get());
    assert_eq!(written.get(), built.bytes);
}
