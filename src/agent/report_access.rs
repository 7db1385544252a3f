//! The credentials for pushing: read from the files that the settings name, checked, and handed on as contents.
//!
//! The only place that reads them: the pusher knows no file. May not live here: using them.

use std::fs;
use std::path::{Path, PathBuf};

use portcullis_protocol::Secret;
use serde::Deserialize;

use crate::config::report::{Auth, ReportSettings};
use crate::health::push::offer::{Access, Platform, Proof, ServiceKey};
use crate::identity::TlsIdentity;
use crate::identity::time::KnownTime;
use crate::system::secret_files::{place, read_public, read_secret};

/// Reads all that pushing needs.
///
/// # Errors
/// A reason for the operator that names the setting and the file, without any secret.
pub fn load(settings: &ReportSettings, identity: &TlsIdentity) -> Result<Access, String> {
    Ok(Access {
        time: identity.clock().what_is_known(),
        authorities: authorities(settings)?,
        proof: proof(&settings.auth, identity)?,
    })
}

/// Reads what asking for a certificate needs; in a renewal the certificate is shown, PEM, with its key.
///
/// # Errors
/// As [`load`].
pub fn for_enrolment(
    settings: &ReportSettings,
    shown: Option<(String, Secret)>,
    time: KnownTime,
) -> Result<Access, String> {
    Ok(Access {
        time,
        authorities: authorities(settings)?,
        proof: shown.map_or(Proof::None, |(chain, key)| Proof::Certificate { chain, key }),
    })
}

fn authorities(settings: &ReportSettings) -> Result<Option<String>, String> {
    let read = settings.ca_file.as_deref().map(read_public).transpose();
    read.map_err(|reason| format!("report.ca_file: {reason}"))
}

/// Files whose change is worth reading them again.
pub fn files(settings: &ReportSettings) -> Vec<PathBuf> {
    let of_auth: Vec<&PathBuf> = match &settings.auth {
        Auth::None | Auth::InstanceIdentity { .. } | Auth::Mtls { files: None } => Vec::new(),
        Auth::Mtls {
            files: Some((certificate, key)),
        } => vec![certificate, key],
        Auth::Bearer { token_file } => vec![token_file],
        Auth::ServiceAccount { key_file, .. } => vec![key_file],
    };
    let named = settings.ca_file.iter().chain(of_auth);
    named.map(|path| place(path)).collect()
}

fn proof(auth: &Auth, identity: &TlsIdentity) -> Result<Proof, String> {
    let named = |field: &'static str| move |reason: String| format!("report.auth.{field}: {reason}");
    Ok(match auth {
        Auth::None => Proof::None,
        Auth::Mtls { files: None } => {
            let (chain, key) = identity.client_pem();
            Proof::Certificate { chain, key }
        }
        Auth::Mtls {
            files: Some((certificate, key)),
        } => Proof::Certificate {
            chain: read_public(certificate).map_err(named("client_certificate"))?,
            key: Secret::new(read_secret(key).map_err(named("client_key"))?.as_str()),
        },
        Auth::Bearer { token_file } => {
            let text = read_secret(token_file).map_err(named("token_file"))?;
            Proof::Bearer(Secret::new(text.trim()))
        }
        Auth::InstanceIdentity { platform, audience } => Proof::Instance {
            platform: match platform {
                Some(platform) => *platform,
                None => found_platform(Path::new("/sys/class/dmi/id")).ok_or_else(|| {
                    named("platform")("it can't be told from the firmware: name it".to_owned())
                })?,
            },
            audience: audience.clone(),
        },
        Auth::ServiceAccount {
            key_file,
            token_url,
            audience,
        } => {
            let text = read_secret(key_file).map_err(named("key_file"))?;
            Proof::ServiceAccount {
                key: service_key(&text).map_err(|reason| {
                    named("key_file")(format!("{}: {reason}", place(key_file).display()))
                })?,
                token_url: token_url.clone(),
                audience: audience.clone(),
            }
        }
    })
}

/// A service account's key as files of it are: flat, or below `subject-credentials`.
#[derive(Deserialize)]
struct KeyFile {
    #[serde(rename = "subject-credentials")]
    nested: Option<KeyFields>,
    #[serde(flatten)]
    flat: KeyFields,
}

