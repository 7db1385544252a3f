//! What tests share: network namespaces that end with their test.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

pub mod anybody;
pub mod daemon;
pub mod knock;
pub mod monitoring;
pub mod packets;
pub mod table;

use std::fmt::Debug;
use std::fs::File;
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Fails, never skips: a test that did not run proves nothing.
pub fn require_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test needs root: run `sudo -E make test`"
    );
}

/// Runs a command and gives its output.
///
/// # Panics
/// When it fails.
pub fn run(line: &str) -> String {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap_or_else(|e| panic!("{line}: {e}"));
    assert!(
        output.status.success(),
        "{line}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Asks until it is so; fails with the last answer when it is not so within the limit.
///
/// # Panics
/// Then.
#[track_caller]
pub fn eventually<T, E: Debug>(limit: Duration, what: &str, mut look: impl FnMut() -> Result<T, E>) -> T {
    let start = Instant::now();
    loop {
        match look() {
            Ok(found) => return found,
            Err(last) if start.elapsed() > limit => {
                panic!("not within {limit:?}: {what}; last seen: {last:?}")
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Says when dropped that something is over, so also when a test fails: a scope waits for its threads, and one that
/// nobody tells goes on for ever.
pub struct Over<'a>(pub &'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A network namespace of its own, removed when dropped.
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes one, with loopback up.
    pub fn new(label: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        require_root();
        let name = format!(
            "pct-{}-{}-{label}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        run(&format!("ip netns add {name}"));
        run(&format!("ip -n {name} link set lo up"));
        Self { name }
    }

    /// Its name, for `ip -n`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Connects two namespaces with a veth pair; the ends are made inside them.
    pub fn connect(&self, link: &str, other: &Self, other_link: &str) {
        let (a, b) = (&self.name, &other.name);
        run(&format!(
            "ip -n {a} link add {link} type veth peer name {other_link} netns {b}"
        ));
        run(&format!("ip -n {a} link set {link} up"));
        run(&format!("ip -n {b} link set {other_link} up"));
    }

    /// Runs a command inside.
    pub fn run(&self, line: &str) -> String {
        run(&format!("ip netns exec {} {line}", self.name))
    }

    /// Whether something listens at an address and port, for a caller inside.
    pub fn reaches(&self, to: &str) -> bool {
        let to: SocketAddr = to.parse().unwrap();
        self.enter(move || TcpStream::connect_timeout(&to, Duration::from_millis(300)).is_ok())
    }

    /// Waits until it does: new links have to learn their neighbours first.
    #[track_caller]
    pub fn until_reaches(&self, to: &str) {
        eventually(Duration::from_secs(30), to, || {
            self.reaches(to).then_some(()).ok_or("no answer")
        });
    }

    /// Calls a function on a thread that is inside.
    pub fn enter<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> T {
        let file = File::open(format!("/run/netns/{}", self.name)).unwrap();
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                    inside()
                })
                .join()
                .unwrap()
        })
    }
}

/// A host and a stranger on one link, both families.
pub fn host_and_stranger() -> (Namespace, Namespace) {
    let (host, stranger) = (Namespace::new("host"), Namespace::new("stranger"));
    host.connect("eth0", &stranger, "eth0");
    for (namespace, v4, v6) in [
        (&host, "10.9.0.1/24", "fd09::1/64"),
        (&stranger, "10.9.0.2/24", "fd09::2/64"),
    ] {
        run(&format!("ip -n {} addr add {v4} dev eth0", namespace.name()));
        run(&format!(
            "ip -n {} addr add {v6} dev eth0 nodad",
            namespace.name()
        ));
    }
    (host, stranger)
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}
