//! The local provider: real instances, with systemd as their first process, in namespaces of this
//! machine. For demonstrations and tests; it never touches the machine's own network, firewall,
//! users or keys.
//!
//! May not live here: what an instance does once it runs (the agent), and what the operator sees.

mod changes;
mod exec;
mod image;
mod instance;
mod launch;
mod network;
mod request;
mod team;

use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use exec::Output;
pub(crate) use image::require;
pub use image::{INSTALL_HINT, Image, ImageRequest, default_suite, find_deb};
pub use instance::{AGENT_PORT, Instance, State};
pub use launch::LaunchRequest;
pub use network::{GATEWAY, Network, Outsider, in_namespace};
pub use request::{parse_allow, read_keys};
pub(crate) use team::external_ids;

use portcullis_protocol::access::Role;

use crate::ca::{Ca, ClientCertificate, ClientName, DEFAULT_LIFETIME};
use crate::{Error, Progress, Result};
use exec::run;
use instance::Process;

/// Where the state is kept unless another folder is named.
pub const DEFAULT_STATE: &str = "/var/lib/portcullisctl/local";

/// The instances of one state directory.
#[derive(Clone, Debug)]
pub struct LocalProvider {
    state: PathBuf,
    images: PathBuf,
    network: Network,
}

impl LocalProvider {
    /// Opens a state directory, which is made if it is not there.
    ///
    /// # Errors
    /// When not run as root, when a program that is needed is not installed, or when the directory
    /// can't be used.
    pub fn open(state: impl AsRef<Path>) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::NotPermitted(
                "local instances need root: run it with sudo".into(),
            ));
        }
        for program in ["ip", "unshare", "nsenter", "mount"] {
            image::require(program)?;
        }
        let state = state.as_ref();
        make_folder(state)?;
        let state = fs::canonicalize(state).map_err(Error::file("find", state))?;
        let state = mountable("--state-dir", state)?;
        Ok(Self {
            images: state.clone(),
            network: Network::of(&state),
            state,
        })
    }

    /// The same, with images kept in (and shared with) another state directory.
    pub fn with_images(mut self, images: impl Into<PathBuf>) -> Self {
        self.images = images.into();
        self
    }

    /// Its state directory.
    pub fn state_dir(&self) -> &Path {
        &self.state
    }

    /// Its network.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Makes what is missing of an image. Takes a minute or two the first time.
    ///
    /// # Errors
    /// When a package can't be fetched or installed; the message has the end of the log.
    pub fn ensure_image(&self, request: &ImageRequest, progress: &dyn Progress) -> Result<Image> {
        image::ensure(&self.images, request, progress)
    }

    /// The authority that its instances trust; made on first use.
    ///
    /// # Errors
    /// When its folder can't be read or written.
    pub fn ca(&self) -> Result<Ca> {
        Ca::open_or_init(&self.state.join("ca"))
    }

    /// A fresh certificate of the control plane, kept in memory only. Its role is `operator`, and it names the
    /// external ids of all instances that there are now.
    ///
    /// # Errors
    /// When the authority can't be used, or a record can't be read.
    pub fn client_certificate(&self) -> Result<ClientCertificate> {
        self.client_certificate_for(Role::Operator)
    }

    /// As [`LocalProvider::client_certificate`], for another role.
    ///
    /// # Errors
    /// As there.
    pub fn client_certificate_for(&self, role: Role) -> Result<ClientCertificate> {
        self.ca()?.issue_for(&ClientName {
            name: "control-plane".to_owned(),
            role,
            external_ids: external_ids(&self.state)?,
            lifetime: DEFAULT_LIFETIME,
        })
    }

    /// All instances, by name.
    ///
    /// # Errors
    /// When a record can't be read.
    pub fn list(&self) -> Result<Vec<Instance>> {
        let mut found = Vec::new();
        for folder in team::folders(&self.state)? {
            found.push(Instance::load(&folder, &self.network)?);
        }
        found.sort_by(|a, b| a.name().cmp(b.name()));
        Ok(found)
    }

    /// The instance of that name.
    ///
    /// # Errors
    /// When there is none; the message lists those that there are.
    pub fn get(&self, name: &str) -> Result<Instance> {
        request::check_name(name)?;
        let folder = self.instance_folder(name);
        if folder.join("instance.json").exists() {
            return Instance::load(&folder, &self.network);
        }
        let names: Vec<String> = self
            .list()?
            .iter()
            .map(|instance| instance.name().to_owned())
            .collect();
        let known = if names.is_empty() {
            "there are none".into()
        } else {
            names.join(", ")
        };
        Err(Error::BadInput(format!("no instance is named {name:?}: {known}")))
    }

    /// Ends instances and removes all there is of them; those that are not there are no error.
    /// The other members of their clusters get a spec without them.
    ///
    /// # Errors
    /// When something can't be removed, or a remaining member can't be told.
    pub fn terminate(&self, names: &[&str]) -> Result<()> {
        for name in names {
            request::check_name(name)?;
        }
        let gone: Vec<String> = names
            .iter()
            .filter_map(|name| Instance::load(&self.instance_folder(name), &self.network).ok())
            .map(|instance| instance.id().to_owned())
            .collect();
        // One after the other: each ends in some ten milliseconds.
        names.iter().try_for_each(|name| self.destroy(name))?;
        for mut other in self.list()? {
            other.change_peers(|peers| {
                peers.retain(|peer| !gone.iter().any(|id| id == peer.instance.as_str()))
            })?;
        }
        self.remove_idle_network()
    }

    /// Ends all instances and removes the network.
    ///
    /// # Errors
    /// When something can't be removed.
    pub fn terminate_all(&self) -> Result<()> {
        let folder = self.state.join("instances");
        let names: Vec<String> = fs::read_dir(&folder)
            .map(|entries| {
                entries
                    .flatten()
                    .map(|e| e.file_name().to_string_lossy().into_owned())
                    .collect()
            })
            .unwrap_or_default();
        self.terminate(&names.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Reboots an instance from inside, and waits until it is up again (90 s at most).
    ///
    /// # Errors
    /// When it is off, or does not come up; then with the end of its console log.
    pub fn reboot(&self, name: &str) -> Result<Instance> {
        let instance = self.get(name)?;
        let before = instance.boots();
        // Its answer may be cut short by what it does.
        instance.exec(&["systemctl", "reboot"])?;
        let until = Instant::now() + Duration::from_secs(30);
        while instance.boots() <= before {
            if Instant::now() > until {
                return Err(Error::Failed(format!(
                    "{name} did not begin to boot within 30 s\n{}",
                    instance.console_tail(12)
                )));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        launch::wait_booted(&instance)?;
        Ok(instance)
    }

    /// A stranger on the network, nobody's instance; gone when dropped.
    ///
    /// # Errors
    /// When the name is taken or the namespace can't be made.
    pub fn outsider(&self, name: &str) -> Result<Outsider> {
        request::check_name(name)?;
        let _lock = image::lock(&self.state.join(".lock"))?;
        self.network.ensure()?;
        Outsider::new(&self.network, name)
    }

    pub(crate) fn instance_folder(&self, name: &str) -> PathBuf {
        self.state.join("instances").join(name)
    }

    pub(crate) fn cgroup(&self, name: &str) -> Result<PathBuf> {
        let mounts =
            fs::read_to_string("/proc/mounts").map_err(Error::file("read", Path::new("/proc/mounts")))?;
        let mount = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let mount = mount
            .into_iter()
            .find_map(|m| (m.get(2) == Some(&"cgroup2")).then(|| m[1].to_owned()));
        let Some(mount) = mount else {
            return Err(Error::Failed(
                "no cgroup2 is mounted: mount -t cgroup2 none /sys/fs/cgroup".into(),
            ));
        };
        Ok(Path::new(&mount)
            .join("portcullisctl")
            .join(format!("{}-{name}", self.network.tag())))
    }

    /// Ends one instance and removes what it left: processes, namespace, cgroup, files.
    pub(crate) fn destroy(&self, name: &str) -> Result<()> {
        let folder = self.instance_folder(name);
        // The booter first, so that nothing boots again; then PID 1, which takes all others along.
        for file in ["booter", "pid"] {
            if let Some(process) = Process::read(&folder.join(file)) {
                process.kill();
            }
        }
        // Mounts were made in the instance's own mount namespace only, and went with it.
        network::delete_namespace(&self.network.member(name))?;
        remove_cgroup(&self.cgroup(name)?);
        if let Ok(instance) = Instance::load(&folder, &self.network) {
            let port = format!("v{}", instance.record.number);
            let net = self.network.name();
            if self.network.path().exists() {
                // Usually gone already, with its other end.
                let _ = run("ip", &["-n", &net, "link", "delete", &port]);
            }
        }
        self.network.free_numbers_of(name);
        match fs::remove_dir_all(&folder) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::file("remove", &folder)(e)),
            _ => Ok(()),
        }
    }

    /// Removes the network if no instance and no outsider is on it.
    pub(crate) fn remove_idle_network(&self) -> Result<()> {
        let _lock = image::lock(&self.state.join(".lock"))?;
        if self.network.in_use() {
            Ok(())
        } else {
            self.network.remove()
        }
    }
}

/// The path, if it can be a part of an overlay's mount options, where some characters separate.
pub(crate) fn mountable(what: &str, path: PathBuf) -> Result<PathBuf> {
    if path
        .to_str()
        .is_none_or(|text| text.contains([':', ',', '\\', ' ', '\n']))
    {
        return Err(Error::BadInput(format!(
            "{what}: {} has a character that overlay mounts can't take",
            path.display()
        )));
    }
    Ok(path)
}

/// Makes a folder for root only.
pub(crate) fn make_folder(path: &Path) -> Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(Error::file("make", path))
}

/// Writes a file below an instance's root, with the mode it has to have there.
pub(crate) fn put(path: &Path, content: &str, mode: u32) -> Result<()> {
    if let Some(parent) = path.parent() {
        let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(parent);
        made.map_err(Error::file("make", parent))?;
    }
    fs::write(path, content).map_err(Error::file("write", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(Error::file("set the mode of", path))
}

/// Removes a cgroup with those below it; their processes are over.
fn remove_cgroup(path: &Path) {
    for _ in 0..50 {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                remove_cgroup(&entry.path());
            }
        }
        match fs::remove_dir(path) {
            // The kernel takes a moment to count the last process out.
            Err(e) if e.kind() == std::io::ErrorKind::ResourceBusy => {
                std::thread::sleep(Duration::from_millis(10));
            }
            _ => return,
        }
    }
}
