//! Who may do what over the HTTPS API: from a request to the permissions that it needs, from what a
//! certificate says to whether it may.
//!
//! May not live here: reading and verifying certificates (`identity::caller`), what was revoked and who was
//! refused (`agent::access`).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use portcullis_protocol::access::{Permission, ROLE_URN, Role, external_id_urn, names};
use portcullis_protocol::control::{HandshakeRefusal, Request};
use portcullis_protocol::{Secret, Spec};

/// The longest life of a certificate that is let in, unless the settings say otherwise.
pub const MAX_LIFETIME: Duration = Duration::from_secs(86_400);

/// What a request needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing: it asks for nothing.
    Nothing,
    /// All of these permissions.
    Permissions(BTreeSet<Permission>),
    /// To come from the instance itself.
    Local,
}

/// What a request needs where `accepted` is the spec that holds. A new request has to be put here before
/// it compiles. A spec that replaces another one needs the permission of each part that it changes: else
/// an owner who keeps keys to himself would have to keep the whole spec.
pub fn need(request: &Request, accepted: Option<&Spec>) -> Need {
    let one = |permission| Need::Permissions([permission].into());
    match request {
        Request::Status => one(Permission::HealthRead),
        Request::Spec => one(Permission::SpecRead),
        Request::Metrics => one(Permission::MetricsRead),
        Request::Apply { spec, .. } => Need::Permissions(parts(spec, accepted)),
        Request::Confirm { .. } => one(Permission::Confirm),
        Request::AddRule { .. } | Request::RevokeRule { .. } => one(Permission::FirewallWrite),
        Request::AddKey { .. } | Request::RevokeKey { .. } => one(Permission::KeysWrite),
        Request::AddPeer { .. } | Request::RevokePeer { .. } => one(Permission::PeersWrite),
        Request::IfGeneration { change, .. } => need(change, accepted),
        Request::HandshakeRefused { .. }
        | Request::CallRefused { .. }
        | Request::Identity { .. }
        | Request::FirstContact { .. }
        | Request::Enrolled { .. } => Need::Nothing,
        Request::Denied { .. }
        | Request::Watch
        | Request::TrustHostKeys
        | Request::Access
        | Request::RevokeAccess { .. }
        | Request::RestoreAccess { .. } => Need::Local,
    }
}

fn parts(new: &Spec, accepted: Option<&Spec>) -> BTreeSet<Permission> {
    let mut needed = BTreeSet::from([Permission::SpecWrite]);
    let keys = accepted.map(|spec| spec.authorized_keys.as_slice());
    if new.authorized_keys != keys.unwrap_or_default() {
        needed.insert(Permission::KeysWrite);
    }
    let rules = accepted.map(|spec| spec.firewall.clone());
    if new.firewall != rules.unwrap_or_default() {
        needed.insert(Permission::FirewallWrite);
    }
    if new.cluster.as_ref() != accepted.and_then(|spec| spec.cluster.as_ref()) {
        needed.insert(Permission::PeersWrite);
    }
    needed
}

/// What a verified certificate says, as far as it matters here. Times are in seconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Its subject, with what is not printable escaped.
    pub subject: String,
    /// Its serial number, hex.
    pub serial: String,
    /// The URIs among its subject alternative names.
    pub uris: Vec<String>,
    /// Its beginning.
    pub not_before: i64,
    /// Its end.
    pub not_after: i64,
}

/// Why a caller is refused. The text is for the caller, and says nothing of other callers.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// It is no certificate of the spec's authority, or none can be read.
    #[error("the client certificate is not one of this instance's control plane")]
    Authority,
    /// Its end is over.
    #[error("the client certificate has expired by this instance's clock")]
    Expired,
    /// Its beginning is to come.
    #[error("the client certificate is not valid yet by this instance's clock")]
    NotYetValid,
    /// It lives too long.
    #[error(
        "the client certificate is valid for {lifetime_s} s in all, and this instance lets in at most \
         {max_s} s: issue one that lives shorter"
    )]
    Lifetime {
        /// Seconds from its beginning to its end.
        lifetime_s: i64,
        /// The most that is let in.
        max_s: u64,
    },
    /// The external id is missing or another one.
    #[error("the client certificate does not name this instance's external id: it is for other instances")]
    ExternalId,
    /// It names no role.
    #[error("the client certificate names no role: it needs the URI {ROLE_URN}NAME")]
    NoRole,
    /// It names more than one.
    #[error("the client certificate names more than one role: it may have one")]
    SeveralRoles,
    /// It names one that is none.
    #[error("the client certificate's role {0}")]
    UnknownRole(String),
    /// The owner closed the door.
    #[error("the owner of this instance revoked the role {0}")]
    Revoked(Role),
    /// What was revoked can't be read, so nobody is let in.
    #[error("this instance lets in nobody at present: its owner has to look at it")]
    Closed,
    /// The role may do other things.
    #[error("the role {role} lacks the permission {} on this instance", names(.missing))]
    Permission {
        /// The role.
        role: Role,
        /// What it lacks.
        missing: Vec<Permission>,
    },
    /// It is for the instance's own root.
    #[error("this can only be asked on the instance itself")]
    Local,
}

