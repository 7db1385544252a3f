//! A process that is stopped at each of its system calls, over all its threads in the order in which they come:
//! it is killed before one, or one fails in its stead.
//!
//! strace can do that too, but counts for each thread by itself: then the third call of one thread hides the
//! third of another.
//! May not live here: which process, and what has to hold afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};

use nix::errno::Errno;
use nix::libc::{self, c_long};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// What happens at a call.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// The process is killed; the call is not made.
    Kill,
    /// The call fails with this, and is not made.
    Fails(Errno),
}

/// Which calls are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calls {
    /// All.
    All,
    /// Those that change something outside of the process.
    Changing,
    /// Those that change files.
    Files,
    /// Those, and opening any.
    FilesAndOpening,
}

/// A fault, and at which of the calls, from 1.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub fault: Fault,
    pub calls: Calls,
    pub at: u32,
}

/// Does something while a process runs into a fault; gives what came of it, and at which call the fault was: none
/// if there were fewer.
pub fn while_traced<T>(process: u32, plan: Plan, act: impl FnOnce() -> T) -> (T, Option<String>) {
    let process = Pid::from_raw(i32::try_from(process).unwrap());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (ready, is_ready) = channel();
        let stop = &stop;
        let tracing = scope.spawn(move || Tracer::attach(process, plan, ready).run(stop));
        is_ready.recv().unwrap();
        let end = End { process, stop };
        let done = act();
        drop(end);
        (done, tracing.join().unwrap())
    })
}

/// Ends the tracing, also when what is done meanwhile fails: the scope waits for the tracer.
struct End<'a> {
    process: Pid,
    stop: &'a AtomicBool,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Any signal stops it. This one it would not notice; one that was killed does not either.
        let _ = kill(self.process, Signal::SIGWINCH);
    }
}

struct Tracer {
    process: Pid,
    plan: Plan,
    counted: u32,
    hit: Option<String>,
    /// Threads that have not stopped for the first time.
    starting: BTreeSet<Pid>,
    ready: Option<Sender<()>>,
    /// Threads whose call is not made, and what it gives instead.
    failing: BTreeMap<Pid, Errno>,
}

