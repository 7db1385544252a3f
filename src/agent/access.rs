//! The door: each request is judged here, on the side that acts, before anything is done for it. It keeps what
//! the owner revoked, on disk as well, and counts who was refused.
//!
//! May not live here: what a role may do (`policy::access`), what a certificate proves (`identity::caller`).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use portcullis_protocol::access::{AccessList, LastUse, Revoked, Role, RoleAccess};
use portcullis_protocol::control::{Answer, HandshakeRefusal, Refusal, Request};
use portcullis_protocol::{Secret, Spec};
use serde::{Deserialize, Serialize};
use tracing::{error, info, warn};

use super::Agent;
use super::control::{Caller, Remote, refused};
use super::state::{StateError, Store};
use crate::identity::caller::Authority;
use crate::log::id;
use crate::policy::access::{Certificate, Denial, Need, Policy, need};
use crate::system::callers;
use crate::system::secret_files::{EXTERNAL_ID, credential};

const FILE: &str = "access.json";
const MAX_BYTES: usize = 1 << 16;
/// Refusals that are told in the journal at once; all are counted.
const BURST: u32 = 20;
/// Time for one more to be told.
const REFILL: Duration = Duration::from_secs(2);
/// How to come back from a file that can't be read.
const WAY_OUT: &str = "`portcullis access restore` lets all roles in again, `portcullis access revoke` none";

/// What the owner revoked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Revocations {
    /// All roles, those of a later version too.
    all: Option<Revoked>,
    /// Single ones.
    #[serde(default)]
    roles: BTreeMap<Role, Revoked>,
}

impl Revocations {
    fn of(&self, role: Role) -> Option<&Revoked> {
        self.roles.get(&role).or(self.all.as_ref())
    }

    fn revoke(&mut self, role: Option<Role>, revoked: Revoked) {
        match role {
            Some(role) if self.of(role).is_none() => {
                self.roles.insert(role, revoked);
            }
            Some(_) => {}
            None => {
                self.all.get_or_insert(revoked);
            }
        }
    }

    fn restore(&mut self, role: Option<Role>) {
        let Some(role) = role else {
            *self = Self::default();
            return;
        };
        if let Some(all) = self.all.take() {
            for other in Role::ALL {
                self.roles.entry(other).or_insert_with(|| all.clone());
            }
        }
        self.roles.remove(&role);
    }
}

impl Store {
    /// What was revoked; a file that can't be read is an error, never nothing.
    fn revocations(&self) -> Result<Revocations, String> {
        let read = self.load(FILE, MAX_BYTES).map_err(|e| e.to_string())?;
        Ok(read.unwrap_or_default())
    }

    fn save_revocations(&self, revocations: &Revocations) -> Result<(), StateError> {
        self.save(FILE, revocations)
    }
}

/// A caller who was let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// Its role.
    pub role: Role,
    /// What its certificate says.
    pub certificate: Certificate,
}

/// The state of the door.
pub struct Access {
    policy: Policy,
    /// What is revoked, or why that can't be read: then nobody is let in.
    revoked: Result<Revocations, String>,
    /// The credential's external id, which counts where the spec has none, or why it can't be read: then nobody is let in.
    external_id: Result<Option<Secret>, String>,
    /// The authority that was used last; most requests are of the same spec.
    authority: Option<Authority>,
    last_use: BTreeMap<Role, LastUse>,
    refused: BTreeMap<&'static str, u64>,
    told: Limit,
}

impl Access {
    /// With what an earlier process kept.
    pub fn new(policy: Policy, store: &Store) -> Self {
        let revoked = store.revocations();
        if let Err(reason) = &revoked {
            error!(
                MESSAGE_ID = id::DEGRADED,
                REASON = reason,
                "what was revoked can't be read, so nobody is let in over HTTPS: {reason}; {WAY_OUT}"
            );
        }
        let external_id = credential(EXTERNAL_ID);
        if let Err(reason) = &external_id {
            error!(
                MESSAGE_ID = id::CREDENTIAL,
                REASON = reason,
                "the external id of the credential can't be read, so nobody is let in over HTTPS unless the spec has \
                 one: {reason}"
            );
        }
        Self {
            policy,
            revoked,
            external_id,
            authority: None,
            last_use: BTreeMap::new(),
            refused: BTreeMap::new(),
            told: Limit::default(),
        }
    }

