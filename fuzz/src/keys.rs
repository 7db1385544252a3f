//! Keys: lines of users and control planes, the files that they are merged into, and what a platform hands
//! to the instance.
//!
//! May not live here: what sshd makes of them (`tests/keys`).

use std::collections::BTreeSet;

use portcullis::policy::key_sources::{Injected, KeyRules, gather};
use portcullis::policy::keys::{Expiry, installed, merge, our_key};
use portcullis::system::injected::public_keys;
use portcullis_protocol::key::{KeyLine, MIN_RSA_BITS};
use portcullis_protocol::{AuthorizedKey, Spec, UserName};

use crate::parts;

const KEYS: [&str; 2] = [
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFkKc52EQpKAMBtUiDp/N8hykSeuzBRx5gN48WTPDhWS alice@example",
    "restrict ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ",
];

fn ubuntu() -> UserName {
    "ubuntu".parse().unwrap()
}

fn authorized(line: KeyLine, ends: Option<i64>) -> AuthorizedKey {
    AuthorizedKey {
        user: ubuntu(),
        options: line.options,
        key: line.key,
        expires: ends.and_then(|end| jiff::Timestamp::from_second(end).ok()),
    }
}

/// What is taken for a key is one line without control characters, is the same key when it is read again,
/// and no option stands in it that is not from the list.
pub fn keys(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else {
        return false;
    };
    let Ok(line) = text.parse::<KeyLine>() else {
        return false;
    };
    let written = line.key.to_line();
    assert!(!written.chars().any(char::is_control), "{written:?}");
    assert!(!line.options.as_str().chars().any(char::is_control), "{line:?}");
    let whole = format!("{} {written}", line.options.as_str());
    let again: KeyLine = whole
        .trim_start()
        .parse()
        .expect("what was read is written so that it can be read");
    assert_eq!(again, line);
    assert_eq!(again.key.fingerprint(), line.key.fingerprint());
    assert!(line.key.rsa_bits().is_none_or(|bits| bits >= MIN_RSA_BITS));
    // As a document has it.
    let key = authorized(line, None);
    let json = serde_json::to_vec(&key).unwrap();
    assert_eq!(serde_json::from_slice::<AuthorizedKey>(&json).unwrap(), key);
    true
}

/// A user's file survives byte for byte whatever we do to it; merging depends on the last keys alone, and all
/// of them are there.
pub fn merged(data: &[u8]) -> bool {
    let (control, file) = data.split_first().unwrap_or((&0, &[]));
    // The first part may be a key of its own; the rest is the user's file.
    let (own, file) = match parts(file)[..] {
        [own, _, ..] => (own, &file[own.len() + 4..]),
        _ => (&[][..], file),
    };
    let own = std::str::from_utf8(own)
        .ok()
        .and_then(|text| text.parse::<KeyLine>().ok());
    let known = KEYS.map(|line| line.parse::<KeyLine>().unwrap());
    let ends = (control & 4 != 0).then(|| 1_900_000_000 + i64::from(*control) * 1_000_003);
    let ours: Vec<AuthorizedKey> = known
        .into_iter()
        .chain(own)
        .enumerate()
        .filter(|(at, _)| *at == 2 || control >> at & 1 != 0)
        .map(|(at, line)| authorized(line, ends.filter(|_| at != 1)))
        .collect();
    let expiry = [Expiry::Utc, Expiry::AnyZone, Expiry::Unwritten][usize::from(control >> 6) % 3];

    let users = merge(file, &[], expiry);
    let lines = |bytes: &[u8]| -> Vec<Vec<u8>> {
        let lines = bytes.split_inclusive(|byte| *byte == b'\n');
        lines.map(<[u8]>::to_vec).collect()
    };
    // Nothing is added, and no line goes that is not exactly one of ours.
    let mut kept = lines(&users).into_iter().peekable();
    for line in lines(file) {
        if kept.peek() == Some(&line) {
            kept.next();
        } else {
            let text = line.trim_ascii_end();
            let marker = text.starts_with(b"# BEGIN portcullis (") || text == b"# END portcullis";
            assert!(
                marker || our_key(&line).is_some(),
                "lost: {:?}",
                String::from_utf8_lossy(&line)
            );
        }
    }
    assert_eq!(kept.next(), None, "a line that nobody wrote");
    let first = merge(file, &ours, expiry);
    assert!(first.ends_with(&users));
    assert_eq!(merge(&first, &ours, expiry), first);
    assert_eq!(merge(&first, &[], expiry), users);
    let found = installed(&first);
    assert_eq!(found.len(), ours.len());
    for (line, key) in found.iter().zip(&ours) {
        assert!(line.options == key.options && line.key == key.key);
    }
    // The room for it is bounded by what went in.
    assert!(
        first.len() <= file.len() + 200 + ours.iter().map(|k| k.key.to_line().len() + 400).sum::<usize>()
    );
    !ours.is_empty() && !users.is_empty()
}

/// Credentials and cloud-init's keys: each line becomes a key of exactly the user it was for, or is told as
/// left out; a revoked one never comes back.
pub fn injected(data: &[u8]) -> bool {
    let parts = parts(data);
    let [names, credential, cloud] = parts[..] else {
        return false;
    };
    let (Ok(name), Ok(credential), Ok(cloud)) = (
        std::str::from_utf8(names),
        std::str::from_utf8(credential),
        std::str::from_utf8(cloud),
    ) else {
        return false;
    };
    let spec = Spec::from_json(br#"{"version":1,"generation":1,"instance":{"id":"i"}}"#).unwrap();
    let injected = Injected {
        credentials: vec![(name.to_owned(), Ok(credential.to_owned()))],
        cloud_init: Some((ubuntu(), public_keys(cloud).map_err(|e| e.to_string()))),
    };
    let rules = |revoked: BTreeSet<String>| KeyRules {
        least_rsa_bits: MIN_RSA_BITS,
        revoked: Ok(revoked),
    };
    let now = jiff::Timestamp::UNIX_EPOCH;
    let grants = gather(&spec, &injected, &rules(BTreeSet::new()), now);
    let mut fingerprints = BTreeSet::new();
    for grant in &grants.held {
        let user = grant.key.user.as_str();
        let named = name == "ssh.authorized_keys.root" && user == "root" || name.ends_with(user);
        assert!(named || user == "ubuntu", "{name:?} gave {user} a key");
        fingerprints.insert(grant.key.key.fingerprint());
    }
    let lines = credential.lines().count()
        + injected
            .cloud_init
            .iter()
            .flat_map(|(_, keys)| keys.iter())
            .flatten()
            .count();
    assert!(grants.held.len() + grants.unfit.len() <= lines + 2);
    let read = !grants.held.is_empty();
    let none = gather(&spec, &injected, &rules(fingerprints), now);
    assert!(none.held.is_empty(), "a revoked key came back");
    read
}
