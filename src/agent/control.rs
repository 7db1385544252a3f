//! The local control socket: one JSON document a line, for root alone.
//!
//! A caller says one thing, is answered, and hangs up. One who follows the situation stays, and is told of
//! each change; nothing is done for it in between.
//!
//! May not live here: what a request does (`super::Agent`).

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use portcullis_protocol::Situation;
use portcullis_protocol::control::{Answer, MAX_LINE, Refusal, Request};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};

pub use crate::channel::Remote;

/// Longest time for a caller to say what it wants.
const REQUEST_TIME: Duration = Duration::from_secs(10);

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// A process of this host, if the kernel told which.
    Local(Option<i32>),
    /// The control plane.
    Remote(Remote),
}

/// A request, whose it is, and where its answer goes.
pub type Call = (Request, Caller, oneshot::Sender<Answer>);

/// Tells when the situation is another one.
pub type News = watch::Receiver<Option<Arc<Situation>>>;

/// Binds the socket; only root may connect. One that a dead daemon left is replaced.
///
/// # Errors
/// When the folder can't be made or the socket not be bound; `AddrInUse` when a daemon answers there.
pub async fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    if UnixStream::connect(path).await.is_ok() {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another portcullis is running",
        ));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves until the task is dropped.
pub async fn serve(listener: UnixListener, calls: mpsc::Sender<Call>, news: News) {
    while let Ok((stream, _)) = listener.accept().await {
        let (calls, news) = (calls.clone(), news.clone());
        tokio::spawn(async move {
            let _ = serve_one(stream, calls, news).await;
        });
    }
}

async fn serve_one(stream: UnixStream, calls: mpsc::Sender<Call>, news: News) -> io::Result<()> {
    // The mode of the socket says so already; a descriptor that was passed on would not.
    let peer = stream.peer_cred()?;
    let is_root = peer.uid() == 0;
    let (reader, mut writer) = stream.into_split();
    let mut line = Vec::new();
    let mut reader = BufReader::new(reader).take(MAX_LINE as u64);
    let read = tokio::time::timeout(REQUEST_TIME, reader.read_until(b'\n', &mut line)).await;
    read.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let answer = match serde_json::from_slice::<Request>(&line) {
        _ if !is_root => refused(Refusal::NotPermitted, "only root may use the control socket"),
        Ok(Request::Watch) => {
            let caller = Caller::Local(peer.pid());
            return follow(caller, &calls, news, reader, writer).await;
        }
        Ok(request) => ask(request, Caller::Local(peer.pid()), &calls).await,
        Err(error) => refused(Refusal::BadInput, error.to_string()),
    };
    write_line(&mut writer, &answer).await
}

/// Answers, and again after each change, until the caller hangs up. One who reads slowly is told the newest.
async fn follow(
    caller: Caller,
    calls: &mpsc::Sender<Call>,
    mut news: News,
    mut reader: impl AsyncRead + Unpin,
    mut writer: OwnedWriteHalf,
) -> io::Result<()> {
    let mut nothing = [0];
    loop {
        // What changes from here on is told, also if it comes before the answer.
        news.borrow_and_update();
        let answer = ask(Request::Watch, caller.clone(), calls).await;
        write_line(&mut writer, &answer).await?;
        if matches!(answer, Answer::Refused { .. }) {
            return Ok(());
        }
        tokio::select! {
            changed = news.changed() => if changed.is_err() { return Ok(()) },
            // It has nothing to say any more: it hung up, or broke the rules.
            _ = reader.read(&mut nothing) => return Ok(()),
        }
    }
}

async fn write_line(writer: &mut OwnedWriteHalf, answer: &Answer) -> io::Result<()> {
    // Answers have no failing serializers.
    let mut bytes = serde_json::to_vec(answer).unwrap_or_default();
    bytes.push(b'\n');
    writer.write_all(&bytes).await
}

/// Asks the agent in this process.
pub(super) async fn ask(request: Request, caller: Caller, calls: &mpsc::Sender<Call>) -> Answer {
    let (sender, receiver) = oneshot::channel();
    if calls.send((request, caller, sender)).await.is_ok()
        && let Ok(answer) = receiver.await
    {
        return answer;
    }
    refused(Refusal::Failed, "the daemon is stopping")
}

/// A refusal.
pub fn refused(kind: Refusal, message: impl Into<String>) -> Answer {
    Answer::Refused {
        kind,
        message: message.into(),
    }
}

/// Asks the daemon.
///
/// # Errors
/// When no daemon listens there, or it does not answer.
pub async fn call(path: &Path, request: &Request) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(path).await?;
    let mut bytes = serde_json::to_vec(request).map_err(io::Error::other)?;
    bytes.push(b'\n');
    stream.write_all(&bytes).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    serde_json::from_slice(&answer).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// The situation and what becomes of it, as the daemon tells.
pub struct Follower {
    lines: BufReader<UnixStream>,
    /// What has come of the next line: the wait for the rest may be given up.
    line: Vec<u8>,
}

impl Follower {
    /// Asks the daemon.
    ///
    /// # Errors
    /// When no daemon listens there.
    pub async fn connect(path: &Path) -> io::Result<Self> {
        let mut stream = UnixStream::connect(path).await?;
        let mut bytes = serde_json::to_vec(&Request::Watch).map_err(io::Error::other)?;
        bytes.push(b'\n');
        stream.write_all(&bytes).await?;
        Ok(Self {
            lines: BufReader::new(stream),
            line: Vec::new(),
        })
    }

    /// Waits for the next answer; none when the daemon is gone. A wait that is given up loses nothing.
    ///
    /// # Errors
    /// As read(2); when the answer is none.
    pub async fn next(&mut self) -> io::Result<Option<Answer>> {
        match self.lines.read_until(b'\n', &mut self.line).await {
            Ok(_) if !self.line.ends_with(b"\n") => Ok(None),
            Ok(_) => serde_json::from_slice(&std::mem::take(&mut self.line))
                .map(Some)
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e)),
            // It ended with our request unread.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(None),
            Err(error) => Err(error),
        }
    }
}