#[derive(Deserialize)]
struct KeyFields {
    alg: Option<String>,
    #[serde(alias = "id", alias = "key_id")]
    kid: Option<String>,
    #[serde(alias = "service_account_id")]
    iss: Option<String>,
    sub: Option<String>,
    #[serde(rename = "private-key", alias = "private_key")]
    private_key: Option<Secret>,
}

fn service_key(text: &str) -> Result<ServiceKey, String> {
    // serde's own text may quote the file: the place is enough.
    let file: KeyFile = serde_json::from_str(text).map_err(|error| {
        format!(
            "is not the JSON of a key (line {}, column {})",
            error.line(),
            error.column()
        )
    })?;
    let fields = file.nested.unwrap_or(file.flat);
    if fields.alg.as_deref().is_some_and(|alg| alg != "RS256") {
        return Err("alg: only RS256 is known".to_owned());
    }
    let missing = |name: &str| format!("{name}: is missing");
    let issuer = fields.iss.ok_or_else(|| missing("iss"))?;
    Ok(ServiceKey {
        id: fields.kid.ok_or_else(|| missing("kid"))?,
        subject: fields.sub.unwrap_or_else(|| issuer.clone()),
        issuer,
        private_key: fields.private_key.ok_or_else(|| missing("private-key"))?,
    })
}

/// The platform by the firmware's tables (SMBIOS), as systemd-detect-virt(1) and cloud-init's ds-identify look
/// for it. Whoever could forge them could forge the metadata service too.
fn found_platform(folder: &Path) -> Option<Platform> {
    let read = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
    let (vendor, version, tag) = (
        read("sys_vendor"),
        read("bios_version"),
        read("chassis_asset_tag"),
    );
    if vendor.trim() == "Amazon EC2" || version.trim().ends_with(".amazon") {
        Some(Platform::Aws)
    } else if vendor.trim() == "Google" {
        Some(Platform::Gce)
    } else if tag.trim() == "7783-7084-3265-9085-8269-3286-77" {
        Some(Platform::Azure)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_in_the_forms_that_they_have() {
        let flat = r#"{"kid":"k","iss":"i","sub":"s","private_key":"p"}"#;
        let nested =
            r#"{"subject-credentials":{"alg":"RS256","private-key":"p","kid":"k","iss":"i","sub":"s"}}"#;
        let older = r#"{"id":"k","service_account_id":"i","created_at":"x","key_algorithm":"RSA_2048","public_key":"x","private_key":"p"}"#;
        for (text, subject) in [(flat, "s"), (nested, "s"), (older, "i")] {
            let key = service_key(text).unwrap();
            let read = (key.id.as_str(), key.issuer.as_str(), key.subject.as_str());
            assert_eq!(read, ("k", "i", subject), "{text}");
            assert_eq!(key.private_key.expose(), "p");
        }
        for (text, expected) in [
            ("{}", "iss: is missing"),
            (r#"{"iss":"i","private_key":"hunter2"}"#, "kid: is missing"),
            (r#"{"kid":"k","iss":"i"}"#, "private-key: is missing"),
            (
                r#"{"alg":"ES256","kid":"k","iss":"i","private_key":"p"}"#,
                "RS256",
            ),
            ("hunter2", "line 1"),
            (r#"{"private_key":7}"#, "line 1"),
        ] {
            let error = service_key(text).unwrap_err();
            assert!(
                error.contains(expected) && !error.contains("hunter2"),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn the_platform_is_known_by_its_firmware() {
        let folder = tempfile::tempdir().unwrap();
        let says = |file: &str, text: &str| fs::write(folder.path().join(file), text).unwrap();
        assert_eq!(found_platform(folder.path()), None);
        says("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77\n");
        assert_eq!(found_platform(folder.path()), Some(Platform::Azure));
        says("sys_vendor", "Google\n");
        assert_eq!(found_platform(folder.path()), Some(Platform::Gce));
        says("sys_vendor", "Xen\n");
        says("bios_version", "4.11.amazon\n");
        assert_eq!(found_platform(folder.path()), Some(Platform::Aws));
        says("sys_vendor", "Amazon EC2\n");
        says("bios_version", "1.0\n");
        assert_eq!(found_platform(folder.path()), Some(Platform::Aws));
    }
}
