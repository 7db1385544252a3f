//! Launching local instances: from what the caller asked for to running machines, or to nothing.
//!
//! May not live here: images (image.rs), and waiting for the agent (the crate's `wait`).

use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use portcullis_protocol::identity::to_hex;
use portcullis_protocol::spec::{Firewall, Name, SPEC_VERSION};
use portcullis_protocol::{
    AuthorizedKey, Cluster, ControlPlane, FirewallRule, Generation, Instance as SpecInstance, PublicKey,
    Secret, Spec, UserName,
};
use ring::rand::SecureRandom as _;

use super::image::{Image, ImageRequest};
use super::instance::{Instance, Process, Record, State};
use super::network::{GATEWAY, hardware_address};
use super::{LocalProvider, image, make_folder, put};
use crate::userdata::{UserDataOptions, render};
use crate::{Error, Progress, Result};

const BOOT_SCRIPT: &str = include_str!("boot.sh");

/// How long a boot may take: far more than the few seconds it needs, for busy machines.
const BOOT_TIMEOUT: Duration = Duration::from_secs(90);

/// What to launch.
#[derive(Clone, Debug)]
pub struct LaunchRequest {
    /// Its name: 1 to 32 of a-z, 0-9 and `-`.
    pub name: String,
    /// The cluster that it joins, if any.
    pub cluster: Option<String>,
    /// For whom the keys are.
    pub user: UserName,
    /// The keys that log in.
    pub keys: Vec<PublicKey>,
    /// What is let in.
    pub rules: Vec<FirewallRule>,
    /// What cloud-init is told besides the spec.
    pub user_data: UserDataOptions,
    /// Which image it boots.
    pub image: ImageRequest,
}

impl LocalProvider {
    /// Launches an instance and waits until it is up. Whether it is *ready* is for
    /// [`crate::wait::wait`] to say.
    ///
    /// # Errors
    /// When anything fails; then nothing of the instance is left.
    pub fn launch(&self, request: &LaunchRequest, progress: &dyn Progress) -> Result<Instance> {
        let mut launched = self.launch_many(std::slice::from_ref(request), progress)?;
        launched
            .pop()
            .ok_or_else(|| Error::Failed("nothing was launched".into()))
    }

    /// Launches instances at once: those of one cluster know each other from generation 1, and
    /// members that run already get a new generation that names the new ones.
    ///
    /// # Errors
    /// When anything fails; then nothing of any of them is left.
    pub fn launch_many(&self, requests: &[LaunchRequest], progress: &dyn Progress) -> Result<Vec<Instance>> {
        for (i, request) in requests.iter().enumerate() {
            super::request::check_name(&request.name)?;
            let twice = requests[..i].iter().any(|other| other.name == request.name);
            if twice || self.instance_folder(&request.name).exists() {
                return Err(Error::BadInput(format!(
                    "{} is there already: `portcullisctl terminate {0}` ends it",
                    request.name
                )));
            }
        }
        let images = requests
            .iter()
            .map(|request| self.ensure_image(&request.image, progress));
        let images = images.collect::<Result<Vec<_>>>()?;
        let client_ca = self.ca()?.certificate_pem().to_owned();
        let mut undo = Undo {
            provider: self,
            names: Vec::new(),
        };
        let mut launched = self.allocate(requests, &images, &client_ca, &mut undo)?;
        let mut members = self.list()?;
        members.retain(|member| !launched.iter().any(|new| new.name() == member.name()));
        introduce(&mut launched, &members)?;
        for (instance, request) in launched.iter().zip(requests) {
            progress.step(&format!("booting {}", instance.name()));
            instance.save()?;
            prepare(instance, &request.user_data)?;
            self.start(instance)?;
        }
        for instance in &launched {
            progress.step(&format!("waiting until {} is up", instance.name()));
            wait_booted(instance)?;
        }
        for member in members
            .iter_mut()
            .filter(|member| member.state() == State::Running)
        {
            let peers = new_peers(member, &launched)?;
            member.change_peers(|known| known.extend(peers))?;
        }
        undo.names.clear();
        Ok(launched)
    }

