//! The image's settings: TOML files in, checked values out, once.
//!
//! `portcullis.toml` first, then `conf.d/*.toml` in the order of their names; a later value wins.
//! May not live here: anything of the spec.

mod access;
mod limits;
pub mod report;

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use limits::LimitSettings;
use portcullis_protocol::UserName;
use portcullis_protocol::key::MIN_RSA_BITS;
use report::{RawReport, ReportSettings};
use serde::Deserialize;

use crate::policy::access::Policy;
use crate::policy::key_path::KeyPlace;
use crate::policy::links::LinkSettings;
use crate::policy::sshd_drop_in::Wishes;
use crate::system::files;

/// Where the settings are, unless `--config` says otherwise.
pub const DEFAULT_FILE: &str = "/etc/portcullis/portcullis.toml";
/// Where the control socket is, unless the settings or `--socket` say otherwise.
pub const DEFAULT_SOCKET: &str = "/run/portcullis/control.sock";

/// Most bytes of one file of settings: whoever needs more has not written it by hand.
const MAX_FILE: usize = 1 << 20;

/// Checked settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The spec as injected at first boot: a file, or `credential:NAME`.
    pub spec_file: PathBuf,
    /// Durable state; root's, mode 0700.
    pub state_dir: PathBuf,
    /// The local control socket.
    pub socket: PathBuf,
    /// The owner's word on interfaces.
    pub links: LinkSettings,
    /// Whether containers are kept from the provider's metadata services.
    pub metadata_lock: bool,
    /// Whether the table is to be the daemon's own, where the kernel can do that.
    pub exclusive_table: bool,
    /// Whether a sample of denied packets is told in the journal.
    pub log_denied: bool,
    /// Whether users that the spec names are created when they are missing.
    pub create_users: bool,
    /// Smallest accepted RSA modulus, in bits: at least [`MIN_RSA_BITS`].
    pub min_rsa_bits: usize,
    /// Who gets the keys that cloud-init read from the platform; nobody, if there is none.
    pub cloud_init_user: Option<UserName>,
    /// What is written into sshd's configuration, and with that where keys are.
    pub sshd: Wishes,
    /// Whether an sshd that stopped is started again.
    pub restart_sshd: bool,
    /// Whether a key that is taken away takes the SSH sessions with it that it opened.
    pub end_sessions: bool,
    /// Where the HTTPS endpoint listens.
    pub listen: SocketAddr,
    /// How much callers may take of it.
    pub limits: LimitSettings,
    /// How reports are pushed.
    pub report: ReportSettings,
    /// What callers over HTTPS may do.
    pub access: Policy,
    /// Most bytes of the audit log's files together: [`AUDIT_BYTES`].
    pub audit_max_bytes: u64,
}

/// How long the audit log may be: below, a file would hold a few records; above, it could not be checked in
/// memory.
pub const AUDIT_BYTES: RangeInclusive<u64> = (128 << 10)..=(256 << 20);

impl Default for Settings {
    fn default() -> Self {
        Self {
            spec_file: "/etc/portcullis/spec.json".into(),
            state_dir: "/var/lib/portcullis".into(),
            socket: DEFAULT_SOCKET.into(),
            links: LinkSettings::default(),
            metadata_lock: false,
            exclusive_table: true,
            log_denied: true,
            create_users: false,
            min_rsa_bits: 3072,
            cloud_init_user: None,
            sshd: Wishes::default(),
            restart_sshd: false,
            end_sessions: false,
            listen: (Ipv6Addr::UNSPECIFIED, 7443).into(),
            limits: LimitSettings::default(),
            report: ReportSettings::default(),
            access: Policy::default(),
            audit_max_bytes: 16 << 20,
        }
    }
}

