//! Who can log in with which key: all files that sshd reads keys from, of all who may log in.
//!
//! May not live here: what is odd about a line (`policy::key_audit`), opening files (`system`).

use std::collections::BTreeSet;
use std::path::PathBuf;

use portcullis_protocol::UserName;
use serde::Serialize;

use super::state::Store;
use crate::config::Settings;
use crate::policy::key_audit::{AuditRules, AuditedLine, audit};
use crate::policy::key_path::all_paths;
use crate::policy::observation::Observed;
use crate::system::accounts::{self, Account};
use crate::system::{as_user, key_files, sshd};

/// A user who may log in, and the files that sshd reads for them.
#[derive(Debug, Serialize)]
pub struct AuditedUser {
    /// The login name.
    pub user: UserName,
    /// The files, in sshd's order; those that are not there are left out.
    pub files: Vec<AuditedFile>,
    /// Why it could not be found out, or why sshd would trust no file of this user.
    pub problem: Option<String>,
    /// Other places that sshd takes keys from: a program, authorities of certificates.
    pub elsewhere: Vec<String>,
}

/// A file of keys.
#[derive(Debug, Serialize)]
pub struct AuditedFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its lines that name keys.
    pub lines: Vec<AuditedLine>,
    /// Why it could not be read.
    pub problem: Option<String>,
}

/// Looks at everybody who has a login shell, in the order of names. Changes nothing.
///
/// # Errors
/// The list of users can't be read, or what was revoked here.
pub async fn run(settings: &Settings, store: &Store) -> Result<Vec<AuditedUser>, String> {
    let rules = AuditRules {
        least_rsa_bits: settings.min_rsa_bits,
        revoked: store.revoked().map_err(|e| e.to_string())?,
    };
    let names: BTreeSet<UserName> = accounts::local_names().map_err(|e| format!("/etc/passwd: {e}"))?;
    let version = sshd::version().await;
    let mut users = Vec::new();
    for name in names.union(&store.users()) {
        match accounts::lookup(name) {
            Ok(account) if account.has_login_shell() => users.push(one(account, version, &rules).await),
            Ok(_) => {}
            Err(error) => users.push(unknown(name.clone(), error.to_string())),
        }
    }
    Ok(users)
}

fn unknown(user: UserName, problem: String) -> AuditedUser {
    AuditedUser {
        user,
        files: Vec::new(),
        problem: Some(problem),
        elsewhere: Vec::new(),
    }
}

async fn one(account: Account, version: Option<(u16, u16)>, rules: &AuditRules) -> AuditedUser {
    let user = account.name.clone();
    let config = match sshd::config_of(Some(&user), version).await {
        Ok(config) => config,
        Err(reason) => return unknown(user, reason),
    };
    let elsewhere = config.other_key_sources.clone();
    let rules = rules.clone();
    let work = move || {
        let trusted = key_files::read_back(&account, &config).map(|_| ());
        let paths = all_paths(
            &config.authorized_keys_files,
            &account.name,
            account.uid,
            &account.home,
        );
        let read = |path: PathBuf| {
            let content: Observed<Option<Vec<u8>>> = key_files::read_as_sshd(&account, &path);
            let (lines, problem) = match content {
                Ok(Some(content)) => (audit(&content, &rules), None),
                Ok(None) => return None,
                Err(reason) => (Vec::new(), Some(reason)),
            };
            Some(AuditedFile { path, lines, problem })
        };
        (paths.into_iter().filter_map(read).collect(), trusted.err())
    };
    match as_user::off_thread(work).await {
        Ok((files, problem)) => AuditedUser {
            user,
            files,
            problem,
            elsewhere,
        },
        Err(error) => unknown(user, error.to_string()),
    }
}
