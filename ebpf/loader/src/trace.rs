//! Events one by one.

use aya::maps::{Map, MapData, RingBuf};
use ebpf_common::Event;

use crate::error::ProbeError;

/// The events of processes that are traced.
pub(crate) struct Trace {
    ring: RingBuf<MapData>,
}

impl std::fmt::Debug for Trace {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Trace").finish_non_exhaustive()
    }
}

impl Trace {
    pub(crate) fn new(map: Map) -> Result<Self, ProbeError> {
        let ring = RingBuf::try_from(map).map_err(ProbeError::map("EVENTS"))?;
        Ok(Self { ring })
    }

    /// The events since the last time, in the order in which they ended on each processor.
    pub(crate) fn drain(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(item) = self.ring.next() {
            events.extend(Event::from_bytes(&item));
        }
        events
    }
}
