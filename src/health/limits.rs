//! How much strangers may take of the endpoint: connections in all and by source, connections and
//! requests in a time, and how many large bodies are under way at once.
//!
//! The rule when room is short: who has not shown a certificate goes first, the oldest of the fullest source.
//! May not live here: sockets, HTTP, who is trusted.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::config::LimitSettings;

/// Sources whose rate is remembered; more than these share one rate until some of them have been quiet.
const MAX_SOURCES: usize = 4096;
/// How many seconds' worth of its rate a source may take at once.
const BURST_SECONDS: u32 = 4;
/// Large bodies that are read or worked on at once: each may take [`portcullis_protocol::spec::MAX_SPEC_BYTES`].
const LARGE_BODIES: usize = 2;
/// A body over this many bytes, or of unknown length, is a large one.
pub(super) const LARGE_BODY: usize = 64 << 10;
/// Of all connections, one in so many is kept for callers with a certificate.
const RESERVED: usize = 4;

/// Whose connections are counted together: an IPv4 address, or an IPv6 network of 64 bits, for that is what
/// one customer has at least (RFC 6177).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Source(u128);

impl Source {
    pub(super) fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => Self(v4.to_ipv6_mapped().to_bits()),
            IpAddr::V6(v6) => Self(v6.to_bits() >> 64 << 64),
        }
    }
}

/// What a rate is of. Each source has one of each kind, so that none of them uses up another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Kind {
    /// New connections, for a handshake is what costs most.
    Connection,
    /// Requests without a certificate.
    Stranger,
    /// Requests with a certificate.
    ControlPlane,
}

/// What was turned away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TurnedAway {
    /// New connections over their source's rate, closed at once.
    pub(super) connections: u64,
    /// Connections that were ended to make room for others.
    pub(super) evicted: u64,
    /// Requests over their source's rate, answered with 429.
    pub(super) requests: u64,
}

/// The limits of one endpoint, and what is used of them.
pub(super) struct Limits {
    settings: LimitSettings,
    used: Mutex<Used>,
    bodies: Arc<Semaphore>,
}

struct Used {
    next: u64,
    /// Connections without a certificate, the oldest first. Dropping the sender ends one.
    strangers: BTreeMap<u64, (Source, oneshot::Sender<()>)>,
    by_source: HashMap<Source, usize>,
    /// Connections with a certificate that have a reserved slot.
    trusted: usize,
    /// When a source's bucket is full again (the "theoretical arrival time" of GCRA, ITU-T I.371).
    rates: HashMap<(Source, Kind), Instant>,
    turned_away: TurnedAway,
    /// What of it was told.
    told: TurnedAway,
}

/// A connection's place; given back when dropped.
pub(super) struct Slot {
    limits: Arc<Limits>,
    place: Place,
}

enum Place {
    Stranger(u64),
    Reserved,
}

impl Limits {
    pub(super) fn new(settings: LimitSettings) -> Self {
        Self {
            settings,
            used: Mutex::new(Used {
                next: 0,
                strangers: BTreeMap::new(),
                by_source: HashMap::new(),
                trusted: 0,
                rates: HashMap::new(),
                turned_away: TurnedAway::default(),
                told: TurnedAway::default(),
            }),
            bodies: Arc::new(Semaphore::new(LARGE_BODIES)),
        }
    }

    /// A panic elsewhere ends the process; there is nothing half done to be afraid of.
    fn used(&self) -> MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reserved(&self) -> usize {
        self.settings.connections / RESERVED
    }

    /// A place for a new connection, and what ends when the place is needed for another one. None if its
    /// source makes too many of them.
    pub(super) fn admit(
        self: &Arc<Self>,
        address: IpAddr,
        now: Instant,
    ) -> Option<(Slot, oneshot::Receiver<()>)> {
        let source = Source::of(address);
        let mut used = self.used();
        if used
            .take((source, Kind::Connection), self.settings.requests, now)
            .is_err()
        {
            used.turned_away.connections += 1;
            return None;
        }
        if used.by_source.get(&source).copied().unwrap_or(0) >= self.settings.connections_per_source {
            used.evict_oldest_of(source);
        } else if used.strangers.len() >= self.settings.connections - self.reserved() {
            let fullest = used
                .by_source
                .iter()
                .max_by_key(|(source, count)| (**count, **source));
            if let Some(source) = fullest.map(|(source, _)| *source) {
                used.evict_oldest_of(source);
            }
        }
        let number = used.next;
        used.next += 1;
        let (keep, ended) = oneshot::channel();
        used.strangers.insert(number, (source, keep));
        *used.by_source.entry(source).or_default() += 1;
        let slot = Slot {
            limits: self.clone(),
            place: Place::Stranger(number),
        };
        Some((slot, ended))
    }

