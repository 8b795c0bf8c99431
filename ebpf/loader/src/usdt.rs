//! Marks in a program for tracers (USDT): where they are, from its notes.

use std::path::Path;

use object::elf::{FileHeader64, SHT_NOTE};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};
use object::{Endianness, ReadCache};

/// Type of the notes, and who they are from.
const STAPSDT: u32 = 3;
const OWNER: &[u8] = b"stapsdt";

/// The offset in the file of the first mark of that name.
pub(crate) fn offset(path: &Path, provider: &str, name: &str) -> Option<u64> {
    let data = ReadCache::new(std::fs::File::open(path).ok()?);
    let header = FileHeader64::<Endianness>::parse(&data).ok()?;
    let endian = header.endian().ok()?;
    let sections = header.sections(endian, &data).ok()?;
    let base = sections.section_by_name(endian, b".stapsdt.base");
    let base = base.map(|(_, section)| section.sh_addr(endian));
    let (address, linked_base) = sections
        .iter()
        .filter(|section| section.sh_type(endian) == SHT_NOTE)
        .filter_map(|section| section.notes(endian, &data).ok().flatten())
        .find_map(|mut notes| {
            while let Ok(Some(note)) = notes.next() {
                if note.n_type(endian) == STAPSDT
                    && note.name() == OWNER
                    && let Some(found) = mark(note.desc(), provider, name)
                {
                    return Some(found);
                }
            }
            None
        })?;
    // A linker that moved everything has moved the base by as much.
    let address = address.wrapping_add(base.unwrap_or(linked_base).wrapping_sub(linked_base));
    header.program_headers(endian, &data).ok()?.iter().find_map(|segment| {
        let within = address.checked_sub(segment.p_vaddr(endian))?;
        (segment.p_type(endian) == object::elf::PT_LOAD && within < segment.p_filesz(endian))
            .then(|| segment.p_offset(endian) + within)
    })
}

/// Address and base of a note's mark, if it is the one.
fn mark(note: &[u8], provider: &str, name: &str) -> Option<(u64, u64)> {
    let word = |at: usize| Some(u64::from_le_bytes(note.get(at..at + 8)?.try_into().ok()?));
    let mut texts = note.get(24..)?.split(|byte| *byte == 0);
    let ours = texts.next()? == provider.as_bytes() && texts.next()? == name.as_bytes();
    ours.then_some((word(0)?, word(8)?))
}