    /// Takes folders and addresses for all, so that all addresses are known before the first boots.
    fn allocate(
        &self,
        requests: &[LaunchRequest],
        images: &[Image],
        client_ca: &str,
        undo: &mut Undo<'_>,
    ) -> Result<Vec<Instance>> {
        let _lock = image::lock(&self.state_dir().join(".lock"))?;
        self.network().ensure()?;
        make_folder(&self.state_dir().join("instances"))?;
        let external_id = super::team::external_id(self.state_dir())?;
        let mut allocated = Vec::new();
        for (request, image) in requests.iter().zip(images) {
            let folder = self.instance_folder(&request.name);
            fs::create_dir(&folder).map_err(Error::file("make", &folder))?;
            undo.names.push(request.name.clone());
            let spec = new_spec(request, client_ca, &external_id)?;
            let instance = Instance {
                folder,
                network: self.network().clone(),
                record: Record {
                    name: request.name.clone(),
                    number: self.network().take_number(&request.name)?,
                    user: request.user.clone(),
                    layers: image.layers.clone(),
                    agent: image.agent,
                    created: jiff::Timestamp::now(),
                    spec,
                    identity: None,
                    introduced: false,
                },
            };
            instance.save()?;
            allocated.push(instance);
        }
        Ok(allocated)
    }

