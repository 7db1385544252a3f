//! What crosses a boundary: the spec, the health report, the identity document and the messages of
//! the control socket, as types that cannot hold a wrong value.
//!
//! Lives here: serde types of the public formats, their parsing and their JSON Schema.
//! May not live here: any I/O, any async, any decision about what to do with a value.

#![forbid(unsafe_code)]

pub mod access;
pub mod control;
pub mod denied;
pub mod enrolment;
pub mod host_key;
pub mod identity;
pub mod key;
mod key_data;
pub mod key_options;
pub mod key_report;
pub mod report;
pub mod requirement;
pub mod rule;
pub mod schema;
pub mod secret;
pub mod situation;
pub mod source;
pub mod spec;
pub mod text;

pub use key::{AuthorizedKey, PublicKey, UserName};
pub use key_options::KeyOptions;
pub use key_report::KeyReport;
pub use report::{Check, CheckId, Report, Status};
pub use rule::{FirewallRule, PortRange, Protocol, RuleId};
pub use secret::Secret;
pub use situation::Situation;
pub use source::{PeerAddress, SourceRange};
pub use spec::{Cluster, ControlPlane, Generation, Instance, Peer, Spec, SpecError};
