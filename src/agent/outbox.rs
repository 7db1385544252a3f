//! The agent's side of pushing: keeps changes until they were delivered, reads the credentials, offers both to
//! the pusher, and knows how it goes.
//!
//! May not live here: the network (`health::push`), which may be another process.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;
use portcullis_protocol::Report;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tracing::{error, info, warn};

use super::report_access;
use super::spool::{Added, Spool};
use crate::config::report::ReportSettings;
use crate::health::push::offer::{Offer, PushState, Said};
use crate::identity::TlsIdentity;
use crate::identity::time::KnownTime;
use crate::log::id;
use crate::system::clock;
use crate::system::watch::{Topic, Watch};

/// What the agent has to tell.
struct Update {
    report: Arc<Report>,
    url: Option<String>,
    identity: Arc<TlsIdentity>,
}

/// Takes reports, and says where the pusher gets them from.
pub struct Outbox {
    /// None when it is closed.
    updates: Option<mpsc::UnboundedSender<Update>>,
    keeper: Option<JoinHandle<()>>,
    offers: watch::Receiver<Offer>,
    said: mpsc::Sender<Said>,
    state: watch::Receiver<PushState>,
}

impl Outbox {
    /// Starts, with what an earlier process left in the state folder. Ends when this is dropped.
    pub fn start(settings: ReportSettings, state_dir: PathBuf, identity: Arc<TlsIdentity>) -> Self {
        let (updates, updated) = mpsc::unbounded_channel();
        let (said, answers) = mpsc::channel(8);
        let (offer_sender, offers) = watch::channel(Offer {
            interval: settings.interval,
            // Other than that of an earlier process, whose pusher may live on.
            nudge: u64::try_from(clock::since_boot().as_millis()).unwrap_or_default(),
            ..Offer::default()
        });
        let (state_sender, state) = watch::channel(PushState::default());
        let (spool, reason) = Spool::open(&state_dir, settings.spool);
        if let Some(reason) = reason {
            error!(
                MESSAGE_ID = id::REPORT_DROPPED,
                REASON = reason,
                "reports that waited can't be used: {reason}"
            );
        }
        let mut keeper = Keeper {
            settings,
            spool,
            time: identity.clock().what_is_known(),
            identity,
            offers: offer_sender,
            state: state_sender,
            watch: None,
        };
        keeper.read_access();
        keeper.watch_files();
        keeper.offer_oldest();
        let keeper = tokio::spawn(keeper.keep(updated, answers));
        Self {
            updates: Some(updates),
            keeper: Some(keeper),
            offers,
            said,
            state,
        }
    }

    /// Tells a new report, and where it goes to. The report is on disk soon after, if it tells news.
    pub fn tell(&self, report: Arc<Report>, url: Option<String>, identity: Arc<TlsIdentity>) {
        // The other end lives as long as this one, and takes updates faster than reports can be written.
        if let Some(updates) = &self.updates {
            let _ = updates.send(Update {
                report,
                url,
                identity,
            });
        }
    }

    /// Takes no more reports; those that it has are on disk when this returns.
    pub async fn close(&mut self) {
        self.updates = None;
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.await;
        }
    }

    /// What is offered to the pusher.
    pub fn offers(&self) -> watch::Receiver<Offer> {
        self.offers.clone()
    }

    /// Where the pusher tells how it went.
    pub fn said(&self) -> mpsc::Sender<Said> {
        self.said.clone()
    }

    /// How pushing goes.
    pub fn state(&self) -> watch::Receiver<PushState> {
        self.state.clone()
    }
}

struct Keeper {
    settings: ReportSettings,
    spool: Spool,
    identity: Arc<TlsIdentity>,
    /// What was known of the time when the credentials were read.
    time: KnownTime,
    offers: watch::Sender<Offer>,
    state: watch::Sender<PushState>,
    watch: Option<Watch>,
}

impl Keeper {
    async fn keep(mut self, mut updates: mpsc::UnboundedReceiver<Update>, mut said: mpsc::Receiver<Said>) {
        loop {
            tokio::select! {
                update = updates.recv() => match update {
                    Some(update) => self.take(update),
                    None => return,
                },
                Some(said) = said.recv() => self.heard(said),
                changed = credentials_changed(&mut self.watch) => {
                    if let Err(error) = changed {
                        warn!(MESSAGE_ID = id::DEGRADED, %error, "credentials for reports are no longer watched");
                        self.watch = None;
                    }
                    self.read_access();
                }
            }
        }
    }