    /// Starts the booter, detached, and waits until it has made the first process.
    fn start(&self, instance: &Instance) -> Result<()> {
        let (name, folder) = (instance.name(), instance.folder.as_path());
        let layers: Vec<_> = instance
            .record
            .layers
            .iter()
            .map(|layer| layer.to_string_lossy())
            .collect();
        let network = self.network();
        let log = folder.join("console.log");
        let output = File::create(&log).map_err(Error::file("make", &log))?;
        let errors = output.try_clone().map_err(Error::file("open", &log))?;
        let mut child = Command::new("setsid")
            .args([
                "--fork",
                "sh",
                "-c",
                "echo $$ > \"$2/booter.new\"; exec sh \"$2/boot.sh\" \"$@\"",
                "boot",
            ])
            .arg(name)
            .arg(folder)
            .arg(layers.join(":"))
            .args([
                network.member(name),
                network.name(),
                format!("v{}", instance.record.number),
            ])
            .arg(hardware_address(instance.record.number))
            .arg(self.cgroup(name)?)
            .current_dir("/")
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .map_err(|e| Error::Failed(format!("can't run setsid: {e}; {}", image::INSTALL_HINT)))?;
        child.wait().map_err(|e| Error::Failed(format!("setsid: {e}")))?;
        let until = Instant::now() + Duration::from_secs(15);
        let mut booter: Option<Process> = None;
        while instance.process().is_none() {
            if booter.is_none()
                && let Some(pid) = image::read_lossy(&folder.join("booter.new")).trim().parse().ok()
                && let Some(process) = Process::of(pid)
            {
                put(&folder.join("booter"), &process.to_line(), 0o600)?;
                booter = Some(process);
            }
            if Instant::now() > until || booter.is_some_and(|booter| !booter.runs()) {
                return Err(not_booted(instance, "its first process did not start"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        if booter.is_none() {
            return Err(not_booted(instance, "its booter can't be told"));
        }
        Ok(())
    }
}

/// Removes what a failed launch made.
struct Undo<'a> {
    provider: &'a LocalProvider,
    names: Vec<String>,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        for name in &self.names {
            if let Err(error) = self.provider.destroy(name) {
                eprintln!("can't remove what is left of {name}: {error}");
            }
        }
        if !self.names.is_empty() {
            let _ = self.provider.remove_idle_network();
        }
    }
}

/// Whether `member` and `other` belong to the same cluster.
fn together(member: &Instance, other: &Instance) -> bool {
    member.cluster().is_some() && member.cluster() == other.cluster() && member.id() != other.id()
}

/// Those of `launched` that are peers of `member`.
fn new_peers(member: &Instance, launched: &[Instance]) -> Result<Vec<portcullis_protocol::Peer>> {
    launched
        .iter()
        .filter(|new| together(member, new))
        .map(Instance::as_peer)
        .collect()
}

/// Puts each other and the running members of the same cluster into the new instances' specs.
fn introduce(launched: &mut [Instance], members: &[Instance]) -> Result<()> {
    let others: Vec<Instance> = launched
        .iter()
        .chain(members.iter().filter(|member| member.state() == State::Running))
        .cloned()
        .collect();
    for instance in launched {
        let peers = new_peers(instance, &others)?;
        if let Some(cluster) = &mut instance.record.spec.cluster {
            cluster.peers = peers;
        }
    }
    Ok(())
}

fn new_spec(request: &LaunchRequest, client_ca: &str, external_id: &Secret) -> Result<Spec> {
    let name = |text: &str, field: &str| -> Result<Name> {
        text.parse().map_err(|e| Error::BadInput(format!("{field}: {e}")))
    };
    let keys = request.keys.iter();
    let spec = Spec {
        version: SPEC_VERSION,
        generation: Generation::FIRST,
        instance: SpecInstance {
            id: name(&format!("i-{}", random_hex(8)?), "id")?,
            name: Some(name(&request.name, "name")?),
            ref_id: None,
        },
        cluster: match &request.cluster {
            Some(id) => Some(Cluster {
                id: name(id, "--cluster")?,
                peers: Vec::new(),
            }),
            None => None,
        },
        authorized_keys: keys
            .map(|key| AuthorizedKey {
                user: request.user.clone(),
                options: portcullis_protocol::KeyOptions::default(),
                key: key.clone(),
                expires: None,
            })
            .collect(),
        firewall: Firewall {
            ingress: request.rules.clone(),
            egress: Vec::new(),
        },
        control_plane: Some(ControlPlane {
            sources: GATEWAY.map(Into::into).to_vec(),
            client_ca: Some(client_ca.to_owned()),
            external_id: Some(external_id.clone()),
            report_url: None,
            enrol_url: None,
            enrolment_token: Some(Secret::new(random_hex(32)?)),
        }),
        storage: None,
    };
    // What the agent would refuse is refused here, with the same words.
    Spec::from_json(&spec.to_json()).map_err(|e| Error::BadInput(format!("{}: {e}", request.name)))
}

pub(super) fn random_hex(bytes: usize) -> Result<String> {
    let mut random = vec![0; bytes];
    ring::rand::SystemRandom::new()
        .fill(&mut random)
        .map_err(|_| Error::Failed("the system gives no random numbers".into()))?;
    Ok(to_hex(&random))
}

/// Lays out the instance's own layer: its name and cloud-init's seed.
fn prepare(instance: &Instance, options: &UserDataOptions) -> Result<()> {
    let (name, folder) = (instance.name(), &instance.folder);
    put(&folder.join("boot.sh"), BOOT_SCRIPT, 0o700)?;
    let root = folder.join("upper");
    put(&root.join("etc/hostname"), &format!("{name}\n"), 0o644)?;
    let hosts = format!("127.0.0.1 localhost\n127.0.1.1 {name}\n::1 localhost ip6-localhost\n");
    put(&root.join("etc/hosts"), &hosts, 0o644)?;
    if !instance.has_agent() {
        // The user-data starts the agent; without one, that must not make cloud-init fail.
        let unit = "[Service]\nType=oneshot\nExecStart=/bin/true\n";
        put(&root.join("etc/systemd/system/portcullis.service"), unit, 0o644)?;
    }
    let work = folder.join("work");
    fs::create_dir(&work).map_err(Error::file("make", &work))?;
    let seed = root.join("var/lib/cloud/seed/nocloud");
    let meta = serde_json::json!({"instance-id": instance.id(), "local-hostname": name});
    put(&seed.join("meta-data"), &meta.to_string(), 0o600)?;
    put(&seed.join("user-data"), &render(instance.spec(), options), 0o600)?;
    put(&seed.join("network-config"), &network_config(instance), 0o600)
}

fn network_config(instance: &Instance) -> String {
    let [v4, v6] = instance.addresses();
    let [gateway4, gateway6] = GATEWAY;
    serde_json::json!({
        "version": 2,
        "ethernets": {"eth0": {
            "dhcp4": false,
            "dhcp6": false,
            "accept-ra": false,
            "addresses": [format!("{v4}/24"), format!("{v6}/64")],
            "routes": [{"to": "0.0.0.0/0", "via": gateway4}, {"to": "::/0", "via": gateway6}],
        }},
    })
    .to_string()
}

/// Waits until systemd has done what was to be done at boot, cloud-init's part too.
pub(crate) fn wait_booted(instance: &Instance) -> Result<()> {
    let until = Instant::now() + BOOT_TIMEOUT;
    let mut state = String::from("not started");
    while Instant::now() < until {
        if instance.state() == State::Stopped {
            return Err(not_booted(instance, "it went off"));
        }
        if let Ok(output) = instance.exec(&["systemctl", "is-system-running"]) {
            format!("{}{}", output.stdout, output.stderr)
                .trim()
                .clone_into(&mut state);
            if state == "running" || state == "degraded" {
                return Ok(());
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Err(not_booted(
        instance,
        &format!("systemd still says {state:?} after {} s", BOOT_TIMEOUT.as_secs()),
    ))
}

fn not_booted(instance: &Instance, why: &str) -> Error {
    let console = instance.console_tail(12);
    Error::Failed(format!(
        "{} did not boot: {why}. Its console's last lines:\n{console}",
        instance.name()
    ))
}
