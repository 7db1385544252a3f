//! Changing an instance after launch, through its agent: each change is durable and enforced there when
//! its answer is here.
//!
//! May not live here: which change is wanted (the commands and `cluster`).

use std::time::Duration;

use jiff::Timestamp;
use portcullis_protocol::spec::MAX_SPEC_BYTES;
use portcullis_protocol::{AuthorizedKey, FirewallRule, Peer, Spec};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{AgentClient, ClientError, Question, parse, success};

/// How long a change may take: the agent asks sshd about keys before it answers.
const CHANGE_TIME: Duration = Duration::from_secs(30);

/// What came of a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// The generation that holds.
    pub generation: u64,
    /// Whether anything had to be changed.
    pub changed: bool,
    /// Until when it has to be confirmed; none if it holds for good.
    pub confirm_until: Option<Timestamp>,
    /// Whether the instance is ready with it.
    pub ready: bool,
}

/// How a change is made that could cut somebody off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// It is taken back unless it is confirmed within this time (5 s to 24 h); [`AgentClient`] confirms it
    /// at once, over a new connection.
    pub confirm: Option<Duration>,
    /// It is made even if it cuts somebody off.
    pub force: bool,
}

impl Terms {
    fn query(self) -> String {
        match (self.confirm, self.force) {
            (Some(time), force) => format!("?confirm={}s&force={force}", time.as_secs()),
            (None, true) => "?force=true".to_owned(),
            (None, false) => String::new(),
        }
    }
}

/// Each fails when the agent does not answer, is not who was pinned, refuses the certificate, or refuses the
/// change; then nothing changed. A change that is made already is no error, so that each can be tried again.
impl AgentClient {
    /// The accepted spec, or the one on trial. Its secrets are left out.
    ///
    /// # Errors
    /// As all of these.
    pub async fn spec(&self) -> Result<Spec, ClientError> {
        let path = "/v1/spec";
        let mut question = Question::get(path);
        (question.time, question.longest) = (CHANGE_TIME, MAX_SPEC_BYTES + 4096);
        let answer = self.ask(question, self.required_pin()?).await?;
        parse(path, &success(path, &answer)?.body)
    }

    /// Replaces the spec, if generation `known` is the accepted one. Secrets that are left out are kept.
    ///
    /// # Errors
    /// As all of these; status 412 if another generation holds.
    pub async fn replace_spec(&self, spec: &Spec, known: u64, terms: Terms) -> Result<Changed, ClientError> {
        let path = format!("/v1/spec{}", terms.query());
        let mut question = Question::new("PUT", &path, spec.to_json());
        question.if_match = Some(format!("\"{known}\""));
        self.change(question).await
    }

    /// Lets something in, in addition.
    ///
    /// # Errors
    /// As all of these; status 409 if another rule has the id.
    pub async fn add_rule(&self, rule: &FirewallRule) -> Result<Changed, ClientError> {
        let question = Question::new("POST", "/v1/firewall/rules", json!(rule).to_string());
        self.change(question).await
    }

    /// Lets something in no longer; sessions that it let in end.
    ///
    /// # Errors
    /// As all of these; status 404 if there is no such rule, 409 if it could cut somebody off.
    pub async fn revoke_rule(&self, id: &str, terms: Terms) -> Result<Changed, ClientError> {
        let path = format!("/v1/firewall/rules/{}{}", escaped(id), terms.query());
        self.change(Question::new("DELETE", &path, "")).await
    }

    /// Lets a peer in, on all ports and protocols; its addresses replace those that it had.
    ///
    /// # Errors
    /// As all of these; status 409 if the instance is in no cluster.
    pub async fn add_peer(&self, peer: &Peer) -> Result<Changed, ClientError> {
        let path = format!("/v1/cluster/peers/{}", escaped(peer.instance.as_str()));
        let body = json!({"addresses": peer.addresses}).to_string();
        self.change(Question::new("PUT", &path, body)).await
    }

    /// Lets a peer in no longer.
    ///
    /// # Errors
    /// As all of these; status 404 if there is no such peer, 409 if it is the last one.
    pub async fn revoke_peer(&self, instance: &str, terms: Terms) -> Result<Changed, ClientError> {
        let path = format!("/v1/cluster/peers/{}{}", escaped(instance), terms.query());
        self.change(Question::new("DELETE", &path, "")).await
    }

    /// Lets a key in, in addition.
    ///
    /// # Errors
    /// As all of these; status 409 if the user has it with other options or another end.
    pub async fn add_key(&self, key: &AuthorizedKey) -> Result<Changed, ClientError> {
        let question = Question::new("POST", "/v1/keys", json!(key).to_string());
        self.change(question).await
    }

    /// Lets a key in no longer, whoever named it. `fingerprint` is `SHA256:…`, or what follows that.
    ///
    /// # Errors
    /// As all of these; status 404 if there is no such key, 409 if it is the last one.
    pub async fn revoke_key(&self, fingerprint: &str, terms: Terms) -> Result<Changed, ClientError> {
        let path = format!("/v1/keys/{}{}", escaped(fingerprint), terms.query());
        self.change(Question::new("DELETE", &path, "")).await
    }

    /// Keeps the spec that is on trial. Each question is a new connection, which is what it proves.
    ///
    /// # Errors
    /// As all of these; status 409 if that generation is not on trial.
    pub async fn confirm(&self, generation: u64) -> Result<Changed, ClientError> {
        let path = format!("/v1/confirm/{generation}");
        self.asked(Question::new("POST", &path, "")).await
    }

    async fn change(&self, question: Question) -> Result<Changed, ClientError> {
        let changed = self.asked(question).await?;
        match changed.confirm_until {
            Some(_) => self.confirm(changed.generation).await,
            None => Ok(changed),
        }
    }

    async fn asked(&self, mut question: Question) -> Result<Changed, ClientError> {
        question.time = CHANGE_TIME;
        let path = question.path.clone();
        let answer = self.ask(question, self.required_pin()?).await?;
        parse(&path, &success(&path, &answer)?.body)
    }
}

/// One segment of a path (RFC 3986 section 2.1): all but unreserved characters are escaped.
fn escaped(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_holds_no_separator() {
        assert_eq!(escaped("SHA256:a/b+c"), "SHA256%3Aa%2Fb%2Bc");
        assert_eq!(escaped("?x=1#é"), "%3Fx%3D1%23%C3%A9");
        assert_eq!(escaped("web-1.a_b~"), "web-1.a_b~");
    }

    #[test]
    fn terms_are_said_in_the_query() {
        assert_eq!(Terms::default().query(), "");
        let minute = Some(Duration::from_secs(60));
        let trial = |force| Terms {
            confirm: minute,
            force,
        };
        assert_eq!(trial(false).query(), "?confirm=60s&force=false");
        let force = Terms {
            confirm: None,
            force: true,
        };
        assert_eq!(force.query(), "?force=true");
    }
}
