//! Effects: the kernel, files, users, D-Bus and sshd. Everything that touches the instance is here.
//!
//! May not live here: decisions. A function here does one thing, and says what it saw or why it
//! could not.

pub mod links;
pub mod netlink;
pub mod nftables;
