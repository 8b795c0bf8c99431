use super::*;

fn directory() -> Kind {
    Kind::Directory(BTreeMap::new())
}

fn file(text: &'static str) -> Kind {
    Kind::File(Content::Bytes(text.as_bytes().into()))
}

fn symlink(target: &str) -> Kind {
    Kind::Symlink(target.as_bytes().into())
}

fn add(tree: &mut Tree, path: &str, kind: Kind) -> Result<NodeId, EntryError> {
    tree.add(path.as_bytes(), Meta::root(0o644), kind)
}

/// All names, those of directories with a slash.
fn names(tree: &Tree) -> Vec<String> {
    fn below(tree: &Tree, node: NodeId, path: &str, found: &mut Vec<String>) {
        for (name, slot) in tree.children(node).into_iter().flatten() {
            let path = format!("{path}{}", shown(name));
            if tree.children(slot.node).is_some() {
                found.push(format!("{path}/"));
                below(tree, slot.node, &format!("{path}/"), found);
            } else {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    below(tree, ROOT, "", &mut found);
    found
}

#[test]
fn parents_are_made_and_the_last_one_wins() {
    let mut tree = Tree::new();
    add(&mut tree, "a/b/c", file("1")).expect("a file");
    add(&mut tree, "a/b", directory()).expect("a directory stays one");
    assert_eq!(names(&tree), ["a/", "a/b/", "a/b/c"]);
    add(&mut tree, "a/b", file("2")).expect("a file takes its place");
    assert_eq!(names(&tree), ["a/", "a/b"]);
}

#[test]
fn a_link_leads_no_further_than_the_root() {
    let mut tree = Tree::new();
    add(&mut tree, "usr/lib", directory()).expect("a directory");
    add(&mut tree, "lib", symlink("usr/lib")).expect("a link");
    add(&mut tree, "usr/up", symlink("../../../../etc")).expect("a link");
    add(&mut tree, "abs", symlink("/usr")).expect("a link");
    add(&mut tree, "lib/a", file("")).expect("through a link");
    add(&mut tree, "usr/up/b", file("")).expect("to the root at most");
    add(&mut tree, "abs/c", file("")).expect("from the root of the image");
    assert_eq!(
        names(&tree),
        ["abs", "etc/", "etc/b", "lib", "usr/", "usr/c", "usr/lib/", "usr/lib/a", "usr/up"]
    );
}

#[test]
fn ways_that_are_none_are_refused() {
    let mut tree = Tree::new();
    add(&mut tree, "loop", symlink("loop")).expect("a link");
    assert!(matches!(add(&mut tree, "loop/a", file("")), Err(EntryError::Loop)));
    add(&mut tree, "file", file("")).expect("a file");
    assert!(matches!(add(&mut tree, "file/a", file("")), Err(EntryError::Through { .. })));
    assert!(matches!(add(&mut tree, "/", file("")), Err(EntryError::Root)));
    assert!(matches!(add(&mut tree, "TRAILER!!!", file("")), Err(EntryError::Trailer)));
    add(&mut tree, "a/TRAILER!!!", file("")).expect("it ends nothing there");
    let long = "x/".repeat(2047);
    add(&mut tree, &long, directory()).expect("4093 bytes");
    add(&mut tree, "short", symlink(&format!("/{}", &long[..4000]))).expect("a link");
    let path = format!("short/{}", "y/".repeat(100));
    assert!(matches!(add(&mut tree, &path, directory()), Err(EntryError::LongPath { .. })));
}

#[test]
fn what_is_kept_for_the_runtime_is_refused_through_links_too() {
    let mut tree = Tree::new();
    add(&mut tree, "way", symlink("/.uk")).expect("a link to nothing");
    for path in [".uk", "/.uk/init", "./.uk/a/b", "way/init"] {
        assert!(matches!(add(&mut tree, path, file("")), Err(EntryError::Reserved)), "{path}");
    }
    add(&mut tree, "a/.uk", file("")).expect("only at the root");
    tree.take_over();
    add(&mut tree, ".uk/init", file("")).expect("its own");
}

#[test]
fn a_hard_link_needs_a_file_before_it() {
    let mut tree = Tree::new();
    add(&mut tree, "a", file("1")).expect("a file");
    add(&mut tree, "d", directory()).expect("a directory");
    tree.link(b"d/b", b"/a").expect("another name");
    assert_eq!(tree.find(b"a").expect("a"), tree.find(b"d/b").expect("b"));
    for target in ["nothing", "d", ""] {
        let linked = tree.link(b"c", target.as_bytes());
        assert!(matches!(linked, Err(EntryError::LinkTarget { .. })), "{target}");
    }
    assert!(matches!(tree.link(b"c", b"../a"), Err(EntryError::Parent)));
}

#[test]
fn a_whiteout_hides_lower_layers_alone() {
    let mut tree = Tree::new();
    for path in ["a/1", "a/2", "b/1", "c", "d/e/1"] {
        add(&mut tree, path, file("")).expect(path);
    }
    tree.next_layer();
    // The order within a layer does not matter.
    add(&mut tree, "a/3", file("")).expect("a file");
    tree.hide_all(&[b"a"]).expect("opaque");
    add(&mut tree, "a/4", file("")).expect("a file");
    tree.hide(&[], b"b").expect("a whiteout");
    add(&mut tree, "c", file("new")).expect("a file");
    tree.hide(&[], b"c").expect("a whiteout");
    tree.hide(&[b"d"], b"e").expect("a whiteout");
    tree.hide(&[b"none"], b"e").expect("of nothing");
    assert_eq!(names(&tree), ["a/", "a/3", "a/4", "c", "d/"]);
    tree.next_layer();
    tree.hide_all(&[]).expect("opaque");
    assert!(names(&tree).is_empty());
}

#[test]
fn limits_hold() {
    let mut tree = Tree::new();
    let device = |major, minor| Kind::Device { block: true, major, minor };
    add(&mut tree, "good", device(4095, 1_048_575)).expect("the largest");
    assert!(matches!(add(&mut tree, "bad", device(4096, 0)), Err(EntryError::Device { .. })));
    assert!(matches!(add(&mut tree, "l", symlink("")), Err(EntryError::NoTarget)));
    assert!(matches!(add(&mut tree, "l", symlink("a\0b")), Err(EntryError::Nul)));
    let target = "t".repeat(4095);
    let mut last = Ok(ROOT);
    for count in 0..20_000 {
        last = add(&mut tree, &format!("l{count}"), symlink(&target));
        if last.is_err() {
            break;
        }
    }
    assert!(matches!(last, Err(EntryError::TooMany { .. })));
}
