//! sshd's host keys against those that were first seen for this instance.
//!
//! May not live here: reading keys and shaking hands (`system`), where what was first seen is kept
//! (`agent::host_keys`).

use jiff::Timestamp;
use portcullis_protocol::report::HostKey;
use serde::{Deserialize, Serialize};

use super::observation::{Observed, Sshd};

/// A host key that was seen, and since when it is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownKey {
    /// Algorithm, for example `ssh-ed25519`.
    #[serde(rename = "type")]
    pub algorithm: String,
    /// `SHA256:…` as `ssh-keygen -l` prints it.
    pub fingerprint: String,
    /// When it was first seen, or taken for good.
    pub first_seen: Timestamp,
}

/// The host keys that are an instance's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownHostKeys {
    /// The instance's id in the spec: another instance, made from an image of this one, has others.
    pub instance: String,
    /// The keys.
    pub keys: Vec<KnownKey>,
}

impl KnownHostKeys {
    fn has(&self, key: &HostKey) -> bool {
        self.keys.iter().any(|known| known.fingerprint == key.fingerprint)
    }
}

/// How the keys differ from those that are known. Each is `type fingerprint`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Known, and no longer on disk.
    pub old: Vec<String>,
    /// On disk or shown by sshd, and not known.
    pub new: Vec<String>,
    /// The one that sshd showed, if it is none of those on disk.
    pub stray: Option<String>,
}

/// What a comparison came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// All are known, on disk and in the handshake.
    Same,
    /// They are not those that are known.
    Changed(Change),
    /// Why they are not known yet.
    NotYet(String),
    /// Why it can't be told.
    Unknown(String),
}

/// Compares what was seen of sshd with what is known for the instance (none: no spec is accepted).
pub fn compare(instance: Option<&str>, known: &Observed<Option<KnownHostKeys>>, sshd: &Sshd) -> Comparison {
    let known = match known {
        Ok(known) => known.as_ref().filter(|known| is_of(known, instance)),
        Err(reason) => return Comparison::Unknown(reason.clone()),
    };
    // Without it, nobody knows which files are host keys.
    if let Err(reason) = &sshd.config {
        return Comparison::Unknown(format!("sshd's configuration can't be read: {reason}"));
    }
    let change = change(known, sshd);
    if change != Change::default() {
        return Comparison::Changed(change);
    }
    match (known, usable(sshd)) {
        (Some(_), Ok(_)) => Comparison::Same,
        (Some(_), Err(reason)) => Comparison::Unknown(reason),
        (None, Err(reason)) => Comparison::NotYet(reason),
        (None, Ok(_)) if instance.is_none() => Comparison::NotYet("no spec is accepted yet".to_owned()),
        (None, Ok(_)) => {
            Comparison::NotYet("the daemon has not remembered them yet: see its journal".to_owned())
        }
    }
}

/// What is to be remembered, if nothing is known for this instance yet and its sshd is up: before that,
/// keys of the image may be on disk that cloud-init is about to replace.
pub fn first_seen(
    instance: &str,
    known: &Observed<Option<KnownHostKeys>>,
    sshd: &Sshd,
    now: Timestamp,
) -> Option<KnownHostKeys> {
    match known {
        Ok(Some(known)) if known.instance == instance => None,
        Ok(_) => trusted(instance, None, sshd, now).ok(),
        // What is damaged may have held others.
        Err(_) => None,
    }
}

/// The keys as they are now, to be known from here on. Those that are known stay so since when they are.
///
/// # Errors
/// When there are none, or sshd does not show one of them.
pub fn trusted(
    instance: &str,
    known: Option<&KnownHostKeys>,
    sshd: &Sshd,
    now: Timestamp,
) -> Observed<KnownHostKeys> {
    let since = |key: &HostKey| {
        known
            .filter(|known| known.instance == instance)
            .and_then(|known| known.keys.iter().find(|old| old.fingerprint == key.fingerprint))
            .map_or(now, |old| old.first_seen)
    };
    let keys = usable(sshd)?.iter().map(|key| KnownKey {
        algorithm: key.algorithm.clone(),
        fingerprint: key.fingerprint.clone(),
        first_seen: since(key),
    });
    Ok(KnownHostKeys {
        instance: instance.to_owned(),
        keys: keys.collect(),
    })
}

