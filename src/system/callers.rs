//! Where a local process comes from: the SSH session above it, the user who logged in, if there is one.
//!
//! May not live here: what that means for its requests.

use std::fs;
use std::time::Duration;

use nix::unistd::{SysconfVar, Uid, User, sysconf};

/// Processes between a command and its SSH session; more is no session.
const DEPTH: usize = 32;

/// When the SSH session began that this process runs in, as time since boot; `None` for one that runs in
/// none: of the console, of a unit. The nearest sshd process above it belongs to one TCP connection.
pub fn ssh_session_start(pid: i32) -> Option<Duration> {
    let mut process = Process::read(pid)?;
    for _ in 0..DEPTH {
        // OpenSSH 9.8 and newer have a program of its own for sessions.
        if matches!(process.name.as_str(), "sshd" | "sshd-session") {
            return Some(process.began);
        }
        process = Process::read(process.parent)?;
    }
    None
}

/// The user whose login a process comes from, also after sudo (loginuid, proc_pid_loginuid(5)); `None` for
/// one that comes from no login: of a unit, of a kernel without auditing.
pub fn login_user(pid: i32) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/loginuid")).ok()?;
    let uid: u32 = text.trim().parse().ok().filter(|uid| *uid != u32::MAX)?;
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    Some(user.map_or_else(|| format!("uid {uid}"), |user| user.name))
}

/// When a process began, as time since boot; `None` if there is none.
pub fn began(pid: i32) -> Option<Duration> {
    Some(Process::read(pid)?.began)
}

/// What the audit log says of a process that asked for something.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Description {
    /// Its effective user.
    pub uid: Option<u32>,
    /// Its name, and those of the processes above it, up to four. They are what those processes call themselves.
    pub command: Option<String>,
    /// Who logged in: the kernel's login uid (pam_loginuid(8)), else the user of the nearest process above it
    /// that is not root's.
    pub login_uid: Option<u32>,
}

/// Describes a process, which is there for as long as it waits for an answer.
pub fn describe(pid: i32) -> Description {
    const NAMED: usize = 4;
    let login = fs::read_to_string(format!("/proc/{pid}/loginuid")).ok();
    // Unset is the highest number (audit_set_loginuid in the kernel's sources).
    let mut login_uid = login
        .and_then(|text| text.trim().parse().ok())
        .filter(|uid| *uid != u32::MAX);
    let mut names = Vec::new();
    let mut at = Process::read(pid).map(|process| (pid, process));
    for _ in 0..DEPTH {
        let Some((number, process)) = at.take().filter(|(number, _)| *number > 1) else {
            break;
        };
        if names.len() < NAMED {
            names.push(process.name);
        }
        login_uid = login_uid.or_else(|| effective_user(number).filter(|uid| *uid != 0));
        at = Process::read(process.parent).map(|parent| (process.parent, parent));
    }
    Description {
        uid: effective_user(pid),
        command: (!names.is_empty()).then(|| names.join(" < ")),
        login_uid,
    }
}

/// A process's effective user, from /proc/PID/status (proc_pid_status(5)), which escapes line ends in names. The
/// owner of its folder there would be root for every process that may not be traced, as sshd's are.
fn effective_user(pid: i32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let users = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    users.split_whitespace().nth(1)?.parse().ok()
}

struct Process {
    name: String,
    parent: i32,
    began: Duration,
}

impl Process {
    /// From /proc/PID/stat (proc_pid_stat(5)).
    fn read(pid: i32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// The name is in parentheses and may hold any character; what follows the last one is numbers.
    fn parse(stat: &str) -> Option<Self> {
        let (head, tail) = stat.rsplit_once(')')?;
        let (_, name) = head.split_once('(')?;
        let fields: Vec<&str> = tail.split_whitespace().collect();
        let ticks: u64 = fields.get(19)?.parse().ok()?;
        let a_second = u64::try_from(sysconf(SysconfVar::CLK_TCK).ok()??)
            .ok()
            .filter(|n| *n > 0)?;
        Some(Self {
            name: name.to_owned(),
            parent: fields.get(1)?.parse().ok()?,
            began: Duration::from_millis(ticks.saturating_mul(1000) / a_second),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_is_read() {
        let stat = "7 (a) b (c) S 3 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 250 1 1 1";
        let process = Process::parse(stat).unwrap();
        assert_eq!((process.name.as_str(), process.parent), ("a) b (c", 3));
        assert!(process.began > Duration::ZERO);
        for bad in ["", "7", "7 (x", "7 (x) S", "7 (x) S q 7"] {
            assert!(Process::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn this_process_began_before_now() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let process = Process::read(pid).unwrap();
        assert!(process.began <= crate::system::clock::since_boot());
        assert_eq!(ssh_session_start(1), None);
    }

    #[test]
    fn a_process_is_described_with_those_above_it() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let described = describe(pid);
        assert_eq!(described.uid, Some(nix::unistd::geteuid().as_raw()));
        let own = Process::read(pid).unwrap().name;
        assert!(described.command.unwrap().starts_with(&own));
        assert_eq!(describe(i32::MAX), Description::default());
    }
}
