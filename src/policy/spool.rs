//! Which reports wait for the control plane: in order, within bounds, each with a number of its own.
//!
//! May not live here: files, clocks, what a report says.

use std::collections::VecDeque;

/// How much may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Reports: at least 1.
    pub reports: usize,
    /// Bytes of all of them. The newest is kept even if it is larger alone.
    pub bytes: u64,
}

/// A report that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Its number: from 1, without a gap, never used again.
    pub sequence: u64,
    /// Its size.
    pub bytes: u64,
    /// Whether the instance became ready with it, or ceased to be.
    pub readiness: bool,
}

/// The reports that wait, oldest first.
#[derive(Clone, Debug)]
pub struct Queue {
    waiting: VecDeque<Waiting>,
    bytes: u64,
    next: u64,
    dropped: u64,
    bounds: Bounds,
}

impl Queue {
    /// The queue as an earlier process left it: `waiting` in order, `next` and `dropped` as it last said.
    /// The number after the last one that waits is the next, if that is higher. Returns what has to go.
    pub fn restore(waiting: Vec<Waiting>, next: u64, dropped: u64, bounds: Bounds) -> (Self, Vec<Waiting>) {
        let last = waiting.last().map_or(0, |last| last.sequence);
        let mut queue = Self {
            bytes: waiting.iter().map(|report| report.bytes).sum(),
            waiting: waiting.into(),
            next: next.max(last + 1),
            dropped,
            bounds,
        };
        let over = queue.make_room();
        (queue, over)
    }

