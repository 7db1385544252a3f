//! How long to wait before the next try: as the receiver says, within bounds, else longer each time.
//!
//! May not live here: sending, sleeping.

use std::time::{Duration, SystemTime};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};

/// Longest wait between two tries that the receiver has no word in.
const MAX_BACKOFF: Duration = Duration::from_secs(300);
/// Longest wait that a receiver may ask for.
pub const MAX_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// Waits that double from a second to five minutes, each with jitter, so that a fleet does not come back at
/// the same time.
pub struct Patience(ExponentialBackoff);

impl Default for Patience {
    fn default() -> Self {
        let waits = ExponentialBuilder::default()
            .with_jitter()
            .with_min_delay(Duration::from_secs(1))
            .with_max_delay(MAX_BACKOFF)
            .without_max_times();
        Self(waits.build())
    }
}

impl Patience {
    /// The next wait.
    pub fn next_wait(&mut self) -> Duration {
        // Without a limit on their number there always is one.
        self.0.next().unwrap_or(MAX_BACKOFF)
    }
}

/// The wait that `Retry-After` asks for (RFC 9110, 10.2.3): seconds, or a date, which counts from the
/// receiver's own `Date`, for our clock may be wrong; from ours if it sends none. At most
/// [`MAX_RETRY_AFTER`]. None for what is neither.
pub fn retry_after(value: &str, date: Option<&str>, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    let wait = if !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit()) {
        // More digits than fit are a very long time.
        Duration::from_secs(value.parse().unwrap_or(u64::MAX))
    } else {
        let until = httpdate::parse_http_date(value).ok()?;
        let now = date
            .and_then(|date| httpdate::parse_http_date(date.trim()).ok())
            .unwrap_or(now);
        until.duration_since(now).unwrap_or_default()
    };
    Some(wait.min(MAX_RETRY_AFTER))
}

/// Between 0.9 and 1.1 times as long, so that a fleet that started together does not report together.
pub fn jittered(interval: Duration) -> Duration {
    let mut byte = [0u8; 1];
    // Without randomness the reports only come at the same time as others'.
    let _ = ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut byte);
    interval.mul_f64(0.9 + 0.2 * f64::from(byte[0]) / 255.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date_and_bounded() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        let asked = |value, date| retry_after(value, date, now).map(|wait| wait.as_secs());
        assert_eq!(asked("120", None), Some(120));
        assert_eq!(asked(" 0 ", None), Some(0));
        assert_eq!(asked("86400", None), Some(3600));
        assert_eq!(asked("99999999999999999999999999", None), Some(3600));
        assert_eq!(asked("Sun, 06 Nov 1994 08:50:37 GMT", None), Some(60));
        // The two older forms of RFC 9110, 5.6.7.
        assert_eq!(asked("Sunday, 06-Nov-94 08:50:37 GMT", None), Some(60));
        assert_eq!(asked("Sun Nov  6 08:50:37 1994", None), Some(60));
        assert_eq!(asked("Sun, 06 Nov 1994 08:49:00 GMT", None), Some(0));
        assert_eq!(asked("Sat, 06 Nov 2094 08:49:00 GMT", None), Some(3600));
        // A clock that is 20 years off.
        let date = Some("Tue, 24 Nov 2026 10:00:00 GMT");
        assert_eq!(asked("Tue, 24 Nov 2026 10:00:30 GMT", date), Some(30));
        for neither in ["", "soon", "-5", "1.5", "+3", "10 s"] {
            assert_eq!(asked(neither, None), None, "{neither:?}");
        }
    }

    #[test]
    fn waits_grow_and_stay_bounded() {
        let mut patience = Patience::default();
        let waits: Vec<f64> = (0..12).map(|_| patience.next_wait().as_secs_f64()).collect();
        assert!((1.0..=2.0).contains(&waits[0]), "{waits:?}");
        assert!(waits.iter().all(|wait| *wait <= 600.0), "{waits:?}");
        assert!(waits[10] >= 300.0, "{waits:?}");
    }

    #[test]
    fn jitter_stays_near() {
        for _ in 0..100 {
            let waited = jittered(Duration::from_secs(100)).as_secs_f64();
            assert!((89.9..=110.1).contains(&waited), "{waited}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_header_panics_or_asks_for_more(value in ".{0,60}", date in proptest::option::of(".{0,60}")) {
            let wait = retry_after(&value, date.as_deref(), SystemTime::UNIX_EPOCH);
            proptest::prop_assert!(wait.is_none_or(|wait| wait <= MAX_RETRY_AFTER));
        }
    }
}