    /// Whether a request may be answered.
    ///
    /// # Errors
    /// How long the caller has to wait.
    pub(super) fn request(&self, address: IpAddr, trusted: bool, now: Instant) -> Result<(), Duration> {
        let (kind, rate) = match trusted {
            true => (Kind::ControlPlane, self.settings.control_plane_requests),
            false => (Kind::Stranger, self.settings.requests),
        };
        let mut used = self.used();
        let taken = used.take((Source::of(address), kind), rate, now);
        if taken.is_err() {
            used.turned_away.requests += 1;
        }
        taken
    }

    /// Waits for room for a large body; to be held for as long as the body or what it says is in memory.
    pub(super) async fn large_body(&self) -> Option<OwnedSemaphorePermit> {
        self.bodies.clone().acquire_owned().await.ok()
    }

    /// What was turned away since the endpoint began.
    pub(super) fn turned_away(&self) -> TurnedAway {
        self.used().turned_away
    }

    /// What was turned away since this was asked last.
    pub(super) fn untold(&self) -> TurnedAway {
        let mut used = self.used();
        let (now, told) = (used.turned_away, used.told);
        used.told = now;
        TurnedAway {
            connections: now.connections - told.connections,
            evicted: now.evicted - told.evicted,
            requests: now.requests - told.requests,
        }
    }
}

impl Used {
    fn forget(&mut self, number: u64) {
        if let Some((source, _)) = self.strangers.remove(&number)
            && let Some(count) = self.by_source.get_mut(&source)
        {
            *count -= 1;
            if *count == 0 {
                self.by_source.remove(&source);
            }
        }
    }

    fn evict_oldest_of(&mut self, source: Source) {
        let oldest = self.strangers.iter().find(|(_, (of, _))| *of == source);
        if let Some(number) = oldest.map(|(number, _)| *number) {
            self.forget(number);
            self.turned_away.evicted += 1;
        }
    }

    /// Takes one of `rate` a second, 0 being without a limit.
    fn take(&mut self, mut key: (Source, Kind), rate: u32, now: Instant) -> Result<(), Duration> {
        if rate == 0 {
            return Ok(());
        }
        let full_again = |rates: &HashMap<_, Instant>, key| rates.get(&key).copied().unwrap_or(now).max(now);
        if self.rates.len() >= MAX_SOURCES && !self.rates.contains_key(&key) {
            // Whose bucket is full again is as good as forgotten.
            self.rates.retain(|_, at| *at > now);
            if self.rates.len() >= MAX_SOURCES {
                key.0 = Source(u128::MAX);
            }
        }
        let each = Duration::from_secs(1) / rate;
        let next = full_again(&self.rates, key) + each;
        let most = Duration::from_secs(1) * BURST_SECONDS;
        match (next - now).checked_sub(most) {
            Some(wait) if !wait.is_zero() => Err(wait),
            _ => {
                self.rates.insert(key, next);
                Ok(())
            }
        }
    }
}

impl Slot {
    /// The connection showed a certificate that holds: it gets a reserved place if there is one. Else it
    /// keeps the one that it has, and may have to make room.
    pub(super) fn promote(&mut self) {
        let Place::Stranger(number) = self.place else {
            return;
        };
        let reserved = self.limits.reserved();
        let mut used = self.limits.used();
        // If it is not among the strangers, it has been told to end.
        let ended = !used.strangers.contains_key(&number);
        if ended || used.trusted >= reserved {
            return;
        }
        // Its end is no longer told by dropping the sender: see `is_reserved`.
        used.forget(number);
        used.trusted += 1;
        drop(used);
        self.place = Place::Reserved;
    }

    /// Whether nobody can take its place.
    pub(super) fn is_reserved(&self) -> bool {
        matches!(self.place, Place::Reserved)
    }

