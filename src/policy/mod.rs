//! Deciding: from the spec and from what was observed to rules, key files and checks.
//!
//! May not live here: any I/O, any clock, anything of [`crate::system`]. What a decision needs to
//! know comes in as a value.

#![forbid(unsafe_code)]

pub mod access;
pub mod audit;
pub mod conflicts;
pub mod danger;
pub mod denied;
pub mod explain;
pub mod firewall;
pub mod foreign;
pub mod host_keys;
pub mod key_audit;
pub mod key_path;
pub mod key_questions;
pub mod key_sources;
pub mod keys;
pub mod links;
pub mod metadata;
pub mod observation;
pub mod readiness;
pub mod ruleset;
pub mod spool;
pub mod ssh_algorithms;
pub mod ssh_log;
pub mod sshd_drop_in;
pub mod sshd_match;
pub mod sshd_restart;
pub mod storage;
