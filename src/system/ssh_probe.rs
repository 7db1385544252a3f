//! Talking SSH to sshd, to see what it would do: its id, its host key, and whether it would accept a key
//! that is offered without a signature (RFC 4252 section 7). Nothing here can log in: there is no private
//! key, and the one who would have to sign refuses.
//!
//! Harmless by construction: a connection offers at most [`KEYS_PER_CONNECTION`] keys (`MaxAuthTries`) and
//! each comes from another loopback address, so that penalties for unfinished logins (`PerSourcePenalties`,
//! OpenSSH 9.8) add up for nobody. Over IPv6 there is one loopback address only, so IPv4 goes first, and being
//! refused for a penalty is an answer of its own. It takes its leave as "portcullis login probe", which sshd logs. Callers name only users that exist, for an unknown one
//! looks like an attack, and probe after a change, not by the clock.
//!
//! May not live here: which users and keys to ask for, what the answers mean.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use portcullis_protocol::report::HostKey;
use portcullis_protocol::{PublicKey, UserName};
use russh::client::{self, AuthResult, Handle, Handler};
use russh::keys::agent::AgentIdentity;
use russh::keys::{Algorithm, HashAlg, PublicKeyOrCertificate};
use russh::{Disconnect, MethodSet, SendError, Signer};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, BufReader, join};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::kexinit::{Noted, Tee, offered};
use crate::policy::observation::{Handshake, Observed, PENALISED};

/// Keys that one connection offers: from half of `MaxAuthTries` (6) on, OpenSSH logs each as a failure.
pub const KEYS_PER_CONNECTION: usize = 2;

/// Probes over IPv4 come from this network, 127.99.0.0/16.
const PROBE_NETWORK: [u8; 2] = [127, 99];

/// How long a connection may take, all in all.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Most bytes before the end of the server's id (RFC 4253 section 4.2: 255, and lines before it).
const MAX_ID: u64 = 4096;

/// What sshd answered.
#[derive(Debug)]
pub struct Probe {
    /// The first connection's handshake, with the methods that the user is offered.
    pub handshake: Observed<Handshake>,
    /// For each key, in order: whether sshd would accept it.
    pub accepted: Vec<Observed<bool>>,
}

/// A handshake with sshd, without asking for a user: the methods stay unknown.
pub async fn handshake(address: SocketAddr) -> Observed<Handshake> {
    connected(address, async |connection| connection.leave().await)
        .await
        .map(|(handshake, ())| handshake)
}

/// A handshake, the methods that sshd offers `user`, and whether it would accept each of `keys` for that
/// user; all on one connection if there are no more than [`KEYS_PER_CONNECTION`] keys.
pub async fn probe(address: SocketAddr, user: &UserName, keys: &[PublicKey]) -> Probe {
    let (first, rest) = keys.split_at(keys.len().min(KEYS_PER_CONNECTION));
    let seen = connected(address, async |mut connection| {
        let methods = connection.methods(user).await;
        let accepted = match &methods {
            Ok(_) => connection.offer_all(user, first).await,
            Err(reason) => vec![Err(reason.clone()); first.len()],
        };
        connection.leave().await;
        (methods, accepted)
    })
    .await;
    let (handshake, mut accepted) = match seen {
        Ok((handshake, (methods, accepted))) => (
            methods.map(|methods| Handshake { methods, ..handshake }),
            accepted,
        ),
        Err(reason) => (Err(reason.clone()), vec![Err(reason); first.len()]),
    };
    accepted.extend(offer_keys(address, user, rest).await);
    Probe { handshake, accepted }
}

/// For each key, in order: whether sshd would accept it for `user`.
pub async fn offer_keys(address: SocketAddr, user: &UserName, keys: &[PublicKey]) -> Vec<Observed<bool>> {
    let mut answers = Vec::new();
    for keys in keys.chunks(KEYS_PER_CONNECTION) {
        let seen = connected(address, async |mut connection| {
            let accepted = connection.offer_all(user, keys).await;
            connection.leave().await;
            accepted
        })
        .await;
        match seen {
            Ok((_, accepted)) => answers.extend(accepted),
            Err(reason) => answers.extend(vec![Err(reason); keys.len()]),
        }
    }
    answers
}

