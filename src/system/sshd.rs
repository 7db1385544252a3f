//! What sshd would do: its effective configuration in its own words, and its host keys on disk.
//!
//! May not live here: talking SSH (`ssh_probe`), units (`systemd`), what is good or bad about it.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use portcullis_protocol::UserName;
use portcullis_protocol::report::HostKey;

use super::command::{ask, said};
use crate::policy::observation::{Observed, SshdConfig};

/// Where distributions put it.
const PROGRAMS: [&str; 4] = [
    "/usr/sbin/sshd",
    "/usr/local/sbin/sshd",
    "/usr/lib/ssh/sshd",
    "/usr/bin/sshd",
];

/// sshd(8), FILES: empty and root's.
const PRIVILEGE_SEPARATION: &str = "/run/sshd";

/// Where host keys are if the configuration could not be asked.
const HOST_KEY_FOLDER: &str = "/etc/ssh";

/// An sshd that can be asked.
#[derive(Clone, Debug)]
pub struct Sshd {
    program: PathBuf,
    config: Option<PathBuf>,
}

impl Sshd {
    /// The instance's own, with its own configuration file.
    pub fn find() -> Observed<Self> {
        PROGRAMS
            .iter()
            .map(PathBuf::from)
            .find(|program| program.is_file())
            .map(|program| Self {
                program,
                config: None,
            })
            .ok_or_else(|| format!("no sshd in {}: install openssh-server", PROGRAMS.join(", ")))
    }

    /// The same program with another configuration file (`sshd -f`).
    pub fn with_config(self, config: PathBuf) -> Self {
        Self {
            config: Some(config),
            ..self
        }
    }

    /// The program's path.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// The configuration that holds for a login of `user` over loopback, `Match` blocks applied
    /// (sshd(8), `-T` and `-C`); without a user, the one outside of `Match` blocks.
    ///
    /// It is what the login probe meets: `Match Address`, `Host`, `LocalAddress` and `LocalPort` are asked
    /// for a connection from 127.0.0.1, so a block for other addresses does not show here.
    pub async fn effective_config(&self, user: Option<&UserName>) -> Observed<SshdConfig> {
        self.config_of(user, self.version().await).await
    }

    /// As [`Self::effective_config`], for callers that ask for many users and know the version.
    pub async fn config_of(
        &self,
        user: Option<&UserName>,
        version: Option<(u16, u16)>,
    ) -> Observed<SshdConfig> {
        let mut arguments = vec!["-T".to_owned()];
        if let Some(user) = user {
            arguments.extend([
                "-C".to_owned(),
                format!("user={user},host=localhost,addr=127.0.0.1"),
            ]);
        }
        if let Some(config) = &self.config {
            arguments.extend(["-f".to_owned(), config.display().to_string()]);
        }
        let tested = ask(&self.program, &arguments).await?;
        if !tested.status.success() {
            let said = said(&tested);
            let fix = match said.contains("Missing privilege separation directory") {
                true => " (sshd's service makes it: start ssh.service once, or log in once)",
                false => "",
            };
            return Err(format!("sshd -T: {said}{fix}"));
        }
        let mut config = parse(&String::from_utf8_lossy(&tested.stdout))?;
        config.version = version;
        Ok(config)
    }

    /// OpenSSH's version, major and minor; none if the program does not say one.
    pub async fn version(&self) -> Option<(u16, u16)> {
        let output = ask(&self.program, ["-V"]).await.ok()?;
        parse_version(&said(&output))
    }

    /// Whether sshd would start with its configuration as it is now (sshd(8), `-t`).
    ///
    /// # Errors
    /// What it says, if not.
    pub async fn test(&self) -> Observed<()> {
        let mut arguments = vec!["-t".to_owned()];
        if let Some(config) = &self.config {
            arguments.extend(["-f".to_owned(), config.display().to_string()]);
        }
        let tested = ask(&self.program, &arguments).await?;
        if tested.status.success() {
            Ok(())
        } else {
            Err(format!("sshd -t: {}", said(&tested)))
        }
    }
}

