//! The agent's end of the channel to the front, the process that speaks to the network. What comes from there
//! is checked as if a stranger had sent it.
//!
//! May not live here: what a request does (`super::Agent`), HTTP and TLS (`health`).

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use portcullis_protocol::Report;
use portcullis_protocol::control::Request;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tracing::{error, warn};

use super::control::{Call, Caller, ask};
use crate::channel::{
    FRONT_USER, FromFront, Lines, MAX_CHAIN, MAX_CHAIN_BYTES, MAX_FROM_FRONT, Remote, Setup, ToFront, line,
};
use crate::health::enrol::Errand;
use crate::health::push::offer::{Offer, Said};
use crate::log::id;
use crate::system::accounts::{self, Account};
use crate::system::as_user::{off_thread, run_in_group};
use crate::system::clock;

/// Most calls of the front that are under way; more wait in its socket.
const MAX_CALLS: usize = 32;
/// Longest text of the front in the journal, in characters.
const MAX_TEXT: usize = 300;
/// Longest name of an operation, and most bytes of what a refused caller was told.
const MAX_NAME: usize = 40;
const MAX_DETAIL: usize = 4 * MAX_TEXT;
/// Time before a front that ended is started again.
const RESTART_TIME: Duration = Duration::from_secs(1);

/// Who starts the front.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum StartedBy {
    /// The agent, as a child with the front's user: where there is no systemd.
    Child,
    /// Its own unit; the agent waits for it on a socket.
    Unit,
}

/// What the endpoint tells callers, and how it is to be.
#[derive(Clone)]
pub struct Published {
    /// How it is to be.
    pub setup: Arc<Setup>,
    /// The last report; none before the first reconcile.
    pub report: Option<Arc<Report>>,
}

/// How the front is, as far as the agent was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrontState {
    /// There is none, and why if that is known.
    Absent(String),
    /// It says that the endpoint listens.
    Listening,
    /// The endpoint can't listen, as it says, or there can't be a front.
    Failed(String),
}

impl Default for FrontState {
    fn default() -> Self {
        Self::Absent("its process has not connected: see `systemctl status portcullis-front`".to_owned())
    }
}

/// What the channel needs of the agent.
#[derive(Clone)]
pub struct Ends {
    /// What the endpoint is told.
    pub published: watch::Receiver<Published>,
    /// What is to be pushed.
    pub offers: watch::Receiver<Offer>,
    /// How that goes.
    pub said: mpsc::Sender<Said>,
    /// What is to be carried to the control plane.
    pub errands: watch::Receiver<Option<Errand>>,
    /// Where its calls go.
    pub calls: mpsc::Sender<Call>,
    /// How it is.
    pub state: watch::Sender<FrontState>,
}

/// Has a front until the task is dropped.
pub async fn run(started_by: StartedBy, socket: &Path, ends: Ends) {
    let user = match account().await {
        Ok(user) => user,
        Err(reason) => {
            error!(
                MESSAGE_ID = id::FRONT_LOST,
                REASON = reason,
                "there is no endpoint: {reason}"
            );
            ends.state.send_replace(FrontState::Failed(reason));
            return;
        }
    };
    match started_by {
        StartedBy::Child => keep_child(&user, &ends).await,
        StartedBy::Unit => match bind(socket, &user) {
            Ok(listener) => serve(listener, user.uid, &ends).await,
            Err(error) => {
                let reason = format!("{}: {error}", socket.display());
                error!(
                    MESSAGE_ID = id::FRONT_LOST,
                    REASON = reason,
                    "there is no endpoint: {reason}"
                );
                ends.state.send_replace(FrontState::Failed(reason));
            }
        },
    }
}

/// The front's user. It must be nobody: with root's number the separation would be for show.
async fn account() -> Result<Account, String> {
    let name = FRONT_USER.parse()?;
    let account = off_thread(move || accounts::lookup(&name).map_err(|e| e.to_string()));
    let account = account.await.map_err(|e| e.to_string())?.map_err(|_| {
        format!("the front needs a system user `{FRONT_USER}`: `systemd-sysusers portcullis.conf` makes it")
    })?;
    if account.uid == 0 || account.gid == 0 {
        return Err(format!(
            "the user `{FRONT_USER}` is root, or in its group: the front may not be"
        ));
    }
    Ok(account)
}

