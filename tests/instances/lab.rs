//! A laboratory: a provider with a state of its own, instances that are ready, strangers, and ways to
//! ask them.
//!
//! May not live here: guarantees. Those are in the tests.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use portcullis::system::documents;
use portcullis_protocol::{Check, CheckId, FirewallRule, PublicKey, Report, Spec, Status};
use portcullis_provision::local::{
    ImageRequest, Instance, LaunchRequest, LocalProvider, Output, Outsider, parse_allow,
};
use portcullis_provision::progress::Quiet;
use portcullis_provision::reach::{Reached, Target, Transport, Vantage, measure};
use portcullis_provision::userdata::UserDataOptions;
use portcullis_provision::wait::wait;
use serde_json::Value;

pub use crate::common::eventually;
use crate::common::table::as_held;

/// The user whose keys are injected.
pub const USER: &str = "ubuntu";

/// How long anything may take that takes well under a second on an idle machine.
pub const SOON: Duration = Duration::from_secs(10);

/// How long an instance may take to be proven ready after it booted.
pub const READY_TIME: Duration = Duration::from_secs(30);

/// The agent's package: the one that `PORTCULLIS_TEST_DEB` names, else the newest that was made.
fn package() -> PathBuf {
    if let Some(named) = std::env::var_os("PORTCULLIS_TEST_DEB") {
        let named = PathBuf::from(named);
        assert!(
            named.is_file(),
            "PORTCULLIS_TEST_DEB: {} is no file",
            named.display()
        );
        return named;
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/debian");
    let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
    let debs = entries.map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("portcullis_") && name.ends_with(".deb")
    });
    debs.max_by_key(|path| fs::metadata(path).and_then(|data| data.modified()).ok())
        .unwrap_or_else(|| panic!("no package in {}: run `make deb`", folder.display()))
}

/// Instances of one test and its network; all of it is gone when this is dropped.
pub struct Lab {
    pub provider: LocalProvider,
    folder: tempfile::TempDir,
}

impl Lab {
    pub fn new() -> Self {
        let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/local");
        fs::create_dir_all(&shared).unwrap();
        let folder = tempfile::Builder::new()
            .prefix("test-")
            .tempdir_in(&shared)
            .unwrap();
        let provider = LocalProvider::open(folder.path()).unwrap().with_images(shared);
        let lab = Self { provider, folder };
        lab.new_key("id");
        lab
    }

    /// A path of this lab's own.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A fresh key pair in [`Lab::path`]`(name)`.
    pub fn new_key(&self, name: &str) -> PublicKey {
        let file = self.path(name);
        host("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"])
            .arg(&file)
            .succeed();
        self.public_key(name)
    }

    pub fn public_key(&self, name: &str) -> PublicKey {
        let text = fs::read_to_string(self.path(&format!("{name}.pub"))).unwrap();
        text.trim().parse().unwrap()
    }

    /// What is asked for unless a test wants something else: SSH from anywhere with the lab's key.
    pub fn request(&self, name: &str, cluster: &str) -> LaunchRequest {
        LaunchRequest {
            name: name.into(),
            cluster: Some(cluster.into()),
            user: USER.parse().unwrap(),
            keys: vec![self.public_key("id")],
            rules: vec![allow("22/tcp")],
            user_data: UserDataOptions::default(),
            image: ImageRequest {
                deb: Some(package()),
                ..ImageRequest::default()
            },
        }
    }

    /// Launches them and waits until each is proven ready.
    pub fn launch_many(&self, requests: &[LaunchRequest]) -> Vec<Machine> {
        let instances = self.provider.launch_many(requests, &Quiet).unwrap();
        let machines = instances.into_iter().map(|instance| {
            wait(&self.provider, instance.name(), READY_TIME, &Quiet).unwrap();
            // The record has the pinned identity now.
            let machine = self.machine(instance.name());
            // Ready comes before the end of the boot, and cloud-init restarts sshd once more.
            machine.run("systemctl is-system-running --wait");
            machine.until_ready();
            machine
        });
        machines.collect()
    }

    /// One instance, ready.
    pub fn launch(&self) -> Machine {
        self.launch_many(&[self.request("one", "c-1")]).remove(0)
    }

    pub fn machine(&self, name: &str) -> Machine {
        let instance = self.provider.get(name).unwrap();
        let spec = instance.spec().clone();
        Machine { instance, spec }
    }

    pub fn stranger(&self) -> Outsider {
        self.provider.outsider("stranger").unwrap()
    }

    /// A stranger knows an instance that boots by its link, before it has told its addresses to anybody.
    /// The instance, and its link as ip-link(8) shows it in JSON.
    pub fn introduce(&self, stranger: &Outsider, name: &str) -> (Instance, Value) {
        let (instance, link) = eventually(SOON, "a link", || {
            let instance = self.provider.get(name).map_err(|e| e.to_string())?;
            let shown = inside(&instance.network_namespace(), "ip")
                .args(["-j", "link", "show", "eth0"])
                .output_text();
            let links: Value = serde_json::from_str(&shown.stdout).map_err(|e| format!("{e}: {shown:?}"))?;
            match links[0].clone() {
                Value::Null => Err("no eth0".to_owned()),
                link => Ok((instance, link)),
            }
        });
        let mac = link["address"].as_str().unwrap();
        for address in instance.addresses() {
            inside(&stranger.path(), "ip")
                .args(["neigh", "replace", &address.to_string(), "lladdr", mac])
                .args(["dev", "eth0", "nud", "permanent"])
                .succeed();
        }
        (instance, link)
    }

    /// A command of this machine, run inside the provider's namespace: where the control plane is.
    pub fn beside(&self, program: &str) -> Command {
        inside(&self.provider.network().path(), program)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = self.provider.terminate_all() {
            eprintln!("not all is taken down: {error}");
        }
    }
}

