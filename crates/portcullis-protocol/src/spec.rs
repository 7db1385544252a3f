//! The spec: the desired state of an instance, in the one JSON format that the file, the API and the
//! library share. Parsed once; what comes out can be relied upon.
//!
//! May not live here: what the spec means for the kernel or for files (the agent's policy).

mod checks;
pub mod storage;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{AuthorizedKey, FirewallRule, PeerAddress, Secret, SourceRange};
pub use checks::guessable;
use storage::Storage;

/// Largest accepted spec, in bytes: 100,000 peers fit.
pub const MAX_SPEC_BYTES: usize = 16 << 20;

/// Most peers of a cluster; each may have two addresses, counted over all of them. They are elements of
/// sets: a packet costs one look-up, however many they are.
pub const MAX_PEERS: usize = 100_000;

/// Most rules of a list. A packet that nobody let in is compared with each of them.
pub const MAX_RULES: usize = 1_000;

/// Most address ranges of a list's rules together, and of the control plane's sources.
pub const MAX_SOURCES: usize = 100_000;

/// The version of the format that this code reads and writes.
pub const SPEC_VERSION: u32 = 1;

/// Number of a desired state. Only grows; the highest valid one wins. At least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, JsonSchema)]
#[serde(transparent)]
pub struct Generation(#[schemars(range(min = 1))] u64);

impl Generation {
    /// The first one.
    pub const FIRST: Self = Self(1);

    /// A generation; `None` for 0.
    pub fn new(number: u64) -> Option<Self> {
        (number > 0).then_some(Self(number))
    }

    /// The number.
    pub fn get(self) -> u64 {
        self.0
    }

    /// The one after.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for Generation {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(u64::deserialize(deserializer)?)
            .ok_or_else(|| de::Error::custom("0 is not a generation: they start at 1"))
    }
}

/// A name that the control plane gives: 1 to 128 printable ASCII characters, no spaces.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, JsonSchema)]
#[serde(transparent)]
pub struct Name(#[schemars(regex(pattern = r"^[!-~]{1,128}$"))] String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if !text.is_empty() && text.len() <= 128 && text.bytes().all(|b| b.is_ascii_graphic()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!(
                "{text:?} is not a name: 1 to 128 printable ASCII characters without spaces"
            ))
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

/// Which instance this is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Instance {
    /// The provider's id.
    pub id: Name,
    /// A name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// The control plane's own reference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ref_id: Option<Name>,
}

/// The cluster that the instance belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// The cluster's id.
    pub id: Name,
    /// The other instances, which may reach this one on all ports and protocols (BREV-CLU-1).
    #[serde(default)]
    #[schemars(length(max = MAX_PEERS))]
    pub peers: Vec<Peer>,
}

/// Another instance of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Its id.
    pub instance: Name,
    /// Its addresses: of a host, IPv4 or IPv6.
    pub addresses: Vec<PeerAddress>,
}

/// The firewall's rules.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Firewall {
    /// What is let in; all else is denied (BREV-NET-1, BREV-NET-2).
    #[serde(default)]
    #[schemars(length(max = MAX_RULES))]
    pub ingress: Vec<FirewallRule>,
    /// Informational, while outbound is allowed by default (BREV-NET-3).
    #[serde(default)]
    #[schemars(length(max = MAX_RULES))]
    pub egress: Vec<FirewallRule>,
}

/// An `https` URL with a host and without credentials (BREV-DATA-2, SRE-2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpsUrl(url::Url);

impl HttpsUrl {
    /// The URL.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl FromStr for HttpsUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let url = url::Url::parse(text).map_err(|e| format!("{text:?} is not a URL: {e}"))?;
        if url.scheme() != "https" || url.host().is_none() {
            return Err(format!("{text:?}: only https URLs are used"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err("credentials don't belong in a URL".to_owned());
        }
        Ok(Self(url))
    }
}

impl Serialize for HttpsUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for HttpsUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

/// Who steers the instance, from where, and where reports go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ControlPlane {
    /// From where the HTTPS port may be reached. None: nobody but peers and explicit rules.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<SourceRange>,
    /// PEM certificate of the authority that signs the control plane's client certificates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_ca: Option<String>,
    /// Random per team, checked on every use (BREF-3).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external_id: Option<Secret>,
    /// Where health reports are pushed to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "uri"))]
    pub report_url: Option<HttpsUrl>,
    /// Where the instance asks for a certificate for its TLS key, with the enrolment token; none: its keys are
    /// pinned instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "uri"))]
    pub enrol_url: Option<HttpsUrl>,
    /// Binds the instance's TLS and host keys on first contact, or its request for a certificate. Used once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enrolment_token: Option<Secret>,
}