/// Binds the socket: root's, and the front's group may connect. Who connects is asked of the kernel, too.
fn bind(path: &Path, user: &Account) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Without CAP_CHOWN a file has the group of who makes it.
    let listener = run_in_group(user.gid, || std::os::unix::net::UnixListener::bind(path))??;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Takes connections of the front's user; a newer one replaces the one before.
async fn serve(listener: UnixListener, uid: u32, ends: &Ends) {
    let mut current: Option<JoinHandle<()>> = None;
    while let Ok((stream, _)) = listener.accept().await {
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == uid => {
                if let Some(before) = current.take() {
                    before.abort();
                    // It is over when this returns: its last word may not come after the next one's first.
                    let _ = before.await;
                }
                let ends = ends.clone();
                current = Some(tokio::spawn(async move { attend(stream, &ends).await }));
            }
            peer => {
                let uid = peer.map_or(-1, |peer| i64::from(peer.uid()));
                warn!(
                    MESSAGE_ID = id::FRONT_REFUSED,
                    UID = uid,
                    "a process that is not the front was refused"
                );
            }
        }
    }
}

/// Starts the front as a child, again and again.
async fn keep_child(user: &Account, ends: &Ends) {
    loop {
        match start_child(user) {
            Ok((mut child, stream)) => {
                attend(stream, ends).await;
                let _ = child.kill().await;
            }
            Err(error) => {
                let reason = format!("it can't be started: {error}");
                error!(
                    MESSAGE_ID = id::FRONT_LOST,
                    REASON = reason,
                    "there is no endpoint: {reason}"
                );
                ends.state.send_replace(FrontState::Absent(reason));
            }
        }
        tokio::time::sleep(RESTART_TIME).await;
    }
}

fn start_child(user: &Account) -> io::Result<(tokio::process::Child, UnixStream)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    // The other groups go with the user (`std::os::unix::process::CommandExt::uid`).
    let child = tokio::process::Command::new("/proc/self/exe")
        .arg0("portcullis")
        .args(["front", "--inherited"])
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .uid(user.uid)
        .gid(user.gid)
        .kill_on_drop(true)
        .spawn()?;
    Ok((child, UnixStream::from_std(ours)?))
}

/// Talks to one front until it goes, or says something that it may not.
async fn attend(stream: UnixStream, ends: &Ends) {
    let (read, write) = stream.into_split();
    let (answers, outbox) = mpsc::channel(MAX_CALLS);
    let over = tokio::select! {
        over = hear(read, ends, answers) => over,
        over = tell(write, ends.clone(), outbox) => over,
    };
    if let Err(error) = over {
        let reason = shortened(&error.to_string());
        warn!(
            MESSAGE_ID = id::FRONT_REFUSED,
            REASON = reason,
            "the channel to the front was closed"
        );
    }
    ends.state.send_replace(FrontState::default());
}

async fn tell(
    mut write: OwnedWriteHalf,
    mut ends: Ends,
    mut answers: mpsc::Receiver<ToFront>,
) -> io::Result<()> {
    let (mut setup, mut report): (Option<Arc<Setup>>, Option<Arc<Report>>) = (None, None);
    ends.published.mark_changed();
    ends.offers.mark_changed();
    ends.errands.mark_changed();
    loop {
        // In this order: a report is there before it is to be pushed.
        let message = tokio::select! {
            biased;
            Ok(()) = ends.published.changed() => {
                let now = ends.published.borrow_and_update().clone();
                if setup.as_ref() != Some(&now.setup) {
                    setup = Some(now.setup.clone());
                    write.write_all(&line(&ToFront::Setup(now.setup))?).await?;
                }
                match now.report {
                    Some(new) if !report.as_ref().is_some_and(|old| Arc::ptr_eq(old, &new)) => {
                        report = Some(new.clone());
                        ToFront::Report(new)
                    }
                    _ => continue,
                }
            }
            Ok(()) = ends.offers.changed() => ToFront::Offer(ends.offers.borrow_and_update().clone()),
            Ok(()) = ends.errands.changed() => ToFront::Errand(ends.errands.borrow_and_update().clone()),
            Some(answer) = answers.recv() => answer,
            else => return Ok(()),
        };
        write.write_all(&line(&message)?).await?;
    }
}

