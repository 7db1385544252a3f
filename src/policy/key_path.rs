//! Which file of a user's home sshd reads keys from (sshd_config(5), `AuthorizedKeysFile`, TOKENS).
//!
//! May not live here: the file system. Whether the path is a link is asked when it is opened.

use std::path::{Component, Path, PathBuf};

use portcullis_protocol::UserName;
use serde::Deserialize;
use thiserror::Error;

/// Where a user's keys are put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyPlace {
    /// In the file of the user's home that sshd reads.
    #[default]
    Home,
    /// In a file of root's: [`system_entry`].
    System,
}

/// The folder of root's files, one for each user.
pub const SYSTEM_FOLDER: &str = "/etc/portcullis/authorized_keys.d";

/// As `AuthorizedKeysFile` names a user's file in it.
pub fn system_entry() -> String {
    format!("{SYSTEM_FOLDER}/%u")
}

/// Why a user has no file of their own for keys.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum KeyPathError {
    /// All users share it: a key in it would open every account.
    #[error(
        "AuthorizedKeysFile {0:?} is one file for all users, so {1}'s key in it would open every account: \
         add .ssh/authorized_keys to AuthorizedKeysFile in /etc/ssh/sshd_config.d"
    )]
    Shared(String, UserName),
    /// None of the entries is in the home.
    #[error(
        "sshd reads no keys from {user}'s home {home:?} (AuthorizedKeysFile: {files:?}): \
         add .ssh/authorized_keys to AuthorizedKeysFile in /etc/ssh/sshd_config.d"
    )]
    NotInHome {
        /// Whose keys.
        user: UserName,
        /// That user's home.
        home: PathBuf,
        /// The entries, unexpanded.
        files: Vec<String>,
    },
    /// sshd does not read root's file.
    #[error(
        "sshd does not read {SYSTEM_FOLDER}/{user} (AuthorizedKeysFile: {files:?}): is a Match block's \
         AuthorizedKeysFile the one for {user}? Add {SYSTEM_FOLDER}/%u to it; else see sshd.password"
    )]
    NotInSystem {
        /// Whose keys.
        user: UserName,
        /// The entries, unexpanded.
        files: Vec<String>,
    },
}

/// The user's file in [`SYSTEM_FOLDER`].
pub fn system_path(user: &UserName) -> PathBuf {
    // A login name has no `/`, and is neither `.` nor `..`.
    Path::new(SYSTEM_FOLDER).join(user.as_str())
}

/// [`system_path`], if the user's sshd reads it.
///
/// # Errors
/// None of the entries leads there.
pub fn read_system_path(
    files: &[String],
    user: &UserName,
    uid: u32,
    home: &Path,
) -> Result<PathBuf, KeyPathError> {
    let path = system_path(user);
    let read = files
        .iter()
        .any(|file| expand(file, user, uid, home).as_deref() == Some(&path));
    if read {
        Ok(path)
    } else {
        Err(KeyPathError::NotInSystem {
            user: user.clone(),
            files: files.to_vec(),
        })
    }
}

/// The first of the entries that lies within the home, as a path below the home: only names, no `..`.
///
/// An absolute entry that does not tell users apart (`%h`, `%u`, `%U`) is never taken, even if it lies
/// within this user's home.
pub fn key_path(files: &[String], user: &UserName, uid: u32, home: &Path) -> Result<PathBuf, KeyPathError> {
    let shared =
        |file: &String| file.starts_with('/') && !["%h", "%u", "%U"].iter().any(|token| file.contains(token));
    let own = files
        .iter()
        .filter(|file| !shared(file))
        .find_map(|file| below_home(&expand(file, user, uid, home)?, home));
    match (own, files.iter().find(|file| shared(file))) {
        (Some(path), _) => Ok(path),
        (None, Some(file)) => Err(KeyPathError::Shared(file.clone(), user.clone())),
        (None, None) => Err(KeyPathError::NotInHome {
            user: user.clone(),
            home: home.to_owned(),
            files: files.to_vec(),
        }),
    }
}

/// All files that the entries name for this user, wherever they are, in sshd's order.
pub fn all_paths(files: &[String], user: &UserName, uid: u32, home: &Path) -> Vec<PathBuf> {
    let expanded = files.iter().filter_map(|file| expand(file, user, uid, home));
    // A path that is not absolute begins in the home.
    expanded.map(|path| home.join(path)).collect()
}

