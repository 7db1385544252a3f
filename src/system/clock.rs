//! Time since boot, which no one sets, and which boot it is.
//!
//! May not live here: wall-clock time.

use std::io;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Time since boot, with time asleep (`CLOCK_BOOTTIME`, clock_gettime(2)).
pub fn since_boot() -> Duration {
    // This clock is always there (Linux 2.6.39).
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map(Duration::from)
        .unwrap_or_default()
}

/// The id of this boot (random(4)).
///
/// # Errors
/// When /proc can't be read.
pub fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}
