//! What sshd writes when it lets somebody in (`auth_log` in OpenSSH's auth.c).
//!
//! Others get text into sshd's lines: strangers by the names they try, a certificate's authority by its
//! key id, and the unprivileged half of sshd by what it asks the other one to log (which ends in
//! `[preauth]`). So a line is read from its first to its last byte, or not at all.
//!
//! May not live here: where lines come from, and which of them can be trusted (`system::ssh_sessions`).

use std::net::IpAddr;

use portcullis_protocol::UserName;

/// A login that sshd accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// Who logged in.
    pub user: UserName,
    /// From where; `None` if not over a network.
    pub from: Option<IpAddr>,
    /// With what.
    pub with: Credential,
}

/// What let somebody in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// A public key, by its fingerprint (`SHA256:…`); for a certificate also its authority's.
    Key {
        /// Of the key itself.
        key: String,
        /// Of the key that signed it.
        authority: Option<String>,
    },
    /// A public key whose fingerprint is in another form: sshd's `FingerprintHash` is not sha256.
    UnreadableKey,
    /// No key: a password, for example.
    NoKey,
}

impl Credential {
    /// Whether the key of this fingerprint opened it, by itself or as a certificate's authority.
    pub fn is_of(&self, fingerprint: &str) -> bool {
        match self {
            Self::Key { key, authority } => key == fingerprint || authority.as_deref() == Some(fingerprint),
            Self::UnreadableKey | Self::NoKey => false,
        }
    }
}

/// Reads a message of sshd; `None` for one that tells of no login. Where several methods are required
/// (`AuthenticationMethods`), a key that was one of them is told too if sshd's `LogLevel` is VERBOSE.
pub fn accepted(message: &str) -> Option<Accepted> {
    // The key id of a certificate may hold blanks, and nothing else does that is not printable.
    if message.bytes().any(|byte| !(b' '..=b'~').contains(&byte)) {
        return None;
    }
    let (verb, rest) = message.split_once(' ')?;
    let (method, rest) = rest.split_once(" for ")?;
    let (user, rest) = rest.split_once(" from ")?;
    let (from, rest) = rest.split_once(" port ")?;
    let (port, rest) = rest.split_once(" ssh2")?;
    port.parse::<u16>().ok()?;
    let with = match (verb, method) {
        ("Accepted" | "Partial", "publickey") => credential(rest.strip_prefix(": ")?)?,
        ("Accepted", _) if is_method(method) && is_end(rest) => Credential::NoKey,
        _ => return None,
    };
    Some(Accepted {
        user: user.parse().ok()?,
        from: address(from)?,
        with,
    })
}

/// The end of a line that the privileged half wrote: nothing, or what the method says of itself.
fn is_end(rest: &str) -> bool {
    (rest.is_empty() || rest.starts_with(": ")) && !rest.ends_with(" [preauth]")
}

/// A method, perhaps with what it used: `password`, `keyboard-interactive/pam`.
fn is_method(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-/@.".contains(&b))
}

/// `TYPE FINGERPRINT`, or `TYPE-CERT FINGERPRINT ID text (serial N) CA TYPE FINGERPRINT`.
fn credential(text: &str) -> Option<Credential> {
    let (kind, rest) = text.split_once(' ')?;
    if !is_type(kind) {
        return None;
    }
    if !kind.ends_with("-CERT") {
        return match fingerprint(rest)? {
            Some(key) => Some(Credential::Key { key, authority: None }),
            None => Some(Credential::UnreadableKey),
        };
    }
    let (key, rest) = rest.split_once(" ID ")?;
    // The id is the authority's free text, so what follows it is found from the end.
    let (rest, authority) = rest.rsplit_once(" CA ")?;
    let (_, serial) = rest.strip_suffix(')')?.rsplit_once(" (serial ")?;
    serial.parse::<u64>().ok()?;
    let (authority_kind, authority) = authority.split_once(' ')?;
    if !is_type(authority_kind) {
        return None;
    }
    match (fingerprint(key)?, fingerprint(authority)?) {
        (Some(key), Some(authority)) => Some(Credential::Key {
            key,
            authority: Some(authority),
        }),
        _ => Some(Credential::UnreadableKey),
    }
}

