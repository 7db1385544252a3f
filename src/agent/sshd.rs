//! sshd beyond the keys: its other ports, and our drop-in among its files.
//!
//! A change of the drop-in is one step with a way back: written, tested by sshd, read by the running one, and
//! judged by the same look at logins as before it. Who could log in before and can't afterwards is the reason
//! to put back what was there.
//! May not live here: what the drop-in says (`policy::sshd_drop_in`), what makes a login good
//! (`policy::readiness`).

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{error, info, warn};

use super::Agent;
use super::logins::{self, Look, Memory, Mode, Seen};
use super::state::{StateError, Store};
use crate::log::id;
use crate::policy::key_path::KeyPlace;
use crate::policy::key_questions::Acceptance;
use crate::policy::observation::{KeyState, Observed, SshdConfig};
use crate::policy::sshd_drop_in::{Wishes, held, text};
use crate::system::key_place::Placing;
use crate::system::ssh_probe;
use crate::system::sshd::Sshd;
use crate::system::sshd_config::DropIn;
use crate::system::sshd_reload::reload;

/// How long an sshd that read its configuration anew may take to let in everybody again.
const SETTLE_TIME: Duration = Duration::from_secs(5);
/// Between two looks in that time.
const SETTLE_PAUSE: Duration = Duration::from_millis(100);

/// The configured ports after the first that complete no handshake, and why. The first one is asked with
/// the keys.
pub async fn unanswered(config: &Observed<SshdConfig>) -> Vec<(SocketAddr, String)> {
    let addresses = config.as_ref().map(SshdConfig::local_addresses);
    let mut unanswered = Vec::new();
    for address in addresses.unwrap_or_default().into_iter().skip(1) {
        if let Err(reason) = ssh_probe::handshake(address).await {
            unanswered.push((address, reason));
        }
    }
    unanswered
}

/// What is known of the drop-in.
pub struct Configured {
    wishes: Wishes,
    file: DropIn,
    /// The change that was taken back, and why: it is tried again once the other files say something else.
    refused: Option<(Change, String)>,
    /// Why sshd does not have it.
    problem: Option<String>,
    /// Whether the homes still have to be cleared, once sshd reads root's files.
    homes_to_clear: bool,
    /// Whether that is being done.
    clearing: bool,
    /// Whether the file was changed, and nobody has seen yet that logins work with it.
    unproven: bool,
    /// Whether a running sshd may not have read the file as it is.
    unread: bool,
}

impl Configured {
    /// For these wishes; nothing is looked at yet. An earlier process may have left a change half done.
    pub fn new(wishes: Wishes, store: &Store) -> Self {
        let unproven = store.drop_in_is_unproven();
        Self {
            wishes,
            file: DropIn::find(),
            refused: None,
            problem: None,
            homes_to_clear: wishes.keys == KeyPlace::System,
            clearing: false,
            unproven,
            unread: unproven,
        }
    }

    /// Whether nobody saw yet what a drop-in does to logins.
    pub fn is_unproven(&self) -> bool {
        self.unproven
    }

    /// The change that is to be made, if one is.
    async fn change(&self) -> Observed<Option<Change>> {
        let old = match self.file.current() {
            // Somebody else's file matters only to who wants it to be ours.
            Err(_) if self.wishes == Wishes::default() => return Ok(None),
            old => old?,
        };
        if self.wishes == Wishes::default() && old.is_none() {
            return Ok(None);
        }
        let base = self.file.base(&Sshd::find()?).await;
        let new = match base.as_ref() {
            Ok(base) => text(self.wishes, base).map(String::into_bytes),
            // What is wished no longer is removed from a broken configuration too.
            Err(_) if self.wishes == Wishes::default() => None,
            Err(reason) => return Err(reason.clone()),
        };
        let others = self.file.others();
        Ok((new != old).then_some(Change { new, old, others }))
    }
}

/// A change of the drop-in.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Change {
    new: Option<Vec<u8>>,
    old: Option<Vec<u8>>,
    /// What the other files say.
    others: Vec<(PathBuf, Vec<u8>)>,
}

impl Agent {
    /// Puts keys and the drop-in in place and looks at logins.
    pub(super) async fn look_at_logins(&mut self) {
        let settled = self.settle().await;
        let mut seen = match settled {
            Ok(true) => self.look_until(answers).await,
            // What sshd said before the drop-in proves nothing.
            _ if self.configured.unproven => self.look_anew().await,
            _ => self.look().await,
        };
        let change = match settled {
            Ok(_) => self.configured.change().await,
            Err(reason) => Err(reason),
        };
        match change {
            Ok(None) => {
                self.configured.problem = None;
                if self.configured.unproven && answers(&seen).await {
                    seen = self.prove(seen).await;
                }
            }
            Ok(Some(change)) => seen = self.try_change(change, seen).await,
            Err(reason) => self.configured.problem = Some(reason),
        }
        let configured = &mut self.configured;
        if let (None, Ok(config)) = (&configured.problem, &seen.sshd.config) {
            configured.problem = held(configured.wishes, config).err();
        }
        let holds = configured.problem.is_none() && !configured.unproven && seen.sshd.config.is_ok();
        if configured.homes_to_clear && holds {
            self.configured.clearing = true;
            seen = self.look_anew().await;
            self.configured.clearing = false;
            self.configured.homes_to_clear = false;
        }
        self.log_new_failures(&seen.keys, &seen.unfit);
        self.key_files = seen.files;
        (self.seen.sshd, self.seen.keys, self.seen.unfit) = (seen.sshd, seen.keys, seen.unfit);
    }

