//! The answer to a fork, as the guest reads it word after word.

use guest_abi::port::answer;

use crate::fork::Identity;
use crate::sys::realtime_ns;

/// Words to be read, and how far the guest has read.
#[derive(Debug, Default)]
pub struct Answer {
    /// In place: a child's first page fault would be that of an allocation.
    words: [u32; answer::WORDS],
    /// UUIDs of all children, for their parent.
    children: Vec<u32>,
    next: usize,
    /// Whether the children can still fail.
    pending: bool,
}

impl Answer {
    /// The answer in the parent, for as long as it is not known whether its children live.
    #[must_use]
    pub fn parent(own: &Identity, children: &[Identity]) -> Self {
        let mut words = [0; answer::WORDS];
        if let Some(first) = children.first() {
            put_uuid(&mut words, answer::CHILD_UUID, first);
        }
        fill_own(&mut words, own);
        words[answer::CHILDREN] = u32::try_from(children.len()).unwrap_or(0);
        let mut uuids = vec![0; children.len() * 4];
        for (index, child) in children.iter().enumerate() {
            put_uuid(&mut uuids, index * 4, child);
        }
        // The parent is who it was: entropy is for children.
        words[answer::ENTROPY..answer::ENTROPY + 8].fill(0);
        Self { words, children: uuids, next: 0, pending: true }
    }

    /// The answer in child number `index` of `children`.
    #[must_use]
    pub fn child(own: &Identity, index: u32, children: u32) -> Self {
        let mut words = [0; answer::WORDS];
        words[answer::ROLE] = index;
        fill_own(&mut words, own);
        words[answer::CHILDREN] = children;
        Self { words, ..Self::default() }
    }

    /// The answer to a fork that failed.
    #[must_use]
    pub fn failed(own: &Identity, errno: i32, step: u32) -> Self {
        let mut words = [0; answer::WORDS];
        words[answer::STATUS] = errno.unsigned_abs();
        words[answer::FAILED_STEP] = step;
        fill_own(&mut words, own);
        Self { words, ..Self::default() }
    }

    /// Whether it is not known yet what became of the children.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.pending
    }

    /// The children live, or else this is the answer.
    pub fn conclude(&mut self, failed: Option<Self>) {
        if std::mem::take(&mut self.pending)
            && let Some(failed) = failed
        {
            *self = failed;
        }
    }

    /// Fills `data` with the next words; zeroes behind the last.
    pub fn read(&mut self, data: &mut [u8]) {
        for chunk in data.chunks_mut(4) {
            if self.next == answer::REALTIME_NS {
                // A child may have waited for a processor since its answer was made.
                put_u64(&mut self.words, answer::REALTIME_NS, realtime_ns());
            }
            let mut words = self.words.iter().chain(&self.children);
            let word = words.nth(self.next).copied().unwrap_or(0).to_le_bytes();
            for (to, from) in chunk.iter_mut().zip(word) {
                *to = from;
            }
            self.next = self.next.saturating_add(1);
        }
    }
}

fn put_uuid(words: &mut [u32], at: usize, identity: &Identity) {
    for (word, bytes) in words[at..at + 4].iter_mut().zip(identity.uuid.chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
}

fn fill_own(words: &mut [u32], own: &Identity) {
    put_uuid(words, answer::OWN_UUID, own);
    put_u64(words, answer::GENERATION, own.generation);
    for (word, bytes) in
        words[answer::ENTROPY..answer::ENTROPY + 8].iter_mut().zip(own.entropy.chunks_exact(4))
    {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    put_u64(words, answer::REALTIME_NS, realtime_ns());
}

fn put_u64(words: &mut [u32], at: usize, value: u64) {
    let bytes = value.to_le_bytes();
    words[at] = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    words[at + 1] = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_reads_the_zero_uuid_and_its_own() {
        let own = Identity { uuid: [7; 16], generation: 9 << 32 | 1, ..Identity::default() };
        let mut answer = Answer::child(&own, 2, 3);
        let mut data = [0_u8; answer::WORDS * 4 + 8];
        answer.read(&mut data);
        let words: Vec<u32> = data
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
            .collect();
        let word = |at: usize| words[at];
        assert_eq!(word(answer::ROLE), 2);
        assert_eq!(word(answer::CHILD_UUID), 0);
        assert_eq!(word(answer::OWN_UUID), 0x0707_0707);
        assert_eq!((word(answer::GENERATION), word(answer::GENERATION + 1)), (1, 9));
        assert_eq!(word(answer::WORDS), 0, "zeroes behind the last word");
    }
}
