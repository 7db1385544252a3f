//! Keeping the kernel's table as the spec says: know what is held, change what differs, read back.
//!
//! May not live here: rules (`policy::firewall`), netlink (`system::nftables`), when to look (`guard`).

pub mod guard;
mod sessions;
mod storm;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;
use portcullis_protocol::Spec;
use tracing::{error, info, warn};

use crate::config::Settings;
use crate::log::id;
use crate::policy::firewall::{Inputs, SAMPLE_RULE, kept_by, ruleset};
use crate::policy::links;
use crate::policy::observation::{self, Observed};
use crate::policy::ruleset::Ruleset;
use crate::policy::ruleset::change::{opens, steps};
use crate::system::links as system_links;
use crate::system::nftables::events::Author;
use crate::system::nftables::{Error, Held, Nftables, Owner};
use storm::Storm;

/// How often a change is tried anew when others change nf_tables at the same time.
const TRIES: usize = 5;

/// The one writer of table `inet portcullis`.
pub struct Gatekeeper {
    settings: Settings,
    nftables: Nftables,
    /// What the kernel held when it was last read, if nobody has changed it since.
    held: Option<Held>,
    /// What was last put in place; to tell somebody else's change from the first application.
    applied: Option<Arc<Ruleset>>,
    /// Hosts with sessions that are older than the gate.
    kept: BTreeSet<IpAddr>,
    /// Whether denied packets are sampled: until the kernel refuses that.
    sample: bool,
    repaired: u64,
    storm: Storm,
    /// Who made the last change that had to be undone.
    culprit: Option<String>,
}

/// Why the gatekeeper looks.
#[derive(Clone, Debug)]
pub enum Cause {
    /// The spec may be another, or links are.
    Plan,
    /// Somebody else changed the table; who, if the kernel told.
    Foreign(Option<Author>),
}

impl Gatekeeper {
    /// A gatekeeper that has done nothing yet. The table will be its own, where settings and kernel
    /// allow that.
    ///
    /// # Errors
    /// When there is no nf_tables, or it may not be used.
    pub fn new(settings: &Settings) -> Result<Self, Error> {
        Ok(Self {
            settings: settings.clone(),
            nftables: Nftables::open_writer(settings.exclusive_table)?,
            held: None,
            applied: None,
            kept: BTreeSet::new(),
            sample: true,
            repaired: 0,
            storm: Storm::default(),
            culprit: None,
        })
    }

    /// The number of the connection that changes the table.
    fn port(&self) -> u32 {
        self.nftables.port()
    }

    /// Makes the kernel hold what the spec says, and reads it back. A kernel that holds it already is
    /// left alone. When a foreign change can wait and there are too many, nothing is done until
    /// [`Storm::wait`] is over.
    fn reconcile(&mut self, spec: Option<&Spec>, cause: &Cause) -> observation::Gate {
        if matches!(cause, Cause::Foreign(_)) {
            self.held = None;
        }
        // What others change in the table changes nothing in the plan, and making one for 100,000 peers takes
        // longer than shutting the gate.
        let standing = self
            .applied
            .clone()
            .filter(|_| matches!(cause, Cause::Foreign(_)));
        let mut planned = standing.unwrap_or_else(|| Arc::new(self.plan(spec)));
        let mut result = self.enforce(&planned, cause);
        if self.can_do_without(&result) {
            planned = Arc::new(self.plan(spec));
            result = self.enforce(&planned, cause);
        }
        let (applied, held) = match result {
            Ok(()) => (Ok(()), Ok(self.held.as_ref())),
            Err(error) => {
                let reason = error.to_string();
                error!(
                    MESSAGE_ID = id::GATE_FAILED,
                    REASON = reason,
                    "the gate could not be applied: {reason}"
                );
                // What can't be read is not the same as what is not there.
                let read = self.nftables.read();
                let unread = read.as_ref().err().map(ToString::to_string);
                self.held = read.ok().flatten();
                (Err(reason), unread.map_or(Ok(self.held.as_ref()), Err))
            }
        };
        let mut gate = seen(planned.clone(), held.map(|held| held.cloned()), applied);
        if gate.applied.is_ok() {
            self.applied = Some(planned);
        }
        gate.repaired = self.repaired;
        gate.culprit.clone_from(&self.culprit);
        gate.kept = self.kept.len();
        gate
    }

    fn plan(&self, spec: Option<&Spec>) -> Ruleset {
        plan(&self.settings, spec, &self.kept, self.sample)
    }

