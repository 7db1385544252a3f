//! Enrolment at the control plane: who gets a certificate, and who does not, whatever was sent.
//!
//! May not live here: HTTP, instances.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::LazyLock;
use std::time::Duration;

use portcullis_protocol::Secret;
use portcullis_protocol::enrolment::{ENROLMENT_VERSION, EnrolmentRequest};
use portcullis_protocol::identity::to_hex;
use portcullis_protocol::report::HostKey;
use portcullis_provision::enrol::{DEFAULT_LIFETIME, Refused, Registrar};
use portcullis_provision::instance_ca::verify;
use proptest::prelude::*;
use rcgen::{CertificateParams, KeyPair};
use ring::hmac;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, UnixTime};

const HOST_KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFkKc52EQpKAMBtUiDp/N8hykSeuzBRx5gN48WTPDhWS";
const OTHER_KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBmyqUQGxHHYKqmHp4WZVvAcW0vTDhrlWHFNqV9uYHCd";
const TOKEN: &str = "the token";

fn registrar() -> (tempfile::TempDir, Registrar) {
    let folder = tempfile::tempdir().unwrap();
    let registrar = Registrar::open_or_init(folder.path(), DEFAULT_LIFETIME).unwrap();
    registrar.expect("i-1", Secret::new(TOKEN)).unwrap();
    (folder, registrar)
}

fn sign(message: &[u8], token: &str) -> Option<String> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, token.as_bytes());
    Some(to_hex(hmac::sign(&key, message).as_ref()))
}

fn csr(key: &KeyPair) -> String {
    let request = CertificateParams::default().serialize_request(key).unwrap();
    request.pem().unwrap()
}

fn request(key: &KeyPair, instance: &str, nonce: u8, token: &str) -> EnrolmentRequest {
    let mut request = EnrolmentRequest {
        version: ENROLMENT_VERSION,
        instance: instance.into(),
        nonce: to_hex(&[nonce; 32]),
        csr: csr(key),
        host_keys: vec![HostKey::from_line(HOST_KEY).unwrap()],
        mac: None,
    };
    request.mac = sign(&request.message(), token);
    request
}

fn chain(pem: &str) -> Vec<CertificateDer<'static>> {
    let chain = CertificateDer::pem_slice_iter(pem.as_bytes());
    chain.collect::<Result<_, _>>().unwrap()
}

fn is_not_proven<T: std::fmt::Debug>(result: Result<T, Refused>) {
    assert!(matches!(result, Err(Refused::NotProven)), "{result:?}");
}

#[test]
fn a_proven_request_gets_a_bound_answer_and_the_keys_are_known() {
    let (folder, registrar) = registrar();
    let key = KeyPair::generate().unwrap();
    let request = request(&key, "i-1", 1, TOKEN);
    let answer = registrar.enrol(&request).unwrap();
    assert_eq!(answer.mac, sign(&request.answer_message(&answer.chain), TOKEN));
    let chain = chain(&answer.chain);
    let check = |instance: &str, now: UnixTime| {
        verify(registrar.certificate_pem(), instance, &chain[0], &chain[1..], now)
    };
    let now = UnixTime::now();
    check("i-1", now).unwrap();
    assert!(check("i-2", now).unwrap_err().contains("not for instance"));
    let later = Duration::from_secs(now.as_secs() + 2 * DEFAULT_LIFETIME.as_secs());
    assert!(check("i-1", UnixTime::since_unix_epoch(later)).is_err());
    let other = tempfile::tempdir().unwrap();
    let other = Registrar::open_or_init(other.path(), DEFAULT_LIFETIME).unwrap();
    assert!(verify(other.certificate_pem(), "i-1", &chain[0], &chain[1..], now).is_err());

    // The token is gone, and the folder is for its owner.
    let text = std::fs::read_to_string(folder.path().join("enrolments.json")).unwrap();
    assert!(!text.contains(TOKEN), "{text}");
    let again = Registrar::open_or_init(folder.path(), DEFAULT_LIFETIME).unwrap();
    let known = again.identity("i-1").unwrap();
    assert_eq!(known.host_keys, request.host_keys);
    assert_eq!(known, registrar.identity("i-1").unwrap());
}

#[test]
fn a_token_enrols_once() {
    let (_folder, registrar) = registrar();
    let key = KeyPair::generate().unwrap();
    let first = request(&key, "i-1", 1, TOKEN);
    let answer = registrar.enrol(&first).unwrap();
    // Whose answer was lost asks the same again, and gets the same: no second certificate.
    assert_eq!(registrar.enrol(&first).unwrap(), answer);
    // By the same key, by another one, by a thief of the token.
    is_not_proven(registrar.enrol(&request(&key, "i-1", 2, TOKEN)));
    let thief = KeyPair::generate().unwrap();
    is_not_proven(registrar.enrol(&request(&thief, "i-1", 1, TOKEN)));
    // A new token enrols anew, and ends what was there.
    registrar.expect("i-1", Secret::new("another")).unwrap();
    is_not_proven(registrar.enrol(&first));
    registrar.enrol(&request(&key, "i-1", 3, "another")).unwrap();
    registrar.forget("i-1").unwrap();
    is_not_proven(registrar.enrol(&request(&key, "i-1", 3, "another")));
}

