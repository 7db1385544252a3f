//! The control plane's certificate authority: it signs the short-lived certificates by which a
//! control plane shows an instance who it is.
//!
//! May not live here: server certificates. Instances make their own keys, which are pinned.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use portcullis_protocol::Secret;
use portcullis_protocol::access::{Role, external_id_urn};
use portcullis_protocol::enrolment::BEGINS_BEFORE;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};

use crate::{Error, Result};

/// Advice for how long a client certificate lives.
pub const DEFAULT_LIFETIME: Duration = Duration::from_secs(3600);

/// How far before now a certificate begins, for instances whose clock is behind. Instances reckon with it.
pub const CLOCK_SKEW: Duration = Duration::from_secs(BEGINS_BEFORE as u64);

/// How long an authority itself lives: ten years.
pub(crate) const CA_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);

/// Whom a client certificate is for.
#[derive(Clone, Debug)]
pub struct ClientName {
    /// Its common name, which instances show in their logs: 1 to 64 printable ASCII characters.
    pub name: String,
    /// What its holder may do.
    pub role: Role,
    /// The external ids (`control_plane.external_id`) of the instances that it is for. An instance whose spec
    /// has one refuses a certificate that does not name it.
    pub external_ids: Vec<Secret>,
    /// From now until its end. [`CLOCK_SKEW`] comes on top, and instances let in 24 h in all, unless their
    /// owners say otherwise.
    pub lifetime: Duration,
}

/// A certificate authority: an ECDSA P-256 key in a folder.
pub struct Ca {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate with its private key, both PEM. The key is a secret.
pub struct ClientCertificate {
    /// The certificate.
    pub certificate_pem: String,
    /// Its key (PKCS #8).
    pub key_pem: String,
}

impl Ca {
    /// Opens the authority in `folder`, or makes one if there is none.
    ///
    /// # Errors
    /// When the folder can't be written, or holds half an authority or an unreadable one.
    pub fn open_or_init(folder: &Path) -> Result<Self> {
        if key_path(folder).exists() {
            Self::open(folder)
        } else {
            Self::init(folder)
        }
    }

    /// Opens the authority in `folder`.
    ///
    /// # Errors
    /// When there is none or it can't be read.
    pub fn open(folder: &Path) -> Result<Self> {
        let read = |path: PathBuf| {
            fs::read_to_string(&path).map_err(|source| Error::File {
                action: "read",
                path,
                source,
            })
        };
        let key_pem = read(key_path(folder))?;
        let certificate_pem = read(certificate_path(folder))?;
        let broken = |e: rcgen::Error| Error::Failed(format!("{}: {e}", folder.display()));
        let key = KeyPair::from_pem(&key_pem).map_err(broken)?;
        let issuer = Issuer::from_ca_cert_pem(&certificate_pem, key).map_err(broken)?;
        Ok(Self {
            certificate_pem,
            issuer,
        })
    }

    /// Makes an authority in `folder`, which is made too (mode 0700).
    ///
    /// # Errors
    /// When there is one already, or the folder can't be written.
    pub fn init(folder: &Path) -> Result<Self> {
        if key_path(folder).exists() {
            return Err(Error::Failed(format!(
                "{} is there already: instances trust it, so it is not replaced; remove it to start anew",
                key_path(folder).display()
            )));
        }
        fs::create_dir_all(folder).map_err(Error::file("make", folder))?;
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
            .map_err(Error::file("set the mode of", folder))?;
        let key = new_key()?;
        let mut params = params("portcullis control plane CA", CA_LIFETIME)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate_pem = params.self_signed(&key).map_err(signing)?.pem();
        // The key comes last: its presence means that the authority is whole.
        write_private(&certificate_path(folder), &certificate_pem)?;
        write_private(&key_path(folder), &key.serialize_pem())?;
        Ok(Self {
            certificate_pem,
            issuer: Issuer::new(params, key),
        })
    }

    /// The certificate that instances are to trust (`control_plane.client_ca`), PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// A new client certificate of the role `operator`, for instances without an external id.
    ///
    /// # Errors
    /// As [`Ca::issue_for`].
    pub fn issue(&self, name: &str, lifetime: Duration) -> Result<ClientCertificate> {
        self.issue_for(&ClientName {
            name: name.to_owned(),
            role: Role::Operator,
            external_ids: Vec::new(),
            lifetime,
        })
    }

