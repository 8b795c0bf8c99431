//! The output of `strace -f -o FILE`: system calls of many threads in one order.
//!
//! A call that others interrupt is written in two lines:
//!
//! ```text
//! 17 futex(0x7f0000, FUTEX_WAIT, 2, NULL <unfinished ...>
//! 18 ioctl(11, KVM_RUN, 0) = 0
//! 17 <... futex resumed>) = 0
//! ```

use std::collections::HashMap;

/// One system call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// The thread.
    pub tid: i32,
    /// Line on which it began.
    pub begin: usize,
    /// Line on which it ended; `None` if its thread ended in it.
    pub end: Option<usize>,
    /// Name of the system call.
    pub name: String,
    /// Arguments as decoded.
    pub args: String,
    /// Result as decoded, without anything that follows an errno's name.
    pub result: String,
}

impl Call {
    /// Argument `index`; only for those before the first structure.
    #[must_use]
    pub fn arg(&self, index: usize) -> &str {
        self.args.split(", ").nth(index).unwrap_or_default()
    }

    /// Whether it is this ioctl.
    #[must_use]
    pub fn is_ioctl(&self, request: &str) -> bool {
        self.name == "ioctl" && self.arg(1) == request
    }

    /// Whether the guest ran: `KVM_RUN` that was not told to return at once.
    #[must_use]
    pub fn is_guest_run(&self) -> bool {
        self.is_ioctl("KVM_RUN") && self.result != "-1 EINTR"
    }

    /// Whether it waits in a futex, and if so, whether for ever.
    #[must_use]
    pub fn futex_wait(&self) -> Option<bool> {
        (self.is_futex("FUTEX_WAIT")).then(|| self.arg(3).starts_with("NULL"))
    }

    /// Whether it wakes who waits in a futex of ours.
    #[must_use]
    pub fn is_futex_wake(&self) -> bool {
        self.is_futex("FUTEX_WAKE")
    }

    fn is_futex(&self, op: &str) -> bool {
        self.name == "futex" && self.arg(1) == op
    }
}

/// All calls, in the order in which they began.
#[must_use]
pub fn parse(text: &str) -> Vec<Call> {
    let mut calls: Vec<Call> = Vec::new();
    let mut pending: HashMap<i32, usize> = HashMap::new();
    for (number, line) in text.lines().enumerate() {
        let Some((tid, rest)) = line.split_once(' ') else { continue };
        let (Ok(tid), rest) = (tid.parse(), rest.trim_start()) else { continue };
        if let Some((_, rest)) = resumed(rest) {
            if let Some(call) = pending.remove(&tid).and_then(|index| calls.get_mut(index)) {
                finish(call, rest, number);
            }
        } else if let Some((name, rest)) = begun(rest) {
            let mut call = Call { tid, begin: number, name: name.to_owned(), ..Call::default() };
            match rest.strip_suffix("<unfinished ...>") {
                Some(args) => {
                    args.trim_end().clone_into(&mut call.args);
                    pending.insert(tid, calls.len());
                }
                None => finish(&mut call, rest, number),
            }
            calls.push(call);
        }
    }
    calls
}

/// `name(…`
fn begun(line: &str) -> Option<(&str, &str)> {
    let (name, rest) = line.split_once('(')?;
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    (!name.is_empty() && name.chars().all(word)).then_some((name, rest))
}

/// `<... name resumed>…`
fn resumed(line: &str) -> Option<(&str, &str)> {
    line.strip_prefix("<... ")?.split_once(" resumed>")
}

fn finish(call: &mut Call, rest: &str, number: usize) {
    call.end = Some(number);
    let (args, result) = rest.rsplit_once(" = ").unwrap_or((rest, ""));
    call.args.push_str(args.trim_end().strip_suffix(')').unwrap_or(args));
    let result = result.split(" (").next().unwrap_or_default();
    result.trim().clone_into(&mut call.result);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn calls_of_two_threads_are_told_apart() {
        let text = "17 futex(0x7f00, FUTEX_WAIT, 2, NULL <unfinished ...>\n\
                    18    ioctl(11, KVM_RUN, 0)   = -1 EINTR (Interrupted system call)\n\
                    18 --- SIGUSR1 {si_signo=SIGUSR1} ---\n\
                    17 <... futex resumed>)              = 0\n\
                    17 ioctl(12, KVM_RUN <unfinished ...>\n\
                    17 <... ioctl resumed>, 0) = 0\n\
                    18 futex(0x7f04, FUTEX_WAIT, 5, {tv_sec=0, tv_nsec=10000000} <unfinished ...>\n\
                    18 +++ killed by SIGKILL +++\n";
        let calls = parse(text);
        assert_eq!(calls.len(), 4);
        assert_eq!(calls[0].futex_wait(), Some(true));
        assert_eq!((calls[0].begin, calls[0].end, calls[0].result.as_str()), (0, Some(3), "0"));
        assert!(calls[1].is_ioctl("KVM_RUN") && !calls[1].is_guest_run());
        assert!(calls[2].is_guest_run() && calls[2].tid == 17);
        assert_eq!((calls[3].futex_wait(), calls[3].end), (Some(false), None));
    }

    #[test]
    fn a_wake_is_not_a_wait() {
        let calls = parse("1 futex(0x7f00, FUTEX_WAKE, 2147483647) = 1\n");
        assert!(calls[0].is_futex_wake() && calls[0].futex_wait().is_none());
        assert_eq!(calls[0].arg(0), "0x7f00");
        let lock = parse("1 futex(0x7f00, FUTEX_WAKE_PRIVATE, 1) = 1\n");
        assert!(!lock[0].is_futex_wake());
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "([0-9 ]{0,4}(<\\.\\.\\. )?[a-z(]{0,9}( resumed>)?[ =),]{0,5}(<unfinished \\.\\.\\.>)?\n){0,20}") {
            for call in parse(&text) {
                prop_assert!(call.end.is_none_or(|end| end >= call.begin));
            }
        }
    }
}
