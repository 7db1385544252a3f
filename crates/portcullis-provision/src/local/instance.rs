//! A local instance: its record on disk, its processes, and what can be done with it.
//!
//! May not live here: how it is made (launch.rs) and where its image comes from (image.rs).

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use portcullis_protocol::{Peer, Report, Spec, UserName};
use serde::{Deserialize, Serialize};

use super::exec::{Output, capture, failure, tail};
use super::image::read_lossy;
use super::network::{Network, addresses, namespace_path};
use crate::ca::{ClientCertificate, write_private};
use crate::client::{AgentClient, ClientError, NamespaceDialer, PinnedIdentity, blocking};
use crate::userdata::SPEC_PATH;
use crate::{Error, Result};

/// The port of the agent's HTTPS API.
pub const AGENT_PORT: u16 = 7443;

/// Where programs are looked for inside an instance (and nsenter itself, out here).
const INSIDE_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is kept of an instance. The spec's secrets are in it: mode 0600.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    pub(crate) name: String,
    pub(crate) number: u8,
    pub(crate) user: UserName,
    pub(crate) layers: Vec<PathBuf>,
    pub(crate) agent: bool,
    pub(crate) created: jiff::Timestamp,
    pub(crate) spec: Spec,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) identity: Option<PinnedIdentity>,
    /// Whether the instance knows that it is pinned, and has forgotten its enrolment token.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) introduced: bool,
}

impl Record {
    /// The record in an instance's folder.
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("instance.json");
        let text = fs::read(&path).map_err(Error::file("read", &path))?;
        serde_json::from_slice(&text).map_err(|e| {
            Error::Failed(format!(
                "{}: {e}; `portcullisctl terminate` removes the instance",
                path.display()
            ))
        })
    }
}

/// Whether an instance runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Its first process is there.
    Running,
    /// It is off, or between two boots.
    Stopped,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
        })
    }
}

/// A process that can't be mistaken for a later one with the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    start_time: u64,
    /// How many times the instance was booted, up to this one.
    pub(crate) boots: u64,
}

impl Process {
    /// The process that a pid file names, if it still runs.
    pub(crate) fn read(path: &Path) -> Option<Self> {
        let text = fs::read_to_string(path).ok()?;
        let mut numbers = text.split_whitespace().map(str::parse::<u64>);
        let mut next = || numbers.next()?.ok();
        let (pid, start_time, boots) = (next()?, next()?, next()?);
        let process = Self {
            pid: u32::try_from(pid).ok()?,
            start_time,
            boots,
        };
        process.runs().then_some(process)
    }

    /// The process of that id, as it is now.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        Some(Self {
            pid,
            start_time: start_time(pid)?,
            boots: 0,
        })
    }

    pub(crate) fn runs(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }

    pub(crate) fn to_line(self) -> String {
        format!("{} {} {}\n", self.pid, self.start_time, self.boots)
    }

    /// Ends it at once and waits until it is gone (5 s at most).
    pub(crate) fn kill(&self) {
        let Ok(pid) = i32::try_from(self.pid) else { return };
        let until = Instant::now() + Duration::from_secs(5);
        while self.runs() && Instant::now() < until {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A process's start time since boot, in clock ticks (proc_pid_stat(5), field 22); `None` for one
/// that is over.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name (field 2) may hold anything, brackets and spaces too.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if state == "Z" || state == "X" {
        None
    } else {
        fields.nth(18)?.parse().ok()
    }
}

/// A local instance.
#[derive(Clone, Debug)]
pub struct Instance {
    pub(crate) folder: PathBuf,
    pub(crate) network: Network,
    pub(crate) record: Record,
}

impl Instance {
    pub(crate) fn load(folder: &Path, network: &Network) -> Result<Self> {
        Ok(Self {
            folder: folder.to_owned(),
            network: network.clone(),
            record: Record::read(folder)?,
        })
    }

    pub(crate) fn save(&self) -> Result<()> {
        let json = serde_json::to_string_pretty(&self.record)
            .map_err(|e| Error::Failed(format!("can't write the record of {}: {e}", self.record.name)))?;
        write_private(&self.folder.join("instance.json"), &json)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.record.name
    }

    /// Its id, as in its spec.
    pub fn id(&self) -> &str {
        self.record.spec.instance.id.as_str()
    }