    /// How many requests and handshakes were refused since the process began, by reason.
    pub fn refused(&self) -> &BTreeMap<&'static str, u64> {
        &self.refused
    }

    /// Judges a request at a time, in seconds since 1970. `spec` is the one that holds.
    fn judge(
        &mut self,
        request: &Request,
        remote: &Remote,
        spec: Option<&Spec>,
        now: i64,
    ) -> (Option<Certificate>, Result<Role, Denial>) {
        let certificate = match self.verified(remote, spec, now) {
            Ok(certificate) => certificate,
            Err(denial) => {
                let shown = remote.chain.first();
                let shown = shown.and_then(|der| crate::identity::caller::read(der).ok());
                return (shown, Err(denial));
            }
        };
        let role = match self.external_id(spec) {
            Ok(external_id) => self.policy.role(&certificate, external_id, now),
            Err(_) => Err(Denial::Closed),
        };
        let role = role.and_then(|role| {
            match &self.revoked {
                Err(_) => return Err(Denial::Closed),
                Ok(revoked) if revoked.of(role).is_some() => return Err(Denial::Revoked(role)),
                Ok(_) => {}
            }
            self.policy.permit(role, &need(request, spec)).map(|()| role)
        });
        (Some(certificate), role)
    }

    /// What certificates have to name: the spec's external id, or the credential's.
    fn external_id<'a>(&'a self, spec: Option<&'a Spec>) -> Result<Option<&'a Secret>, &'a String> {
        let control_plane = spec.and_then(|spec| spec.control_plane.as_ref());
        match control_plane.and_then(|control| control.external_id.as_ref()) {
            Some(id) => Ok(Some(id)),
            None => self.external_id.as_ref().map(Option::as_ref),
        }
    }

    fn verified(&mut self, remote: &Remote, spec: Option<&Spec>, now: i64) -> Result<Certificate, Denial> {
        let pem = spec.and_then(Spec::client_ca).ok_or(Denial::Authority)?;
        let authority = match self.authority.take().filter(|known| known.pem == pem) {
            Some(known) => known,
            // The endpoint has told the journal what is wrong with it.
            None => Authority::new(pem).map_err(|_| Denial::Authority)?,
        };
        self.authority.insert(authority).verify(&remote.chain, now)
    }

    /// Counts a refusal; tells it, unless too many were told of late.
    fn refuse(&mut self, remote: &Remote, certificate: Option<&Certificate>, denial: &Denial) {
        *self.refused.entry(denial.reason()).or_default() += 1;
        let Some(left_out) = self.told.take(Instant::now()) else {
            return;
        };
        let (subject, serial) = certificate
            .map(|shown| (shown.subject.as_str(), shown.serial.as_str()))
            .unwrap_or_default();
        let role = match denial {
            Denial::Revoked(role) | Denial::Permission { role, .. } => role.as_str(),
            _ => "",
        };
        let permission = match denial {
            Denial::Permission { missing, .. } => portcullis_protocol::access::names(missing),
            _ => String::new(),
        };
        warn!(
            MESSAGE_ID = id::ACCESS_REFUSED,
            REASON = denial.reason(),
            SUBJECT = subject,
            SERIAL = serial,
            ROLE = role,
            ADDRESS = %remote.address,
            PERMISSION = permission,
            NOT_TOLD = left_out,
            "a caller was refused ({}): {denial}",
            denial.reason()
        );
    }

    fn list(&self, spec: Option<&Spec>) -> AccessList {
        let external_id = self.external_id(spec);
        let revoked = self.revoked.as_ref().err();
        let roles = Role::ALL.into_iter().map(|role| RoleAccess {
            role,
            permissions: self.policy.permissions(role).into_iter().collect(),
            narrowed: self.policy.is_narrowed(role),
            revoked: self
                .revoked
                .as_ref()
                .ok()
                .and_then(|revoked| revoked.of(role).cloned()),
            last_use: self.last_use.get(&role).cloned(),
        });
        AccessList {
            authority: spec.and_then(Spec::client_ca).is_some(),
            external_id: !matches!(external_id, Ok(None)),
            max_lifetime_s: self.policy.max_lifetime.as_secs(),
            closed: revoked
                .map(|reason| format!("{reason}; {WAY_OUT}"))
                .or_else(|| external_id.err().cloned()),
            roles: roles.collect(),
            refused: self.refused.iter().map(|(r, n)| ((*r).to_owned(), *n)).collect(),
        }
    }
}

