//! Keeping the kernel's table as the spec says: observe, replace if it differs, observe again.
//!
//! May not live here: rules (`policy::firewall`), netlink (`system::nftables`).

use std::path::Path;

use portcullis_protocol::Spec;
use tracing::{error, info, warn};

use crate::config::Settings;
use crate::log::id;
use crate::policy::firewall::{Inputs, ruleset};
use crate::policy::links::{self, LinkSettings};
use crate::policy::observation::{self, Observed};
use crate::policy::ruleset::Ruleset;
use crate::system::links as system_links;
use crate::system::nftables::Nftables;

/// The one writer of table `inet portcullis`.
pub struct Gatekeeper {
    links: LinkSettings,
    health_port: u16,
    metadata_lock: bool,
    /// What was last put in place; to tell somebody else's change from the first application.
    applied: Option<Ruleset>,
    repaired: u64,
}

impl Gatekeeper {
    /// A gatekeeper that has done nothing yet.
    pub fn new(settings: &Settings) -> Self {
        let links = settings.links.clone();
        Self {
            links,
            health_port: settings.listen.port(),
            metadata_lock: settings.metadata_lock,
            applied: None,
            repaired: 0,
        }
    }

    /// What the kernel should hold for this spec, now. Links that can't be read count as uplinks.
    pub fn plan(&self, spec: Option<&Spec>) -> Ruleset {
        let links = system_links::read().unwrap_or_else(|error| {
            warn!(MESSAGE_ID = id::DEGRADED, %error, "links can't be read: all of them are filtered");
            Vec::new()
        });
        let internal = links::internal(&links, &self.links);
        ruleset(Inputs {
            spec,
            internal: &internal,
            health_port: self.health_port,
            metadata_lock: self.metadata_lock,
            ..Inputs::default()
        })
    }

    /// Looks, without changing anything.
    pub fn observe(&self, spec: Option<&Spec>) -> observation::Gate {
        let planned = self.plan(spec);
        let held = Nftables::open()
            .and_then(|mut nftables| nftables.read())
            .map_err(|e| e.to_string());
        observation::Gate {
            planned,
            held,
            applied: Ok(()),
            repaired: self.repaired,
        }
    }

    /// Makes the kernel hold what the spec says, in one transaction, and reads it back. A kernel
    /// that holds it already is left alone.
    pub fn reconcile(&mut self, spec: Option<&Spec>) -> observation::Gate {
        let planned = self.plan(spec);
        let (applied, held) = match Nftables::open() {
            Ok(mut nftables) => self.enforce(&mut nftables, &planned),
            Err(error) => (Err(error.to_string()), Err(error.to_string())),
        };
        match &applied {
            Ok(()) => self.applied = Some(planned.clone()),
            Err(reason) => {
                error!(
                    MESSAGE_ID = id::GATE_FAILED,
                    REASON = reason,
                    "the gate could not be applied: {reason}"
                );
            }
        }
        observation::Gate {
            planned,
            held,
            applied,
            repaired: self.repaired,
        }
    }

    /// Whether it could be applied, and what the kernel holds afterwards. What is as planned already is
    /// read once; what was replaced is read back.
    fn enforce(
        &mut self,
        nftables: &mut Nftables,
        planned: &Ruleset,
    ) -> (Observed<()>, Observed<Option<Ruleset>>) {
        let held = match nftables.read() {
            Ok(Some(held)) if held == *planned => return (Ok(()), Ok(Some(held))),
            Ok(held) => held,
            Err(error) => return (Err(error.to_string()), Err(error.to_string())),
        };
        let applied = nftables.replace(planned).map_err(|e| e.to_string());
        if applied.is_ok() {
            self.log_applied(held.as_ref(), planned);
        }
        (applied, nftables.read().map_err(|e| e.to_string()))
    }

    /// A plan that was in place before and had to be put there again is a repair.
    fn log_applied(&mut self, held: Option<&Ruleset>, planned: &Ruleset) {
        let what = held.map_or_else(|| "no table".to_owned(), |held| held.diff(planned).join("\n"));
        if self.applied.as_ref() == Some(planned) {
            self.repaired += 1;
            warn!(
                MESSAGE_ID = id::GATE_REPAIRED,
                DIFF = what,
                "somebody changed table inet portcullis: undone"
            );
        } else {
            info!(MESSAGE_ID = id::GATE_APPLIED, DIFF = what, "the gate is applied");
        }
    }
}

/// Shuts the instance before its network comes up: the accepted spec if there is one, else nothing in
/// and everything out. Whatever is wrong with settings or state, the kernel gets a gate.
///
/// # Errors
/// Only when the kernel holds no gate afterwards.
pub fn lockdown(config: Option<&Path>) -> Result<String, String> {
    let settings = Settings::load(config).unwrap_or_else(|error| {
        error!(MESSAGE_ID = id::DEGRADED, %error, "the settings can't be used: the defaults are");
        Settings::default()
    });
    let spec = super::state::Store::new(&settings.state_dir)
        .spec()
        .unwrap_or_else(|error| {
            error!(MESSAGE_ID = id::DEGRADED, %error, "the accepted spec can't be used: nothing is let in");
            None
        });
    let mut keeper = Gatekeeper::new(&settings);
    let mut gate = keeper.reconcile(spec.as_ref());
    if gate.applied.is_err() && (spec.is_some() || keeper.metadata_lock) {
        // The baseline needs the least of the kernel.
        keeper.metadata_lock = false;
        gate = keeper.reconcile(None);
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
