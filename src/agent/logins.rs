//! Keys in their place, and what sshd says of them.
//!
//! What was found out of a user is remembered, and holds as long as that user's files are the same and
//! nothing else happened: a change in one home asks nothing of the others.
//!
//! May not live here: how a file is written (`system::key_files`), which keys hold
//! (`policy::key_sources`), what makes a login good (`policy::readiness`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use futures_util::StreamExt;
use futures_util::stream;
use jiff::Timestamp;
use portcullis_protocol::key::KeyLine;
use portcullis_protocol::{Spec, UserName};
use tracing::{info, warn};

use super::login_questions::{self, Answers};
use super::session_keys::RemovedKeys;
use super::state::Store;
use crate::config::Settings;
use crate::log::id;
use crate::policy::key_path::KeyPlace;
use crate::policy::key_sources::{Grant, KeyRules, Unfit, gather};
use crate::policy::observation::{Interactive, KeyState, Observed, Sshd, SshdCare, SshdConfig};
use crate::system::accounts::{self, Account, AccountError};
use crate::system::key_files::ReadBack;
use crate::system::key_place::{self, Placing};
use crate::system::sshd_users::UserConfigs;
use crate::system::{as_user, injected, sshd, systemd};

/// How many users are looked at at the same time: each waits for sshd and for the disk.
const AT_ONCE: usize = 8;

/// What is seen of logins: sshd itself, and everybody's keys.
pub struct Seen {
    /// sshd.
    pub sshd: Sshd,
    /// The keys, in the order of their users.
    pub keys: Vec<KeyState>,
    /// Keys that are left out.
    pub unfit: Vec<Unfit>,
    /// Files whose change may concern keys: key folders, key files, cloud-init's data.
    pub files: BTreeSet<PathBuf>,
}

/// A user with keys, as far as the system knows it.
pub struct Login {
    /// The user.
    pub user: UserName,
    /// The keys that should let the user in.
    pub grants: Vec<Grant>,
    account: Observed<Account>,
    /// Why the account lets nobody in; sshd does not tell before somebody has proven a key.
    pub barred: Option<String>,
    config: Observed<SshdConfig>,
    /// What their file holds.
    pub installed: Observed<ReadBack>,
}

/// Whether looking may change anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Look only.
    Observe,
    /// Put keys in place, remove those of users who are named no more; create users if that is set.
    Reconcile,
}

/// What is looked at, and how.
pub struct Look<'a> {
    /// The spec that holds.
    pub spec: Option<&'a Spec>,
    /// What outlives the process.
    pub store: &'a Store,
    /// The image's settings.
    pub settings: &'a Settings,
    /// Whether anything may be changed.
    pub mode: Mode,
    /// Where keys are.
    pub placing: Placing,
    /// Where keys are noted that were taken away.
    pub removed: &'a RemovedKeys,
}

/// What was found out before.
#[derive(Default)]
pub struct Memory {
    configs: BTreeMap<UserName, SshdConfig>,
    answers: Answers,
}

