//! Unit and property tests of the judgement.

use proptest::prelude::*;

use super::*;

const NOW: i64 = 1_790_000_000;

fn certificate(uris: &[&str]) -> Certificate {
    Certificate {
        subject: "CN=x".into(),
        serial: "01".into(),
        uris: uris.iter().map(|uri| (*uri).to_owned()).collect(),
        not_before: NOW - 300,
        not_after: NOW + 3600,
    }
}

fn spec(rest: &str) -> Spec {
    let json = format!(r#"{{"version":1,"generation":1,"instance":{{"id":"i-1"}}{rest}}}"#);
    Spec::from_json(json.as_bytes()).unwrap()
}

fn request(json: &str) -> Request {
    serde_json::from_str(json).unwrap()
}

fn apply(spec: &Spec) -> Request {
    Request::Apply {
        spec: Box::new(spec.clone()),
        confirm_s: None,
        force: false,
    }
}

fn permissions(request: &Request, accepted: Option<&Spec>) -> String {
    match need(request, accepted) {
        Need::Nothing => "nothing".to_owned(),
        Need::Local => "local".to_owned(),
        Need::Permissions(needed) => names(&needed.into_iter().collect::<Vec<_>>()),
    }
}

#[test]
fn each_request_needs_what_it_changes() {
    for (json, expected) in [
        (r#"{"request":"status"}"#, "health.read"),
        (r#"{"request":"spec"}"#, "spec.read"),
        (r#"{"request":"confirm","generation":2}"#, "confirm"),
        (
            r#"{"request":"add-rule","rule":{"id":"a","from_port":1}}"#,
            "firewall.write",
        ),
        (r#"{"request":"revoke-rule","id":"a"}"#, "firewall.write"),
        (
            r#"{"request":"revoke-key","fingerprint":"SHA256:x"}"#,
            "keys.write",
        ),
        (
            r#"{"request":"add-peer","peer":{"instance":"i-2","addresses":["192.0.2.1"]}}"#,
            "peers.write",
        ),
        (r#"{"request":"revoke-peer","instance":"i-2"}"#, "peers.write"),
        (r#"{"request":"denied","top":1}"#, "local"),
        (r#"{"request":"trust-host-keys"}"#, "local"),
        (r#"{"request":"access"}"#, "local"),
        (r#"{"request":"revoke-access","role":null}"#, "local"),
        (r#"{"request":"restore-access","role":"keys"}"#, "local"),
        (r#"{"request":"handshake-refused","reason":"expired"}"#, "nothing"),
    ] {
        assert_eq!(permissions(&request(json), None), expected, "{json}");
        // A condition around it changes nothing, and hides nothing.
        let around = format!(r#"{{"request":"if-generation","generation":1,"change":{json}}}"#);
        assert_eq!(permissions(&request(&around), None), expected, "{around}");
    }
}

#[test]
fn a_spec_needs_the_permission_of_each_part_that_it_changes() {
    let old = spec("");
    let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ3ZyuMBOrZyTpPUe9K8KOI5qLQ4vP5vKmDQSfmOOzE1";
    let rules = r#","firewall":{"ingress":[{"id":"a","protocol":"tcp","from_port":1,"to_port":1}]}"#;
    let keys = format!(r#","authorized_keys":[{{"user":"u","key":"{key}"}}]"#);
    for (rest, expected) in [
        (String::new(), "spec.write"),
        (
            r#","control_plane":{"sources":["192.0.2.0/24"]}"#.to_owned(),
            "spec.write",
        ),
        (rules.to_owned(), "spec.write, firewall.write"),
        (r#","cluster":{"id":"c"}"#.to_owned(), "spec.write, peers.write"),
        (keys.clone(), "spec.write, keys.write"),
        (format!("{rules}{keys}"), "spec.write, firewall.write, keys.write"),
    ] {
        let new = spec(&rest);
        assert_eq!(permissions(&apply(&new), Some(&old)), expected, "{rest}");
        // Taking it away is a change as well.
        assert_eq!(permissions(&apply(&old), Some(&new)), expected, "{rest}");
        assert_eq!(permissions(&apply(&new), None), expected, "{rest}");
        assert_eq!(permissions(&apply(&new), Some(&new)), "spec.write", "{rest}");
    }
}

#[test]
fn one_role_and_the_specs_external_id_are_needed() {
    let policy = Policy::default();
    let (team, other) = (
        "urn:portcullis:external-id:team%201",
        "urn:portcullis:external-id:team2",
    );
    let id = Secret::new("team 1");
    let judge = |uris: &[&str], id: Option<&Secret>| policy.role(&certificate(uris), id, NOW);
    let role = Role::Network.urn();
    let role = role.as_str();
    assert_eq!(judge(&[role, team], Some(&id)), Ok(Role::Network));
    assert_eq!(judge(&[other, role, team], Some(&id)), Ok(Role::Network));
    assert_eq!(judge(&[role], None), Ok(Role::Network));
    for (uris, denial) in [
        (&[role][..], Denial::ExternalId),
        (&[role, other], Denial::ExternalId),
        (&[role, "urn:portcullis:external-id:"], Denial::ExternalId),
        (&[role, "urn:portcullis:external-id:team 1"], Denial::ExternalId),
        (&[team], Denial::NoRole),
        (&[team, role, role], Denial::SeveralRoles),
        (
            &[team, role, "urn:portcullis:role:operator"],
            Denial::SeveralRoles,
        ),
    ] {
        assert_eq!(judge(uris, Some(&id)), Err(denial), "{uris:?}");
    }
    for name in ["", "root", "Operator", "operator ", "operator\n"] {
        let denial = judge(&[&format!("{ROLE_URN}{name}")], None).unwrap_err();
        assert_eq!(denial.reason(), "role", "{name:?}");
        assert!(!denial.to_string().contains('\n'), "{denial}");
    }
    assert_eq!(judge(&[], None), Err(Denial::NoRole));
}

#[test]
fn dates_count_to_the_second() {
    let policy = Policy::default();
    let role = Role::Observer.urn();
    let at = |not_before: i64, not_after: i64| {
        let dates = Certificate {
            not_before,
            not_after,
            ..certificate(&[&role])
        };
        policy.role(&dates, None, NOW)
    };
    assert_eq!(at(NOW, NOW), Ok(Role::Observer));
    assert_eq!(at(NOW + 1, NOW + 2), Err(Denial::NotYetValid));
    assert_eq!(at(NOW - 2, NOW - 1), Err(Denial::Expired));
    assert_eq!(at(NOW + 1, NOW - 1), Err(Denial::Expired));
    assert_eq!(at(NOW - 1, NOW - 1 + 86_400), Ok(Role::Observer));
    let denial = at(NOW - 1, NOW + 86_400).unwrap_err();
    assert_eq!(denial.reason(), "lifetime");
    // Whoever is refused learns what would be let in.
    assert!(denial.to_string().contains("at most 86400 s"), "{denial}");
    assert_eq!(at(i64::MIN, i64::MAX).unwrap_err().reason(), "lifetime");
}

#[test]
fn an_owner_takes_away_and_gives_nothing() {
    let mut policy = Policy::default();
    let few = || [Permission::HealthRead].into();
    policy.narrow(Role::Network, few()).unwrap();
    let need = Need::Permissions([Permission::FirewallWrite].into());
    let denial = policy.permit(Role::Network, &need).unwrap_err();
    assert_eq!(
        denial.to_string(),
        "the role network lacks the permission firewall.write on this instance"
    );
    assert_eq!(policy.permit(Role::Operator, &need), Ok(()));
    let more = [Permission::HealthRead, Permission::KeysWrite].into();
    let error = policy.narrow(Role::Network, more).unwrap_err();
    assert!(error.contains("\"keys.write\""), "{error}");
    let all = Role::Network.permissions().iter().copied().collect();
    policy.narrow(Role::Network, all).unwrap();
    assert_eq!(policy, Policy::default());
    assert_eq!(policy.permit(Role::Operator, &Need::Local), Err(Denial::Local));
}

fn any_role() -> impl Strategy<Value = Role> {
    proptest::sample::select(Role::ALL.to_vec())
}

fn any_permissions() -> impl Strategy<Value = BTreeSet<Permission>> {
    proptest::collection::btree_set(proptest::sample::select(Permission::ALL.to_vec()), 0..8)
}

fn any_uri() -> impl Strategy<Value = String> {
    prop_oneof![
        any_role().prop_map(Role::urn),
        "[a-z]{0,8}".prop_map(|name| format!("{ROLE_URN}{name}")),
        "[ab]{1,2}".prop_map(|id| external_id_urn(&id)),
        ".{0,20}",
    ]
}

proptest! {
    /// Whoever is let in has a certificate of now, short enough, for this instance, with one role.
    #[test]
    fn nobody_is_let_in_by_half(
        uris in proptest::collection::vec(any_uri(), 0..5),
        not_before in NOW - 200_000..NOW + 1000,
        lifetime in -10i64..200_000,
        id in proptest::option::of("[ab]{1,2}"),
    ) {
        let policy = Policy::default();
        let not_after = not_before + lifetime;
        let certificate = Certificate { uris, not_before, not_after, ..certificate(&[]) };
        let id = id.map(Secret::new);
        let roles: Vec<&str> = certificate
            .uris
            .iter()
            .filter_map(|uri| uri.strip_prefix("urn:portcullis:role:"))
            .collect();
        let named = id.as_ref().is_none_or(|id| {
            certificate.uris.contains(&format!("urn:portcullis:external-id:{}", id.expose()))
        });
        let expected = match roles.as_slice() {
            [one] => Role::ALL.into_iter().find(|role| role.as_str() == *one),
            _ => None,
        };
        let expected = expected.filter(|_| {
            named && not_before <= NOW && NOW <= not_after && lifetime <= 86_400
        });
        prop_assert_eq!(policy.role(&certificate, id.as_ref(), NOW).ok(), expected);
    }

    /// No settings let a role do more than it may by itself, nor more than they say.
    #[test]
    fn settings_only_take_away(role in any_role(), left in any_permissions(), needed in any_permissions()) {
        let mut policy = Policy::default();
        let narrowed = policy.narrow(role, left.clone()).is_ok();
        let own: BTreeSet<Permission> = role.permissions().iter().copied().collect();
        prop_assert_eq!(narrowed, left.is_subset(&own));
        let allowed = if narrowed { left } else { own };
        let permitted = policy.permit(role, &Need::Permissions(needed.clone())).is_ok();
        prop_assert_eq!(permitted, needed.is_subset(&allowed));
    }
}