    fn take(&mut self, update: Update) {
        let time = update.identity.clock().what_is_known();
        if !Arc::ptr_eq(&self.identity, &update.identity) || self.time != time {
            (self.identity, self.time) = (update.identity, time);
            self.read_access();
        }
        // The first report of a process is told even if it says what an earlier one said.
        let mut nudge = self.offers.borrow().newest.is_none();
        if update.url.is_some() {
            match self.spool.add(&update.report) {
                Ok(Added::NoNews | Added::Waits { dropped: 0 }) => {}
                Ok(Added::Waits { dropped }) => warn!(
                    MESSAGE_ID = id::REPORT_DROPPED,
                    DROPPED = dropped,
                    "no room for more reports that wait: the oldest went"
                ),
                Err(error) => {
                    warn!(
                        MESSAGE_ID = id::REPORT_DROPPED,
                        %error,
                        "a change can't be kept until it is delivered; the newest report is pushed at once"
                    );
                    nudge = true;
                }
            }
        }
        self.offers.send_modify(|offer| {
            offer.newest = Some(update.report);
            offer.url = update.url;
            offer.nudge += u64::from(nudge);
        });
        self.offer_oldest();
    }

    /// Of changes, only the one that is offered can be done with.
    fn heard(&mut self, said: Said) {
        let offered = self.offers.borrow().change.as_ref().map(|change| change.sequence);
        match said {
            Said::Delivered { change: Some(other) } | Said::GivenUp { change: other, .. }
                if offered != Some(other) =>
            {
                return;
            }
            Said::Delivered { change } => {
                if let Some(sequence) = change {
                    self.spool.done(sequence);
                }
                let mut before = None;
                self.state.send_modify(|state| {
                    before = state.last_error.take();
                    state.last_success = Some(Timestamp::now());
                    state.delivered += 1;
                });
                if let Some(before) = before {
                    info!(
                        MESSAGE_ID = id::REPORT_DELIVERED,
                        REASON = before,
                        "reports are delivered again"
                    );
                }
            }
            Said::Failed { reason } => self.failed(reason),
            Said::GivenUp { change, reason } => {
                self.spool.given_up(change);
                warn!(
                    MESSAGE_ID = id::REPORT_DROPPED,
                    SEQUENCE = change,
                    REASON = reason,
                    "the receiver refuses a report, which is given up: {reason}"
                );
                self.failed(reason);
            }
            Said::Unauthorized => {
                self.read_access();
                return;
            }
        }
        self.offer_oldest();
    }

    fn failed(&mut self, reason: String) {
        warn!(
            MESSAGE_ID = id::REPORT_FAILED,
            REASON = reason,
            "the report was not delivered: {reason}"
        );
        self.state.send_modify(|state| {
            state.last_error = Some(reason);
            state.failed += 1;
        });
    }

    /// Offers the oldest change; the pusher is only woken if something is other than before.
    fn offer_oldest(&mut self) {
        let offered = self.offers.borrow().change.as_ref().map(|change| change.sequence);
        let oldest = self.spool.queue().oldest().map(|oldest| oldest.sequence);
        let change = (offered != oldest).then(|| self.spool.oldest());
        let (last, dropped) = (self.spool.queue().next() - 1, self.spool.queue().dropped());
        let stream = self.spool.id();
        self.offers.send_if_modified(|offer| {
            let is_other = change.is_some() || (offer.last, offer.dropped) != (last, dropped);
            if let Some(change) = change {
                offer.change = change;
            }
            (offer.last, offer.dropped) = (last, dropped);
            if offer.stream != stream {
                offer.stream = stream.to_owned();
            }
            is_other
        });
        let (queued, oldest) = (self.spool.queue().len() as u64, self.spool.waits_since());
        let configured = self.offers.borrow().url.is_some();
        self.state.send_if_modified(|state| {
            let before = (state.configured, state.queued, state.oldest, state.dropped);
            (state.configured, state.queued, state.oldest, state.dropped) =
                (configured, queued, oldest, dropped);
            before != (configured, queued, oldest, dropped)
        });
    }

    /// Reads the credentials. The same ones again are not offered as others, but the reading is.
    fn read_access(&mut self) {
        let access = report_access::load(&self.settings, &self.identity);
        self.offers.send_modify(|offer| {
            offer.reads += 1;
            if *offer.access == access {
                return;
            }
            if let Err(reason) = &access {
                error!(
                    MESSAGE_ID = id::REPORT_CREDENTIALS,
                    REASON = reason,
                    "reports can't be pushed: {reason}"
                );
            }
            offer.access = Arc::new(access);
        });
    }

    fn watch_files(&mut self) {
        let files = report_access::files(&self.settings);
        if files.is_empty() {
            return;
        }
        let open = || -> io::Result<Watch> {
            let mut watch = Watch::new()?;
            for file in &files {
                watch.file(Topic::Credentials, file)?;
            }
            Ok(watch)
        };
        match open() {
            Ok(watch) => self.watch = Some(watch),
            Err(error) => warn!(
                MESSAGE_ID = id::DEGRADED,
                %error,
                "credentials for reports are not watched: they are read again when the receiver refuses them"
            ),
        }
    }
}

async fn credentials_changed(watch: &mut Option<Watch>) -> io::Result<()> {
    match watch {
        Some(watch) => watch.changed().await.map(|_| ()),
        None => std::future::pending().await,
    }
}
