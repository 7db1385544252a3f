//! Where keys come from, and which one holds where several sources name the same key.
//!
//! Precedence: the spec, then systemd's credentials, then cloud-init. For the same key of the same user
//! the first one holds, with its options and its end. A key that was revoked on the instance comes back by
//! the spec alone, in which somebody named it on purpose.
//!
//! May not live here: reading any of the sources, writing keys.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use jiff::Timestamp;
use portcullis_protocol::key::KeyLine;
use portcullis_protocol::{AuthorizedKey, PublicKey, Spec, UserName};

use super::observation::Observed;

/// systemd's own name of root's keys (systemd.system-credentials(7)).
const ROOT_CREDENTIAL: &str = "ssh.authorized_keys.root";
/// Ours, for the keys of any user: the login name follows.
const USER_CREDENTIAL: &str = "portcullis.authorized_keys.";

/// Who named a key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum KeySource {
    /// The accepted spec: the file, `apply`, `keys add` and the control plane all change it.
    Spec {
        /// Its generation.
        generation: u64,
    },
    /// A systemd credential, by its name.
    Credential(String),
    /// The platform's metadata, as cloud-init read it (`v1.public_ssh_keys`).
    CloudInit,
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Spec { generation } => write!(f, "spec {generation}"),
            Self::Credential(name) => write!(f, "credential {name}"),
            Self::CloudInit => f.write_str("cloud-init"),
        }
    }
}

/// A key that lets its user in, and who said so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The key.
    pub key: AuthorizedKey,
    /// Who named it.
    pub source: KeySource,
}

/// A key that some source names and that is not put in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfit {
    /// Who named it.
    pub source: KeySource,
    /// For whom; none if that could not be read.
    pub user: Option<UserName>,
    /// The key's fingerprint, or the line that could not be read as one.
    pub what: String,
    /// Why it is left out.
    pub reason: String,
}

/// What sources beside the spec hold, as it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Injected {
    /// systemd's credentials that may hold keys, name and content.
    pub credentials: Vec<(String, Observed<String>)>,
    /// cloud-init's keys, and the user whom the settings give them to.
    pub cloud_init: Option<(UserName, Observed<Vec<String>>)>,
}

/// What the owner of the instance says about keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRules {
    /// Smallest RSA modulus, in bits.
    pub least_rsa_bits: usize,
    /// Fingerprints that were revoked on the instance; while that is not known, only the spec brings keys.
    pub revoked: Observed<BTreeSet<String>>,
}

impl KeyRules {
    fn check_size(&self, key: &PublicKey) -> Result<(), String> {
        let checked = key.check_size(self.least_rsa_bits);
        checked.map_err(|reason| format!("{reason} (keys.min_rsa_bits)"))
    }
}

/// Which keys let whom in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grants {
    /// Those to be put in place, the spec's first, in their order.
    pub held: Vec<Grant>,
    /// Those that are left out.
    pub unfit: Vec<Unfit>,
}

impl Grants {
    /// The users, each once.
    pub fn users(&self) -> BTreeSet<UserName> {
        self.held.iter().map(|grant| grant.key.user.clone()).collect()
    }

    /// All grants by user: one pass for all users.
    pub fn by_user(&self) -> BTreeMap<UserName, Vec<Grant>> {
        let mut users: BTreeMap<UserName, Vec<Grant>> = BTreeMap::new();
        for grant in &self.held {
            users
                .entry(grant.key.user.clone())
                .or_default()
                .push(grant.clone());
        }
        users
    }

    fn add(&mut self, taken: &mut BTreeSet<(UserName, String)>, source: &KeySource, key: AuthorizedKey) {
        // The same key twice is no fault: the first source holds.
        if taken.insert((key.user.clone(), key.key.fingerprint())) {
            let source = source.clone();
            self.held.push(Grant { key, source });
        }
    }

    fn leave_out(&mut self, source: &KeySource, user: Option<&UserName>, what: &str, reason: String) {
        self.unfit.push(Unfit {
            source: source.clone(),
            user: user.cloned(),
            what: what.to_owned(),
            reason,
        });
    }
}

