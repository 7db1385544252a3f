//! Of which keys sshd is asked, and what its answers mean for the others.
//!
//! Each question is a part of a connection and a line in sshd's log. So there is a limit: up to
//! [`ASK_EACH`] keys each one is asked about; of more, one for each user, kind of key and options, because
//! that is what sshd decides by: the file and its way, what it allows of keys, and the line's options.
//!
//! May not live here: asking.

use std::collections::BTreeMap;

use portcullis_protocol::{KeyOptions, PublicKey, UserName};

/// Up to how many keys each one is asked about.
pub const ASK_EACH: usize = 64;

/// Whether sshd would let a key in, as far as that can be found out without its private key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Acceptance {
    /// sshd said so (RFC 4252 section 7, `SSH_MSG_USERAUTH_PK_OK`).
    Accepted,
    /// sshd said so of another key of this user, of the same kind, size and options, in the same file.
    Inferred,
    /// sshd said that it would not.
    Refused,
    /// Whatever sshd says of the key, the account lets nobody in.
    Barred(String),
    /// The question has no answer that would tell anything.
    Unaskable(String),
    /// It could not be asked.
    Unknown(String),
}

/// Why sshd can't be asked about a key with these options; none if it can.
pub fn unaskable(options: &KeyOptions) -> Option<String> {
    if options.is_authority() {
        return Some("it signs certificates, and lets nobody in by itself".to_owned());
    }
    options
        .restricts_source()
        .then(|| "it is for certain sources only, and this host is none of them".to_owned())
}

/// What sshd decides by, besides the file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Kind(UserName, String, Option<usize>, String);

/// For each key, in order: the index of the key whose answer is its own. A key's own index: ask about it.
///
/// Keys that can't be asked about (see [`unaskable`]) do not belong here.
pub fn asked_through(keys: &[(&UserName, &KeyOptions, &PublicKey)]) -> Vec<usize> {
    if keys.len() <= ASK_EACH {
        return (0..keys.len()).collect();
    }
    let mut first: BTreeMap<Kind, usize> = BTreeMap::new();
    keys.iter()
        .enumerate()
        .map(|(at, (user, options, key))| {
            let kind = Kind(
                (*user).clone(),
                key.algorithm(),
                key.rsa_bits(),
                options.to_string(),
            );
            *first.entry(kind).or_insert(at)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ED25519: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFkKc52EQpKAMBtUiDp/N8hykSeuzBRx5gN48WTPDhWS";
    const ECDSA: &str = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBHwf2HMM5TRXvo2SQJjsNkiDD5KqiiNjrGVv3UUh+mMT5RHxiRtOnlqvjhQtBq0VpmpCV/PwUdhOig4vkbqAcEc=";

    fn through(count: usize) -> Vec<usize> {
        let users: [UserName; 2] = ["al".parse().unwrap(), "bo".parse().unwrap()];
        let keys: [PublicKey; 2] = [ED25519.parse().unwrap(), ECDSA.parse().unwrap()];
        let options: [KeyOptions; 2] = ["".parse().unwrap(), "restrict".parse().unwrap()];
        let all: Vec<_> = (0..count)
            .map(|at| (&users[at & 1], &options[at >> 1 & 1], &keys[at >> 2 & 1]))
            .collect();
        asked_through(&all)
    }

    #[test]
    fn few_keys_are_asked_about_one_by_one() {
        assert_eq!(through(ASK_EACH), (0..ASK_EACH).collect::<Vec<_>>());
        assert!(through(0).is_empty());
    }

    #[test]
    fn of_many_one_of_each_kind_is_asked_about() {
        let through = through(1000);
        assert_eq!(through.len(), 1000);
        for (at, first) in through.into_iter().enumerate() {
            assert_eq!(first, at & 7, "the first of its user, options and kind");
        }
    }

    #[test]
    fn what_has_no_answer_is_not_asked() {
        for (options, expected) in [
            ("", false),
            ("restrict,no-pty", false),
            ("cert-authority", true),
            ("from=\"192.0.2.0/24\"", true),
        ] {
            let options = options.parse().unwrap();
            assert_eq!(unaskable(&options).is_some(), expected, "{options}");
        }
    }
}
