//! The agent on real instances: systemd as the first process, sshd, cloud-init, a network of their own.
//!
//! Each test launches its own instances from the package that `make deb` made and takes them down
//! again, also when it fails. Needs root and what `packaging/setup` installs; without it the tests
//! fail, they never skip.
//! May not live here: what can be tested without an instance.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test may end by panicking"
)]

#[path = "../common/mod.rs"]
mod common;

mod access;
mod access_certificates;
mod api;
mod api_commands;
mod api_refusals;
mod audit;
mod audit_forgery;
mod boot;
mod bug_report;
mod changes;
mod client;
mod cluster;
mod containers;
mod credentials;
mod denied;
mod dhcp;
mod endpoint;
mod enrol;
mod example;
mod exposure;
mod fault_boots;
mod fault_storms;
mod faults;
mod first_contact;
mod front;
mod host_keys;
mod hunt;
mod keys;
mod lab;
mod lifecycle;
mod limits;
mod login;
mod memory;
mod metrics;
mod neighbours;
mod openapi;
mod push;
mod push_auth;
mod readiness;
mod receiver;
mod releases;
mod sandbox;
mod secrets;
mod sessions;
mod specs;
mod spool;
mod sshd;
mod sshd_changes;
mod status;
mod storage;
mod users;
