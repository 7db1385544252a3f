//! Keys on a real file system and before a real sshd.
//!
//! Needs root, a kernel whose tmpfs knows immutable files (Linux 6.6), and `sshd` and `ssh-keygen`
//! (`apt-get install --no-install-recommends openssh-server`; it does not have to run). Without them these tests fail: they never skip. The machine's own users, sshd and mounts are
//! left alone: accounts are numbers without an entry in passwd(5), homes and mounts are in a mount
//! namespace of each test's own, sshd is a private one on a port of loopback.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;

mod attacks;
mod files;
mod home;
mod identity;
mod keygen;
mod lines;
mod owners;
mod races;
mod sshd;
