//! How often others' changes are undone and told when there are many of them.
//!
//! May not live here: which change can wait.

use std::time::{Duration, Instant};

/// So many repairs in [`WINDOW`] are still no storm.
const CALM: u32 = 5;
const WINDOW: Duration = Duration::from_secs(1);
/// In a storm, a change that lets nothing in is undone so late.
const PAUSE: Duration = Duration::from_secs(1);

/// The last repairs.
#[derive(Debug, Default)]
pub struct Storm {
    since: Option<Instant>,
    /// Repairs since then.
    count: u32,
    untold: u64,
    /// When a change that waits is looked at.
    due: Option<Instant>,
}

impl Storm {
    /// Notes a repair. In a storm it is not worth a line in the journal; otherwise, how many were not told
    /// since the last line.
    pub fn repaired(&mut self, now: Instant) -> Option<u64> {
        self.due = None;
        match self.since {
            Some(since) if now.duration_since(since) < WINDOW => self.count += 1,
            _ => (self.since, self.count) = (Some(now), 1),
        }
        if self.count > CALM {
            self.untold += 1;
            return None;
        }
        Some(std::mem::take(&mut self.untold))
    }

    /// Until when a change that lets nothing in waits; none if there is no storm, or it waited.
    pub fn wait(&mut self, now: Instant) -> Option<Instant> {
        let is_storm =
            self.count > CALM && self.since.is_some_and(|since| now.duration_since(since) < WINDOW);
        match self.due {
            Some(due) if due <= now => self.due = None,
            Some(_) => {}
            None if is_storm => self.due = Some(now + PAUSE),
            None => {}
        }
        self.due
    }

    /// When something that waits is due.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_is_told_once_and_waited_out() {
        let (mut storm, start) = (Storm::default(), Instant::now());
        assert_eq!(storm.wait(start), None);
        let told: Vec<_> = (0..20).filter_map(|_| storm.repaired(start)).collect();
        assert_eq!(told.len(), CALM as usize);
        let due = storm.wait(start).unwrap();
        assert_eq!((storm.wait(start), storm.due()), (Some(due), Some(due)));
        assert_eq!(storm.wait(due), None, "it waited once");
        assert_eq!(storm.repaired(start + WINDOW), Some(15));
        assert_eq!(storm.wait(start + WINDOW), None);
    }
}