/// Settings that can't be used; nothing of them is.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", file.display())]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// Line, field and what is expected.
    pub reason: String,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawFile {
    paths: RawPaths,
    firewall: RawFirewall,
    keys: RawKeys,
    sshd: RawSshd,
    health: RawHealth,
    limits: limits::RawLimits,
    report: RawReport,
    access: access::RawAccess,
    audit: RawAudit,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawAudit {
    max_bytes: Option<u64>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawPaths {
    spec: Option<PathBuf>,
    state: Option<PathBuf>,
    socket: Option<PathBuf>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawFirewall {
    uplinks: Option<BTreeSet<String>>,
    trusted_interfaces: Option<BTreeSet<String>>,
    metadata_lock: Option<bool>,
    exclusive_table: Option<bool>,
    log_denied: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawKeys {
    create_users: Option<bool>,
    min_rsa_bits: Option<usize>,
    cloud_init_user: Option<String>,
    file: Option<KeyPlace>,
    end_sessions: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawSshd {
    restart: Option<bool>,
    harden: Option<bool>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawHealth {
    listen: Option<SocketAddr>,
}

impl Settings {
    /// Reads the file and the `conf.d` beside it.
    ///
    /// # Errors
    /// When a file can't be read or holds something that is not a setting. A missing default file
    /// is no error; one that was named is.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        let mut settings = Self::default();
        let main = file.unwrap_or(Path::new(DEFAULT_FILE));
        let in_file = |file: &Path, reason| ConfigError {
            file: file.into(),
            reason,
        };
        match text(main).map_err(|reason| in_file(main, reason))? {
            Some(text) => settings.apply(&text).map_err(|reason| in_file(main, reason))?,
            None if file.is_none() => {}
            None => return Err(in_file(main, "there is no such file".to_owned())),
        }
        for path in drop_ins(main)? {
            // One that was removed meanwhile says nothing.
            let text = text(&path).map_err(|reason| in_file(&path, reason))?;
            settings
                .apply(&text.unwrap_or_default())
                .map_err(|reason| in_file(&path, reason))?;
        }
        Ok(settings)
    }

    /// Takes over what a file says, or nothing of it.
    ///
    /// # Errors
    /// What is no setting, with its field.
    pub fn apply(&mut self, text: &str) -> Result<(), String> {
        let raw: RawFile = toml::from_str(text).map_err(|e| e.to_string().trim_end().to_owned())?;
        let mut new = self.clone();
        set(&mut new.spec_file, report::named("paths.spec", raw.paths.spec)?);
        set(&mut new.state_dir, absolute("paths.state", raw.paths.state)?);
        set(&mut new.socket, absolute("paths.socket", raw.paths.socket)?);
        set(
            &mut new.links.uplinks,
            interfaces("firewall.uplinks", raw.firewall.uplinks)?,
        );
        set(
            &mut new.links.trusted,
            interfaces("firewall.trusted_interfaces", raw.firewall.trusted_interfaces)?,
        );
        set(&mut new.metadata_lock, raw.firewall.metadata_lock);
        set(&mut new.exclusive_table, raw.firewall.exclusive_table);
        set(&mut new.log_denied, raw.firewall.log_denied);
        new.apply_keys(raw.keys)?;
        raw.access.apply(&mut new.access)?;
        set(&mut new.sshd.harden, raw.sshd.harden);
        set(&mut new.restart_sshd, raw.sshd.restart);
        set(&mut new.listen, raw.health.listen);
        new.limits.apply(raw.limits)?;
        new.report.apply(raw.report)?;
        set(&mut new.audit_max_bytes, raw.audit.max_bytes);
        if !AUDIT_BYTES.contains(&new.audit_max_bytes) {
            let (least, most) = AUDIT_BYTES.into_inner();
            return Err(format!("audit.max_bytes: from {least} to {most}"));
        }
        if new.listen.port() == 0 {
            return Err("health.listen: port 0 can't be found by anybody".to_owned());
        }
        if let Some(name) = new.links.uplinks.intersection(&new.links.trusted).next() {
            return Err(format!(
                "firewall: {name:?} is both in uplinks and in trusted_interfaces"
            ));
        }
        *self = new;
        Ok(())
    }
}

impl Settings {
    fn apply_keys(&mut self, raw: RawKeys) -> Result<(), String> {
        set(&mut self.create_users, raw.create_users);
        set(&mut self.sshd.keys, raw.file);
        set(&mut self.end_sessions, raw.end_sessions);
        if let Some(bits) = raw.min_rsa_bits {
            if !(MIN_RSA_BITS..=16384).contains(&bits) {
                return Err(format!(
                    "keys.min_rsa_bits: {bits} is not from {MIN_RSA_BITS} to 16384"
                ));
            }
            self.min_rsa_bits = bits;
        }
        match raw.cloud_init_user.as_deref() {
            Some("") => self.cloud_init_user = None,
            Some(user) => {
                let user = user.parse().map_err(|e| format!("keys.cloud_init_user: {e}"))?;
                self.cloud_init_user = Some(user);
            }
            None => {}
        }
        Ok(())
    }
}

fn set<T>(target: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *target = value;
    }
}

/// A file's text; none if there is no file. The boot waits for it, so it must be a file and end.
fn text(file: &Path) -> Result<Option<String>, String> {
    let Some(bytes) = files::read(file, MAX_FILE).map_err(|e| e.to_string())? else {
        return Ok(None);
    };
    String::from_utf8(bytes)
        .map(Some)
        .map_err(|error| format!("is no text: {error}"))
}

fn drop_ins(main: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let folder = main.parent().unwrap_or(Path::new("/")).join("conf.d");
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            return Err(ConfigError {
                file: folder,
                reason: error.to_string(),
            });
        }
    };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "toml"))
        .collect();
    files.sort();
    Ok(files)
}

fn absolute(field: &str, path: Option<PathBuf>) -> Result<Option<PathBuf>, String> {
    match path {
        Some(path) if !path.is_absolute() => Err(format!("{field}: {path:?} is not an absolute path")),
        path => Ok(path),
    }
}

