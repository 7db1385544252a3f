//! Launches instances, hands them their spec, waits until they are proven ready, and changes them
//! afterwards: the control plane's side of portcullis.
//!
//! Lives here: everything `portcullisctl` can do, for programs and tests to call.
//! May not live here: what runs on an instance (the agent), and the wire formats (the protocol crate).

#![forbid(unsafe_code)]

pub mod ca;
pub mod cli;
pub mod client;
pub mod cluster;
pub mod enrol;
pub mod error;
pub mod instance_ca;
pub mod known_hosts;
pub mod local;
pub mod progress;
pub mod reach;
pub mod userdata;
pub mod wait;

pub use error::{Error, Result};
pub use progress::Progress;
