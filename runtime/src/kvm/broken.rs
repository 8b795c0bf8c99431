//! What KVM says when it cannot go on with a guest, in words.

use std::fmt::Write;

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
};

/// Words that `kvm_run.internal.data` has room for.
const WORDS: usize = 16;

/// `KVM_EXIT_INTERNAL_ERROR` with its `suberror` and as many words of `data` as KVM filled in
/// (Documentation/virt/kvm/api.rst, 5).
pub(super) fn internal_error(suberror: u32, ndata: u32, data: &[u64; WORDS]) -> String {
    let data = data.get(..usize::try_from(ndata).unwrap_or(WORDS)).unwrap_or(data);
    let what = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => {
            let instruction = instruction(data).map_or_else(String::new, |bytes| {
                bytes.iter().fold(String::from(":"), |mut text, byte| {
                    // Writing to a string cannot fail.
                    write!(text, " {byte:02x}").unwrap_or(());
                    text
                })
            });
            return format!(
                "KVM cannot emulate an instruction of the guest{instruction}; where the host \
                 interprets kernel code (`runtime doctor` tells) a Linux guest does not run"
            );
        }
        KVM_INTERNAL_ERROR_SIMUL_EX => "an exception while another one was delivered",
        KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit while an event was delivered",
        KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            "an exit of the hardware that it does not know"
        }
        _ => "no reason that is known here",
    };
    let words = data.iter().fold(String::new(), |mut text, word| {
        write!(text, " {word:#x}").unwrap_or(());
        text
    });
    format!("KVM_INTERNAL_ERROR {suberror}, {what}; its data:{words}")
}

/// The bytes of the instruction, if KVM tells them: flags in the first word, then length and bytes.
fn instruction(data: &[u64]) -> Option<Vec<u8>> {
    let flag = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
    let [flags, first, second, ..] = *data else { return None };
    let bytes = [first.to_le_bytes(), second.to_le_bytes()].concat();
    let (len, bytes) = bytes.split_first()?;
    let bytes = bytes.get(..usize::from(*len))?;
    (flags & flag != 0 && !bytes.is_empty()).then(|| bytes.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(suberror: u32, ndata: u32, words: &[u64]) -> String {
        let mut data = [0; WORDS];
        data[..words.len()].copy_from_slice(words);
        internal_error(suberror, ndata, &data)
    }

    #[test]
    fn an_instruction_that_cannot_be_emulated_is_shown() {
        // Three bytes: cmpxchg16b (%rdi).
        let words = [1, 0x0fc7_0f03, 0];
        assert!(told(1, 3, &words).contains("of the guest: 0f c7 0f;"), "{}", told(1, 3, &words));
        // Without the flag, with too few words, with more bytes than there is room for.
        for (ndata, words) in [(3, [0, 0x0fc7_0f03, 0]), (2, words), (3, [1, 0xff, 0]), (0, words)]
        {
            assert!(told(1, ndata, &words).contains("of the guest; "), "{ndata} {words:?}");
        }
    }

    #[test]
    fn other_errors_have_their_number_and_data() {
        let text = told(3, 2, &[0x8000_0010, 7, 9]);
        assert!(text.contains("KVM_INTERNAL_ERROR 3") && text.ends_with("data: 0x80000010 0x7"));
        // KVM says how many there are; it is not believed beyond what there can be.
        assert!(told(99, u32::MAX, &[1]).contains("KVM_INTERNAL_ERROR 99, no reason"));
    }
}
