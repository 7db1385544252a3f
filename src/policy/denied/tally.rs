//! Who sends most of the denied packets, and for what, in bounded memory.
//!
//! May not live here: how much is denied; the sample does not know.

use std::collections::BTreeMap;

use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};
use portcullis_protocol::denied::{DeniedSample, DeniedSource, DeniedTarget};

use super::{Headers, Target, origin, protocol_name};

/// Sources that are kept apart.
const SOURCES: usize = 1000;
/// Targets that are kept apart for each source.
const TARGETS: usize = 8;
/// After that long, counting begins anew; the counts before it are kept as long again.
const PERIOD: SignedDuration = SignedDuration::from_hours(1);

/// The most frequent of many, in so many slots (Metwally, Agrawal, El Abbadi, 2005: "space-saving"). Of N that
/// were counted, whatever came more than N/slots times has a slot. A count is never too low, and too
/// high by its `uncertainty` at most.
#[derive(Clone, Debug)]
struct Frequent<K, T> {
    slots: usize,
    kept: BTreeMap<K, Slot<T>>,
}

#[derive(Clone, Debug, Default)]
struct Slot<T> {
    packets: u64,
    uncertainty: u64,
    about: T,
}

impl<K: Copy + Ord, T: Default> Frequent<K, T> {
    fn new(slots: usize) -> Self {
        Self {
            slots,
            kept: BTreeMap::new(),
        }
    }

    /// Counts one, and gives what is kept about it.
    fn count(&mut self, key: K) -> &mut T {
        let is_full = self.kept.len() >= self.slots && !self.kept.contains_key(&key);
        let inherited = if is_full { self.give_up_the_rarest() } else { 0 };
        let slot = self.kept.entry(key).or_insert_with(|| Slot {
            packets: inherited,
            uncertainty: inherited,
            about: T::default(),
        });
        slot.packets += 1;
        &mut slot.about
    }

    fn give_up_the_rarest(&mut self) -> u64 {
        let rarest = self.kept.iter().min_by_key(|(_, slot)| slot.packets);
        let rarest = rarest.map(|(key, _)| *key);
        rarest
            .and_then(|key| self.kept.remove(&key))
            .map_or(0, |slot| slot.packets)
    }
}

#[derive(Clone, Debug)]
struct Source {
    last_seen: Timestamp,
    targets: Frequent<Target, ()>,
}

impl Default for Source {
    fn default() -> Self {
        Self {
            last_seen: Timestamp::UNIX_EPOCH,
            targets: Frequent::new(TARGETS),
        }
    }
}

#[derive(Clone, Debug)]
struct Period {
    since: Timestamp,
    packets: u64,
    sources: Frequent<IpNet, Source>,
}

impl Period {
    fn from(since: Timestamp) -> Self {
        Self {
            since,
            packets: 0,
            sources: Frequent::new(SOURCES),
        }
    }
}

/// The sources of the sample since an hour ago or longer.
#[derive(Clone, Debug)]
pub struct Tally {
    current: Period,
    before: Option<Period>,
}

impl Tally {
    /// Nothing was seen yet.
    pub fn from(now: Timestamp) -> Self {
        Self {
            current: Period::from(now),
            before: None,
        }
    }

    /// Counts a packet.
    pub fn count(&mut self, packet: &Headers, now: Timestamp) {
        self.turn(now);
        self.current.packets += 1;
        let source = self.current.sources.count(origin(packet.source));
        source.last_seen = now;
        source.targets.count(packet.target());
    }

    /// A clock that was set, in either direction, at most makes it begin anew.
    fn turn(&mut self, now: Timestamp) {
        let age = now.duration_since(self.current.since).abs();
        if age >= PERIOD {
            let over = std::mem::replace(&mut self.current, Period::from(now));
            self.before = (age < PERIOD * 2).then_some(over);
        }
    }

    /// So many sources with most packets. Whoever sent more than a thousandth of a period's sample is among
    /// all of them.
    pub fn sample(&mut self, top: usize, now: Timestamp) -> DeniedSample {
        self.turn(now);
        let mut sources: BTreeMap<IpNet, DeniedSource> = BTreeMap::new();
        for period in self.before.iter().chain([&self.current]) {
            for (net, slot) in &period.sources.kept {
                let source = sources.entry(*net).or_insert_with(|| DeniedSource {
                    source: *net,
                    packets: 0,
                    uncertainty: 0,
                    last_seen: slot.about.last_seen,
                    targets: Vec::new(),
                });
                source.packets += slot.packets;
                source.uncertainty += slot.uncertainty;
                source.last_seen = slot.about.last_seen;
                add_targets(&mut source.targets, &slot.about.targets);
            }
        }
        let mut sources: Vec<_> = sources.into_values().collect();
        sources.sort_by_key(|source| std::cmp::Reverse(source.packets));
        sources.truncate(top);
        for source in &mut sources {
            source
                .targets
                .sort_by_key(|target| std::cmp::Reverse(target.packets));
        }
        let before = self.before.as_ref();
        DeniedSample {
            since: before.map_or(self.current.since, |period| period.since),
            packets: self.current.packets + before.map_or(0, |period| period.packets),
            sources,
        }
    }
}

