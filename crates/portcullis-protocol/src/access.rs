//! Who may do what over the HTTPS API: roles, their permissions, how a client certificate names a role and
//! an external id, and what `portcullis access list` shows.
//!
//! May not live here: judging a certificate or a request (the agent does).

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::net::SocketAddr;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// How the URI begins by which a certificate names its role, among its subject alternative names (RFC 5280
/// section 4.2.1.6). The role's name follows.
pub const ROLE_URN: &str = "urn:portcullis:role:";

/// How the URI begins by which a certificate names an external id. The id follows, as
/// [`external_id_urn`] writes it.
pub const EXTERNAL_ID_URN: &str = "urn:portcullis:external-id:";

/// The URI by which a certificate names an external id: bytes other than letters, digits and `-._~` are
/// percent-encoded with upper-case digits (RFC 3986 section 2), so that each id has exactly one form.
pub fn external_id_urn(id: &str) -> String {
    let mut urn = EXTERNAL_ID_URN.to_owned();
    for byte in id.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            urn.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(urn, "%{byte:02X}");
        }
    }
    urn
}

/// Something that a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Permission {
    /// Read the health report.
    #[serde(rename = "health.read")]
    HealthRead,
    /// Read the metrics.
    #[serde(rename = "metrics.read")]
    MetricsRead,
    /// Read the accepted spec, without its secrets.
    #[serde(rename = "spec.read")]
    SpecRead,
    /// Replace the spec. What differs in it needs its own permission besides: `keys.write` for keys,
    /// `firewall.write` for rules, `peers.write` for the cluster.
    #[serde(rename = "spec.write")]
    SpecWrite,
    /// Add and revoke firewall rules.
    #[serde(rename = "firewall.write")]
    FirewallWrite,
    /// Add and revoke peers of the cluster.
    #[serde(rename = "peers.write")]
    PeersWrite,
    /// Add and revoke authorized keys.
    #[serde(rename = "keys.write")]
    KeysWrite,
    /// Confirm a change that is on trial.
    #[serde(rename = "confirm")]
    Confirm,
}

impl Permission {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::HealthRead,
        Self::MetricsRead,
        Self::SpecRead,
        Self::SpecWrite,
        Self::FirewallWrite,
        Self::PeersWrite,
        Self::KeysWrite,
        Self::Confirm,
    ];

    /// Its name in settings, texts and documents.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::HealthRead => "health.read",
            Self::MetricsRead => "metrics.read",
            Self::SpecRead => "spec.read",
            Self::SpecWrite => "spec.write",
            Self::FirewallWrite => "firewall.write",
            Self::PeersWrite => "peers.write",
            Self::KeysWrite => "keys.write",
            Self::Confirm => "confirm",
        }
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Permission {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|known| known.as_str() == text);
        found.ok_or_else(|| format!("{text:?} is no permission: there are {}", names(&Self::ALL)))
    }
}

/// What a caller is to the instance; its certificate names exactly one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Reads: a monitoring system.
    Observer,
    /// Reads, and changes rules and peers: what steers a network.
    Network,
    /// Reads, and changes authorized keys: what gives people their logins.
    Keys,
    /// Does everything: the control plane itself.
    Operator,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Observer, Self::Network, Self::Keys, Self::Operator];

    /// Its name in certificates, settings and commands.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Observer => "observer",
            Self::Network => "network",
            Self::Keys => "keys",
            Self::Operator => "operator",
        }
    }

    /// What it may do by itself; an owner can take from it and not add.
    pub fn permissions(self) -> &'static [Permission] {
        use Permission::{Confirm, FirewallWrite, HealthRead, KeysWrite, MetricsRead, PeersWrite, SpecRead};
        match self {
            Self::Observer => &[HealthRead, MetricsRead, SpecRead],
            // Confirming belongs to changing: some changes are only made on trial.
            Self::Network => &[
                HealthRead,
                MetricsRead,
                SpecRead,
                FirewallWrite,
                PeersWrite,
                Confirm,
            ],
            Self::Keys => &[HealthRead, MetricsRead, SpecRead, KeysWrite, Confirm],
            Self::Operator => &Permission::ALL,
        }
    }

    /// The URI by which a certificate names it.
    pub fn urn(self) -> String {
        format!("{ROLE_URN}{self}")
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|known| known.as_str() == text);
        found.ok_or_else(|| format!("{text:?} is no role: there are {}", names(&Self::ALL)))
    }
}

/// A list for a text.
pub fn names<T: ToString>(list: &[T]) -> String {
    let list: Vec<String> = list.iter().map(ToString::to_string).collect();
    list.join(", ")
}

/// Who may do what on an instance, and who did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessList {
    /// Whether the spec names an authority. Without one nobody is the control plane.
    pub authority: bool,
    /// Whether the spec names an external id, which certificates then have to name too.
    pub external_id: bool,
    /// The longest time, in seconds, between the beginning and the end of a certificate that is let in.
    pub max_lifetime_s: u64,
    /// Why all are refused whatever the roles say, if they are: what was revoked can't be read.
    pub closed: Option<String>,
    /// Each role.
    pub roles: Vec<RoleAccess>,
    /// How many requests and handshakes were refused since the daemon began, by reason.
    pub refused: BTreeMap<String, u64>,
}

/// What a role may do, and what its holders did last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleAccess {
    /// The role.
    pub role: Role,
    /// What it may do, as far as the owner left it.
    pub permissions: Vec<Permission>,
    /// Whether the owner's settings took something from it.
    pub narrowed: bool,
    /// Since when it may do nothing, and by whom; none if it may.
    pub revoked: Option<Revoked>,
    /// The last request that was let in since the daemon began.
    pub last_use: Option<LastUse>,
}

/// That a role may do nothing any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revoked {
    /// Since when.
    pub since: Timestamp,
    /// Who said so: the user who logged in, else root.
    pub by: String,
}

/// A request that was let in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastUse {
    /// When.
    pub time: Timestamp,
    /// Whose certificate it was: its subject, with what is not printable escaped.
    pub subject: String,
    /// From where.
    pub address: SocketAddr,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_in_text_and_json() {
        for permission in Permission::ALL {
            assert_eq!(serde_json::to_value(permission).unwrap(), permission.as_str());
            assert_eq!(permission.as_str().parse(), Ok(permission));
        }
        for role in Role::ALL {
            assert_eq!(serde_json::to_value(role).unwrap(), role.as_str());
            assert_eq!(role.as_str().parse(), Ok(role));
        }
        let error = "root".parse::<Role>().unwrap_err();
        assert!(
            error.contains("\"root\"") && error.contains("observer, network, keys, operator"),
            "{error}"
        );
    }

    #[test]
    fn an_external_id_has_one_form() {
        assert_eq!(external_id_urn("a-1._~Z"), "urn:portcullis:external-id:a-1._~Z");
        assert_eq!(
            external_id_urn("a b/%é"),
            "urn:portcullis:external-id:a%20b%2F%25%C3%A9"
        );
    }

    #[test]
    fn only_the_operator_replaces_the_spec() {
        for role in Role::ALL {
            let may = role.permissions().contains(&Permission::SpecWrite);
            assert_eq!(may, role == Role::Operator);
        }
    }
}