    /// Its cluster's id, if it belongs to one.
    pub fn cluster(&self) -> Option<&str> {
        self.record
            .spec
            .cluster
            .as_ref()
            .map(|cluster| cluster.id.as_str())
    }

    /// The spec that was last given to it.
    pub fn spec(&self) -> &Spec {
        &self.record.spec
    }

    /// The user whose keys were given at launch.
    pub fn user(&self) -> &UserName {
        &self.record.user
    }

    /// Whether its image has the agent.
    pub fn has_agent(&self) -> bool {
        self.record.agent
    }

    /// Its IPv4 and IPv6 address.
    pub fn addresses(&self) -> [IpAddr; 2] {
        addresses(self.record.number)
    }

    /// The keys pinned at first contact, if there was one.
    pub fn identity(&self) -> Option<&PinnedIdentity> {
        self.record.identity.as_ref()
    }

    /// Path of its network namespace, for [`super::in_namespace`]. Another one after each boot.
    pub fn network_namespace(&self) -> PathBuf {
        namespace_path(&self.network.member(&self.record.name))
    }

    /// Whether it runs.
    pub fn state(&self) -> State {
        if self.process().is_some() {
            State::Running
        } else {
            State::Stopped
        }
    }

    /// Its PID 1 as the host sees it; `None` if it is off or between two boots.
    pub fn pid(&self) -> Option<u32> {
        self.process().map(|process| process.pid)
    }

    /// How many times it was booted; 0 if it is off.
    pub fn boots(&self) -> u64 {
        self.process().map_or(0, |process| process.boots)
    }

    pub(crate) fn process(&self) -> Option<Process> {
        Process::read(&self.folder.join("pid"))
    }

    /// The last lines of its console log.
    pub fn console_tail(&self, lines: usize) -> String {
        tail(&read_lossy(&self.folder.join("console.log")), lines)
    }

    /// Runs a program as root inside the instance, to its end, whatever its exit code.
    ///
    /// # Errors
    /// When the instance is off or the program can't be started.
    pub fn exec(&self, command: &[&str]) -> Result<Output> {
        self.exec_with_input(command, b"")
    }

    /// As [`Instance::exec`], with `input` on the program's standard input: the way for secrets,
    /// which must not be among the arguments.
    ///
    /// # Errors
    /// When the instance is off or the program can't be started.
    pub fn exec_with_input(&self, command: &[&str], input: &[u8]) -> Result<Output> {
        let Some(process) = self.process() else {
            return Err(Error::Failed(format!(
                "{} does not run:{}",
                self.record.name,
                self.console_hint()
            )));
        };
        let target = process.pid.to_string();
        let mut nsenter = Command::new("nsenter");
        nsenter
            .args(["--target", &target, "--all", "--"])
            .args(command)
            .env_clear()
            .envs([
                ("PATH", INSIDE_PATH),
                ("HOME", "/root"),
                ("USER", "root"),
                ("LANG", "C.UTF-8"),
            ]);
        capture(&mut nsenter, input)
    }

    /// As [`Instance::exec`], but the program has to succeed; gives its standard output.
    ///
    /// # Errors
    /// When it fails, with the end of its output.
    pub fn exec_ok(&self, command: &[&str]) -> Result<String> {
        let output = self.exec(command)?;
        if output.success() {
            return Ok(output.stdout);
        }
        Err(failure(
            format!("{}: {}", self.record.name, command.join(" ")),
            &output,
        ))
    }

    /// Puts a spec in place in the running instance, atomically and for root only, and keeps it in
    /// the record. The agent takes it up if its generation is higher than the accepted one.
    ///
    /// # Errors
    /// When the instance is off or the file can't be written there.
    pub fn write_spec(&mut self, spec: &Spec) -> Result<()> {
        const WRITE: &str = "umask 077; mkdir -p /etc/portcullis && new=$(mktemp /etc/portcullis/.spec.XXXXXX) \
            && cat > \"$new\" && sync \"$new\" && mv \"$new\" \"$0\"";
        let output = self.exec_with_input(&["sh", "-c", WRITE, SPEC_PATH], &spec.to_json())?;
        if !output.success() {
            return Err(failure(
                format!("{}: write {SPEC_PATH}", self.record.name),
                &output,
            ));
        }
        self.record.spec = spec.clone();
        self.save()
    }

