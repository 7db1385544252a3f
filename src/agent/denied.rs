//! Telling what was denied: a sample in the journal, who sent most of it, and how much for which reason.
//!
//! May not live here: which packets are sampled (`policy::firewall`), what is in them and which get a
//! line (`policy::denied`).

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use jiff::Timestamp;
use portcullis_protocol::denied::DeniedSample;
use tracing::{info, warn};

use crate::log::id;
use crate::policy::denied::{Headers, Lines, Tally, protocol_name};
use crate::policy::firewall::SAMPLE;
use crate::policy::metadata;
use crate::policy::observation::Observed;
use crate::system::nflog::{Copied, Group};
use crate::system::nftables::Count;

/// How the comments of rules that deny begin.
const DENIED: &str = "denied ";

/// What the sample has shown so far, or why there is none.
#[derive(Clone)]
pub struct Denied(Arc<Mutex<Observed<Tally>>>);

impl Denied {
    /// Starts to take the sample, in a task of its own; with lines in the journal, if they are wanted.
    pub fn watch(in_journal: bool) -> Self {
        let denied = Self(Arc::new(Mutex::new(Ok(Tally::from(Timestamp::now())))));
        match Group::bind(SAMPLE) {
            Ok(group) => {
                let lines = in_journal.then(|| Lines::from(Instant::now()));
                tokio::spawn(denied.clone().take_all(group, lines));
            }
            Err(error) => denied.stop(&error),
        }
        denied
    }

    /// So many sources with most packets.
    ///
    /// # Errors
    /// Why there is no sample.
    pub fn sample(&self, top: usize) -> Observed<DeniedSample> {
        match &mut *self.lock() {
            Ok(tally) => Ok(tally.sample(top, Timestamp::now())),
            Err(reason) => Err(reason.clone()),
        }
    }

    async fn take_all(self, group: Group, mut lines: Option<Lines>) {
        loop {
            match group.next().await {
                Ok(packets) => packets
                    .iter()
                    .for_each(|packet| self.take(packet, lines.as_mut())),
                Err(error) => return self.stop(&error),
            }
        }
    }

    fn take(&self, packet: &Copied, lines: Option<&mut Lines>) {
        let Some(headers) = Headers::parse(&packet.bytes) else {
            return;
        };
        if let Ok(tally) = &mut *self.lock() {
            tally.count(&headers, Timestamp::now());
        }
        if let Some(untold) = lines.and_then(|lines| lines.ask(&headers, Instant::now())) {
            tell(&headers, &packet.interface, untold);
        }
    }

    fn stop(&self, error: &io::Error) {
        let group = SAMPLE.group;
        let reason = format!(
            "nfnetlink_log group {group}: {error} (is another program bound to the group, or does the kernel \
             lack CONFIG_NETFILTER_NETLINK_LOG? A restart of the daemon tries again)"
        );
        warn!(
            MESSAGE_ID = id::DEGRADED,
            REASON = reason,
            "denied packets are counted, not told: {reason}"
        );
        *self.lock() = Err(reason);
    }

    fn lock(&self) -> MutexGuard<'_, Observed<Tally>> {
        // A panic ends the process.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Numbers, addresses and a printable interface name: nothing that the sender could forge a line with.
fn tell(packet: &Headers, interface: &str, untold: u64) {
    info!(
        MESSAGE_ID = id::DENIED,
        SOURCE = %packet.source,
        DESTINATION = %packet.destination,
        PROTOCOL = &*protocol_name(packet.protocol),
        SOURCE_PORT = packet.ports.map(|(from, _)| from),
        PORT = packet.ports.map(|(_, to)| to),
        ICMP_TYPE = packet.icmp_type,
        INTERFACE = interface,
        UNTOLD = untold,
        "denied {packet} by {interface}"
    );
}

/// What the rules that deny have counted, each reason once. Reasons are those of our own rules: no sender makes one.
pub fn reasons(counts: &[(String, Count)]) -> Vec<(&str, Count)> {
    let mut sums: BTreeMap<&str, Count> = BTreeMap::new();
    for (comment, count) in counts {
        let lock = (comment == metadata::LOCK).then_some(metadata::LOCK);
        if let Some(reason) = comment.strip_prefix(DENIED).or(lock) {
            *sums.entry(reason).or_default() += *count;
        }
    }
    sums.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_rules_that_deny_are_reasons() {
        let counted = |packets| Count {
            packets,
            bytes: packets * 40,
        };
        let counts = [
            ("peers ipv4".to_owned(), counted(1)),
            ("rule denied".to_owned(), counted(2)),
            ("denied tcp".to_owned(), counted(3)),
            ("denied tcp".to_owned(), counted(4)),
            ("metadata lock".to_owned(), counted(5)),
        ];
        assert_eq!(
            reasons(&counts),
            [("metadata lock", counted(5)), ("tcp", counted(7))]
        );
    }
}
