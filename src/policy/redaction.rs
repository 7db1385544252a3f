//! Taking secrets out of what leaves the instance in a support bundle.
//!
//! By what is known (the secrets of this instance, wherever they stand), and by what it looks like (private keys
//! in PEM, names of settings). The first finds a secret in a log; the second one that nobody told us of.
//! May not live here: where secrets are kept, what is in a bundle.

use serde_json::Value;
use zeroize::Zeroizing;

/// Stands where a secret was.
pub const REMOVED: &str = "[removed]";
/// Stands where the comment of a key was.
const COMMENT: &str = "[comment]";

/// Shorter ones are no secrets, and taking them out would take words out of the text.
const SHORTEST: usize = 6;
/// Names of settings that hold secrets, in lower case. Those of files that do are no secrets.
const SECRET_NAMES: [&str; 6] = [
    "token",
    "secret",
    "password",
    "passphrase",
    "private",
    "external_id",
];

/// What must not be in a text, and how often it was.
#[derive(Default)]
pub struct Redactor {
    secrets: Vec<Zeroizing<String>>,
}

impl Redactor {
    /// A secret, of one line or of several: each line of a key in PEM is one, since a log may cut it into lines.
    pub fn add(&mut self, secret: &str) {
        for line in secret.lines().map(str::trim) {
            let is_marker = line.starts_with("-----");
            if line.len() < SHORTEST || is_marker || self.secrets.iter().any(|known| known.as_str() == line) {
                continue;
            }
            self.secrets.push(Zeroizing::new(line.to_owned()));
        }
        // The longest first: one may be in another.
        self.secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    }

    /// Every text of a JSON document, at whatever depth, below names that say that it is a secret.
    pub fn add_named(&mut self, document: &Value) {
        match document {
            Value::Object(fields) => {
                for (name, value) in fields {
                    match value {
                        Value::String(text) if is_secret_name(name) => self.add(text),
                        value => self.add_named(value),
                    }
                }
            }
            Value::Array(values) => values.iter().for_each(|value| self.add_named(value)),
            _ => {}
        }
    }

    /// What stands behind `=` on lines whose name says that it is a secret: settings, also such that can't be used
    /// and are then quoted in messages.
    pub fn add_settings(&mut self, text: &str) {
        for (name, value) in text.lines().filter_map(|line| line.split_once('=')) {
            if is_secret_name(name.trim()) {
                self.add(value.trim().trim_matches(['"', '\'']));
            }
        }
    }

    /// The text without secrets, and how many were in it.
    pub fn clean(&self, text: &str) -> (String, usize) {
        let (mut text, mut removed) = without_private_keys(text);
        for secret in &self.secrets {
            // JSON writes some characters otherwise.
            let quoted = Value::from(secret.as_str()).to_string();
            let quoted = quoted.trim_matches('"');
            for form in [secret.as_str(), quoted] {
                let found = text.matches(form).count();
                if found > 0 {
                    removed += found;
                    text = text.replace(form, REMOVED);
                }
            }
        }
        (text, removed)
    }
}

/// Takes out private keys in PEM (RFC 7468), on lines or with `\n` between them as JSON has it.
fn without_private_keys(text: &str) -> (String, usize) {
    const BEGIN: &str = "-----BEGIN ";
    const END: &str = "-----END ";
    let (mut clean, mut removed, mut rest) = (String::with_capacity(text.len()), 0, text);
    while let Some(at) = rest.find(BEGIN) {
        let (before, from) = rest.split_at(at);
        clean.push_str(before);
        let label = from[BEGIN.len()..].split("-----").next().unwrap_or_default();
        if !label.ends_with("PRIVATE KEY") {
            clean.push_str(BEGIN);
            rest = &from[BEGIN.len()..];
            continue;
        }
        clean.push_str(REMOVED);
        removed += 1;
        let marker = format!("{END}{label}-----");
        // One that was cut off has no end: then all that follows may be of it.
        rest = from.split_once(&marker).map_or("", |(_, behind)| behind);
    }
    clean.push_str(rest);
    (clean, removed)
}

fn is_secret_name(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let is_place = ["_file", "_url", "_urls"].iter().any(|end| name.ends_with(end));
    !is_place && SECRET_NAMES.iter().any(|secret| name.contains(secret))
}

