//! The audit log: what a record says of a call, made from the call and from the specs before and after it.
//! The chain that its lines form is in `chain`, who is let write how often in `limiter`.
//!
//! May not live here: files, clocks, who a process is (`agent::audit`). Secrets: a record is made from names,
//! fingerprints and numbers that are picked one by one, never from a whole document.

pub mod asked;
pub mod chain;
pub mod changes;
pub mod limiter;
pub mod who;

use std::collections::BTreeMap;

use jiff::Timestamp;
use portcullis_protocol::control::Refusal;
use serde::{Deserialize, Serialize};

use changes::Changes;
use who::Who;

/// Longest line of the log, in bytes, its end included. Every text and list of a record is cut to fit.
pub const MAX_LINE: usize = 16 << 10;
/// Longest text of a record, in bytes.
const MAX_TEXT: usize = 600;

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Something changed.
    Changed,
    /// It was so already.
    Unchanged,
    /// It was refused, and nothing changed.
    Refused,
    /// Nobody asked for anything: the agent notes it.
    Noted,
}

impl Outcome {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Changed => "changed",
            Self::Unchanged => "unchanged",
            Self::Refused => "refused",
            Self::Noted => "noted",
        }
    }
}

/// When something happened. A wall clock can be wrong or be set; the time since boot can't.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moment {
    /// By the wall clock.
    pub time: Timestamp,
    /// Which boot it was.
    pub boot: String,
    /// Milliseconds since that boot.
    pub since_boot_ms: u64,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// By the wall clock.
    pub time: Timestamp,
    /// Which boot it was.
    pub boot: String,
    /// Milliseconds since that boot.
    pub since_boot_ms: u64,
    /// Who asked.
    pub who: Who,
    /// What was asked, as the control socket names requests, or what the agent notes.
    pub action: String,
    /// With what, without secrets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub parameters: BTreeMap<String, String>,
    /// What became of it.
    pub result: Outcome,
    /// Which kind of refusal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<Refusal>,
    /// Why it was refused, or what is to be known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The generation that held before; none before the first spec.
    pub generation_before: Option<u64>,
    /// The generation that holds since.
    pub generation: Option<u64>,
    /// Until when the change has to be confirmed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirm_until: Option<Timestamp>,
    /// What changed.
    #[serde(default, skip_serializing_if = "Changes::is_empty")]
    pub changes: Changes,
}

impl Event {
    /// A note of the agent's own.
    pub fn note(at: Moment, action: &str, generation: Option<u64>) -> Self {
        Self {
            time: at.time,
            boot: at.boot,
            since_boot_ms: at.since_boot_ms,
            who: Who::Agent,
            action: action.to_owned(),
            parameters: BTreeMap::new(),
            result: Outcome::Noted,
            refusal: None,
            reason: None,
            generation_before: generation,
            generation,
            confirm_until: None,
            changes: Changes::default(),
        }
    }

    /// It with every text on one line, printable and short. Nothing goes into the log any other way.
    fn cleaned(mut self) -> Self {
        self.boot = clean(&self.boot, 100);
        self.who = self.who.cleaned();
        self.action = clean(&self.action, 100);
        let parameters = std::mem::take(&mut self.parameters);
        let short = parameters.into_iter().take(12);
        self.parameters = short
            .map(|(name, text)| (clean(&name, 60), clean(&text, MAX_TEXT / 2)))
            .collect();
        self.reason = self.reason.map(|reason| clean(&reason, MAX_TEXT));
        self.changes = self.changes.cleaned();
        self
    }

    /// It in one line for people, without the time.
    pub fn text(&self) -> String {
        let before = self
            .generation_before
            .map_or("none".to_owned(), |g| g.to_string());
        let after = self.generation.map_or("none".to_owned(), |g| g.to_string());
        let generation = match before == after {
            true => format!("generation {after}"),
            false => format!("generation {before} to {after}"),
        };
        let mut text = format!(
            "{}: {}, {}, {generation}",
            self.who,
            self.asked(),
            self.result.as_str()
        );
        if let Some(reason) = &self.reason {
            text.push_str(": ");
            text.push_str(reason);
        }
        // Also one that was not sealed yet.
        clean(&text, 4 * MAX_TEXT)
    }

    /// What was asked, with its parameters.
    pub fn asked(&self) -> String {
        let mut text = self.action.clone();
        for (name, value) in &self.parameters {
            text.push_str(&format!(" {name}={value}"));
        }
        text
    }
}

/// The text on one line and at most `limit` bytes long: whatever a terminal or a reader of lines could take
/// for more than text is escaped, as is what turns the direction of writing.
pub fn clean(text: &str, limit: usize) -> String {
    const MORE: &str = "…";
    let mut cleaned = String::new();
    for c in text.chars() {
        let before = cleaned.len();
        match c {
            ' '..='~' => cleaned.push(c),
            c => cleaned.extend(c.escape_debug()),
        }
        if cleaned.len() + MORE.len() > limit {
            cleaned.truncate(before);
            cleaned.push_str(MORE);
            break;
        }
    }
    cleaned
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub fn moment() -> Moment {
        Moment {
            time: "2026-11-24T00:00:00Z".parse().unwrap(),
            boot: "b 1".to_owned(),
            since_boot_ms: 5000,
        }
    }

    pub fn event(action: &str) -> Event {
        Event::note(moment(), action, Some(7))
    }

    #[test]
    fn text_from_outside_stays_one_line_without_terminal_codes() {
        let nasty = "a\nb\r\u{1b}[2K\u{9b}1m\u{202e}x\u{2028}\0é";
        let cleaned = clean(nasty, 200);
        assert_eq!(cleaned, "a\\nb\\r\\u{1b}[2K\\u{9b}1m\\u{202e}x\\u{2028}\\0é");
        assert_eq!(clean("aaaaaaaaaa", 8), "aaaaa…");
        assert_eq!(clean("é", 4), "…");
    }

    #[test]
    fn a_record_is_told_in_one_line() {
        let mut event = event("add-rule");
        event.parameters.insert("rule".to_owned(), "web\n".to_owned());
        event.generation = Some(8);
        event.result = Outcome::Changed;
        assert_eq!(
            event.text(),
            "the agent: add-rule rule=web\\n, changed, generation 7 to 8"
        );
    }

    proptest::proptest! {
        #[test]
        fn cleaned_text_is_short_and_printable(text in "\\PC{0,20}[\\x00-\\xff]{0,40}", limit in 3_usize..100) {
            let cleaned = clean(&text, limit);
            proptest::prop_assert!(cleaned.len() <= limit);
            proptest::prop_assert!(!cleaned.chars().any(char::is_control));
        }
    }
}
