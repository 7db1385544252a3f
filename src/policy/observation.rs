//! What was seen on the instance, as plain values: `system` fills them, `readiness` judges them.
//!
//! An observation that could not be made is an `Err` with the reason for the operator: never a
//! default that looks like an answer.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;
use portcullis_protocol::UserName;
use portcullis_protocol::report::HostKey;

use super::conflicts::Comparison;
use super::exposure::Exposure;
use super::host_keys::KnownHostKeys;
use super::key_questions::Acceptance;
use super::key_sources::{Grant, Unfit};
use super::ruleset::Ruleset;
use super::storage::Storage;

/// Something that was looked at, or why it could not be.
pub type Observed<T> = Result<T, String>;

/// What systemd says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Systemd {
    /// `SystemState` of `org.freedesktop.systemd1.Manager`, for example `running`.
    pub manager_state: Observed<String>,
    /// The word that `systemctl is-system-running` printed.
    pub systemctl: Observed<String>,
}

/// A unit's state (`org.freedesktop.systemd1.Unit`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Its name, for example `ssh.socket`.
    pub name: String,
    /// `ActiveState`, for example `active`.
    pub active_state: String,
    /// `StateChangeTimestampMonotonic` of a service, in microseconds: a restart or a reload ends in the
    /// same state. 0 for one that is inactive, and for a socket, whose state each connection may change.
    pub changed_at: u64,
}

/// A unit of sshd, as far as starting it needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SshdUnit {
    /// Its name, for example `ssh.socket`.
    pub name: String,
    /// `ActiveState`, for example `active`.
    pub active_state: String,
    /// Whether it is started at boot.
    pub enabled: bool,
    /// Whether systemd has a job for it.
    pub busy: bool,
}

/// What the agent did for sshd since the daemon's start, where the settings ask for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SshdCare {
    /// How often a stopped sshd was started.
    pub restarts: u32,
    /// What came of the last time, in systemd's words, or why nothing is started.
    pub last_restart: Option<Observed<String>>,
    /// Whether a drop-in of ours is wished for.
    pub drop_in: bool,
    /// Why sshd does not have what the drop-in should say.
    pub drop_in_problem: Option<String>,
}

/// sshd's effective configuration (`sshd -T`), as far as checks need it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SshdConfig {
    /// OpenSSH's version, major and minor; none if the program did not say one.
    pub version: Option<(u16, u16)>,
    /// `port`, all of them.
    pub ports: Vec<u16>,
    /// `listenaddress`, all of them, each with its port.
    pub listen: Vec<SocketAddr>,
    /// `pubkeyauthentication`.
    pub pubkey: bool,
    /// `passwordauthentication`.
    pub password: bool,
    /// `kbdinteractiveauthentication`.
    pub keyboard_interactive: bool,
    /// `permitrootlogin`.
    pub root_login: String,
    /// `authorizedkeysfile`, unexpanded, in order.
    pub authorized_keys_files: Vec<String>,
    /// Where sshd looks for keys besides these files: `authorizedkeyscommand`, `trustedusercakeys`, each
    /// as `sshd -T` says it.
    pub other_key_sources: Vec<String>,
    /// `hostkey`, the files of the private host keys.
    pub host_key_files: Vec<PathBuf>,
    /// `hostcertificate`, the files of certificates for them.
    pub host_certificates: Vec<PathBuf>,
}

impl SshdConfig {
    /// Where this host itself reaches sshd: over loopback if it listens there; none if it listens nowhere.
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.local_addresses().into_iter().next()
    }

    /// As [`Self::local_address`], for each port, in the configuration's order.
    pub fn local_addresses(&self) -> Vec<SocketAddr> {
        let local = |address: &SocketAddr| match address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => (Ipv4Addr::LOCALHOST, address.port()).into(),
            IpAddr::V6(ip) if ip.is_unspecified() => (Ipv6Addr::LOCALHOST, address.port()).into(),
            _ => *address,
        };
        let mut addresses: Vec<SocketAddr> = self.listen.iter().map(local).collect();
        addresses.sort_by_key(|address| (!address.ip().is_loopback(), address.is_ipv6()));
        let place = |port: u16| self.ports.iter().position(|p| *p == port);
        addresses.sort_by_key(|address| place(address.port()).unwrap_or(usize::MAX));
        addresses.dedup_by_key(|address| address.port());
        addresses
    }
}

/// What a server offers (RFC 4253 section 7.1), in its order, for both directions together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Algorithms {
    /// Key exchange, with the markers that stand among them.
    pub kex: Vec<String>,
    /// Signatures by the host key.
    pub host_keys: Vec<String>,
    /// Encryption.
    pub ciphers: Vec<String>,
    /// Message authentication; not used where the cipher does it.
    pub macs: Vec<String>,
}

/// What a real SSH handshake showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handshake {
    /// The port that answered.
    pub port: u16,
    /// The server's identification string, for example `SSH-2.0-OpenSSH_9.2p1`.
    pub server_id: String,
    /// The host key that the server proved to have.
    pub host_key: HostKey,
    /// Authentication methods that it offers, for example `publickey`; empty if it did not say.
    pub methods: Vec<String>,
    /// What it offers.
    pub algorithms: Observed<Algorithms>,
}

/// What a user may log in with besides a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interactive {
    /// `passwordauthentication`.
    pub password: bool,
    /// `kbdinteractiveauthentication`.
    pub keyboard: bool,
}

