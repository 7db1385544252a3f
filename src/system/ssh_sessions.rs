//! Live SSH sessions by the key that opened them: found in sshd's own log, ended through logind
//! (org.freedesktop.login1(5)) or, where it knows nothing of a connection, by ending sshd's process.
//!
//! Which process is sshd's is not taken from its name alone, and /proc/PID/exe is closed to a daemon
//! without CAP_SYS_PTRACE. It follows from what the journal knows by itself (systemd.journal-fields(7)):
//! a line counts if a process of root that runs sshd's program wrote it, and a living process is the
//! writer if it began before its line. Everybody may write lines that say otherwise.
//!
//! May not live here: what a line of sshd means (`policy::ssh_log`), when sessions are ended.

use std::fs;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use portcullis_protocol::UserName;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::as_user::off_thread;
use super::command::{ask, said};
use super::descriptors::Readable;
use super::logind::{self, Login};
use super::{callers, clock};
use crate::policy::ssh_log::{Accepted, Credential, accepted};

const JOURNALCTL: &str = "/usr/bin/journalctl";

/// How long a session may take to end when it is asked to; then its processes are killed.
const GRACE: Duration = Duration::from_secs(1);

/// How long processes may take to go after they were killed.
const KILL_TIME: Duration = Duration::from_secs(3);

/// A key that a user has no more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revoked {
    /// Whose it was.
    pub user: UserName,
    /// `SHA256:…`, of a key or of an authority.
    pub fingerprint: String,
    /// When it was taken away, as time since boot: connections that began later had no use of it.
    pub at: Duration,
}

/// A living session that a key opened: one connection, and all that runs over it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Whose it is.
    pub user: UserName,
    /// Of the key that was taken away.
    pub fingerprint: String,
    /// From where; `None` if not over a network.
    pub from: Option<IpAddr>,
    /// Since when, as time since boot.
    pub since: Duration,
    /// sshd's process for the connection, which belongs to root.
    pub pid: i32,
    /// What logind knows of it.
    pub login: Option<Login>,
    began: Duration,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Sessions that the keys opened.
    pub sessions: Vec<Session>,
    /// What could not be told, each a sentence with the way to mend it.
    pub unknown: Vec<String>,
}

/// sshd's process for a connection, or one that listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Process {
    pid: i32,
    began: Duration,
}

/// A login that a process told of.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Told {
    pid: i32,
    /// Time since boot; too late by as much as the machine slept since.
    at: Duration,
    accepted: Accepted,
}

/// Finds the sessions that these keys opened, among those that live now.
///
/// # Errors
/// The journal can't be read.
pub async fn find(revoked: &[Revoked]) -> Result<Found, String> {
    let processes = off_thread(processes).await.map_err(|e| e.to_string())??;
    if processes.is_empty() || revoked.is_empty() {
        return Ok(Found::default());
    }
    let (told, logins) = tokio::join!(told_by(&processes), logind::logins());
    let mut found = matched(&processes, &told?, logins.as_deref().unwrap_or_default(), revoked);
    if let Err(reason) = logins {
        found.unknown.push(format!(
            "logind can't list sessions, so that connections alone are ended: {reason}"
        ));
    }
    Ok(found)
}

/// Puts together what the kernel, the journal and logind say.
fn matched(processes: &[Process], told: &[Told], logins: &[Login], revoked: &[Revoked]) -> Found {
    let mut found = Found::default();
    for process in processes {
        let login = logins.iter().find(|login| login.leader == process.pid);
        let lines: Vec<&Told> = told
            .iter()
            .filter(|line| line.pid == process.pid && process.began <= line.at)
            .collect();
        // logind has the name from the system; sshd has it as it was typed.
        let of = |line: &Told, user: &UserName| match login {
            Some(login) => login.user == user.as_str(),
            None => line.accepted.user == *user,
        };
        let concerns = |key: &&Revoked| process.began <= key.at;
        let hit = lines.iter().find_map(|line| {
            let mut keys = revoked.iter().filter(concerns);
            let key = keys.find(|k| of(line, &k.user) && line.accepted.with.is_of(&k.fingerprint))?;
            Some((line, key))
        });
        if let Some((line, key)) = hit {
            found.sessions.push(Session {
                user: key.user.clone(),
                fingerprint: key.fingerprint.clone(),
                from: line.accepted.from,
                since: line.at,
                pid: process.pid,
                login: login.cloned(),
                began: process.began,
            });
            continue;
        }
        let unreadable = |user: &UserName| {
            let hidden = |line: &&Told| of(line, user) && line.accepted.with == Credential::UnreadableKey;
            lines.iter().copied().any(|line| hidden(&line))
                || lines.is_empty() && login.is_some_and(|login| login.user == user.as_str())
        };
        if let Some(key) = revoked.iter().filter(concerns).find(|key| unreadable(&key.user)) {
            found.unknown.push(untold(&key.user, process.pid));
        }
    }
    found
}

