//! The doorbell: ports of the virtual machine that fork and stop it.

pub mod ports;

use std::io;

use guest_abi::port::answer;
use uuid::Uuid;

const EIO: u32 = 5;

/// Words of the answer that the agent reads: those before the list of children. It asks for one
/// child at a time, and that one's UUID is among them.
pub type Words = [u32; answer::WORDS];

/// Forks and stops this machine. The methods may be called by any thread.
pub trait Doorbell: Send + Sync {
    /// A fork is expected within this many microseconds.
    ///
    /// # Errors
    ///
    /// The port cannot be used.
    fn announce(&self, window_us: u32) -> io::Result<()>;

    /// Forks, and returns in both machines.
    ///
    /// # Errors
    ///
    /// The port cannot be used. That the fork failed is told by the answer.
    fn fork(&self) -> io::Result<Words>;

    /// The machine may be armed from here on.
    ///
    /// # Errors
    ///
    /// The port cannot be used.
    fn ready(&self) -> io::Result<()>;

    /// Stops the machine.
    ///
    /// # Errors
    ///
    /// The port cannot be used.
    fn exit(&self, code: u8) -> io::Result<()>;

    /// The host's wall clock, in nanoseconds since the epoch.
    ///
    /// # Errors
    ///
    /// The port cannot be used, or this host tells no time.
    fn clock_ns(&self) -> io::Result<u64>;
}

/// What came of a fork.
#[derive(Clone, PartialEq, Eq)]
pub enum Outcome {
    /// This is the machine that asked.
    Parent {
        /// Its child.
        child: Uuid,
        /// Its own UUID.
        own: Uuid,
    },
    /// This is the child.
    Child(Identity),
    /// There is no child.
    Failed {
        /// Error number.
        errno: u32,
        /// Number of the step that failed.
        step: u32,
    },
}

/// What a child has for itself alone.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its UUID.
    pub uuid: Uuid,
    /// Its generation.
    pub generation: u64,
    /// Fresh random bytes.
    pub entropy: [u8; 32],
}

impl Outcome {
    /// What the words of an answer say.
    #[must_use]
    pub fn of(words: &Words) -> Self {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let (errno, step) = (words[answer::STATUS], words[answer::FAILED_STEP]);
        if errno != 0 {
            return Self::Failed { errno, step };
        }
        if words[answer::ROLE] == 0 {
            let uuid = |at| Uuid::from_bytes(part(&bytes, at));
            let (child, own) = (uuid(answer::CHILD_UUID), uuid(answer::OWN_UUID));
            if child.is_nil() {
                // Nobody has answered: a child's UUID of zeroes would tell the parent that it is the child.
                return Self::Failed { errno: EIO, step: 0 };
            }
            return Self::Parent { child, own };
        }
        Self::Child(Identity {
            uuid: Uuid::from_bytes(part(&bytes, answer::OWN_UUID)),
            generation: u64::from_le_bytes(part(&bytes, answer::GENERATION)),
            entropy: part(&bytes, answer::ENTROPY),
        })
    }
}

/// The bytes from word `at` on; zeroes where there are none.
fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut part = [0; N];
    for (to, from) in part.iter_mut().zip(bytes.iter().skip(at * 4)) {
        *to = *from;
    }
    part
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words() -> Words {
        let mut words = [0; answer::WORDS];
        for (at, word) in (1_u32..).zip(&mut words) {
            *word = at * 0x0101_0101;
        }
        words[answer::STATUS] = 0;
        words[answer::ROLE] = 0;
        words
    }

    #[test]
    fn the_parent_reads_the_uuid_of_its_child() {
        let mut words = words();
        words[answer::CHILD_UUID] = u32::from_le_bytes([0xde, 0xad, 0xbe, 0xef]);
        let Outcome::Parent { child, own } = Outcome::of(&words) else { panic!("not the parent") };
        assert_eq!(own.as_bytes().first(), Some(&7), "word 6 is the first of its own");
        assert_eq!(child.to_string().get(..8), Some("deadbeef"));
    }

    #[test]
    fn a_child_reads_all_of_its_identity() {
        let mut words = words();
        words[answer::ROLE] = 1;
        (words[answer::GENERATION], words[answer::GENERATION + 1]) = (5, 1);
        (words[answer::REALTIME_NS], words[answer::REALTIME_NS + 1]) = (7, 2);
        let Outcome::Child(identity) = Outcome::of(&words) else { panic!("not the child") };
        assert_eq!(identity.uuid.as_bytes().first(), Some(&7), "word 6 is the first of its UUID");
        assert_eq!(identity.generation, 1 << 32 | 5);
        assert_eq!(identity.entropy.first(), Some(&13));
        assert_eq!(identity.entropy.last(), Some(&20));
    }

    #[test]
    fn a_fork_that_failed_says_in_which_step() {
        let mut words = words();
        (words[answer::STATUS], words[answer::FAILED_STEP]) = (12, 4);
        assert!(matches!(Outcome::of(&words), Outcome::Failed { errno: 12, step: 4 }));
    }

    #[test]
    fn no_answer_is_no_fork() {
        for word in [0, u32::MAX] {
            assert!(matches!(Outcome::of(&[word; answer::WORDS]), Outcome::Failed { .. }));
        }
        let mut words = words();
        words.iter_mut().skip(answer::CHILD_UUID).take(4).for_each(|word| *word = 0);
        assert!(matches!(Outcome::of(&words), Outcome::Failed { errno: EIO, .. }));
    }

    proptest! {
        #[test]
        fn any_words_are_an_outcome(words in proptest::array::uniform24(any::<u32>())) {
            drop(Outcome::of(&words));
        }
    }
}
