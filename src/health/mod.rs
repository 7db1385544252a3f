//! Telling others how the instance is: the HTTPS endpoint and the pushed report.
//!
//! May not live here: what the report says (`agent`), who is trusted (`identity`).

pub mod push;
pub mod server;