/// Connects, and does `work` on the connection, within [`TIMEOUT`].
async fn connected<T>(
    address: SocketAddr,
    work: impl AsyncFnOnce(Connection) -> T,
) -> Observed<(Handshake, T)> {
    let all = async {
        let (connection, handshake) = Connection::open(address).await?;
        Ok((handshake, work(connection).await))
    };
    timeout(TIMEOUT, all).await.unwrap_or_else(|_| {
        Err(format!(
            "sshd at {address} did not answer within {} s",
            TIMEOUT.as_secs()
        ))
    })
}

struct Connection {
    handle: Handle<Witness>,
}

impl Connection {
    async fn open(address: SocketAddr) -> Observed<(Self, Handshake)> {
        let stream = connect(address)
            .await
            .map_err(|error| format!("can't connect to sshd at {address}: {error}"))?;
        let (server_id, stream, noted) = read_id(stream).await?;
        let witness = Witness::default();
        let seen = witness.host_key.clone();
        let config = client::Config {
            inactivity_timeout: Some(TIMEOUT),
            ..client::Config::default()
        };
        let handle = client::connect_stream(Arc::new(config), stream, witness)
            .await
            .map_err(|error| format!("no SSH handshake with sshd at {address} ({server_id}): {error}"))?;
        let host_key = seen.lock().unwrap_or_else(PoisonError::into_inner).take();
        let host_key = host_key.ok_or("sshd showed a certificate instead of a host key")?;
        let handshake = Handshake {
            port: address.port(),
            server_id,
            host_key,
            methods: Vec::new(),
            algorithms: offered(&noted),
        };
        Ok((Self { handle }, handshake))
    }

    /// What the user could log in with; `none` if nothing at all is needed.
    async fn methods(&mut self, user: &UserName) -> Observed<Vec<String>> {
        match self.handle.authenticate_none(user.as_str()).await {
            Ok(AuthResult::Success) => Ok(vec!["none".to_owned()]),
            Ok(AuthResult::Failure {
                remaining_methods, ..
            }) if remaining_methods.is_empty() => Err(closed(user)),
            Ok(AuthResult::Failure {
                remaining_methods, ..
            }) => Ok(names(&remaining_methods)),
            Err(error) => Err(format!("sshd did not tell the methods of {user}: {error}")),
        }
    }

    async fn offer_all(&mut self, user: &UserName, keys: &[PublicKey]) -> Vec<Observed<bool>> {
        let mut answers = Vec::new();
        for key in keys {
            answers.push(self.offer(user, key).await);
        }
        answers
    }

    async fn offer(&mut self, user: &UserName, key: &PublicKey) -> Observed<bool> {
        let key = russh::keys::PublicKey::from_openssh(&key.to_line())
            .map_err(|error| format!("can't offer {}: {error}", key.fingerprint()))?;
        // ssh-rsa means SHA-1, which OpenSSH refuses since 8.8; all since 7.2 know this one (RFC 8332).
        let hash = matches!(key.algorithm(), Algorithm::Rsa { .. }).then_some(HashAlg::Sha512);
        let mut signer = Refuser { asked: false };
        let answer = self
            .handle
            .authenticate_publickey_with(user.as_str(), key, hash, &mut signer)
            .await;
        match answer {
            // sshd wants a signature: SSH_MSG_USERAUTH_PK_OK.
            Err(_) if signer.asked => Ok(true),
            Err(Refused::ToSign) => Err("sshd's answer was lost".to_owned()),
            Err(Refused::ByClosing) => Err(closed(user)),
            // Without methods it is not sshd's answer but the end of the connection.
            Ok(AuthResult::Failure {
                remaining_methods, ..
            }) if remaining_methods.is_empty() => Err(closed(user)),
            Ok(AuthResult::Failure { .. }) => Ok(false),
            Ok(AuthResult::Success) => Err(format!("sshd let {user} in without a signature")),
        }
    }

    /// Says goodbye and waits until the connection is closed: sshd keeps a process for each open one.
    async fn leave(self) {
        // It may be closed already: then that was the goodbye.
        let _ = self
            .handle
            .disconnect(Disconnect::ByApplication, "portcullis login probe", "")
            .await;
        let _ = self.handle.await;
    }
}