fn untold(user: &UserName, pid: i32) -> String {
    format!(
        "which key opened the SSH session of {user} with process {pid} is not in the journal, so it goes on: \
         end it by hand if it must (loginctl list-sessions), and let sshd log to syslog with LogLevel INFO \
         and FingerprintHash sha256"
    )
}

/// root's processes that are called as sshd's are, without those of containers.
fn processes() -> Result<Vec<Process>, String> {
    let entries = fs::read_dir("/proc").map_err(|e| format!("can't read /proc: {e}"))?;
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    Ok(pids.filter_map(process).collect())
}

/// `None` for what is something else, or ended meanwhile.
fn process(pid: i32) -> Option<Process> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    // OpenSSH 9.8 and newer have a program of its own for sessions.
    if !matches!(name.trim_end(), "sshd" | "sshd-session") {
        return None;
    }
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    is_ours(&status).then_some(())?;
    let began = callers::began(pid)?;
    Some(Process { pid, began })
}

/// Whether a process is root's and in our own PID namespace (proc_pid_status(5)).
fn is_ours(status: &str) -> bool {
    let value = |name: &str| {
        let mut lines = status.lines();
        lines.find_map(|line| Some(line.strip_prefix(name)?.split_whitespace().collect::<Vec<_>>()))
    };
    // A process of an inner namespace has a number there as well.
    value("Uid:").is_some_and(|ids| ids.len() == 4 && ids.iter().all(|id| *id == "0"))
        && value("NSpid:").is_none_or(|pids| pids.len() == 1)
}

/// An entry of `journalctl --output=json`. Fields that begin with `_` are journald's own word.
#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "__MONOTONIC_TIMESTAMP")]
    monotonic: String,
    #[serde(rename = "_PID")]
    pid: String,
    #[serde(rename = "_UID")]
    uid: String,
    #[serde(rename = "_EXE")]
    exe: String,
    #[serde(rename = "_TRANSPORT")]
    transport: String,
    #[serde(rename = "MESSAGE")]
    message: String,
}

/// What these processes, or others that had their numbers before, told of logins in this boot.
async fn told_by(processes: &[Process]) -> Result<Vec<Told>, String> {
    let mut arguments: Vec<String> = [
        "--system",
        "--boot",
        "--quiet",
        "--no-pager",
        "--output=json",
        "--output-fields=MESSAGE,_PID,_UID,_EXE,_TRANSPORT",
        "_UID=0",
        "_TRANSPORT=syslog",
    ]
    .map(str::to_owned)
    .into();
    arguments.extend(processes.iter().map(|process| format!("_PID={}", process.pid)));
    let output = ask(Path::new(JOURNALCTL), arguments).await?;
    if !output.status.success() {
        return Err(format!("journalctl ({}): {}", output.status, said(&output)));
    }
    let asleep = asleep()?;
    let lines = output.stdout.split(|byte| *byte == b'\n');
    Ok(lines.filter_map(|line| told(line, asleep)).collect())
}

/// `None` for what tells of no login, and for what sshd did not write.
fn told(line: &[u8], asleep: Duration) -> Option<Told> {
    // A message that is no text comes as an array: sshd writes none.
    let entry: Entry = serde_json::from_slice(line).ok()?;
    if entry.uid != "0" || entry.transport != "syslog" || !is_sshd(&entry.exe) {
        return None;
    }
    Some(Told {
        pid: entry.pid.parse().ok()?,
        at: Duration::from_micros(entry.monotonic.parse().ok()?) + asleep,
        accepted: accepted(&entry.message)?,
    })
}

/// `/usr/sbin/sshd`; since OpenSSH 9.8 `sshd-session` in `/usr/lib/openssh`, `/usr/libexec/openssh` or the
/// like. Only root writes there; an upgrade meanwhile leaves the mark of a deleted file.
fn is_sshd(exe: &str) -> bool {
    let path = exe.strip_suffix(" (deleted)").unwrap_or(exe);
    ["/usr/sbin/", "/usr/lib", "/usr/bin/"]
        .iter()
        .any(|folder| path.starts_with(folder))
        && matches!(path.rsplit('/').next(), Some("sshd" | "sshd-session"))
}

