//! A firewall rule: the Brev Cloud SDK v1 `FirewallRule` plus a protocol, parsed into checked values.
//!
//! May not live here: how a rule is enforced (that is the agent's policy).

use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::SourceRange;

/// A rule's name, unique in its list: 1 to 64 of letters, digits, `.`, `_` and `-`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, JsonSchema)]
#[serde(transparent)]
pub struct RuleId(#[schemars(regex(pattern = r"^[A-Za-z0-9._-]{1,64}$"))] String);

impl RuleId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RuleId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let well_formed = !text.is_empty()
            && text.len() <= 64
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if !well_formed {
            return Err(format!(
                "{text:?} is not an id: use 1 to 64 of letters, digits, '.', '_' and '-'"
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for RuleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for RuleId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

/// What a rule lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP on the rule's ports.
    Tcp,
    /// UDP on the rule's ports.
    Udp,
    /// TCP and UDP on the rule's ports: the Brev Cloud SDK's meaning, and the default.
    Any,
    /// ICMP and ICMPv6 echo requests. The other types that a host needs are always let through.
    Icmp,
    /// Another IP protocol (IANA protocol number), without ports.
    Number(u8),
}

impl Protocol {
    /// Whether rules of this protocol have ports.
    pub fn has_ports(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp | Self::Any)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp => f.write_str("tcp"),
            Self::Udp => f.write_str("udp"),
            Self::Any => f.write_str("any"),
            Self::Icmp => f.write_str("icmp"),
            Self::Number(number) => number.fmt(f),
        }
    }
}

impl FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            "any" | "" => Ok(Self::Any),
            "icmp" => Ok(Self::Icmp),
            other => match other.parse::<u8>() {
                Ok(1 | 58) => Ok(Self::Icmp),
                Ok(6) => Ok(Self::Tcp),
                Ok(17) => Ok(Self::Udp),
                Ok(number) => Ok(Self::Number(number)),
                Err(_) => Err(format!(
                    "{text:?} is not a protocol: use tcp, udp, any, icmp or a number"
                )),
            },
        }
    }
}

impl Serialize for Protocol {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Number(number) => serializer.serialize_u8(*number),
            other => serializer.collect_str(other),
        }
    }
}

impl<'de> Deserialize<'de> for Protocol {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Raw {
            Number(i64),
            Text(String),
        }
        match Raw::deserialize(deserializer) {
            Ok(Raw::Text(text)) => text.parse(),
            Ok(Raw::Number(number)) => number.to_string().parse(),
            Err(_) => Err("a protocol is tcp, udp, any, icmp or a number from 0 to 255".to_owned()),
        }
        .map_err(de::Error::custom)
    }
}

impl JsonSchema for Protocol {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Protocol".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "tcp, udp, any (tcp and udp), icmp (echo requests), or an IP protocol number",
            "default": "any",
            "anyOf": [
                {"enum": ["tcp", "udp", "any", "icmp"]},
                {"type": "integer", "minimum": 0, "maximum": 255}
            ]
        })
    }
}

/// Ports from `from` to `to`, both included; 1 to 65535, never reversed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct PortRange {
    from: u16,
    to: u16,
}

impl PortRange {
    /// A range.
    ///
    /// # Errors
    /// When a bound is 0 or the range is reversed; the message names both values.
    pub fn new(from: u16, to: u16) -> Result<Self, String> {
        if from == 0 {
            return Err("port 0 does not exist: ports are 1 to 65535".to_owned());
        }
        if to < from {
            return Err(format!("the range {from} to {to} is reversed"));
        }
        Ok(Self { from, to })
    }

    /// One port; `None` for port 0.
    pub fn single(port: u16) -> Option<Self> {
        Self::new(port, port).ok()
    }

    /// First port.
    pub fn from(self) -> u16 {
        self.from
    }

    /// Last port.
    pub fn to(self) -> u16 {
        self.to
    }

