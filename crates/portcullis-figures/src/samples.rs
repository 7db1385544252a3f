//! Times of one thing, and how they are written.
//!
//! May not live here: tables.

use std::time::{Duration, Instant};

/// Times of one thing, sorted; at least one.
#[derive(Clone, Debug)]
pub struct Samples(Vec<Duration>);

impl Samples {
    /// Sorts them.
    ///
    /// # Panics
    /// When nothing was measured: a table may not have a figure that stands for nothing.
    pub fn new(mut times: Vec<Duration>) -> Self {
        assert!(!times.is_empty(), "nothing was measured");
        times.sort_unstable();
        Self(times)
    }

    /// Measures so often; the measurement is told which one it is, from 0.
    pub fn of(rounds: usize, mut once: impl FnMut(usize) -> Duration) -> Self {
        Self::new((0..rounds).map(&mut once).collect())
    }

    /// The one in the middle.
    pub fn median(&self) -> Duration {
        self.quantile(0.5)
    }

    /// The sample below which that share of them lies (nearest rank); a share from 0 to 1.
    pub fn quantile(&self, share: f64) -> Duration {
        self.0[((self.0.len() - 1) as f64 * share).round() as usize]
    }

    /// How many there are.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The longest.
    pub fn max(&self) -> Duration {
        self.quantile(1.0)
    }

    /// How many times as long as the other, by the medians.
    pub fn ratio(&self, other: &Self) -> f64 {
        self.median().as_secs_f64() / other.median().as_secs_f64()
    }
}

/// How long it takes, and what comes out.
pub fn timed<T>(what: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let result = what();
    (start.elapsed(), result)
}

/// Three digits and a unit.
pub fn time(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    let (number, unit) = match seconds {
        s if s < 1e-6 => (s * 1e9, "ns"),
        s if s < 1e-3 => (s * 1e6, "µs"),
        s if s < 1.0 => (s * 1e3, "ms"),
        s => (s, "s"),
    };
    format!("{} {unit}", digits(number))
}

/// A ratio, with the sign of multiplication.
pub fn times(ratio: f64) -> String {
    format!("{}×", digits(ratio))
}

/// About three digits.
pub(crate) fn digits(number: f64) -> String {
    let decimals = match number {
        n if n < 0.01 => 4,
        n if n < 0.1 => 3,
        n if n < 10.0 => 2,
        n if n < 100.0 => 1,
        _ => 0,
    };
    thousands(&format!("{number:.decimals$}"))
}

/// With a comma after each three digits before the point.
fn thousands(number: &str) -> String {
    let (whole, rest) = number
        .split_once('.')
        .map_or((number, None), |(w, r)| (w, Some(r)));
    let mut text = String::new();
    for (at, digit) in whole.chars().enumerate() {
        if at > 0 && (whole.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    rest.map_or(text.clone(), |rest| format!("{text}.{rest}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples() {
        let samples = Samples::new([5, 1, 4, 2, 3].map(Duration::from_millis).to_vec());
        assert_eq!(samples.median(), Duration::from_millis(3));
        assert_eq!(samples.quantile(0.0), Duration::from_millis(1));
        assert_eq!(samples.max(), Duration::from_millis(5));
        assert_eq!(samples.len(), 5);
    }

    #[test]
    fn three_digits_and_a_unit() {
        let shown = |nanoseconds| time(Duration::from_nanos(nanoseconds));
        assert_eq!(shown(999), "999 ns");
        assert_eq!(shown(1_234), "1.23 µs");
        assert_eq!(shown(12_345_678), "12.3 ms");
        assert_eq!(shown(2_500_000_000), "2.50 s");
        assert_eq!(times(1234.4), "1,234×");
        assert_eq!(digits(1_234_567.0), "1,234,567");
        assert_eq!(digits(123.0), "123");
    }
}
