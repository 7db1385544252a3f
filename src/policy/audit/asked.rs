//! A request as the audit log names it, and what its answer means for the log.
//!
//! May not live here: secrets. What is told of a request is picked field by field.

use std::collections::BTreeMap;

use jiff::Timestamp;
use portcullis_protocol::access::Role;
use portcullis_protocol::control::{Answer, Refusal, Request};

use super::Outcome;

/// What was asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// The request's name, as on the control socket.
    pub action: &'static str,
    /// Its parameters without secrets.
    pub parameters: BTreeMap<String, String>,
    /// Whether it only reads: then only a caller who may not is worth a record.
    pub reads: bool,
}

impl Asked {
    /// A request as the log names it. A new request has to be put here before it compiles.
    pub fn of(request: &Request) -> Self {
        let mut asked = Self {
            action: request.name(),
            ..Self::default()
        };
        asked.fill(request);
        asked
    }

    fn fill(&mut self, request: &Request) {
        match request {
            Request::Status
            | Request::Watch
            | Request::Spec
            | Request::Denied { .. }
            | Request::Access
            | Request::Metrics
            | Request::Identity { .. } => {
                self.reads = true;
            }
            Request::Apply {
                spec,
                confirm_s,
                force,
            } => {
                self.with("spec_generation", spec.generation);
                self.terms(*confirm_s, *force);
            }
            Request::Confirm { generation } => self.with("confirmed", generation),
            Request::AddRule { rule } => self.with("rule", rule),
            Request::RevokeRule { id, confirm_s, force } => {
                self.with("rule", id);
                self.terms(*confirm_s, *force);
            }
            Request::AddKey { key } => {
                self.with("key", key.key.fingerprint());
                self.with("user", &key.user);
                if let Some(expires) = key.expires {
                    self.with("expires", expires);
                }
            }
            Request::RevokeKey {
                fingerprint,
                confirm_s,
                force,
            } => {
                self.with("key", fingerprint);
                self.terms(*confirm_s, *force);
            }
            Request::AddPeer { peer } => {
                self.with("peer", &peer.instance);
                let addresses = peer.addresses.iter().map(|a| a.get().to_string());
                self.with("addresses", addresses.collect::<Vec<_>>().join(" "));
            }
            Request::RevokePeer {
                instance,
                confirm_s,
                force,
            } => {
                self.with("peer", instance);
                self.terms(*confirm_s, *force);
            }
            Request::IfGeneration { generation, change } => {
                self.with("if_generation", generation);
                // One in another one is refused, and may be nested deep.
                if !matches!(**change, Request::IfGeneration { .. }) {
                    self.fill(change);
                }
            }
            Request::RevokeAccess { role } | Request::RestoreAccess { role } => {
                self.with("role", role.map_or("all", Role::as_str));
            }
            Request::FirstContact { .. } | Request::Enrolled { .. } => {}
            Request::HandshakeRefused { reason } => self.with("reason", format!("{reason:?}")),
            Request::CallRefused {
                operation, status, ..
            } => {
                self.with("operation", operation);
                self.with("status", status);
            }
            Request::TrustHostKeys => {}
        }
    }

    fn with(&mut self, parameter: &str, value: impl ToString) {
        self.parameters.insert(parameter.to_owned(), value.to_string());
    }

    fn terms(&mut self, confirm_s: Option<u64>, force: bool) {
        if let Some(seconds) = confirm_s {
            self.with("confirm_s", seconds);
        }
        if force {
            self.with("force", true);
        }
    }
}

/// What an answer means for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Became {
    /// What became of the call.
    pub result: Outcome,
    /// Which kind of refusal, and why.
    pub refused: Option<(Refusal, String)>,
    /// Until when it has to be confirmed.
    pub confirm_until: Option<Timestamp>,
}

impl Became {
    /// What became of a call by its answer; `None` where the log has nothing to say: something was read.
    pub fn of(asked: &Asked, answer: &Answer) -> Option<Self> {
        let plain = |changed: bool, confirm_until: Option<Timestamp>| Self {
            result: match changed {
                true => Outcome::Changed,
                false => Outcome::Unchanged,
            },
            refused: None,
            confirm_until,
        };
        match answer {
            Answer::Report { .. }
            | Answer::Situation { .. }
            | Answer::Spec { .. }
            | Answer::Denied { .. }
            | Answer::Metrics { .. } => None,
            Answer::Access { changed, .. } => (!asked.reads).then(|| plain(*changed, None)),
            Answer::Applied {
                changed,
                confirm_until,
                ..
            } => Some(plain(*changed, *confirm_until)),
            Answer::Identity { .. } => None,
            // A token was used, or a certificate came.
            Answer::Done => Some(plain(true, None)),
            Answer::HostKeys { changed, .. } => Some(plain(*changed, None)),
            Answer::Refused { kind, .. } if asked.reads && *kind != Refusal::NotPermitted => None,
            Answer::Refused { kind, message } => Some(Self {
                result: Outcome::Refused,
                refused: Some((*kind, message.clone())),
                confirm_until: None,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(json: serde_json::Value) -> Request {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_request_is_named_with_its_parameters_and_without_secrets() {
        let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl a";
        for (json, action, words) in [
            (
                serde_json::json!({"request": "apply", "confirm_s": 60, "force": true, "spec": {
                    "version": 1, "generation": 9, "instance": {"id": "i"},
                    "control_plane": {"enrolment_token": "hidden", "external_id": "hidden"}}}),
                "apply",
                "confirm_s=60 force=true spec_generation=9",
            ),
            (
                serde_json::json!({"request": "add-key", "key": {"user": "ubuntu", "key": key}}),
                "add-key",
                "key=SHA256:",
            ),
            (
                serde_json::json!({"request": "if-generation", "generation": 3, "change": {
                    "request": "revoke-rule", "id": "web\n"}}),
                "revoke-rule",
                "if_generation=3 rule=web\n",
            ),
            (
                serde_json::json!({"request": "add-peer", "peer": {"instance": "i-2", "addresses": ["10.0.0.2", "fd00::2"]}}),
                "add-peer",
                "addresses=10.0.0.2 fd00::2 peer=i-2",
            ),
        ] {
            let asked = Asked::of(&request(json));
            let parameters: Vec<String> = asked.parameters.iter().map(|(n, v)| format!("{n}={v}")).collect();
            let text = parameters.join(" ");
            assert!(text.contains(words), "{text}");
            assert!(!text.contains("hidden") && !text.contains("AAAA"), "{text}");
            assert_eq!((asked.action, asked.reads), (action, false));
        }
    }

    #[test]
    fn reading_is_no_record_and_reading_without_the_right_is() {
        let refused = |kind| Answer::Refused {
            kind,
            message: "no".to_owned(),
        };
        let (read, change) = (Asked::of(&Request::Status), Asked::of(&Request::TrustHostKeys));
        assert_eq!(Became::of(&read, &Answer::Spec { spec: None }), None);
        assert_eq!(Became::of(&read, &refused(Refusal::Failed)), None);
        for (asked, kind) in [(&read, Refusal::NotPermitted), (&change, Refusal::Failed)] {
            let became = Became::of(asked, &refused(kind)).unwrap();
            assert_eq!(became.result, Outcome::Refused);
            assert_eq!(became.refused, Some((kind, "no".to_owned())));
        }
        let answer = Answer::HostKeys {
            changed: true,
            host_keys: Vec::new(),
        };
        assert_eq!(Became::of(&change, &answer).unwrap().result, Outcome::Changed);
    }
}
