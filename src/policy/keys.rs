//! What an authorized-keys file must look like: our block on top, and the user's bytes untouched.
//!
//! Every line of ours can be told by itself: it is one of the two markers, or a key that ends in
//! [`TAG`]. So nothing depends on the block being whole: whatever somebody deleted, doubled or moved,
//! exactly our lines are replaced, and every other line, between the markers too, stays as it is.
//! The block stands on top because then nothing has to be added to the user's bytes, a missing final
//! newline included; and sshd takes the first line that fits a key, so a line of an image such as
//! `command="echo Please login as ubuntu" ssh-…` can't stand before the one that the spec asked for.
//!
//! May not live here: files, users of the system, the clock.

use jiff::{SignedDuration, Timestamp};
use portcullis_protocol::key::KeyLine;
use portcullis_protocol::{AuthorizedKey, KeyOptions, UserName};

const BEGIN: &str = "# BEGIN portcullis (managed: lines that end in #portcullis are overwritten)";
const END: &str = "# END portcullis";

/// The end of each key of ours, after its comment. sshd ignores everything after the key itself.
const TAG: &str = " #portcullis";

/// How a key's end is written for this sshd, so that it ends even if nobody is there to remove it
/// (sshd(8), `expiry-time`). An sshd that does not know the form refuses the key at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// To the second, in UTC: OpenSSH 9.1 and newer.
    Utc,
    /// In the host's own zone, which is not known here: 14 hours are added, so that the key ends in
    /// no zone too early, and in the last one 26 hours late. OpenSSH 7.7 and newer.
    AnyZone,
    /// Not at all: whoever calls removes the key in time.
    Unwritten,
}

impl Expiry {
    /// What an OpenSSH of this version (major, minor) understands.
    pub fn understood_by(version: Option<(u16, u16)>) -> Self {
        match version {
            Some(version) if version >= (9, 1) => Self::Utc,
            Some(version) if version >= (7, 7) => Self::AnyZone,
            _ => Self::Unwritten,
        }
    }

    fn option(self, end: Timestamp) -> String {
        let (end, zone) = match self {
            Self::Utc => (end, "Z"),
            Self::AnyZone => (
                end.saturating_add(SignedDuration::from_hours(14)).unwrap_or(end),
                "",
            ),
            Self::Unwritten => return String::new(),
        };
        format!("{EXPIRY_OPTION}{}{zone}\"", end.strftime("%Y%m%d%H%M%S"))
    }
}

const EXPIRY_OPTION: &str = "expiry-time=\"";

/// The keys of `all` that let `user` in at the time `now`.
pub fn current(all: &[AuthorizedKey], user: &UserName, now: Timestamp) -> Vec<AuthorizedKey> {
    all.iter()
        .filter(|key| key.user == *user && key.expires.is_none_or(|end| now < end))
        .cloned()
        .collect()
}

/// The file with exactly `ours` in our block. What is not ours survives byte for byte, whatever it is;
/// without keys the block disappears, and the user's own bytes are left.
///
/// Expired keys do not belong in `ours`: see [`current`].
pub fn merge(existing: &[u8], ours: &[AuthorizedKey], expiry: Expiry) -> Vec<u8> {
    let mut file = block(ours, expiry).into_bytes();
    for line in existing.split_inclusive(|byte| *byte == b'\n') {
        if !is_ours(line) {
            file.extend_from_slice(line);
        }
    }
    file
}

/// Our keys in a file: what [`merge`] wrote and nobody removed or altered since.
pub fn installed(content: &[u8]) -> Vec<KeyLine> {
    content.split(|byte| *byte == b'\n').filter_map(our_key).collect()
}

fn block(ours: &[AuthorizedKey], expiry: Expiry) -> String {
    if ours.is_empty() {
        return String::new();
    }
    let mut block = format!("{BEGIN}\n");
    for key in ours {
        let end = key.expires.map(|end| expiry.option(end)).unwrap_or_default();
        let options = [end.as_str(), key.options.as_str()];
        let options: Vec<&str> = options.into_iter().filter(|o| !o.is_empty()).collect();
        if !options.is_empty() {
            block.push_str(&options.join(","));
            block.push(' ');
        }
        block.push_str(&format!("{}{TAG}\n", key.key));
    }
    block + END + "\n"
}

fn is_ours(line: &[u8]) -> bool {
    let text = line.trim_ascii_end();
    text == BEGIN.as_bytes() || text == END.as_bytes() || our_key(line).is_some()
}