/// A running instance with the agent, and the spec that it should have.
pub struct Machine {
    pub instance: Instance,
    pub spec: Spec,
}

impl Machine {
    /// Runs a shell script as root inside, whatever its exit code.
    pub fn run(&self, script: &str) -> Output {
        self.run_with(script, b"")
    }

    /// As [`Machine::run`], with something on its standard input.
    pub fn run_with(&self, script: &str, input: &[u8]) -> Output {
        let limited = ["timeout", "60", "sh", "-c", script];
        self.instance.exec_with_input(&limited, input).unwrap()
    }

    /// Runs a shell script as root inside that has to succeed; its output without the line end.
    #[track_caller]
    pub fn ok(&self, script: &str) -> String {
        let output = self.run(script);
        assert!(output.success(), "{script}\n{output:#?}");
        output.stdout.trim_end().to_owned()
    }

    /// The daemon's report, if it answers.
    pub fn try_status(&self) -> Result<Report, String> {
        let output = self.run("portcullis status --format json");
        serde_json::from_str(&output.stdout).map_err(|e| format!("{e}: {output:?}"))
    }

    #[track_caller]
    pub fn status(&self) -> Report {
        self.try_status().unwrap()
    }

    /// Waits until the daemon says that it is ready.
    #[track_caller]
    pub fn until_ready(&self) -> Report {
        eventually(READY_TIME, "ready", || {
            let report = self.try_status()?;
            if report.ready {
                return Ok(report);
            }
            Err(format!("{:#?}", report.blocking().collect::<Vec<_>>()))
        })
    }

    /// Waits until a check of the daemon's report has a status.
    #[track_caller]
    pub fn until_check(&self, id: CheckId, status: Status) -> Check {
        eventually(SOON, &format!("{id} is {status}"), || {
            let report = self.try_status()?;
            let check = report.check(id).ok_or("it is not there")?;
            if check.status == status {
                Ok(check.clone())
            } else {
                Err(format!("{check:?}"))
            }
        })
    }

    /// The next generation of the spec, changed; nobody is told of it yet.
    pub fn next(&self, change: impl FnOnce(&mut Spec)) -> Spec {
        let mut spec = self.spec.clone();
        spec.generation = spec.generation.next();
        change(&mut spec);
        spec
    }

    /// Puts the next generation of the spec file in place and waits until the daemon has it.
    #[track_caller]
    pub fn push(&mut self, change: impl FnOnce(&mut Spec)) -> Report {
        let spec = self.next(change);
        self.instance.write_spec(&spec).unwrap();
        self.spec = spec;
        self.until_generation(self.spec.generation.get())
    }

    #[track_caller]
    pub fn until_generation(&self, generation: u64) -> Report {
        eventually(SOON, &format!("generation {generation}"), || {
            let report = self.try_status()?;
            if report.generation == Some(generation) {
                Ok(report)
            } else {
                Err(format!("{:?} {:?}", report.generation, report.refused_spec))
            }
        })
    }

    /// `portcullis apply`, and the spec is ours if it was taken.
    pub fn apply(&mut self, spec: &Spec) -> Output {
        let output = self.run_with("portcullis apply --spec -", &spec.to_json());
        if output.success() {
            self.spec = spec.clone();
        }
        output
    }

