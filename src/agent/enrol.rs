//! A certificate for our TLS key: when it is asked for, and whether an answer is believed.
//!
//! The first one by the enrolment token, which is used up by it; later ones by the certificate before.
//! May not live here: HTTP (`health::enrol`), what makes a chain ours (`identity::certificate`).

use std::time::Duration;

use portcullis_protocol::Spec;
use portcullis_protocol::control::{Answer, Refusal};
use portcullis_protocol::enrolment::{ENROLMENT_VERSION, EnrolmentAnswer, EnrolmentRequest};
use portcullis_protocol::identity::{from_hex, to_hex};
use ring::hmac;
use ring::rand::SecureRandom as _;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

use super::control::refused;
use super::first_contact::mac_key;
use super::report_access;
use super::state::Store;
use super::{Agent, Scope};
use crate::health::enrol::Errand;
use crate::identity::TlsIdentity;
use crate::identity::certificate::{Certified, Expected, beginnings};
use crate::log::id;
use crate::system::clock;

const PENDING_FILE: &str = "enrolment-request.json";
const MAX_BYTES: usize = 64 << 10;
/// An answer tells the time only if the question is younger than this: it may have been held back.
const FRESH: Duration = Duration::from_secs(600);
/// When a renewal that could not be asked for is looked at again, in seconds.
const AGAIN_S: i64 = 300;

/// A request that is not answered yet.
struct Asked {
    request: EnrolmentRequest,
    renewal: bool,
    /// When it was made, as time since boot; none if an earlier process made it.
    made: Option<Duration>,
}

/// What is asked of the control plane.
pub(super) struct Enrolment {
    asked: Option<Asked>,
    errand: watch::Sender<Option<Errand>>,
    /// When the certificate is to be renewed. No clock that can be set has a say in it while we run.
    renew_at: Option<Instant>,
}

impl Enrolment {
    /// What an earlier process asked, and the certificate that it got.
    pub(super) fn load(store: &Store, identity: &TlsIdentity, spec: Option<&Spec>) -> Self {
        for begins in beginnings(spec.and_then(Spec::client_ca).unwrap_or_default()) {
            identity.clock().not_before(begins);
        }
        // One that can't be read is made anew: then the control plane wants a new token, if it had answered.
        let request = store.load::<EnrolmentRequest>(PENDING_FILE, MAX_BYTES);
        let request = request.unwrap_or_else(|error| {
            warn!(MESSAGE_ID = id::DEGRADED, %error, "the request that was sent is lost, another is made: {error}");
            None
        });
        let certified = spec.and_then(|spec| identity.certified(spec.instance.id.as_str()));
        let renew_in = certified.map(|certified| certified.renewal_in(identity.clock().now()));
        Self {
            asked: request.map(|request| Asked {
                request,
                renewal: false,
                made: None,
            }),
            errand: watch::Sender::default(),
            renew_at: renew_in.map(after),
        }
    }

    fn carry(&self, errand: Option<Errand>) {
        self.errand.send_if_modified(|last| {
            let is_new = *last != errand;
            *last = errand;
            is_new
        });
    }
}

fn after(seconds: i64) -> Instant {
    Instant::now() + Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
}

impl Agent {
    /// What is to be carried to the control plane.
    pub fn errands(&self) -> watch::Receiver<Option<Errand>> {
        self.enrolment.errand.subscribe()
    }

    /// When the certificate is to be renewed, unless that is under way.
    pub fn renewal_due(&self) -> Option<Instant> {
        let is_idle = self.enrolment.errand.borrow().is_none();
        let can = self.trial.is_none()
            && self
                .spec
                .as_deref()
                .is_some_and(|spec| spec.enrol_url().is_some());
        self.enrolment.renew_at.filter(|_| is_idle && can)
    }

    /// Asks for a certificate, if one is needed.
    pub(super) fn tend_enrolment(&mut self) {
        // A spec on trial may name another instance, or another control plane.
        if self.trial.is_some() {
            return;
        }
        let errand = self.wanted_errand().unwrap_or_else(|reason| {
            warn!(
                MESSAGE_ID = id::ENROLMENT_FAILED,
                REASON = reason,
                "no certificate can be asked for: {reason}"
            );
            None
        });
        // Due, and it could not be asked for: it is looked at again, and not in a circle.
        if errand.is_none() && self.enrolment.renew_at.is_some_and(|at| at <= Instant::now()) {
            self.enrolment.renew_at = Some(after(AGAIN_S));
        }
        self.enrolment.carry(errand);
    }