#[test]
fn a_man_in_the_middle_who_changes_a_request_spoils_it() {
    let (_folder, registrar) = registrar();
    registrar.expect("i-2", Secret::new("another token")).unwrap();
    let (key, his) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let genuine = request(&key, "i-1", 1, TOKEN);
    let mut changed: Vec<EnrolmentRequest> = vec![genuine.clone(); 7];
    changed[0].csr = csr(&his);
    changed[1].host_keys = vec![HostKey::from_line(OTHER_KEY).unwrap()];
    changed[2].host_keys.clear();
    changed[3].instance = "i-2".into();
    changed[4].nonce = to_hex(&[9; 32]);
    changed[5].mac = None;
    changed[6].mac = sign(&genuine.message(), "");
    for request in &changed {
        is_not_proven(registrar.enrol(request));
    }
    is_not_proven(registrar.enrol(&request(&key, "i-3", 1, "")));
    let mut swapped = genuine.clone();
    swapped.host_keys[0].key = Some(OTHER_KEY.into());
    assert!(matches!(registrar.enrol(&swapped), Err(Refused::BadRequest(_))));
    // A signing request whose signature is not by the key in it, from somebody who knows the token.
    let mut forged = genuine.clone();
    let at = forged.csr.rfind("\n-----END").unwrap();
    let at = forged.csr[..at].rfind('\n').unwrap() - 3;
    let other = if &forged.csr[at..=at] == "A" { "B" } else { "A" };
    forged.csr.replace_range(at..=at, other);
    forged.mac = sign(&forged.message(), TOKEN);
    assert!(matches!(registrar.enrol(&forged), Err(Refused::BadRequest(_))));
    registrar.enrol(&genuine).unwrap();
}

#[test]
fn a_renewal_is_for_the_key_and_the_instance_that_enrolled() {
    let (_folder, registrar) = registrar();
    let (key, his) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let answer = registrar.enrol(&request(&key, "i-1", 1, TOKEN)).unwrap();
    registrar.expect("i-2", Secret::new("another")).unwrap();
    let other = registrar.enrol(&request(&his, "i-2", 1, "another")).unwrap();
    let (own, others) = (chain(&answer.chain), chain(&other.chain));
    let renewal = |key: &KeyPair, instance: &str| EnrolmentRequest {
        mac: None,
        ..request(key, instance, 7, "")
    };
    let renewed = registrar.renew(&own, &renewal(&key, "i-1")).unwrap();
    assert_eq!(renewed.mac, None);
    assert_ne!(renewed.chain, answer.chain);
    registrar
        .renew(&chain(&renewed.chain), &renewal(&key, "i-1"))
        .unwrap();
    is_not_proven(registrar.renew(&[], &renewal(&key, "i-1")));
    is_not_proven(registrar.renew(&own, &renewal(&his, "i-1")));
    is_not_proven(registrar.renew(&own, &renewal(&key, "i-2")));
    is_not_proven(registrar.renew(&others, &renewal(&his, "i-1")));
    // A certificate by an authority of his own.
    let folder = tempfile::tempdir().unwrap();
    let rogue = Registrar::open_or_init(folder.path(), DEFAULT_LIFETIME).unwrap();
    rogue.expect("i-1", Secret::new(TOKEN)).unwrap();
    let forged = rogue.enrol(&request(&key, "i-1", 1, TOKEN)).unwrap();
    is_not_proven(registrar.renew(&chain(&forged.chain), &renewal(&key, "i-1")));
    registrar.forget("i-1").unwrap();
    is_not_proven(registrar.renew(&own, &renewal(&key, "i-1")));
}

#[test]
fn a_renewal_by_a_certificate_that_ended_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let registrar = Registrar::open_or_init(folder.path(), Duration::ZERO).unwrap();
    registrar.expect("i-1", Secret::new(TOKEN)).unwrap();
    let key = KeyPair::generate().unwrap();
    let answer = registrar.enrol(&request(&key, "i-1", 1, TOKEN)).unwrap();
    let ended = chain(&answer.chain);
    // Until the second that it ended in is over.
    std::thread::sleep(Duration::from_millis(2100));
    is_not_proven(registrar.renew(&ended, &request(&key, "i-1", 2, "")));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is sent without the token: no certificate, no panic, and the token still works.
    #[test]
    fn without_the_token_there_is_nothing(
        instance in "i-[12]|[!-~]{0,8}", nonce in "[0-9a-f]{0,66}", mac in proptest::option::of("[0-9a-f]{0,66}"),
        token in "[a-z ]{0,9}",
    ) {
        let (_folder, registrar) = registrar();
        static KEY: LazyLock<KeyPair> = LazyLock::new(|| KeyPair::generate().unwrap());
        let mut sent = request(&KEY, &instance, 1, &token);
        sent.nonce = nonce;
        sent.mac = mac.or_else(|| sign(&sent.message(), &token));
        prop_assume!(token != TOKEN);
        prop_assert!(matches!(registrar.enrol(&sent), Err(Refused::NotProven)));
        prop_assert!(registrar.identity(&instance).is_none());
    }
}
