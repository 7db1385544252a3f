//! Keys in their place, and what sshd says of them.
//!
//! May not live here: how a file is written (`system::key_files`), what makes a login good
//! (`policy::readiness`).

use std::collections::BTreeSet;
use std::path::PathBuf;

use jiff::Timestamp;
use portcullis_protocol::{PublicKey, Spec, UserName};
use tracing::{info, warn};

use super::sessions::RemovedKeys;
use super::state::Store;
use crate::log::id;
use crate::policy::keys::current;
use crate::policy::observation::{Handshake, KeyState, Observed, Sshd, SshdConfig};
use crate::system::accounts::{self, Account, AccountError};
use crate::system::{as_user, key_files, ssh_probe, sshd, systemd};

/// What is seen of logins: sshd itself, and the spec's keys.
pub struct Seen {
    /// sshd.
    pub sshd: Sshd,
    /// The keys, in the order of the spec's users.
    pub keys: Vec<KeyState>,
    /// Files whose change may concern keys: key folders and key files.
    pub files: BTreeSet<PathBuf>,
}

/// A user of the spec, as far as the system knows it.
struct Login {
    user: UserName,
    keys: Vec<PublicKey>,
    account: Observed<Account>,
    installed: Observed<(PathBuf, Vec<PublicKey>)>,
}

/// Whether looking may change anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Look only.
    Observe,
    /// Put keys in place, remove those of users who left the spec; create users if that is set.
    Reconcile {
        /// The setting `keys.create_users`.
        create_users: bool,
    },
}

/// Looks at sshd and the spec's keys, in `Reconcile` after putting them in place; keys that were taken
/// away are noted in `removed`.
pub async fn look(spec: Option<&Spec>, store: &Store, mode: Mode, removed: &RemovedKeys) -> Seen {
    let now = Timestamp::now();
    let users: BTreeSet<UserName> = spec
        .into_iter()
        .flat_map(|s| &s.authorized_keys)
        .map(|k| k.user.clone())
        .collect();
    if mode != Mode::Observe {
        sshd::prepare();
    }
    if let (Mode::Reconcile { .. }, Some(_)) = (mode, spec) {
        remove_departed(&users, store, removed).await;
    }
    let mut logins = Vec::new();
    for user in &users {
        if let Some(spec) = spec {
            logins.push(login(user, spec, now, mode, removed).await);
        }
    }
    let (units, config) = tokio::join!(systemd::sshd_units(), sshd::effective_config(None));
    let (handshake, keys) = probe(&config, logins.as_slice()).await;
    let host_keys = sshd::host_keys(config.as_ref().ok());
    let files = logins.iter().flat_map(watched).collect();
    Seen {
        sshd: Sshd {
            units,
            config,
            handshake,
            host_keys,
        },
        keys,
        files,
    }
}

async fn login(user: &UserName, spec: &Spec, now: Timestamp, mode: Mode, removed: &RemovedKeys) -> Login {
    let wanted = current(&spec.authorized_keys, user, now);
    let account = account(user, mode);
    let config = match &account {
        Ok(_) => sshd::effective_config(Some(user)).await,
        Err(reason) => Err(reason.clone()),
    };
    let keys = wanted.iter().map(|k| k.key.clone()).collect();
    let installed = match (&account, &config) {
        (Ok(account), Ok(config)) => {
            let (account, config, removed) = (account.clone(), config.clone(), removed.clone());
            let work = move || -> Observed<(PathBuf, Vec<PublicKey>)> {
                if mode != Mode::Observe {
                    let outcome =
                        key_files::install(&account, &config, &wanted).map_err(|e| e.to_string())?;
                    removed.add(&account.name, &outcome.removed);
                    if outcome.changed {
                        let (user, file) = (account.name.to_string(), outcome.path.display().to_string());
                        info!(
                            MESSAGE_ID = id::KEYS_WRITTEN,
                            USER = user,
                            FILE = file,
                            "keys were put in place"
                        );
                    }
                }
                key_files::read_back(&account, &config)
            };
            as_user::off_thread(work)
                .await
                .unwrap_or_else(|e| Err(e.to_string()))
        }
        (Err(reason), _) | (_, Err(reason)) => Err(reason.clone()),
    };
    Login {
        user: user.clone(),
        keys,
        account,
        installed,
    }
}