impl From<HandshakeRefusal> for Denial {
    fn from(refusal: HandshakeRefusal) -> Self {
        match refusal {
            HandshakeRefusal::Authority => Self::Authority,
            HandshakeRefusal::Expired => Self::Expired,
            HandshakeRefusal::NotYetValid => Self::NotYetValid,
        }
    }
}

impl Denial {
    /// A word for it that does not change, for counters.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Authority => "authority",
            Self::Expired => "expired",
            Self::NotYetValid => "not-yet-valid",
            Self::Lifetime { .. } => "lifetime",
            Self::ExternalId => "external-id",
            Self::NoRole | Self::SeveralRoles | Self::UnknownRole(_) => "role",
            Self::Revoked(_) | Self::Closed => "revoked",
            Self::Permission { .. } => "permission",
            Self::Local => "local-only",
        }
    }
}

/// What the owner lets certificates and roles do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Longest time from a certificate's beginning to its end.
    pub max_lifetime: Duration,
    narrowed: BTreeMap<Role, BTreeSet<Permission>>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            max_lifetime: MAX_LIFETIME,
            narrowed: BTreeMap::new(),
        }
    }
}

impl Policy {
    /// Leaves a role only these permissions; all that it has by itself takes an earlier narrowing back.
    ///
    /// # Errors
    /// Which permission the role does not have by itself: the owner takes away, and gives nothing.
    pub fn narrow(&mut self, role: Role, permissions: BTreeSet<Permission>) -> Result<(), String> {
        let own = role.permissions();
        if let Some(foreign) = permissions.iter().find(|wanted| !own.contains(wanted)) {
            return Err(format!(
                "the role {role} does not have \"{foreign}\" by itself, and settings only take away: it has {}",
                names(own)
            ));
        }
        if permissions.len() == own.len() {
            self.narrowed.remove(&role);
        } else {
            self.narrowed.insert(role, permissions);
        }
        Ok(())
    }

    /// What a role may do.
    pub fn permissions(&self, role: Role) -> BTreeSet<Permission> {
        let own = || role.permissions().iter().copied().collect();
        self.narrowed.get(&role).cloned().unwrap_or_else(own)
    }

    /// Whether the settings took something from it.
    pub fn is_narrowed(&self, role: Role) -> bool {
        self.narrowed.contains_key(&role)
    }

    /// Which role a certificate of the spec's authority has at a time, in seconds since 1970.
    ///
    /// # Errors
    /// Why it has none here.
    pub fn role(
        &self,
        certificate: &Certificate,
        external_id: Option<&Secret>,
        now: i64,
    ) -> Result<Role, Denial> {
        let Certificate {
            not_before,
            not_after,
            ..
        } = *certificate;
        if now > not_after {
            return Err(Denial::Expired);
        }
        if now < not_before {
            return Err(Denial::NotYetValid);
        }
        let (lifetime_s, max_s) = (not_after.saturating_sub(not_before), self.max_lifetime.as_secs());
        if u64::try_from(lifetime_s).is_ok_and(|lifetime| lifetime > max_s) {
            return Err(Denial::Lifetime { lifetime_s, max_s });
        }
        if let Some(id) = external_id
            && !certificate.uris.contains(&external_id_urn(id.expose()))
        {
            return Err(Denial::ExternalId);
        }
        let mut roles = certificate
            .uris
            .iter()
            .filter_map(|uri| uri.strip_prefix(ROLE_URN));
        match (roles.next(), roles.next()) {
            (None, _) => Err(Denial::NoRole),
            (Some(_), Some(_)) => Err(Denial::SeveralRoles),
            (Some(name), None) => name.parse().map_err(Denial::UnknownRole),
        }
    }

    /// Whether a role may do what is needed.
    ///
    /// # Errors
    /// Why not.
    pub fn permit(&self, role: Role, need: &Need) -> Result<(), Denial> {
        let needed = match need {
            Need::Nothing => return Ok(()),
            Need::Local => return Err(Denial::Local),
            Need::Permissions(needed) => needed,
        };
        let missing: Vec<Permission> = needed.difference(&self.permissions(role)).copied().collect();
        match missing.is_empty() {
            true => Ok(()),
            false => Err(Denial::Permission { role, missing }),
        }
    }
}

#[cfg(test)]
mod tests;
