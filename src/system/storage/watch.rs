//! Being told when something about storage changes: mounts and swaps (poll(2) on /proc), block devices (uevents).
//!
//! A device of the device mapper that gets another table, a disk that joins a RAID and a file that becomes a device
//! are told by the kernel as changes of block devices (Documentation/core-api/kobject.rst). May not live here: what
//! changed; it is looked at anew.

use std::fs::File;
use std::io;

use netlink_sys::protocols::NETLINK_KOBJECT_UEVENT;
use netlink_sys::{Socket, SocketAddr};

use crate::system::descriptors::Readable;
use crate::system::netlink::DONTWAIT;

/// The kernel's own messages; those that udev passes on are in another group.
const KERNEL: u32 = 1;
/// Most bytes of a message (`UEVENT_BUFFER_SIZE` in linux/kobject.h, and its header).
const MESSAGE: usize = 4096;
const OF_BLOCK: &[u8] = b"\0SUBSYSTEM=block\0";

/// One of the kernel's files of which poll(2) says `POLLPRI` when it changed.
pub struct Changes {
    file: Readable<File>,
}

impl Changes {
    /// Of what is mounted, in the first process's view, or in our own where that is hidden (`hidepid`).
    ///
    /// # Errors
    /// As open(2) and epoll_ctl(2).
    pub fn of_mounts() -> io::Result<Self> {
        Self::of("/proc/1/mountinfo").or_else(|_| Self::of("/proc/self/mountinfo"))
    }

    /// Of what memory is swapped to.
    ///
    /// # Errors
    /// As open(2) and epoll_ctl(2): `NotFound` for a kernel without swap.
    pub fn of_swaps() -> io::Result<Self> {
        Self::of("/proc/swaps")
    }

    fn of(file: &str) -> io::Result<Self> {
        Ok(Self {
            file: Readable::exceptional(File::open(file)?)?,
        })
    }

    /// Waits for a change since the last one, or since it was opened.
    ///
    /// # Errors
    /// As epoll_wait(2).
    pub async fn next(&self) -> io::Result<()> {
        self.file.exception().await
    }
}

/// What the kernel tells of block devices.
pub struct Devices {
    socket: Readable<Socket>,
}

impl Devices {
    /// Subscribes.
    ///
    /// # Errors
    /// When netlink can't be used.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_KOBJECT_UEVENT)?;
        socket.bind(&SocketAddr::new(0, KERNEL))?;
        socket.set_non_blocking(true)?;
        Ok(Self {
            socket: Readable::new(socket)?,
        })
    }

    /// Waits until a block device comes, goes or changes. Lost messages count as one of them.
    ///
    /// # Errors
    /// As recv(2).
    pub async fn next(&self) -> io::Result<()> {
        self.socket.read(taken).await
    }
}

/// Takes all messages that are there; `WouldBlock` if none is of a block device.
fn taken(socket: &Socket) -> io::Result<()> {
    let mut any = false;
    loop {
        let mut message = Vec::with_capacity(MESSAGE);
        match socket.recv(&mut message, DONTWAIT) {
            Ok(_) => any |= message.windows(OF_BLOCK.len()).any(|part| part == OF_BLOCK),
            Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ENOBUFS as i32) => any = true,
            Err(error) if any && error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(flavor = "current_thread")]
    async fn nothing_is_told_when_nothing_changes() {
        let swaps = Changes::of("/proc/swaps").unwrap();
        let told = tokio::time::timeout(Duration::from_millis(20), swaps.next()).await;
        assert!(told.is_err(), "{told:?}");
    }
}