/// The key of a line in exactly the form that [`merge`] writes; an editor may have changed its end. Its
/// end is left out: sshd watches that, and the spec says what it should be.
pub fn our_key(line: &[u8]) -> Option<KeyLine> {
    let line = std::str::from_utf8(line.trim_ascii_end()).ok()?;
    let line = line.strip_suffix(TAG)?;
    let rest = match line.strip_prefix(EXPIRY_OPTION) {
        Some(rest) => {
            let (time, rest) = rest.split_once('"')?;
            let digits = time.strip_suffix('Z').unwrap_or(time);
            let rest = rest.strip_prefix([' ', ','])?;
            digits.bytes().all(|byte| byte.is_ascii_digit()).then_some(rest)?
        }
        None => line,
    };
    // The parser forgives blanks around a key; a line of ours has none.
    (!rest.starts_with([' ', '\t'])).then(|| rest.parse().ok())?
}

/// Whether a line holds this key with these options.
pub fn holds(line: &KeyLine, options: &KeyOptions, key: &portcullis_protocol::PublicKey) -> bool {
    line.options == *options && line.key.same_key(key)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const KEYS: [&str; 3] = [
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFkKc52EQpKAMBtUiDp/N8hykSeuzBRx5gN48WTPDhWS alice@example",
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ",
        "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBHwf2HMM5TRXvo2SQJjsNkiDD5KqiiNjrGVv3UUh+mMT5RHxiRtOnlqvjhQtBq0VpmpCV/PwUdhOig4vkbqAcEc= c d",
    ];

    fn key(line: &str, expires: Option<&str>) -> AuthorizedKey {
        AuthorizedKey {
            user: "ubuntu".parse().unwrap(),
            options: KeyOptions::default(),
            key: line.parse().unwrap(),
            expires: expires.map(|end| end.parse().unwrap()),
        }
    }

    fn line(key: &AuthorizedKey) -> KeyLine {
        KeyLine {
            options: key.options.clone(),
            key: key.key.clone(),
        }
    }

    fn merged(existing: &[u8], ours: &[AuthorizedKey]) -> Vec<u8> {
        merge(existing, ours, Expiry::Utc)
    }

    /// The bytes on disk are a promise: a newer version has to find what an older one wrote.
    #[test]
    fn the_form_of_the_block() {
        let ours = [key(KEYS[0], None), key(KEYS[1], Some("2026-12-31T00:00:00Z"))];
        let expected = format!(
            "# BEGIN portcullis (managed: lines that end in #portcullis are overwritten)\n\
             {} #portcullis\n\
             expiry-time=\"20261231000000Z\" {} #portcullis\n\
             # END portcullis\n\
             the user's",
            KEYS[0], KEYS[1]
        );
        let file = merged(b"the user's", &ours);
        assert_eq!(String::from_utf8(file.clone()).unwrap(), expected);
        assert_eq!(installed(&file), [line(&ours[0]), line(&ours[1])]);
        assert_eq!(merged(&file, &[]), b"the user's");
    }

    #[test]
    fn options_stand_before_the_key_and_behind_its_end() {
        let mut ours = key(KEYS[1], Some("2026-12-31T00:00:00Z"));
        ours.options = "restrict,from=\"10.0.0.0/8\"".parse().unwrap();
        let file = String::from_utf8(merged(b"", std::slice::from_ref(&ours))).unwrap();
        let expected = "\nexpiry-time=\"20261231000000Z\",restrict,from=\"10.0.0.0/8\" ssh-ed25519 ";
        assert!(file.contains(expected), "{file}");
        assert_eq!(installed(file.as_bytes()), [line(&ours)]);
    }

    #[test]
    fn an_end_is_written_as_this_sshd_reads_it() {
        for (version, expected) in [
            (Some((9, 1)), "expiry-time=\"20261231000000Z\" ssh-"),
            (Some((10, 0)), "expiry-time=\"20261231000000Z\" ssh-"),
            (Some((8, 9)), "expiry-time=\"20261231140000\" ssh-"),
            (Some((7, 4)), "\nssh-"),
            (None, "\nssh-"),
        ] {
            let ours = [key(KEYS[0], Some("2026-12-31T00:00:00Z"))];
            let file = merge(b"", &ours, Expiry::understood_by(version));
            assert!(String::from_utf8_lossy(&file).contains(expected), "{version:?}");
            assert_eq!(installed(&file).len(), 1, "{version:?}");
            assert_eq!(merged(&file, &[]), b"", "{version:?}");
        }
    }

    #[test]
    fn only_the_users_own_and_only_until_they_end() {
        let end = "2026-01-01T00:00:00Z";
        let mut other = key(KEYS[1], None);
        other.user = "root".parse().unwrap();
        let all = [key(KEYS[0], Some(end)), other, key(KEYS[2], None)];
        let at = |now: &str| current(&all, &"ubuntu".parse().unwrap(), now.parse().unwrap());
        assert_eq!(at("2025-12-31T23:59:59Z"), [all[0].clone(), all[2].clone()]);
        assert_eq!(at(end), [all[2].clone()]);
    }

    #[test]
    fn lines_that_only_look_like_ours_are_the_users() {
        for line in [
            format!("{} #portcullis x\n", KEYS[0]),
            format!("command=\"sh\" {} #portcullis\n", KEYS[0]),
            format!("expiry-time=\"1\",command=\"sh\" {} #portcullis\n", KEYS[0]),
            format!(" {} #portcullis\n", KEYS[0]),
            format!("{}#portcullis\n", KEYS[0]),
            "# about #portcullis\n".to_owned(),
            "# BEGIN portcullis\n".to_owned(),
            " # END portcullis\n".to_owned(),
        ] {
            assert_eq!(merged(line.as_bytes(), &[]), line.as_bytes(), "{line:?}");
            assert!(installed(line.as_bytes()).is_empty(), "{line:?}");
        }
    }

    #[test]
    fn a_user_who_has_the_key_already_gets_ours_too() {
        let own = format!("command=\"no\" {}\r\n", KEYS[0]);
        let file = merged(own.as_bytes(), &[key(KEYS[0], None)]);
        assert!(file.ends_with(own.as_bytes()));
        assert_eq!(installed(&file).len(), 1);
    }

    fn keys() -> impl Strategy<Value = Vec<AuthorizedKey>> {
        let end = prop_oneof![Just(None), Just(Some("2031-02-03T04:05:06Z"))];
        let options = prop_oneof![
            Just(""),
            Just("restrict"),
            Just("cert-authority,principals=\"a,b\""),
            Just("no-pty,from=\"10.0.0.0/8,!10.0.0.1\""),
        ];
        let one = (0usize..KEYS.len(), end, options).prop_map(|(at, end, options)| AuthorizedKey {
            options: options.parse().unwrap(),
            ..key(KEYS[at], end)
        });
        vec(one, 0..4)
    }

    /// What a user may have written: anything at all, with a taste for what is nearly ours.
    fn users_bytes() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            vec(any::<u8>(), 0..12),
            Just(KEYS[0].as_bytes().to_vec()),
            Just(b" #portcullis x".to_vec()),
            Just(b"# BEGIN portcullis".to_vec()),
            Just(b"\n".to_vec()),
            Just(b"\r\n".to_vec()),
        ];
        vec(piece, 0..12)
            .prop_map(|pieces| pieces.concat())
            .prop_filter("not ours", |bytes| {
                !bytes.split_inclusive(|b| *b == b'\n').any(is_ours)
            })
    }

    /// Lines of the user's and of ours in any order: blocks that are damaged, doubled, in CRLF.
    fn mixed_lines() -> impl Strategy<Value = Vec<(bool, Vec<u8>)>> {
        let ours = prop_oneof![
            Just(BEGIN.to_owned()),
            Just(END.to_owned()),
            Just(format!("{}{TAG}", KEYS[1])),
            Just(format!("expiry-time=\"20300101000000Z\" {}{TAG}", KEYS[2])),
        ];
        let ours = (ours, prop_oneof![Just("\n"), Just("\r\n"), Just(" \n")])
            .prop_map(|(line, end)| (true, (line + end).into_bytes()));
        let users = prop_oneof![
            Just((false, format!("{}\n", KEYS[0]).into_bytes())),
            Just((false, b"\n".to_vec())),
            Just((false, b"\xff\xfe\r\n".to_vec())),
            Just((
                false,
                format!("from=\"10.0.0.0/8\" {} own\n", KEYS[1]).into_bytes()
            )),
        ];
        vec(prop_oneof![ours, users], 0..16)
    }

    proptest! {
        #[test]
        fn the_users_bytes_survive_install_change_and_removal(user in users_bytes(), a in keys(), b in keys()) {
            let first = merged(&user, &a);
            prop_assert!(first.ends_with(&user));
            let second = merged(&first, &b);
            prop_assert!(second.ends_with(&user));
            prop_assert_eq!(merged(&second, &[]), user);
        }

        #[test]
        fn merging_depends_on_the_last_keys_only(x in vec(any::<u8>(), 0..200), a in keys(), b in keys()) {
            prop_assert_eq!(merged(&merged(&x, &a), &b), merged(&x, &b));
            prop_assert_eq!(merged(&merged(&x, &a), &a), merged(&x, &a));
        }

        #[test]
        fn of_a_damaged_block_exactly_our_lines_go(lines in mixed_lines(), b in keys()) {
            let file: Vec<u8> = lines.iter().flat_map(|(_, line)| line.clone()).collect();
            let users: Vec<u8> =
                lines.iter().filter(|(ours, _)| !ours).flat_map(|(_, line)| line.clone()).collect();
            prop_assert_eq!(merged(&file, &[]), users);
            prop_assert_eq!(merged(&merged(&file, &b), &[]), merged(&file, &[]));
            prop_assert_eq!(
                installed(&merged(&file, &b)),
                b.iter().map(line).collect::<Vec<_>>()
            );
        }
    }
}
