//! The instance's users, as the name service knows them (passwd(5), nsswitch.conf(5)).
//!
//! May not live here: users' files, which users should exist.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::unistd::{self, User};
use portcullis_protocol::UserName;
use thiserror::Error;

/// A user of this instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// The login name.
    pub name: UserName,
    /// The user's number.
    pub uid: u32,
    /// The primary group's number.
    pub gid: u32,
    /// All groups, the primary one included.
    pub groups: Vec<u32>,
    /// The home folder; nothing says that it exists.
    pub home: PathBuf,
    /// The login shell; empty means `/bin/sh`.
    pub shell: PathBuf,
}

impl Account {
    /// Whether the shell is a real one: a key for an account that only says goodbye opens no session,
    /// though sshd accepts it.
    pub fn has_login_shell(&self) -> bool {
        !matches!(
            self.shell.file_name().and_then(|name| name.to_str()),
            Some("nologin" | "false")
        )
    }
}

/// Why there is no account.
#[derive(Debug, Error)]
pub enum AccountError {
    /// The name service knows no such user.
    #[error("there is no user {0}: create it in the image, or set create_users = true")]
    Unknown(UserName),
    /// The name service did not answer.
    #[error("can't look up the user {user}: {reason} (see /etc/nsswitch.conf)")]
    Lookup {
        /// Who was looked up.
        user: UserName,
        /// What the name service said.
        reason: std::io::Error,
    },
    /// `useradd` did not make it.
    #[error("can't create the user {user}: useradd: {reason}")]
    Create {
        /// Who was to be created.
        user: UserName,
        /// What `useradd` said.
        reason: String,
    },
}

/// Looks a user up. Blocks for as long as the name service takes (it may ask the network).
pub fn lookup(user: &UserName) -> Result<Account, AccountError> {
    let failed = |errno: nix::Error| AccountError::Lookup {
        user: user.clone(),
        reason: errno.into(),
    };
    let found = User::from_name(user.as_str())
        .map_err(failed)?
        .ok_or_else(|| AccountError::Unknown(user.clone()))?;
    let name = CString::new(user.as_str()).map_err(|_| AccountError::Unknown(user.clone()))?;
    let groups = unistd::getgrouplist(&name, found.gid).map_err(failed)?;
    Ok(Account {
        name: user.clone(),
        uid: found.uid.as_raw(),
        gid: found.gid.as_raw(),
        groups: groups.into_iter().map(unistd::Gid::as_raw).collect(),
        home: found.dir,
        shell: found.shell,
    })
}

/// The login names of passwd(5), the host's own users; names that no login name can be are left out.
///
/// # Errors
/// The file can't be read.
pub fn local_names() -> std::io::Result<BTreeSet<UserName>> {
    let text = std::fs::read_to_string("/etc/passwd")?;
    let names = text
        .lines()
        .filter_map(|line| line.split(':').next()?.parse().ok());
    Ok(names.collect())
}

/// Why an account of shadow(5) lets nobody in although sshd would take a key: it has expired. With PAM, sshd
/// finds that out after the key (pam_unix(8)). None for accounts that are good or of another source.
pub fn barred(user: &UserName) -> Option<String> {
    // Not readable, or not there: then nothing is known against it.
    let text = std::fs::read_to_string("/etc/shadow").ok()?;
    let end = expiry(&text, user)?;
    let today = jiff::Timestamp::now().as_second().div_euclid(86_400);
    (today >= end).then(|| {
        let end = jiff::Timestamp::from_second(end.saturating_mul(86_400));
        let end = end.map_or_else(|_| "long ago".to_owned(), |end| end.strftime("%F").to_string());
        format!("the account expired on {end}")
    })
}

/// The eighth field: days since 1970 from which on the account is of no use; none if it never ends.
fn expiry(shadow: &str, user: &UserName) -> Option<i64> {
    let mut lines = shadow.lines().map(|line| line.split(':'));
    let mut fields = lines.find(|fields| fields.clone().next() == Some(user.as_str()))?;
    fields.nth(7)?.parse().ok()
}

/// Creates a user with a home, a group of the same name, bash, and a password that nothing matches.
/// Blocks until `useradd` (useradd(8)) has ended.
pub fn create(user: &UserName) -> Result<Account, AccountError> {
    let failed = |reason: String| AccountError::Create {
        user: user.clone(),
        reason,
    };
    let output = Command::new("/usr/sbin/useradd")
        .args(["--create-home", "--user-group", "--shell", "/bin/bash"])
        // Not `!`, useradd's default: without PAM, sshd takes that for a locked account and refuses keys.
        .args(["--password", "*", "--", user.as_str()])
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(format!("{error} (install the package passwd or shadow-utils)")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(format!(
            "{} ({})",
            said.trim().escape_debug(),
            output.status
        )));
    }
    lookup(user)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_known_and_a_stranger_is_not() {
        let root = lookup(&"root".parse().unwrap()).unwrap();
        assert_eq!((root.uid, root.gid, root.home), (0, 0, PathBuf::from("/root")));
        assert!(root.groups.contains(&0));
        assert!(local_names().unwrap().contains(&root.name));

        let error = lookup(&"no-such-user-here".parse().unwrap()).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("there is no user no-such-user-here"),
            "{error}"
        );
    }

    #[test]
    fn when_an_account_ends() {
        let shadow = "root:*:1:0:99999:7:::\nal:!:1:0:99999:7::20000:\nbo:x\n";
        for (user, expected) in [("root", None), ("al", Some(20000)), ("bo", None), ("cy", None)] {
            assert_eq!(expiry(shadow, &user.parse().unwrap()), expected, "{user}");
        }
    }

    #[test]
    fn shells_that_let_nobody_in() {
        let mut account = lookup(&"root".parse().unwrap()).unwrap();
        for (shell, expected) in [
            ("/bin/bash", true),
            ("", true),
            ("/usr/sbin/nologin", false),
            ("/bin/false", false),
        ] {
            account.shell = shell.into();
            assert_eq!(account.has_login_shell(), expected, "{shell}");
        }
    }
}
