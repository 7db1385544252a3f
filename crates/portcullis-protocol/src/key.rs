//! Authorized keys and the users they are for, parsed into checked values.
//!
//! May not live here: files, users of the system, what sshd thinks of a key.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use ssh_key::{Algorithm, HashAlg};

use crate::KeyOptions;
use crate::key_data;

/// Longest accepted line of a public key, in bytes (an RSA key of 16384 bits needs under 3 kB).
pub const MAX_KEY_LINE: usize = 8192;

/// Smallest RSA modulus that any setting accepts, in bits (OpenSSH itself refuses less than 1024; NIST
/// SP 800-131A asks for 2048). What an instance accepts is its own setting, and larger by default.
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

    /// The size of the modulus in bits; none if it is no RSA key.
    pub fn rsa_bits(&self) -> Option<usize> {
        self.0.key_data().rsa().map(key_data::rsa_bits)
    }

    /// Refuses an RSA key with a modulus of fewer bits than `least`.
    ///
    /// # Errors
    /// Both sizes, for whoever gave the key.
    pub fn check_size(&self, least: usize) -> Result<(), String> {
        match self.rsa_bits() {
            Some(bits) if bits < least => Err(format!(
                "an RSA key of {bits} bits is too small: at least {least}"
            )),
            _ => Ok(()),
        }
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
            Algorithm::Rsa { .. } => {}
            other => return Err(format!("keys of type {} are not accepted", other.as_str())),
        }
        key_data::check(key.key_data())?;
        let key = Self(key);
        key.check_size(MIN_RSA_BITS)?;
        Ok(key)
    }
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
#[serde(from = "Written", into = "Written")]
#[schemars(with = "Written")]
pub struct AuthorizedKey {
    /// Whose login it opens.
    pub user: UserName,
    /// What narrows the login; with `cert-authority`, the key signs certificates instead.
    pub options: KeyOptions,
    /// The public key.
    pub key: PublicKey,
    /// When it ends (RFC 3339); never, if left out.
    pub expires: Option<jiff::Timestamp>,
}

/// An authorized key as documents have it: options and key are one line, as in the file of sshd.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "AuthorizedKey")]
struct Written {
    /// Whose login it opens.
    user: UserName,
    /// The public key as one line, `[options] type base64 [comment]`; options only from a list (docs/keys.md).
    #[schemars(with = "String")]
    key: KeyLine,
    /// When it ends (RFC 3339); never, if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires: Option<jiff::Timestamp>,
}

impl From<Written> for AuthorizedKey {
    fn from(written: Written) -> Self {
        Self {
            user: written.user,
            options: written.key.options,
            key: written.key.key,
            expires: written.expires,
        }
    }
}

impl From<AuthorizedKey> for Written {
    fn from(key: AuthorizedKey) -> Self {
        Self {
            user: key.user,
            key: KeyLine {
                options: key.options,
                key: key.key,
            },
            expires: key.expires,
        }
    }
}

/// Options and a public key on one line: `[options] type base64 [comment]` (sshd(8), AUTHORIZED_KEYS
/// FILE FORMAT).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyLine {
    /// The options; empty if there are none.
    pub options: KeyOptions,
    /// The key.
    pub key: PublicKey,
}

impl FromStr for KeyLine {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let line = line.trim_matches([' ', '\t']);
        let plain = match line.parse() {
            Ok(key) => {
                return Ok(Self {
                    options: KeyOptions::default(),
                    key,
                });
            }
            Err(reason) => reason,
        };
        // As sshd does it: what is no key may be options, and then a key.
        let (options, rest) = split_options(line);
        match (options.parse(), rest.parse()) {
            (Ok(options), Ok(key)) => Ok(Self { options, key }),
            (Err(reason), Ok(_)) => Err(reason),
            // Options are told from a word by what only they have.
            (Err(reason), _) if options.contains(['=', '"', ',']) => Err(reason),
            (Ok(_), Err(reason)) if !options.is_empty() => Err(reason),
            _ => Err(plain),
        }
    }
}

/// The first word, which blanks in double quotes do not end, and what follows: where sshd looks for
/// options if a line does not begin with a key (sshd(8), AUTHORIZED_KEYS FILE FORMAT).
pub fn split_options(line: &str) -> (&str, &str) {
    let (mut quoted, mut escaped) = (false, false);
    let end = line.find(|c: char| {
        let quote = c == '"' && !escaped;
        quoted ^= quote;
        escaped = c == '\\' && !escaped;
        !quoted && matches!(c, ' ' | '\t')
    });
    line.split_at(end.unwrap_or(line.len()))
}

impl fmt::Display for KeyLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.options.is_empty() {
            true => write!(f, "{}", self.key),
            false => write!(f, "{} {}", self.options, self.key),
        }
    }
}

impl Serialize for KeyLine {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for KeyLine {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
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

    #[test]
    fn options_stand_before_the_key() {
        for options in [
            "",
            "restrict ",
            "from=\"10.0.0.0/8\",no-pty ",
            "cert-authority,principals=\"a,b\" ",
        ] {
            let line = format!("{options}{ED25519}");
            let read: KeyLine = line.parse().unwrap();
            assert_eq!(read.options.as_str(), options.trim_end());
            assert_eq!(read.to_string(), line);
            let key = serde_json::json!({"user": "u", "key": line});
            let key: AuthorizedKey = serde_json::from_value(key).unwrap();
            assert_eq!((key.options, key.key), (read.options, read.key));
        }
    }

    #[test]
    fn what_is_wrong_with_a_line_is_named() {
        for (line, expected) in [
            (format!("command=\"sh -c 'x y'\" {ED25519}"), "option \"command\""),
            (
                format!("environment=\"A=\\\"b c\" {ED25519}"),
                "option \"environment\"",
            ),
            (format!("no-pty, {ED25519}"), "ends in a comma"),
            (
                "restrict ssh-ed25519 AAAA".to_owned(),
                "not an OpenSSH public key",
            ),
            ("hello world".to_owned(), "not an OpenSSH public key"),
            ("from=\"a".to_owned(), "double quotes"),
            (
                format!("restrict restrict {ED25519}"),
                "not an OpenSSH public key",
            ),
            (String::new(), "not an OpenSSH public key"),
        ] {
            let error = line.parse::<KeyLine>().unwrap_err();
            assert!(error.contains(expected), "{line:?}: {error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_line_reads_back_or_is_refused(before in ".{0,30}", after in ".{0,20}") {
            if let Ok(line) = format!("{before}{ED25519}{after}").parse::<KeyLine>() {
                proptest::prop_assert_eq!(line.to_string().parse::<KeyLine>().unwrap(), line);
            }
        }

        #[test]
        fn an_accepted_key_is_one_printable_line(comment in ".{0,40}") {
            if let Ok(key) = format!("{ED25519}{comment}").parse::<PublicKey>() {
                proptest::prop_assert!(!key.to_line().chars().any(char::is_control));
            }
        }
    }
}