/// `type fingerprint`, for people.
pub fn named(key: &HostKey) -> String {
    format!("{} {}", key.algorithm, key.fingerprint)
}

fn is_of(known: &KnownHostKeys, instance: Option<&str>) -> bool {
    // Without a spec there is no other id to go by.
    instance.is_none_or(|id| id == known.instance)
}

fn change(known: Option<&KnownHostKeys>, sshd: &Sshd) -> Change {
    let shown = sshd.handshake.as_ref().ok().map(|shake| &shake.host_key);
    let stray = shown.filter(|shown| !sshd.host_keys.iter().any(|key| key.is_same(shown)));
    let Some(known) = known else {
        return Change {
            stray: stray.map(named),
            ..Change::default()
        };
    };
    let old = known.keys.iter().filter(|old| {
        let on_disk = sshd
            .host_keys
            .iter()
            .any(|key| key.fingerprint == old.fingerprint);
        !on_disk
    });
    let new = sshd.host_keys.iter().chain(stray).filter(|key| !known.has(key));
    Change {
        old: old
            .map(|old| format!("{} {}", old.algorithm, old.fingerprint))
            .collect(),
        new: new.map(named).collect(),
        stray: stray.map(named),
    }
}

/// The host keys on disk, one of which sshd has shown.
fn usable(sshd: &Sshd) -> Observed<&[HostKey]> {
    if let Err(reason) = &sshd.config {
        return Err(format!("sshd's configuration can't be read: {reason}"));
    }
    if sshd.host_keys.is_empty() {
        return Err("sshd has no host key on disk".to_owned());
    }
    let shown = match &sshd.handshake {
        Ok(shake) => &shake.host_key,
        Err(reason) => return Err(format!("sshd has not shown its host key: {reason}")),
    };
    if sshd.host_keys.iter().any(|key| key.is_same(shown)) {
        return Ok(&sshd.host_keys);
    }
    Err(format!(
        "sshd shows the host key {}, which is none of those on disk: restart sshd, or find out who answers \
         on its port",
        named(shown)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::observation::{Handshake, SshdConfig};

    const EARLY: Timestamp = Timestamp::UNIX_EPOCH;
    const LATE: Timestamp = Timestamp::MAX;

    fn key(name: &str) -> HostKey {
        HostKey {
            algorithm: "ssh-ed25519".into(),
            fingerprint: format!("SHA256:{name}"),
            key: None,
        }
    }

    /// An sshd with keys on disk that shows one.
    fn sshd(on_disk: &[&str], shown: Option<&str>) -> Sshd {
        let handshake = |name| Handshake {
            port: 22,
            server_id: "SSH-2.0-x".into(),
            host_key: key(name),
            algorithms: Err("not noted".into()),
            methods: vec![],
        };
        Sshd {
            units: Ok(vec![]),
            config: Ok(SshdConfig::default()),
            handshake: shown.map(handshake).ok_or_else(|| "refused".into()),
            unanswered: Vec::new(),
            care: Default::default(),
            host_keys: on_disk.iter().copied().map(key).collect(),
            interactive: Default::default(),
            unpublished_host_keys: Vec::new(),
        }
    }

    fn known(names: &[&str]) -> Observed<Option<KnownHostKeys>> {
        trusted("i-1", None, &sshd(names, Some(names[0])), EARLY).map(Some)
    }

    fn after(on_disk: &[&str], shown: Option<&str>) -> Comparison {
        compare(Some("i-1"), &known(&["a", "b"]), &sshd(on_disk, shown))
    }

    fn changed(old: &[&str], new: &[&str], stray: Option<&str>) -> Comparison {
        let name = |name: &&str| format!("ssh-ed25519 SHA256:{name}");
        Comparison::Changed(Change {
            old: old.iter().map(name).collect(),
            new: new.iter().map(name).collect(),
            stray: stray.as_ref().map(name),
        })
    }

    #[test]
    fn each_change_is_told() {
        assert_eq!(after(&["b", "a"], Some("b")), Comparison::Same);
        assert_eq!(after(&["a", "c"], Some("a")), changed(&["b"], &["c"], None));
        assert_eq!(after(&["a"], Some("a")), changed(&["b"], &[], None));
        assert_eq!(after(&["a", "b", "c"], Some("a")), changed(&[], &["c"], None));
        assert_eq!(after(&["a", "b"], Some("x")), changed(&[], &["x"], Some("x")));
        // sshd still shows the old one, which is no longer on disk.
        assert_eq!(after(&["c", "b"], Some("a")), changed(&["a"], &["c"], Some("a")));
        assert_eq!(after(&[], Some("a")), changed(&["a", "b"], &[], Some("a")));
    }

    #[test]
    fn a_change_on_disk_is_told_without_a_handshake_too() {
        assert_eq!(after(&["a", "c"], None), changed(&["b"], &["c"], None));
        assert!(
            matches!(after(&["a", "b"], None), Comparison::Unknown(reason) if reason.contains("refused"))
        );
    }

    #[test]
    fn what_can_not_be_read_is_unknown_and_never_trusted() {
        let damaged = Err("host-keys.json: damaged".to_owned());
        let seen = sshd(&["a"], Some("a"));
        assert!(matches!(
            compare(Some("i-1"), &damaged, &seen),
            Comparison::Unknown(_)
        ));
        assert_eq!(first_seen("i-1", &damaged, &seen, LATE), None);
        let mut unasked = sshd(&["c"], Some("c"));
        unasked.config = Err("syntax".into());
        assert!(matches!(
            compare(Some("i-1"), &known(&["a"]), &unasked),
            Comparison::Unknown(reason) if reason.contains("syntax")
        ));
        assert_eq!(first_seen("i-1", &Ok(None), &unasked, LATE), None);
    }

    #[test]
    fn they_are_remembered_once_sshd_shows_one_of_them() {
        let not_yet = [
            sshd(&[], None),
            sshd(&["a"], None),
            sshd(&["a"], Some("b")),
            sshd(&[], Some("b")),
        ];
        for seen in not_yet {
            assert_eq!(first_seen("i-1", &Ok(None), &seen, LATE), None, "{seen:?}");
        }
        let seen = sshd(&["a"], Some("a"));
        assert!(matches!(
            compare(Some("i-1"), &Ok(None), &seen),
            Comparison::NotYet(_)
        ));
        assert!(matches!(compare(None, &Ok(None), &seen), Comparison::NotYet(_)));
        let remembered = first_seen("i-1", &Ok(None), &seen, LATE);
        assert_eq!(remembered.as_ref().unwrap().keys[0].first_seen, LATE);
        assert_eq!(compare(Some("i-1"), &Ok(remembered), &seen), Comparison::Same);
        // Once they are, nothing new is.
        assert_eq!(first_seen("i-1", &known(&["b"]), &seen, LATE), None);
        // Who answers instead of sshd is told before anything is remembered, too.
        assert_eq!(
            compare(Some("i-1"), &Ok(None), &sshd(&["a"], Some("b"))),
            changed(&[], &[], Some("b"))
        );
    }

    #[test]
    fn another_instance_starts_anew() {
        let seen = sshd(&["c"], Some("c"));
        assert!(matches!(
            compare(Some("i-2"), &known(&["a"]), &seen),
            Comparison::NotYet(_)
        ));
        let remembered = first_seen("i-2", &known(&["a"]), &seen, LATE).unwrap();
        assert_eq!(remembered.instance, "i-2");
        // Without a spec the last instance's keys count.
        assert_eq!(
            compare(None, &known(&["a"]), &seen),
            changed(&["a"], &["c"], None)
        );
    }

    #[test]
    fn trusting_keeps_since_when_a_key_is_known() {
        let old = known(&["a", "b"]).unwrap();
        let seen = sshd(&["a", "c"], Some("c"));
        let trusted = trusted("i-1", old.as_ref(), &seen, LATE).unwrap();
        let since: Vec<_> = trusted.keys.iter().map(|key| key.first_seen).collect();
        assert_eq!(since, [EARLY, LATE]);
        assert_eq!(compare(Some("i-1"), &Ok(Some(trusted)), &seen), Comparison::Same);
        let stray = super::trusted("i-1", old.as_ref(), &sshd(&["a"], Some("c")), LATE);
        assert!(stray.unwrap_err().contains("SHA256:c"));
    }
}
