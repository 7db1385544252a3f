//! What differs between two specs, by names and fingerprints alone.
//!
//! May not live here: values of keys and secrets.

use std::collections::BTreeMap;

use portcullis_protocol::{AuthorizedKey, ControlPlane, FirewallRule, Peer, Spec};
use serde::{Deserialize, Serialize};

use super::clean;

/// How many entries of a list are named.
const NAMED: usize = 8;

/// What a change did. Each list names at most eight; a last entry says how many more there are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Changes {
    /// Ids of rules that came.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rules_added: Vec<String>,
    /// Ids of rules that went.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rules_removed: Vec<String>,
    /// Ids of rules that let in something else now.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rules_changed: Vec<String>,
    /// User and fingerprint of keys that came.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keys_added: Vec<String>,
    /// User and fingerprint of keys that went.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keys_removed: Vec<String>,
    /// User and fingerprint of keys that have other options or another end now.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keys_changed: Vec<String>,
    /// Instances that joined.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub peers_added: Vec<String>,
    /// Instances that left.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub peers_removed: Vec<String>,
    /// Instances with other addresses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub peers_changed: Vec<String>,
    /// Names of other parts of the spec that differ: never their values.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<String>,
}

impl Changes {
    /// What differs.
    pub fn between(before: Option<&Spec>, after: Option<&Spec>) -> Self {
        let mut changes = Self::default();
        let (old, new) = differing(list(before, rules), list(after, rules));
        [changes.rules_added, changes.rules_removed, changes.rules_changed] =
            compare(old, new, |rule| (rule.id.to_string(), rule));
        let (old, new) = differing(list(before, keys), list(after, keys));
        [changes.keys_added, changes.keys_removed, changes.keys_changed] = compare(old, new, |key| {
            let name = format!("{} {}", key.user, key.key.fingerprint());
            (name, (&key.options, key.expires))
        });
        let (old, new) = differing(list(before, peers), list(after, peers));
        [changes.peers_added, changes.peers_removed, changes.peers_changed] =
            compare(old, new, |peer| (peer.instance.to_string(), &peer.addresses));
        changes.others = others(before, after);
        changes
    }

    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Each list with what it is called.
    pub fn lists(&self) -> [(&'static str, &[String]); 10] {
        [
            ("rule +", &self.rules_added),
            ("rule -", &self.rules_removed),
            ("rule ~", &self.rules_changed),
            ("key +", &self.keys_added),
            ("key -", &self.keys_removed),
            ("key ~", &self.keys_changed),
            ("peer +", &self.peers_added),
            ("peer -", &self.peers_removed),
            ("peer ~", &self.peers_changed),
            ("other ~", &self.others),
        ]
    }

    pub(super) fn cleaned(self) -> Self {
        let clean = |list: Vec<String>| {
            let list = list.into_iter().take(NAMED + 1);
            list.map(|entry| clean(&entry, 130)).collect()
        };
        Self {
            rules_added: clean(self.rules_added),
            rules_removed: clean(self.rules_removed),
            rules_changed: clean(self.rules_changed),
            keys_added: clean(self.keys_added),
            keys_removed: clean(self.keys_removed),
            keys_changed: clean(self.keys_changed),
            peers_added: clean(self.peers_added),
            peers_removed: clean(self.peers_removed),
            peers_changed: clean(self.peers_changed),
            others: clean(self.others),
        }
    }
}

fn rules(spec: &Spec) -> &[FirewallRule] {
    &spec.firewall.ingress
}

fn keys(spec: &Spec) -> &[AuthorizedKey] {
    &spec.authorized_keys
}

fn peers(spec: &Spec) -> &[Peer] {
    spec.cluster.as_ref().map_or(&[], |cluster| &cluster.peers)
}

fn list<'a, T>(spec: Option<&'a Spec>, list: impl Fn(&'a Spec) -> &'a [T]) -> &'a [T] {
    spec.map_or(&[], list)
}

/// Both without what they begin and end with in common: of 100,000 peers mostly one is new.
fn differing<'a, T: PartialEq>(mut before: &'a [T], mut after: &'a [T]) -> (&'a [T], &'a [T]) {
    while let ([first, old @ ..], [other, new @ ..]) = (before, after)
        && first == other
    {
        (before, after) = (old, new);
    }
    while let ([old @ .., last], [new @ .., other]) = (before, after)
        && last == other
    {
        (before, after) = (old, new);
    }
    (before, after)
}

/// Added, removed, changed.
fn compare<'a, T, V: PartialEq>(
    before: &'a [T],
    after: &'a [T],
    named: impl Fn(&'a T) -> (String, V),
) -> [Vec<String>; 3] {
    let before: BTreeMap<String, V> = before.iter().map(&named).collect();
    let after: BTreeMap<String, V> = after.iter().map(&named).collect();
    let new = after.keys().filter(|name| !before.contains_key(*name));
    let gone = before.keys().filter(|name| !after.contains_key(*name));
    let other = after
        .iter()
        .filter(|(name, value)| before.get(*name).is_some_and(|old| old != *value));
    [bounded(new), bounded(gone), bounded(other.map(|(name, _)| name))]
}

fn bounded<'a>(names: impl Iterator<Item = &'a String>) -> Vec<String> {
    let mut names = names;
    let mut list: Vec<String> = names.by_ref().take(NAMED).cloned().collect();
    match names.count() {
        0 => {}
        more => list.push(format!("and {more} more")),
    }
    list
}

