//! The front's end of the channel to the agent: it is told how the endpoint is to be and what to push, and
//! passes on what callers ask.
//!
//! May not live here: files, keys of users, netlink. This process has no right to any of them.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use portcullis_protocol::control::Answer;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tracing::{info, warn};

use super::push;
use super::server::{self, Published, Question};
use crate::channel::{FromFront, Lines, MAX_TO_FRONT, Push, Setup, ToFront, line};
use crate::identity;
use crate::log::id;

/// Shortest and longest time between two tries to reach the agent.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// Time between two tries to bind the port.
const BIND_AGAIN: Duration = Duration::from_secs(5);
/// Calls that wait for the agent; their callers' connections are bounded as well.
const WAITING: usize = 32;

/// Where the agent is.
pub enum Agent {
    /// It listens there, now or later.
    At(PathBuf),
    /// It started us, and is at the other end of this.
    Parent(UnixStream),
}

/// Serves until the process ends, or the parent does.
pub async fn run(agent: Agent) {
    let mut front = Front::new();
    match agent {
        Agent::Parent(stream) => front.talk(stream).await,
        Agent::At(path) => {
            let mut wait = RETRY.0;
            loop {
                match UnixStream::connect(&path).await {
                    Ok(stream) => {
                        wait = RETRY.0;
                        front.talk(stream).await;
                    }
                    Err(error) => tracing::debug!(%error, "the agent is not there yet"),
                }
                sleep(wait).await;
                wait = (wait * 2).min(RETRY.1);
            }
        }
    }
}

type Pending = Mutex<HashMap<u64, oneshot::Sender<Answer>>>;

/// Whether the endpoint listens; `None` before it was tried.
type Listening = Option<Result<(), String>>;

struct Front {
    published: watch::Sender<Published>,
    pushed: watch::Sender<Push>,
    /// What callers ask, and the end of it that the endpoint has.
    questions: mpsc::Receiver<Question>,
    asker: mpsc::Sender<Question>,
    listening: watch::Sender<Listening>,
    endpoint: Option<(SocketAddr, JoinHandle<()>)>,
}

impl Front {
    fn new() -> Self {
        let (asker, questions) = mpsc::channel(WAITING);
        let pushed = watch::Sender::default();
        tokio::spawn(push::run(pushed.subscribe()));
        Self {
            published: watch::Sender::default(),
            pushed,
            questions,
            asker,
            listening: watch::Sender::default(),
            endpoint: None,
        }
    }

    /// Talks to the agent until it goes. The endpoint and what was to be pushed stay.
    async fn talk(&mut self, stream: UnixStream) {
        let (read, write) = stream.into_split();
        let pending = Pending::default();
        let listening = self.listening.subscribe();
        let mut heard = Heard {
            published: &self.published,
            pushed: &self.pushed,
            asker: &self.asker,
            listening: &self.listening,
            endpoint: &mut self.endpoint,
        };
        let over = tokio::select! {
            over = heard.hear(read, &pending) => over,
            over = tell(write, &mut self.questions, listening, &pending) => over,
        };
        self.published.send_modify(|published| published.agent = false);
        // Nobody answers these any more: their callers are told so.
        while self.questions.try_recv().is_ok() {}
        let reason = over.err().map_or("it hung up".to_owned(), |e| e.to_string());
        warn!(
            MESSAGE_ID = id::FRONT_LOST,
            REASON = reason,
            "the agent is not there: {reason}"
        );
    }
}

/// What the agent says goes here.
struct Heard<'a> {
    published: &'a watch::Sender<Published>,
    pushed: &'a watch::Sender<Push>,
    asker: &'a mpsc::Sender<Question>,
    listening: &'a watch::Sender<Listening>,
    endpoint: &'a mut Option<(SocketAddr, JoinHandle<()>)>,
}

impl Heard<'_> {
    async fn hear(&mut self, read: OwnedReadHalf, pending: &Pending) -> io::Result<()> {
        let mut lines = Lines::new(read, MAX_TO_FRONT);
        while let Some(message) = lines.next::<ToFront>().await? {
            match message {
                ToFront::Setup(setup) => self.set_up(&setup),
                ToFront::Push(push) => {
                    let report = push.report.clone();
                    self.pushed.send_replace(push);
                    self.published.send_modify(|published| {
                        published.report = report;
                        published.agent = true;
                    });
                }
                ToFront::Answer { id, answer } => {
                    let asked = pending.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                    if let Some(asked) = asked {
                        // A caller who went away needs no answer.
                        let _ = asked.send(answer);
                    }
                }
            }
        }
        Ok(())
    }

    /// The port stays bound if it is the same: no caller is turned away by a new certificate.
    fn set_up(&mut self, setup: &Setup) {
        match identity::server_config(&setup.key, &setup.certificates, setup.client_ca.as_deref()) {
            Ok(tls) => self.published.send_modify(|published| published.tls = Some(tls)),
            Err(reason) => {
                self.listening.send_replace(Some(Err(reason)));
                return;
            }
        }
        let same =
            |(listen, task): &(SocketAddr, JoinHandle<()>)| *listen == setup.listen && !task.is_finished();
        if !self.endpoint.as_ref().is_some_and(same) {
            if let Some((_, task)) = self.endpoint.take() {
                task.abort();
            }
            let task = listen(
                setup.listen,
                self.published.subscribe(),
                self.asker.clone(),
                self.listening.clone(),
            );
            *self.endpoint = Some((setup.listen, tokio::spawn(task)));
        }
    }
}

async fn listen(
    address: SocketAddr,
    published: watch::Receiver<Published>,
    asker: mpsc::Sender<Question>,
    listening: watch::Sender<Listening>,
) {
    let listener = loop {
        match server::bind(address).await {
            Ok(listener) => break listener,
            Err(error) => {
                let failed = Some(Err(format!("{address}: {error}")));
                listening.send_if_modified(|last| std::mem::replace(last, failed.clone()) != failed);
            }
        }
        sleep(BIND_AGAIN).await;
    };
    info!(%address, "the endpoint listens");
    listening.send_replace(Some(Ok(())));
    server::serve(listener, published, asker).await;
}

async fn tell(
    mut write: OwnedWriteHalf,
    questions: &mut mpsc::Receiver<Question>,
    mut listening: watch::Receiver<Listening>,
    pending: &Pending,
) -> io::Result<()> {
    listening.mark_changed();
    for id in 0u64.. {
        let message = tokio::select! {
            question = questions.recv() => match question {
                Some((request, remote, answer)) => {
                    pending.lock().unwrap_or_else(PoisonError::into_inner).insert(id, answer);
                    FromFront::Call { id, request, remote }
                }
                None => return Ok(()),
            },
            changed = listening.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                match listening.borrow_and_update().clone() {
                    Some(state) => FromFront::Listening { error: state.err() },
                    None => continue,
                }
            }
        };
        write.write_all(&line(&message)?).await?;
    }
    Ok(())
}