/// The keys that hold at the time `now`, of all sources.
pub fn gather(spec: &Spec, injected: &Injected, rules: &KeyRules, now: Timestamp) -> Grants {
    let mut grants = Grants::default();
    let mut taken = BTreeSet::new();
    let source = KeySource::Spec {
        generation: spec.generation.get(),
    };
    for key in &spec.authorized_keys {
        if key.expires.is_some_and(|end| end <= now) {
            continue;
        }
        match rules.check_size(&key.key) {
            Ok(()) => grants.add(&mut taken, &source, key.clone()),
            Err(reason) => {
                let fingerprint = key.key.fingerprint();
                grants.leave_out(&source, Some(&key.user), &fingerprint, reason);
            }
        }
    }
    for (name, content) in &injected.credentials {
        let source = KeySource::Credential(name.clone());
        match (credential_user(name), content) {
            (Ok(user), Ok(content)) => {
                let lines = content.lines();
                add_lines(&mut grants, &mut taken, &source, &user, lines, rules);
            }
            (Err(reason), _) => grants.leave_out(&source, None, name, reason),
            (Ok(user), Err(reason)) => grants.leave_out(&source, Some(&user), name, reason.clone()),
        }
    }
    match &injected.cloud_init {
        Some((user, Ok(keys))) => {
            let lines = keys.iter().map(String::as_str);
            add_lines(&mut grants, &mut taken, &KeySource::CloudInit, user, lines, rules);
        }
        Some((user, Err(reason))) => {
            let what = "v1.public_ssh_keys";
            grants.leave_out(&KeySource::CloudInit, Some(user), what, reason.clone());
        }
        None => {}
    }
    grants
}

/// Whether a credential of this name holds keys.
pub fn is_key_credential(name: &str) -> bool {
    name == ROOT_CREDENTIAL || name.starts_with(USER_CREDENTIAL)
}

fn credential_user(name: &str) -> Result<UserName, String> {
    match name.strip_prefix(USER_CREDENTIAL) {
        Some(user) => user.parse(),
        None if name == ROOT_CREDENTIAL => "root".parse(),
        None => Err(format!("{name:?} is no credential with keys")),
    }
}

