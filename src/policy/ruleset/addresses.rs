//! Many addresses as one value: compared, subtracted and copied 100,000 at a time.
//!
//! May not live here: ranges.

use std::cmp::Ordering;
use std::net::IpAddr;
use std::sync::Arc;

use serde::Serialize;

/// Addresses in order, each once. A clone is the same list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Addresses(Arc<Vec<IpAddr>>);

impl FromIterator<IpAddr> for Addresses {
    fn from_iter<I: IntoIterator<Item = IpAddr>>(addresses: I) -> Self {
        let mut list: Vec<IpAddr> = addresses.into_iter().collect();
        list.sort_unstable();
        list.dedup();
        Self(Arc::new(list))
    }
}

impl Addresses {
    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All, in order.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> {
        self.0.iter().copied()
    }

    /// Whether it is among them.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.binary_search(&address).is_ok()
    }

    /// The lowest and the highest; `None` if there are none.
    pub fn ends(&self) -> Option<(IpAddr, IpAddr)> {
        Some((*self.0.first()?, *self.0.last()?))
    }

    /// Those that are not among the others.
    pub fn without(&self, others: &Self) -> Self {
        if Arc::ptr_eq(&self.0, &others.0) {
            return Self::default();
        }
        let mut others = others.0.iter().peekable();
        let mut left = Vec::new();
        for address in self.0.iter() {
            let found = loop {
                match others.peek().map(|other| (*other).cmp(address)) {
                    Some(Ordering::Less) => others.next(),
                    Some(Ordering::Equal) => break true,
                    Some(Ordering::Greater) | None => break false,
                };
            };
            if !found {
                left.push(*address);
            }
        }
        Self(Arc::new(left))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::net::Ipv4Addr;

    proptest::proptest! {
        #[test]
        fn it_is_a_set(a in proptest::collection::vec(0u32..40, 0..40), b in proptest::collection::vec(0u32..40, 0..40)) {
            let address = |n: &u32| IpAddr::from(Ipv4Addr::from_bits(*n));
            let sets = [&a, &b].map(|list| list.iter().map(address).collect::<BTreeSet<_>>());
            let lists = [&a, &b].map(|list| list.iter().map(address).collect::<Addresses>());
            let expected: Vec<_> = sets[0].difference(&sets[1]).copied().collect();
            proptest::prop_assert_eq!(lists[0].without(&lists[1]).iter().collect::<Vec<_>>(), expected);
            proptest::prop_assert_eq!(lists[0].len(), sets[0].len());
            proptest::prop_assert_eq!(lists[0].contains(address(&7)), sets[0].contains(&address(&7)));
            proptest::prop_assert_eq!(lists[0] == lists[1], sets[0] == sets[1]);
            proptest::prop_assert_eq!(lists[0].ends(), sets[0].first().copied().zip(sets[0].last().copied()));
        }
    }
}
