//! What each line of a key file lets in, for whoever audits it: ours, the user's own, and what is odd.
//!
//! May not live here: reading files, changing any of them.

use std::collections::{BTreeMap, BTreeSet};

use portcullis_protocol::PublicKey;
use portcullis_protocol::key::split_options;
use serde::Serialize;

use super::keys::our_key;

/// A line that names a key, or was meant to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AuditedLine {
    /// Its number in the file, from 1.
    pub line: usize,
    /// The key's type; empty if the line holds no key that is understood.
    pub algorithm: String,
    /// `SHA256:…`; empty as well.
    pub fingerprint: String,
    /// The key's comment.
    pub comment: String,
    /// Its options, unchecked: the user's own may say anything.
    pub options: String,
    /// Whether portcullis put it there.
    pub ours: bool,
    /// What an auditor should look at.
    pub notes: Vec<String>,
}

/// What is odd depends on these.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditRules {
    /// Smallest RSA modulus, in bits.
    pub least_rsa_bits: usize,
    /// Fingerprints of keys that were revoked on the instance.
    pub revoked: BTreeSet<String>,
}

/// Options that do more than narrow a login, and what they do.
const STRONG: [(&str, &str); 4] = [
    ("command=", "runs a command of its own"),
    ("environment=", "sets the session's environment"),
    ("tunnel=", "opens a tunnel device"),
    (
        "cert-authority",
        "lets in whoever has a certificate that it signed",
    ),
];

/// All lines that name a key, in order. Blank lines and comments are none.
pub fn audit(content: &[u8], rules: &AuditRules) -> Vec<AuditedLine> {
    let mut first: BTreeMap<String, usize> = BTreeMap::new();
    let lines = content.split(|byte| *byte == b'\n').enumerate();
    lines
        .filter_map(|(at, bytes)| {
            let text = String::from_utf8_lossy(bytes);
            let text = text.trim();
            if text.is_empty() || text.starts_with('#') {
                return None;
            }
            let mut line = read(at + 1, text, rules);
            if let Some(ours) = our_key(bytes) {
                line.ours = true;
                line.comment = ours.key.comment().to_owned();
            }
            if !line.fingerprint.is_empty() {
                let before = *first.entry(line.fingerprint.clone()).or_insert(line.line);
                if before != line.line {
                    line.notes
                        .push(format!("line {before} has the same key, and goes first"));
                }
            }
            Some(line)
        })
        .collect()
}

fn read(number: usize, text: &str, rules: &AuditRules) -> AuditedLine {
    let mut line = AuditedLine {
        line: number,
        algorithm: String::new(),
        fingerprint: String::new(),
        comment: String::new(),
        options: String::new(),
        ours: false,
        notes: Vec::new(),
    };
    let plain: Result<PublicKey, String> = text.parse();
    let key = plain.or_else(|reason| {
        let (options, rest) = split_options(text);
        let key = rest.parse().map_err(|_| reason);
        if key.is_ok() {
            line.options = options.to_owned();
        }
        key
    });
    let lower = line.options.to_ascii_lowercase();
    let strong = STRONG.iter().filter(|(option, _)| lower.contains(option));
    line.notes.extend(strong.map(|(_, what)| (*what).to_owned()));
    match key {
        Ok(key) => {
            line.algorithm = key.algorithm();
            line.fingerprint = key.fingerprint();
            line.comment = key.comment().to_owned();
            line.notes.extend(key.check_size(rules.least_rsa_bits).err());
            if rules.revoked.contains(&line.fingerprint) {
                line.notes
                    .push("revoked on this instance, and still here".to_owned());
            }
        }
        Err(reason) => line.notes.push(reason),
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFkKc52EQpKAMBtUiDp/N8hykSeuzBRx5gN48WTPDhWS";
    const RSA_2048: &str = include_str!("../../tests/keys/rsa-2048.pub");

    #[test]
    fn each_line_is_told_with_what_is_odd() {
        let text = format!(
            "# BEGIN\n\n{A} mine #portcullis\n{A} again\nCommand=\"sh -c 'a b'\",no-pty {RSA_2048}\
             ssh-dss AAAAB3NzaC1kc3MAAACBAM old\nnonsense \u{1b}[0m\n"
        );
        let key: PublicKey = A.parse().unwrap();
        let rules = AuditRules {
            least_rsa_bits: 3072,
            revoked: [key.fingerprint()].into(),
        };
        let lines = audit(text.as_bytes(), &rules);
        let told: Vec<_> = lines.iter().map(|l| (l.line, l.ours, l.notes.len())).collect();
        assert_eq!(
            told,
            [
                (3, true, 1),
                (4, false, 2),
                (5, false, 2),
                (6, false, 1),
                (7, false, 1)
            ],
            "{lines:#?}"
        );
        assert_eq!(
            (lines[0].comment.as_str(), lines[1].comment.as_str()),
            ("mine", "again")
        );
        assert_eq!(lines[1].notes[1], "line 3 has the same key, and goes first");
        assert_eq!(lines[2].options, "Command=\"sh -c 'a b'\",no-pty");
        assert!(lines[2].notes[1].contains("2048 bits"), "{lines:#?}");
        assert_eq!(lines[4].fingerprint, "");
    }

    proptest::proptest! {
        #[test]
        fn whatever_a_user_wrote_is_told_on_one_line(content in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            for line in audit(&content, &AuditRules::default()) {
                let notes = line.notes.concat();
                proptest::prop_assert!(!notes.chars().any(char::is_control), "{:?}", notes);
            }
        }
    }
}
