//! Text of others, made fit for a line of a table or a log.
//!
//! May not live here: tables, logs.

/// The text on one line, without what could command a terminal or mislead who reads it: control characters become
/// blanks, and characters that can't be seen, or turn the direction of what follows (Unicode's bidirectional
/// controls, UAX #9; CVE-2021-42574), are shown by their numbers, as `\u{202e}`.
pub fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        let mut shown = c.escape_debug();
        match c {
            '"' | '\'' | '\\' => plain.push(c),
            c if c.is_control() => plain.push(' '),
            // What is shown as it is has no escape. Marks that combine with the letter before them are harmless.
            c if shown.len() == 1 || c.is_alphanumeric() => plain.push(c),
            _ => plain.extend(shown.by_ref()),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_turns_the_direction_or_hides() {
        for c in [
            '\u{202a}', '\u{202b}', '\u{202c}', '\u{202d}', '\u{202e}', '\u{2066}', '\u{2067}', '\u{2068}',
            '\u{2069}', '\u{200e}', '\u{200f}', '\u{61c}', '\u{200b}', '\u{feff}', '\u{2028}', '\u{2029}',
        ] {
            let shown = plain(&format!("alice{c}nimda"));
            assert_eq!(shown, format!("alice\\u{{{:x}}}nimda", u32::from(c)));
        }
    }

    #[test]
    fn words_of_any_script_stay() {
        for text in [
            "alice@example",
            "\"q\" \\ 'r'",
            "Žofie",
            "アリス",
            "עברית",
            "😀",
            "-#…",
        ] {
            assert_eq!(plain(text), text);
        }
        assert_eq!(plain("a\u{1b}[2Jb\n"), "a [2Jb ");
    }
}
