//! The settings' section `[access]`: how long certificates may live, and what roles are left.
//!
//! May not live here: what they mean (`policy::access`).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use portcullis_protocol::access::{Permission, Role};
use serde::Deserialize;

use super::duration;
use crate::policy::access::Policy;

/// The shortest maximum: certificates begin some minutes before they are made.
const SHORTEST: Duration = Duration::from_secs(600);
/// The longest: a certificate that lives for months is a password.
const LONGEST: Duration = Duration::from_secs(30 * 86_400);

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawAccess {
    max_lifetime: Option<String>,
    roles: BTreeMap<String, Vec<String>>,
}

impl RawAccess {
    /// Takes over what a file says.
    pub(super) fn apply(self, policy: &mut Policy) -> Result<(), String> {
        if let Some(text) = self.max_lifetime {
            let time = duration(&text).filter(|time| (SHORTEST..=LONGEST).contains(time));
            policy.max_lifetime = time.ok_or_else(|| {
                format!("access.max_lifetime: {text:?} is not a time from 10 min to 720 h, like \"24h\"")
            })?;
        }
        for (name, permissions) in self.roles {
            let wrong = |reason: String| format!("access.roles.{name}: {reason}");
            let role: Role = name.parse().map_err(wrong)?;
            let permissions = permissions.iter().map(|text| text.parse());
            let permissions: BTreeSet<Permission> = permissions.collect::<Result<_, _>>().map_err(wrong)?;
            policy.narrow(role, permissions).map_err(wrong)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;

    fn read(text: &str) -> Result<Policy, String> {
        let mut settings = Settings::default();
        settings.apply(text).map(|()| settings.access)
    }

    #[test]
    fn an_owner_takes_away_and_a_later_file_may_take_that_back() {
        let policy = read("[access]\nmax_lifetime = \"1h\"\n[access.roles]\nnetwork = [\"health.read\"]");
        let policy = policy.unwrap();
        assert_eq!(policy.max_lifetime, Duration::from_secs(3600));
        assert_eq!(policy.permissions(Role::Network), [Permission::HealthRead].into());
        assert!(policy.is_narrowed(Role::Network) && !policy.is_narrowed(Role::Operator));
        let mut settings = Settings {
            access: policy,
            ..Settings::default()
        };
        let names: Vec<String> = Role::Network
            .permissions()
            .iter()
            .map(|p| format!("\"{p}\""))
            .collect();
        let text = format!("[access.roles]\nnetwork = [{}]\nkeys = []", names.join(","));
        settings.apply(&text).unwrap();
        assert!(!settings.access.is_narrowed(Role::Network));
        assert!(settings.access.permissions(Role::Keys).is_empty());
    }

    #[test]
    fn errors_name_the_field() {
        for (text, expected) in [
            (
                "[access]\nmax_lifetime = \"soon\"",
                "access.max_lifetime: \"soon\"",
            ),
            ("[access]\nmax_lifetime = \"1m\"", "access.max_lifetime"),
            ("[access]\nmax_lifetime = \"721h\"", "access.max_lifetime"),
            (
                "[access.roles]\nroot = []",
                "access.roles.root: \"root\" is no role",
            ),
            (
                "[access.roles]\nnetwork = [\"shell\"]",
                "access.roles.network: \"shell\" is no permission",
            ),
            (
                "[access.roles]\nnetwork = [\"keys.write\"]",
                "access.roles.network: the role network does not have \"keys.write\"",
            ),
            ("[access]\nroot = 1", "line 2"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