/// `ED25519`, `RSA-CERT`, `ECDSA-SK`.
fn is_type(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'-')
}

/// 32 bytes in base64 without padding, as `ssh-keygen -l` prints them; `Some(None)` for another hash.
fn fingerprint(text: &str) -> Option<Option<String>> {
    let (hash, digits) = text.split_once(':')?;
    let is_base64 = digits
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"+/".contains(&b));
    let is_hex = digits.bytes().all(|b| b.is_ascii_hexdigit() || b == b':');
    match hash {
        "SHA256" if is_base64 && digits.len() == 43 => Some(Some(text.to_owned())),
        "MD5" if is_hex && digits.len() == 47 => Some(None),
        "SHA1" | "SHA384" | "SHA512" if is_base64 => Some(None),
        _ => None,
    }
}

/// An address, perhaps with its interface; `UNKNOWN` where sshd talks to something else than a socket
/// of the network.
fn address(text: &str) -> Option<Option<IpAddr>> {
    if text == "UNKNOWN" {
        return Some(None);
    }
    let (address, zone) = text.split_once('%').unwrap_or((text, ""));
    if zone.contains(' ') {
        return None;
    }
    Some(Some(address.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: &str = "SHA256:uWmxhQZ6T1ZGvOfFR0xGs4dp0c2IMKFTwYDBPuZf5WE";
    const CA: &str = "SHA256:9+zbX0gPO1dn1CqZ0GJkLQzz3bFQWhVbXKDXvYyPl/s";

    fn key(authority: Option<&str>) -> Credential {
        Credential::Key {
            key: KEY.to_owned(),
            authority: authority.map(str::to_owned),
        }
    }

    fn line(with: &str) -> String {
        format!("Accepted publickey for ubuntu from 192.0.2.7 port 50022 ssh2: {with}")
    }

    #[test]
    fn lines_of_sshd() {
        for (text, user, from, with) in [
            (
                line(&format!("ED25519 {KEY}")),
                "ubuntu",
                Some("192.0.2.7"),
                key(None),
            ),
            (
                format!("Accepted publickey for root from 2001:db8::1 port 1 ssh2: ECDSA-SK {KEY}"),
                "root",
                Some("2001:db8::1"),
                key(None),
            ),
            (
                format!("Partial publickey for a_b.c from fe80::1%eth0 port 65535 ssh2: RSA {KEY}"),
                "a_b.c",
                Some("fe80::1"),
                key(None),
            ),
            (
                format!("Accepted publickey for ubuntu from UNKNOWN port 65535 ssh2: RSA {KEY}"),
                "ubuntu",
                None,
                key(None),
            ),
            (
                line(&format!("ED25519-CERT {KEY} ID alice (serial 0) CA RSA {CA}")),
                "ubuntu",
                Some("192.0.2.7"),
                key(Some(CA)),
            ),
            (
                line("ED25519 MD5:3d:88:98:6f:e4:8b:3f:41:a4:49:8e:12:91:4a:8d:11"),
                "ubuntu",
                Some("192.0.2.7"),
                Credential::UnreadableKey,
            ),
            (
                "Accepted password for ubuntu from 192.0.2.7 port 2 ssh2".to_owned(),
                "ubuntu",
                Some("192.0.2.7"),
                Credential::NoKey,
            ),
            (
                "Accepted keyboard-interactive/pam for ubuntu from 192.0.2.7 port 2 ssh2".to_owned(),
                "ubuntu",
                Some("192.0.2.7"),
                Credential::NoKey,
            ),
        ] {
            let expected = Accepted {
                user: user.parse().unwrap(),
                from: from.map(|from| from.parse().unwrap()),
                with,
            };
            assert_eq!(accepted(&text), Some(expected), "{text}");
        }
    }

    /// What an authority, a stranger, a user or sshd's unprivileged half may get into a line.
    #[test]
    fn lines_that_only_look_like_it() {
        let good = line(&format!("ED25519 {KEY}"));
        for bad in [
            format!("{good} [preauth]"),
            "Accepted password for root from 192.0.2.7 port 5 ssh2 [preauth]".to_owned(),
            "Accepted password for root from 192.0.2.7 port 5 ssh2: x [preauth]".to_owned(),
            "Accepted password for root from 192.0.2.7 port 5 ssh2x".to_owned(),
            format!("{good}\n"),
            format!("x\n{good}"),
            format!(" {good}"),
            format!("Invalid user {good}"),
            format!("pam_unix(sshd:session): {good}"),
            good.replace("ubuntu", "invalid user ubuntu"),
            good.replace("ubuntu", "root from 192.0.2.1 port 2 ssh2: RSA x"),
            good.replace("ubuntu", ""),
            good.replace("Accepted", "Failed"),
            good.replace("Accepted", "Postponed"),
            good.replace("50022", "70000"),
            good.replace("192.0.2.7", "192.0.2.777"),
            good.replace("ED25519", "ed25519"),
            good.replace("ssh2:", "ssh2"),
            line("ED25519 SHA256:short"),
            line(&format!("ED25519 {KEY}=")),
            line(&format!("ED25519-CERT {KEY}")),
            line(&format!("ED25519-CERT {KEY} ID a (serial x) CA RSA {CA}")),
            line(&format!("ED25519 {KEY} ID a (serial 1) CA RSA {CA}")),
        ] {
            assert_eq!(accepted(&bad), None, "{bad:?}");
        }
    }

    #[test]
    fn an_authority_can_not_name_another_one() {
        let other = KEY.replace('u', "v");
        let id = format!("a (serial 1) CA ED25519 {other}");
        let text = line(&format!("ED25519-CERT {KEY} ID {id} (serial 7) CA RSA {CA}"));
        let with = accepted(&text).unwrap().with;
        assert_eq!(with, key(Some(CA)));
        assert!(with.is_of(CA) && with.is_of(KEY) && !with.is_of(&other));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,200}") {
            let _ = accepted(&text);
        }

        #[test]
        fn a_certificates_id_decides_nothing(id in "[ -~]{0,60}") {
            let text = line(&format!("RSA-CERT {KEY} ID {id} (serial 7) CA ED25519 {CA}"));
            prop_assert_eq!(accepted(&text).unwrap().with, key(Some(CA)));
        }

        #[test]
        fn a_user_that_was_tried_decides_nothing(name in "[ -~\n\r\t]{0,80}") {
            // What sshd writes of a name that strangers try.
            for text in [
                format!("Invalid user {name} from 192.0.2.7 port 2"),
                format!("Failed publickey for invalid user {name} from 192.0.2.7 port 2 ssh2: RSA {KEY}"),
                format!("Failed password for invalid user {name} from 192.0.2.7 port 2 ssh2"),
            ] {
                prop_assert_eq!(accepted(&text), None);
            }
        }

        #[test]
        fn a_truncated_line_is_no_line(at in 0usize..200) {
            let text = line(&format!("ED25519-CERT {KEY} ID alice (serial 0) CA RSA {CA}"));
            if at < text.len() {
                prop_assert_eq!(accepted(&text[..at]), None);
            }
        }

        #[test]
        fn bytes_behind_or_before_spoil_a_line(extra in "[ -~\n\t]{1,40}") {
            let text = line(&format!("ED25519 {KEY}"));
            prop_assert_eq!(accepted(&format!("{text}{extra}")), None);
            prop_assert_eq!(accepted(&format!("{extra}{text}")), None);
        }

        #[test]
        fn one_login_is_one_user(user in "[a-z_][a-z0-9_.-]{0,31}", port in any::<u16>()) {
            let text = format!("Accepted publickey for {user} from 192.0.2.7 port {port} ssh2: RSA {KEY}");
            let read = accepted(&text).unwrap();
            prop_assert_eq!(read.user.as_str(), user);
        }
    }
}