/// The desired state of an instance.
///
/// Over the API it is shown without its secrets (`control_plane.external_id` and
/// `control_plane.enrolment_token`). A spec that is put there and leaves one of them out keeps the accepted
/// one's; a spec without `control_plane` has none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// Version of this format: 1.
    #[schemars(range(min = 1, max = 1))]
    pub version: u32,
    /// Number of this state.
    pub generation: Generation,
    /// Which instance it is for.
    pub instance: Instance,
    /// Its cluster; none means no peers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<Cluster>,
    /// The keys that log in; none means no keys.
    #[serde(default)]
    pub authorized_keys: Vec<AuthorizedKey>,
    /// The rules; none means nothing is let in.
    #[serde(default)]
    pub firewall: Firewall,
    /// The control plane; none means nobody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control_plane: Option<ControlPlane>,
    /// What the provider says of the storage; none means nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<Storage>,
}

/// Why a spec was refused: each problem with its field. Nothing of a refused spec is used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct SpecError {
    /// All that was found; at least one.
    pub problems: Vec<Problem>,
}

/// One problem of a spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Path of the field, for example `firewall.ingress[0]`.
    pub field: String,
    /// What is wrong with which value, and what is expected.
    pub reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.field == "." {
            f.write_str(&self.reason)
        } else {
            write!(f, "{}: {}", self.field, self.reason)
        }
    }
}

/// Reads one JSON document of a type that checks its own values.
///
/// # Errors
/// The first thing that is wrong with its form (syntax, type, unknown field, value), with its field.
pub fn from_json<T: DeserializeOwned>(json: &[u8]) -> Result<T, Problem> {
    let mut reader = serde_json::Deserializer::from_slice(json);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|e| Problem {
        field: e.path().to_string(),
        reason: e.inner().to_string(),
    })?;
    reader.end().map_err(|e| Problem {
        field: ".".to_owned(),
        reason: e.to_string(),
    })?;
    Ok(value)
}

impl Spec {
    /// Reads and checks a spec.
    ///
    /// # Errors
    /// All problems of meaning, or the first one of form (syntax, type, unknown field), each with
    /// its field and value.
    pub fn from_json(json: &[u8]) -> Result<Self, SpecError> {
        let one = |field: String, reason: String| SpecError {
            problems: vec![Problem { field, reason }],
        };
        if json.len() > MAX_SPEC_BYTES {
            return Err(one(
                ".".into(),
                format!("{} bytes is too large: at most {MAX_SPEC_BYTES}", json.len()),
            ));
        }
        let spec: Self = from_json(json).map_err(|problem| SpecError {
            problems: vec![problem],
        })?;
        spec.check()?;
        Ok(spec)
    }

    /// Whether it is valid as a whole, as [`Self::from_json`] demands; for one that was changed.
    ///
    /// # Errors
    /// All problems, each with its field.
    pub fn check(&self) -> Result<(), SpecError> {
        let problems = self.problems();
        if problems.is_empty() {
            Ok(())
        } else {
            Err(SpecError { problems })
        }
    }

    /// The spec as JSON, as the durable copy keeps it. Secrets are in it.
    pub fn to_json(&self) -> Vec<u8> {
        // These types have no map keys and no failing serializers, so this can't fail.
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }

    /// It without what must not leave the instance: the enrolment token and the external id.
    pub fn without_secrets(&self) -> Self {
        let mut spec = self.clone();
        if let Some(control) = &mut spec.control_plane {
            (control.enrolment_token, control.external_id) = (None, None);
        }
        spec
    }

    /// It without the enrolment token.
    pub fn without_token(&self) -> Self {
        let mut spec = self.clone();
        if let Some(control) = &mut spec.control_plane {
            control.enrolment_token = None;
        }
        spec
    }

    /// Takes over the secrets of `other` that this one leaves out, if this one has a control plane.
    pub fn keep_secrets_of(&mut self, other: &Self) {
        if let (Some(own), Some(other)) = (&mut self.control_plane, &other.control_plane) {
            let keep = |own: &mut Option<Secret>, other: &Option<Secret>| {
                if own.is_none() {
                    own.clone_from(other);
                }
            };
            keep(&mut own.enrolment_token, &other.enrolment_token);
            keep(&mut own.external_id, &other.external_id);
        }
    }

    /// The authority of the control plane's client certificates, as PEM.
    pub fn client_ca(&self) -> Option<&str> {
        self.control_plane.as_ref()?.client_ca.as_deref()
    }

    /// The token that binds the instance's keys on first contact.
    pub fn enrolment_token(&self) -> Option<&Secret> {
        self.control_plane.as_ref()?.enrolment_token.as_ref()
    }

    /// Where health reports are pushed to.
    pub fn report_url(&self) -> Option<&HttpsUrl> {
        self.control_plane.as_ref()?.report_url.as_ref()
    }

    /// Where the instance asks for a certificate.
    pub fn enrol_url(&self) -> Option<&HttpsUrl> {
        self.control_plane.as_ref()?.enrol_url.as_ref()
    }

    /// Addresses of all peers.
    pub fn peer_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.cluster
            .iter()
            .flat_map(|c| &c.peers)
            .flat_map(|p| &p.addresses)
            .map(|a| a.get())
    }
}
