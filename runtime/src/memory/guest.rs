//! Access to guest RAM by guest address, for our devices and loaders.
#![expect(unsafe_code, reason = "building vm-memory regions over our own mapping")]

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::{DeviceDirty, Mapping, MemoryError, RamLayout};
use crate::sys::SysError;

/// Guest RAM by guest address; every write marks its pages dirty.
pub type GuestRam = GuestMemoryMmap<DeviceDirty>;

/// Guest RAM over `mapping`, one region per range of `layout`.
///
/// The result does not own the mapping: whoever holds both drops it first.
///
/// # Errors
///
/// If the mapping is smaller than the layout.
pub fn guest_ram(mapping: &Mapping, layout: &RamLayout) -> Result<GuestRam, MemoryError> {
    let invalid =
        || SysError { call: "mapping guest RAM", source: std::io::ErrorKind::InvalidInput.into() };
    if layout.bytes() > mapping.bytes() as u64 {
        return Err(invalid().into());
    }
    let mut regions = Vec::new();
    for range in layout.ranges() {
        let len = usize::try_from(range.len).map_err(|_| invalid())?;
        let offset = usize::try_from(range.offset).map_err(|_| invalid())?;
        // SAFETY: in bounds: all ranges together are as long as the layout, checked above.
        let address = unsafe { mapping.address().as_ptr().add(offset) };
        let builder = MmapRegionBuilder::new_with_bitmap(len, DeviceDirty::for_bytes(len));
        // SAFETY: the range lies in a mapping that outlives the region by this function's contract.
        let builder = unsafe { builder.with_raw_mmap_pointer(address) };
        let region = builder.build().map_err(|_| invalid())?;
        regions.push(GuestRegionMmap::new(region, GuestAddress(range.start)).ok_or_else(invalid)?);
    }
    GuestMemoryMmap::from_regions(regions).map_err(|_| invalid().into())
}