    /// Whether a port is within.
    pub fn contains(self, port: u16) -> bool {
        (self.from..=self.to).contains(&port)
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.from == self.to {
            self.from.fmt(f)
        } else {
            write!(f, "{}-{}", self.from, self.to)
        }
    }
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |part: &str| {
            part.parse::<u16>()
                .map_err(|_| format!("{part:?} is not a port: ports are 1 to 65535"))
        };
        match text.split_once('-') {
            Some((from, to)) => Self::new(port(from)?, port(to)?),
            None => port(text).and_then(|port| Self::new(port, port)),
        }
    }
}

/// One ingress (or egress) rule: a protocol, its ports, and the sources that may use them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirewallRule {
    /// The rule's name.
    pub id: RuleId,
    /// What it lets through.
    pub protocol: Protocol,
    /// On which ports: always there for tcp, udp and any, never for the others.
    pub ports: Option<PortRange>,
    /// From where. Empty: from any source, IPv4 and IPv6.
    pub sources: Vec<SourceRange>,
}

/// The wire form of [`FirewallRule`], with the Brev Cloud SDK's field names accepted too.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "FirewallRule")]
struct RawRule {
    #[serde(alias = "ID")]
    id: RuleId,
    #[serde(default = "default_protocol", alias = "Protocol")]
    protocol: Protocol,
    /// First port, 1 to 65535; required for tcp, udp and any.
    #[serde(default, alias = "FromPort", skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 65535))]
    from_port: Option<i64>,
    /// Last port; the same as `from_port` when left out.
    #[serde(default, alias = "ToPort", skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 65535))]
    to_port: Option<i64>,
    /// Sources; none means any source, IPv4 and IPv6.
    #[serde(default, alias = "IPRanges", skip_serializing_if = "Vec::is_empty")]
    ip_ranges: Vec<SourceRange>,
}

fn default_protocol() -> Protocol {
    Protocol::Any
}

impl RawRule {
    fn ports(&self) -> Result<Option<PortRange>, String> {
        let id = &self.id;
        let port = |field: &str, value: i64| match u16::try_from(value) {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(format!("{field} of rule {id} is {value}: ports are 1 to 65535")),
        };
        let is_set = |value: Option<i64>| value.is_some_and(|v| v != 0);
        if !self.protocol.has_ports() {
            if is_set(self.from_port) || is_set(self.to_port) {
                return Err(format!(
                    "from_port of rule {id}: protocol {} has no ports",
                    self.protocol
                ));
            }
            return Ok(None);
        }
        let Some(from) = self.from_port else {
            return Err(format!(
                "from_port of rule {id} is missing: protocol {} needs ports",
                self.protocol
            ));
        };
        let from = port("from_port", from)?;
        let to = self.to_port.map_or(Ok(from), |to| port("to_port", to))?;
        PortRange::new(from, to)
            .map(Some)
            .map_err(|reason| format!("to_port of rule {id}: {reason}"))
    }
}

impl<'de> Deserialize<'de> for FirewallRule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = RawRule::deserialize(deserializer)?;
        let ports = raw.ports().map_err(de::Error::custom)?;
        Ok(Self {
            id: raw.id,
            protocol: raw.protocol,
            ports,
            sources: raw.ip_ranges,
        })
    }
}

impl Serialize for FirewallRule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        RawRule {
            id: self.id.clone(),
            protocol: self.protocol,
            from_port: self.ports.map(|ports| i64::from(ports.from())),
            to_port: self.ports.map(|ports| i64::from(ports.to())),
            ip_ranges: self.sources.clone(),
        }
        .serialize(serializer)
    }
}

impl JsonSchema for FirewallRule {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "FirewallRule".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        RawRule::json_schema(generator)
    }
}