/// netdevice(7): 1 to 15 bytes without white space or `/`.
fn interfaces(field: &str, names: Option<BTreeSet<String>>) -> Result<Option<BTreeSet<String>>, String> {
    for name in names.iter().flatten() {
        let well_formed =
            (1..=15).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
        if !well_formed {
            return Err(format!("{field}: {name:?} is not an interface name"));
        }
    }
    Ok(names)
}

/// A time as people write it: `90s`, `5m`, `1h 30m`; none for what is no time or negative.
pub fn duration(text: &str) -> Option<Duration> {
    let duration = text.parse::<jiff::SignedDuration>().ok()?;
    duration.try_into().ok()
}

/// For how long a change is on trial: long enough to log in, and it must end.
///
/// # Errors
/// What is expected instead.
pub fn trial_time(text: &str) -> Result<Duration, String> {
    duration(text)
        .filter(|time| (5..=86_400).contains(&time.as_secs()))
        .ok_or_else(|| "a time from 5 s to 24 h is expected, like \"60s\" or \"5m\"".to_owned())
}

fn interval(text: &str) -> Result<Duration, String> {
    duration(text)
        .filter(|duration| *duration >= Duration::from_secs(1))
        .ok_or_else(|| {
            format!("report.interval: {text:?} is not a time of a second or more, like \"5m\" or \"30s\"")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Settings, String> {
        let mut settings = Settings::default();
        settings.apply(text).map(|()| settings)
    }

    #[test]
    fn the_shipped_file_says_the_defaults() {
        let shipped = include_str!("../packaging/portcullis.toml");
        assert_eq!(read(shipped).unwrap(), Settings::default());
        // Each commented default, uncommented, is accepted and changes nothing.
        let uncommented: String = shipped
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase()) => format!("{rest}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        assert_eq!(read(&uncommented).unwrap(), Settings::default());
    }

    #[test]
    fn what_is_no_file_is_refused() {
        for device in ["/dev/zero", "/dev/null"] {
            assert!(text(Path::new(device)).is_err(), "{device}");
        }
    }

    #[test]
    fn errors_name_the_line_or_the_field() {
        for (text, expected) in [
            ("[firewall]\ncolour = 1", "line 2"),
            ("[firewall]\nuplinks = [\"eth 0\"]", "firewall.uplinks: \"eth 0\""),
            (
                "[paths]\nstate = \"x\"",
                "paths.state: \"x\" is not an absolute path",
            ),
            ("[report]\ninterval = \"soon\"", "report.interval: \"soon\""),
            (
                "[keys]\nmin_rsa_bits = 1024",
                "keys.min_rsa_bits: 1024 is not from 2048",
            ),
            (
                "[keys]\ncloud_init_user = \"a b\"",
                "keys.cloud_init_user: \"a b\"",
            ),
            ("[report]\ninterval = \"-5m\"", "report.interval"),
            (
                "[limits]\nconnections = 7",
                "limits.connections: 7 is not from 8 to",
            ),
            ("[health]\nlisten = \"[::]:0\"", "health.listen"),
            (
                "[firewall]\nuplinks = [\"a\"]\ntrusted_interfaces = [\"a\"]",
                "\"a\" is both",
            ),
            ("[keys]\nfile = \"etc\"", "`home` or `system`"),
            ("[audit]\nmax_bytes = 4096", "audit.max_bytes: from 131072"),
            ("[keys", "line 1"),
            (
                "[paths]\nspec = \"credential:a/b\"",
                "paths.spec: \"a/b\" is not the name",
            ),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn drop_ins_come_later_and_win() {
        let folder = tempfile::tempdir().unwrap();
        let main = folder.path().join("portcullis.toml");
        std::fs::write(
            &main,
            "[report]\ninterval = \"1m\"\n[firewall]\nuplinks = [\"a\"]",
        )
        .unwrap();
        std::fs::create_dir(folder.path().join("conf.d")).unwrap();
        std::fs::write(
            folder.path().join("conf.d/10.toml"),
            "[report]\ninterval = \"2m\"",
        )
        .unwrap();
        std::fs::write(
            folder.path().join("conf.d/20.toml"),
            "[report]\ninterval = \"3m\"",
        )
        .unwrap();
        let settings = Settings::load(Some(&main)).unwrap();
        assert_eq!(settings.report.interval, Duration::from_secs(180));
        assert_eq!(settings.links.uplinks, ["a".to_owned()].into());
        std::fs::write(folder.path().join("conf.d/30.toml"), "nonsense").unwrap();
        let error = Settings::load(Some(&main)).unwrap_err().to_string();
        assert!(error.contains("conf.d/30.toml"), "{error}");
        assert!(Settings::load(Some(&folder.path().join("absent.toml"))).is_err());
    }

    proptest::proptest! {
        #[test]
        fn nothing_written_by_a_stranger_panics(text in ".{0,200}") {
            let _ = read(&text);
        }
    }
}
