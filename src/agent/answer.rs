//! Answers to callers: local ones, and the control plane.
//!
//! May not live here: what is accepted (`accept`), the socket (`control`).

use std::time::Duration;

use portcullis_protocol::control::{Answer, Refusal, Request};
use portcullis_protocol::{FirewallRule, Peer, Report, Spec};

use super::Agent;
use super::accept::{Refused, Terms, log_refusal};
use super::control::{Caller, refused};

impl Agent {
    /// Answers a caller.
    pub async fn answer(&mut self, request: Request, caller: Caller) -> Answer {
        let name = request.name();
        let answer = match self.admit(&request, &caller) {
            Ok(_) => self.answer_to(request, &caller).await,
            Err(denial) => refused(Refusal::NotPermitted, denial.to_string()),
        };
        self.metrics.answered(name, &caller, &answer);
        answer
    }

    async fn answer_to(&mut self, request: Request, caller: &Caller) -> Answer {
        let (request, if_generation) = match request {
            Request::IfGeneration { generation, change } => (*change, Some(generation)),
            request => (request, None),
        };
        let terms = |confirm_s: Option<u64>, force| Terms {
            confirm: confirm_s.map(Duration::from_secs),
            force,
            remote: matches!(caller, Caller::Remote(_)),
            if_generation,
        };
        if matches!(request, Request::Status | Request::Watch) {
            self.look_at_state();
            self.look_at_exposure_again().await;
        }
        match request {
            Request::Spec => Answer::Spec {
                spec: self.shown_spec(caller).map(Box::new),
            },
            Request::Status => match &self.report {
                Some(report) => Answer::Report {
                    report: Box::new(Report::clone(report)),
                },
                None => refused(Refusal::Failed, "the first report is not there yet"),
            },
            Request::Watch => match self.situation() {
                Some(situation) => Answer::Situation {
                    situation: Box::new(situation),
                },
                None => refused(Refusal::Failed, "the first report is not there yet"),
            },
            Request::Denied { top } => match self.denied.sample(top) {
                Ok(sample) => Answer::Denied { sample },
                Err(reason) => refused(Refusal::Failed, reason),
            },
            Request::Apply {
                spec,
                confirm_s,
                force,
            } => {
                let terms = terms(confirm_s, force);
                let spec = self.completed(*spec, terms);
                let result = self.accept(spec, terms.source("apply"), terms).await;
                self.applied(result)
            }
            Request::AddRule { rule } => {
                let change = |spec: &mut Spec| add_rule(spec, rule);
                let terms = terms(None, false);
                let result = self.change_spec(terms.source("firewall"), change, terms).await;
                self.applied(result)
            }
            Request::RevokeRule { id, confirm_s, force } => {
                let terms = terms(confirm_s, force);
                let change = |spec: &mut Spec| revoke_rule(spec, &id);
                let result = self.change_spec(terms.source("firewall"), change, terms).await;
                self.applied(result)
            }
            Request::AddKey { key } => {
                let result = self.add_key(key, terms(None, false)).await;
                self.applied(result)
            }
            Request::RevokeKey {
                fingerprint,
                confirm_s,
                force,
            } => {
                let terms = terms(confirm_s, force);
                let result = self.revoke_key(&fingerprint, terms).await;
                self.applied(result)
            }
            Request::AddPeer { peer } => {
                let terms = terms(None, false);
                let change = |spec: &mut Spec| add_peer(spec, peer);
                let result = self.change_spec(terms.source("cluster"), change, terms).await;
                self.applied(result)
            }
            Request::RevokePeer {
                instance,
                confirm_s,
                force,
            } => {
                let terms = terms(confirm_s, force);
                let change = |spec: &mut Spec| revoke_peer(spec, &instance);
                let result = self.change_spec(terms.source("cluster"), change, terms).await;
                self.applied(result)
            }
            Request::IfGeneration { .. } => refused(Refusal::BadInput, "a condition is for one change"),
            Request::Access => self.access(false),
            Request::RevokeAccess { role } => self.revoke_access(role, caller),
            Request::RestoreAccess { role } => self.restore_access(role, caller),
            Request::HandshakeRefused { reason } => self.handshake_refused(reason, caller),
            Request::CallRefused {
                status: 403, detail, ..
            } => refused(Refusal::NotPermitted, detail),
            Request::CallRefused { detail, .. } => refused(Refusal::BadInput, detail),
            Request::TrustHostKeys => self.trust_host_keys(caller).await,
            Request::Metrics => self.metrics(),
            Request::Identity { nonce } => self.identity_document(&nonce),
            Request::FirstContact { contact } => self.first_contact(contact).await,
            Request::Enrolled { answer } => self.enrolled(&answer).await,
            Request::Confirm { generation } => {
                let result = self.confirm(generation, caller);
                self.applied(result.map(|()| true))
            }
        }
    }

    /// The spec for a caller. Secrets are not even told to the process that a remote caller is connected to.
    fn shown_spec(&self, caller: &Caller) -> Option<Spec> {
        let spec = self.spec.as_deref()?;
        Some(match caller {
            Caller::Local(_) => spec.clone(),
            Caller::Remote(_) => spec.without_secrets(),
        })
    }

    /// The control plane is shown no secrets, so it can't send them back.
    fn completed(&self, mut spec: Spec, terms: Terms) -> Spec {
        if let Some(accepted) = self.spec.as_deref().filter(|_| terms.remote) {
            spec.keep_secrets_of(accepted);
        }
        spec
    }

