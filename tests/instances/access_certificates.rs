//! Which client certificates get in over the HTTPS API: authority, dates, lifetime, external id, role.
//!
//! May not live here: what a role may do (`access`), TLS itself (`endpoint`).

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use portcullis_protocol::Secret;
use portcullis_protocol::access::{Role, external_id_urn};
use portcullis_provision::ca::{Ca, ClientCertificate, ClientName, DEFAULT_LIFETIME, certificate_path};
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose, SanType};

use crate::access::{Connection, REFUSED, ask, entries, is_refused, list};
use crate::api::rule;
use crate::endpoint::{curl, files, with_certificate};
use crate::host_keys::portcullisctl;
use crate::lab::{Lab, Machine, Run, SOON, eventually};

const HOUR: Duration = Duration::from_secs(3600);

/// A client's certificate as the library would not issue it: from and until when, with which URIs.
fn odd(lab: &Lab, from: SystemTime, until: SystemTime, uris: &[String]) -> ClientCertificate {
    let folder = lab.provider.state_dir().join("ca");
    let authority = std::fs::read_to_string(certificate_path(&folder)).unwrap();
    let key = std::fs::read_to_string(folder.join("ca.key")).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&authority, KeyPair::from_pem(&key).unwrap()).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "odd");
    params.not_before = from.into();
    params.not_after = until.into();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let uris = uris
        .iter()
        .map(|uri| SanType::URI(uri.as_str().try_into().unwrap()));
    params.subject_alt_names = uris.collect();
    let key = KeyPair::generate().unwrap();
    ClientCertificate {
        certificate_pem: params.signed_by(&key, &issuer).unwrap().pem(),
        key_pem: key.serialize_pem(),
    }
}

/// The URI of the instance's own external id.
fn own_id(machine: &Machine) -> String {
    let control_plane = machine.spec.control_plane.as_ref().unwrap();
    external_id_urn(control_plane.external_id.as_ref().unwrap().expose())
}

#[test]
fn only_a_short_certificate_of_now_for_this_instance_with_one_role_gets_in() {
    let lab = Lab::new();
    let machine = lab.launch();
    let beside = lab.provider.network().path();
    let (now, minutes) = (SystemTime::now(), Duration::from_secs(300));
    let (id, operator) = (own_id(&machine), Role::Operator.urn());
    let right = [operator.clone(), id.clone()];
    let shown = |name: &str, certificate: &ClientCertificate| {
        let files = files(&lab, name, certificate);
        curl(&beside, &machine, "/v1/health", &with_certificate(&files))
    };
    // The same maker, so what is refused below is refused for what differs.
    let good = odd(&lab, now - minutes, now + HOUR, &right);
    assert_eq!(shown("good", &good).unwrap().status, 200);
    let day = odd(&lab, now - minutes, now - minutes + 24 * HOUR, &right);
    assert_eq!(shown("day", &day).unwrap().status, 200);

    let other = external_id_urn("another-team");
    for (name, until, uris, words) in [
        (
            "long",
            now + 24 * HOUR,
            right.to_vec(),
            "this instance lets in at most 86400 s",
        ),
        (
            "other-id",
            now + HOUR,
            vec![operator.clone(), other],
            "does not name this instance's external id",
        ),
        (
            "no-id",
            now + HOUR,
            vec![operator.clone()],
            "does not name this instance's external id",
        ),
        ("no-role", now + HOUR, vec![id.clone()], "names no role"),
        (
            "two-roles",
            now + HOUR,
            vec![operator.clone(), id.clone(), Role::Observer.urn()],
            "more than one role",
        ),
        (
            "root",
            now + HOUR,
            vec![id.clone(), "urn:portcullis:role:root".to_owned()],
            "\"root\" is no role",
        ),
    ] {
        let answer = shown(name, &odd(&lab, now - minutes, until, &uris)).unwrap();
        is_refused(&answer, words);
        // Nothing about whose instance it is, or which id would have been right.
        assert!(!answer.body.contains(&id) && !answer.body.contains(machine.instance.id()));
    }

    let stranger = Ca::open_or_init(&lab.path("other-ca")).unwrap();
    let control_plane = machine.spec.control_plane.as_ref().unwrap();
    let stolen = stranger.issue_for(&ClientName {
        name: "control-plane".into(),
        role: Role::Operator,
        external_ids: vec![Secret::clone(control_plane.external_id.as_ref().unwrap())],
        lifetime: DEFAULT_LIFETIME,
    });
    for (name, certificate, alert) in [
        // Of an authority by the same name: its signature is what does not fit.
        ("stranger", stolen.unwrap(), "decrypt error"),
        ("expired", odd(&lab, now - HOUR, now - minutes, &right), "expired"),
        // TLS has no word of its own for it (RFC 8446 section 6).
        ("early", odd(&lab, now + HOUR, now + 2 * HOUR, &right), "alert"),
    ] {
        let failed = shown(name, &certificate).unwrap_err();
        assert!(failed.stderr.contains(alert), "{name}: {failed:?}");
    }
    let access = eventually(SOON, "all are counted", || {
        let access = list(&machine);
        let counts = |reason: &str| access.refused.get(reason).copied().unwrap_or(0);
        let expected = [
            ("lifetime", 1),
            ("external-id", 2),
            ("role", 3),
            ("authority", 1),
            ("expired", 1),
            ("not-yet-valid", 1),
        ];
        match expected.iter().all(|(reason, count)| counts(reason) == *count) {
            true => Ok(access),
            false => Err(format!("{access:?}")),
        }
    });
    let reasons: Vec<String> = entries(&machine, REFUSED)
        .iter()
        .map(|entry| entry["REASON"].as_str().unwrap().to_owned())
        .collect();
    for reason in access.refused.keys() {
        assert!(reasons.contains(reason), "{reason}: {reasons:?}");
    }
    assert_eq!(shown("good-still", &good).unwrap().status, 200);
}

