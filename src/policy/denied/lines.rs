//! Which of the sampled packets get a line of their own in the journal: not so many that a scan fills it.
//!
//! May not live here: what a line says.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::{Headers, Target, origin};

/// The same source gets a line for the same target so often.
const SAME: Duration = Duration::from_secs(60);
/// All together get a line so often,
const PAUSE: Duration = Duration::from_secs(1);
/// and so many at once after a time without.
const AT_ONCE: u32 = 20;

/// The lines of the last while.
#[derive(Debug)]
pub struct Lines {
    told: BTreeMap<(IpNet, Target), Instant>,
    /// When all that were told would have been told at a steady pace.
    due: Instant,
    untold: u64,
}

impl Lines {
    /// None was told yet.
    pub fn from(now: Instant) -> Self {
        Self {
            told: BTreeMap::new(),
            due: now,
            untold: 0,
        }
    }

    /// Whether the packet gets a line; then also how many got none since the last line.
    pub fn ask(&mut self, packet: &Headers, now: Instant) -> Option<u64> {
        // At most as many as are told in that time: this bounds the memory too.
        self.told.retain(|_, told| now.duration_since(*told) < SAME);
        let key = (origin(packet.source), packet.target());
        let ahead = self.due.saturating_duration_since(now);
        if self.told.contains_key(&key) || ahead > PAUSE * (AT_ONCE - 1) {
            self.untold += 1;
            return None;
        }
        self.told.insert(key, now);
        self.due = self.due.max(now) + PAUSE;
        Some(std::mem::take(&mut self.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn packet(last: u8, port: u16) -> Headers {
        Headers {
            source: [203, 0, 113, last].into(),
            destination: [10, 0, 0, 1].into(),
            protocol: 17,
            ports: Some((40000, port)),
            icmp_type: None,
        }
    }

    #[test]
    fn the_same_again_is_counted_and_told_with_the_next_line() {
        let start = Instant::now();
        let mut lines = Lines::from(start);
        assert_eq!(lines.ask(&packet(1, 22), start), Some(0));
        for second in 1..60 {
            assert_eq!(
                lines.ask(&packet(1, 22), start + Duration::from_secs(second)),
                None
            );
        }
        assert_eq!(
            lines.ask(&packet(2, 22), start + Duration::from_secs(59)),
            Some(59)
        );
        assert_eq!(lines.ask(&packet(1, 22), start + SAME), Some(0));
    }

    #[test]
    fn a_scan_gets_a_burst_of_lines_and_then_one_a_second() {
        let start = Instant::now();
        let mut lines = Lines::from(start);
        let told = |lines: &mut Lines, ports: std::ops::Range<u16>, now| {
            ports
                .filter(|port| lines.ask(&packet(1, *port), now).is_some())
                .count()
        };
        assert_eq!(told(&mut lines, 0..1000, start), 20);
        assert_eq!(told(&mut lines, 1000..2000, start + PAUSE), 1);
        assert_eq!(told(&mut lines, 2000..3000, start + PAUSE * 100), 20);
    }

    proptest! {
        /// Whatever comes: lines are few, none is forgotten, and memory is bounded by the lines.
        #[test]
        fn every_packet_is_told_or_counted(
            packets in proptest::collection::vec((any::<u8>(), 0u16..50, 0u64..300), 1..600),
        ) {
            let start = Instant::now();
            let (mut lines, mut now, mut told, mut untold) = (Lines::from(start), start, 0u32, 0);
            for (last, port, wait) in &packets {
                now += Duration::from_millis(*wait);
                if let Some(before) = lines.ask(&packet(*last, *port), now) {
                    told += 1;
                    untold += before;
                }
            }
            prop_assert_eq!(u64::from(told) + untold + lines.untold, packets.len() as u64);
            prop_assert!(told <= AT_ONCE + now.duration_since(start).as_secs() as u32);
            prop_assert!(lines.told.len() <= 80);
        }
    }
}