/// A JSON document without comments of keys, which may name people, and without whatever is below the name of
/// a secret. A key and its fingerprint are public and stay.
pub fn without_comments_and_secrets(document: &mut Value) {
    match document {
        Value::Object(fields) => {
            for (name, value) in fields {
                match value {
                    Value::Null => {}
                    value if is_secret_name(name) => *value = REMOVED.into(),
                    Value::String(text) if name == "comment" && !text.is_empty() => {
                        *text = COMMENT.to_owned()
                    }
                    Value::String(text) if name == "key" => *text = without_comment(text),
                    value => without_comments_and_secrets(value),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(without_comments_and_secrets),
        Value::String(text) => *text = without_user_info(text),
        _ => {}
    }
}

/// A line with a key, ended behind the key's base64.
fn without_comment(line: &str) -> String {
    // Base64 of a key's type: it begins with the length of a name (RFC 4253 section 6.6).
    let end = line.find("AAAA").map(|at| {
        let length = line[at..].find(char::is_whitespace);
        length.map_or(line.len(), |length| at + length)
    });
    match end {
        Some(end) if end < line.len() => format!("{} {COMMENT}", &line[..end]),
        _ => line.to_owned(),
    }
}

/// A URL without the name and password before its host (RFC 3986 section 3.2.1), and without its query.
fn without_user_info(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else {
        return text.to_owned();
    };
    let (rest, query) = match rest.split_once('?') {
        Some((rest, _)) => (rest, format!("?{REMOVED}")),
        None => (rest, String::new()),
    };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    match authority.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}://{REMOVED}@{host}{path}{query}"),
        None => format!("{scheme}://{authority}{path}{query}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_known_secret_is_taken_out_wherever_it_stands() {
        let mut redactor = Redactor::default();
        redactor.add("hunter2-hunter2\n");
        redactor.add("a\"quoted\\secret");
        let text = format!(
            "told hunter2-hunter2! {} a",
            json!({"t": "hunter2-hunter2", "q": "a\"quoted\\secret"})
        );
        let (clean, removed) = redactor.clean(&text);
        assert_eq!(removed, 3, "{clean}");
        assert!(!clean.contains("hunter2") && !clean.contains("quoted"), "{clean}");
        assert!(clean.starts_with("told [removed]! "), "{clean}");
        // One that is in another does not leave a rest of it, and a word is no secret.
        redactor.add("hunter");
        redactor.add("told");
        assert_eq!(redactor.clean("hunter2-hunter2 told").0, "[removed] told");
    }

    #[test]
    fn private_keys_are_taken_out_by_their_looks_and_public_ones_stay() {
        let redactor = Redactor::default();
        for key in [
            "-----BEGIN PRIVATE KEY-----\nMIIx\nsecret\n-----END PRIVATE KEY-----",
            "-----BEGIN RSA PRIVATE KEY-----\\nMIIxsecret\\n-----END RSA PRIVATE KEY-----",
            "-----BEGIN OPENSSH PRIVATE KEY-----\nsecret\n-----END OPENSSH PRIVATE KEY-----",
        ] {
            let (clean, removed) = redactor.clean(&format!("a {key} b {key} c"));
            assert_eq!((clean.as_str(), removed), ("a [removed] b [removed] c", 2));
            // Cut off.
            let (clean, _) = redactor.clean(&format!("a {}", &key[..key.len() - 12]));
            assert_eq!(clean, "a [removed]");
        }
        let certificate = "x -----BEGIN CERTIFICATE-----\nMII\n-----END CERTIFICATE----- y";
        assert_eq!(redactor.clean(certificate), (certificate.to_owned(), 0));
    }

    #[test]
    fn lines_of_a_key_are_found_one_by_one() {
        let mut redactor = Redactor::default();
        redactor.add("-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMG\nsecondline00\n-----END PRIVATE KEY-----\n");
        let (clean, removed) = redactor.clean("parse error in secondline00, near -----END PRIVATE KEY-----");
        assert_eq!(removed, 1);
        assert!(
            clean.contains("END PRIVATE KEY") && !clean.contains("secondline"),
            "{clean}"
        );
    }

    #[test]
    fn documents_lose_comments_and_what_is_named_a_secret() {
        let mut document = json!({
            "control_plane": {"enrolment_token": "t", "external_id": {"x": 1}, "client_key": "/etc/k",
                "report_url": "https://me:pw@host.example/v1?sig=abc"},
            "list": ["https://me:pw@host.example/v1?sig=abc", "https://host.example/a"],
            "auth": {"token_file": "/etc/t", "token_url": "https://a/t", "password": "p"},
            "keys": [{"user": "al", "comment": "al@home", "key": "ssh-ed25519 AAAAC3Nz al@home of London"},
                {"comment": "", "key": "cert-authority,from=\"10.0.0.0/8\" ssh-ed25519 AAAAC3Nz"}],
        });
        without_comments_and_secrets(&mut document);
        let expected = json!({
            "control_plane": {"enrolment_token": REMOVED, "external_id": REMOVED, "client_key": "/etc/k",
                "report_url": "https://[removed]@host.example/v1?[removed]"},
            "list": ["https://[removed]@host.example/v1?[removed]", "https://host.example/a"],
            "auth": {"token_file": "/etc/t", "token_url": "https://a/t", "password": REMOVED},
            "keys": [{"user": "al", "comment": COMMENT, "key": "ssh-ed25519 AAAAC3Nz [comment]"},
                {"comment": "", "key": "cert-authority,from=\"10.0.0.0/8\" ssh-ed25519 AAAAC3Nz"}],
        });
        assert_eq!(document, expected);
    }

    #[test]
    fn secrets_of_a_document_are_known_by_their_names() {
        let mut redactor = Redactor::default();
        redactor.add_named(&json!({"a": [{"enrolment_token": "tokentoken", "token_file": "/etc/token"}]}));
        redactor
            .add_settings("[report]\npassword = \"hunter2\"\n token=hunter3\ntoken_file = \"/etc/token\"\n");
        let (clean, removed) = redactor.clean("tokentoken /etc/token hunter2 hunter3");
        let expected = "[removed] /etc/token [removed] [removed]";
        assert_eq!((clean.as_str(), removed), (expected, 3));
    }

    proptest::proptest! {
        #[test]
        fn no_text_keeps_a_known_secret(before in ".{0,40}", after in ".{0,40}", secret in "[ -~]{8,40}") {
            let mut redactor = Redactor::default();
            redactor.add(&secret);
            let secret = secret.trim();
            proptest::prop_assume!(secret.len() >= SHORTEST && !secret.starts_with("-----"));
            proptest::prop_assume!(!REMOVED.contains(secret));
            let (clean, _) = redactor.clean(&format!("{before}{secret}{after}"));
            proptest::prop_assert!(!clean.contains(secret));
            let json = Value::from(format!("{before}{secret}{after}")).to_string();
            let quoted = Value::from(secret).to_string();
            let (clean, _) = redactor.clean(&json);
            proptest::prop_assert!(!clean.contains(quoted.trim_matches('"')), "{}", clean);
        }
    }
}