/// [`Sshd::effective_config`] of the instance's own sshd.
pub async fn effective_config(user: Option<&UserName>) -> Observed<SshdConfig> {
    Sshd::find()?.effective_config(user).await
}

/// [`Sshd::config_of`] of the instance's own sshd.
pub async fn config_of(user: Option<&UserName>, version: Option<(u16, u16)>) -> Observed<SshdConfig> {
    Sshd::find()?.config_of(user, version).await
}

/// [`Sshd::version`] of the instance's own sshd.
pub async fn version() -> Option<(u16, u16)> {
    Sshd::find().ok()?.version().await
}

/// Makes the empty folder that sshd insists on, as its own service does: `sshd -T` answers before the
/// service has run, and so keys are in place before anybody can try to log in. Best effort: without
/// it, `sshd -T` says what is missing.
pub fn prepare() {
    let _ = fs::DirBuilder::new().mode(0o755).create(PRIVILEGE_SEPARATION);
}

/// The public host keys on disk: the configured ones, or if there is no configuration, those at the
/// usual place. What can't be read or is no public key is left out.
pub fn host_keys(config: Option<&SshdConfig>) -> Vec<HostKey> {
    let files = match config {
        Some(config) => config
            .host_key_files
            .iter()
            .map(|file| public_file(file))
            .collect(),
        None => usual_host_keys(),
    };
    let mut keys: Vec<HostKey> = files
        .iter()
        .filter_map(|file| HostKey::from_line(&fs::read_to_string(file).ok()?).ok())
        .collect();
    keys.sort();
    keys.dedup();
    keys
}

/// Files of private host keys that are there, and have no public file beside them. sshd needs none; who only
/// reads what others may read does.
pub fn unpublished_host_keys(config: Option<&SshdConfig>) -> Vec<PathBuf> {
    let files = config.map_or(&[][..], |config| &config.host_key_files);
    let is_there = |file: &Path| fs::symlink_metadata(file).is_ok();
    let lacks = |file: &&PathBuf| is_there(file) && !is_there(&public_file(file));
    files.iter().filter(lacks).cloned().collect()
}

fn public_file(private: &Path) -> PathBuf {
    let mut file = private.as_os_str().to_owned();
    file.push(".pub");
    file.into()
}

fn usual_host_keys() -> Vec<PathBuf> {
    let is_key = |file: &PathBuf| {
        let name = file.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with("ssh_host_") && name.ends_with("_key.pub"))
    };
    let folder = fs::read_dir(HOST_KEY_FOLDER).into_iter().flatten().flatten();
    folder.map(|entry| entry.path()).filter(is_key).collect()
}

/// Reads `sshd -T`: one option a line, its name in lower case, options with several values several times.
///
/// # Errors
/// An option that checks rely on is not told.
pub fn parse(text: &str) -> Observed<SshdConfig> {
    let values = |name: &str| -> Vec<&str> {
        text.lines()
            .filter_map(|line| line.split_once(' '))
            .filter(|(key, _)| *key == name)
            .map(|(_, value)| value.trim())
            .collect()
    };
    let yes = |name: &str| values(name).first().map(|value| *value == "yes");
    let needed = |name: &str| yes(name).ok_or_else(|| format!("sshd -T does not tell {name}"));
    Ok(SshdConfig {
        version: None,
        ports: values("port")
            .iter()
            .filter_map(|port| port.parse().ok())
            .collect(),
        listen: values("listenaddress")
            .iter()
            .filter_map(|value| value.split_whitespace().next()?.parse().ok())
            .collect(),
        pubkey: needed("pubkeyauthentication")?,
        password: needed("passwordauthentication")?,
        // Its name before OpenSSH 8.7.
        keyboard_interactive: yes("kbdinteractiveauthentication")
            .map_or_else(|| needed("challengeresponseauthentication"), Ok)?,
        root_login: values("permitrootlogin").concat(),
        authorized_keys_files: values("authorizedkeysfile")
            .iter()
            .flat_map(|value| value.split_whitespace())
            .filter(|file| *file != "none")
            .map(str::to_owned)
            .collect(),
        other_key_sources: ["AuthorizedKeysCommand", "TrustedUserCAKeys"]
            .iter()
            .flat_map(|name| {
                let values = values(&name.to_ascii_lowercase());
                let set = values.into_iter().filter(|value| *value != "none");
                set.map(move |value| format!("{name} {value}"))
            })
            .collect(),
        host_key_files: values("hostkey").iter().map(PathBuf::from).collect(),
        host_certificates: values("hostcertificate")
            .iter()
            .filter(|file| **file != "none")
            .map(PathBuf::from)
            .collect(),
    })
}