/// Takes over lines as a file of keys has them: blank ones and comments mean nothing.
fn add_lines<'a>(
    grants: &mut Grants,
    taken: &mut BTreeSet<(UserName, String)>,
    source: &KeySource,
    user: &UserName,
    lines: impl Iterator<Item = &'a str>,
    rules: &KeyRules,
) {
    let lines = lines.map(str::trim).enumerate();
    for (at, line) in lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
        let read: KeyLine = match line.parse() {
            Ok(read) => read,
            Err(reason) => {
                grants.leave_out(source, Some(user), &format!("line {}", at + 1), reason);
                continue;
            }
        };
        let fingerprint = read.key.fingerprint();
        let fit = match &rules.revoked {
            Err(reason) => Err(format!("what was revoked here is not known: {reason}")),
            Ok(revoked) if revoked.contains(&fingerprint) => {
                Err("it was revoked on this instance (`portcullis keys revoke`)".to_owned())
            }
            Ok(_) => rules.check_size(&read.key),
        };
        let key = AuthorizedKey {
            user: user.clone(),
            options: read.options,
            key: read.key,
            expires: None,
        };
        match fit {
            Ok(()) => grants.add(taken, source, key),
            Err(reason) => grants.leave_out(source, Some(user), &fingerprint, reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFkKc52EQpKAMBtUiDp/N8hykSeuzBRx5gN48WTPDhWS a";
    const B: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ b";
    const RSA_2048: &str = include_str!("../../tests/keys/rsa-2048.pub");

    fn spec(keys: &str) -> Spec {
        let json =
            format!(r#"{{"version":1,"generation":7,"instance":{{"id":"i"}},"authorized_keys":[{keys}]}}"#);
        Spec::from_json(json.as_bytes()).unwrap()
    }

    fn rules() -> KeyRules {
        KeyRules {
            least_rsa_bits: 3072,
            revoked: Ok(BTreeSet::new()),
        }
    }

    fn now() -> Timestamp {
        "2026-06-01T00:00:00Z".parse().unwrap()
    }

    fn gathered(keys: &str, injected: &Injected) -> Grants {
        gather(&spec(keys), injected, &rules(), now())
    }

    fn told(grants: &Grants) -> Vec<String> {
        let held = grants.held.iter();
        held.map(|g| format!("{} {} {}", g.key.user, g.key.key.comment(), g.source))
            .collect()
    }

    fn credentials(list: &[(&str, &str)]) -> Injected {
        let list = list.iter();
        Injected {
            credentials: list
                .map(|(name, text)| ((*name).to_owned(), Ok((*text).to_owned())))
                .collect(),
            cloud_init: None,
        }
    }

    #[test]
    fn each_key_knows_its_source_and_the_spec_goes_first() {
        let mut injected = credentials(&[
            (
                "ssh.authorized_keys.root",
                &format!("# root's\n\n{A}\nrestrict {B}\n"),
            ),
            ("portcullis.authorized_keys.al", &format!("{A}\n{B}\n")),
        ]);
        injected.cloud_init = Some(("al".parse().unwrap(), Ok(vec![A.to_owned(), B.to_owned()])));
        let keys = format!(r#"{{"user":"al","key":"no-pty {A}","expires":"2027-01-01T00:00:00Z"}}"#);
        let grants = gathered(&keys, &injected);
        assert_eq!(
            told(&grants),
            [
                "al a spec 7",
                "root a credential ssh.authorized_keys.root",
                "root b credential ssh.authorized_keys.root",
                "al b credential portcullis.authorized_keys.al",
            ]
        );
        assert_eq!(grants.unfit, []);
        // With the options and the end of the source that holds.
        assert_eq!(grants.held[0].key.options.as_str(), "no-pty");
        assert!(grants.held[0].key.expires.is_some());
        assert_eq!(grants.held[2].key.options.as_str(), "restrict");
        assert_eq!(grants.users().len(), 2);
        assert_eq!(grants.by_user()[&"al".parse().unwrap()].len(), 2);
        assert_eq!(grants.by_user()[&"root".parse().unwrap()].len(), 2);
    }

    #[test]
    fn what_ended_is_gone_and_another_source_may_hold_it_then() {
        let keys = format!(r#"{{"user":"al","key":"{A}","expires":"2026-06-01T00:00:00Z"}}"#);
        assert_eq!(gathered(&keys, &Injected::default()), Grants::default());
        let injected = credentials(&[("portcullis.authorized_keys.al", A)]);
        assert_eq!(
            told(&gathered(&keys, &injected)),
            ["al a credential portcullis.authorized_keys.al"]
        );
    }

    #[test]
    fn what_is_unfit_is_left_out_with_its_reason() {
        let rsa = RSA_2048.trim();
        let mut injected = credentials(&[
            (
                "portcullis.authorized_keys.al",
                &format!("nonsense\n{B}\ncommand=\"sh\" {A}\n{rsa}"),
            ),
            ("portcullis.authorized_keys.../x", A),
        ]);
        injected
            .credentials
            .push(("ssh.authorized_keys.root".into(), Err("no".into())));
        injected.cloud_init = Some(("bo".parse().unwrap(), Err("not JSON".into())));
        let grants = gathered(&format!(r#"{{"user":"al","key":"{rsa}"}}"#), &injected);
        assert_eq!(told(&grants), ["al b credential portcullis.authorized_keys.al"]);
        let reasons: Vec<String> = grants
            .unfit
            .iter()
            .map(|unfit| format!("{}: {}: {}", unfit.source, unfit.what, unfit.reason))
            .collect();
        let expected = [
            "spec 7: SHA256:",
            "an RSA key of 2048 bits is too small: at least 3072 (keys.min_rsa_bits)",
            "credential portcullis.authorized_keys.al: line 1: not an OpenSSH public key",
            "line 3: option \"command\"",
            "credential portcullis.authorized_keys.../x",
            "is not a login name",
            "credential ssh.authorized_keys.root: ssh.authorized_keys.root: no",
            "cloud-init: v1.public_ssh_keys: not JSON",
        ];
        for expected in expected {
            assert!(
                reasons.iter().any(|reason| reason.contains(expected)),
                "{expected}: {reasons:#?}"
            );
        }
        assert_eq!(reasons.len(), 7, "{reasons:#?}");
    }

    #[test]
    fn what_was_revoked_here_comes_back_by_the_spec_alone() {
        let injected = credentials(&[("portcullis.authorized_keys.al", A)]);
        let mut rules = rules();
        let fingerprint = A.parse::<KeyLine>().unwrap().key.fingerprint();
        rules.revoked = Ok([fingerprint].into());
        let grants = gather(&spec(""), &injected, &rules, now());
        assert_eq!(grants.held, []);
        assert!(grants.unfit[0].reason.contains("revoked"), "{grants:?}");
        let named = spec(&format!(r#"{{"user":"al","key":"{A}"}}"#));
        assert_eq!(told(&gather(&named, &injected, &rules, now())), ["al a spec 7"]);
        // While nobody knows what was revoked, it may be any.
        rules.revoked = Err("damaged".into());
        let grants = gather(&spec(""), &injected, &rules, now());
        assert_eq!(grants.held, []);
        assert!(grants.unfit[0].reason.contains("damaged"), "{grants:?}");
    }

    #[test]
    fn credentials_that_hold_keys_are_known_by_name() {
        for (name, expected) in [
            ("ssh.authorized_keys.root", true),
            ("portcullis.authorized_keys.al", true),
            ("ssh.authorized_keys.al", false),
            ("passwd.hashed-password.root", false),
        ] {
            assert_eq!(is_key_credential(name), expected, "{name}");
        }
    }
}