/// How long the machine slept since it booted. journald's clock stands still meanwhile, that of
/// processes does not.
fn asleep() -> Result<Duration, String> {
    let awake = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(|e| e.to_string())?;
    Ok(clock::since_boot().saturating_sub(Duration::from(awake)))
}

/// Ends a session: what runs in it where logind knows it, else its connection. It is asked to end and,
/// if it does not at once, killed. One that is gone already is ended.
///
/// # Errors
/// It is still there.
pub async fn end(session: &Session) -> Result<(), String> {
    let Some(process) = open(session)? else {
        return Ok(());
    };
    // The daemon itself may run in it, where it was started by hand.
    let login = session
        .login
        .as_ref()
        .filter(|login| !logind::is_around_us(login));
    let ended = match login {
        Some(login) => logind::end(login).await,
        None => Ok(()),
    };
    end_connection(&process).await?;
    ended.map_err(|reason| format!("the connection is ended, but not all that ran in it: logind: {reason}"))
}

/// sshd's process, held so that its number can't become another one's; `None` if it ended.
fn open(session: &Session) -> Result<Option<Readable<OwnedFd>>, String> {
    let Some(pid) = Pid::from_raw(session.pid) else {
        return Ok(None);
    };
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(error) => return Err(format!("pidfd_open: {error}")),
    };
    if callers::began(session.pid) != Some(session.began) {
        return Ok(None);
    }
    Readable::new(process).map(Some).map_err(|e| e.to_string())
}

