//! sshd beyond the keys: its other ports.
//!
//! May not live here: keys (`agent::logins`), what makes a login good (`policy::readiness`).

use std::net::SocketAddr;

use crate::policy::observation::{Observed, SshdConfig};
use crate::system::ssh_probe;

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
