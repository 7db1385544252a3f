//! Effects: the kernel, files, users, D-Bus and sshd. Everything that touches the instance is here.
//!
//! May not live here: decisions. A function here does one thing, and says what it saw or why it
//! could not.

pub mod accounts;
pub mod addresses;
pub mod alarm;
pub mod archive;
pub mod as_user;
pub mod audit_file;
pub mod callers;
pub mod clock;
pub mod command;
pub mod descriptors;
pub mod documents;
pub mod endpoint;
pub mod files;
pub mod host;
pub mod injected;
pub mod kexinit;
pub mod key_files;
pub mod key_place;
pub mod links;
pub mod listeners;
pub mod logind;
pub mod memory;
pub mod netlink;
pub mod nflog;
pub mod nftables;
pub mod process;
pub mod secret_files;
pub mod selinux;
pub mod socket_owners;
pub mod socket_units;
pub mod sockets;
pub mod ssh_probe;
pub mod ssh_sessions;
pub mod sshd;
pub mod sshd_config;
pub mod sshd_reload;
pub mod sshd_users;
pub mod stamp;
pub mod storage;
pub mod systemd;
pub mod watch;
pub mod xtables;
