//! What a report says of one key: whose it is, who named it, where it is, and what sshd says of it.
//!
//! It stands in the evidence of `keys.installed`, and is what `portcullis keys list` prints.
//! May not live here: how any of it is found out.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Whether sshd would let the key in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Accepted {
    /// sshd said so when the key was offered (RFC 4252 section 7).
    Yes,
    /// sshd said so of another key of the same user, kind and options in the same file.
    Inferred,
    /// sshd said no.
    No,
    /// There is no question that would tell: a certificate authority, a key for certain sources only.
    NotAsked,
    /// sshd could not be asked, or the key is not in place.
    Unknown,
}

/// One key of one user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct KeyReport {
    /// Whose login it opens; empty if the source did not say.
    pub user: String,
    /// `SHA256:…`, as `ssh-keygen -l` prints it; or which line of the source could not be read.
    pub fingerprint: String,
    /// The key's type, for example `ssh-ed25519`; empty if it could not be read.
    #[serde(default)]
    pub algorithm: String,
    /// The key's comment.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub comment: String,
    /// Its options, as sshd reads them.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub options: String,
    /// Who named it: `spec` and its generation, `credential` and its name, or `cloud-init`.
    pub source: String,
    /// When it ends (RFC 3339).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<jiff::Timestamp>,
    /// The file that holds it; none if it is not in place.
    #[serde(default)]
    pub file: Option<String>,
    /// What sshd says.
    pub accepted: Accepted,
    /// Why it is not in place, not asked about or not accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}