impl Memory {
    /// Forgets what depends on sshd, its configuration and the users of the system.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

/// Looks at sshd and everybody's keys as if nothing were known of them, and changes nothing.
pub async fn observe(spec: Option<&Spec>, store: &Store, settings: &Settings, place: KeyPlace) -> Seen {
    let observe = Look {
        spec,
        store,
        settings,
        mode: Mode::Observe,
        placing: Placing::seen(place),
        removed: &RemovedKeys::default(),
    };
    look(&observe, &mut Memory::default()).await
}

/// Looks at sshd and everybody's keys, in `Reconcile` after putting them in place.
pub async fn look(look: &Look<'_>, memory: &mut Memory) -> Seen {
    let cloud_init_user = look.settings.cloud_init_user.as_ref();
    let grants = look.spec.map(|spec| {
        let rules = KeyRules {
            least_rsa_bits: look.settings.min_rsa_bits,
            revoked: look.store.revoked().map_err(|e| e.to_string()),
        };
        gather(spec, &injected::read(cloud_init_user), &rules, Timestamp::now())
    });
    // Without a spec nothing is known, and so nothing is changed: it may only be unreadable for now.
    let mode = grants.as_ref().map_or(Mode::Observe, |_| look.mode);
    let grants = grants.unwrap_or_default();
    if look.mode == Mode::Reconcile {
        sshd::prepare();
    }
    let configs = UserConfigs::new().await;
    if mode == Mode::Reconcile {
        remove_departed(&grants.users(), look, &configs).await;
    }
    let create = look.settings.create_users && mode == Mode::Reconcile;
    let known = &memory.configs;
    let mut accounts = accounts(grants.users(), create);
    let logins: Vec<Login> = stream::iter(grants.by_user())
        .map(|(user, grants)| {
            let account = accounts.remove(&user);
            let account = account.unwrap_or_else(|| Err("not looked up".to_owned()));
            let config = known.get(&user).cloned();
            let how = How {
                mode,
                placing: look.placing,
            };
            let configs = (config, &configs);
            login((user, account), grants, configs, how, look.removed)
        })
        .buffered(AT_ONCE)
        .collect()
        .await;
    let (units, config) = tokio::join!(systemd::sshd_units(), configs.outside());
    let (handshake, keys) = login_questions::ask(&config, &logins, &mut memory.answers).await;
    let unanswered = super::sshd::unanswered(&config).await;
    let host_keys = sshd::host_keys(config.as_ref().ok());
    let unpublished = sshd::unpublished_host_keys(config.as_ref().ok());
    let mut files: BTreeSet<PathBuf> = logins.iter().flat_map(watched).collect();
    files.extend(injected::watched(cloud_init_user));
    let configs = logins.into_iter().filter_map(|l| Some((l.user, l.config.ok()?)));
    memory.configs = configs.collect();
    let interactive = memory.configs.iter();
    let interactive = interactive.map(|(user, config)| (user.clone(), Interactive::of(config)));
    Seen {
        sshd: Sshd {
            units,
            config,
            handshake,
            unanswered,
            care: SshdCare::default(),
            host_keys,
            interactive: interactive.collect(),
            unpublished_host_keys: unpublished,
        },
        keys,
        unfit: grants.unfit,
        files,
    }
}

/// How a user is looked at.
#[derive(Clone, Copy)]
struct How {
    mode: Mode,
    placing: Placing,
}

async fn login(
    (user, account): (UserName, Observed<Account>),
    grants: Vec<Grant>,
    (known, configs): (Option<SshdConfig>, &UserConfigs),
    how: How,
    removed: &RemovedKeys,
) -> Login {
    let config = match (&account, known) {
        (Ok(_), Some(config)) => Ok(config),
        (Ok(_), None) => configs.of(&user).await,
        (Err(reason), _) => Err(reason.clone()),
    };
    let installed = match (&account, &config) {
        (Ok(account), Ok(config)) => {
            let (account, config, removed) = (account.clone(), config.clone(), removed.clone());
            let keys: Vec<_> = grants.iter().map(|grant| grant.key.clone()).collect();
            as_user::off_thread(move || put_in_place(&account, &config, &keys, how, &removed))
                .await
                .unwrap_or_else(|e| Err(e.to_string()))
        }
        (Err(reason), _) | (_, Err(reason)) => Err(reason.clone()),
    };
    Login {
        barred: accounts::barred(&user),
        user,
        grants,
        account,
        config,
        installed,
    }
}

fn put_in_place(
    account: &Account,
    config: &SshdConfig,
    keys: &[portcullis_protocol::AuthorizedKey],
    how: How,
    removed: &RemovedKeys,
) -> Observed<ReadBack> {
    if how.mode == Mode::Reconcile {
        let outcome = key_place::install(how.placing, account, config, keys).map_err(|e| e.to_string())?;
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
    key_place::read_back(how.placing, account, config)
}

/// The home's folder of keys and, once it is known, the file in it. Each is watched in its folder, so
/// that a home that others may write to is seen too.
fn watched(login: &Login) -> Vec<PathBuf> {
    let folder = login.account.as_ref().map(|account| account.home.join(".ssh"));
    let file = match (&login.installed, &folder) {
        (Ok(read), _) => Some(read.path.clone()),
        (Err(_), Ok(folder)) => Some(folder.join("authorized_keys")),
        _ => None,
    };
    folder.ok().into_iter().chain(file).collect()
}

/// The users' accounts. Two names of one user have one file, in which each would undo the other's keys, and
/// each key would open both: the second one is told so.
fn accounts(users: BTreeSet<UserName>, create: bool) -> BTreeMap<UserName, Observed<Account>> {
    let mut owners: BTreeMap<(u32, PathBuf), UserName> = BTreeMap::new();
    let account = |user: &UserName| {
        let account = account(user, create)?;
        let owner = owners.entry((account.uid, account.home.clone()));
        match owner.or_insert_with(|| user.clone()) {
            owner if owner == user => Ok(account),
            owner => Err(format!(
                "{user} and {owner} are one user (uid {}) with one file of keys in {}: give the keys to one of them",
                account.uid,
                account.home.display()
            )),
        }
    };
    let named: Vec<Observed<Account>> = users.iter().map(account).collect();
    users.into_iter().zip(named).collect()
}

fn account(user: &UserName, create: bool) -> Observed<Account> {
    match accounts::lookup(user) {
        Err(AccountError::Unknown(_)) if create => accounts::create(user),
        found => found,
    }
    .map_err(|e| e.to_string())
}

/// Takes our lines out of the files of users whom no source names any more. The list of users is
/// written before files are, so that a crash in between forgets nobody.
async fn remove_departed(users: &BTreeSet<UserName>, look: &Look<'_>, configs: &UserConfigs) {
    let (store, placing) = (look.store, look.placing);
    let managed = store.users();
    let departed: Vec<UserName> = managed.difference(users).cloned().collect();
    let union: BTreeSet<UserName> = managed.union(users).cloned().collect();
    let mut remaining = users.clone();
    if union != managed {
        remember(store, &union);
    }
    for user in departed {
        let Ok(account) = accounts::lookup(&user) else {
            continue;
        };
        let removed = match configs.of(&user).await {
            Ok(config) => as_user::off_thread(move || key_place::remove_all(placing, &account, &config))
                .await
                .map_err(|e| e.to_string())
                .and_then(|outcome| outcome.map_err(|e| e.to_string())),
            Err(reason) => Err(reason),
        };
        let name = user.as_str();
        match removed {
            Ok(removed) => {
                look.removed.add(&user, &removed);
                info!(MESSAGE_ID = id::KEYS_WRITTEN, USER = name, "keys were removed");
            }
            Err(reason) => {
                warn!(
                    MESSAGE_ID = id::KEYS_FAILED,
                    USER = name,
                    reason,
                    "keys could not be removed"
                );
                remaining.insert(user);
            }
        }
    }
    if remaining != union {
        remember(store, &remaining);
    }
    if let Err(error) = key_place::sweep(users) {
        warn!(MESSAGE_ID = id::KEYS_FAILED, %error, "keys of users who left could not be removed");
    }
}

fn remember(store: &Store, users: &BTreeSet<UserName>) {
    if let Err(error) = store.save_users(users) {
        warn!(MESSAGE_ID = id::DEGRADED, %error, "the list of users could not be written");
    }
}

/// The line that a grant is in a file.
pub fn line_of(grant: &Grant) -> KeyLine {
    KeyLine {
        options: grant.key.options.clone(),
        key: grant.key.key.clone(),
    }
}
