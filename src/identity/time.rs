//! What time it is, where that decides about a certificate: the system's clock, unless it is known to be wrong.
//!
//! Clocks are wrong at first boot, by decades where there is no battery. Two things are known better:
//! a time that somebody proved with the enrolment token or the instance's authority, over a nonce of ours,
//! from then on by the time since boot; and times that are over for certain, before which it can't be.
//! May not live here: setting the system's clock; whoever proves a time.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::UnixTime;
use rustls::time_provider::TimeProvider;
use serde::{Deserialize, Serialize};

use crate::system::clock;

/// A clock that is off by less is not wrong, in seconds: proven times are that exact.
pub const TOLERANCE: i64 = 300;

/// A moment: by the wall, in seconds since 1970, and as time since boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Moment {
    unix: i64,
    boot: Duration,
}

impl Moment {
    fn now(unix: i64) -> Self {
        let boot = clock::since_boot();
        Self { unix, boot }
    }

    /// What the wall's time is when that much time has gone since boot.
    fn at(self, boot: Duration) -> i64 {
        let gone = boot.saturating_sub(self.boot).as_secs();
        self.unix.saturating_add_unsigned(gone)
    }
}

/// What is known of the time. It holds in each process, and until the next boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownTime {
    earliest: Option<Moment>,
    proven: Option<Moment>,
}

impl KnownTime {
    /// The time, when the system's clock says `system`.
    fn judge(&self, system: i64, boot: Duration) -> i64 {
        let proven = self.proven.map(|moment| moment.at(boot));
        let believed = match proven {
            Some(proven) if proven.abs_diff(system) > TOLERANCE.unsigned_abs() => proven,
            _ => system,
        };
        let earliest = self.earliest.map(|moment| moment.at(boot));
        earliest.map_or(believed, |earliest| earliest.max(believed))
    }
}

/// The time by which certificates are judged.
#[derive(Debug, Default)]
pub struct ProvenClock(Mutex<KnownTime>);

impl ProvenClock {
    /// By what another process knows.
    pub fn knowing(known: KnownTime) -> Self {
        Self(Mutex::new(known))
    }

    /// Takes over what another process knew in this boot.
    pub fn know(&self, known: KnownTime) {
        let before = self.what_is_known().earliest;
        *self.known() = known;
        if let Some(before) = before {
            self.not_before(before.at(clock::since_boot()));
        }
    }

    /// What is known, for another process.
    pub fn what_is_known(&self) -> KnownTime {
        *self.known()
    }

    /// It is not earlier than this, in seconds since 1970.
    pub fn not_before(&self, unix: i64) {
        let mut known = self.known();
        let now = known.earliest.map(|moment| moment.at(clock::since_boot()));
        if now.is_none_or(|now| now < unix) {
            known.earliest = Some(Moment::now(unix));
        }
    }

    /// Somebody proved that it is this time now, in seconds since 1970. It replaces what was known before: who
    /// can prove it, is who says what holds.
    pub fn prove(&self, unix: i64) {
        let moment = Moment::now(unix);
        *self.known() = KnownTime {
            earliest: None,
            proven: Some(moment),
        };
    }

    /// The time, in seconds since 1970.
    pub fn now(&self) -> i64 {
        self.known().judge(system(), clock::since_boot())
    }

    /// How far the system's clock is ahead of it, in seconds, if that is more than [`TOLERANCE`].
    pub fn wrong_by(&self) -> Option<i64> {
        let off = system().saturating_sub(self.now());
        (off.abs() > TOLERANCE).then_some(off)
    }

    fn known(&self) -> MutexGuard<'_, KnownTime> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TimeProvider for ProvenClock {
    fn current_time(&self) -> Option<UnixTime> {
        let seconds = u64::try_from(self.now()).ok()?;
        Some(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
    }
}

/// The system's clock, in seconds since 1970.
pub fn system() -> i64 {
    let seconds = |time: Duration| i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => seconds(since),
        Err(before) => -seconds(before.duration()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const YEARS: i64 = 20 * 365 * 86_400;
    const NOW: i64 = 1_800_000_000;

    fn at(unix: i64) -> Option<Moment> {
        let boot = Duration::from_secs(100);
        Some(Moment { unix, boot })
    }

    proptest! {
        /// However wrong the clock: a proven time goes on by the time since boot.
        #[test]
        fn a_proven_time_beats_a_wrong_clock(wrong in -YEARS..YEARS, later in 0u64..1_000_000) {
            let known = KnownTime { earliest: None, proven: at(NOW) };
            let real = NOW + later as i64;
            let said = known.judge(real + wrong, Duration::from_secs(100 + later));
            prop_assert!((said - real).abs() <= TOLERANCE);
        }

        /// A lower bound never makes it earlier, and never later than the bound asks for.
        #[test]
        fn a_lower_bound_only_lifts(system in -YEARS..NOW + YEARS) {
            let known = KnownTime { earliest: at(NOW), proven: None };
            prop_assert_eq!(known.judge(system, Duration::from_secs(100)), system.max(NOW));
        }
    }

    #[test]
    fn a_right_clock_is_believed_and_a_lower_bound_only_rises() {
        let time = ProvenClock::default();
        assert!((time.now() - system()).abs() <= 1 && time.wrong_by().is_none());
        time.not_before(system() + YEARS);
        assert!(time.wrong_by().is_some_and(|off| (off + YEARS).abs() <= 1));
        time.not_before(system() - YEARS);
        assert!(time.now() >= system() + YEARS - 1);
        time.prove(system() + 10);
        assert!((time.now() - system()).abs() <= 1 && time.wrong_by().is_none());
    }
}
