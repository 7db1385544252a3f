//! Authorized keys and the users they are for, parsed into checked values.
//!
//! May not live here: files, users of the system, what sshd thinks of a key.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use ssh_key::{Algorithm, HashAlg, public::KeyData};

use crate::key_data;

/// Longest accepted line of a public key, in bytes (an RSA key of 16384 bits needs under 3 kB).
pub const MAX_KEY_LINE: usize = 8192;

/// Smallest accepted RSA modulus, in bits (OpenSSH itself refuses less than 1024; NIST SP 800-131A
/// asks for 2048).
pub const MIN_RSA_BITS: usize = 2048;

/// A login name: a letter or `_`, then up to 31 of letters, digits, `_`, `-` and `.`
/// (as `useradd(8)` accepts them, without a trailing `$`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, JsonSchema)]
#[serde(transparent)]
pub struct UserName(#[schemars(regex(pattern = r"^[A-Za-z_][A-Za-z0-9_.-]{0,31}$"))] String);

impl UserName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for UserName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let first = text
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
        let rest = text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
        if first && rest && text.len() <= 32 {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!("{text:?} is not a login name"))
        }
    }
}

impl fmt::Display for UserName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for UserName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

/// An OpenSSH public key: type, base64 and a comment on one line (sshd(8), AUTHORIZED_KEYS FILE
/// FORMAT, without options). No DSA, no small RSA, no control characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey(ssh_key::PublicKey);

impl PublicKey {
    /// The key as `type base64 [comment]`, one line without its end.
    pub fn to_line(&self) -> String {
        // Encoding what was decoded can't fail; an empty line would be refused by every reader.
        self.0.to_openssh().unwrap_or_default().trim_end().to_owned()
    }

    /// `SHA256:…` as `ssh-keygen -l` prints it.
    pub fn fingerprint(&self) -> String {
        self.0.fingerprint(HashAlg::Sha256).to_string()
    }

    /// The algorithm's SSH name, for example `ssh-ed25519`.
    pub fn algorithm(&self) -> String {
        self.0.algorithm().as_str().to_owned()
    }

    /// The comment, empty if there is none.
    pub fn comment(&self) -> &str {
        self.0.comment().as_str_lossy()
    }

    /// Whether both are the same key, whatever their comments.
    pub fn same_key(&self, other: &Self) -> bool {
        self.0.key_data() == other.0.key_data()
    }
}

impl FromStr for PublicKey {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let line = line.trim_matches([' ', '\t']);
        if line.len() > MAX_KEY_LINE {
            return Err(format!(
                "a public key of {} bytes is too long: at most {MAX_KEY_LINE}",
                line.len()
            ));
        }
        if line.chars().any(char::is_control) {
            return Err("a public key is one line without control characters".to_owned());
        }
        if line.contains("PRIVATE KEY") {
            return Err("this is a private key: give the public one (the .pub file)".to_owned());
        }
        let key = ssh_key::PublicKey::from_openssh(line)
            .map_err(|e| format!("not an OpenSSH public key (\"type base64 comment\"): {e}"))?;
        match key.algorithm() {
            Algorithm::Ed25519
            | Algorithm::Ecdsa { .. }
            | Algorithm::SkEd25519
            | Algorithm::SkEcdsaSha2NistP256 => {}
            Algorithm::Rsa { .. } => check_rsa_size(key.key_data())?,
            other => return Err(format!("keys of type {} are not accepted", other.as_str())),
        }
        key_data::check(key.key_data())?;
        Ok(Self(key))
    }
}

fn check_rsa_size(key: &KeyData) -> Result<(), String> {
    let bits = key.rsa().map_or(0, key_data::rsa_bits);
    if bits < MIN_RSA_BITS {
        return Err(format!(
            "an RSA key of {bits} bits is too small: at least {MIN_RSA_BITS}"
        ));
    }
    Ok(())
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_line())
    }
}

impl Serialize for PublicKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

/// A key that lets a user in, until it expires.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AuthorizedKey {
    /// Whose login it opens.
    pub user: UserName,
    /// The public key.
    #[schemars(with = "String")]
    pub key: PublicKey,
    /// When it ends (RFC 3339); never, if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<jiff::Timestamp>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const ED25519: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFkKc52EQpKAMBtUiDp/N8hykSeuzBRx5gN48WTPDhWS alice@example";

    #[test]
    fn a_key_reads_back_as_it_was_written() {
        let key: PublicKey = ED25519.parse().unwrap();
        assert_eq!(key.to_line(), ED25519);
        assert_eq!(key.algorithm(), "ssh-ed25519");
        assert!(key.fingerprint().starts_with("SHA256:"));
    }

    #[test]
    fn what_could_smuggle_a_second_line_is_refused() {
        for bad in [
            format!("{ED25519}\nssh-ed25519 AAAA evil"),
            format!("{ED25519}\r"),
            format!("{ED25519}\0"),
            format!("command=\"sh\" {ED25519}"),
            String::new(),
            "ssh-dss AAAAB3NzaC1kc3MAAACBAM".to_owned(),
            "-----BEGIN OPENSSH PRIVATE KEY-----".to_owned(),
            format!("{ED25519} {}", "x".repeat(1_000_000)),
        ] {
            assert!(bad.parse::<PublicKey>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn login_names() {
        for good in ["ubuntu", "_apt", "a.b-c_d", "A1"] {
            assert!(good.parse::<UserName>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "1a",
            "-a",
            "a b",
            "a/b",
            "a:b",
            "ü",
            &"a".repeat(33),
            "a\n",
            "..",
            "a$",
        ] {
            assert!(bad.parse::<UserName>().is_err(), "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn an_accepted_key_is_one_printable_line(comment in ".{0,40}") {
            if let Ok(key) = format!("{ED25519}{comment}").parse::<PublicKey>() {
                proptest::prop_assert!(!key.to_line().chars().any(char::is_control));
            }
        }
    }
}