    /// What was done for sshd, for the report.
    pub(super) fn tell_care(&mut self) {
        let care = &mut self.seen.sshd.care;
        care.drop_in = self.configured.wishes != Wishes::default();
        care.drop_in_problem.clone_from(&self.configured.problem);
        self.restarter.tell(care);
    }

    async fn look(&mut self) -> Seen {
        let look = Look {
            spec: self.spec.as_deref(),
            store: &self.store,
            settings: &self.settings,
            mode: Mode::Reconcile,
            placing: Placing {
                place: self.configured.wishes.keys,
                clear_home: self.configured.clearing,
            },
            removed: &self.removed_keys,
        };
        logins::look(&look, &mut self.known_logins).await
    }

    /// A look for which nothing is known, as after a change of sshd's configuration.
    async fn look_anew(&mut self) -> Seen {
        self.known_logins.forget();
        self.look().await
    }

    /// What logins are like through the homes; changes nothing.
    async fn look_at_homes(&self) -> Seen {
        let look = Look {
            spec: self.spec.as_deref(),
            store: &self.store,
            settings: &self.settings,
            mode: Mode::Observe,
            placing: Placing::seen(KeyPlace::Home),
            removed: &self.removed_keys,
        };
        logins::look(&look, &mut Memory::default()).await
    }

    /// Makes the change, and takes it back if a login that worked no longer does. What is seen in the end.
    async fn try_change(&mut self, change: Change, before: Seen) -> Seen {
        if let Some((refused, reason)) = &self.configured.refused
            && *refused == change
        {
            self.configured.problem = Some(reason.clone());
            return before;
        }
        let before = match self.configured.wishes.keys {
            KeyPlace::Home => before,
            // Until sshd reads root's files, logins work through the homes.
            KeyPlace::System => self.look_at_homes().await,
        };
        let file = self.configured.file.path().display().to_string();
        let answered = answers(&before).await;
        match self.make(&change, &before, answered).await {
            Ok(seen) => {
                info!(
                    MESSAGE_ID = id::SSHD_CONFIGURED,
                    FILE = file,
                    WRITTEN = change.new.is_some(),
                    "sshd's configuration was changed"
                );
                self.configured.refused = None;
                self.configured.problem = None;
                seen
            }
            Err(reason) => {
                let back = self.configured.file.put(change.old.as_deref());
                let reason = match back {
                    Ok(()) => format!("{reason}; {file} is as it was before"),
                    Err(worse) => format!("{reason}; and it could not be taken back: {worse}"),
                };
                error!(
                    MESSAGE_ID = id::SSHD_REFUSED,
                    FILE = file,
                    REASON = reason,
                    "sshd's configuration could not be changed: {reason}"
                );
                self.configured.refused = Some((change, reason.clone()));
                self.configured.problem = Some(reason);
                // What systemd says of this does not help: the next look tells how sshd is.
                match reload().await {
                    Ok(told) if told || answered => self.proven(),
                    _ => self.configured.unread = true,
                }
                let answers = Seen {
                    keys: Vec::new(),
                    ..before
                };
                let seen = self.until_as_good_as(&answers).await;
                seen.unwrap_or_else(|(seen, _)| seen)
            }
        }
    }

    async fn make(&mut self, change: &Change, before: &Seen, answered: bool) -> Observed<Seen> {
        // First: whoever comes after a crash must know that sshd may not have read it.
        self.store.note_unproven_drop_in().map_err(|e| e.to_string())?;
        (self.configured.unproven, self.configured.unread) = (true, true);
        self.configured.file.put(change.new.as_deref())?;
        Sshd::find()?.test().await?;
        self.configured.unread = !reload().await?;
        let seen = self
            .until_as_good_as(before)
            .await
            .map_err(|(_, reason)| reason)?;
        // An sshd that did not answer before has nothing that could be compared.
        if answered {
            self.proven();
        }
        Ok(seen)
    }

    /// Forgets that the file was changed.
    fn proven(&mut self) {
        match self.store.forget_unproven_drop_in() {
            Ok(()) => (self.configured.unproven, self.configured.unread) = (false, false),
            Err(error) => {
                warn!(MESSAGE_ID = id::DEGRADED, %error, "sshd's drop-in is judged again");
            }
        }
    }