fn others(before: Option<&Spec>, after: Option<&Spec>) -> Vec<String> {
    let mut names = Vec::new();
    let mut differs = |name: &str, differs: bool| {
        if differs {
            names.push(name.to_owned());
        }
    };
    let instance = |spec: Option<&Spec>| spec.map(|spec| spec.instance.clone());
    differs("instance", instance(before) != instance(after));
    let cluster = |spec: Option<&Spec>| spec.and_then(|s| s.cluster.as_ref().map(|c| c.id.clone()));
    differs("cluster.id", cluster(before) != cluster(after));
    let egress = |spec: Option<&Spec>| spec.map(|s| s.firewall.egress.clone()).unwrap_or_default();
    differs("firewall.egress", egress(before) != egress(after));
    let control = |spec: Option<&Spec>| spec.and_then(|s| s.control_plane.clone()).unwrap_or_default();
    let ControlPlane {
        sources,
        client_ca,
        external_id,
        report_url,
        enrol_url,
        enrolment_token,
    } = control(before);
    let now = control(after);
    differs("control_plane.sources", sources != now.sources);
    differs("control_plane.client_ca", client_ca != now.client_ca);
    differs("control_plane.external_id", external_id != now.external_id);
    differs("control_plane.report_url", report_url != now.report_url);
    differs("control_plane.enrol_url", enrol_url != now.enrol_url);
    differs(
        "control_plane.enrolment_token",
        enrolment_token != now.enrolment_token,
    );
    let storage = |spec: Option<&Spec>| spec.and_then(|s| s.storage.clone()).unwrap_or_default();
    differs("storage", storage(before) != storage(after));
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl a";

    fn spec(json: serde_json::Value) -> Spec {
        let mut whole = serde_json::json!({"version": 1, "generation": 1, "instance": {"id": "i-1"}});
        for (name, value) in json.as_object().unwrap() {
            whole[name] = value.clone();
        }
        Spec::from_json(whole.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn each_part_that_differs_is_named_and_no_value_is() {
        let rule = |id: &str, port: u16| serde_json::json!({"id": id, "protocol": "tcp", "from_port": port, "to_port": port});
        let before = spec(serde_json::json!({
            "cluster": {"id": "c", "peers": [
                {"instance": "stays", "addresses": ["10.0.0.2"]}, {"instance": "moves", "addresses": ["10.0.0.3"]},
                {"instance": "leaves", "addresses": ["10.0.0.4"]}]},
            "authorized_keys": [{"user": "ubuntu", "key": FIRST}],
            "firewall": {"ingress": [rule("ssh", 22), rule("web", 80), rule("old", 81)]},
            "control_plane": {"enrolment_token": "token-before", "external_id": "id-before"},
        }));
        let after = spec(serde_json::json!({
            "cluster": {"id": "c", "peers": [
                {"instance": "stays", "addresses": ["10.0.0.2"]}, {"instance": "moves", "addresses": ["10.0.0.5"]},
                {"instance": "joins", "addresses": ["10.0.0.6"]}]},
            "authorized_keys": [{"user": "root", "key": FIRST}],
            "firewall": {"ingress": [rule("ssh", 22), rule("web", 8080), rule("new", 82)]},
            "control_plane": {"enrolment_token": "token-after", "external_id": "id-before", "sources": ["192.0.2.0/24"]},
        }));
        let changes = Changes::between(Some(&before), Some(&after));
        let fingerprint = before.authorized_keys[0].key.fingerprint();
        assert_eq!(
            changes,
            Changes {
                rules_added: vec!["new".into()],
                rules_removed: vec!["old".into()],
                rules_changed: vec!["web".into()],
                keys_added: vec![format!("root {fingerprint}")],
                keys_removed: vec![format!("ubuntu {fingerprint}")],
                keys_changed: vec![],
                peers_added: vec!["joins".into()],
                peers_removed: vec!["leaves".into()],
                peers_changed: vec!["moves".into()],
                others: vec![
                    "control_plane.sources".into(),
                    "control_plane.enrolment_token".into()
                ],
            }
        );
        assert!(Changes::between(Some(&after), Some(&after)).is_empty());
        let text = serde_json::to_string(&changes).unwrap();
        for hidden in ["token-", "id-before", "AAAAC3"] {
            assert!(!text.contains(hidden), "{text}");
        }
    }

    #[test]
    fn a_key_with_another_end_is_a_changed_one_and_lists_are_bounded() {
        let key = |expires: &str| serde_json::json!({"authorized_keys": [{"user": "ubuntu", "key": FIRST, "expires": expires}]});
        let changes = Changes::between(
            Some(&spec(key("2030-01-01T00:00:00Z"))),
            Some(&spec(key("2031-01-01T00:00:00Z"))),
        );
        assert_eq!(changes.keys_changed.len(), 1);
        let rules: Vec<_> = (0..500)
            .map(|n| serde_json::json!({"id": format!("rule-{n:03}"), "from_port": 1, "to_port": 1}))
            .collect();
        let many = spec(serde_json::json!({"firewall": {"ingress": rules}}));
        let changes = Changes::between(None, Some(&many));
        assert_eq!(changes.rules_added.len(), NAMED + 1);
        assert_eq!(changes.rules_added.last().unwrap(), "and 492 more");
        assert_eq!(changes.others, ["instance"]);
    }
}