/// The entry with its tokens replaced; none if it has one that is not for this option.
fn expand(file: &str, user: &UserName, uid: u32, home: &Path) -> Option<PathBuf> {
    let mut path = String::new();
    let mut rest = file.chars();
    while let Some(c) = rest.next() {
        match c {
            '%' => match rest.next()? {
                '%' => path.push('%'),
                'h' => path.push_str(home.to_str()?),
                'u' => path.push_str(user.as_str()),
                'U' => path.push_str(&uid.to_string()),
                _ => return None,
            },
            c => path.push(c),
        }
    }
    Some(path.into())
}

fn below_home(path: &Path, home: &Path) -> Option<PathBuf> {
    let below = if path.is_absolute() {
        path.strip_prefix(home).ok()?
    } else {
        path
    };
    let names: Option<PathBuf> = below
        .components()
        .filter(|part| *part != Component::CurDir)
        .map(|part| matches!(part, Component::Normal(_)).then_some(part))
        .collect();
    names.filter(|names| !names.as_os_str().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(files: &[&str]) -> Result<String, KeyPathError> {
        let files: Vec<String> = files.iter().map(|file| (*file).to_owned()).collect();
        key_path(&files, &"al".parse().unwrap(), 1000, Path::new("/home/al"))
            .map(|path| path.to_str().unwrap().to_owned())
    }

    #[test]
    fn the_first_entry_within_the_home() {
        for (files, expected) in [
            (
                &[".ssh/authorized_keys", ".ssh/authorized_keys2"][..],
                ".ssh/authorized_keys",
            ),
            (&["%h/.ssh/authorized_keys"], ".ssh/authorized_keys"),
            (&["/home/%u/.keys"], ".keys"),
            (&["./.ssh//keys.%U"], ".ssh/keys.1000"),
            (&["a%%h"], "a%h"),
            (&["/etc/ssh/keys/%u", ".ssh/k"], ".ssh/k"),
            (&["/etc/ssh/keys", ".ssh/k"], ".ssh/k"),
            (&["/home/al/.ssh/k", "%h/k"], "k"),
        ] {
            assert_eq!(path(files).unwrap(), expected, "{files:?}");
        }
    }

    #[test]
    fn whoever_audits_looks_at_all_of_them() {
        let files = ["/etc/keys/%u", ".ssh/k", "/etc/shared", "%x"].map(str::to_owned);
        let paths = all_paths(&files, &"al".parse().unwrap(), 1000, Path::new("/home/al"));
        let expected = ["/etc/keys/al", "/home/al/.ssh/k", "/etc/shared"].map(PathBuf::from);
        assert_eq!(paths, expected);
    }

    #[test]
    fn roots_file_counts_only_where_sshd_reads_it() {
        let ask = |files: &[&str]| {
            let files: Vec<String> = files.iter().map(|file| (*file).to_owned()).collect();
            read_system_path(&files, &"al".parse().unwrap(), 1000, Path::new("/home/al"))
        };
        let file = Path::new("/etc/portcullis/authorized_keys.d/al");
        for files in [
            &[".ssh/authorized_keys", &system_entry()][..],
            &["/etc/portcullis//authorized_keys.d/%u"],
        ] {
            assert_eq!(ask(files).unwrap(), file);
        }
        for files in [
            &[".ssh/authorized_keys"][..],
            &["/etc/portcullis/authorized_keys.d/bo"],
            &[],
        ] {
            assert!(ask(files).unwrap_err().to_string().contains("Match"));
        }
        // And it is never taken for one of the home's.
        assert!(path(&[&system_entry()]).is_err());
    }

    #[test]
    fn a_file_that_users_share_is_refused() {
        for files in [
            &["/etc/ssh/authorized_keys"][..],
            &["/home/al/.ssh/k"],
            &["/etc/%%/k", "%h/../k"],
        ] {
            let error = path(files).unwrap_err();
            assert!(matches!(error, KeyPathError::Shared(..)), "{error}");
        }
    }

    #[test]
    fn what_leaves_the_home_is_refused() {
        for files in [
            &["%h/../bo/.ssh/k"][..],
            &["../k"],
            &["%h"],
            &["."],
            &["/etc/keys/%u"],
            &["%x/k"],
            &["k%"],
            &[],
            &["/home/al2/%u"],
        ] {
            let error = path(files).unwrap_err();
            assert!(
                matches!(error, KeyPathError::NotInHome { .. }),
                "{files:?} {error}"
            );
        }
    }
}