    /// Our table as the kernel holds it, without the counters' numbers and without who owns it.
    #[track_caller]
    pub fn table(&self) -> String {
        as_held(&self.ok("nft -s list table inet portcullis"))
    }

    /// Changes a setting of the image and restarts the daemon.
    pub fn set(&self, section: &str, setting: &str) {
        self.ok(&format!(
            "printf '[{section}]\\n{setting}\\n' > /etc/portcullis/conf.d/test.toml; systemctl restart portcullis"
        ));
    }

    /// The daemon's process id as systemd knows it.
    #[track_caller]
    pub fn main_pid(&self) -> u32 {
        let pid = self.ok("systemctl show -P MainPID portcullis");
        pid.parse().unwrap()
    }

    /// A property of a unit.
    #[track_caller]
    pub fn unit(&self, unit: &str, property: &str) -> String {
        self.ok(&format!("systemctl show -P {property} {unit}"))
    }

    pub fn v4(&self) -> IpAddr {
        self.instance.addresses()[0]
    }

    /// What this machine's port is, seen from somewhere, over IPv4 and IPv6.
    pub fn seen_from(&self, from: &Vantage, transport: Transport, port: u16) -> [Reached; 2] {
        let targets = self.instance.addresses().map(|ip| Target {
            transport,
            address: SocketAddr::new(ip, port),
        });
        let seen = measure(&targets.map(|target| (from.clone(), target))).unwrap();
        [seen[0], seen[1]]
    }

    pub fn vantage(&self) -> Vantage {
        Vantage {
            label: self.instance.name().into(),
            namespace: self.instance.network_namespace(),
        }
    }
}

/// From where a stranger probes.
pub fn vantage(stranger: &Outsider) -> Vantage {
    Vantage {
        label: "stranger".into(),
        namespace: stranger.path(),
    }
}

/// The file in which a launched instance keeps a spec: its token was used.
pub fn accepted(spec: &Spec) -> String {
    let mut spec = spec.clone();
    spec.control_plane.as_mut().unwrap().enrolment_token = None;
    let document = documents::enclose(&spec.to_json());
    String::from_utf8(document).unwrap().trim_end().to_owned()
}

pub fn allow(text: &str) -> FirewallRule {
    parse_allow(text).unwrap()
}

/// A command of this machine, with a time limit.
pub fn host(program: &str) -> Command {
    let mut command = Command::new("timeout");
    command.args(["60", program]);
    command
}

/// A command of this machine, run inside a network namespace, with a time limit.
pub fn inside(namespace: &Path, program: &str) -> Command {
    let mut command = host("nsenter");
    command.arg(format!("--net={}", namespace.display()));
    command.args(["--", program]);
    command
}

/// Running a command to its end.
pub trait Run {
    /// Whatever its exit code.
    fn output_text(&mut self) -> Output;
    /// It has to succeed; its standard output.
    fn succeed(&mut self) -> String;
}

impl Run for Command {
    fn output_text(&mut self) -> Output {
        let output = self.stdin(std::process::Stdio::null()).output().unwrap();
        Output {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    #[track_caller]
    fn succeed(&mut self) -> String {
        let output = self.output_text();
        assert!(output.success(), "{self:?}: {output:#?}");
        output.stdout
    }
}

/// How fast is scanned.
#[derive(Clone, Copy)]
pub enum Pace {
    /// For ports that mostly do not answer: as many probes a second as the time for 65,535 asks for.
    Unanswered,
    /// For ports that mostly do: as many as the answers allow.
    Careful,
}

/// All open TCP ports of an address, as nmap sees them from inside a namespace.
pub fn scan(from: &Path, address: IpAddr, pace: Pace) -> BTreeSet<u16> {
    let mut nmap = inside(from, "nmap");
    nmap.args(["-Pn", "-n", "-sS", "-p", "1-65535", "--max-retries"]);
    match pace {
        Pace::Unanswered => nmap.args(["1", "--min-rate", "15000"]),
        Pace::Careful => nmap.arg("5"),
    };
    if address.is_ipv6() {
        nmap.arg("-6");
    }
    let said = nmap.args(["-oG", "-", &address.to_string()]).succeed();
    assert!(said.contains("1 host up"), "{said}");
    let lists = said.lines().filter_map(|line| line.split_once("Ports: "));
    let entries = lists.flat_map(|(_, list)| list.split(", "));
    let open = entries.filter_map(|entry| entry.split_once("/open/"));
    open.map(|(port, _)| port.trim().parse().unwrap()).collect()
}
