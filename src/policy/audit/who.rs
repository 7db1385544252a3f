//! Who asked: a local process, a holder of a certificate, a file, or the agent itself.
//!
//! May not live here: whether it is let (`access`), looking at processes (`system::callers`).

use std::fmt;

use portcullis_protocol::access::ROLE_URN;
use serde::{Deserialize, Serialize};

use super::clean;
use crate::policy::access::Certificate;

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
    /// A caller over HTTPS with the certificate that it showed. Of its URIs only the role is told: the external id
    /// is a secret.
    pub fn remote(address: String, certificate: Option<&Certificate>) -> Self {
        Self::Remote {
            address,
            subject: certificate.map(|shown| shown.subject.clone()),
            serial: certificate.map(|shown| number(&shown.serial)),
            role: certificate.and_then(role),
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

/// The role that the certificate names; the first, should there be more.
fn role(certificate: &Certificate) -> Option<String> {
    let named = certificate.uris.iter();
    named
        .filter_map(|uri| uri.strip_prefix(ROLE_URN))
        .map(str::to_owned)
        .next()
}

/// A serial number as it is searched for: hex digits without colons and leading zeros.
fn number(serial: &str) -> String {
    let digits = serial.replace(':', "");
    match digits.trim_start_matches('0') {
        "" => "0".to_owned(),
        digits => digits.to_owned(),
    }
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

    fn certificate(name: &str, uris: &[&str]) -> Certificate {
        Certificate {
            subject: format!("CN={name}"),
            serial: "0a:bc".to_owned(),
            uris: uris.iter().map(|uri| (*uri).to_owned()).collect(),
            not_before: 0,
            not_after: 1,
        }
    }

    #[test]
    fn a_certificate_is_told_without_its_external_id() {
        let uris = [
            "urn:portcullis:external-id:hidden",
            "urn:portcullis:role:operator",
        ];
        let shown = certificate("cp\n\u{1b}[1m", &uris);
        let who = Who::remote("192.0.2.1:9".to_owned(), Some(&shown)).cleaned();
        let text = who.to_string();
        assert_eq!(text, "CN=cp\\n\\u{1b}[1m role operator serial abc at 192.0.2.1:9");
        let json = serde_json::to_string(&who).unwrap();
        assert!(!json.contains("hidden") && !json.contains('\u{1b}'), "{json}");
        assert!(!who.is_stranger());
        let who = Who::remote("192.0.2.1:9".to_owned(), None);
        assert!(who.is_stranger());
        assert_eq!(who.to_string(), "without a certificate at 192.0.2.1:9");
        assert_eq!(number("00:00"), "0");
    }

    #[test]
    fn another_port_or_process_is_no_other_caller() {
        let at = |address: &str| Who::remote(address.to_owned(), None).key();
        assert_eq!(at("192.0.2.1:9"), at("192.0.2.1:10"));
        assert_ne!(at("192.0.2.1:9"), at("192.0.2.2:9"));
        assert_eq!(at("[2001:db8::1]:9"), at("[2001:db8::1]:10"));
    }
}
