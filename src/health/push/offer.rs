//! What the agent and the pusher tell each other. The agent keeps the reports and the credentials; the pusher
//! speaks to the network.
//!
//! All of it can be sent to another process. May not live here: files, sockets.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use portcullis_protocol::{Report, Secret};
use serde::{Deserialize, Serialize};

use crate::identity::time::KnownTime;

/// What the agent wants delivered, as it stands now.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Offer {
    /// The receiver; none: nothing is pushed.
    pub url: Option<String>,
    /// The oldest change that was not delivered yet. It is offered until the pusher says that it was.
    pub change: Option<Change>,
    /// The newest report, which is told on the interval. To another process it is told by itself.
    #[serde(skip)]
    pub newest: Option<Arc<Report>>,
    /// The newest report is told at once when this is another number than before.
    pub nudge: u64,
    /// The stream that sequence numbers count in: 16 hex digits, new with a new state folder.
    pub stream: String,
    /// The number of the last change, delivered or not.
    pub last: u64,
    /// How many changes were dropped for want of room since the stream began.
    pub dropped: u64,
    /// What the receiver is trusted by, and who we are to it; or why that can't be said.
    pub access: Arc<Result<Access, String>>,
    /// How often the credentials' files were read.
    pub reads: u64,
    /// Time between two reports when nothing changes.
    pub interval: Duration,
}

impl Default for Offer {
    fn default() -> Self {
        Self {
            url: None,
            change: None,
            newest: None,
            nudge: 0,
            stream: String::new(),
            last: 0,
            dropped: 0,
            access: Arc::new(Err("the credentials were not read yet".to_owned())),
            reads: 0,
            interval: Duration::from_secs(300),
        }
    }
}

/// A report that tells of a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Its number in the stream, from 1 and without a gap.
    pub sequence: u64,
    /// The report, as JSON.
    pub body: Arc<str>,
}

/// How the receiver and we know each other, with all that was read from files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Access {
    /// Authorities that the receiver and the token endpoint are checked against, as PEM; the system's own if
    /// there are none.
    pub authorities: Option<String>,
    /// Who we are.
    pub proof: Proof,
    /// What is known of the time, by which certificates are judged.
    pub time: KnownTime,
}

impl Access {
    /// The certificate that is shown in the handshake.
    pub fn shown(&self) -> Option<(&str, &Secret)> {
        match &self.proof {
            Proof::Certificate { chain, key } => Some((chain, key)),
            _ => None,
        }
    }
}

/// How we prove who we are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Proof {
    /// Not at all.
    None,
    /// By a certificate in the TLS handshake.
    Certificate {
        /// The certificate and those between it and the authority, as PEM.
        chain: String,
        /// Its key, as PEM.
        key: Secret,
    },
    /// By a token (RFC 6750).
    Bearer(Secret),
    /// By what the platform says of the instance.
    Instance {
        /// Whose metadata service is asked.
        platform: Platform,
        /// Whom a GCE identity token is for; the receiver's URL without its query, if there is none.
        audience: Option<String>,
    },
    /// By a token that a service account's key is exchanged for (RFC 8693).
    ServiceAccount {
        /// The key.
        key: ServiceKey,
        /// Where: an https URL.
        token_url: String,
        /// The assertion's `aud`, if it has one.
        audience: Option<String>,
    },
}

/// Clouds that prove an instance's identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Platform {
    /// Amazon EC2: the signed instance identity document.
    Aws,
    /// Google Compute Engine: an identity token (JWT).
    Gce,
    /// Microsoft Azure: attested data.
    Azure,
}

/// The key of a service account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceKey {
    /// The key's id (`kid`).
    pub id: String,
    /// Who signs (`iss`).
    pub issuer: String,
    /// For whom (`sub`).
    pub subject: String,
    /// An RSA key as PEM (PKCS #8 or PKCS #1).
    pub private_key: Secret,
}

/// What the pusher tells the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Said {
    /// The receiver took a report: the change of that number, or the newest report.
    Delivered {
        /// The change; none for the newest report.
        change: Option<u64>,
    },
    /// The receiver took no report.
    Failed {
        /// Why, for the operator.
        reason: String,
    },
    /// The receiver refuses this change and would take others: it is given up.
    GivenUp {
        /// The change.
        change: u64,
        /// Why, for the operator.
        reason: String,
    },
    /// The receiver does not accept who we are: the files are to be read again.
    Unauthorized,
}

/// How pushing goes, for metrics and for people.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PushState {
    /// Whether there is a receiver.
    pub configured: bool,
    /// Changes that wait.
    pub queued: u64,
    /// Since when the oldest of them waits.
    pub oldest: Option<Timestamp>,
    /// Changes that were dropped for want of room, since the state folder was made.
    pub dropped: u64,
    /// When the receiver last took a report.
    pub last_success: Option<Timestamp>,
    /// Why it did not take the last one; none after it took one.
    pub last_error: Option<String>,
    /// Reports that the receiver took since the daemon started.
    pub delivered: u64,
    /// Tries that failed since the daemon started.
    pub failed: u64,
}
