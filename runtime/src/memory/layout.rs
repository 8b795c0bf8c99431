//! Where guest RAM lies, in the guest and in the image.

use guest_abi::entry::{HOLE_END, HOLE_START};

/// Bytes of the page that dirty tracking, capture and apply work in.
pub const PAGE: usize = 4096;

/// One range of guest RAM and its place in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// First guest physical address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Offset of its first byte in the image.
    pub offset: u64,
}

/// Guest RAM: one range below the hole for interrupt controllers, the rest from 4 GiB on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamLayout {
    bytes: u64,
}

impl RamLayout {
    /// Most RAM that the page tables of a bare guest can map.
    pub const MAX_MIB: u32 = 63 * 1024;
    /// Least RAM: the low area and a small ELF.
    pub const MIN_MIB: u32 = 8;

    /// A layout of `mib` mebibytes.
    #[must_use]
    pub fn new(mib: u32) -> Self {
        Self { bytes: u64::from(mib) << 20 }
    }

    /// Bytes of RAM.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Pages of RAM.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.bytes / PAGE as u64
    }

    /// The ranges, in order; their index is the number of the memslot.
    pub fn ranges(&self) -> impl Iterator<Item = RamRange> + use<> {
        let low = RamRange { start: 0, len: self.bytes.min(HOLE_START), offset: 0 };
        let high = RamRange { start: HOLE_END, len: self.bytes - low.len, offset: low.len };
        [low, high].into_iter().filter(|range| range.len > 0)
    }

    /// The first guest physical address behind RAM.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.ranges().map(|range| range.start + range.len).max().unwrap_or(0)
    }

    /// The guest physical address of the byte at `offset` of the image.
    #[must_use]
    pub const fn address(offset: u64) -> u64 {
        if offset < HOLE_START { offset } else { offset - HOLE_START + HOLE_END }
    }

    /// The image page that holds page `offset` of memslot `slot`.
    #[must_use]
    pub fn image_page(&self, slot: u32, offset: u64) -> Option<u32> {
        let range = self.ranges().nth(slot as usize)?;
        if offset >= range.len / PAGE as u64 {
            return None;
        }
        u32::try_from(range.offset / PAGE as u64 + offset).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_steps_over_the_hole() {
        let ranges: Vec<_> = RamLayout::new(4096).ranges().collect();
        assert_eq!(ranges.len(), 2);
        assert_eq!(ranges[0], RamRange { start: 0, len: 3 << 30, offset: 0 });
        assert_eq!(ranges[1], RamRange { start: 4 << 30, len: 1 << 30, offset: 3 << 30 });
        assert_eq!(RamLayout::new(512).ranges().count(), 1);
        for range in ranges {
            assert_eq!(RamLayout::address(range.offset), range.start);
            assert_eq!(
                RamLayout::address(range.offset + range.len - 1),
                range.start + range.len - 1
            );
        }
        assert_eq!((RamLayout::new(512).end(), RamLayout::new(4096).end()), (512 << 20, 5 << 30));
    }

    #[test]
    fn pages_out_of_range_have_no_place_in_the_image() {
        let layout = RamLayout::new(4096);
        assert_eq!(layout.image_page(1, 0), Some(3 << 18));
        assert_eq!(layout.image_page(1, 1 << 18), None);
        assert_eq!(layout.image_page(2, 0), None);
    }
}