fn add_targets(sum: &mut Vec<DeniedTarget>, more: &Frequent<Target, ()>) {
    for (target, slot) in &more.kept {
        let protocol = protocol_name(target.protocol);
        let same = |known: &&mut DeniedTarget| {
            known.protocol == protocol && known.port == target.port && known.icmp_type == target.icmp_type
        };
        match sum.iter_mut().find(same) {
            Some(known) => known.packets += slot.packets,
            None => sum.push(DeniedTarget {
                protocol: protocol.into_owned(),
                port: target.port,
                icmp_type: target.icmp_type,
                packets: slot.packets,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn packet(source: &str, port: u16) -> Headers {
        Headers {
            source: source.parse().unwrap(),
            destination: "10.0.0.1".parse().unwrap(),
            protocol: 6,
            ports: Some((40000, port)),
            icmp_type: None,
        }
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + seconds).unwrap()
    }

    #[test]
    fn sources_and_what_they_asked_for_come_most_first() {
        let mut tally = Tally::from(at(0));
        for (source, port, times) in [
            ("192.0.2.1", 80, 2),
            ("203.0.113.7", 23, 1),
            ("203.0.113.7", 22, 3),
        ] {
            for second in 0..times {
                tally.count(&packet(source, port), at(second));
            }
        }
        let sample = tally.sample(10, at(9));
        assert_eq!((sample.since, sample.packets), (at(0), 6));
        let [first, second] = &sample.sources[..] else {
            panic!("{sample:?}")
        };
        assert_eq!(
            (first.source.to_string(), first.packets, first.uncertainty),
            ("203.0.113.7/32".into(), 4, 0)
        );
        let ports: Vec<_> = first
            .targets
            .iter()
            .map(|t| (t.protocol.as_str(), t.port, t.packets))
            .collect();
        assert_eq!(ports, [("tcp", Some(22), 3), ("tcp", Some(23), 1)]);
        assert_eq!((first.last_seen, second.last_seen), (at(2), at(1)));
        assert_eq!(tally.sample(1, at(9)).sources.len(), 1);
    }

    #[test]
    fn old_counts_go_and_a_clock_that_jumps_does_no_harm() {
        let hour = 3600;
        let mut tally = Tally::from(at(0));
        tally.count(&packet("203.0.113.7", 22), at(hour - 1));
        tally.count(&packet("203.0.113.7", 22), at(hour));
        tally.count(&packet("192.0.2.1", 22), at(hour));
        let sample = tally.sample(9, at(hour));
        assert_eq!(
            (sample.since, sample.packets, sample.sources[0].packets),
            (at(0), 3, 2)
        );
        let later = tally.sample(9, at(2 * hour));
        assert_eq!((later.since, later.packets), (at(hour), 2));
        assert_eq!(tally.sample(9, at(4 * hour)).packets, 0);
        tally.count(&packet("203.0.113.7", 22), at(4 * hour));
        assert_eq!(tally.sample(9, at(-9 * hour)).packets, 0);
    }

    proptest! {
        /// What "space-saving" promises, and that slots are all there is.
        #[test]
        fn the_frequent_are_kept_and_never_counted_too_low(keys in proptest::collection::vec(0u8..40, 0..400), slots in 1usize..9) {
            let mut frequent = Frequent::<u8, ()>::new(slots);
            let mut truth = BTreeMap::<u8, u64>::new();
            for key in &keys {
                frequent.count(*key);
                *truth.entry(*key).or_default() += 1;
            }
            prop_assert!(frequent.kept.len() <= slots);
            for (key, slot) in &frequent.kept {
                prop_assert!((slot.packets - slot.uncertainty..=slot.packets).contains(&truth[key]));
            }
            for (key, times) in truth {
                prop_assert!(times <= (keys.len() / slots) as u64 || frequent.kept.contains_key(&key));
            }
        }
    }

    /// A thousand slots of eight targets each, whatever strangers forge.
    #[test]
    fn forged_sources_do_not_fill_memory_or_hide_the_one_that_sends_most() {
        let mut tally = Tally::from(at(0));
        for number in 0..20_000u32 {
            let forged = std::net::Ipv4Addr::from(0x0a00_0000 + number).to_string();
            tally.count(&packet(&forged, (number % 60_000) as u16), at(1));
            if number % 100 == 0 {
                tally.count(&packet("203.0.113.7", (number % 6_007) as u16), at(1));
            }
        }
        assert_eq!(tally.current.sources.kept.len(), SOURCES);
        let sample = tally.sample(SOURCES, at(2));
        let found = sample
            .sources
            .iter()
            .find(|source| source.source.contains(&packet("203.0.113.7", 1).source));
        let found = found.unwrap();
        assert!(
            found.packets >= 200 && found.packets - found.uncertainty <= 200,
            "{found:?}"
        );
        assert_eq!(found.targets.len(), TARGETS);
    }
}
