//! The agent that shuts a cloud instance, lets in exactly what was named, and proves it.
//!
//! Data goes one way: spec → plan → apply → verify → report. `policy` decides and has no effects;
//! `system` has the effects and decides nothing; `agent` is the loop between them.

#![deny(unsafe_code)]

pub mod agent;
pub mod channel;
pub mod cli;
pub mod config;
pub mod health;
pub mod identity;
pub mod log;
pub mod policy;
pub mod system;
