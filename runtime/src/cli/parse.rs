//! Values that are typed: sizes, lists of processors, names of instances.

use runtime::memory::RamLayout;
use uuid::Uuid;

/// Guest memory in MiB from `512M`, `2G`, `1024MiB`.
pub fn memory(text: &str) -> Result<u32, String> {
    let split = text.find(|char: char| !char.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let mib_per_unit: u32 = match unit.to_ascii_lowercase().as_str() {
        "m" | "mb" | "mib" => 1,
        "g" | "gb" | "gib" => 1024,
        _ => return Err("a number with M or G is needed, such as 512M or 2G".into()),
    };
    let (least, most) = (RamLayout::MIN_MIB, RamLayout::MAX_MIB);
    digits
        .parse::<u32>()
        .ok()
        .and_then(|number| number.checked_mul(mib_per_unit))
        .filter(|mib| (least..=most).contains(mib))
        .ok_or_else(|| format!("between {least}M and {}G are possible", most / 1024))
}

/// Processors as a mask from `0,2-3`.
pub fn processors(text: &str) -> Result<u64, String> {
    let mut mask = 0_u64;
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.parse::<u32>().ok().filter(|number| *number < 64);
        match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => {
                mask |= (first..=last).fold(0, |mask, number| mask | 1 << number);
            }
            _ => return Err("a list of processors from 0 to 63 is needed, such as 0,2-3".into()),
        }
    }
    Ok(mask)
}

/// A mask as a list, the other way round.
pub fn shown(mask: u64) -> String {
    let named =
        (0..64).filter(|number| mask >> number & 1 == 1).map(|number: u32| number.to_string());
    named.collect::<Vec<_>>().join(",")
}

/// Name and value of a variable.
pub fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("a name and a value are needed, such as LANG=C.UTF-8".into()),
    }
}

/// The beginning of a UUID, as somebody typed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix {
    typed: String,
    digits: String,
}

impl Prefix {
    /// Lower case, hyphens as typed.
    pub fn typed(&self) -> &str {
        &self.typed
    }

    /// Whether `uuid` begins so. Hyphens do not matter.
    pub fn matches(&self, uuid: &Uuid) -> bool {
        uuid.simple().to_string().starts_with(&self.digits)
    }
}

impl std::str::FromStr for Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let typed = text.to_ascii_lowercase();
        let digits: String = typed.chars().filter(|char| *char != '-').collect();
        let known = !digits.is_empty()
            && digits.len() <= 32
            && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        if known {
            Ok(Self { typed, digits })
        } else {
            Err("the UUID of an instance or its beginning is needed; `runtime ps` lists them"
                .into())
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn memory_has_a_unit_and_limits() {
        assert_eq!(memory("512M"), Ok(512));
        assert_eq!(memory("512mib"), Ok(512));
        assert_eq!(memory("2G"), Ok(2048));
        assert_eq!(memory("63G"), Ok(63 * 1024));
        for wrong in ["", "512", "M", "4M", "64G", "-1G", "1.5G", "9999999999G", "4194304G", "1T"] {
            assert!(memory(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn processors_come_as_lists_and_ranges() {
        assert_eq!(processors("0"), Ok(1));
        assert_eq!(processors("0,2-3"), Ok(0b1101));
        assert_eq!(processors("0-63"), Ok(u64::MAX));
        for wrong in ["", ",", "64", "3-2", "1-", "-1", "0,,1", "a", "0-64"] {
            assert!(processors(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn prefixes_may_have_hyphens() {
        let uuid = Uuid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);
        for right in
            ["0", "01234567-8", "012345678", "0123-4567", &uuid.to_string(), "0123456789AB"]
        {
            assert!(right.parse::<Prefix>().is_ok_and(|prefix| prefix.matches(&uuid)), "{right}");
        }
        assert!(!"1".parse::<Prefix>().is_ok_and(|prefix| prefix.matches(&uuid)));
        for wrong in ["", "-", "g", "../x", &"0".repeat(33)] {
            assert!(wrong.parse::<Prefix>().is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn every_mask_reads_back(mask in 1_u64..) {
            prop_assert_eq!(processors(&shown(mask)), Ok(mask));
        }

        #[test]
        fn nothing_typed_makes_a_parser_panic(text in "\\PC*") {
            drop((memory(&text), processors(&text), text.parse::<Prefix>()));
        }

        #[test]
        fn every_beginning_of_a_uuid_matches_it(bits: u128, len in 1_usize..=36) {
            let uuid = Uuid::from_u128(bits);
            let prefix: Prefix = uuid.to_string()[..len].parse().expect("it is a beginning");
            prop_assert!(prefix.matches(&uuid));
        }
    }
}