    /// A new client certificate, valid from [`CLOCK_SKEW`] before now. Role and external ids stand among its
    /// subject alternative names, as `urn:portcullis:role:ROLE` and `urn:portcullis:external-id:ID`.
    ///
    /// # Errors
    /// When the name is not 1 to 64 printable ASCII characters, the lifetime is too long, or there is no
    /// randomness.
    pub fn issue_for(&self, client: &ClientName) -> Result<ClientCertificate> {
        let name = client.name.as_str();
        if name.is_empty() || name.len() > 64 || !name.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(Error::BadInput(format!(
                "{name:?} is not a name: 1 to 64 printable ASCII characters without spaces"
            )));
        }
        let key = new_key()?;
        let mut params = params(name, client.lifetime)?;
        let ids = client.external_ids.iter().map(|id| external_id_urn(id.expose()));
        for uri in std::iter::once(client.role.urn()).chain(ids) {
            params
                .subject_alt_names
                .push(SanType::URI(uri.try_into().map_err(signing)?));
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer).map_err(signing)?;
        Ok(ClientCertificate {
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }
}

fn key_path(folder: &Path) -> PathBuf {
    folder.join("ca.key")
}

/// Where the authority's certificate lies within its folder.
pub fn certificate_path(folder: &Path) -> PathBuf {
    folder.join("ca.pem")
}

fn new_key() -> Result<KeyPair> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(signing)
}

pub(crate) fn signing(error: rcgen::Error) -> Error {
    Error::Failed(format!("can't make a certificate: {error}"))
}

/// A certificate's name, and its dates from [`CLOCK_SKEW`] before now.
pub(crate) fn params(common_name: &str, lifetime: Duration) -> Result<CertificateParams> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    let now = SystemTime::now();
    let too_long = || Error::BadInput(format!("a lifetime of {} s is too long", lifetime.as_secs()));
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = now
        .checked_add(lifetime)
        .filter(|_| lifetime <= CA_LIFETIME)
        .ok_or_else(too_long)?
        .into();
    Ok(params)
}

/// Writes a file that only its owner may read, whole or not at all.
pub(crate) fn write_private(path: &Path, content: &str) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let write = || {
        // tempfile makes files with mode 0600.
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(content.as_bytes())?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|e| e.error)?;
        fs::File::open(folder)?.sync_all()
    };
    write().map_err(Error::file("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use x509_parser::prelude::*;

    #[test]
    fn an_issued_certificate_is_for_clients_and_short() {
        let folder = tempfile::tempdir().unwrap();
        Ca::init(folder.path()).unwrap();
        // What was written is what issues afterwards.
        let ca = Ca::open_or_init(folder.path()).unwrap();
        let issued = ca.issue("control-plane", DEFAULT_LIFETIME).unwrap();
        let (_, pem) = parse_x509_pem(issued.certificate_pem.as_bytes()).unwrap();
        let certificate = pem.parse_x509().unwrap();
        assert_eq!(certificate.subject().to_string(), "CN=control-plane");
        let usage = certificate.extended_key_usage().unwrap().unwrap().value;
        assert!(usage.client_auth && !usage.server_auth && !usage.any);
        assert!(!certificate.is_ca());
        let validity = certificate.validity();
        let length = validity.not_after.timestamp() - validity.not_before.timestamp();
        assert!((3899..=3901).contains(&length), "{length}");
        let (_, ca_pem) = parse_x509_pem(ca.certificate_pem().as_bytes()).unwrap();
        let ca_certificate = ca_pem.parse_x509().unwrap();
        assert_eq!(certificate.issuer(), ca_certificate.subject());
        assert!(ca_certificate.is_ca());
    }

    #[test]
    fn role_and_external_id_stand_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let ca = Ca::init(folder.path()).unwrap();
        let client = ClientName {
            name: "net".into(),
            role: Role::Network,
            external_ids: vec![Secret::new("7f0c"), Secret::new("a b")],
            lifetime: DEFAULT_LIFETIME,
        };
        let issued = ca.issue_for(&client).unwrap();
        let (_, pem) = parse_x509_pem(issued.certificate_pem.as_bytes()).unwrap();
        let certificate = pem.parse_x509().unwrap();
        let names = certificate.subject_alternative_name().unwrap().unwrap().value;
        let uris: Vec<&str> = names
            .general_names
            .iter()
            .map(|name| match name {
                GeneralName::URI(uri) => *uri,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(
            uris,
            [
                "urn:portcullis:role:network",
                "urn:portcullis:external-id:7f0c",
                "urn:portcullis:external-id:a%20b"
            ]
        );
    }

    #[test]
    fn the_key_is_for_its_owner_and_never_replaced() {
        let folder = tempfile::tempdir().unwrap();
        Ca::init(folder.path()).unwrap();
        let mode = fs::metadata(key_path(folder.path()))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(Ca::init(folder.path()).is_err());
    }

    #[test]
    fn silly_names_and_lifetimes_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let ca = Ca::init(folder.path()).unwrap();
        assert!(ca.issue("a\nb", DEFAULT_LIFETIME).is_err());
        assert!(ca.issue("a", Duration::MAX).is_err());
    }
}
