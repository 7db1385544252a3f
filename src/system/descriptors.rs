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
}
