//! Telling others how the instance is, and being told what is to change: the HTTPS endpoint and the pushed
//! report.
//!
//! May not live here: what the report says (`agent`), who is trusted (`identity`).

#[cfg(test)]
mod bad_bodies;
mod changes;
mod connection;
#[cfg(test)]
mod document;
pub mod enrol;
pub mod extract;
mod first_contact;
mod limits;
pub mod link;
pub mod metrics;
mod problem;
pub mod push;
mod refusals;
mod rest;
pub mod routes;
pub mod server;