    /// The number that the next report gets.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// How many were dropped for want of room since there is a spool.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Counts a report that could not be kept at all.
    pub fn count_dropped(&mut self) {
        self.dropped = self.dropped.saturating_add(1);
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The oldest, which is delivered first.
    pub fn oldest(&self) -> Option<Waiting> {
        self.waiting.front().copied()
    }

    /// The newest.
    pub fn newest(&self) -> Option<Waiting> {
        self.waiting.back().copied()
    }

    /// Adds a report under the number [`Self::next`]. Returns what has to go for it.
    pub fn add(&mut self, bytes: u64, readiness: bool) -> Vec<Waiting> {
        self.waiting.push_back(Waiting {
            sequence: self.next,
            bytes,
            readiness,
        });
        self.bytes += bytes;
        self.next += 1;
        self.make_room()
    }

    /// Takes out a report that was delivered; none if it does not wait any more.
    pub fn take(&mut self, sequence: u64) -> Option<Waiting> {
        let place = self
            .waiting
            .iter()
            .position(|report| report.sequence == sequence)?;
        self.remove(place)
    }

    /// The oldest that says nothing of readiness goes first, then the oldest. The newest stays: it says how
    /// the instance is.
    fn make_room(&mut self) -> Vec<Waiting> {
        let mut over = Vec::new();
        while self.waiting.len() > 1
            && (self.waiting.len() > self.bounds.reports || self.bytes > self.bounds.bytes)
        {
            let last = self.waiting.len() - 1;
            let mut older = self.waiting.iter().take(last);
            let place = older.position(|report| !report.readiness).unwrap_or(0);
            over.extend(self.remove(place));
            self.dropped = self.dropped.saturating_add(1);
        }
        over
    }

    fn remove(&mut self, place: usize) -> Option<Waiting> {
        let report = self.waiting.remove(place)?;
        self.bytes -= report.bytes;
        Some(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOUNDS: Bounds = Bounds {
        reports: 5,
        bytes: 50,
    };

    fn sequences(queue: &Queue) -> Vec<u64> {
        queue.waiting.iter().map(|report| report.sequence).collect()
    }

    #[test]
    fn what_says_nothing_of_readiness_goes_first_and_the_newest_stays() {
        let (mut queue, over) = Queue::restore(Vec::new(), 0, 0, BOUNDS);
        assert!(over.is_empty());
        for readiness in [true, false, true, false, true] {
            assert!(queue.add(1, readiness).is_empty());
        }
        assert_eq!(queue.add(1, true)[0].sequence, 2);
        assert_eq!(queue.add(1, false)[0].sequence, 4);
        // Only the newest says nothing of readiness.
        assert_eq!(queue.add(1, true)[0].sequence, 7);
        assert_eq!(queue.add(1, false)[0].sequence, 1);
        assert_eq!(sequences(&queue), [3, 5, 6, 8, 9]);
        assert_eq!(queue.dropped(), 4);
        // One that is larger than all room is kept alone.
        assert_eq!(queue.add(60, false).len(), 5);
        assert_eq!(sequences(&queue), [10]);
    }

    #[test]
    fn numbers_go_on_after_a_restart() {
        let waiting = |sequence| Waiting {
            sequence,
            bytes: 1,
            readiness: false,
        };
        let (queue, _) = Queue::restore(vec![waiting(7)], 3, 2, BOUNDS);
        assert_eq!((queue.next(), queue.dropped()), (8, 2));
        let (queue, _) = Queue::restore(Vec::new(), 9, 0, BOUNDS);
        assert_eq!(queue.next(), 9);
        let (queue, over) = Queue::restore((1..=7).map(waiting).collect(), 8, 0, BOUNDS);
        assert_eq!((over.len(), queue.len(), queue.dropped()), (2, 5, 2));
    }

    /// What a receiver that comes and goes, and a process that ends at any time, do to a queue.
    #[derive(Clone, Debug)]
    enum Step {
        Add { bytes: u64, readiness: bool },
        DeliverOldest,
        Restart,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (1u64..30, any::<bool>()).prop_map(|(bytes, readiness)| Step::Add { bytes, readiness }),
            2 => Just(Step::DeliverOldest),
            1 => Just(Step::Restart),
        ]
    }

    proptest! {
        /// Against the plainest model: each report is delivered once, in order, or counted as dropped.
        #[test]
        fn each_is_delivered_once_in_order_or_counted(steps in prop::collection::vec(step(), 0..80)) {
            let (mut queue, _) = Queue::restore(Vec::new(), 0, 0, BOUNDS);
            let (mut added, mut delivered, mut dropped) = (0u64, Vec::new(), Vec::new());
            for step in steps {
                match step {
                    Step::Add { bytes, readiness } => {
                        let had_others = queue.waiting.iter().any(|report| !report.readiness);
                        added += 1;
                        prop_assert_eq!(queue.next(), added);
                        let over = queue.add(bytes, readiness);
                        if let Some(first) = over.first() {
                            prop_assert!(!had_others || !first.readiness);
                        }
                        dropped.extend(over.iter().map(|report| report.sequence));
                    }
                    Step::DeliverOldest => {
                        if let Some(oldest) = queue.oldest() {
                            prop_assert_eq!(queue.take(oldest.sequence), Some(oldest));
                            prop_assert_eq!(queue.take(oldest.sequence), None);
                            delivered.push(oldest.sequence);
                        }
                    }
                    Step::Restart => {
                        let left: Vec<Waiting> = queue.waiting.iter().copied().collect();
                        let (again, over) = Queue::restore(left, queue.next, queue.dropped, BOUNDS);
                        prop_assert!(over.is_empty());
                        queue = again;
                    }
                }
                let waiting = &queue.waiting;
                prop_assert!(waiting.len() <= BOUNDS.reports);
                prop_assert_eq!(queue.bytes, waiting.iter().map(|report| report.bytes).sum::<u64>());
                prop_assert!(queue.bytes <= BOUNDS.bytes || waiting.len() == 1);
                prop_assert_eq!(queue.dropped(), dropped.len() as u64);
            }
            prop_assert!(delivered.is_sorted());
            let mut all = [delivered, dropped, sequences(&queue)].concat();
            all.sort_unstable();
            prop_assert_eq!(all, (1..=added).collect::<Vec<_>>());
        }
    }
}
