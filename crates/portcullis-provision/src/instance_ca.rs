//! The authority of the instances: it certifies the TLS keys that they made themselves, for a short while.
//!
//! Never the one of the control plane's client certificates: what it certifies is a client too (reports,
//! renewals), and every instance would be able to steer the others.
//! May not live here: who may have a certificate (`enrol`).

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use portcullis_protocol::enrolment::{instance_uri, serial};
use portcullis_protocol::identity::to_hex;
use rcgen::{
    BasicConstraints, CertificateSigningRequestParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};
use rustls::RootCertStore;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::ParsedCertificate;
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::ca::{CA_LIFETIME, params, signing, write_private};
use crate::{Error, Result};

/// An authority that certifies instances: an ECDSA P-256 key in a folder.
pub struct InstanceCa {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A signing request whose signature was checked.
pub struct SigningRequest {
    public_key: rcgen::PublicKey,
}

impl SigningRequest {
    /// Reads one and checks that it is signed by the key that is in it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_pem(pem: &str) -> Result<Self> {
        let request = CertificateSigningRequestParams::from_pem(pem)
            .map_err(|e| Error::BadInput(format!("csr: {e}")))?;
        // What it asks for besides is the issuer's to say.
        let public_key = request.public_key;
        Ok(Self { public_key })
    }

    /// SHA-256 of the key's SubjectPublicKeyInfo, hex: what is pinned.
    pub fn spki_sha256(&self) -> String {
        to_hex(&Sha256::digest(self.public_key.subject_public_key_info()))
    }
}

impl InstanceCa {
    /// Opens the authority in `folder`, or makes one there (mode 0700).
    ///
    /// # Errors
    /// When the folder can't be written, or holds an authority that can't be read.
    pub fn open_or_init(folder: &Path) -> Result<Self> {
        let (key_path, certificate_path) = (folder.join("instance-ca.key"), certificate_path(folder));
        if key_path.exists() {
            return Self::open(folder, &key_path, &certificate_path);
        }
        fs::create_dir_all(folder).map_err(Error::file("make", folder))?;
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
            .map_err(Error::file("set the mode of", folder))?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(signing)?;
        let mut params = params("portcullis instance CA", CA_LIFETIME)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate_pem = params.self_signed(&key).map_err(signing)?.pem();
        // The key comes last: its presence means that the authority is whole.
        write_private(&certificate_path, &certificate_pem)?;
        write_private(&key_path, &key.serialize_pem())?;
        Ok(Self {
            certificate_pem,
            issuer: Issuer::new(params, key),
        })
    }

    fn open(folder: &Path, key_path: &Path, certificate_path: &Path) -> Result<Self> {
        let read = |path: &Path| fs::read_to_string(path).map_err(Error::file("read", path));
        let broken = |e: rcgen::Error| Error::Failed(format!("{}: {e}", folder.display()));
        let certificate_pem = read(certificate_path)?;
        let key = KeyPair::from_pem(&read(key_path)?).map_err(broken)?;
        let issuer = Issuer::from_ca_cert_pem(&certificate_pem, key).map_err(broken)?;
        Ok(Self {
            certificate_pem,
            issuer,
        })
    }

    /// The certificate by which clients know the instances, PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// A certificate for an instance's key, and the authority's after it, PEM. Its serial number is made of the
    /// request's nonce.
    ///
    /// # Errors
    /// When the nonce is none, or the lifetime too long.
    pub fn issue(
        &self,
        instance: &str,
        nonce: &str,
        request: &SigningRequest,
        lifetime: Duration,
    ) -> Result<String> {
        let no_nonce = || Error::BadInput("nonce: 64 hex digits are expected".into());
        // 64 characters at most (RFC 5280, ub-common-name); the whole id is among the alternative names.
        let common_name: String = instance.chars().take(64).collect();
        let mut params = params(&common_name, lifetime)?;
        params.serial_number = Some(SerialNumber::from_slice(&serial(nonce).ok_or_else(no_nonce)?));
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let uri = instance_uri(instance).try_into().map_err(signing)?;
        params.subject_alt_names.push(SanType::URI(uri));
        // So that curl and browsers know it as well, where an id can be a name of a host.
        if is_host_name(instance) {
            let name = instance.try_into().map_err(signing)?;
            params.subject_alt_names.push(SanType::DnsName(name));
        }
        let certificate = params
            .signed_by(&request.public_key, &self.issuer)
            .map_err(signing)?;
        Ok(certificate.pem() + &self.certificate_pem)
    }
}

/// Where the authority's certificate lies within its folder.
pub fn certificate_path(folder: &Path) -> PathBuf {
    folder.join("instance-ca.pem")
}

/// Whether a chain was issued by the authority for this instance, and holds now.
///
/// # Errors
/// What does not fit.
pub fn verify(
    authority_pem: &str,
    instance: &str,
    end_entity: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
) -> std::result::Result<(), String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(authority_pem.as_bytes()) {
        let certificate = certificate.map_err(|e| format!("the authority: {e:?}"))?;
        roots
            .add(certificate)
            .map_err(|e| format!("the authority: {e}"))?;
    }
    let parsed = ParsedCertificate::try_from(end_entity).map_err(|e| e.to_string())?;
    let algorithms = rustls::crypto::ring::default_provider()
        .signature_verification_algorithms
        .all;
    verify_server_cert_signed_by_trust_anchor(&parsed, &roots, intermediates, now, algorithms)
        .map_err(|e| e.to_string())?;
    let wanted = instance_uri(instance);
    if uris(end_entity)?.contains(&wanted) {
        Ok(())
    } else {
        Err(format!("the certificate is not for instance {instance:?}"))
    }
}

/// The URIs among a certificate's alternative names.
fn uris(certificate: &CertificateDer<'_>) -> std::result::Result<Vec<String>, String> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|e| e.to_string())?;
    let names = parsed.subject_alternative_name().map_err(|e| e.to_string())?;
    let names = names.iter().flat_map(|names| &names.value.general_names);
    Ok(names
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        })
        .collect())
}

/// The key's SHA-256 of a certificate.
pub(crate) fn spki_sha256(certificate: &CertificateDer<'_>) -> std::result::Result<String, String> {
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|e| e.to_string())?;
    Ok(to_hex(&Sha256::digest(parsed.public_key().raw)))
}

/// Now, as rustls takes it.
pub(crate) fn now() -> UnixTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    UnixTime::since_unix_epoch(since.unwrap_or_default())
}

fn is_host_name(text: &str) -> bool {
    let is_label = |label: &str| {
        let is_plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        (1..=63).contains(&label.len())
            && label.bytes().all(is_plain)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= 253 && text.split('.').all(is_label)
}
