//! What systemd itself listens for: the sockets of its socket units, over D-Bus.
//!
//! Asked only where a socket was made by systemd's own process; some versions make it in the unit's own
//! control group instead, which the kernel tells of.
//! May not live here: which socket is whose (`policy::exposure::socket`).

use zbus::Connection;

use super::systemd::{UnitRow, answered};
use crate::policy::observation::Observed;

/// How many socket units are asked.
const MAX_UNITS: usize = 200;

#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
trait Manager {
    /// Units in memory.
    fn list_units_by_patterns(&self, states: &[&str], names: &[&str]) -> zbus::Result<Vec<UnitRow>>;
}

#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Socket",
    default_service = "org.freedesktop.systemd1"
)]
trait Socket {
    /// What it listens for: kind, for example `Stream`, and address.
    #[zbus(property(emits_changed_signal = "false"))]
    fn listen(&self) -> zbus::Result<Vec<(String, String)>>;
}

/// All that the active socket units listen for: unit, kind (`Stream`, `Datagram`, …), address or path.
///
/// # Errors
/// systemd does not answer.
pub async fn listens() -> Observed<Vec<(String, String, String)>> {
    answered("tell what its sockets listen for", async {
        let bus = Connection::system().await?;
        let manager = ManagerProxy::new(&bus).await?;
        let units = manager.list_units_by_patterns(&["active"], &["*.socket"]).await?;
        let mut all = Vec::new();
        for unit in units.into_iter().take(MAX_UNITS) {
            let (name, path) = (unit.0, unit.6);
            let socket = SocketProxy::builder(&bus).path(path).build().await?;
            let listens = socket.listen().await?;
            all.extend(listens.into_iter().map(|(kind, at)| (name.clone(), kind, at)));
        }
        Ok(all)
    })
    .await
}