    fn wanted_errand(&mut self) -> Result<Option<Errand>, String> {
        let Some(spec) = self.spec.clone() else {
            return Ok(None);
        };
        let Some(url) = spec.enrol_url() else {
            return Ok(None);
        };
        let instance = spec.instance.id.as_str();
        let renewal = match self.token() {
            Some(_) => false,
            None if self.identity.certified(instance).is_none() => return Ok(None),
            None if self.enrolment.renew_at.is_some_and(|at| at > Instant::now()) => return Ok(None),
            None => true,
        };
        // sshd's keys are made while it starts for the first time: there is an event when they are there.
        if !renewal && self.seen.sshd.host_keys.is_empty() {
            return Ok(None);
        }
        let stands = |asked: &Asked| asked.renewal == renewal && self.still_fits(asked, instance);
        if !self.enrolment.asked.as_ref().is_some_and(stands) {
            let request = self.new_request(instance)?;
            if !renewal {
                // The same one is sent again after a restart: another one would be a second enrolment.
                let kept = self.store.save(PENDING_FILE, &request);
                kept.map_err(|e| e.to_string())?;
            }
            let made = Some(clock::since_boot());
            self.enrolment.asked = Some(Asked {
                request,
                renewal,
                made,
            });
        }
        let shown = self.identity.certified(instance).filter(|_| renewal);
        let shown = shown.map(|certified| (certified.pem, self.identity.key_pem()));
        let time = self.identity.clock().what_is_known();
        let asked = self.enrolment.asked.as_ref();
        let request = asked.map(|asked| &asked.request);
        Ok(Some(Errand {
            url: url.as_str().to_owned(),
            body: serde_json::to_string(&request).map_err(|e| e.to_string())?,
            access: report_access::for_enrolment(&self.settings.report, shown, time),
        }))
    }

    fn still_fits(&self, asked: &Asked, instance: &str) -> bool {
        let request = &asked.request;
        let is_bound = match (self.token(), &request.mac) {
            (Some(token), Some(mac)) => {
                let mac = from_hex(mac).unwrap_or_default();
                hmac::verify(&mac_key(token), &request.message(), &mac).is_ok()
            }
            (None, None) => true,
            _ => false,
        };
        is_bound && request.instance == instance
    }

    fn new_request(&self, instance: &str) -> Result<EnrolmentRequest, String> {
        let mut nonce = [0; 32];
        ring::rand::SystemRandom::new()
            .fill(&mut nonce)
            .map_err(|_| "the system gives no random numbers")?;
        let mut request = EnrolmentRequest {
            version: ENROLMENT_VERSION,
            instance: instance.to_owned(),
            nonce: to_hex(&nonce),
            csr: self.identity.signing_request().map_err(|e| e.to_string())?,
            host_keys: self.seen.sshd.host_keys.clone(),
            mac: None,
        };
        request.mac = self.token().map(|token| {
            let mac = hmac::sign(&mac_key(token), &request.message());
            to_hex(mac.as_ref())
        });
        Ok(request)
    }

    /// Takes the control plane's answer, if it proves itself: by the token, or by the authority that certified us
    /// before; made for our question, our key and our instance.
    pub(super) async fn enrolled(&mut self, answer: &EnrolmentAnswer) -> Answer {
        let (certified, is_fresh, renewal) = match self.judged(answer) {
            Ok(judged) => judged,
            Err(reason) => {
                return refused(
                    Refusal::NotPermitted,
                    format!("an answer that proves nothing: {reason}"),
                );
            }
        };
        let kept = self.store.folder().map_err(|e| e.to_string());
        let kept = kept.and_then(|state| {
            let certify = self.identity.certify(state, certified.clone());
            certify.map_err(|e| e.to_string())
        });
        if let Err(reason) = kept {
            return refused(Refusal::Failed, reason);
        }
        if is_fresh {
            self.prove_time(certified.issued());
        } else {
            self.identity.clock().not_before(certified.issued());
        }
        if !renewal && let Err(error) = self.use_up_token("enrolment").await {
            return refused(Refusal::Failed, error.to_string());
        }
        if let Err(error) = self.store.remove(PENDING_FILE) {
            warn!(MESSAGE_ID = id::DEGRADED, %error, "an answered request stays on disk");
        }
        self.enrolment.asked = None;
        self.enrolment.renew_at = Some(after(certified.use_s()));
        self.enrolment.carry(None);
        let ends = jiff::Timestamp::from_second(certified.ends).unwrap_or_default();
        info!(
            MESSAGE_ID = id::ENROLLED,
            RENEWAL = renewal,
            ENDS = %ends,
            "the control plane certified the TLS key until {ends}"
        );
        self.tell_front();
        self.reconcile(&[Scope::Endpoint].into()).await;
        Answer::Done
    }

    /// The certificate, whether it tells the time, and whether it is a renewal.
    fn judged(&self, answer: &EnrolmentAnswer) -> Result<(Certified, bool, bool), String> {
        let (Some(asked), Some(spec), None) = (&self.enrolment.asked, self.spec.as_deref(), &self.trial)
        else {
            return Err("nothing was asked".to_owned());
        };
        let request = &asked.request;
        let before = self.identity.certified(&request.instance);
        let authority = match (asked.renewal, self.token(), &before) {
            (false, Some(token), _) => {
                let mac = answer.mac.as_deref().and_then(from_hex).unwrap_or_default();
                hmac::verify(&mac_key(token), &request.answer_message(&answer.chain), &mac)
                    .map_err(|_| "its MAC was not made with the enrolment token, for this request")?;
                None
            }
            (true, None, Some(before)) => before.authority(),
            _ => return Err("another token holds than when it was asked".to_owned()),
        };
        let expected = Expected {
            nonce: Some(&request.nonce),
            authority,
            client_ca: spec.client_ca(),
        };
        let instance = spec.instance.id.as_str();
        let spki = &self.identity.spki_sha256;
        let certified = Certified::new(&answer.chain, instance, spki, expected)?;
        let is_fresh = asked
            .made
            .is_some_and(|made| clock::since_boot().saturating_sub(made) <= FRESH);
        Ok((certified, is_fresh, asked.renewal))
    }
}
