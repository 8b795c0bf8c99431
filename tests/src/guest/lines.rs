//! Console output of several instances, by whole lines.

use std::collections::HashMap;

use uuid::Uuid;

/// A line is cut here: a guest may never end it.
const LONGEST: usize = 4096;

/// Lines that have not ended yet.
#[derive(Debug, Default)]
pub struct Lines(HashMap<Uuid, String>);

impl Lines {
    /// Takes what `instance` wrote, and gives the lines that are whole now, without their ends.
    pub fn add(&mut self, instance: Uuid, text: &str) -> Vec<String> {
        let mut line = self.0.remove(&instance).unwrap_or_default();
        let mut whole = Vec::new();
        for char in text.chars() {
            if char != '\n' {
                line.push(char);
            }
            if char == '\n' || line.len() >= LONGEST {
                whole.push(finished(std::mem::take(&mut line)));
            }
        }
        if !line.is_empty() {
            self.0.insert(instance, line);
        }
        whole
    }

    /// What `instance` had begun: it has ended.
    pub fn end(&mut self, instance: Uuid) -> Option<String> {
        self.0.remove(&instance).map(finished)
    }

    /// What all had begun.
    pub fn rest(&mut self) -> Vec<(Uuid, String)> {
        self.0.drain().map(|(instance, line)| (instance, finished(line))).collect()
    }
}

/// A terminal ends a line with two characters.
fn finished(mut line: String) -> String {
    line.truncate(line.trim_end_matches('\r').len());
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Uuid = Uuid::from_u128(1);
    const B: Uuid = Uuid::from_u128(2);

    #[test]
    fn lines_of_several_come_whole() {
        let mut lines = Lines::default();
        assert_eq!(lines.add(A, "one\r\ntw"), ["one"]);
        assert!(lines.add(B, "oth").is_empty());
        assert_eq!(lines.add(A, "o\n\nthree"), ["two", ""]);
        assert_eq!(lines.add(B, "er\r"), [""; 0]);
        assert_eq!(lines.add(B, "\n"), ["other"]);
        assert_eq!(lines.end(B), None);
        assert_eq!(lines.end(A).as_deref(), Some("three"));
        lines.add(B, "left");
        assert_eq!(lines.rest(), [(B, "left".to_owned())]);
        assert_eq!(lines.rest(), []);
    }

    #[test]
    fn a_line_without_an_end_is_cut() {
        let mut lines = Lines::default();
        let cut = lines.add(A, &"ä".repeat(LONGEST / 2 + 1));
        assert_eq!(cut, ["ä".repeat(LONGEST / 2)]);
        assert_eq!(lines.end(A).as_deref(), Some("ä"));
    }
}
