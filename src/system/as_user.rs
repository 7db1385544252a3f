//! Acting as a user on that user's files, on a thread that does nothing else and then ends.
//!
//! May not live here: what is done as the user.

use std::io;
use std::thread;

use rustix::process::geteuid;
use rustix::thread::{
    CapabilitySet, Gid, Uid, capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};
use tokio::sync::oneshot;

use super::accounts::Account;
use super::memory;

/// Runs `work` with the user's effective identity (user, group, groups; no capabilities), on a thread
/// of its own that ends with it: nothing has to be switched back. Blocks until then.
///
/// Only the effective identity changes. The kernel asks it, and the capabilities, on every access to a
/// file; the real and saved user stay root, so that the user may not send signals to this thread
/// (kill(2): a SIGKILL to one thread ends the whole agent) nor trace it (ptrace(2)).
///
/// The same user as now needs no switch.
///
/// # Errors
/// The thread can't be started or may not switch, capabilities are left after switching, or `work`
/// panicked.
pub fn run_as<T: Send>(account: &Account, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("as-user".to_owned())
            .spawn_scoped(scope, || become_user(account).map(|()| work()))?
            .join()
            .unwrap_or_else(|_| Err(panicked()))
    })
}

/// Runs `work` with another effective group, on a thread of its own that ends with it: what it makes is of that
/// group. Blocks until then.
///
/// # Errors
/// The thread can't be started or may not switch, or `work` panicked.
pub fn run_in_group<T: Send>(group: u32, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("in-group".to_owned())
            .spawn_scoped(scope, || {
                set_thread_res_gid(None, Gid::from_raw(group), None)?;
                // As below.
                memory::stay_undumpable()?;
                Ok(work())
            })?
            .join()
            .unwrap_or_else(|_| Err(panicked()))
    })
}

/// Runs blocking work on a thread of its own, for callers that may not block. Not tokio's pool: its
/// threads are used again, and work here changes who the thread is, or hangs in a dead network's home.
///
/// # Errors
/// The thread can't be started, or `work` panicked.
pub async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    let (answer, answered) = oneshot::channel();
    thread::Builder::new()
        .name("off-thread".to_owned())
        .spawn(move || {
            // Nobody waits any more: then nobody wants the answer either.
            let _ = answer.send(work());
        })?;
    answered.await.map_err(|_| panicked())
}

fn panicked() -> io::Error {
    io::Error::other("a thread of portcullis panicked: this is a bug, see the log")
}

fn become_user(account: &Account) -> io::Result<()> {
    if geteuid().as_raw() == account.uid {
        return Ok(());
    }
    // setresuid(2) and setresgid(2) take the largest number for "as it is": root would stay root.
    if [account.uid, account.gid].contains(&u32::MAX) || account.groups.contains(&u32::MAX) {
        return Err(io::Error::other(
            "4294967295 stands for no user and no group: give it another number in /etc/passwd or /etc/group",
        ));
    }
    let (user, group) = (Uid::from_raw(account.uid), Gid::from_raw(account.gid));
    let groups: Vec<Gid> = account.groups.iter().copied().map(Gid::from_raw).collect();
    // Groups first: afterwards it is not allowed any more.
    set_thread_groups(&groups)?;
    set_thread_res_gid(None, group, None)?;
    set_thread_res_uid(None, user, None)?;
    // The kernel has just made the whole process one whose core may be written.
    memory::stay_undumpable()?;
    // The kernel drops them with root's effective identity, unless somebody set SECBIT_NO_SETUID_FIXUP
    // (capabilities(7)): then permissions would not be asked as the user's.
    if capabilities(None)?.effective != CapabilitySet::empty() {
        return Err(io::Error::other(
            "capabilities are left after becoming the user: remove SecureBits= from the unit",
        ));
    }
    Ok(())
}
