//! The certificate that the instances' authority gave for our key: what makes it ours, and how long it holds.
//!
//! May not live here: asking for it (`agent::enrol`), files.

use portcullis_protocol::enrolment::{BEGINS_BEFORE, instance_uri, serial};
use portcullis_protocol::identity::to_hex;
use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::ParsedCertificate;
use serde::{Deserialize, Serialize};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

/// Most certificates of a chain.
const MAX_CHAIN: usize = 4;

/// A certificate for our key, and those above it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certified {
    /// Whose it is.
    pub instance: String,
    /// Ours first, the authority's last.
    pub chain: Vec<CertificateDer<'static>>,
    /// The same, PEM.
    pub pem: String,
    /// When it begins, in seconds since 1970.
    pub begins: i64,
    /// When it ends, in seconds since 1970.
    pub ends: i64,
}

/// As it is kept on disk.
#[derive(Deserialize, Serialize)]
pub(super) struct Kept {
    pub(super) instance: String,
    pub(super) chain: String,
}

/// What a chain has to fit besides our key and our instance.
#[derive(Clone, Copy, Debug, Default)]
pub struct Expected<'a> {
    /// The nonce that was sent: the certificate was made for it.
    pub nonce: Option<&'a str>,
    /// The authority that the first certificate came from.
    pub authority: Option<&'a CertificateDer<'static>>,
    /// The authority of the control plane's clients, PEM. It may not be the same: what certifies an instance
    /// certifies a client, and each instance could steer the others.
    pub client_ca: Option<&'a str>,
}

impl Certified {
    /// Reads a chain and checks that it is ours. Whether it holds by the clock does not matter: that is for
    /// those who rely on it.
    ///
    /// # Errors
    /// What does not fit.
    pub fn new(pem: &str, instance: &str, spki_sha256: &str, expected: Expected<'_>) -> Result<Self, String> {
        let chain = certificates(pem)?;
        let ([leaf, .., authority], 2..=MAX_CHAIN) = (chain.as_slice(), chain.len()) else {
            return Err(format!(
                "a chain of 2 to {MAX_CHAIN} certificates is expected: the instance's first, the authority's last"
            ));
        };
        let parsed = parse(leaf)?;
        if key_of(&parsed) != spki_sha256 {
            return Err("the certificate is for another key".to_owned());
        }
        if !names(&parsed)?.contains(&instance_uri(instance)) {
            return Err(format!("the certificate is not for instance {instance:?}"));
        }
        if expected.authority.is_some_and(|known| known != authority) {
            return Err("the certificate is of another authority than the first one".to_owned());
        }
        if let Some(nonce) = expected.nonce
            && serial(nonce).is_none_or(|serial| parsed.raw_serial() != serial)
        {
            return Err("the certificate was not made for this request (a replay)".to_owned());
        }
        for client_ca in certificates(expected.client_ca.unwrap_or_default())? {
            if key_of(&parse(&client_ca)?) == key_of(&parse(authority)?) {
                let reason =
                    "the authority is the one of control_plane.client_ca: instances could steer each other";
                return Err(reason.to_owned());
            }
        }
        let validity = parsed.validity();
        let (begins, ends) = (validity.not_before.timestamp(), validity.not_after.timestamp());
        let issued = begins.saturating_add(BEGINS_BEFORE.into()).min(ends);
        is_signed(leaf, &chain[1..chain.len() - 1], authority, issued)?;
        Ok(Self {
            instance: instance.to_owned(),
            begins,
            ends,
            pem: pem.to_owned(),
            chain,
        })
    }

