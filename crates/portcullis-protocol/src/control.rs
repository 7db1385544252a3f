//! The messages of the local control socket: one JSON document a line, a request and its answer.
//!
//! May not live here: the socket, who may use it, what a request does.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de};

use jiff::Timestamp;

use crate::access::{AccessList, Role};
use crate::denied::DeniedSample;
use crate::enrolment::EnrolmentAnswer;
use crate::identity::{FirstContact, Identity};
use crate::report::HostKey;
use crate::situation::Situation;
use crate::{AuthorizedKey, FirewallRule, Peer, Report, Spec};

/// Longest line on the socket, in bytes: a whole spec fits.
pub const MAX_LINE: usize = crate::spec::MAX_SPEC_BYTES + 4096;

/// What a caller asks the daemon: a local one over the socket, or the control plane over HTTPS.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// The last report.
    Status,
    /// The situation now, and on the control socket each one after it that differs, a line each, until
    /// the caller hangs up.
    Watch,
    /// The accepted spec.
    Spec,
    /// Who sent most of the packets that were denied of late.
    Denied {
        /// How many sources at most.
        top: usize,
    },
    /// Make this spec the accepted one, enforce it, and answer when it is.
    Apply {
        /// The desired state, checked as [`Spec::from_json`] does.
        #[serde(deserialize_with = "checked")]
        spec: Box<Spec>,
        /// Seconds within which it has to be confirmed; else what held before holds again.
        #[serde(default)]
        confirm_s: Option<u64>,
        /// Even if it could cut the caller off.
        #[serde(default)]
        force: bool,
    },
    /// Keep the spec that is on trial. The caller's SSH session, if it has one, must be newer than it.
    Confirm {
        /// Its generation.
        generation: u64,
    },
    /// Let something in, as the next generation.
    AddRule {
        /// The rule.
        rule: FirewallRule,
    },
    /// Let it in no longer, as the next generation.
    RevokeRule {
        /// The rule's id.
        id: String,
        /// As in `Apply`.
        #[serde(default)]
        confirm_s: Option<u64>,
        /// As in `Apply`.
        #[serde(default)]
        force: bool,
    },
    /// Let a key in, as the next generation.
    AddKey {
        /// The key, whose login it opens, and until when.
        key: AuthorizedKey,
    },
    /// Let a key in no longer, whoever named it; as the next generation if the spec did.
    RevokeKey {
        /// The key's fingerprint, `SHA256:…`.
        fingerprint: String,
        /// As in `Apply`.
        #[serde(default)]
        confirm_s: Option<u64>,
        /// As in `Apply`.
        #[serde(default)]
        force: bool,
    },
    /// Let a peer of the cluster in, as the next generation; one of that name gets these addresses instead
    /// of those that it had.
    AddPeer {
        /// The peer.
        peer: Peer,
    },
    /// Let a peer in no longer, as the next generation.
    RevokePeer {
        /// The peer's instance.
        instance: String,
        /// As in `Apply`.
        #[serde(default)]
        confirm_s: Option<u64>,
        /// As in `Apply`.
        #[serde(default)]
        force: bool,
    },
    /// Make a change only if the accepted spec still is the one that the caller knows. A change that is
    /// made already is no error (RFC 9110 section 13.1.1).
    IfGeneration {
        /// The generation that the caller knows.
        generation: u64,
        /// The change.
        change: Box<Request>,
    },
    /// Take sshd's host keys as they are now for this instance's own.
    TrustHostKeys,
    /// Who may do what over the HTTPS API, and who did.
    Access,
    /// Refuse everything that holders of a role ask over the HTTPS API, from now on.
    RevokeAccess {
        /// The role; all, if there is none.
        role: Option<Role>,
    },
    /// Let holders of a role in again.
    RestoreAccess {
        /// The role; all, if there is none.
        role: Option<Role>,
    },
    /// Nothing is asked: the endpoint tells that a caller's certificate failed the handshake.
    HandshakeRefused {
        /// What TLS said of it.
        reason: HandshakeRefusal,
    },
    /// Nothing is asked: the endpoint tells of a call that it refused by itself, so that it is recorded.
    CallRefused {
        /// The operation, as the API's description names it.
        operation: String,
        /// The status that the caller got (RFC 9110 section 15.5).
        status: u16,
        /// What the caller was told.
        detail: String,
    },
    /// What the agent has counted and measured.
    Metrics,
    /// Which keys this instance has, bound to the enrolment token. All that a caller without a certificate
    /// may ask over HTTPS.
    Identity {
        /// The caller's nonce ([`crate::identity::is_nonce`]).
        nonce: String,
    },
    /// Somebody who knows the enrolment token has pinned this instance's keys. Anybody may say so; it counts
    /// only with the proof.
    FirstContact {
        /// The proof.
        contact: FirstContact,
    },
    /// What the control plane answered to the request for a certificate. Whoever passes it on need not be
    /// believed: it proves itself.
    Enrolled {
        /// Its answer.
        answer: EnrolmentAnswer,
    },
}

