//! The provider's own little internet: a namespace with a bridge, the addresses on it, and what it
//! takes to do something inside a namespace.
//!
//! May not live here: anything that touches the host's own network. Every link is made with
//! `ip -n`, inside a namespace.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use sha2::{Digest as _, Sha256};

use super::exec::run;
use crate::{Error, Result};

/// The provider's own addresses on the bridge: the control plane's side, and the default gateway.
pub const GATEWAY: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1)),
    IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1)),
];

/// Names and addresses of one state directory's network.
#[derive(Clone, Debug)]
pub struct Network {
    tag: String,
    addresses: PathBuf,
}

impl Network {
    /// The network of a state directory. Nothing is made yet.
    pub(crate) fn of(state: &Path) -> Self {
        let hash = Sha256::digest(state.as_os_str().as_encoded_bytes());
        let tag = portcullis_protocol::identity::to_hex(&hash[..3]);
        Self {
            tag,
            addresses: state.join("addresses"),
        }
    }

    /// Name of the namespace with the bridge.
    pub fn name(&self) -> String {
        format!("pcl-net-{}", self.tag)
    }

    /// Name of an instance's or outsider's namespace.
    pub fn member(&self, name: &str) -> String {
        format!("pcl-{}-{name}", self.tag)
    }

    /// The network's short name, different for each state directory.
    pub(crate) fn tag(&self) -> &str {
        &self.tag
    }

    /// Path of the namespace with the bridge, for [`in_namespace`].
    pub fn path(&self) -> PathBuf {
        namespace_path(&self.name())
    }

    /// Makes the namespace and its bridge, if they are not there.
    pub(crate) fn ensure(&self) -> Result<()> {
        let net = self.name();
        if self.path().exists() && run("ip", &["-n", &net, "link", "show", "br0"]).is_ok() {
            return Ok(());
        }
        if !self.path().exists() {
            run("ip", &["netns", "add", &net])?;
        }
        run("ip", &["-n", &net, "link", "set", "lo", "up"])?;
        run("ip", &["-n", &net, "link", "add", "br0", "type", "bridge"])?;
        run(
            "ip",
            &["-n", &net, "address", "add", "10.77.0.1/24", "dev", "br0"],
        )?;
        run(
            "ip",
            &["-n", &net, "address", "add", "fd77::1/64", "dev", "br0", "nodad"],
        )?;
        run("ip", &["-n", &net, "link", "set", "br0", "up"]).map(drop)
    }

    /// Removes the namespace with the bridge, if it is there.
    pub(crate) fn remove(&self) -> Result<()> {
        delete_namespace(&self.name())
    }

    /// Takes a free host number (2 to 254) for `owner`; it stays taken until it is freed.
    pub(crate) fn take_number(&self, owner: &str) -> Result<u8> {
        fs::create_dir_all(&self.addresses).map_err(Error::file("make", &self.addresses))?;
        for number in 2..=254 {
            let path = self.addresses.join(number.to_string());
            // Making the file is the taking: two processes can't get the same number.
            match File::create_new(&path) {
                Ok(mut file) => {
                    file.write_all(owner.as_bytes())
                        .map_err(Error::file("write", &path))?;
                    return Ok(number);
                }
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::file("make", &path)(e)),
            }
        }
        Err(Error::Failed(
            "all 253 addresses of 10.77.0.0/24 are taken: terminate some instances".into(),
        ))
    }

    /// Frees a host number.
    pub(crate) fn free_number(&self, number: u8) {
        let _ = fs::remove_file(self.addresses.join(number.to_string()));
    }

    /// Frees all that an owner took, even if it died before it wrote down which.
    pub(crate) fn free_numbers_of(&self, owner: &str) {
        for entry in fs::read_dir(&self.addresses).into_iter().flatten().flatten() {
            if fs::read_to_string(entry.path()).is_ok_and(|text| text == owner) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Whether any number is taken.
    pub(crate) fn in_use(&self) -> bool {
        fs::read_dir(&self.addresses).is_ok_and(|mut entries| entries.next().is_some())
    }
}

/// The addresses of a host number.
pub(crate) fn addresses(number: u8) -> [IpAddr; 2] {
    [
        IpAddr::V4(Ipv4Addr::new(10, 77, 0, number)),
        IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, u16::from(number))),
    ]
}