    /// The authority.
    pub fn authority(&self) -> Option<&CertificateDer<'static>> {
        self.chain.last()
    }

    /// When it was issued, in seconds since 1970.
    pub fn issued(&self) -> i64 {
        self.begins.saturating_add(BEGINS_BEFORE.into())
    }

    /// For how long it is used before a new one is asked for, in seconds: two thirds of its life, and 10 s
    /// at least.
    pub fn use_s(&self) -> i64 {
        (self.ends.saturating_sub(self.issued()) * 2 / 3).max(10)
    }

    /// In how many seconds a new one is asked for: now, if it is not yet valid by the clock, or no longer.
    pub fn renewal_in(&self, now: i64) -> i64 {
        let age = now.saturating_sub(self.issued());
        match (-i64::from(BEGINS_BEFORE)..self.use_s()).contains(&age) {
            true => self.use_s() - age.max(0),
            false => 0,
        }
    }
}

/// When the certificates of a PEM text begin, in seconds since 1970: earlier than that it can't be.
pub fn beginnings(pem: &str) -> Vec<i64> {
    let certificates = certificates(pem).unwrap_or_default();
    let parsed = certificates
        .iter()
        .filter_map(|certificate| parse(certificate).ok());
    parsed
        .map(|parsed| parsed.validity().not_before.timestamp())
        .collect()
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| format!("it is not PEM: {e:?}"))
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, String> {
    let parsed = X509Certificate::from_der(certificate);
    parsed
        .map(|(_, certificate)| certificate)
        .map_err(|e| format!("it is no certificate: {e}"))
}

/// Whether a certificate is for the key with that hash of its SubjectPublicKeyInfo, hex.
pub(super) fn is_of_key(certificate: &CertificateDer<'_>, spki_sha256: &str) -> bool {
    parse(certificate).is_ok_and(|parsed| key_of(&parsed) == spki_sha256)
}

fn key_of(certificate: &X509Certificate<'_>) -> String {
    let spki = certificate.public_key().raw;
    to_hex(ring::digest::digest(&ring::digest::SHA256, spki).as_ref())
}

fn names(certificate: &X509Certificate<'_>) -> Result<Vec<String>, String> {
    let names = certificate.subject_alternative_name();
    let names = names.map_err(|e| format!("its names: {e}"))?;
    let names = names.iter().flat_map(|names| &names.value.general_names);
    let uris = names.filter_map(|name| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    });
    Ok(uris.collect())
}