    /// Whose it is.
    pub(super) fn limits(&self) -> &Arc<Limits> {
        &self.limits
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut used = self.limits.used();
        match self.place {
            Place::Stranger(number) => used.forget(number),
            Place::Reserved => used.trusted -= 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(connections: usize, each: usize, requests: u32) -> Arc<Limits> {
        Arc::new(Limits::new(LimitSettings {
            connections,
            connections_per_source: each,
            requests,
            control_plane_requests: requests * 10,
        }))
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn a_source_is_an_address_or_a_network_of_64_bits() {
        let source = |text| Source::of(ip(text));
        assert_eq!(source("203.0.113.1"), source("::ffff:203.0.113.1"));
        assert_ne!(source("203.0.113.1"), source("203.0.113.2"));
        assert_eq!(source("2001:db8:1:2::1"), source("2001:db8:1:2:ffff::9"));
        assert_ne!(source("2001:db8:1:2::1"), source("2001:db8:1:3::1"));
    }

    #[test]
    fn the_oldest_of_the_fullest_source_makes_room() {
        let (limits, now) = (limits(8, 3, 0), Instant::now());
        let admit = |text| limits.admit(ip(text), now).unwrap();
        let mut quiet = admit("203.0.113.1");
        let mut flood: Vec<_> = (0..3).map(|_| admit("203.0.113.9")).collect();
        assert!(flood[0].1.try_recv() == Err(oneshot::error::TryRecvError::Empty));
        flood.push(admit("203.0.113.9"));
        assert!(flood[0].1.try_recv() == Err(oneshot::error::TryRecvError::Closed));
        // Six places are for strangers: two more sources fill them, and a third takes one of the flood's.
        let others = [admit("203.0.113.2"), admit("203.0.113.3"), admit("203.0.113.4")];
        assert!(flood[1].1.try_recv() == Err(oneshot::error::TryRecvError::Closed));
        assert!(flood[2].1.try_recv() == Err(oneshot::error::TryRecvError::Empty));
        assert!(quiet.1.try_recv() == Err(oneshot::error::TryRecvError::Empty));
        assert_eq!(limits.untold().evicted, 2);
        assert_eq!(limits.untold(), TurnedAway::default());
        assert_eq!(limits.turned_away().evicted, 2);
        drop((flood, others, quiet));
        let used = limits.used();
        assert!(used.strangers.is_empty() && used.by_source.is_empty() && used.trusted == 0);
    }

    #[test]
    fn who_showed_a_certificate_keeps_its_place() {
        let (limits, now) = (limits(8, 2, 0), Instant::now());
        let mut trusted = Vec::new();
        for _ in 0..3 {
            let mut admitted = limits.admit(ip("10.0.0.1"), now).unwrap();
            admitted.0.promote();
            trusted.push(admitted);
        }
        // Two places are reserved; the third holder of a certificate has a stranger's.
        let reserved: Vec<bool> = trusted.iter().map(|(slot, _)| slot.is_reserved()).collect();
        assert_eq!(reserved, [true, true, false]);
        let flood: Vec<_> = (0..20)
            .map(|_| limits.admit(ip("10.0.0.1"), now).unwrap())
            .collect();
        assert_eq!(limits.turned_away().evicted, 19);
        drop(flood);
        // Whose end was told already can't take a reserved place any more.
        trusted.remove(0);
        trusted[1].0.promote();
        assert!(!trusted[1].0.is_reserved());
        assert_eq!(limits.used().trusted, 1);
    }

    #[test]
    fn a_rate_has_a_burst_and_a_wait_and_each_kind_its_own() {
        let (limits, start) = (limits(8, 8, 5), Instant::now());
        let ask = |source, trusted, at| limits.request(ip(source), trusted, at);
        for _ in 0..20 {
            assert_eq!(ask("10.0.0.1", false, start), Ok(()));
        }
        let wait = ask("10.0.0.1", false, start).unwrap_err();
        assert_eq!(wait, Duration::from_millis(200));
        assert_eq!(
            ask("10.0.0.1", true, start),
            Ok(()),
            "a certificate has a rate of its own"
        );
        assert_eq!(ask("10.0.0.2", false, start), Ok(()), "so has another source");
        assert!(
            limits.admit(ip("10.0.0.1"), start).is_some(),
            "and so have connections"
        );
        assert!(ask("10.0.0.1", false, start + wait / 2).is_err());
        assert_eq!(ask("10.0.0.1", false, start + wait), Ok(()));
        assert_eq!(limits.turned_away().requests, 2);
    }

    #[test]
    fn no_number_of_sources_takes_more_than_the_table() {
        let (limits, now) = (limits(8, 8, 1), Instant::now());
        let source = |number: u32| IpAddr::from(number.to_be_bytes());
        let passed = (0..100_000)
            .filter(|number| limits.request(source(*number), false, now).is_ok())
            .count();
        assert!(limits.used().rates.len() <= MAX_SOURCES + 1);
        assert_eq!(
            passed,
            MAX_SOURCES + BURST_SECONDS as usize,
            "the rest share one rate"
        );
        // Once they have been quiet, there is room again.
        let later = now + Duration::from_secs(1);
        assert_eq!(limits.request(source(7_000_000), false, later), Ok(()));
        assert!(limits.used().rates.len() < MAX_SOURCES);
    }
}
