//! How a connection to an agent is made: from here, or from inside a network namespace.
//!
//! May not live here: TLS.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use crate::local::in_namespace;

/// Makes connections.
pub trait Dial: Send + Sync {
    /// Connects, within `timeout`.
    ///
    /// # Errors
    /// What the system says.
    fn dial(&self, address: SocketAddr, timeout: Duration) -> io::Result<TcpStream>;
}

/// Connects from here.
pub struct PlainDialer;

impl Dial for PlainDialer {
    fn dial(&self, address: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
        TcpStream::connect_timeout(&address, timeout)
    }
}

/// Connects from inside a network namespace.
pub struct NamespaceDialer(PathBuf);

impl NamespaceDialer {
    /// A dialer inside the namespace at `path`, for example `/run/netns/x`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }
}

impl Dial for NamespaceDialer {
    fn dial(&self, address: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
        in_namespace(&self.0, || TcpStream::connect_timeout(&address, timeout))?
    }
}