impl Tracer {
    fn attach(process: Pid, plan: Plan, ready: Sender<()>) -> Self {
        let mut starting = BTreeSet::new();
        let options = Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE;
        // Threads may come meanwhile; those of a thread that is attached are attached by the kernel.
        loop {
            let before = starting.len();
            for entry in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
                let name = entry.unwrap().file_name();
                let thread = Pid::from_raw(name.to_str().unwrap().parse().unwrap());
                if !starting.contains(&thread) && ptrace::seize(thread, options).is_ok() {
                    ptrace::interrupt(thread).unwrap();
                    starting.insert(thread);
                }
            }
            if starting.len() == before {
                break;
            }
        }
        assert!(
            !starting.is_empty(),
            "no thread of {process} could be attached to"
        );
        Self {
            process,
            plan,
            counted: 0,
            hit: None,
            starting,
            ready: Some(ready),
            failing: BTreeMap::new(),
        }
    }

    /// Until the process has ended, or it is told to stop and has not killed it. With this thread's end all are let go.
    fn run(mut self, stop: &AtomicBool) -> Option<String> {
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        loop {
            let status = match waitpid(None, Some(flags)) {
                Ok(status) => status,
                Err(Errno::EINTR) => continue,
                Err(_) => return self.hit,
            };
            let signal = match status {
                WaitStatus::Exited(thread, _) | WaitStatus::Signaled(thread, _, _) => {
                    self.started(thread);
                    if thread == self.process {
                        return self.hit;
                    }
                    continue;
                }
                WaitStatus::PtraceSyscall(thread) => {
                    self.at_call(thread);
                    None
                }
                WaitStatus::PtraceEvent(thread, _, _) => {
                    self.started(thread);
                    None
                }
                WaitStatus::Stopped(_, signal) => Some(signal),
                _ => None,
            };
            // The nudge, or whatever else comes after it.
            if stop.load(Ordering::Relaxed) && self.failing.is_empty() && !self.has_killed() {
                return self.hit;
            }
            if let Some(thread) = status.pid() {
                // One that was killed meanwhile is not there to go on.
                let _ = ptrace::syscall(thread, signal);
            }
        }
    }

    /// Then its end comes for certain, and is to be waited for.
    fn has_killed(&self) -> bool {
        self.hit.is_some() && matches!(self.plan.fault, Fault::Kill)
    }

    fn started(&mut self, thread: Pid) {
        self.starting.remove(&thread);
        if self.starting.is_empty()
            && let Some(ready) = self.ready.take()
        {
            let _ = ready.send(());
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn at_call(&mut self, thread: Pid) {
        let Ok(mut registers) = ptrace::getregs(thread) else {
            return;
        };
        if let Some(errno) = self.failing.remove(&thread) {
            registers.rax = i64::from(-(errno as i32)).cast_unsigned();
            ptrace::setregs(thread, registers).unwrap();
            return;
        }
        // So the kernel marks that a call has not been made yet.
        let begins = registers.rax.cast_signed() == i64::from(-libc::ENOSYS);
        let call = Call {
            thread,
            number: registers.orig_rax.cast_signed(),
            arguments: [registers.rdi, registers.rsi, registers.rdx],
        };
        if !begins || self.hit.is_some() || !call.is_of(self.plan.calls) {
            return;
        }
        self.counted += 1;
        if self.counted != self.plan.at {
            return;
        }
        self.hit = Some(call.text());
        match self.plan.fault {
            Fault::Kill => kill(self.process, Signal::SIGKILL).unwrap(),
            Fault::Fails(errno) => {
                registers.orig_rax = u64::MAX;
                ptrace::setregs(thread, registers).unwrap();
                self.failing.insert(thread, errno);
            }
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn at_call(&mut self, _: Pid) {
        panic!("how system calls are passed is known here for x86-64 alone");
    }
}

struct Call {
    thread: Pid,
    number: c_long,
    arguments: [u64; 3],
}

impl Call {
    fn is_of(&self, calls: Calls) -> bool {
        match calls {
            Calls::All => true,
            Calls::Changing => self.changes(),
            Calls::Files => self.changes_a_file(),
            Calls::FilesAndOpening => {
                self.changes_a_file() || [libc::SYS_openat, libc::SYS_openat2].contains(&self.number)
            }
        }
    }

    fn changes(&self) -> bool {
        match self.number {
            libc::SYS_openat => self.arguments[2] & u64::from(libc::O_CREAT.cast_unsigned()) != 0,
            number => CHANGING.iter().any(|(changing, _)| *changing == number),
        }
    }

    fn changes_a_file(&self) -> bool {
        match self.number {
            libc::SYS_write | libc::SYS_writev | libc::SYS_fsync => self.is_about_a_file(),
            libc::SYS_sendto | libc::SYS_sendmsg => false,
            _ => self.changes(),
        }
    }

    /// Not about a socket, an event or what is logged.
    fn is_about_a_file(&self) -> bool {
        self.file()
            .is_some_and(|path| path.is_absolute() && !path.ends_with("log") && !path.starts_with("/dev"))
    }

    fn file(&self) -> Option<PathBuf> {
        fs::read_link(format!("/proc/{}/fd/{}", self.thread, self.arguments[0])).ok()
    }

    fn text(&self) -> String {
        let known = CHANGING.iter().find(|(number, _)| *number == self.number);
        let name = known.map_or_else(|| self.number.to_string(), |(_, name)| (*name).to_owned());
        match self.file() {
            Some(path) => format!("{name} {}", path.display()),
            None => name,
        }
    }
}

/// By number, with their names. Newer machines do without the older ones.
const CHANGING: &[(c_long, &str)] = &[
    (libc::SYS_openat, "openat"),
    (libc::SYS_openat2, "openat2"),
    (libc::SYS_write, "write"),
    (libc::SYS_writev, "writev"),
    (libc::SYS_pwrite64, "pwrite"),
    (libc::SYS_sendto, "sendto"),
    (libc::SYS_sendmsg, "sendmsg"),
    (libc::SYS_fsync, "fsync"),
    (libc::SYS_fdatasync, "fdatasync"),
    (libc::SYS_ftruncate, "ftruncate"),
    (libc::SYS_fallocate, "fallocate"),
    (libc::SYS_renameat2, "renameat2"),
    (libc::SYS_unlinkat, "unlinkat"),
    (libc::SYS_mkdirat, "mkdirat"),
    (libc::SYS_linkat, "linkat"),
    (libc::SYS_fchmod, "fchmod"),
    (libc::SYS_fchmodat, "fchmodat"),
    (libc::SYS_fchownat, "fchownat"),
    (libc::SYS_renameat, "renameat"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_rename, "rename"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_unlink, "unlink"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_mkdir, "mkdir"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_link, "link"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_chmod, "chmod"),
];
