//! `portcullis access`: who may do what over the HTTPS API, and the owner's way to stop that.

use std::time::Duration;

use clap::{Args, Subcommand};
use portcullis_protocol::access::{AccessList, Permission, Role, RoleAccess, names};
use portcullis_protocol::control::{Answer, Request};
use serde_json::json;

use super::status::{ask, unexpected};
use super::{Failure, Format, Global, plain_table, print, print_json, require_root, runtime};

#[derive(Debug, Subcommand)]
pub enum AccessCommand {
    /// Show each role: what it may do, whether it was revoked, and who used it last.
    #[command(
        after_help = "Example:\n  portcullis access list --format json | jq '.roles[] | select(.revoked)'"
    )]
    List,
    /// Refuse all that a role asks, from the next request on; over connections that are open, too.
    #[command(
        long_about = "Refuse all that a role asks, from the next request on; over connections that are open, \
            too. It outlasts restarts. Readiness (/livez, /readyz) and /v1/identity need no role and stay; the \
            firewall decides who reaches those.",
        after_help = "Examples:\n  portcullis access revoke network\n  portcullis access revoke"
    )]
    Revoke(RoleArgument),
    /// Let a role in again.
    #[command(after_help = "Examples:\n  portcullis access restore network\n  portcullis access restore")]
    Restore(RoleArgument),
}

#[derive(Args, Debug)]
pub struct RoleArgument {
    /// observer, network, keys or operator; all of them, if left out.
    role: Option<Role>,
}

pub fn run(global: &Global, command: &AccessCommand) -> Result<(), Failure> {
    match command {
        AccessCommand::List => {
            let (_, access) = asked(global, &Request::Access)?;
            match global.format {
                Format::Json => print_json(&access),
                Format::Table => print(&text(&access)),
            }
        }
        AccessCommand::Revoke(RoleArgument { role }) => {
            let request = Request::RevokeAccess { role: *role };
            change(global, *role, &request, "revoked")
        }
        AccessCommand::Restore(RoleArgument { role }) => {
            let request = Request::RestoreAccess { role: *role };
            change(global, *role, &request, "restored")
        }
    }
}

fn asked(global: &Global, request: &Request) -> Result<(bool, AccessList), Failure> {
    require_root("asking who may do what")?;
    let socket = global.settings()?.socket;
    match runtime()?.block_on(ask(&socket, request))? {
        Answer::Access { changed, access } => Ok((changed, *access)),
        other => Err(unexpected(&other)),
    }
}

fn change(global: &Global, role: Option<Role>, request: &Request, done: &str) -> Result<(), Failure> {
    let (changed, access) = asked(global, request)?;
    if global.format == Format::Json {
        return print_json(&json!({"changed": changed, "access": access}));
    }
    let what = role.map_or_else(
        || "All roles are".to_owned(),
        |role| format!("The role {role} is"),
    );
    let already = if changed {
        ""
    } else {
        "; nothing had to be changed"
    };
    print(&format!("{what} {done}{already}."))
}

fn text(access: &AccessList) -> String {
    let mut table = plain_table(["ROLE", "MAY", "STATE", "LAST USE"]);
    for role in &access.roles {
        table.add_row(row(role));
    }
    let mut lines = vec![table.trim_fmt(), String::new()];
    if let Some(reason) = &access.closed {
        lines.push(format!("NOBODY is let in: {reason}"));
    }
    lines.push(match access.authority {
        true => "Callers need a client certificate of the spec's control_plane.client_ca.".to_owned(),
        false => "The spec names no control_plane.client_ca: nobody is the control plane.".to_owned(),
    });
    lines.push(format!(
        "It has one of these roles, {} and may be valid for at most {}.",
        match access.external_id {
            true => "names the spec's external id,",
            false => "needs no external id, since the spec has none,",
        },
        time(Duration::from_secs(access.max_lifetime_s))
    ));
    let refused: Vec<String> = access
        .refused
        .iter()
        .map(|(reason, count)| format!("{reason} {count}"))
        .collect();
    lines.push(match refused.is_empty() {
        true => "Nothing was refused since the daemon began.".to_owned(),
        false => format!("Refused since the daemon began: {}.", refused.join(", ")),
    });
    lines.join("\n")
}

fn row(role: &RoleAccess) -> [String; 4] {
    let may = match role.permissions.as_slice() {
        [] => "nothing".to_owned(),
        all if all.len() == Permission::ALL.len() => "everything".to_owned(),
        some => names(some),
    };
    let narrowed = if role.narrowed {
        " (narrowed by the settings)"
    } else {
        ""
    };
    let state = match &role.revoked {
        Some(revoked) => format!(
            "REVOKED since {:.0} by {}",
            revoked.since,
            revoked.by.escape_debug()
        ),
        None => "may".to_owned(),
    };
    let last = match &role.last_use {
        Some(last) => format!(
            "{:.0} {} from {}",
            last.time,
            last.subject.escape_debug(),
            last.address
        ),
        None => "-".to_owned(),
    };
    [role.role.to_string(), format!("{may}{narrowed}"), state, last]
}

/// In the largest unit that says it whole.
fn time(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        _ if seconds.is_multiple_of(3600) => format!("{} h", seconds / 3600),
        _ if seconds.is_multiple_of(60) => format!("{} min", seconds / 60),
        _ => format!("{seconds} s"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use portcullis_protocol::access::{LastUse, Revoked};

    use super::*;

    #[test]
    fn a_row_says_what_is_left_since_when_not_and_who_came_last() {
        let role = RoleAccess {
            role: Role::Network,
            permissions: vec![Permission::HealthRead],
            narrowed: true,
            revoked: Some(Revoked {
                since: "2026-11-22T10:00:00Z".parse().unwrap(),
                by: "al\nice".into(),
            }),
            last_use: Some(LastUse {
                time: "2026-11-22T09:00:00Z".parse().unwrap(),
                subject: "CN=net".into(),
                address: "192.0.2.1:4000".parse().unwrap(),
            }),
        };
        let access = AccessList {
            authority: true,
            external_id: true,
            max_lifetime_s: 86_400,
            closed: None,
            roles: vec![role],
            refused: BTreeMap::from([("expired".to_owned(), 2)]),
        };
        let text = text(&access);
        for words in [
            "network",
            "health.read (narrowed by the settings)",
            "REVOKED since 2026-11-22T10:00:00Z by al\\nice",
            "2026-11-22T09:00:00Z CN=net from 192.0.2.1:4000",
            "at most 24 h",
            "expired 2",
        ] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }
}
