//! Answers to local callers.
//!
//! May not live here: what is accepted (`accept`), the socket (`control`).

use std::time::Duration;

use portcullis_protocol::control::{Answer, Refusal, Request};
use portcullis_protocol::{FirewallRule, Report, Spec};

use super::Agent;
use super::accept::{Refused, Terms, log_refusal};
use super::control::{Caller, refused};

impl Agent {
    /// Answers a local caller.
    pub async fn answer(&mut self, request: Request, caller: Caller) -> Answer {
        match request {
            Request::Spec => Answer::Spec {
                spec: self.spec.as_deref().cloned().map(Box::new),
            },
            Request::Status => match &self.report {
                Some(report) => Answer::Report {
                    report: Box::new(Report::clone(report)),
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
                let result = self.accept(*spec, "apply", terms(confirm_s, force)).await;
                self.applied(result)
            }
            Request::AddRule { rule } => {
                let change = |spec: &mut Spec| add_rule(spec, rule);
                let result = self.change_spec("firewall", change, Terms::default()).await;
                self.applied(result)
            }
            Request::RevokeRule { id, confirm_s, force } => {
                let terms = terms(confirm_s, force);
                let change = |spec: &mut Spec| revoke_rule(spec, &id);
                let result = self.change_spec("firewall", change, terms).await;
                self.applied(result)
            }
            Request::AddKey { key } => {
                let result = self.add_key(key).await;
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
            Request::TrustHostKeys => self.trust_host_keys(caller).await,
            Request::Confirm { generation } => {
                let result = self.confirm(generation, caller);
                self.applied(result.map(|()| true))
            }
        }
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
            return Err((Refusal::Failed, reason.to_owned()));
        };
        let mut spec = Spec::clone(accepted);
        if !change(&mut spec)? {
            return Ok(false);
        }
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

fn terms(confirm_s: Option<u64>, force: bool) -> Terms {
    Terms {
        confirm: confirm_s.map(Duration::from_secs),
        force,
    }
}

/// The same rule again is no change; another one of the same id is refused.
fn add_rule(spec: &mut Spec, rule: FirewallRule) -> Result<bool, Refused> {
    match spec.firewall.ingress.iter().find(|old| old.id == rule.id) {
        Some(old) if *old == rule => return Ok(false),
        Some(old) => {
            let reason = format!("rule {old} is there already: revoke it first, or choose another id");
            return Err((Refusal::BadInput, reason));
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
    Err((Refusal::BadInput, reason))
}