    /// Has a running sshd read its files, if it may not have since the drop-in was changed: before it ran, or
    /// by a process that was ended meanwhile. True if it did.
    async fn settle(&mut self) -> Observed<bool> {
        if !self.configured.unread {
            return Ok(false);
        }
        let told = match reload().await {
            // Ours may be what it does not like: then it is tried again from the beginning.
            Err(reason)
                if Sshd::find()?.test().await.is_err() && self.configured.file.current()?.is_some() =>
            {
                self.configured.file.put(None)?;
                return Err(reason);
            }
            told => told?,
        };
        self.configured.unread = !told;
        Ok(told)
    }

    /// Judges a drop-in for which nothing could be compared when it was written. If keys are refused with it,
    /// it is taken out, and put back only if that changes nothing.
    async fn prove(&mut self, seen: Seen) -> Seen {
        let current = self.configured.file.current().ok().flatten();
        if current.is_none() || all_work(&seen) {
            self.proven();
            return seen;
        }
        if let Err(reason) = self.configured.file.put(None) {
            self.configured.problem = Some(reason);
            return seen;
        }
        if let Err(reason) = reload().await {
            self.configured.unread = true;
            self.configured.problem = Some(reason);
            return seen;
        }
        let before = self.look_until(async |seen| all_work(seen)).await;
        let change = Change {
            new: current,
            old: None,
            others: self.configured.file.others(),
        };
        self.try_change(change, before).await
    }

    /// Looks until every login works that worked then; else what was seen last, and what does not work.
    async fn until_as_good_as(&mut self, before: &Seen) -> Result<Seen, (Seen, String)> {
        let seen = self.look_until(async |seen| worse(before, seen).is_none()).await;
        match worse(before, &seen) {
            None => Ok(seen),
            Some(reason) => Err((seen, reason)),
        }
    }

    /// Looks, after sshd read its files, until it is as it should be; not for longer than that takes.
    async fn look_until(&mut self, is_so: impl AsyncFn(&Seen) -> bool) -> Seen {
        let end = Instant::now() + SETTLE_TIME;
        loop {
            let seen = self.look_anew().await;
            if is_so(&seen).await || Instant::now() > end {
                return seen;
            }
            sleep(SETTLE_PAUSE).await;
        }
    }
}

/// Whether sshd speaks with anybody, whatever it thinks of the users that it was asked about.
async fn answers(seen: &Seen) -> bool {
    let address = seen.sshd.config.as_ref().ok().and_then(SshdConfig::local_address);
    match address {
        _ if seen.sshd.handshake.is_ok() => true,
        Some(address) => ssh_probe::handshake(address).await.is_ok(),
        None => false,
    }
}

/// Whether sshd takes all keys that are in place, as far as it can be asked.
fn all_work(seen: &Seen) -> bool {
    let takes = |key: &KeyState| {
        matches!(
            key.accepted,
            Acceptance::Accepted | Acceptance::Inferred | Acceptance::Unaskable(_)
        )
    };
    seen.keys.iter().all(|key| takes(key) || key.installed.is_err())
}

const UNPROVEN_FILE: &str = "sshd-drop-in-unproven";

impl Store {
    /// Whether the drop-in was changed and nobody has seen that logins work with it. What can't be told is yes.
    fn drop_in_is_unproven(&self) -> bool {
        self.path(UNPROVEN_FILE).try_exists().unwrap_or(true)
    }

    fn note_unproven_drop_in(&self) -> Result<(), StateError> {
        self.save(UNPROVEN_FILE, &())
    }

    fn forget_unproven_drop_in(&self) -> Result<(), StateError> {
        self.remove(UNPROVEN_FILE)
    }
}

/// What worked before and does not now.
fn worse(before: &Seen, after: &Seen) -> Option<String> {
    let works = |key: &KeyState| matches!(key.accepted, Acceptance::Accepted | Acceptance::Inferred);
    let worked = before.keys.iter().filter(|key| works(key));
    let refused = worked.filter_map(|key| {
        let same = |k: &&KeyState| k.grant.key == key.grant.key;
        // A key that expired meanwhile is not sshd's doing.
        let now = after.keys.iter().find(same)?;
        let reason = match &now.accepted {
            _ if works(now) => return None,
            Acceptance::Unknown(reason) | Acceptance::Unaskable(reason) => reason.clone(),
            _ => "it is refused".to_owned(),
        };
        let (user, fingerprint) = (&key.grant.key.user, key.grant.key.key.fingerprint());
        Some(format!("{user}'s key {fingerprint} no longer works: {reason}"))
    });
    let port = || match (&before.sshd.handshake, &after.sshd.handshake) {
        (Ok(_), Err(reason)) => Some(reason),
        _ => {
            let silent_before = |address| before.sshd.unanswered.iter().any(|(a, _)| a == address);
            let mut silent = after.sshd.unanswered.iter();
            silent
                .find(|(address, _)| !silent_before(address))
                .map(|(_, reason)| reason)
        }
    };
    refused
        .chain(port().map(|reason| format!("sshd no longer answers: {reason}")))
        .next()
}
