//! Buckets of logarithmic width with linear steps in between, as an HDR histogram has them: each is
//! at most a sixteenth of its value wide. Everything is integer arithmetic that the kernel's
//! verifier follows.
#![expect(clippy::cast_possible_truncation, reason = "a bucket's number is below BUCKETS")]

/// Steps between two powers of two, as a power of two.
pub const SUB_BITS: u32 = 4;
const SUB: u64 = 1 << SUB_BITS;
/// Values from here on share the last bucket: a minute, in ns.
const MOST_BITS: u32 = 36;
/// Number of buckets.
pub const BUCKETS: u16 = ((MOST_BITS - SUB_BITS + 1) << SUB_BITS) as u16;

/// The bucket of a value.
#[must_use]
#[inline]
pub const fn bucket(value: u64) -> u16 {
    if value < SUB {
        return value as u16;
    }
    if value >> MOST_BITS != 0 {
        return BUCKETS - 1;
    }
    let shift = value.ilog2() - SUB_BITS;
    (((shift as u64 + 1) << SUB_BITS) + ((value >> shift) & (SUB - 1))) as u16
}

/// The lowest value of a bucket.
#[must_use]
pub const fn lowest(bucket: u16) -> u64 {
    let (octave, step) = (bucket as u64 >> SUB_BITS, bucket as u64 & (SUB - 1));
    if octave == 0 { step } else { (SUB + step) << (octave - 1) }
}

/// The highest value of a bucket; that of the last one is where it begins to hold everything.
#[must_use]
pub const fn highest(bucket: u16) -> u64 {
    lowest(bucket + 1) - 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn buckets_follow_each_other_without_a_gap() {
        for index in 0..BUCKETS - 1 {
            assert_eq!(bucket(lowest(index)), index);
            assert_eq!(bucket(highest(index)), index);
            assert_eq!(highest(index) + 1, lowest(index + 1));
        }
        assert_eq!(bucket(0), 0);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
        assert_eq!(highest(BUCKETS - 1) + 1, 1 << MOST_BITS);
    }

    proptest! {
        #[test]
        fn a_value_lies_in_its_bucket_and_that_is_narrow(value in 0..(1_u64 << MOST_BITS)) {
            let index = bucket(value);
            prop_assert!(lowest(index) <= value && value <= highest(index));
            prop_assert!((highest(index) - lowest(index)) * SUB <= lowest(index));
        }
    }
}
