//! The front's end of the channel to the agent: it is told how the endpoint is to be and what to push, and
//! passes on what callers ask.
//!
//! May not live here: files, keys of users, netlink. This process has no right to any of them.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use portcullis_protocol::Report;
use portcullis_protocol::control::Answer;
use rustls::ServerConfig;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tracing::{error, info, warn};

use super::enrol::{self, Errand};
use super::metrics::Counts;
use super::push;
use super::push::offer::{Offer, Said};
use super::server::{self, Published, Question};
use crate::channel::{FromFront, Lines, MAX_TO_FRONT, Setup, ToFront, line};
use crate::config::LimitSettings;
use crate::identity::server::server_config;
use crate::log::id;

/// Shortest and longest time between two tries to reach the agent.
const RETRY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(200));
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

/// What the endpoint is made of: other values need another one.
type Place = (SocketAddr, LimitSettings);

struct Front {
    told: Told,
    outbox: Outbox,
}

/// What the agent says goes here.
struct Told {
    published: watch::Sender<Published>,
    offers: watch::Sender<Offer>,
    errands: watch::Sender<Option<Errand>>,
    listening: watch::Sender<Listening>,
    endpoint: Option<(Place, JoinHandle<()>)>,
    /// For endpoints: where callers' questions go, and what is counted.
    asker: mpsc::Sender<Question>,
    counts: Counts,
}

/// What the agent is told comes from here.
struct Outbox {
    questions: mpsc::Receiver<Question>,
    said: mpsc::Receiver<Said>,
    listening: watch::Receiver<Listening>,
    next_id: u64,
}

impl Front {
    fn new() -> Self {
        let (asker, questions) = mpsc::channel(WAITING);
        let (offers, errands) = (watch::Sender::default(), watch::Sender::default());
        let (pusher, said) = mpsc::channel(WAITING);
        tokio::spawn(push::run(offers.subscribe(), pusher));
        tokio::spawn(enrol::run(errands.subscribe(), asker.clone()));
        let listening = watch::Sender::default();
        let outbox = Outbox {
            questions,
            said,
            listening: listening.subscribe(),
            next_id: 0,
        };
        let told = Told {
            published: watch::Sender::default(),
            offers,
            errands,
            listening,
            endpoint: None,
            asker,
            counts: Counts::default(),
        };
        Self { told, outbox }
    }

    /// Talks to the agent until it goes. The endpoint stays, and says that there is no agent.
    async fn talk(&mut self, stream: UnixStream) {
        let (read, write) = stream.into_split();
        let pending = Pending::default();
        let over = tokio::select! {
            over = self.told.hear(read, &pending) => over,
            over = self.outbox.tell(write, &pending) => over,
        };
        self.told.forget();
        // Nobody answers these any more: their callers are told so.
        while self.outbox.questions.try_recv().is_ok() {}
        let reason = over.err().map_or("it hung up".to_owned(), |e| e.to_string());
        warn!(
            MESSAGE_ID = id::FRONT_LOST,
            REASON = reason,
            "the agent is not there: {reason}"
        );
    }
}

impl Told {
    async fn hear(&mut self, read: OwnedReadHalf, pending: &Pending) -> io::Result<()> {
        let mut lines = Lines::new(read, MAX_TO_FRONT);
        while let Some(message) = lines.next::<ToFront>().await? {
            match message {
                ToFront::Setup(setup) => self.set_up(&setup),
                ToFront::Report(report) => self.report(report),
                ToFront::Offer(offer) => self.offer(offer),
                ToFront::Errand(errand) => {
                    self.errands.send_replace(errand);
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

    /// Without an agent nobody knows how the instance is, so nothing is told of it.
    fn forget(&mut self) {
        self.published.send_modify(|published| {
            published.agent = false;
            published.report = None;
        });
        self.offers.send_modify(|offer| offer.url = None);
        self.errands.send_replace(None);
    }

    fn report(&mut self, report: Arc<Report>) {
        self.offers
            .send_modify(|offer| offer.newest = Some(report.clone()));
        self.published
            .send_modify(|published| published.report = Some(report));
    }

    /// The same credentials again are not others: a connection and a token are kept for them.
    fn offer(&mut self, mut offer: Offer) {
        self.offers.send_modify(|last| {
            if last.access == offer.access {
                offer.access = last.access.clone();
            }
            offer.newest = last.newest.take();
            *last = offer;
        });
    }

    /// The port stays bound if it is the same: no caller is turned away by a new certificate.
    fn set_up(&mut self, setup: &Setup) {
        match usable(setup) {
            Ok(tls) => self.published.send_modify(|published| {
                published.tls = Some(tls);
                published.agent = true;
            }),
            Err(reason) => {
                self.listening.send_replace(Some(Err(reason)));
                return;
            }
        }
        let place = (setup.listen, setup.limits.clone());
        let stands = |(at, task): &(Place, JoinHandle<()>)| *at == place && !task.is_finished();
        if !self.endpoint.as_ref().is_some_and(stands) {
            if let Some((_, task)) = self.endpoint.take() {
                task.abort();
            }
            let task = listen(
                place.clone(),
                self.published.subscribe(),
                self.asker.clone(),
                self.counts.clone(),
                self.listening.clone(),
            );
            self.endpoint = Some((place, tokio::spawn(task)));
        }
    }
}

/// A spec with an unusable authority is refused when it comes in. For one that was accepted before, the endpoint
/// goes on, and nobody is the control plane.
fn usable(setup: &Setup) -> Result<Arc<ServerConfig>, String> {
    server_config(setup).or_else(|reason| {
        if setup.client_ca.is_none() {
            return Err(reason);
        }
        error!(
            MESSAGE_ID = id::DEGRADED,
            REASON = reason,
            "the control plane can't be known: {reason}"
        );
        server_config(&Setup {
            client_ca: None,
            ..setup.clone()
        })
    })
}

async fn listen(
    (address, limits): Place,
    published: watch::Receiver<Published>,
    asker: mpsc::Sender<Question>,
    counts: Counts,
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
    server::serve(listener, limits, published, asker, counts).await;
}

impl Outbox {
    async fn tell(&mut self, mut write: OwnedWriteHalf, pending: &Pending) -> io::Result<()> {
        self.listening.mark_changed();
        loop {
            let message = tokio::select! {
                Some((request, remote, answer)) = self.questions.recv() => {
                    let id = self.next_id;
                    self.next_id += 1;
                    pending.lock().unwrap_or_else(PoisonError::into_inner).insert(id, answer);
                    FromFront::Call { id, request, remote }
                }
                Some(said) = self.said.recv() => FromFront::Said(said),
                Ok(()) = self.listening.changed() => match self.listening.borrow_and_update().clone() {
                    Some(state) => FromFront::Listening { error: state.err() },
                    None => continue,
                },
                else => return Ok(()),
            };
            write.write_all(&line(&message)?).await?;
        }
    }
}
