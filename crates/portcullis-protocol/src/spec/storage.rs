//! What a provider says of the storage beneath an instance: a claim that nothing on the instance can prove.
//!
//! May not live here: what the instance itself sees (the agent's `policy::storage`).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Name;

/// Most claims of a spec.
pub const MAX_ATTESTATIONS: usize = 64;

/// Most disks that a claim names.
pub const MAX_ATTESTED_DISKS: usize = 256;

/// The instance's storage.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Storage {
    /// Encryption at rest that the provider does beneath the instance's disks. It is reported as attested, never
    /// as verified (BREV-DATA-1).
    #[serde(default)]
    #[schemars(length(max = MAX_ATTESTATIONS))]
    pub attested: Vec<Attestation>,
}

/// One claim: these disks are encrypted by whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Attestation {
    /// Who says so: a service's name, or where the evidence for it is.
    pub by: Name,
    /// With which algorithm, for example `AES-256`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<Name>,
    /// Which disks: serial numbers or kernel names (`vda`). None: every disk. Network shares are meant only
    /// where they are named, by what is mounted (`files.example:/data`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_ATTESTED_DISKS))]
    pub disks: Vec<Name>,
}
