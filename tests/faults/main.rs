//! What goes wrong at any moment: the daemon is killed at each of its system calls, each of its file calls fails,
//! each file of its state and of its settings is damaged, and its state is taken away. The gate is never open, nothing that was accepted is lost, and no hand
//! is needed.
//!
//! The daemon runs in network and mount namespaces of its own, with its own users, homes and sshd's settings: those
//! of the machine are left alone. `make faults` tries every system call; without it, those that change something.
//! May not live here: what needs a whole instance (`tests/instances/faults.rs`, `fault_storms.rs`).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

#[path = "../common/mod.rs"]
mod common;

mod bench;
mod calls;
mod damage;
mod lost_state;
mod settings;
mod starts;
mod state_files;
mod tracer;
