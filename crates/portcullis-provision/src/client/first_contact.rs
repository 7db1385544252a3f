//! First contact: whose keys they are, proven by the enrolment token; and that it need not be proven again.
//!
//! May not live here: where pins are kept.

use portcullis_protocol::Secret;
use portcullis_protocol::identity::{FirstContact, Identity, from_hex, to_hex};
use ring::hmac;
use ring::rand::SecureRandom as _;

use super::{AgentClient, ClientError, PinnedIdentity, Question, parse, success};

/// A proven first contact.
#[derive(Clone, Debug)]
pub struct Contact {
    /// What is to be pinned.
    pub identity: PinnedIdentity,
    /// What the instance wants to see answered before it forgets its token; `None` from an agent that keeps it.
    challenge: Option<String>,
    instance: String,
}

impl AgentClient {
    /// First contact: asks for the identity document and proves it with the enrolment token. The
    /// result is to be pinned.
    ///
    /// # Errors
    /// As [`AgentClient::first_contact`].
    pub async fn enrol(&self, token: &Secret, instance: &str) -> Result<PinnedIdentity, ClientError> {
        Ok(self.first_contact(token, instance).await?.identity)
    }

    /// As [`AgentClient::enrol`], so that it can be ended with [`AgentClient::finish`] once the result is kept.
    ///
    /// # Errors
    /// When the agent does not answer, or anything in the document does not fit: the token, the
    /// nonce, the instance, or the key that this very connection showed.
    pub async fn first_contact(&self, token: &Secret, instance: &str) -> Result<Contact, ClientError> {
        let mut nonce = [0; 32];
        ring::rand::SystemRandom::new()
            .fill(&mut nonce)
            .map_err(|_| ClientError::Certificate("the system gives no random numbers".into()))?;
        let nonce = to_hex(&nonce);
        let path = format!("/v1/identity?nonce={nonce}");
        let answer = self.get(&path, self.pin.clone()).await?;
        let identity: Identity = parse(&path, &success(&path, &answer)?.body)?;
        let refuse = |reason: &str| ClientError::NotProven {
            address: self.address,
            reason: reason.into(),
        };
        let mac = from_hex(&identity.mac).ok_or_else(|| refuse("its MAC is not hex"))?;
        // ring compares in constant time.
        hmac::verify(&mac_key(token), &identity.message(), &mac)
            .map_err(|_| refuse("its MAC was not made with this instance's enrolment token"))?;
        if identity.nonce != nonce {
            return Err(refuse("it answers another question (a replay)"));
        }
        if identity.instance != instance {
            return Err(refuse(&format!(
                "it is for instance {:?}, not {instance:?}",
                identity.instance
            )));
        }
        if identity.tls_spki_sha256 != answer.spki {
            return Err(refuse(
                "it names another TLS key than the one that this connection shows",
            ));
        }
        for key in identity.host_keys.iter().filter(|key| key.key.is_some()) {
            // The MAC is over fingerprints.
            key.verified_key().map_err(|reason| refuse(&reason))?;
        }
        Ok(Contact {
            identity: PinnedIdentity {
                tls_spki_sha256: answer.spki,
                host_keys: identity.host_keys,
            },
            challenge: identity.challenge,
            instance: instance.to_owned(),
        })
    }

    /// Tells the instance that its keys are pinned, for good: it forgets the token, and takes our time for the
    /// right one. Call it once the pin is kept, within a minute of the contact.
    ///
    /// # Errors
    /// When the agent does not answer, is not who was pinned, or refuses the proof.
    pub async fn finish(&self, token: &Secret, contact: &Contact) -> Result<(), ClientError> {
        let Some(challenge) = contact.challenge.clone() else {
            return Ok(());
        };
        let pin = contact.identity.tls_spki_sha256.clone();
        let mut proof = FirstContact {
            instance: contact.instance.clone(),
            tls_spki_sha256: pin.clone(),
            challenge,
            time: jiff::Timestamp::now(),
            mac: String::new(),
        };
        proof.mac = to_hex(hmac::sign(&mac_key(token), &proof.message()).as_ref());
        let path = "/v1/identity/done";
        let body = serde_json::to_vec(&proof).unwrap_or_default();
        let answer = self.ask(Question::new("POST", path, body), Some(pin)).await?;
        success(path, &answer).map(drop)
    }
}

fn mac_key(token: &Secret) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, token.expose().as_bytes())
}