/// It was issued for a time, so there is nothing to take back.
#[test]
fn a_certificate_that_ends_is_refused_over_its_open_connection() {
    let lab = Lab::new();
    let machine = lab.launch();
    let uris = [Role::Operator.urn(), own_id(&machine)];
    let now = SystemTime::now();
    let short = odd(&lab, now - HOUR, now + Duration::from_secs(20), &uris);
    let mut open = Connection::open(&lab, &machine, &files(&lab, "short", &short));
    assert_eq!(open.status("GET /v1/health"), 200);
    eventually(4 * SOON, "the end", || match open.status("GET /v1/health") {
        403 => Ok(()),
        other => Err(other),
    });
    open.hangs_up();
    assert!(list(&machine).refused.contains_key("expired"));
}

#[test]
fn portcullisctl_issues_what_an_instance_lets_in() {
    let lab = Lab::new();
    let machine = lab.launch();
    let beside = lab.provider.network().path();
    let issue = |name: &str, more: &[&str]| {
        let out = lab.path(name);
        let arguments = ["ca", "client", "--name", name, "--out", out.to_str().unwrap()];
        portcullisctl(&lab, &[&arguments[..], more].concat()).succeed();
        [out.with_extension("pem"), out.with_extension("key")]
    };
    let health = |certificate: &[PathBuf; 2]| {
        curl(&beside, &machine, "/v1/health", &with_certificate(certificate)).unwrap()
    };
    let observer = issue("grafana", &["--role", "observer", "--lifetime", "10m"]);
    assert_eq!(health(&observer).status, 200);
    let rules = "/v1/firewall/rules";
    let refused = ask(&lab, &machine, &observer, "POST", rules, &rule("web", 9000));
    is_refused(&refused, "the role observer lacks the permission firewall.write");
    let operator = issue("plane", &[]);
    let done = ask(&lab, &machine, &operator, "POST", rules, &rule("web", 9000));
    assert_eq!(done.status, 200, "{done:?}");
    let other = issue("other", &["--external-id", "another-team"]);
    is_refused(&health(&other), "external id");
    let long = issue("long", &["--lifetime", "24h"]);
    is_refused(&health(&long), "at most 86400 s");
    let used = |role: Role| {
        let roles = list(&machine).roles;
        let found = roles.into_iter().find(|listed| listed.role == role).unwrap();
        found.last_use.unwrap().subject
    };
    assert_eq!(
        [used(Role::Observer), used(Role::Operator)],
        ["CN=grafana", "CN=plane"]
    );
    let wrong = portcullisctl(&lab, &["ca", "client", "--role", "root"]).output_text();
    assert_eq!(wrong.code, Some(2), "{wrong:?}");
    assert!(
        wrong.stderr.contains("observer, network, keys, operator"),
        "{wrong:?}"
    );
}