/// Major and minor of `OpenSSH_9.2p1 …`: what `sshd -V` prints, or complains with where it is too old.
pub fn parse_version(said: &str) -> Option<(u16, u16)> {
    let (_, rest) = said.split_once("OpenSSH_")?;
    let (major, rest) = rest.split_once('.')?;
    let minor: String = rest.chars().take_while(char::is_ascii_digit).collect();
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TESTED: &str = "port 22\nport 2222\nlistenaddress [::]:22\nlistenaddress 0.0.0.0:22\n\
        listenaddress 10.0.0.1:22 rdomain x\nusepam yes\npubkeyauthentication yes\n\
        passwordauthentication no\nkbdinteractiveauthentication no\n\
        authorizedkeysfile .ssh/authorized_keys %h/k\n\
        hostkey /etc/ssh/ssh_host_rsa_key\nhostkey /etc/ssh/ssh_host_ed25519_key\n";

    #[test]
    fn what_sshd_tells_is_read() {
        let config = parse(TESTED).unwrap();
        assert_eq!(config.ports, [22, 2222]);
        assert_eq!(config.listen.len(), 3);
        assert_eq!(config.local_address(), Some("127.0.0.1:22".parse().unwrap()));
        assert_eq!(config.local_addresses().len(), 1, "one for each port");
        assert!(config.pubkey && !config.password && !config.keyboard_interactive);
        assert_eq!(config.authorized_keys_files, [".ssh/authorized_keys", "%h/k"]);
        assert_eq!(config.host_key_files.len(), 2);
        assert!(config.other_key_sources.is_empty());
        let more = format!("{TESTED}trustedusercakeys none\nauthorizedkeyscommand /usr/bin/sss %u\n");
        let expected = ["AuthorizedKeysCommand /usr/bin/sss %u"];
        assert_eq!(parse(&more).unwrap().other_key_sources, expected);

        let none = TESTED.replace(".ssh/authorized_keys %h/k", "none");
        assert!(parse(&none).unwrap().authorized_keys_files.is_empty());
        let old = TESTED
            .replace("kbdinteractive", "challengeresponse")
            .replace("ation no", "ation yes");
        assert!(parse(&old).unwrap().keyboard_interactive);
    }

    #[test]
    fn what_sshd_does_not_tell_is_no_answer() {
        for name in [
            "pubkeyauthentication",
            "passwordauthentication",
            "kbdinteractiveauthentication",
        ] {
            assert!(parse(&TESTED.replace(name, "x")).is_err(), "{name}");
        }
    }

    #[test]
    fn a_private_host_key_without_a_public_file_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let files = ["both", "private", "neither"].map(|name| folder.path().join(name));
        for name in ["both", "both.pub", "private"] {
            fs::write(folder.path().join(name), "x").unwrap();
        }
        let config = SshdConfig {
            host_key_files: files.to_vec(),
            ..SshdConfig::default()
        };
        assert_eq!(unpublished_host_keys(Some(&config)), [files[1].clone()]);
    }

    #[test]
    fn versions() {
        for (said, expected) in [
            ("OpenSSH_9.2, OpenSSL 3.0.19 27 Jan 2026", Some((9, 2))),
            (
                "unknown option -- V\\nOpenSSH_8.9p1 Ubuntu-3, OpenSSL 3.0.2",
                Some((8, 9)),
            ),
            ("OpenSSH_10.0p2 Debian-7, OpenSSL 3.5.1", Some((10, 0))),
            ("dropbear", None),
        ] {
            assert_eq!(parse_version(said), expected, "{said}");
        }
    }
}
