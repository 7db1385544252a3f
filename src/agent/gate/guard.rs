//! The gatekeeper's own thread: nothing else that the daemon does can delay putting the gate back.
//!
//! May not live here: what the gatekeeper does, the report.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use portcullis_protocol::Spec;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep};
use tracing::warn;

use super::{Cause, Gatekeeper};
use crate::agent::events::{opened, until};
use crate::agent::metrics::Durations;
use crate::config::Settings;
use crate::log::id;
use crate::policy::observation;
use crate::system::links;
use crate::system::nftables::events::{Author, Events};

/// How often hosts with sessions older than the gate are looked at.
const KEPT_INTERVAL: Duration = Duration::from_secs(30);
/// How often it is tried to reach nf_tables when it can't be used.
const RETRY: Duration = Duration::from_secs(5);

/// What the gate is to enforce, and where the answer goes.
struct Order {
    spec: Option<Arc<Spec>>,
    answer: oneshot::Sender<Arc<observation::Gate>>,
}

/// The daemon's end of the thread.
pub struct Guard {
    orders: mpsc::Sender<Order>,
    seen: watch::Receiver<Arc<observation::Gate>>,
    durations: Durations,
}

impl Guard {
    /// Starts the thread. It does nothing before the first order.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(settings: &Settings) -> io::Result<Self> {
        let (orders, inbox) = mpsc::channel(1);
        let (publish, seen) = watch::channel(Arc::default());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let settings = settings.clone();
        let durations = Durations::default();
        let measured = durations.clone();
        thread::Builder::new()
            .name("gate".to_owned())
            .spawn(move || runtime.block_on(stand(settings, inbox, publish, measured)))?;
        Ok(Self {
            orders,
            seen,
            durations,
        })
    }

    /// Has the spec enforced from now on, and gives what then was seen.
    pub async fn enforce(&self, spec: Option<Arc<Spec>>) -> Arc<observation::Gate> {
        let (answer, result) = oneshot::channel();
        // The thread ends only with the process.
        let _ = self.orders.send(Order { spec, answer }).await;
        result.await.unwrap_or_else(|_| self.seen())
    }

    /// How long its looks take; others may be measured there too.
    pub fn durations(&self) -> Durations {
        self.durations.clone()
    }

    /// What was seen last.
    pub fn seen(&self) -> Arc<observation::Gate> {
        self.seen.borrow().clone()
    }

    /// Tells when something else is seen, whatever caused it.
    pub fn watch(&self) -> watch::Receiver<Arc<observation::Gate>> {
        self.seen.clone()
    }
}

/// Runs as long as there is a daemon.
async fn stand(
    settings: Settings,
    mut orders: mpsc::Receiver<Order>,
    publish: watch::Sender<Arc<observation::Gate>>,
    durations: Durations,
) {
    let mut spec: Option<Arc<Spec>> = None;
    let mut post = Post::open(&settings);
    let mut is_first = true;
    loop {
        let due = post.due(is_first);
        let woken = tokio::select! {
            biased;
            author = foreign(&post.tables) => Woken::By(Cause::Foreign(author)),
            order = orders.recv() => match order {
                Some(order) => Woken::Order(order),
                None => return,
            },
            () = link_changed(&post.links) => Woken::By(Cause::Plan),
            () = until(due) => Woken::Due,
        };
        let (cause, answer) = match woken {
            Woken::By(cause) => (cause, None),
            Woken::Order(order) => {
                spec = order.spec;
                (Cause::Plan, Some(order.answer))
            }
            Woken::Due => (post.when_due(&settings), None),
        };
        if is_first && answer.is_none() {
            continue;
        }
        let start = std::time::Instant::now();
        let gate = Arc::new(post.look(spec.as_deref(), &cause, is_first));
        durations.took("gate", start);
        is_first = false;
        publish.send_if_modified(|last| {
            let is_new = *last != gate;
            *last = gate.clone();
            is_new
        });
        if let Some(answer) = answer {
            let _ = answer.send(gate);
        }
    }
}

enum Woken {
    By(Cause),
    Order(Order),
    Due,
}

/// What the thread holds: the gatekeeper, or why there is none, and what wakes it.
struct Post {
    keeper: Result<Gatekeeper, String>,
    tables: Option<Events>,
    links: Option<links::Events>,
    looked: Instant,
}

impl Post {
    fn open(settings: &Settings) -> Self {
        let keeper = Gatekeeper::new(settings).map_err(|e| e.to_string());
        let own = keeper.as_ref().map_or(0, Gatekeeper::port);
        Self {
            keeper,
            tables: opened("changes of nf_tables", Events::open(own)),
            links: opened("changes of links", links::Events::open()),
            looked: Instant::now(),
        }
    }

    fn due(&self, is_first: bool) -> Option<Instant> {
        match &self.keeper {
            _ if is_first => None,
            Err(_) => Some(self.looked + RETRY),
            Ok(keeper) if !keeper.kept.is_empty() => {
                let kept = self.looked + KEPT_INTERVAL;
                Some(keeper.storm.due().map_or(kept, |due| kept.min(due.into())))
            }
            Ok(keeper) => keeper.storm.due().map(Instant::from_std),
        }
    }

    fn when_due(&mut self, settings: &Settings) -> Cause {
        match &mut self.keeper {
            Err(_) => *self = Self::open(settings),
            Ok(keeper) => {
                if keeper.storm.due().is_some() {
                    return Cause::Foreign(None);
                }
                keeper.forget_ended();
            }
        }
        Cause::Plan
    }

    fn look(&mut self, spec: Option<&Spec>, cause: &Cause, is_first: bool) -> observation::Gate {
        self.looked = Instant::now();
        match &mut self.keeper {
            Ok(keeper) => {
                if is_first {
                    keeper.keep_sessions(spec);
                }
                keeper.reconcile(spec, cause)
            }
            Err(reason) => observation::Gate {
                held: Err(reason.clone()),
                applied: Err(reason.clone()),
                ..observation::Gate::default()
            },
        }
    }
}

/// Waits for a foreign change; a source that is not there has none. One that fails is looked after now and
/// then: what it would have told is seen by looking.
async fn foreign(tables: &Option<Events>) -> Option<Author> {
    let Some(tables) = tables else {
        return std::future::pending().await;
    };
    match tables.next().await {
        Ok(author) => author,
        Err(error) => {
            warn!(MESSAGE_ID = id::DEGRADED, %error, "changes of nf_tables are not told");
            sleep(RETRY).await;
            None
        }
    }
}

async fn link_changed(events: &Option<links::Events>) {
    let Some(events) = events else {
        return std::future::pending().await;
    };
    if events.next().await.is_err() {
        std::future::pending::<()>().await;
    }
}