/// sshd hangs up on what it started.
async fn end_connection(process: &Readable<OwnedFd>) -> Result<(), String> {
    for (signal, time) in [(Signal::TERM, GRACE), (Signal::KILL, KILL_TIME)] {
        match pidfd_send_signal(process.source(), signal) {
            Ok(()) => {}
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            Err(error) => return Err(format!("can't signal sshd's process: {error}")),
        }
        // Readable once it ended (pidfd_open(2)).
        if let Ok(ended) = timeout(time, process.read(|_| Ok(()))).await {
            return ended.map_err(|e| e.to_string());
        }
    }
    Err("sshd's process does not end".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "SHA256:uWmxhQZ6T1ZGvOfFR0xGs4dp0c2IMKFTwYDBPuZf5WE";
    const MESSAGE: &str = "Accepted publickey for ubuntu from 192.0.2.7 port 5 ssh2: ED25519 \
         SHA256:uWmxhQZ6T1ZGvOfFR0xGs4dp0c2IMKFTwYDBPuZf5WE";

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn entry(change: &[(&str, serde_json::Value)]) -> Option<Told> {
        let mut entry = serde_json::json!({
            "__CURSOR": "s=1", "__REALTIME_TIMESTAMP": "1", "__MONOTONIC_TIMESTAMP": "20000000",
            "_BOOT_ID": "x", "_PID": "700", "_UID": "0", "_EXE": "/usr/sbin/sshd",
            "_TRANSPORT": "syslog", "MESSAGE": MESSAGE,
        });
        for (field, value) in change {
            entry[*field] = value.clone();
        }
        told(entry.to_string().as_bytes(), seconds(1))
    }

    #[test]
    fn a_line_counts_if_root_s_sshd_wrote_it() {
        let line = entry(&[]).unwrap();
        assert_eq!((line.pid, line.at), (700, seconds(21)));
        for exe in [
            "/usr/lib/openssh/sshd-session",
            "/usr/libexec/openssh/sshd-session",
            "/usr/lib64/ssh/sshd-session",
            "/usr/sbin/sshd (deleted)",
        ] {
            assert!(entry(&[("_EXE", exe.into())]).is_some(), "{exe}");
        }
        for (field, value) in [
            ("_UID", "1000".into()),
            ("_EXE", "/usr/bin/logger".into()),
            ("_EXE", "/home/ubuntu/usr/sbin/sshd".into()),
            ("_EXE", "/tmp/sshd".into()),
            ("_EXE", serde_json::Value::Null),
            ("_TRANSPORT", "stdout".into()),
            ("_PID", "x".into()),
            ("MESSAGE", format!("x\n{MESSAGE}").into()),
            ("MESSAGE", vec![1, 2].into()),
            ("MESSAGE", vec!["x", MESSAGE].into()),
        ] {
            assert_eq!(entry(&[(field, value.clone())]), None, "{field} {value}");
        }
    }

    #[test]
    fn processes_of_others_and_of_containers_are_not_ours() {
        let status = |ids: &str, pids: &str| is_ours(&format!("Name:\tsshd\nUid:\t{ids}\nNSpid:\t{pids}\n"));
        assert!(status("0\t0\t0\t0", "700"));
        assert!(is_ours("Uid:\t0\t0\t0\t0\n"), "a kernel without PID namespaces");
        assert!(!status("0\t0\t0\t0", "700\t1"));
        assert!(!status("1000\t1000\t1000\t1000", "700"));
        assert!(!status("1000\t0\t0\t0", "700"));
        assert!(!is_ours(""));
    }

    fn revoked(user: &str) -> Revoked {
        Revoked {
            user: user.parse().unwrap(),
            fingerprint: KEY.to_owned(),
            at: seconds(100),
        }
    }

    fn login(user: &str) -> Login {
        Login {
            id: "3".to_owned(),
            user: user.to_owned(),
            leader: 700,
            scope: "session-3.scope".to_owned(),
        }
    }

    const PROCESS: Process = Process {
        pid: 700,
        began: Duration::from_secs(20),
    };

    /// Users of the sessions that end, and the number of those that can't be told.
    fn judged(process: Process, lines: &[Told], logins: &[Login], user: &str) -> (Vec<String>, usize) {
        let found = matched(&[process], lines, logins, &[revoked(user)]);
        let users = found.sessions.iter().map(|s| s.user.to_string()).collect();
        (users, found.unknown.len())
    }

    #[test]
    fn a_session_is_of_the_key_that_its_process_told() {
        let line = entry(&[]).unwrap();
        let ubuntu = vec!["ubuntu".to_owned()];
        let both = [line.clone()];
        assert_eq!(
            judged(PROCESS, &both, &[login("ubuntu")], "ubuntu"),
            (ubuntu.clone(), 0)
        );
        assert_eq!(
            judged(PROCESS, &both, &[], "ubuntu"),
            (ubuntu.clone(), 0),
            "without logind"
        );
        assert_eq!(
            judged(PROCESS, &both, &[login("alice")], "alice").0,
            ["alice"],
            "logind has the name"
        );
        for logins in [&[][..], &[login("ubuntu")]] {
            assert_eq!(
                judged(PROCESS, &both, logins, "alice"),
                (Vec::new(), 0),
                "another user"
            );
        }
        // The number was another process's before.
        let later = Process {
            began: seconds(22),
            ..PROCESS
        };
        assert_eq!(judged(later, &both, &[], "ubuntu"), (Vec::new(), 0));
        // It began after the key was gone, so with another one.
        let new = Process {
            began: seconds(101),
            ..PROCESS
        };
        let line_later = Told {
            at: seconds(102),
            ..line
        };
        assert_eq!(
            judged(new, &[line_later], &[login("ubuntu")], "ubuntu"),
            (Vec::new(), 0)
        );
    }

    #[test]
    fn what_the_journal_does_not_say_is_told() {
        assert_eq!(
            judged(PROCESS, &[], &[login("ubuntu")], "ubuntu"),
            (Vec::new(), 1)
        );
        assert_eq!(judged(PROCESS, &[], &[login("alice")], "ubuntu"), (Vec::new(), 0));
        // The daemon that listens, and connections that did not log in yet.
        assert_eq!(judged(PROCESS, &[], &[], "ubuntu"), (Vec::new(), 0));
        let with = |with: &str| entry(&[("MESSAGE", MESSAGE.replace(KEY, with).into())]).unwrap();
        let md5 = with("MD5:3d:88:98:6f:e4:8b:3f:41:a4:49:8e:12:91:4a:8d:11");
        assert_eq!(judged(PROCESS, &[md5], &[], "ubuntu"), (Vec::new(), 1));
        let other = with(&KEY.replace('u', "v"));
        assert_eq!(
            judged(PROCESS, &[other], &[login("ubuntu")], "ubuntu"),
            (Vec::new(), 0)
        );
    }

    #[tokio::test]
    async fn a_connection_without_a_session_ends_and_a_new_process_of_its_number_does_not() {
        let mut child = tokio::process::Command::new("sleep").arg("600").spawn().unwrap();
        let pid = i32::try_from(child.id().unwrap()).unwrap();
        let mut session = Session {
            user: "ubuntu".parse().unwrap(),
            fingerprint: KEY.to_owned(),
            from: None,
            since: seconds(1),
            pid,
            login: None,
            began: seconds(1),
        };
        end(&session).await.unwrap();
        assert_eq!(child.try_wait().unwrap(), None, "it began at another time");
        session.began = callers::began(pid).unwrap();
        end(&session).await.unwrap();
        assert!(!child.wait().await.unwrap().success());
        end(&session).await.unwrap();
    }
}
