//! sshd's configuration of each user: sshd is asked once for all if nothing in its files tells them apart, for
//! each answer is a process.
//!
//! May not live here: what a file says (`policy::sshd_match`), the question (`sshd`).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use portcullis_protocol::UserName;
use tokio::sync::OnceCell;

use super::files;
use super::sshd::Sshd;
use crate::policy::observation::{Observed, SshdConfig};
use crate::policy::sshd_match::includes;

/// Largest file of sshd's that is read, in bytes.
const MAX_FILE: usize = 1 << 20;

/// How deep includes are followed; sshd itself goes to 16.
const MAX_DEPTH: usize = 4;

/// sshd's folder, and its main file there, of packaged programs.
const FOLDER: &str = "/etc/ssh";
const MAIN: &str = "/etc/ssh/sshd_config";
/// Programs that were not packaged have their files elsewhere.
const LOCAL: &str = "/usr/local";

/// Answers for one look at logins: files may change until the next.
pub struct UserConfigs {
    sshd: Observed<Sshd>,
    version: Option<(u16, u16)>,
    /// The answer for all; none if users are told apart.
    common: Option<OnceCell<SshdConfig>>,
}

impl UserConfigs {
    /// Of the instance's own sshd.
    pub async fn new() -> Self {
        let sshd = Sshd::find();
        let (version, is_packaged) = match &sshd {
            Ok(sshd) => (sshd.version().await, !sshd.program().starts_with(LOCAL)),
            Err(_) => (None, false),
        };
        let common = is_packaged && has_one_answer(Path::new(FOLDER), Path::new(MAIN), 0);
        Self {
            sshd,
            version,
            common: common.then(OnceCell::new),
        }
    }

    /// As [`Sshd::effective_config`].
    ///
    /// # Errors
    /// sshd's word; the next user's question is then asked anew.
    pub async fn of(&self, user: &UserName) -> Observed<SshdConfig> {
        let sshd = self.sshd.as_ref().map_err(Clone::clone)?;
        let ask = || sshd.config_of(Some(user), self.version);
        match &self.common {
            Some(common) => common.get_or_try_init(ask).await.cloned(),
            None => ask().await,
        }
    }

    /// The configuration outside of `Match` blocks.
    ///
    /// # Errors
    /// sshd's word.
    pub async fn outside(&self) -> Observed<SshdConfig> {
        let sshd = self.sshd.as_ref().map_err(Clone::clone)?;
        sshd.config_of(None, self.version).await
    }
}

/// Whether sshd says the same of all users: no file that it reads may tell them apart. What can't be read or
/// understood might.
fn has_one_answer(folder: &Path, file: &Path, depth: usize) -> bool {
    let Ok(Some(content)) = files::read(file, MAX_FILE) else {
        return false;
    };
    let Some(paths) = includes(&content).filter(|_| depth < MAX_DEPTH) else {
        return false;
    };
    paths.iter().all(|path| {
        let included = included(&folder.join(path));
        included.is_some_and(|files| files.iter().all(|file| has_one_answer(folder, file, depth + 1)))
    })
}

/// The files that the argument of an `Include` names: a file, or those of a folder, all of them or by their
/// ending. None if it is anything else, or the folder can't be read.
fn included(path: &Path) -> Option<Vec<PathBuf>> {
    let (folder, name) = (path.parent()?, path.file_name()?.to_str()?);
    if folder.to_str()?.contains('*') {
        return None;
    }
    let Some(ending) = name.strip_prefix('*') else {
        // One that is not there includes nothing (glob(3)).
        let is_there = fs::symlink_metadata(path).is_ok();
        return (!name.contains('*')).then(|| is_there.then(|| path.to_owned()).into_iter().collect());
    };
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Some(Vec::new()),
        entries => entries.ok()?,
    };
    let paths: io::Result<Vec<PathBuf>> = entries.map(|entry| entry.map(|entry| entry.path())).collect();
    let fits = |path: &PathBuf| path.as_os_str().as_encoded_bytes().ends_with(ending.as_bytes());
    (!ending.contains('*')).then_some(paths.ok()?.into_iter().filter(fits).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_answer_holds_for_all_until_a_file_may_tell_users_apart() {
        let etc = tempfile::tempdir().unwrap();
        let etc = etc.path();
        let main = etc.join("sshd_config");
        let write = |name: &str, text: &str| fs::write(etc.join(name), text).unwrap();
        let one = || has_one_answer(etc, &main, 0);
        assert!(!one(), "nobody knows what sshd reads then");
        write(
            "sshd_config",
            "Include sshd_config.d/*.conf\nInclude more\nPort 22\n",
        );
        assert!(one(), "what is not there includes nothing");
        fs::create_dir(etc.join("sshd_config.d")).unwrap();
        write("sshd_config.d/10-a.conf", "PasswordAuthentication no\n");
        write("sshd_config.d/not-read", "Match User al\n");
        assert!(one());

        write("sshd_config.d/20-b.conf", "Match User al\n");
        assert!(!one(), "in an included file");
        write("sshd_config.d/20-b.conf", "");
        write("more", "Match User al\n");
        assert!(!one(), "in a file without a pattern");
        write("more", "Include last\n");
        write("last", "PermitRootLogin no\n");
        assert!(one());
        write("last", "Include last\n");
        assert!(!one(), "a loop, which sshd refuses");
        fs::remove_file(etc.join("last")).unwrap();
        fs::create_dir(etc.join("last")).unwrap();
        assert!(!one(), "what can't be read may say anything");
        fs::remove_dir(etc.join("last")).unwrap();
        assert!(one());
        for unknown in ["x*", "*.d/a", "*a*"] {
            write("last", &format!("Include {unknown}\n"));
            assert!(!one(), "{unknown}");
        }
        write("last", "");
        write("sshd_config", "Include more\nMatch Group x\n");
        assert!(!one(), "in the main file");
    }
}
