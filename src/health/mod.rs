//! Telling others how the instance is, and being told what is to change: the HTTPS endpoint and the pushed
//! report.
//!
//! May not live here: what the report says (`agent`), who is trusted (`identity`).

mod changes;
pub mod link;
mod problem;
pub mod push;
pub mod server;
