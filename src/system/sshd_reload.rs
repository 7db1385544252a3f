//! Having the running sshd read its files, and knowing that it did.
//!
//! systemd's word is not enough: its job is done when the signal is sent, and sshd serves callers with what it
//! read before until it gets to it. sshd then closes the sockets on which it listens, starts itself anew and
//! listens again (sshd(8), SIGHUP); that the kernel tells.
//! May not live here: what the files say, what is to be done if sshd does not like them.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::sockets::{self, Listener};
use super::sshd;
use super::systemd::{self, Job};
use crate::policy::observation::{Observed, Unit};

/// How long sshd may take to read its files.
const TIME: Duration = Duration::from_secs(10);
/// How long one that was just told by somebody else may be out of reach. A signal that comes then is lost.
const BUSY_TIME: Duration = Duration::from_secs(2);
/// Between two looks at its sockets in that time; nobody tells when a socket begins to listen.
const PAUSE: Duration = Duration::from_millis(20);

/// Has the active service read its configuration, and waits until it did; false if none is active. With
/// a socket that accepts, each connection has an sshd of its own, which reads it anyway. One that only started
/// the service keeps its port, which an sshd that is told to reload would try to take, and end: it is restarted.
///
/// # Errors
/// Why it was not told, or that it did not listen anew in time.
pub async fn reload() -> Observed<bool> {
    let mut told = false;
    // One that was told a moment ago and is not done may have read them already.
    let runs = |unit: &Unit| matches!(unit.active_state.as_str(), "active" | "reloading");
    let units = systemd::sshd_units().await?;
    for unit in units.iter().filter(|u| runs(u) && u.name.ends_with(".service")) {
        if systemd::is_behind_socket(&unit.name).await? {
            // systemd says that it runs again once it has read its files and says so itself.
            run(Job::Restart, "restarted", &unit.name).await?;
        } else {
            reload_listening(&unit.name).await?;
        }
        told = true;
    }
    Ok(told)
}

async fn reload_listening(unit: &str) -> Observed<()> {
    let listen = sshd::effective_config(None).await.map(|config| config.listen);
    // Broken files are the job's to refuse.
    let listen: BTreeSet<SocketAddr> = listen.unwrap_or_default().into_iter().collect();
    let _ = until(BUSY_TIME, || Ok(!listening(&listen)?.is_empty())).await?;
    let before = listening(&listen)?;
    run(Job::Reload, "reloaded", unit).await?;
    // What sshd did after this it did with the files as they are now: it was not out of reach before it.
    let anew = || listening(&listen).map(|now| !now.is_empty() && now.is_disjoint(&before));
    match until(TIME, anew).await? {
        true => Ok(()),
        false => Err(format!(
            "{unit} was reloaded, and did not listen anew within {} seconds",
            TIME.as_secs()
        )),
    }
}

async fn run(job: Job, done: &str, unit: &str) -> Observed<()> {
    match systemd::run_job(job, unit).await?.as_str() {
        "done" => Ok(()),
        result => Err(format!("{unit} was not {done}: {result}")),
    }
}

/// Whether it became so in that time.
async fn until(time: Duration, is_so: impl Fn() -> Observed<bool>) -> Observed<bool> {
    let end = Instant::now() + time;
    while !is_so()? {
        if Instant::now() > end {
            return Ok(false);
        }
        sleep(PAUSE).await;
    }
    Ok(true)
}

/// The sockets that listen at these addresses.
fn listening(addresses: &BTreeSet<SocketAddr>) -> Observed<BTreeSet<Listener>> {
    let all = sockets::listeners().map_err(|error| format!("cannot tell which sockets listen: {error}"))?;
    let here = |listener: &Listener| addresses.contains(&listener.local);
    Ok(all.into_iter().filter(here).collect())
}