    /// Accepts the accepted spec with a change, as the next generation.
    pub(super) async fn change_spec(
        &mut self,
        source: &str,
        change: impl FnOnce(&mut Spec) -> Result<bool, Refused>,
        terms: Terms,
    ) -> Result<bool, Refused> {
        let Some(accepted) = &self.spec else {
            let reason = "no spec is accepted yet: there is nothing to change; `portcullis apply` one first";
            return Err((Refusal::Superseded, reason.to_owned()));
        };
        let mut spec = Spec::clone(accepted);
        let changed = change(&mut spec);
        if changed == Ok(false) {
            return Ok(false);
        }
        // Before what is wrong with the change: the caller thought of another spec.
        self.check_generation(terms)?;
        changed?;
        spec.generation = spec.generation.next();
        self.accept(spec, source, terms).await
    }

    fn applied(&self, result: Result<bool, Refused>) -> Answer {
        match (result, &self.report, &self.spec) {
            (Ok(changed), Some(report), Some(spec)) => Answer::Applied {
                generation: spec.generation.get(),
                changed,
                confirm_until: self.trial.as_ref().map(|trial| trial.until),
                report: Box::new(Report::clone(report)),
            },
            (Ok(_), ..) => refused(Refusal::Failed, "there is no report yet"),
            (Err((kind, reason)), ..) => {
                log_refusal(&reason);
                refused(kind, reason)
            }
        }
    }
}

/// The same rule again is no change; another one of the same id is refused.
fn add_rule(spec: &mut Spec, rule: FirewallRule) -> Result<bool, Refused> {
    match spec.firewall.ingress.iter().find(|old| old.id == rule.id) {
        Some(old) if *old == rule => return Ok(false),
        Some(old) => {
            let reason = format!("rule {old} is there already: revoke it first, or choose another id");
            return Err((Refusal::Conflict, reason));
        }
        None => spec.firewall.ingress.push(rule),
    }
    spec.check().map_err(|e| (Refusal::BadInput, e.to_string()))?;
    Ok(true)
}

fn revoke_rule(spec: &mut Spec, id: &str) -> Result<bool, Refused> {
    let before = spec.firewall.ingress.len();
    spec.firewall.ingress.retain(|rule| rule.id.as_str() != id);
    if spec.firewall.ingress.len() < before {
        return Ok(true);
    }
    let known: Vec<&str> = spec
        .firewall
        .ingress
        .iter()
        .map(|rule| rule.id.as_str())
        .collect();
    let reason = format!("there is no rule {id:?}; the rules are: {}", known.join(", "));
    Err((Refusal::NotFound, reason))
}

/// The same peer again is no change; other addresses replace those that it had.
fn add_peer(spec: &mut Spec, peer: Peer) -> Result<bool, Refused> {
    let Some(cluster) = &mut spec.cluster else {
        let reason = "the spec names no cluster, so it can't have peers: put a spec with `cluster` first";
        return Err((Refusal::Conflict, reason.to_owned()));
    };
    match cluster.peers.iter_mut().find(|old| old.instance == peer.instance) {
        Some(old) if *old == peer => return Ok(false),
        Some(old) => *old = peer,
        None => cluster.peers.push(peer),
    }
    spec.check().map_err(|e| (Refusal::BadInput, e.to_string()))?;
    Ok(true)
}

fn revoke_peer(spec: &mut Spec, instance: &str) -> Result<bool, Refused> {
    let cluster = spec.cluster.as_mut();
    let peers = cluster.map(|cluster| &mut cluster.peers);
    if let Some(peers) = peers {
        let before = peers.len();
        peers.retain(|peer| peer.instance.as_str() != instance);
        if peers.len() < before {
            return Ok(true);
        }
    }
    Err((Refusal::NotFound, format!("there is no peer {instance:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(instance: &str, address: &str) -> Peer {
        let address: std::net::IpAddr = address.parse().unwrap();
        Peer {
            instance: instance.parse().unwrap(),
            addresses: vec![address.try_into().unwrap()],
        }
    }

    #[test]
    fn peers_join_move_and_leave() {
        let json = br#"{"version":1,"generation":1,"instance":{"id":"i-1"},"cluster":{"id":"c","peers":[]}}"#;
        let mut spec = Spec::from_json(json).unwrap();
        assert_eq!(add_peer(&mut spec, peer("i-2", "10.0.0.2")), Ok(true));
        assert_eq!(add_peer(&mut spec, peer("i-2", "10.0.0.2")), Ok(false));
        assert_eq!(add_peer(&mut spec, peer("i-2", "10.0.0.3")), Ok(true));
        let addresses: Vec<_> = spec.peer_addresses().collect();
        assert_eq!(addresses, ["10.0.0.3".parse::<std::net::IpAddr>().unwrap()]);
        for (bad, word) in [
            (peer("i-1", "10.0.0.9"), "this instance itself"),
            (peer("i-3", "10.0.0.3"), "already an address"),
        ] {
            let (kind, reason) = add_peer(&mut spec.clone(), bad).unwrap_err();
            assert!(
                kind == Refusal::BadInput && reason.contains(word),
                "{kind:?} {reason}"
            );
        }
        assert_eq!(revoke_peer(&mut spec, "i-2"), Ok(true));
        assert_eq!(revoke_peer(&mut spec, "i-2").unwrap_err().0, Refusal::NotFound);
        spec.cluster = None;
        let refused = add_peer(&mut spec, peer("i-2", "10.0.0.2"));
        assert_eq!(refused.unwrap_err().0, Refusal::Conflict);
    }
}
