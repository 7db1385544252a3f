//! The `[report]` section: how reports are pushed, and how we prove who we are.
//!
//! May not live here: reading the files that it names.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::{absolute, interval, set};
use crate::health::push::offer::Platform;
use crate::policy::spool::Bounds;

/// What a credential of systemd is named by, instead of a path.
pub const CREDENTIAL: &str = "credential:";

/// Most reports that may wait: with the largest reports that were seen (40 kB), 4 GB.
const MAX_REPORTS: usize = 100_000;

/// How reports are pushed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReportSettings {
    /// Time between two reports when nothing changes: at least a second.
    pub interval: Duration,
    /// PEM file of the authorities that the receiver is checked against, or `credential:NAME`; the system's own
    /// if there is none.
    pub ca_file: Option<PathBuf>,
    /// How much waits on disk while the receiver is away.
    pub spool: Bounds,
    /// How we prove who we are.
    pub auth: Auth,
}

impl Default for ReportSettings {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(300),
            ca_file: None,
            spool: Bounds {
                reports: 1000,
                bytes: 16 << 20,
            },
            auth: Auth::None,
        }
    }
}

/// How we prove who we are. Each file is a path, or `credential:NAME` for a credential of systemd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Auth {
    /// Not at all.
    None,
    /// A certificate and its key; the instance's own TLS identity if there are none.
    Mtls {
        /// PEM files of the certificate and of the key.
        files: Option<(PathBuf, PathBuf)>,
    },
    /// A token in a file.
    Bearer {
        /// The file.
        token_file: PathBuf,
    },
    /// The platform's word.
    InstanceIdentity {
        /// The platform; found out if there is none.
        platform: Option<Platform>,
        /// Whom a GCE identity token is for.
        audience: Option<String>,
    },
    /// A service account's key.
    ServiceAccount {
        /// JSON file of the key.
        key_file: PathBuf,
        /// Where it is exchanged for a token: an https URL.
        token_url: String,
        /// The assertion's `aud`.
        audience: Option<String>,
    },
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawReport {
    interval: Option<String>,
    ca_file: Option<PathBuf>,
    spool_reports: Option<usize>,
    spool_mib: Option<u64>,
    auth: Option<RawAuth>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawAuth {
    kind: Option<Kind>,
    client_certificate: Option<PathBuf>,
    client_key: Option<PathBuf>,
    token_file: Option<PathBuf>,
    platform: Option<RawPlatform>,
    audience: Option<String>,
    key_file: Option<PathBuf>,
    token_url: Option<String>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    None,
    Mtls,
    Bearer,
    InstanceIdentity,
    ServiceAccount,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RawPlatform {
    Auto,
    Aws,
    Gce,
    Azure,
}

impl ReportSettings {
    pub(super) fn apply(&mut self, raw: RawReport) -> Result<(), String> {
        let every = raw.interval.map(|text| interval(&text)).transpose()?;
        set(&mut self.interval, every);
        match raw.ca_file {
            Some(path) if path.as_os_str().is_empty() => self.ca_file = None,
            path => self.ca_file = named("report.ca_file", path)?.or(self.ca_file.take()),
        }
        if let Some(reports) = raw.spool_reports {
            if !(1..=MAX_REPORTS).contains(&reports) {
                return Err(format!(
                    "report.spool_reports: {reports} is not from 1 to {MAX_REPORTS}"
                ));
            }
            self.spool.reports = reports;
        }
        if let Some(size) = raw.spool_mib {
            if !(1..=4096).contains(&size) {
                return Err(format!("report.spool_mib: {size} is not from 1 to 4096"));
            }
            self.spool.bytes = size << 20;
        }
        // The fields of one kind belong together: a later file replaces all of them.
        let auth = raw.auth.map(RawAuth::checked).transpose()?.flatten();
        set(&mut self.auth, auth);
        Ok(())
    }
}

impl RawAuth {
    /// Takes what the kind needs; what it has no use for is an error, for somebody meant something by it.
    /// A section without a kind says nothing.
    fn checked(mut self) -> Result<Option<Auth>, String> {
        let Some(kind) = self.kind else {
            return match self.left() {
                None => Ok(None),
                Some(field) => Err(format!("report.auth.kind: is missing, and {field} is there")),
            };
        };
        let auth = match kind {
            Kind::None => Auth::None,
            Kind::Mtls => {
                let certificate = file("client_certificate", self.client_certificate.take())?;
                let key = file("client_key", self.client_key.take())?;
                let files = match (certificate, key) {
                    (None, None) => None,
                    (Some(certificate), Some(key)) => Some((certificate, key)),
                    _ => return Err("report.auth: client_certificate and client_key go together".to_owned()),
                };
                Auth::Mtls { files }
            }
            Kind::Bearer => Auth::Bearer {
                token_file: needed("token_file", file("token_file", self.token_file.take())?)?,
            },
            Kind::InstanceIdentity => Auth::InstanceIdentity {
                platform: match self.platform.take() {
                    None | Some(RawPlatform::Auto) => None,
                    Some(RawPlatform::Aws) => Some(Platform::Aws),
                    Some(RawPlatform::Gce) => Some(Platform::Gce),
                    Some(RawPlatform::Azure) => Some(Platform::Azure),
                },
                audience: self.audience.take(),
            },
            Kind::ServiceAccount => Auth::ServiceAccount {
                key_file: needed("key_file", file("key_file", self.key_file.take())?)?,
                token_url: https(needed("token_url", self.token_url.take())?)?,
                audience: self.audience.take(),
            },
        };
        match self.left() {
            None => Ok(Some(auth)),
            Some(field) => Err(format!("report.auth.{field}: is not for this kind")),
        }
    }

    /// A field that nobody took.
    fn left(&self) -> Option<&'static str> {
        let fields = [
            ("client_certificate", self.client_certificate.is_some()),
            ("client_key", self.client_key.is_some()),
            ("token_file", self.token_file.is_some()),
            ("platform", self.platform.is_some()),
            ("audience", self.audience.is_some()),
            ("key_file", self.key_file.is_some()),
            ("token_url", self.token_url.is_some()),
        ];
        fields.into_iter().find(|(_, left)| *left).map(|(name, _)| name)
    }
}

fn needed<T>(field: &str, value: Option<T>) -> Result<T, String> {
    value.ok_or_else(|| format!("report.auth.{field}: is missing, and this kind needs it"))
}

fn file(field: &str, path: Option<PathBuf>) -> Result<Option<PathBuf>, String> {
    named(&format!("report.auth.{field}"), path)
}

/// An absolute path, or a credential of systemd by a name without a folder in it (systemd.exec(5)).
pub(super) fn named(field: &str, path: Option<PathBuf>) -> Result<Option<PathBuf>, String> {
    let credential = path
        .as_deref()
        .and_then(|path| path.to_str()?.strip_prefix(CREDENTIAL));
    match credential {
        Some(name) if name.is_empty() || name.starts_with('.') || name.contains('/') => {
            Err(format!("{field}: {name:?} is not the name of a credential"))
        }
        Some(_) => Ok(path),
        None => absolute(field, path),
    }
}

fn https(text: String) -> Result<String, String> {
    match reqwest::Url::parse(&text) {
        Ok(url) if url.scheme() == "https" && url.username().is_empty() && url.password().is_none() => {
            Ok(text)
        }
        _ => Err(format!("report.auth.token_url: {text:?} is not an https URL")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<ReportSettings, String> {
        let raw = toml::from_str(text).map_err(|e| e.to_string())?;
        let mut settings = ReportSettings::default();
        settings.apply(raw).map(|()| settings)
    }

    #[test]
    fn each_kind_takes_its_own_fields() {
        let auth = |text: &str| read(&format!("[auth]\n{text}")).unwrap().auth;
        assert_eq!(auth("kind = \"mtls\""), Auth::Mtls { files: None });
        let token_file = "/etc/portcullis/token".into();
        assert_eq!(
            auth("kind = \"bearer\"\ntoken_file = \"/etc/portcullis/token\""),
            Auth::Bearer { token_file }
        );
        let token_file = "credential:report.token".into();
        assert_eq!(
            auth("kind = \"bearer\"\ntoken_file = \"credential:report.token\""),
            Auth::Bearer { token_file }
        );
        let platform = Some(Platform::Azure);
        assert_eq!(
            auth("kind = \"instance-identity\"\nplatform = \"azure\""),
            Auth::InstanceIdentity {
                platform,
                audience: None
            }
        );
        let key =
            "kind = \"service-account\"\nkey_file = \"/k\"\ntoken_url = \"https://a/t\"\naudience = \"x\"";
        assert!(matches!(auth(key), Auth::ServiceAccount { audience: Some(a), .. } if a == "x"));
    }

    #[test]
    fn errors_name_the_field() {
        for (text, expected) in [
            ("spool_reports = 0", "report.spool_reports: 0 is not from 1"),
            ("spool_mib = 0", "report.spool_mib: 0 is not from 1"),
            ("[auth]\ntoken_file = \"/t\"", "report.auth.kind: is missing"),
            ("[auth]\nkind = \"magic\"", "magic"),
            ("[auth]\nkind = \"bearer\"", "report.auth.token_file: is missing"),
            (
                "[auth]\nkind = \"bearer\"\ntoken_file = \"t\"",
                "report.auth.token_file: \"t\"",
            ),
            (
                "[auth]\nkind = \"bearer\"\ntoken_file = \"credential:../t\"",
                "\"../t\" is not the name",
            ),
            (
                "[auth]\nkind = \"none\"\ntoken_file = \"/t\"",
                "report.auth.token_file: is not for",
            ),
            ("[auth]\nkind = \"mtls\"\nclient_key = \"/k\"", "go together"),
            (
                "[auth]\nkind = \"instance-identity\"\nplatform = \"x\"",
                "unknown variant",
            ),
            (
                "[auth]\nkind = \"service-account\"\nkey_file = \"/k\"\ntoken_url = \"http://a/\"",
                "report.auth.token_url: \"http://a/\" is not an https URL",
            ),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
