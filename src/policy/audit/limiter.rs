//! How often the same thing is told: a stranger's refusals must neither fill the disk nor push what matters
//! out of the log.
//!
//! May not live here: clocks, writing.

use std::collections::BTreeMap;
use std::time::Duration;

/// Time after which a caller is told anew.
pub const WINDOW: Duration = Duration::from_secs(600);
/// How many records one caller gets for one thing in that time.
pub const EACH: u32 = 5;
/// Most callers that are told apart at once; the others are counted together.
const MAX_KEYS: usize = 64;

/// Counts what is not told. Times are since boot.
#[derive(Debug)]
pub struct Limiter {
    /// How many records all together get within a window.
    together: u32,
    began: Duration,
    told: u32,
    keys: BTreeMap<String, Seen>,
    others: u64,
}

#[derive(Debug)]
struct Seen {
    began: Duration,
    told: u32,
    untold: u64,
}

/// What was counted and not told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Untold {
    /// Of whom and what; `None` is all others together.
    pub key: Option<String>,
    /// How many.
    pub count: u64,
}

impl Limiter {
    /// One that lets at most `together` records through in each [`WINDOW`].
    pub fn new(together: u32) -> Self {
        Self {
            together,
            began: Duration::ZERO,
            told: 0,
            keys: BTreeMap::new(),
            others: 0,
        }
    }

    /// Whether this one is told. What is not is counted. Take what is due first ([`Self::due`]).
    pub fn admit(&mut self, key: &str, now: Duration) -> bool {
        if now >= self.began + WINDOW {
            (self.began, self.told) = (now, 0);
        }
        let is_known = self.keys.contains_key(key);
        if !is_known && (self.keys.len() >= MAX_KEYS || self.told >= self.together) {
            self.others += 1;
            return false;
        }
        let seen = self.keys.entry(key.to_owned()).or_insert(Seen {
            began: now,
            told: 0,
            untold: 0,
        });
        if seen.told >= EACH || self.told >= self.together {
            seen.untold += 1;
            return false;
        }
        seen.told += 1;
        self.told += 1;
        true
    }

    /// What was counted in windows that are over; it is forgotten then. With `all`, also in those that are not.
    pub fn due(&mut self, now: Duration, all: bool) -> Vec<Untold> {
        let mut untold = Vec::new();
        self.keys.retain(|key, seen| {
            let is_over = all || now >= seen.began + WINDOW;
            if is_over && seen.untold > 0 {
                untold.push(Untold {
                    key: Some(key.clone()),
                    count: seen.untold,
                });
            }
            !is_over
        });
        if self.others > 0 && (all || now >= self.began + WINDOW) {
            untold.push(Untold {
                key: None,
                count: std::mem::take(&mut self.others),
            });
        }
        untold
    }

    /// When something that was counted is to be told; `None` if nothing was.
    pub fn next(&self) -> Option<Duration> {
        let counted = self.keys.values().filter(|seen| seen.untold > 0);
        let keys = counted.map(|seen| seen.began + WINDOW);
        let others = (self.others > 0).then_some(self.began + WINDOW);
        keys.chain(others).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_again_is_counted_and_told_when_its_time_is_over() {
        let (mut limiter, now) = (Limiter::new(100), Duration::from_secs(5000));
        let admitted = (0..125).filter(|_| limiter.admit("a", now)).count();
        assert_eq!(admitted, 5);
        assert!(limiter.admit("b", now));
        assert_eq!(limiter.due(now, false), []);
        let later = limiter.next().unwrap();
        assert_eq!(later, now + WINDOW);
        let expected = Untold {
            key: Some("a".to_owned()),
            count: 120,
        };
        assert_eq!(limiter.due(later, false), [expected]);
        assert_eq!((limiter.next(), limiter.due(later, true)), (None, vec![]));
        assert!(limiter.admit("a", later));
    }

    #[test]
    fn a_crowd_is_bounded_in_records_and_memory_and_nobody_is_lost() {
        let (mut limiter, mut told, mut now) = (Limiter::new(30), 0, Duration::ZERO);
        let mut counted = 0;
        for caller in 0..20_000_u32 {
            now += Duration::from_millis(100);
            let due = limiter.due(now, false);
            told += due.len();
            counted += due.iter().map(|untold| untold.count).sum::<u64>();
            if limiter.admit(&format!("caller {caller}"), now) {
                told += 1;
                counted += 1;
            }
            assert!(limiter.keys.len() <= MAX_KEYS);
        }
        counted += limiter
            .due(now, true)
            .iter()
            .map(|untold| untold.count)
            .sum::<u64>();
        assert_eq!(counted, 20_000);
        assert!(told <= 200, "{told} records in 2000 s");
    }
}