/// The home's folder of keys and, once it is known, the file in it. Each is watched in its folder, so
/// that a home that others may write to is seen too.
fn watched(login: &Login) -> Vec<PathBuf> {
    let folder = login.account.as_ref().map(|account| account.home.join(".ssh"));
    let file = match (&login.installed, &folder) {
        (Ok((file, _)), _) => Some(file.clone()),
        (Err(_), Ok(folder)) => Some(folder.join("authorized_keys")),
        _ => None,
    };
    folder.ok().into_iter().chain(file).collect()
}

fn account(user: &UserName, mode: Mode) -> Observed<Account> {
    match (accounts::lookup(user), mode) {
        (Err(AccountError::Unknown(_)), Mode::Reconcile { create_users: true }) => accounts::create(user),
        (found, _) => found,
    }
    .map_err(|e| e.to_string())
}

/// Takes our lines out of the files of users whom the spec no longer names. The list of users is
/// written before files are, so that a crash in between forgets nobody.
async fn remove_departed(users: &BTreeSet<UserName>, store: &Store, removed_keys: &RemovedKeys) {
    let managed = store.users();
    let departed: Vec<UserName> = managed.difference(users).cloned().collect();
    let union: BTreeSet<UserName> = managed.union(users).cloned().collect();
    let mut remaining = users.clone();
    if union != managed
        && let Err(error) = store.save_users(&union)
    {
        warn!(MESSAGE_ID = id::DEGRADED, %error, "the list of users could not be written");
    }
    for user in departed {
        let Ok(account) = accounts::lookup(&user) else {
            continue;
        };
        let removed = match sshd::effective_config(Some(&user)).await {
            Ok(config) => as_user::off_thread(move || key_files::remove_all(&account, &config))
                .await
                .map_err(|e| e.to_string())
                .and_then(|outcome| outcome.map_err(|e| e.to_string())),
            Err(reason) => Err(reason),
        };
        match removed {
            Ok(outcome) => {
                removed_keys.add(&user, &outcome.removed);
                info!(
                    MESSAGE_ID = id::KEYS_WRITTEN,
                    USER = user.as_str(),
                    "keys were removed"
                );
            }
            Err(reason) => {
                warn!(
                    MESSAGE_ID = id::KEYS_FAILED,
                    USER = user.as_str(),
                    reason,
                    "keys could not be removed"
                );
                remaining.insert(user);
            }
        }
    }
    if remaining != union
        && let Err(error) = store.save_users(&remaining)
    {
        warn!(MESSAGE_ID = id::DEGRADED, %error, "the list of users could not be written");
    }
}

/// One handshake, and the question whether sshd would accept each key that is in place.
async fn probe(config: &Observed<SshdConfig>, logins: &[Login]) -> (Observed<Handshake>, Vec<KeyState>) {
    let address = config.as_ref().map_err(Clone::clone).and_then(|config| {
        config
            .local_address()
            .ok_or_else(|| "sshd listens on no address".to_owned())
    });
    let mut handshake: Option<Observed<Handshake>> = None;
    let mut states = Vec::new();
    for login in logins {
        let in_place = login
            .installed
            .as_ref()
            .map(|(_, keys)| keys.as_slice())
            .unwrap_or_default();
        let answers = match (&address, &login.installed) {
            (Ok(address), Ok(_)) => {
                let probe = ssh_probe::probe(*address, &login.user, &login.keys).await;
                handshake.get_or_insert(probe.handshake);
                probe.accepted
            }
            (Err(reason), _) | (_, Err(reason)) => vec![Err(reason.clone()); login.keys.len()],
        };
        for (key, accepted) in login.keys.iter().zip(answers) {
            let installed = match &login.installed {
                Ok((file, _)) if in_place.iter().any(|k| k.same_key(key)) => Ok(file.clone()),
                Ok((file, _)) => Err(format!("{} does not hold it", file.display())),
                Err(reason) => Err(reason.clone()),
            };
            states.push(KeyState {
                user: login.user.clone(),
                key: key.clone(),
                installed,
                accepted,
            });
        }
    }
    let handshake = match (handshake, address) {
        (Some(handshake), _) => handshake,
        (None, Ok(address)) => ssh_probe::handshake(address).await,
        (None, Err(reason)) => Err(reason),
    };
    (handshake, states)
}