impl Request {
    /// What is asked for, as its `request` says on the wire; of a change with a condition, the change. One of a
    /// fixed list, whatever the caller sends.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Watch => "watch",
            Self::Spec => "spec",
            Self::Denied { .. } => "denied",
            Self::Apply { .. } => "apply",
            Self::Confirm { .. } => "confirm",
            Self::AddRule { .. } => "add-rule",
            Self::RevokeRule { .. } => "revoke-rule",
            Self::AddKey { .. } => "add-key",
            Self::RevokeKey { .. } => "revoke-key",
            Self::AddPeer { .. } => "add-peer",
            Self::RevokePeer { .. } => "revoke-peer",
            Self::IfGeneration { change, .. } => change.name(),
            Self::TrustHostKeys => "trust-host-keys",
            Self::Access => "access",
            Self::RevokeAccess { .. } => "revoke-access",
            Self::RestoreAccess { .. } => "restore-access",
            Self::HandshakeRefused { .. } => "handshake-refused",
            Self::CallRefused { .. } => "call-refused",
            Self::Metrics => "metrics",
            Self::Identity { .. } => "identity",
            Self::FirstContact { .. } => "first-contact",
            Self::Enrolled { .. } => "enrolled",
        }
    }
}

/// Why a client certificate failed the TLS handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HandshakeRefusal {
    /// No certificate of the spec's authority, or not for clients.
    Authority,
    /// Its end is over.
    Expired,
    /// Its beginning is to come.
    NotYetValid,
}

/// Callers may be other programs than ours: what they send has not been checked.
fn checked<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Box<Spec>, D::Error> {
    let spec = Box::<Spec>::deserialize(deserializer)?;
    spec.check().map_err(de::Error::custom)?;
    Ok(spec)
}

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// The last report.
    Report {
        /// The report.
        report: Box<Report>,
    },
    /// What an operator looks at.
    Situation {
        /// The situation.
        situation: Box<Situation>,
    },
    /// The accepted spec, if there is one.
    Spec {
        /// The spec.
        spec: Option<Box<Spec>>,
    },
    /// A sample of denied packets.
    Denied {
        /// The sample.
        sample: DeniedSample,
    },
    /// The spec was accepted; durable and enforced.
    Applied {
        /// Its generation.
        generation: u64,
        /// Whether anything had to be changed.
        changed: bool,
        /// Until when it has to be confirmed; none if it holds for good.
        confirm_until: Option<Timestamp>,
        /// The report after it.
        report: Box<Report>,
    },
    /// Who may do what over the HTTPS API.
    Access {
        /// Whether anything had to be changed.
        changed: bool,
        /// As it is now.
        access: Box<AccessList>,
    },
    /// The host keys that are this instance's own.
    HostKeys {
        /// Whether others were before.
        changed: bool,
        /// The keys.
        host_keys: Vec<HostKey>,
    },
    /// What the agent has counted and measured.
    Metrics {
        /// Metric families in the text format of OpenMetrics 1.0, without the `# EOF` at the end: whoever hands
        /// them on may add some of its own.
        text: String,
    },
    /// Which keys this instance has.
    Identity {
        /// The document.
        identity: Identity,
    },
    /// It is done, and there is nothing to say about it.
    Done,
    /// It was not done, and nothing changed.
    Refused {
        /// Which kind of refusal, for exit codes.
        kind: Refusal,
        /// For the operator: what, why, and what to do.
        message: String,
    },
}

/// Why a request was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Refusal {
    /// The request or the spec is wrong (exit code 2).
    BadInput,
    /// The caller may not (exit code 3).
    NotPermitted,
    /// What it is about is not there (exit code 2).
    NotFound,
    /// Something else of that name is there already (exit code 2).
    Conflict,
    /// It could cut the caller off, and was asked for neither on trial nor by force (exit code 2).
    Dangerous,
    /// Not now: another change awaits confirmation, or a higher generation holds (exit code 1).
    Superseded,
    /// The accepted spec is not the one that the caller knows (exit code 1).
    OtherGeneration,
    /// The disk or a quota is full (exit code 1).
    StorageFull,
    /// It could not be done for another reason (exit code 1).
    Failed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_requests_name_is_the_one_on_the_wire() {
        let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIcdwKzw8yewzHiecr+shLsECUQCRmZUaB4hQzRP/INh";
        for rest in [
            r#""status"}"#,
            r#""spec"}"#,
            r#""denied","top":1}"#,
            r#""apply","spec":{"version":1,"generation":1,"instance":{"id":"i-1"}}}"#,
            r#""confirm","generation":1}"#,
            r#""add-rule","rule":{"id":"a","from_port":1,"to_port":1}}"#,
            r#""revoke-rule","id":"a"}"#,
            &format!(r#""add-key","key":{{"user":"u","key":"{key}"}}}}"#),
            r#""revoke-key","fingerprint":"SHA256:x"}"#,
            r#""add-peer","peer":{"instance":"p","addresses":["10.0.0.1"]}}"#,
            r#""revoke-peer","instance":"p"}"#,
            r#""trust-host-keys"}"#,
            r#""metrics"}"#,
        ] {
            let text = format!(r#"{{"request":{rest}"#);
            let request: Request = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert!(rest.starts_with(&format!("\"{}\"", request.name())), "{text}");
            let conditional = Request::IfGeneration {
                generation: 1,
                change: Box::new(request.clone()),
            };
            assert_eq!(conditional.name(), request.name());
        }
    }

    #[test]
    fn a_spec_is_checked_whoever_sends_it() {
        let request = |rest: &str| {
            let spec = format!(r#"{{"version":1,"generation":1,"instance":{{"id":"i-1"}}{rest}}}"#);
            serde_json::from_str::<Request>(&format!(r#"{{"request":"apply","spec":{spec}}}"#))
        };
        assert!(matches!(request("").unwrap(), Request::Apply { .. }));
        let twice = r#","cluster":{"id":"c","peers":[{"instance":"p","addresses":["10.0.0.1","10.0.0.1"]}]}"#;
        let error = request(twice).unwrap_err().to_string();
        assert!(
            error.contains("cluster.peers[0].addresses: 10.0.0.1 is already"),
            "{error}"
        );
    }
}
