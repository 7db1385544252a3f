//! A timer that wakes us once, when it is due.
//!
//! tokio's own timers wake several times on the way to a distant moment: they wait in a wheel whose slots have 64
//! times the length of the slots below (tokio::time). For what is waited for while nothing happens, that is most of
//! what an idle process does. May not live here: what is due.

use std::io;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::time::{Instant, sleep_until};

use super::descriptors::Readable;

/// One timer.
pub struct Alarm(Option<Readable<TimerFd>>);

impl Alarm {
    /// A timer of the kernel's (timerfd_create(2)); where there is none, one of tokio's.
    pub fn new() -> Self {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags).ok();
        Self(timer.and_then(|timer| Readable::new(timer).ok()))
    }

    /// Waits for a moment; without one, for ever. A wait that is given up leaves nothing behind.
    pub async fn until(&self, moment: Option<Instant>) {
        let Some(moment) = moment else {
            return std::future::pending().await;
        };
        if self.wait(moment).await.is_err() {
            sleep_until(moment).await;
        }
    }

    async fn wait(&self, moment: Instant) -> io::Result<()> {
        let timer = self.0.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        loop {
            let left = moment.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            // Zero would stop it (timerfd_settime(2)). What an earlier wait left is over with this.
            let due = Expiration::OneShot(left.max(Duration::from_micros(1)).into());
            timer.source().set(due, TimerSetTimeFlags::empty())?;
            timer
                .read(|timer| match timer.wait() {
                    Err(Errno::EAGAIN) => Err(io::ErrorKind::WouldBlock.into()),
                    done => done.map_err(io::Error::from),
                })
                .await?;
        }
    }
}

impl Default for Alarm {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_due_at_its_time_and_not_at_that_of_a_wait_that_was_given_up() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let (alarm, start) = (Alarm::new(), Instant::now());
            assert!(alarm.0.is_some());
            let (soon, later) = (Duration::from_millis(20), Duration::from_millis(60));
            let given_up = tokio::time::timeout(Duration::from_millis(1), alarm.until(Some(start + soon)));
            assert!(given_up.await.is_err());
            alarm.until(Some(start + later)).await;
            assert!(start.elapsed() >= later);
            alarm.until(Some(start)).await;
            let never = tokio::time::timeout(soon, alarm.until(None));
            assert!(never.await.is_err());
        });
    }
}