impl Agent {
    /// Whether a caller may have what it asks for; who it is, if it is a remote one.
    ///
    /// # Errors
    /// Why not, for the caller; the journal has been told.
    pub(super) fn admit(&mut self, request: &Request, caller: &Caller) -> Result<Option<Admitted>, Denial> {
        let remote = match caller {
            Caller::Local(_) => return Ok(None),
            Caller::Remote(_) if need(request, None) == Need::Nothing => return Ok(None),
            Caller::Remote(remote) => remote,
        };
        let now = Timestamp::now();
        let spec = self.spec.clone();
        let access = &mut self.access;
        let (certificate, judged) =
            access.judge(request, remote, spec.as_deref(), self.identity.clock().now());
        match (judged, certificate) {
            (Ok(role), Some(certificate)) => {
                let last_use = LastUse {
                    time: now,
                    subject: certificate.subject.clone(),
                    address: remote.address,
                };
                access.last_use.insert(role, last_use);
                Ok(Some(Admitted { role, certificate }))
            }
            (judged, certificate) => {
                let denial = judged.err().unwrap_or(Denial::Authority);
                access.refuse(remote, certificate.as_ref(), &denial);
                Err(denial)
            }
        }
    }

    /// Counts a handshake that the endpoint refused.
    pub(super) fn handshake_refused(&mut self, reason: HandshakeRefusal, caller: &Caller) -> Answer {
        if let Caller::Remote(remote) = caller {
            self.access.refuse(remote, None, &reason.into());
        }
        refused(Refusal::NotPermitted, "the handshake was refused")
    }

    /// Who may do what.
    pub(super) fn access(&self, changed: bool) -> Answer {
        Answer::Access {
            changed,
            access: Box::new(self.access.list(self.spec.as_deref())),
        }
    }

    /// Writes what was revoked, where that is known.
    pub(super) fn keep_revocations(&self) -> Result<(), StateError> {
        match &self.access.revoked {
            Ok(revoked) if *revoked != Revocations::default() => self.store.save_revocations(revoked),
            _ => Ok(()),
        }
    }

    /// Refuses a role, or all, from the next request on. What can't be kept on disk holds all the same, as
    /// long as the daemon runs: a door that is to be shut does not stay open for want of space.
    pub(super) fn revoke_access(&mut self, role: Option<Role>, caller: &Caller) -> Answer {
        let before = self.access.revoked.clone();
        let mut after = match (&before, role) {
            (Ok(revoked), _) => revoked.clone(),
            (Err(_), None) => Revocations::default(),
            (Err(reason), Some(_)) => return closed(reason),
        };
        let (since, by) = (Timestamp::now(), who(caller));
        after.revoke(role, Revoked { since, by });
        // Again, in case it could not be written the last time.
        let saved = self.store.save_revocations(&after);
        let changed = before.as_ref() != Ok(&after);
        self.access.revoked = Ok(after);
        if changed {
            log_change(role, &who(caller), "revoked");
        }
        match saved {
            Ok(()) => self.access(changed),
            Err(error) => {
                let (kind, reason) = error.refused();
                let held = "it holds now, and only until the daemon ends, because it can't be kept";
                refused(kind, format!("{held}: {reason}"))
            }
        }
    }

