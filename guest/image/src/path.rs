//! Names as sources write them: taken apart, and checked.
//!
//! An image has no outside: a path begins at its root, with or without a slash. So `/etc/passwd` is
//! `etc/passwd`; `..` is refused, because nobody who packs a tree writes it.

use crate::error::EntryError;

/// The longest path and the longest target of a link that the kernel's unpacker takes, without the
/// NUL at its end (`PATH_MAX`; it leaves longer ones out without a word).
pub const PATH_BYTES: usize = 4095;
/// `NAME_MAX`.
const NAME_BYTES: usize = 255;

/// What the name of an entry in a layer says (OCI image layer specification, "Whiteouts").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whiteout<'a> {
    /// The directory's contents in lower layers are gone.
    Opaque,
    /// One file or directory of lower layers is gone.
    File(&'a [u8]),
    /// Something of a storage driver, without meaning here.
    Driver,
}

/// Takes a path apart; the root is an empty list.
///
/// # Errors
///
/// If it has `..`, NUL bytes, or is longer than a kernel takes.
pub fn components(path: &[u8]) -> Result<Vec<&[u8]>, EntryError> {
    if path.len() > 2 * PATH_BYTES {
        // Slashes and dots may go; no more than that many of them.
        return Err(EntryError::LongPath { len_bytes: path.len() });
    }
    let mut names = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err(EntryError::Parent),
            name if name.contains(&0) => return Err(EntryError::Nul),
            name if name.len() > NAME_BYTES => {
                return Err(EntryError::LongName { len_bytes: name.len() });
            }
            name => names.push(name),
        }
    }
    Ok(names)
}

/// The target of a symbolic link: any text, but one that the kernel takes.
///
/// # Errors
///
/// If it is empty, too long, or has a NUL byte.
pub fn target(target: &[u8]) -> Result<&[u8], EntryError> {
    match target {
        b"" => Err(EntryError::NoTarget),
        long if long.len() > PATH_BYTES => Err(EntryError::LongPath { len_bytes: long.len() }),
        nul if nul.contains(&0) => Err(EntryError::Nul),
        good => Ok(good),
    }
}

/// Whether `name`, the last part of a path, is a whiteout.
///
/// # Errors
///
/// If it is one for the directory itself or the one above it.
pub fn whiteout(name: &[u8]) -> Result<Option<Whiteout<'_>>, EntryError> {
    match name.strip_prefix(b".wh.") {
        None => Ok(None),
        Some(b".wh..opq") => Ok(Some(Whiteout::Opaque)),
        Some(driver) if driver.starts_with(b".wh.") => Ok(Some(Whiteout::Driver)),
        Some(b"" | b"." | b"..") => Err(EntryError::Whiteout),
        Some(file) => Ok(Some(Whiteout::File(file))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_path_begins_at_the_root_of_the_image() {
        let names: &[&[u8]] = &[b"a", b"b"];
        for path in ["a/b", "/a/b", "./a/b", "a//b/", "/./a/./b/."] {
            assert_eq!(components(path.as_bytes()).expect(path), names, "{path}");
        }
        for root in ["", "/", ".", "./", "//."] {
            assert!(components(root.as_bytes()).expect(root).is_empty(), "{root:?}");
        }
    }

    #[test]
    fn what_leads_out_or_is_too_long_is_refused() {
        for path in ["..", "../a", "a/..", "/a/../../b"] {
            assert!(matches!(components(path.as_bytes()), Err(EntryError::Parent)), "{path}");
        }
        assert!(matches!(components(b"a\0b"), Err(EntryError::Nul)));
        assert!(components(&[b'a'; 255]).is_ok());
        assert!(matches!(components(&[b'a'; 256]), Err(EntryError::LongName { len_bytes: 256 })));
        assert!(matches!(components(&[b'/'; 9000]), Err(EntryError::LongPath { .. })));
    }

    #[test]
    fn whiteouts_are_told_from_names() {
        assert_eq!(whiteout(b"wh.a").expect("a name"), None);
        assert_eq!(whiteout(b".wh.a").expect("one"), Some(Whiteout::File(b"a")));
        assert_eq!(whiteout(b".wh..wh..opq").expect("one"), Some(Whiteout::Opaque));
        assert_eq!(whiteout(b".wh..wh.plnk").expect("one"), Some(Whiteout::Driver));
        for wrong in [".wh.", ".wh..", ".wh..."] {
            assert!(matches!(whiteout(wrong.as_bytes()), Err(EntryError::Whiteout)), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn what_comes_out_is_a_plain_path(path in proptest::collection::vec(
            prop_oneof![4 => Just(b'/'), 4 => Just(b'.'), 4 => Just(b'a'), 1 => any::<u8>()], 0..40,
        )) {
            if let Ok(names) = components(&path) {
                for name in &names {
                    prop_assert!(!name.is_empty() && *name != b"." && *name != b"..");
                    prop_assert!(!name.contains(&b'/') && !name.contains(&0));
                }
                let joined = names.join(&b'/');
                prop_assert_eq!(components(&joined).expect("once more"), names);
            } else {
                let parts: Vec<_> = path.split(|byte| *byte == b'/').collect();
                prop_assert!(parts.contains(&&b".."[..]) || path.contains(&0));
            }
        }

        #[test]
        fn a_whiteout_never_names_a_way(name in "(\\.wh\\.)?[.a]{0,4}|\\.wh\\.\\.wh\\.[.a]{0,4}") {
            if let Ok(Some(Whiteout::File(file))) = whiteout(name.as_bytes()) {
                prop_assert!(!file.is_empty() && file != b"." && file != b"..");
                prop_assert_eq!(&[b".wh.", file].concat(), name.as_bytes());
            }
        }
    }
}