    /// A kernel without nfnetlink_log refuses the whole table for the one rule that shuts nothing.
    fn can_do_without(&mut self, result: &Result<(), Error>) -> bool {
        let refused = match result {
            Err(Error::Refused { object, .. }) => object.contains(SAMPLE_RULE),
            _ => false,
        };
        if refused && self.sample {
            warn!(
                MESSAGE_ID = id::DEGRADED,
                "the kernel can't copy denied packets: they are counted, not told"
            );
        }
        refused && std::mem::take(&mut self.sample)
    }

    fn enforce(&mut self, planned: &Arc<Ruleset>, cause: &Cause) -> Result<(), Error> {
        for _ in 0..TRIES {
            if self.held.is_none() {
                self.held = self.nftables.read()?;
            }
            if self.held.as_ref().is_some_and(|held| held.owner == Owner::Nobody) {
                self.nftables.probe_exclusive();
            }
            if self.is_in_place(planned) {
                return Ok(());
            }
            if self.can_wait(planned, cause) {
                return Ok(());
            }
            let before = self.held.take();
            match self.change(before.as_ref(), planned) {
                Ok(after) => {
                    self.held = after;
                    self.done(before.as_ref(), planned, cause);
                    if self.is_in_place(planned) {
                        return Ok(());
                    }
                }
                Err(Error::Moved) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::Unsteady)
    }

    fn is_in_place(&self, planned: &Ruleset) -> bool {
        let is_right = |held: &Held| held.ruleset == *planned && !self.is_owned_wrongly(held);
        self.held.as_ref().is_some_and(is_right)
    }

    /// Whether the table is nobody's and should be ours alone, or the other way round. One that another
    /// process owns, as the daemon does while somebody runs `lockdown`, is in good hands.
    fn is_owned_wrongly(&self, held: &Held) -> bool {
        match held.owner {
            Owner::Nobody | Owner::Orphan => self.nftables.is_exclusive(),
            Owner::Us => !self.nftables.is_exclusive(),
            Owner::Other(_) => false,
        }
    }

    /// A change that only shuts more is undone later when there are many: undoing each would only wear
    /// the instance out. One that may let something in is always undone at once.
    fn can_wait(&mut self, planned: &Ruleset, cause: &Cause) -> bool {
        if !matches!(cause, Cause::Foreign(_)) {
            return false;
        }
        let is_open = opens(self.held.as_ref().map(|held| &held.ruleset), planned);
        !is_open && self.storm.wait(Instant::now()).is_some()
    }

    /// One transaction, and what is held after it.
    fn change(&mut self, before: Option<&Held>, planned: &Ruleset) -> Result<Option<Held>, Error> {
        let Some(before) = before else {
            self.nftables.replace(planned)?;
            return self.nftables.read();
        };
        if before.owner == Owner::Orphan && self.nftables.is_exclusive() {
            self.nftables.adopt()?;
            return self.nftables.read_after(before, &before.ruleset);
        }
        match steps(&before.ruleset, planned) {
            Some(steps) if !self.is_owned_wrongly(before) => {
                match self.nftables.change(before, &steps) {
                    // A set has no room for what comes; it gets more in a table that is made anew.
                    Err(Error::Refused {
                        errno: Errno::ENFILE, ..
                    }) => {
                        self.nftables.replace_at_once(planned)?;
                        self.nftables.read()
                    }
                    result => {
                        result?;
                        self.nftables.read_after(before, planned)
                    }
                }
            }
            _ => {
                self.nftables.replace(planned)?;
                self.nftables.read()
            }
        }
    }

    /// What follows from a change that was made.
    fn done(&mut self, before: Option<&Held>, planned: &Arc<Ruleset>, cause: &Cause) {
        let before = before.map(|held| &held.ruleset);
        if before == Some(planned) {
            // Only the owner is another.
            return;
        }
        let diff = || before.map_or_else(|| "no table".to_owned(), |held| held.diff(planned).join("\n"));
        if self.applied.as_ref() != Some(planned) {
            info!(
                MESSAGE_ID = id::GATE_APPLIED,
                DIFF = diff(),
                "the gate is applied"
            );
            if let Some(old) = &self.applied {
                sessions::end_revoked(old, planned);
            }
            return;
        }
        self.repaired += 1;
        let by = match cause {
            Cause::Foreign(Some(author)) => author.to_string(),
            _ => "nobody known".to_owned(),
        };
        if let Some(untold) = self.storm.repaired(Instant::now()) {
            warn!(
                MESSAGE_ID = id::GATE_REPAIRED,
                DIFF = diff(),
                BY = by,
                UNTOLD = untold,
                "table inet portcullis was changed by {by}: undone"
            );
        }
        self.culprit = Some(by);
    }

    /// On a host that runs already, sessions are older than the gate: conntrack does not know them, and
    /// the rules may not let them in. They go on until they end.
    fn keep_sessions(&mut self, spec: Option<&Spec>) {
        match self.nftables.read() {
            Ok(None) => self.kept = sessions::older_than_the_gate(&self.plan(spec)),
            Ok(Some(held)) => {
                self.kept = kept_by(&held.ruleset);
                self.forget_ended();
            }
            Err(_) => {}
        }
        if !self.kept.is_empty() {
            let hosts = self.kept.len();
            info!(
                HOSTS = hosts,
                "sessions with {hosts} hosts are older than the gate and are kept"
            );
        }
    }

    /// Forgets hosts whose old sessions have ended; true if there were any.
    fn forget_ended(&mut self) -> bool {
        let before = self.kept.len();
        sessions::retain_living(&mut self.kept);
        self.kept.len() != before
    }
}

/// What the kernel should hold for this spec, now. Links that can't be read count as uplinks.
fn plan(settings: &Settings, spec: Option<&Spec>, kept: &BTreeSet<IpAddr>, sample: bool) -> Ruleset {
    let links = system_links::read().unwrap_or_else(|error| {
        warn!(MESSAGE_ID = id::DEGRADED, %error, "links can't be read: all of them are filtered");
        Vec::new()
    });
    let internal = links::internal(&links, &settings.links);
    ruleset(Inputs {
        spec,
        internal: &internal,
        health_port: settings.listen.port(),
        metadata_lock: settings.metadata_lock,
        kept,
        sample,
    })
}

/// Looks, without changing anything. What the daemon decided when it applied the table is taken from there:
/// which older sessions are kept, and whether the kernel can copy packets.
pub fn observe(settings: &Settings, spec: Option<&Spec>) -> observation::Gate {
    let held = Nftables::open().and_then(|mut nftables| nftables.read());
    let there = held
        .as_ref()
        .ok()
        .and_then(Option::as_ref)
        .map(|held| &held.ruleset);
    let kept = there.map(kept_by).unwrap_or_default();
    let rules = |held: &Ruleset| {
        held.chains
            .iter()
            .flat_map(|chain| &chain.rules)
            .any(|rule| rule.log.is_some())
    };
    let planned = Arc::new(plan(settings, spec, &kept, there.is_none_or(rules)));
    seen(planned, held.map_err(|e| e.to_string()), Ok(()))
}

fn seen(planned: Arc<Ruleset>, held: Observed<Option<Held>>, applied: Observed<()>) -> observation::Gate {
    let owned = matches!(&held, Ok(Some(held)) if matches!(held.owner, Owner::Us | Owner::Other(_)));
    // What is the same is kept once.
    let shared = |held: Held| {
        if held.ruleset == *planned {
            planned.clone()
        } else {
            Arc::new(held.ruleset)
        }
    };
    observation::Gate {
        held: held.map(|held| held.map(shared)),
        planned,
        owned,
        applied,
        ..observation::Gate::default()
    }
}

/// Shuts the instance before its network comes up: the accepted spec if there is one, else nothing in
/// and everything out. Whatever is wrong with settings or state, the kernel gets a gate.
///
/// # Errors
/// Only when the kernel holds no gate afterwards.
pub fn lockdown(config: Option<&Path>) -> Result<String, String> {
    let settings = Settings::load(config).unwrap_or_else(|error| {
        let reason = one_line(&error);
        error!(MESSAGE_ID = id::DEGRADED, %error, "the settings can't be used, the defaults are: {reason}");
        Settings::default()
    });
    let spec = super::state::Store::new(&settings.state_dir)
        .spec()
        .unwrap_or_else(|error| {
            let reason = one_line(&error);
            error!(MESSAGE_ID = id::DEGRADED, %error, "the accepted spec can't be used, nothing is let in: {reason}");
            None
        });
    let mut keeper = Gatekeeper::new(&settings).map_err(|e| e.to_string())?;
    let mut gate = keeper.reconcile(spec.as_ref(), &Cause::Plan);
    if gate.applied.is_err() && (spec.is_some() || settings.metadata_lock) {
        // The baseline needs the least of the kernel.
        keeper.settings.metadata_lock = false;
        gate = keeper.reconcile(None, &Cause::Plan);
    }
    gate.applied.clone()?;
    match gate.held? {
        Some(held) if held == gate.planned => Ok(match spec {
            Some(spec) => format!("shut, but for what generation {} lets in", spec.generation),
            None => "shut: nothing in, everything out".to_owned(),
        }),
        Some(_) => Err("the kernel does not hold what it was given".to_owned()),
        None => Err("the kernel does not hold the table that it was given".to_owned()),
    }
}

/// A console and a journal show the message alone, and the next line of a message looks like another one.
fn one_line(error: &dyn std::fmt::Display) -> String {
    error.to_string().lines().collect::<Vec<_>>().join("; ")
}