impl fmt::Display for FirewallRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.id)?;
        match self.ports {
            Some(ports) => write!(f, "{ports}/{}", self.protocol)?,
            None => self.protocol.fmt(f)?,
        }
        match self.sources.as_slice() {
            [] => f.write_str(" from anywhere"),
            sources => {
                f.write_str(" from ")?;
                for (i, source) in sources.iter().enumerate() {
                    write!(f, "{}{source}", if i > 0 { ", " } else { "" })?;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<FirewallRule, String> {
        serde_json::from_str(json).map_err(|e| e.to_string())
    }

    #[test]
    fn the_sdk_names_are_accepted() {
        let rule = parse(r#"{"ID":"web","FromPort":80,"ToPort":90,"IPRanges":["10.0.0.3/8"]}"#).unwrap();
        assert_eq!(rule.protocol, Protocol::Any);
        assert_eq!(rule.ports, Some(PortRange::new(80, 90).unwrap()));
        assert_eq!(rule.sources, ["10.0.0.3/8".parse().unwrap()]);
    }

    #[test]
    fn errors_name_the_field_and_the_value() {
        for (json, expected) in [
            (r#"{"id":"a","from_port":70000}"#, "from_port of rule a is 70000"),
            (r#"{"id":"a","from_port":0}"#, "from_port of rule a is 0"),
            (
                r#"{"id":"a","from_port":90,"to_port":80}"#,
                "90 to 80 is reversed",
            ),
            (r#"{"id":"a"}"#, "from_port of rule a is missing"),
            (
                r#"{"id":"a","protocol":"icmp","from_port":8}"#,
                "protocol icmp has no ports",
            ),
            (r#"{"id":"a b","from_port":8}"#, "\"a b\" is not an id"),
            (
                r#"{"id":"a","from_port":8,"ip_ranges":["10.0.0.300/8"]}"#,
                "\"10.0.0.300/8\" is not an address range",
            ),
            (
                r#"{"id":"a","from_port":8,"ip_ranges":["::ffff:10.0.0.1/64"]}"#,
                "\"::ffff:10.0.0.1/64\" is an IPv4 address in IPv6 form",
            ),
            (
                r#"{"id":"a","from_port":8,"protocol":"sctp"}"#,
                "\"sctp\" is not a protocol",
            ),
            (r#"{"id":"a","from_port":8,"colour":1}"#, "unknown field `colour`"),
        ] {
            let error = parse(json).unwrap_err();
            assert!(error.contains(expected), "{json}: {error}");
        }
    }

    #[test]
    fn protocol_numbers_take_their_names() {
        assert_eq!(
            parse(r#"{"id":"a","protocol":6,"from_port":1}"#)
                .unwrap()
                .protocol,
            Protocol::Tcp
        );
        assert_eq!(
            parse(r#"{"id":"a","protocol":"47"}"#).unwrap().protocol,
            Protocol::Number(47)
        );
        assert!(parse(r#"{"id":"a","protocol":256}"#).is_err());
    }

    proptest::proptest! {
        #[test]
        fn what_is_written_reads_back(from in 1u16.., span in 0u16..100, v4: u32, v6: u128, len in 0u8..=32) {
            let to = from.saturating_add(span);
            let sources = [
                format!("{}/{len}", std::net::Ipv4Addr::from(v4)),
                format!("{}/{}", std::net::Ipv6Addr::from(v6 | 1 << 127), u32::from(len) * 4),
            ].map(|s| s.parse().unwrap()).to_vec();
            let rule = FirewallRule {
                id: "r".parse().unwrap(), protocol: Protocol::Udp,
                ports: Some(PortRange::new(from, to).unwrap()), sources,
            };
            let json = serde_json::to_string(&rule).unwrap();
            proptest::prop_assert_eq!(parse(&json).unwrap(), rule);
        }

        #[test]
        fn nothing_written_by_a_stranger_panics(text in ".*") {
            let _ = text.parse::<PortRange>();
            let _ = text.parse::<Protocol>();
            let _ = text.parse::<RuleId>();
        }
    }
}
