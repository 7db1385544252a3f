//! Samples, their medians, and tables of them.
//!
//! May not live here: measuring.

use std::fmt::Display;
use std::time::{Duration, Instant};

use comfy_table::{Table, presets};

/// Times of one thing, sorted; at least one.
#[derive(Clone)]
pub struct Samples(Vec<Duration>);

impl Samples {
    /// # Panics
    /// When nothing was measured: a table may not have a figure that stands for nothing.
    pub fn new(mut times: Vec<Duration>) -> Self {
        assert!(!times.is_empty(), "nothing was measured");
        times.sort_unstable();
        Self(times)
    }

    /// Measures so often.
    pub fn of(rounds: usize, mut once: impl FnMut(usize) -> Duration) -> Self {
        Self::new((0..rounds).map(&mut once).collect())
    }

    pub fn median(&self) -> Duration {
        self.quantile(0.5)
    }

    /// The sample below which that share of them lies (nearest rank).
    pub fn quantile(&self, share: f64) -> Duration {
        self.0[((self.0.len() - 1) as f64 * share).round() as usize]
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn max(&self) -> Duration {
        self.quantile(1.0)
    }

    /// How many times as long as the other, by the medians.
    pub fn ratio(&self, other: &Self) -> f64 {
        self.median().as_secs_f64() / other.median().as_secs_f64()
    }

    /// Median, least and most, number.
    pub fn summary(&self) -> String {
        format!(
            "{} ({} to {}, n={})",
            time(self.median()),
            time(self.quantile(0.0)),
            time(self.max()),
            self.0.len()
        )
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

fn digits(number: f64) -> String {
    let decimals = match number {
        n if n < 10.0 => 2,
        n if n < 100.0 => 1,
        _ => 0,
    };
    format!("{number:.decimals$}")
}

/// Prints a table in Markdown.
pub fn print<C: Display>(title: &str, header: &[&str], rows: Vec<Vec<C>>) {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header);
    for row in rows {
        table.add_row(row);
    }
    println!("\n### {title}\n{table}");
}