    /// Lets a role, or all, in again: kept on disk first.
    pub(super) fn restore_access(&mut self, role: Option<Role>, caller: &Caller) -> Answer {
        let mut after = match (&self.access.revoked, role) {
            (Ok(revoked), _) => revoked.clone(),
            (Err(_), None) => Revocations::default(),
            (Err(reason), Some(_)) => return closed(reason),
        };
        after.restore(role);
        if self.access.revoked.as_ref() == Ok(&after) {
            return self.access(false);
        }
        if let Err(error) = self.store.save_revocations(&after) {
            let (kind, reason) = error.refused();
            return refused(kind, reason);
        }
        self.access.revoked = Ok(after);
        log_change(role, &who(caller), "restored");
        self.access(true)
    }
}

fn closed(reason: &str) -> Answer {
    refused(
        Refusal::Failed,
        format!("nobody is let in at present: {reason}; {WAY_OUT}"),
    )
}

fn who(caller: &Caller) -> String {
    let login = match caller {
        Caller::Local(Some(pid)) => callers::login_user(*pid),
        _ => None,
    };
    login.unwrap_or_else(|| "root".to_owned())
}

fn log_change(role: Option<Role>, by: &str, what: &str) {
    let role = role.map_or("all", Role::as_str);
    info!(
        MESSAGE_ID = id::ACCESS_CHANGED,
        ROLE = role,
        BY = by,
        "access over HTTPS was {what}: {role}"
    );
}

/// How often something is told.
#[derive(Debug, Default)]
struct Limit {
    used: u32,
    refilled: Option<Instant>,
    left_out: u64,
}

impl Limit {
    /// Whether it is told; then with how many were not since the last one.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let last = *self.refilled.get_or_insert(now);
        let steps = now.duration_since(last).as_millis() / REFILL.as_millis();
        if steps > 0 {
            self.used = self.used.saturating_sub(steps.try_into().unwrap_or(u32::MAX));
            self.refilled = Some(now);
        }
        if self.used >= BURST {
            self.left_out += 1;
            return None;
        }
        self.used += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn revoked(by: &str) -> Revoked {
        Revoked {
            since: "2026-11-22T00:00:00Z".parse().unwrap(),
            by: by.to_owned(),
        }
    }

    #[test]
    fn all_can_be_revoked_and_one_restored() {
        let mut state = Revocations::default();
        state.revoke(Some(Role::Keys), revoked("a"));
        state.revoke(None, revoked("b"));
        state.revoke(Some(Role::Network), revoked("c"));
        // The first word stands: since when and by whom.
        let by = |state: &Revocations, role| state.of(role).map(|revoked| revoked.by.clone());
        assert_eq!(by(&state, Role::Keys).as_deref(), Some("a"));
        assert_eq!(by(&state, Role::Network).as_deref(), Some("b"));
        state.restore(Some(Role::Network));
        assert_eq!(by(&state, Role::Network), None);
        for other in [Role::Observer, Role::Keys, Role::Operator] {
            assert!(state.of(other).is_some(), "{other}");
        }
        state.restore(None);
        assert_eq!(state, Revocations::default());
    }

    #[test]
    fn what_was_revoked_is_kept_and_a_damaged_file_lets_nobody_in() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        assert_eq!(store.revocations().unwrap(), Revocations::default());
        let mut state = Revocations::default();
        state.revoke(Some(Role::Keys), revoked("a"));
        store.save_revocations(&state).unwrap();
        assert_eq!(store.revocations().unwrap(), state);
        for damage in [
            "",
            "{",
            r#"{"all":null,"roles":{"root":{}}}"#,
            r#"{"everybody":1}"#,
        ] {
            std::fs::write(folder.path().join(FILE), damage).unwrap();
            let access = Access::new(Policy::default(), &store);
            let reason = access.list(None).closed.unwrap();
            assert!(reason.contains("access.json: damaged"), "{reason}");
            assert!(reason.contains("portcullis access restore"), "{reason}");
        }
    }

    #[test]
    fn a_flood_of_refusals_is_told_in_part() {
        let (mut limit, start) = (Limit::default(), Instant::now());
        let told = (0..100).filter(|_| limit.take(start).is_some()).count();
        assert_eq!(told, BURST as usize);
        assert_eq!(limit.take(start + REFILL), Some(80));
        assert_eq!(limit.take(start + REFILL), None);
    }
}
