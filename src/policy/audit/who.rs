//! Who asked: a local process, a holder of a certificate, a file, or the agent itself.
//!
//! May not live here: whether it is let (`access`), looking at processes (`system::callers`).

use std::fmt;

use serde::{Deserialize, Serialize};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::clean;

/// How the URI begins by which a certificate names its holder's role.
const ROLE_URN: &str = "urn:portcullis:role:";

/// Who asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Who {
    /// Nobody: the agent notes it, or did it because a time was over.
    Agent,
    /// Whoever wrote this file.
    File {
        /// Its path.
        path: String,
    },
    /// A process of this host, over the control socket. Looked up while it waits for its answer.
    Local {
        /// Its id; none if the kernel did not tell.
        pid: Option<i32>,
        /// Its effective user.
        uid: Option<u32>,
        /// Its name and those of the processes above it.
        command: Option<String>,
        /// The user who logged in, where that is known: root by sudo(8) still is somebody.
        login_user: Option<String>,
    },
    /// A caller over HTTPS.
    Remote {
        /// Address and port.
        address: String,
        /// The certificate's subject; none without one.
        subject: Option<String>,
        /// Its serial number, hex.
        serial: Option<String>,
        /// The role that it names.
        role: Option<String>,
    },
}

impl Who {
    /// A caller over HTTPS with the certificate that it showed, DER. The external id, which is a secret, is
    /// not read.
    pub fn remote(address: String, certificate: Option<&[u8]>) -> Self {
        let parsed = certificate.and_then(|der| X509Certificate::from_der(der).ok());
        let parsed = parsed.map(|(_, certificate)| certificate);
        Self::Remote {
            address,
            subject: parsed.as_ref().map(|c| c.subject().to_string()),
            serial: parsed.as_ref().map(|c| format!("{:x}", c.serial)),
            role: parsed.as_ref().and_then(role),
        }
    }

    /// Whether anything shows who it is: a stranger's refusals are counted rather than told.
    pub fn is_stranger(&self) -> bool {
        matches!(self, Self::Remote { subject: None, .. })
    }

    /// What tells it from others when refusals are counted. A port or a process id would make each call
    /// another caller's.
    pub fn key(&self) -> String {
        match self {
            Self::Remote { address, serial, .. } => {
                let host = address
                    .rsplit_once(':')
                    .map_or(address.as_str(), |(host, _)| host);
                format!("{host} {}", serial.as_deref().unwrap_or_default())
            }
            Self::Local { login_user, uid, .. } => format!("{login_user:?} {uid:?}"),
            other => other.to_string(),
        }
    }

    pub(super) fn cleaned(self) -> Self {
        let short = |text: Option<String>| text.map(|text| clean(&text, 200));
        match self {
            Self::Agent => Self::Agent,
            Self::File { path } => Self::File {
                path: clean(&path, 200),
            },
            Self::Local {
                pid,
                uid,
                command,
                login_user,
            } => Self::Local {
                pid,
                uid,
                command: short(command),
                login_user: short(login_user),
            },
            Self::Remote {
                address,
                subject,
                serial,
                role,
            } => Self::Remote {
                address: clean(&address, 100),
                subject: short(subject),
                serial: short(serial),
                role: short(role),
            },
        }
    }
}

/// The role that the certificate names among its subject alternative names.
fn role(certificate: &X509Certificate<'_>) -> Option<String> {
    let names = certificate.subject_alternative_name().ok()??;
    let uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => uri.strip_prefix(ROLE_URN),
        _ => None,
    });
    uris.map(str::to_owned).next()
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agent => f.write_str("the agent"),
            Self::File { path } => write!(f, "file {path}"),
            Self::Local {
                pid,
                uid,
                command,
                login_user,
            } => {
                match (login_user, uid) {
                    (Some(user), _) => f.write_str(user)?,
                    (None, Some(0)) => f.write_str("root")?,
                    (None, Some(uid)) => write!(f, "user {uid}")?,
                    (None, None) => f.write_str("a local process")?,
                }
                if let Some(command) = command {
                    write!(f, " ({command})")?;
                }
                pid.map_or(Ok(()), |pid| write!(f, " pid {pid}"))
            }
            Self::Remote {
                address,
                subject,
                serial,
                role,
            } => {
                f.write_str(subject.as_deref().unwrap_or("without a certificate"))?;
                if let Some(role) = role {
                    write!(f, " role {role}")?;
                }
                if let Some(serial) = serial {
                    write!(f, " serial {serial}")?;
                }
                write!(f, " at {address}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(name: &str, uris: &[&str]) -> Vec<u8> {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.serial_number = Some(vec![0x0a, 0xbc].into());
        for uri in uris {
            let uri = (*uri).try_into().unwrap();
            params.subject_alt_names.push(rcgen::SanType::URI(uri));
        }
        let key = rcgen::KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn a_certificate_is_told_without_its_external_id() {
        let uris = [
            "urn:portcullis:external-id:hidden",
            "urn:portcullis:role:operator",
        ];
        let der = certificate("cp\n\u{1b}[1m", &uris);
        let who = Who::remote("192.0.2.1:9".to_owned(), Some(&der)).cleaned();
        let text = who.to_string();
        assert_eq!(text, "CN=cp\\n\\u{1b}[1m role operator serial abc at 192.0.2.1:9");
        let json = serde_json::to_string(&who).unwrap();
        assert!(!json.contains("hidden") && !json.contains('\u{1b}'), "{json}");
        assert!(!who.is_stranger());
        for damaged in [None, Some(&b"no certificate"[..])] {
            let who = Who::remote("192.0.2.1:9".to_owned(), damaged);
            assert!(who.is_stranger());
            assert_eq!(who.to_string(), "without a certificate at 192.0.2.1:9");
        }
    }

    #[test]
    fn another_port_or_process_is_no_other_caller() {
        let at = |address: &str| Who::remote(address.to_owned(), None).key();
        assert_eq!(at("192.0.2.1:9"), at("192.0.2.1:10"));
        assert_ne!(at("192.0.2.1:9"), at("192.0.2.2:9"));
        assert_eq!(at("[2001:db8::1]:9"), at("[2001:db8::1]:10"));
    }
}
