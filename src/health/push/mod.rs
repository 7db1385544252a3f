//! Pushing reports to the control plane: changes at once, in order and until each is taken; else the newest
//! report on an interval with jitter; patiently while the control plane is away.
//!
//! It knows no file: what is delivered, and by which credentials, is offered by the agent (`offer`).
//! May not live here: what a report says, keeping reports.

pub(super) mod client;
pub mod offer;
pub mod patience;
mod platform;
mod service_account;
pub mod token;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::debug;

use client::{Courier, Failure, Parcel};
use offer::{Change, Offer, Said};
use patience::{Patience, jittered};

/// Tries after which a change that the receiver refuses is given up, so that it holds up no others.
const MAX_REFUSALS: u32 = 5;
/// Time that the agent has to read the credentials' files again.
const REREAD_TIME: Duration = Duration::from_secs(5);

/// The agent is gone.
struct Gone;

/// Pushes until the agent offers nothing any more.
pub async fn run(offers: watch::Receiver<Offer>, said: mpsc::Sender<Said>) {
    let interval = offers.borrow().interval;
    let mut pusher = Pusher {
        offers,
        said,
        courier: Courier::default(),
        patience: Patience::default(),
        due: Instant::now() + jittered(interval),
        nudge: 0,
        refusals: 0,
    };
    while pusher.turn().await.is_ok() {}
}

struct Pusher {
    offers: watch::Receiver<Offer>,
    said: mpsc::Sender<Said>,
    courier: Courier,
    patience: Patience,
    /// When the newest report is told although nothing changed.
    due: Instant,
    /// The last nudge that was followed.
    nudge: u64,
    /// How often in a row the receiver refused the oldest change.
    refusals: u32,
}

impl Pusher {
    /// Delivers what there is, or waits for something to deliver.
    async fn turn(&mut self) -> Result<(), Gone> {
        let offer = self.offers.borrow_and_update().clone();
        let Some(url) = &offer.url else {
            return self.offers.changed().await.map_err(|_| Gone);
        };
        let urgent = offer.nudge != self.nudge || Instant::now() >= self.due;
        match (&offer.change, &offer.newest) {
            (Some(change), _) => {
                let parcel = parcel_of(change);
                self.deliver(url, &offer, &parcel).await
            }
            (None, Some(report)) if urgent => {
                // Checked types always make JSON.
                let body = serde_json::to_vec(&**report).unwrap_or_default();
                self.deliver(url, &offer, &Parcel { body, change: None }).await
            }
            _ => tokio::select! {
                changed = self.offers.changed() => changed.map_err(|_| Gone),
                () = sleep_until(self.due) => Ok(()),
            },
        }
    }

    /// Tries once, again at once if the receiver wants another token and there is one, and waits after a failure.
    async fn deliver(&mut self, url: &str, offer: &Offer, parcel: &Parcel) -> Result<(), Gone> {
        let mut result = self.courier.deliver(url, offer, parcel).await;
        if matches!(result, Err(Failure::Unauthorized(_))) {
            let had_token = self.courier.forget_token();
            let now = self.read_again(offer.reads).await?;
            if had_token || !Arc::ptr_eq(&now.access, &offer.access) {
                result = self.courier.deliver(url, &now, parcel).await;
            }
        }
        match result {
            Ok(()) => self.delivered(offer, parcel.change).await,
            Err(Failure::Later(wait)) => {
                let reason = format!("the receiver asks to wait {} s", wait.as_secs());
                self.say(Said::Failed { reason }).await?;
                self.pause(url, None, wait).await
            }
            Err(Failure::Refused(reason)) => self.refused(url, offer, parcel.change, reason).await,
            Err(Failure::Unauthorized(reason) | Failure::Other(reason)) => {
                self.say(Said::Failed { reason }).await?;
                let wait = self.patience.next_wait();
                self.pause(url, Some(offer), wait).await
            }
        }
    }

    async fn delivered(&mut self, offer: &Offer, change: Option<u64>) -> Result<(), Gone> {
        self.patience = Patience::default();
        self.refusals = 0;
        self.due = Instant::now() + jittered(offer.interval);
        if change.is_none() {
            self.nudge = offer.nudge;
        }
        self.say(Said::Delivered { change }).await?;
        self.settled(change).await
    }

    async fn refused(
        &mut self,
        url: &str,
        offer: &Offer,
        change: Option<u64>,
        reason: String,
    ) -> Result<(), Gone> {
        self.refusals += 1;
        if let Some(change) = change
            && self.refusals >= MAX_REFUSALS
        {
            self.refusals = 0;
            self.say(Said::GivenUp { change, reason }).await?;
            return self.settled(Some(change)).await;
        }
        self.say(Said::Failed { reason }).await?;
        let wait = self.patience.next_wait();
        self.pause(url, Some(offer), wait).await
    }

    /// Waits until the agent offers another change than the one that is done with.
    async fn settled(&mut self, done: Option<u64>) -> Result<(), Gone> {
        let Some(done) = done else { return Ok(()) };
        let other = |offer: &Offer| offer.change.as_ref().is_none_or(|change| change.sequence != done);
        self.offers.wait_for(other).await.map(|_| ()).map_err(|_| Gone)
    }

    /// Has the credentials' files read, and says what is offered then.
    async fn read_again(&mut self, reads: u64) -> Result<Offer, Gone> {
        self.say(Said::Unauthorized).await?;
        let read = timeout(REREAD_TIME, self.offers.wait_for(|offer| offer.reads > reads));
        match read.await {
            Ok(Ok(offer)) => return Ok(offer.clone()),
            Ok(Err(_)) => return Err(Gone),
            Err(_) => {}
        }
        // An agent that is busy: what it offered before may still do.
        Ok(self.offers.borrow().clone())
    }

    /// Waits. Another receiver is tried at once; so is the same one with other credentials than those of
    /// `tried`, unless it was the receiver that asked for patience.
    async fn pause(&mut self, url: &str, tried: Option<&Offer>, wait: Duration) -> Result<(), Gone> {
        debug!(?wait, "waiting before the next try");
        let access = tried.map(|offer| offer.access.clone());
        let changed = self.offers.wait_for(|offer| {
            let other_access = access
                .as_ref()
                .is_some_and(|access| !Arc::ptr_eq(access, &offer.access));
            offer.url.as_deref() != Some(url) || other_access
        });
        tokio::select! {
            () = sleep(wait) => Ok(()),
            changed = changed => changed.map(|_| ()).map_err(|_| Gone),
        }
    }

    async fn say(&self, what: Said) -> Result<(), Gone> {
        self.said.send(what).await.map_err(|_| Gone)
    }
}

fn parcel_of(change: &Change) -> Parcel {
    Parcel {
        body: change.body.as_bytes().to_vec(),
        change: Some(change.sequence),
    }
}
