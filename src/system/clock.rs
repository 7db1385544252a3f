//! Time since boot, which no one sets, and which boot it is.
//!
//! May not live here: wall-clock time.

use std::io;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use super::callers;

/// Time since boot, with time asleep (`CLOCK_BOOTTIME`, clock_gettime(2)).
pub fn since_boot() -> Duration {
    // This clock is always there (Linux 2.6.39).
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map(Duration::from)
        .unwrap_or_default()
}

/// What this boot has to itself: the kernel's id of it (random(4)), and when the first process began. In
/// a container the former stays the same over a reboot, the latter does not.
///
/// # Errors
/// When /proc can't be read.
pub fn this_boot() -> io::Result<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let first = callers::began(1).ok_or(io::ErrorKind::NotFound)?;
    Ok(format!("{} {}", id.trim(), first.as_millis()))
}
