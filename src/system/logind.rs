//! Login sessions over D-Bus (org.freedesktop.login1(5)).
//!
//! May not live here: which session is ended, and why.

use std::fs;
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::{Instant, sleep, timeout};
use zbus::proxy::CacheProperties;
use zbus::{Connection, OwnedObjectPath};

/// How long a session may take to end when it is asked to; then its processes are killed.
const GRACE: Duration = Duration::from_secs(1);

/// How long processes may take to go after they were killed.
const KILL_TIME: Duration = Duration::from_secs(3);

/// Between two looks whether a session is gone.
const LOOK: Duration = Duration::from_millis(20);

/// How long logind may take to answer.
const LOGIND_TIME: Duration = Duration::from_secs(5);

/// A login session of logind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Login {
    /// Its id, as `loginctl` shows it.
    pub id: String,
    /// The name of its user, as the system has it.
    pub user: String,
    /// The process that opened it.
    pub leader: i32,
    /// The unit that holds its processes.
    pub scope: String,
}

#[zbus::proxy(
    interface = "org.freedesktop.login1.Manager",
    default_service = "org.freedesktop.login1",
    default_path = "/org/freedesktop/login1"
)]
trait Manager {
    /// Id, user id, user name, seat and path of each.
    fn list_sessions(&self) -> zbus::Result<Vec<(String, u32, String, String, OwnedObjectPath)>>;

    /// Stops the session's scope: its processes get SIGTERM and SIGHUP.
    fn terminate_session(&self, id: &str) -> zbus::Result<()>;

    /// Sends a signal to the session's processes.
    fn kill_session(&self, id: &str, who: &str, signal: i32) -> zbus::Result<()>;
}

#[zbus::proxy(
    interface = "org.freedesktop.login1.Session",
    default_service = "org.freedesktop.login1"
)]
trait LoginSession {
    /// The process that opened it.
    #[zbus(property)]
    fn leader(&self) -> zbus::Result<u32>;

    /// The unit that holds its processes.
    #[zbus(property)]
    fn scope(&self) -> zbus::Result<String>;
}

/// The login sessions that there are.
///
/// # Errors
/// There is no logind, or it does not answer.
pub async fn logins() -> Result<Vec<Login>, String> {
    asked(list()).await
}

async fn list() -> zbus::Result<Vec<Login>> {
    let bus = Connection::system().await?;
    let mut logins = Vec::new();
    for (id, _, user, _, path) in ManagerProxy::new(&bus).await?.list_sessions().await? {
        let session = LoginSessionProxy::builder(&bus)
            .path(path)
            .cache_properties(CacheProperties::No)
            .build()
            .await?;
        // One that ended meanwhile.
        let (Ok(leader), Ok(scope)) = (session.leader().await, session.scope().await) else {
            continue;
        };
        logins.push(Login {
            id,
            user,
            leader: i32::try_from(leader).unwrap_or_default(),
            scope,
        });
    }
    Ok(logins)
}

/// Waits for an answer of logind.
async fn asked<T>(answer: impl Future<Output = zbus::Result<T>>) -> Result<T, String> {
    match timeout(LOGIND_TIME, answer).await {
        Ok(answer) => answer.map_err(|e| e.to_string()),
        Err(_) => Err(format!("no answer within {} s", LOGIND_TIME.as_secs())),
    }
}

/// Whether this process runs in it.
pub fn is_around_us(login: &Login) -> bool {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    !login.scope.is_empty() && own.split(['/', '\n']).any(|part| part == login.scope)
}

/// Ends what runs in a session. It is asked to end and, if it does not within a second, killed. One that is
/// gone already is ended.
///
/// # Errors
/// It is still there.
pub async fn end(login: &Login) -> Result<(), String> {
    let bus = asked(Connection::system()).await?;
    let logind = asked(ManagerProxy::new(&bus)).await?;
    let is_there = async || -> Result<bool, String> {
        let sessions = asked(logind.list_sessions()).await?;
        Ok(sessions.iter().any(|(id, ..)| *id == login.id))
    };
    let gone_within = async |time: Duration| -> Result<bool, String> {
        let end = Instant::now() + time;
        while is_there().await? {
            if Instant::now() > end {
                return Ok(false);
            }
            sleep(LOOK).await;
        }
        Ok(true)
    };
    // It may end by itself at any time: what counts is whether it is there.
    let asked_to_end = asked(logind.terminate_session(&login.id)).await;
    if asked_to_end.is_ok() && gone_within(GRACE).await? {
        return Ok(());
    }
    let killed = asked(logind.kill_session(&login.id, "all", Signal::KILL.as_raw())).await;
    if gone_within(KILL_TIME).await? {
        return Ok(());
    }
    asked_to_end.and(killed)?;
    Err(format!("session {} has processes that do not end", login.id))
}
