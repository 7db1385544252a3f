//! Hosts for programs that think they own the machine: a network of their own, and folders of their own
//! over `/etc`, `/run` and `/var`. Nothing of this machine is changed.
//!
//! May not live here: what is measured.

use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::Namespace;
use portcullis_figures::timed;

/// Calls a function on a thread that is inside the namespace and sees private folders, which last as long
/// as the thread. Programs that it starts see the same.
pub fn enter<T: Send>(namespace: &Namespace, inside: impl FnOnce() -> T + Send) -> T {
    namespace.enter(|| {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        for folder in ["/run", "/var/log", "/tmp"] {
            mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        }
        for (folder, name) in [("/etc", "etc"), ("/var/lib", "lib")] {
            let of = |part: &str| format!("/run/{name}-{part}");
            for part in ["upper", "work"] {
                std::fs::create_dir(of(part)).unwrap();
            }
            let layers = format!(
                "lowerdir={folder},upperdir={},workdir={}",
                of("upper"),
                of("work")
            );
            mount(
                Some("overlay"),
                folder,
                Some("overlay"),
                MsFlags::empty(),
                Some(layers.as_str()),
            )
            .unwrap();
        }
        inside()
    })
}

/// Longest time for one command; what takes longer is not measured.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// Runs a command to its end: how long it took, or why it can't be said.
pub fn command(line: &str) -> Result<Duration, String> {
    run(line).map(|(time, _)| time)
}

/// The same for what has to work.
///
/// # Panics
/// When it does not.
pub fn must(line: &str) -> Duration {
    command(line).unwrap_or_else(|reason| panic!("{reason}"))
}

/// What a command prints.
pub fn text(line: &str) -> Result<String, String> {
    let (_, output) = run(line)?;
    String::from_utf8(output.stdout).map_err(|e| format!("{line}: {e}"))
}

fn run(line: &str) -> Result<(Duration, Output), String> {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let (time, output) = timed(|| {
        let child = command.spawn().map_err(|e| format!("{line}: {e}"))?;
        within_patience(child).map_err(|e| format!("{line}: {e}"))
    });
    let output = output?;
    match output.status.signal() {
        None if output.status.success() => Ok((time, output)),
        Some(_) => Err(format!("over {} s", PATIENCE.as_secs())),
        None => Err(format!(
            "{line}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
    }
}

/// Its output; it is killed when it takes too long.
fn within_patience(child: Child) -> std::io::Result<Output> {
    let pid = Pid::from_raw(child.id().cast_signed());
    let (done, is_done) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if is_done.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                let _ = kill(pid, Signal::SIGKILL);
            }
        });
        let output = child.wait_with_output();
        drop(done);
        output
    })
}

/// Programs that are compared with, each with what tells its version.
const TOOLS: [&str; 6] = [
    "nft --version",
    "iptables --version",
    "ufw version",
    "firewall-offline-cmd --version",
    "iperf3 --version",
    "strace --version",
];

/// Their versions; an error that tells what to do if one is missing.
pub fn versions() -> Result<Vec<String>, String> {
    let version = |line: &&str| {
        let program = line.split(' ').next().unwrap_or(line);
        let (_, output) =
            run(line).map_err(|e| format!("{program} can't be used ({e}): run `packaging/setup bench`"))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let first = text.lines().next().unwrap_or_default();
        // One of them prints nothing but its number.
        let name = if first.starts_with(|c: char| c.is_ascii_digit()) {
            "firewalld "
        } else {
            ""
        };
        Ok(format!("{name}{first}"))
    };
    TOOLS.iter().map(version).collect()
}

/// A program that ends with this value; what it says is of no interest.
pub struct Server(Child);

impl Server {
    pub fn start(line: &str) -> Self {
        let mut words = line.split_whitespace();
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Self(command.spawn().unwrap_or_else(|e| panic!("{line}: {e}")))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