async fn hear(read: OwnedReadHalf, ends: &Ends, answers: mpsc::Sender<ToFront>) -> io::Result<()> {
    let mut lines = Lines::new(read, MAX_FROM_FRONT);
    let slots = Arc::new(Semaphore::new(MAX_CALLS));
    // They end with this.
    let mut under_way = JoinSet::new();
    while let Some(message) = lines.next::<FromFront>().await? {
        match message {
            FromFront::Said(said) => {
                // The outbox lives as long as the agent.
                let _ = ends.said.send(bounded(said)).await;
            }
            FromFront::Listening { error: None } => {
                ends.state.send_replace(FrontState::Listening);
            }
            FromFront::Listening { error: Some(reason) } => {
                ends.state.send_replace(FrontState::Failed(shortened(&reason)));
            }
            FromFront::Call { id, request, remote } => {
                check(&request, &remote)
                    .map_err(|reason| io::Error::new(io::ErrorKind::InvalidData, reason))?;
                // The semaphore is never closed.
                let Ok(slot) = slots.clone().acquire_owned().await else {
                    return Ok(());
                };
                while under_way.try_join_next().is_some() {}
                let (calls, answers) = (ends.calls.clone(), answers.clone());
                under_way.spawn(async move {
                    let answer = ask(request, Caller::Remote(remote), &calls).await;
                    let _ = answers.send(ToFront::Answer { id, answer }).await;
                    drop(slot);
                });
            }
        }
    }
    Ok(())
}

/// What a front that is in order never sends. Whether the caller is the control plane is judged by the agent,
/// for every request.
fn check(request: &Request, remote: &Remote) -> Result<(), &'static str> {
    if !for_remote(request) {
        return Err("a request that callers over HTTPS can't make");
    }
    if let Request::CallRefused {
        operation, detail, ..
    } = request
    {
        let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
        if operation.len() > MAX_NAME || !operation.chars().all(is_name) || detail.len() > MAX_DETAIL {
            return Err("a refusal with too many words");
        }
    }
    let bytes: usize = remote.chain.iter().map(Vec::len).sum();
    if remote.chain.len() > MAX_CHAIN || bytes > MAX_CHAIN_BYTES {
        return Err("a chain of certificates that is too long");
    }
    if remote.since > clock::since_boot() {
        return Err("a connection of the future");
    }
    Ok(())
}

/// Whether the API has such a request. One that is added has to be thought of here.
fn for_remote(request: &Request) -> bool {
    match request {
        Request::Status
        | Request::Spec
        | Request::Apply { .. }
        | Request::Confirm { .. }
        | Request::AddRule { .. }
        | Request::RevokeRule { .. }
        | Request::AddKey { .. }
        | Request::RevokeKey { .. }
        | Request::AddPeer { .. }
        | Request::RevokePeer { .. }
        | Request::Metrics
        | Request::HandshakeRefused { .. }
        | Request::CallRefused { .. }
        | Request::Identity { .. }
        | Request::FirstContact { .. }
        | Request::Enrolled { .. } => true,
        Request::IfGeneration { change, .. } => {
            !matches!(**change, Request::IfGeneration { .. }) && for_remote(change)
        }
        // The host's own business.
        Request::Denied { .. }
        | Request::TrustHostKeys
        | Request::Watch
        | Request::Access
        | Request::RevokeAccess { .. }
        | Request::RestoreAccess { .. } => false,
    }
}

fn bounded(said: Said) -> Said {
    match said {
        Said::Failed { reason } => Said::Failed {
            reason: shortened(&reason),
        },
        Said::GivenUp { change, reason } => Said::GivenUp {
            change,
            reason: shortened(&reason),
        },
        said @ (Said::Delivered { .. } | Said::Unauthorized) => said,
    }
}