fn is_signed(
    leaf: &CertificateDer<'_>,
    between: &[CertificateDer<'_>],
    authority: &CertificateDer<'static>,
    at: i64,
) -> Result<(), String> {
    let mut roots = RootCertStore::empty();
    roots
        .add(authority.clone())
        .map_err(|e| format!("the authority's certificate: {e}"))?;
    let at = u64::try_from(at).map_err(|_| "the certificate is from before 1970")?;
    let at = UnixTime::since_unix_epoch(std::time::Duration::from_secs(at));
    let parsed = ParsedCertificate::try_from(leaf).map_err(|e| e.to_string())?;
    let algorithms = super::algorithms().all;
    verify_server_cert_signed_by_trust_anchor(&parsed, &roots, between, at, algorithms)
        .map_err(|e| format!("the certificate is not of the authority that comes with it: {e}"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use portcullis_provision::ca::Ca;
    use portcullis_provision::instance_ca::{InstanceCa, SigningRequest};

    use super::super::TlsIdentity;
    use super::*;

    const LIFETIME: Duration = Duration::from_secs(3000);

    fn nonce(byte: u8) -> String {
        to_hex(&[byte; 32])
    }

    fn issue(ca: &InstanceCa, identity: &TlsIdentity) -> String {
        let request = SigningRequest::from_pem(&identity.signing_request().unwrap()).unwrap();
        assert_eq!(request.spki_sha256(), identity.spki_sha256);
        ca.issue("i-1", &nonce(1), &request, LIFETIME).unwrap()
    }

    #[test]
    fn a_chain_is_ours_in_every_way_or_it_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let ca = |name: &str| InstanceCa::open_or_init(&folder.path().join(name)).unwrap();
        let (ca, rogue) = (ca("ca"), ca("rogue"));
        let (identity, other) = (
            TlsIdentity::in_memory().unwrap(),
            TlsIdentity::in_memory().unwrap(),
        );
        let pem = issue(&ca, &identity);
        let ours =
            |pem: &str, expected: Expected<'_>| Certified::new(pem, "i-1", &identity.spki_sha256, expected);
        let nonces = [nonce(1), nonce(2)];
        let asked = Expected {
            nonce: Some(&nonces[0]),
            ..Expected::default()
        };
        let certified = ours(&pem, asked).unwrap();
        let authority = certified.authority();
        ours(&pem, Expected { authority, ..asked }).unwrap();
        let refused = |result: Result<Certified, String>, word: &str| {
            let reason = result.unwrap_err();
            assert!(reason.contains(word), "{reason}");
        };
        refused(ours(&issue(&ca, &other), asked), "another key");
        refused(
            Certified::new(&pem, "i-2", &identity.spki_sha256, asked),
            "not for instance",
        );
        let replayed = Expected {
            nonce: Some(&nonces[1]),
            ..asked
        };
        refused(ours(&pem, replayed), "a replay");
        refused(
            ours(&issue(&rogue, &identity), Expected { authority, ..asked }),
            "another authority",
        );
        let client_ca = Some(ca.certificate_pem());
        refused(ours(&pem, Expected { client_ca, ..asked }), "steer each other");
        let clients = Ca::init(&folder.path().join("clients")).unwrap();
        let client_ca = Some(clients.certificate_pem());
        ours(&pem, Expected { client_ca, ..asked }).unwrap();
        // Our certificate, and an authority that did not sign it.
        let mixed = pem.replace(ca.certificate_pem(), rogue.certificate_pem());
        refused(ours(&mixed, asked), "not of the authority");
        let leaf = pem.replace(ca.certificate_pem(), "");
        for text in ["", "nonsense", &leaf, &leaf.replace("MII", "MIJ")] {
            assert!(ours(text, asked).is_err(), "{text}");
        }
    }

    #[test]
    fn it_is_renewed_after_two_thirds_and_at_once_by_a_clock_that_can_not_be() {
        let folder = tempfile::tempdir().unwrap();
        let ca = InstanceCa::open_or_init(folder.path()).unwrap();
        let identity = TlsIdentity::in_memory().unwrap();
        let pem = issue(&ca, &identity);
        let certified = Certified::new(&pem, "i-1", &identity.spki_sha256, Expected::default()).unwrap();
        let issued = certified.issued();
        assert_eq!(certified.use_s(), 2000);
        let years = 20 * 365 * 86_400;
        for (clock, wait) in [
            (0, 2000),
            (-100, 2000),
            (500, 1500),
            (2000, 0),
            (years, 0),
            (-years, 0),
        ] {
            assert_eq!(certified.renewal_in(issued + clock), wait, "{clock}");
        }
    }

    #[test]
    fn it_is_kept_and_shown_for_its_instance_alone() {
        crate::identity::install_tls_provider();
        let state = tempfile::tempdir().unwrap();
        let ca = InstanceCa::open_or_init(&state.path().join("ca")).unwrap();
        let identity = TlsIdentity::load_or_create(state.path(), None).unwrap();
        assert_eq!(identity.certificates().len(), 1);
        let pem = issue(&ca, &identity);
        let certified = Certified::new(&pem, "i-1", &identity.spki_sha256, Expected::default()).unwrap();
        identity.certify(state.path(), certified.clone()).unwrap();
        let again = TlsIdentity::load(state.path(), None).unwrap().unwrap();
        assert_eq!(again.certified("i-1"), Some(certified));
        assert_eq!(again.certified("i-2"), None);
        assert_eq!(again.certificates().len(), 2);
        // One that is damaged is not used, and what was made here is.
        std::fs::write(state.path().join("enrolled.json"), "{}").unwrap();
        let damaged = TlsIdentity::load(state.path(), None).unwrap().unwrap();
        assert_eq!(damaged.certificates().len(), 1);
        assert_eq!(damaged.spki_sha256, identity.spki_sha256);
    }
}
