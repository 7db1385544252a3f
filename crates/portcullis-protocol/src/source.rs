//! Sources of traffic and addresses of peers: what may be written, and the one form that it has then.
//!
//! May not live here: who is let in from where (rules and clusters).

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de};

/// Bits before the IPv4 address in an IPv4-mapped one (RFC 4291 section 2.5.5.2).
const MAPPED_BITS: u8 = 96;

/// A source of traffic: an address range in CIDR form. A plain address is a range of one. Host bits
/// are kept as they were written, mean nothing, and are worth a warning (`10.0.0.3/8` means
/// `10.0.0.0/8`). An IPv4-mapped IPv6 range is the IPv4 range that it stands for: `::ffff:10.0.0.0/104`
/// is `10.0.0.0/8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct SourceRange(IpNet);

impl SourceRange {
    /// The range, without host bits.
    pub fn net(self) -> IpNet {
        self.0.trunc()
    }

    /// Whether an address within the range was written, and not its first.
    pub fn has_host_bits(self) -> bool {
        self.0 != self.net()
    }
}

impl From<IpAddr> for SourceRange {
    fn from(address: IpAddr) -> Self {
        Self(IpNet::from(address.to_canonical()))
    }
}

impl fmt::Display for SourceRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for SourceRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let net = text
            .parse::<IpNet>()
            .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
            .map_err(|_| {
                format!("{text:?} is not an address range: write it like 192.0.2.0/24 or 2001:db8::/32")
            })?;
        let mapped = match net {
            IpNet::V6(v6) => v6.addr().to_ipv4_mapped().map(|v4| (v4, v6.prefix_len())),
            IpNet::V4(_) => None,
        };
        let Some((v4, length)) = mapped else {
            return Ok(Self(net));
        };
        let v4 = length
            .checked_sub(MAPPED_BITS)
            .and_then(|length| Ipv4Net::new(v4, length).ok());
        v4.map(|v4| Self(v4.into())).ok_or_else(|| {
            format!("{text:?} is an IPv4 address in IPv6 form with a prefix below {MAPPED_BITS}: write the IPv4 range")
        })
    }
}

impl<'de> Deserialize<'de> for SourceRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

impl JsonSchema for SourceRange {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "SourceRange".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "an address range in CIDR form, IPv4 or IPv6; a plain address is a range of one",
            "type": "string",
            "examples": ["0.0.0.0/0", "2001:db8::/32", "192.0.2.7"]
        })
    }
}

/// A host's address as other hosts see it: not unspecified, loopback, multicast or broadcast. An
/// IPv4-mapped IPv6 address is the IPv4 address that it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, JsonSchema)]
#[serde(transparent)]
pub struct PeerAddress(IpAddr);

impl PeerAddress {
    /// The address.
    pub fn get(self) -> IpAddr {
        self.0
    }
}

impl TryFrom<IpAddr> for PeerAddress {
    type Error = String;

    fn try_from(address: IpAddr) -> Result<Self, String> {
        let address = address.to_canonical();
        let reason = match address {
            _ if address.is_unspecified() => "the unspecified address",
            _ if address.is_loopback() => "a loopback address",
            _ if address.is_multicast() => "a multicast address",
            IpAddr::V4(v4) if v4.is_broadcast() => "the broadcast address",
            _ => return Ok(Self(address)),
        };
        Err(format!("{address} can't be a peer's address: it is {reason}"))
    }
}

impl<'de> Deserialize<'de> for PeerAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let address: IpAddr = text.parse().map_err(|_| {
            de::Error::custom(format!(
                "{text:?} is not an IP address: a peer is one host, not a range"
            ))
        })?;
        Self::try_from(address).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    fn range(text: &str) -> Result<SourceRange, String> {
        text.parse()
    }

    #[test]
    fn an_ipv4_address_in_ipv6_form_is_the_ipv4_address() {
        for (written, meant) in [
            ("::ffff:10.0.0.1", "10.0.0.1/32"),
            ("::ffff:10.0.0.1/128", "10.0.0.1/32"),
            ("::ffff:a00:0/104", "10.0.0.0/8"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
        ] {
            assert_eq!(range(written).unwrap(), range(meant).unwrap(), "{written}");
        }
        // It would hold addresses that are not IPv4.
        assert!(range("::ffff:10.0.0.1/95").is_err());
        assert!(range("::/0").is_ok());
        let mapped: IpAddr = "::ffff:10.0.0.1".parse().unwrap();
        let v4 = IpAddr::from([10, 0, 0, 1]);
        assert_eq!(PeerAddress::try_from(mapped).unwrap().get(), v4);
        assert_eq!(SourceRange::from(mapped), SourceRange::from(v4));
    }

    #[test]
    fn what_no_host_has_is_no_peer() {
        for address in [
            "0.0.0.0",
            "::",
            "127.0.0.1",
            "::1",
            "::ffff:127.0.0.1",
            "224.0.0.1",
            "ff02::1",
            "255.255.255.255",
        ] {
            let parsed: IpAddr = address.parse().unwrap();
            assert!(PeerAddress::try_from(parsed).is_err(), "{address}");
        }
    }

    proptest::proptest! {
        #[test]
        fn a_range_has_one_meaning_however_it_is_written(v4: u32, v6: u128, len4 in 0u8..=32, len6 in 0u8..=128) {
            let v4 = Ipv4Addr::from(v4);
            let written = [format!("{v4}/{len4}"), format!("::ffff:{v4}/{}", len4 + MAPPED_BITS)].map(|t| range(&t).unwrap());
            proptest::prop_assert_eq!(written[0], written[1]);
            // Not an IPv4 address in IPv6 form, whatever the rest.
            let v6 = range(&format!("{}/{len6}", Ipv6Addr::from(v6 | 1 << 127))).unwrap();
            for source in [written[0], v6] {
                proptest::prop_assert_eq!(source.net(), source.net().trunc());
                proptest::prop_assert_eq!(source.has_host_bits(), source.to_string() != source.net().to_string());
                proptest::prop_assert_eq!(range(&source.to_string()).unwrap(), source);
                let meant = range(&source.net().to_string()).unwrap();
                proptest::prop_assert!(!meant.has_host_bits() && meant.net() == source.net());
            }
        }

        #[test]
        fn a_peers_address_is_read_as_it_is_written(bits: u128, is_v4: bool) {
            let address: IpAddr = if is_v4 { Ipv4Addr::from(bits as u32).into() } else { Ipv6Addr::from(bits).into() };
            if let Ok(peer) = PeerAddress::try_from(address) {
                let json = serde_json::to_string(&peer).unwrap();
                proptest::prop_assert_eq!(serde_json::from_str::<PeerAddress>(&json).unwrap(), peer);
                proptest::prop_assert_eq!(peer.get(), address.to_canonical());
            }
        }

        #[test]
        fn nothing_written_by_a_stranger_panics(text in ".*") {
            let _ = range(&text);
            let _ = serde_json::from_value::<PeerAddress>(text.into());
        }
    }
}