/// The hardware address of a host number.
pub(crate) fn hardware_address(number: u8) -> String {
    format!("02:00:0a:4d:00:{number:02x}")
}

/// Where `ip netns` keeps a namespace.
pub(crate) fn namespace_path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

/// Removes a namespace, if it is there.
pub(crate) fn delete_namespace(name: &str) -> Result<()> {
    if namespace_path(name).exists() {
        run("ip", &["netns", "delete", name])?;
    }
    Ok(())
}

/// Runs `closure` on a throw-away thread inside a network namespace. Sockets made there stay in
/// that namespace wherever they are used afterwards.
///
/// # Errors
/// When the namespace does not exist or may not be entered; what the closure says is its own.
pub fn in_namespace<T: Send>(path: &Path, closure: impl FnOnce() -> T + Send) -> io::Result<T> {
    let namespace = File::open(path)?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            Ok(closure())
        });
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread inside the namespace panicked")))
    })
}

/// A stranger: a plain namespace on the bridge that is nobody's instance. Gone when dropped.
pub struct Outsider {
    network: Network,
    namespace: String,
    number: u8,
}

impl Outsider {
    pub(crate) fn new(network: &Network, name: &str) -> Result<Self> {
        let namespace = network.member(name);
        if namespace_path(&namespace).exists() {
            return Err(Error::Failed(format!(
                "{name} is there already: end the other program that uses it, or run `ip netns delete {namespace}`"
            )));
        }
        let number = network.take_number(name)?;
        // From here on dropping it clears up.
        let outsider = Self {
            network: network.clone(),
            namespace,
            number,
        };
        outsider.make()?;
        Ok(outsider)
    }

    fn make(&self) -> Result<()> {
        let (inner, net) = (self.namespace.as_str(), self.network.name());
        let port = format!("v{}", self.number);
        let mac = hardware_address(self.number);
        let (v4, v6) = (
            format!("10.77.0.{}/24", self.number),
            format!("fd77::{:x}/64", self.number),
        );
        // The kernel takes a namespace down after it is deleted: the port of one that had this number may still be there.
        let _ = run("ip", &["-n", &net, "link", "delete", &port]);
        run("ip", &["netns", "add", inner])?;
        run("ip", &["-n", inner, "link", "set", "lo", "up"])?;
        run(
            "ip",
            &[
                "-n", inner, "link", "add", "eth0", "address", &mac, "type", "veth", "peer", "name", &port,
                "netns", &net,
            ],
        )?;
        run("ip", &["-n", &net, "link", "set", &port, "master", "br0", "up"])?;
        run("ip", &["-n", inner, "address", "add", &v4, "dev", "eth0"])?;
        run(
            "ip",
            &["-n", inner, "address", "add", &v6, "dev", "eth0", "nodad"],
        )?;
        run("ip", &["-n", inner, "link", "set", "eth0", "up"])?;
        run(
            "ip",
            &["-n", inner, "route", "add", "default", "via", "10.77.0.1"],
        )?;
        run("ip", &["-n", inner, "route", "add", "default", "via", "fd77::1"]).map(drop)
    }

    /// Path of its namespace, for [`in_namespace`].
    pub fn path(&self) -> PathBuf {
        namespace_path(&self.namespace)
    }

    /// Its IPv4 and IPv6 address.
    pub fn addresses(&self) -> [IpAddr; 2] {
        addresses(self.number)
    }
}

impl Drop for Outsider {
    fn drop(&mut self) {
        let _ = delete_namespace(&self.namespace);
        self.network.free_number(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_directories_do_not_share_names() {
        let (a, b) = (Network::of(Path::new("/a")), Network::of(Path::new("/b")));
        assert_ne!(a.name(), b.name());
        assert!(a.name() != a.member("net") && a.member("x") != b.member("x"));
    }

    #[test]
    fn numbers_are_taken_once_and_freed() {
        let state = tempfile::tempdir().unwrap();
        let network = Network::of(state.path());
        assert!(!network.in_use());
        assert_eq!(
            [
                network.take_number("a").unwrap(),
                network.take_number("b").unwrap()
            ],
            [2, 3]
        );
        network.free_number(2);
        assert_eq!(network.take_number("c").unwrap(), 2);
        assert!(network.in_use());
        for _ in 0..251 {
            network.take_number("x").unwrap();
        }
        assert!(
            network
                .take_number("one too many")
                .unwrap_err()
                .to_string()
                .contains("253")
        );
    }
}