    /// Gives it the next generation of its spec with other peers, if they differ.
    pub(crate) fn change_peers(&mut self, change: impl FnOnce(&mut Vec<Peer>)) -> Result<()> {
        let mut spec = self.record.spec.clone();
        let Some(cluster) = &mut spec.cluster else {
            return Ok(());
        };
        change(&mut cluster.peers);
        if spec == self.record.spec {
            return Ok(());
        }
        spec.generation = spec.generation.next();
        if self.state() == State::Running {
            return self.write_spec(&spec);
        }
        self.record.spec = spec;
        self.save()
    }

    /// It as its peers' specs name it.
    pub(crate) fn as_peer(&self) -> Result<Peer> {
        let addresses = self
            .addresses()
            .into_iter()
            .map(TryFrom::try_from)
            .collect::<Result<_, String>>();
        Ok(Peer {
            instance: self.record.spec.instance.id.clone(),
            addresses: addresses.map_err(Error::Failed)?,
        })
    }

    /// A client for the agent that dials from the control plane's side of the network, with the
    /// pin if there is one.
    ///
    /// # Errors
    /// When the certificate can't be used.
    pub fn client(&self, certificate: Option<&ClientCertificate>) -> Result<AgentClient> {
        let address = SocketAddr::new(self.addresses()[0], AGENT_PORT);
        let dialer = NamespaceDialer::new(self.network.path());
        let pin = self
            .record
            .identity
            .as_ref()
            .map(|identity| identity.tls_spki_sha256.clone());
        AgentClient::new(address, dialer, pin, certificate).map_err(|source| self.agent_error(source))
    }

    /// First contact: proves with the enrolment token whose keys they are, and pins them in the
    /// record. Does nothing if they are pinned already.
    ///
    /// # Errors
    /// When the agent does not answer, or its answer is not proven.
    pub fn pin(&mut self) -> Result<&PinnedIdentity> {
        if !self.record.introduced {
            self.introduce()?;
        }
        self.record
            .identity
            .as_ref()
            .ok_or_else(|| Error::Failed("the identity was not kept".into()))
    }

    /// First contact. The pin is kept before the instance is told of it: it forgets its token then, and nothing
    /// else would prove its keys. Once it is pinned, a failure to tell it is no failure to reach it; the next
    /// call tries again.
    fn introduce(&mut self) -> Result<()> {
        let client = self.client(None)?;
        let none = || Error::Failed(format!("{} has no enrolment token in its spec", self.record.name));
        let token = self.record.spec.enrolment_token().ok_or_else(none)?.clone();
        let contact = match blocking(client.first_contact(&token, self.id())) {
            Ok(contact) => contact,
            // It has forgotten it, or never knew it: another one may have told it, and the pin holds.
            Err(ClientError::Status { status: 404, .. }) if self.record.identity.is_some() => {
                self.record.introduced = true;
                return self.save();
            }
            Err(error) => return Err(self.agent_error(error)),
        };
        if self.record.identity.is_none() {
            self.record.identity = Some(contact.identity.clone());
            self.save()?;
        }
        if blocking(client.finish(&token, &contact)).is_ok() {
            self.record.introduced = true;
            self.save()?;
        }
        Ok(())
    }

    /// The agent's health report, over mutual TLS. Pins its keys first, if they are not yet.
    ///
    /// # Errors
    /// When the agent does not answer, is not who was pinned, or refuses the certificate.
    pub fn health(&mut self, certificate: &ClientCertificate) -> Result<Report> {
        self.pin()?;
        let client = self.client(Some(certificate))?;
        blocking(client.health()).map_err(|e| self.agent_error(e))
    }

    pub(crate) fn agent_error(&self, source: ClientError) -> Error {
        Error::Agent {
            name: self.record.name.clone(),
            source,
        }
    }

    fn console_hint(&self) -> String {
        match self.console_tail(5) {
            text if text.is_empty() => " its console log is empty".into(),
            text => format!("\n{text}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_that_another_process_has_now_is_stale() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        let own = Process::of(std::process::id()).unwrap();
        fs::write(&path, own.to_line()).unwrap();
        assert_eq!(Process::read(&path), Some(own));
        let other = Process {
            start_time: own.start_time + 1,
            ..own
        };
        fs::write(&path, other.to_line()).unwrap();
        assert_eq!(Process::read(&path), None);
        for wrong in ["", "1", "x 1 1", "-1 2 3", "99999999999 1 1"] {
            fs::write(&path, wrong).unwrap();
            assert_eq!(Process::read(&path), None, "{wrong}");
        }
    }
}
