//! Promises about descriptors: that one stays open while the event loop watches it, and that one
//! which systemd kept for us is ours. The one module with `unsafe`.
//!
//! May not live here: what is read.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use netlink_sys::Socket;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A source of events, such as a netlink socket or inotify, in non-blocking mode.
pub struct Readable<T> {
    source: T,
    registered: AsyncFd<OwnedFd>,
}

impl<T: AsFd> Readable<T> {
    /// Registers a source with the event loop of the current runtime.
    ///
    /// # Errors
    /// As dup(2) and epoll_ctl(2).
    pub fn new(source: T) -> io::Result<Self> {
        Self::register(source, Interest::READABLE)
    }

    /// Registers a source that tells of changes by an exceptional condition (poll(2), `POLLPRI`).
    ///
    /// # Errors
    /// As dup(2) and epoll_ctl(2).
    pub fn exceptional(source: T) -> io::Result<Self> {
        Self::register(source, Interest::PRIORITY)
    }

    fn register(source: T, interest: Interest) -> io::Result<Self> {
        let own = source.as_fd().try_clone_to_owned()?;
        // SAFETY: an `OwnedFd` is open and gives the same descriptor for as long as it lives. This one
        // is a duplicate that nobody else knows of, and it moves into the `AsyncFd`, which deregisters
        // it before dropping it.
        let registered = unsafe { AsyncFd::register_with_interest(own, interest) };
        Ok(Self {
            source,
            registered: registered.map_err(|error| error.into_parts().1)?,
        })
    }

    /// Waits for an exceptional condition: one that came since the last was waited for.
    ///
    /// # Errors
    /// As epoll_wait(2).
    pub async fn exception(&self) -> io::Result<()> {
        self.registered.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }

    /// The source.
    pub fn source(&self) -> &T {
        &self.source
    }

    /// Waits until `read` gives something else than `WouldBlock`.
    ///
    /// # Errors
    /// Those of `read`.
    pub async fn read<R>(&self, mut read: impl FnMut(&T) -> io::Result<R>) -> io::Result<R> {
        loop {
            let mut ready = self.registered.readable().await?;
            if let Ok(result) = ready.try_io(|_| read(&self.source)) {
                return result;
            }
        }
    }
}

/// The netlink socket that systemd kept under this name while no daemon ran (sd_pid_notify_with_fds(3),
/// `FDSTORE=1`), at the first call; later ones get none.
pub fn kept_socket(name: &str) -> Option<Socket> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let mut kept = sd_notify::listen_fds_with_names().ok()?;
    let (fd, _) = kept.find(|(_, found)| found == name)?;
    if TAKEN.swap(true, Ordering::Relaxed) {
        return None;
    }
    // SAFETY: systemd opened this descriptor in this very process and gave its number only to it
    // ($LISTEN_PID is compared); nothing else here uses such numbers, and it is taken once.
    Some(unsafe { Socket::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    #[tokio::test(flavor = "current_thread")]
    async fn it_waits_and_reads() {
        let (reader, mut writer) = UnixStream::pair().unwrap();
        reader.set_nonblocking(true).unwrap();
        let readable = Readable::new(reader).unwrap();
        let read = |mut source: &UnixStream| {
            let mut byte = [0];
            source.read(&mut byte).map(|_| byte[0])
        };
        let writing = async {
            tokio::task::yield_now().await;
            writer.write_all(b"x").unwrap();
        };
        let (byte, ()) = tokio::join!(readable.read(read), writing);
        assert_eq!(byte.unwrap(), b'x');
    }

    /// What the kernel says of an epoll's descriptor: a line for each one that it watches (proc_pid_fdinfo(5)).
    fn watches(epoll: &std::path::Path, number: i32) -> bool {
        // A descriptor that another test closes meanwhile can't be read any more.
        let info = std::fs::read_to_string(epoll).unwrap_or_default();
        let mut watched = info.lines().filter_map(|line| line.strip_prefix("tfd:"));
        watched.any(|rest| rest.split_whitespace().next() == Some(&number.to_string()))
    }

    /// Closing a duplicate takes nothing out of an epoll while the socket is open elsewhere (epoll(7)).
    #[tokio::test(flavor = "current_thread")]
    async fn nothing_is_watched_any_more_when_it_is_dropped() {
        let (reader, _writer) = UnixStream::pair().unwrap();
        reader.set_nonblocking(true).unwrap();
        let elsewhere = reader.try_clone().unwrap();
        let readable = Readable::new(reader).unwrap();
        let number = readable.registered.get_ref().as_raw_fd();
        let entries = std::fs::read_dir("/proc/self/fdinfo").unwrap();
        let mut entries = entries.map(|entry| entry.unwrap().path());
        let epoll = entries.find(|path| watches(path, number)).unwrap();
        drop(readable);
        assert!(!watches(&epoll, number));
        drop(elsewhere);
    }

    /// In a process of its own, that gets descriptor 3 as systemd gives it.
    #[test]
    fn what_systemd_kept_is_taken_once() {
        if std::env::var_os("LISTEN_FDS").is_some() {
            assert!(kept_socket("another").is_none());
            let kept = kept_socket("nftables").unwrap();
            assert_eq!(kept.as_raw_fd(), 3);
            assert!(kept_socket("nftables").is_none());
            // With debug assertions, std ends the process where a descriptor is closed twice.
            drop(kept);
            return;
        }
        let socket = netlink_sys::Socket::new(0).unwrap();
        let output = std::process::Command::new("sh")
            .args(["-c", "LISTEN_PID=$$ exec \"$0\" --exact system::descriptors::tests::what_systemd_kept_is_taken_once 3<&0 </dev/null"])
            .arg(std::env::current_exe().unwrap())
            .env("LISTEN_FDS", "1")
            .env("LISTEN_FDNAMES", "nftables")
            .stdin(socket.as_fd().try_clone_to_owned().unwrap())
            .output()
            .unwrap();
        let said =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
    }

    /// The tests above once more, each access to memory and each descriptor watched by valgrind(1).
    #[test]
    fn the_unsafe_module_holds_under_memcheck() {
        const UNDER: &str = "PORTCULLIS_TEST_UNDER_MEMCHECK";
        if std::env::var_os(UNDER).is_some() {
            return;
        }
        let output = std::process::Command::new("valgrind")
            .args([
                "--error-exitcode=9",
                "--leak-check=full",
                "--errors-for-leak-kinds=definite",
            ])
            .args(["--trace-children=yes", "--track-fds=yes"])
            .arg(std::env::current_exe().unwrap())
            .arg("system::descriptors::")
            .env(UNDER, "1")
            .output()
            .expect("valgrind is there (packaging/setup)");
        let said =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert!(
            said.contains("4 passed") && said.contains("ERROR SUMMARY: 0 errors"),
            "{said}"
        );
    }
}