impl Interactive {
    /// What a user's effective configuration says of it.
    pub fn of(config: &SshdConfig) -> Self {
        Self {
            password: config.password,
            keyboard: config.keyboard_interactive,
        }
    }
}

/// What was seen of sshd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sshd {
    /// The service and socket units of sshd that are loaded; empty if none is.
    pub units: Observed<Vec<Unit>>,
    /// The effective configuration.
    pub config: Observed<SshdConfig>,
    /// For users with keys, `Match` blocks applied. Who is no user of the system, or whose configuration
    /// could not be asked for, is missing.
    pub interactive: BTreeMap<UserName, Interactive>,
    /// A handshake with the first configured port, over loopback.
    pub handshake: Observed<Handshake>,
    /// The local addresses of the other configured ports that did not complete a handshake, and why.
    pub unanswered: Vec<(SocketAddr, String)>,
    /// What was done for it.
    pub care: SshdCare,
    /// All public host keys on disk.
    pub host_keys: Vec<HostKey>,
    /// Files of private host keys that have no file of the public one beside them.
    pub unpublished_host_keys: Vec<PathBuf>,
}

/// What the reason begins with where sshd answers nobody of this host's address for a while: OpenSSH 9.8 and
/// newer do so after connections that came to nothing, as a probe does (sshd_config(5), `PerSourcePenalties`).
pub const PENALISED: &str = "sshd refuses connections from this address for now";

impl Sshd {
    /// Why nothing can be told of sshd now, if that is for too many probes and for nothing else.
    pub fn penalised(&self) -> Option<&str> {
        let silent = match &self.handshake {
            Err(reason) => vec![reason],
            Ok(_) => self.unanswered.iter().map(|(_, reason)| reason).collect(),
        };
        let all = silent.iter().all(|reason| reason.starts_with(PENALISED));
        silent.first().filter(|_| all).map(|reason| reason.as_str())
    }
}

/// What was seen of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyState {
    /// The key, whose login it opens, and who named it.
    pub grant: Grant,
    /// The file that it was read back from, or why it is not installed.
    pub installed: Observed<PathBuf>,
    /// Whether sshd would accept it.
    pub accepted: Acceptance,
}

/// What was seen of the gate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gate {
    /// What the kernel should hold.
    pub planned: Arc<Ruleset>,
    /// What it holds; none if the table is missing.
    pub held: Observed<Option<Arc<Ruleset>>>,
    /// Whether the kernel lets only the daemon change it.
    pub owned: bool,
    /// Whether the last application succeeded.
    pub applied: Observed<()>,
    /// How often since the start somebody else's change had to be undone.
    pub repaired: u64,
    /// Who made the last such change, as far as the kernel told.
    pub culprit: Option<String>,
    /// Hosts with sessions that are older than the gate.
    pub kept: usize,
}

/// Before the first look.
impl Default for Gate {
    fn default() -> Self {
        Self {
            planned: Arc::default(),
            held: Err("not looked at yet".to_owned()),
            owned: false,
            applied: Err("not looked at yet".to_owned()),
            repaired: 0,
            culprit: None,
            kept: 0,
        }
    }
}

/// What a connection to our own endpoint negotiated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// Protocol version, for example `TLSv1_3`.
    pub version: String,
    /// Cipher suite, by its standard name.
    pub cipher_suite: String,
    /// Key exchange group.
    pub key_exchange: String,
}

/// All that checks rest on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observations {
    /// The gate.
    pub gate: Arc<Gate>,
    /// Until when the spec has to be confirmed, if it is on trial.
    pub trial_until: Option<Timestamp>,
    /// How often the state on disk had to be written anew because it was gone or another; or why the disk does not
    /// hold what was accepted.
    pub durable: Observed<u64>,
    /// systemd.
    pub systemd: Systemd,
    /// sshd.
    pub sshd: Sshd,
    /// The host keys that are known for an instance; none before they were first seen.
    pub host_keys: Observed<Option<KnownHostKeys>>,
    /// The keys of all sources that have not expired.
    pub keys: Vec<KeyState>,
    /// Keys that a source names and that are left out.
    pub unfit: Vec<Unfit>,
    /// Our own endpoint.
    pub tls: Observed<Tls>,
    /// What the gate lets in, against other programs' tables.
    pub conflicts: Observed<Comparison>,
    /// What listens, against what the gate lets in.
    pub exposure: Observed<Exposure>,
    /// What is mounted and swapped to, and what is beneath.
    pub storage: Observed<Storage>,
}

impl Observations {
    /// Nothing was looked at, for that reason.
    pub fn unseen(reason: &str) -> Self {
        fn unseen<T>(reason: &str) -> Observed<T> {
            Err(reason.to_owned())
        }
        Self {
            gate: Arc::new(Gate {
                held: unseen(reason),
                applied: unseen(reason),
                ..Gate::default()
            }),
            trial_until: None,
            durable: Ok(0),
            systemd: Systemd {
                manager_state: unseen(reason),
                systemctl: unseen(reason),
            },
            sshd: Sshd {
                units: unseen(reason),
                config: unseen(reason),
                handshake: unseen(reason),
                unanswered: Vec::new(),
                care: SshdCare::default(),
                host_keys: Vec::new(),
                interactive: BTreeMap::new(),
                unpublished_host_keys: Vec::new(),
            },
            host_keys: Ok(None),
            keys: Vec::new(),
            unfit: Vec::new(),
            tls: unseen(reason),
            conflicts: unseen(reason),
            exposure: unseen(reason),
            storage: unseen(reason),
        }
    }
}
