//! The identity document: which TLS and SSH host keys an instance has, bound to the enrolment token.
//!
//! May not live here: the HMAC itself (both ends bring their own TLS provider's).

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::report::HostKey;

/// `GET /v1/identity?nonce=…`: who knows the enrolment token can pin these keys without a trusted CA.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Identity {
    /// Instance id of the accepted spec.
    pub instance: String,
    /// SHA-256 of the TLS certificate's SubjectPublicKeyInfo, lower-case hex.
    pub tls_spki_sha256: String,
    /// sshd's public host keys.
    pub host_keys: Vec<HostKey>,
    /// The caller's nonce, so that an old answer can't be replayed.
    pub nonce: String,
    /// HMAC-SHA256 by the enrolment token over [`Identity::message`], lower-case hex (RFC 2104).
    pub mac: String,
    /// What [`FirstContact`] answers, soon: the instance's own nonce. It is not authenticated: one that was
    /// swapped only makes the answer void.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub challenge: Option<String>,
}

/// `POST /v1/identity/done`: whoever knows the enrolment token has pinned this key, for good, and says what
/// time it is. The token is not used again after it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FirstContact {
    /// The instance that was meant.
    pub instance: String,
    /// The key that was pinned, as in [`Identity`].
    pub tls_spki_sha256: String,
    /// [`Identity::challenge`].
    pub challenge: String,
    /// The caller's time.
    pub time: Timestamp,
    /// HMAC-SHA256 by the enrolment token over [`FirstContact::message`], lower-case hex.
    pub mac: String,
}

impl FirstContact {
    /// What is authenticated.
    pub fn message(&self) -> Vec<u8> {
        let time = self.time.as_second().to_string();
        let fields = [&self.instance, &self.tls_spki_sha256, &self.challenge, &time];
        framed("portcullis first contact v1", fields.map(String::as_str))
    }
}

/// Each field with its length before it, after what the message is for: no two of them are the same bytes.
pub(crate) fn framed<'a>(purpose: &str, fields: impl IntoIterator<Item = &'a str>) -> Vec<u8> {
    let mut message = purpose.as_bytes().to_vec();
    message.push(0);
    for field in fields {
        message.extend_from_slice(&(field.len() as u64).to_be_bytes());
        message.extend_from_slice(field.as_bytes());
    }
    message
}

impl Identity {
    /// What is authenticated: each field with its length before it, so that no two documents make
    /// the same message. Of a host key that is type and fingerprint: the whole key has to hash to it
    /// ([`HostKey::verified_key`]).
    pub fn message(&self) -> Vec<u8> {
        let keys = self.host_keys.iter();
        let keys = keys.flat_map(|key| [key.algorithm.as_str(), key.fingerprint.as_str()]);
        let fields = [&self.instance, &self.tls_spki_sha256, &self.nonce].map(String::as_str);
        framed("portcullis identity v1", fields.into_iter().chain(keys))
    }
}

/// Whether a text is a caller's nonce: 16 to 128 hex digits.
pub fn is_nonce(text: &str) -> bool {
    (16..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Lower-case hex, as fingerprints and MACs are written.
pub fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// Bytes of a hex text; `None` if it is not one.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&text[i..i + 2], 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonce_is_hex_of_some_length() {
        let (shortest, longest) = ("a".repeat(16), "F".repeat(128));
        assert!(is_nonce(&shortest) && is_nonce(&longest));
        for bad in [
            "",
            &shortest[1..],
            &format!("{longest}0"),
            "g123456789abcdef",
            "0123456789abcd\r\n",
        ] {
            assert!(!is_nonce(bad), "{bad:?}");
        }
    }

    #[test]
    fn moving_a_character_between_fields_changes_the_message() {
        let identity = |instance: &str, spki: &str| Identity {
            instance: instance.into(),
            tls_spki_sha256: spki.into(),
            host_keys: vec![],
            nonce: "n".into(),
            mac: String::new(),
            challenge: None,
        };
        assert_ne!(identity("ab", "c").message(), identity("a", "bc").message());
    }

    #[test]
    fn the_message_of_an_old_document_stays() {
        let key = HostKey::from_line(
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFkKc52EQpKAMBtUiDp/N8hykSeuzBRx5gN48WTPDhWS",
        )
        .unwrap();
        let identity = |key: HostKey| Identity {
            instance: "i".into(),
            tls_spki_sha256: "00".into(),
            host_keys: vec![key],
            nonce: "n".into(),
            mac: String::new(),
            challenge: None,
        };
        let old = HostKey {
            key: None,
            ..key.clone()
        };
        assert_eq!(identity(key).message(), identity(old).message());
    }

    #[test]
    fn hex_reads_back() {
        assert_eq!(from_hex(&to_hex(&[0, 15, 255])).unwrap(), [0, 15, 255]);
        assert_eq!(from_hex("é1"), None);
        assert_eq!(from_hex("abc"), None);
    }
}