/// The front's words on one line, and not many.
fn shortened(text: &str) -> String {
    let text = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    text.take(MAX_TEXT).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remote(chain: Vec<Vec<u8>>) -> Remote {
        Remote {
            since: Duration::ZERO,
            address: "192.0.2.1:1".parse().unwrap(),
            chain,
        }
    }

    /// By their words on the channel, so that each is one that the front could write.
    #[test]
    fn only_what_the_api_has_may_be_asked() {
        let rule = r#"{"id":"a","protocol":"tcp","from_port":1,"to_port":1,"ip_ranges":[]}"#;
        let peer = r#"{"instance":"p","addresses":["10.0.0.1"]}"#;
        let key = r#"{"user":"u","key":"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"}"#;
        let spec = r#"{"version":1,"generation":1,"instance":{"id":"i"}}"#;
        let allowed = [
            r#"{"request":"status"}"#.to_owned(),
            r#"{"request":"spec"}"#.to_owned(),
            format!(r#"{{"request":"apply","spec":{spec}}}"#),
            r#"{"request":"confirm","generation":1}"#.to_owned(),
            format!(r#"{{"request":"add-rule","rule":{rule}}}"#),
            r#"{"request":"revoke-rule","id":"a"}"#.to_owned(),
            format!(r#"{{"request":"add-key","key":{key}}}"#),
            r#"{"request":"revoke-key","fingerprint":"SHA256:x"}"#.to_owned(),
            format!(r#"{{"request":"add-peer","peer":{peer}}}"#),
            r#"{"request":"revoke-peer","instance":"p"}"#.to_owned(),
            r#"{"request":"identity","nonce":"0"}"#.to_owned(),
            r#"{"request":"metrics"}"#.to_owned(),
            r#"{"request":"handshake-refused","reason":"expired"}"#.to_owned(),
            r#"{"request":"call-refused","operation":"add_rule","status":400,"detail":"no"}"#.to_owned(),
        ];
        let refused = [
            r#"{"request":"denied","top":1}"#.to_owned(),
            r#"{"request":"trust-host-keys"}"#.to_owned(),
            r#"{"request":"watch"}"#.to_owned(),
            r#"{"request":"access"}"#.to_owned(),
            r#"{"request":"revoke-access"}"#.to_owned(),
            r#"{"request":"restore-access"}"#.to_owned(),
        ];
        let parsed =
            |text: &str| serde_json::from_str::<Request>(text).unwrap_or_else(|e| panic!("{text}: {e}"));
        let within = |text: &str| {
            parsed(&format!(
                r#"{{"request":"if-generation","generation":1,"change":{text}}}"#
            ))
        };
        for text in &allowed {
            assert!(for_remote(&parsed(text)) && for_remote(&within(text)), "{text}");
            let twice = format!(r#"{{"request":"if-generation","generation":1,"change":{text}}}"#);
            assert!(!for_remote(&within(&twice)), "{twice}");
        }
        for text in &refused {
            assert!(!for_remote(&parsed(text)) && !for_remote(&within(text)), "{text}");
        }
    }

    #[test]
    fn chains_and_times_have_bounds() {
        let ok = |remote: &Remote| check(&Request::Status, remote).is_ok();
        assert!(ok(&remote(vec![])) && ok(&remote(vec![vec![0; 100]; MAX_CHAIN])));
        assert!(!ok(&remote(vec![vec![0; 100]; MAX_CHAIN + 1])));
        assert!(ok(&remote(vec![vec![0; MAX_CHAIN_BYTES]])));
        assert!(!ok(&remote(vec![vec![0; MAX_CHAIN_BYTES + 1]])));
        let later = Remote {
            since: clock::since_boot() + Duration::from_secs(60),
            ..remote(vec![])
        };
        assert!(!ok(&later));
    }

    #[test]
    fn a_refusal_has_few_words() {
        let ok = |operation: &str, detail: &str| {
            let request = Request::CallRefused {
                operation: operation.to_owned(),
                status: 400,
                detail: detail.to_owned(),
            };
            check(&request, &remote(vec![])).is_ok()
        };
        assert!(ok("add_rule", "no") && ok(&"a".repeat(MAX_NAME), &"d".repeat(MAX_DETAIL)));
        assert!(!ok("add rule", "no") && !ok("add_rule\n", "no") && !ok(&"a".repeat(MAX_NAME + 1), "no"));
        assert!(!ok("add_rule", &"d".repeat(MAX_DETAIL + 1)));
    }

    #[test]
    fn the_fronts_words_stay_on_a_line() {
        assert_eq!(shortened("a\nb\u{1b}[1m"), "a b [1m");
        assert_eq!(shortened(&"é".repeat(MAX_TEXT * 2)).chars().count(), MAX_TEXT);
    }
}