fn closed(user: &UserName) -> String {
    format!(
        "sshd closed the connection while {user} was asked for: see its log (AllowUsers, MaxAuthTries, \
         PerSourcePenalties)"
    )
}

fn names(methods: &MethodSet) -> Vec<String> {
    methods.iter().map(String::from).collect()
}

async fn connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = if address.is_ipv4() {
        let socket = TcpSocket::new_v4()?;
        socket.bind((source(), 0).into())?;
        socket.connect(address).await?
    } else {
        TcpStream::connect(address).await?
    };
    // Small messages back and forth: each would wait 40 ms for the other side's delayed acknowledgement.
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// An address that no probe has come from for long: each unfinished login costs its source 5 s, and sshd hangs
/// up on one that owes 15 (sshd_config(5), `PerSourcePenalties`). Also processes that don't know of each other
/// must not take the same, so it is drawn.
fn source() -> Ipv4Addr {
    let [c, d, ..] = RandomState::new().build_hasher().finish().to_ne_bytes();
    let [a, b] = PROBE_NETWORK;
    Ipv4Addr::new(a, b, c, d)
}

/// Reads the server's identification (RFC 4253 section 4.2), and gives the stream back as it was, with a
/// note of what comes after.
async fn read_id(stream: TcpStream) -> Observed<(String, impl AsyncRead + AsyncWrite + Unpin + Send, Noted)> {
    let (reader, writer) = stream.into_split();
    let mut reader = BufReader::new(reader).take(MAX_ID);
    let mut read = Vec::new();
    let id = loop {
        let start = read.len();
        match reader.read_until(b'\n', &mut read).await {
            Ok(0) => return Err(closed_at_once(&read)),
            Ok(_) if read[start..].starts_with(b"SSH-") => break &read[start..],
            // Lines before the identification are allowed.
            Ok(_) => {}
            Err(error) => return Err(format!("sshd did not say who it is: {error}")),
        }
    };
    // Others print it: keep what RFC 4253 allows in it.
    let printable = |byte: &u8| byte.is_ascii_graphic() || *byte == b' ';
    let id = id
        .iter()
        .copied()
        .filter(printable)
        .map(char::from)
        .take(255)
        .collect();
    let (rest, noted) = Tee::new(reader.into_inner());
    let stream = join(std::io::Cursor::new(read).chain(rest), writer);
    Ok((id, stream, noted))
}

/// What OpenSSH says instead of its id when it drops a connection for where it comes from.
const DROPPED: &[u8] = b"Not allowed at this time";

fn closed_at_once(said: &[u8]) -> String {
    match said.starts_with(DROPPED) {
        true => format!("{PENALISED}: too many came to nothing (PerSourcePenalties, MaxStartups)"),
        false => "sshd closed the connection without saying who it is".to_owned(),
    }
}

/// Notes the host key that the server proved to have. It is not compared with anything: this is how it is
/// found out.
#[derive(Default)]
struct Witness {
    host_key: Arc<Mutex<Option<HostKey>>>,
}

impl Handler for Witness {
    type Error = russh::Error;

    async fn check_server_key(&mut self, key: &PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        if let PublicKeyOrCertificate::PublicKey { key, .. } = key {
            let key = key
                .to_openssh()
                .ok()
                .and_then(|line| HostKey::from_line(&line).ok());
            *self.host_key.lock().unwrap_or_else(PoisonError::into_inner) = key;
        }
        Ok(true)
    }
}

/// Is asked for a signature only if sshd would accept the key, and never gives one.
struct Refuser {
    asked: bool,
}

enum Refused {
    ToSign,
    ByClosing,
}

impl From<SendError> for Refused {
    fn from(_: SendError) -> Self {
        Self::ByClosing
    }
}

impl Signer for Refuser {
    type Error = Refused;

    async fn auth_sign(
        &mut self,
        _: &AgentIdentity,
        _: Option<HashAlg>,
        _: Vec<u8>,
    ) -> Result<Vec<u8>, Refused> {
        self.asked = true;
        Err(Refused::ToSign)
    }
}
