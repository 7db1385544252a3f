//! A daemon in network and mount namespaces of its own, with a user, a home and sshd's settings that are not the
//! machine's, and a stranger who knocks at it.
//!
//! May not live here: faults, and what has to hold after them.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::chown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use portcullis::system::documents;
use portcullis_protocol::{Report, Spec};
use serde_json::json;

use crate::common::knock::{counters, while_knocking, witness};
use crate::common::table::as_held;
use crate::common::{Namespace, eventually, host_and_stranger};

/// How long a daemon may take to be there.
pub const START_TIME: Duration = Duration::from_secs(40);
const USER: &str = "faulty";
const UID: u32 = 64_711;

/// What is there to be broken.
pub struct Bench {
    pub host: Namespace,
    stranger: Namespace,
    folder: tempfile::TempDir,
    child: Option<Child>,
    keys: [String; 2],
}

/// What is seen of one state of the instance from outside of the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    pub table: String,
    pub key_file: String,
}

impl Bench {
    /// One without a daemon.
    pub fn new() -> Self {
        let (host, stranger) = host_and_stranger();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let settings = format!(
            "[paths]\nspec = \"{0}/injected.json\"\nstate = \"{0}/state\"\nsocket = \"{0}/control.sock\"\n",
            path.display()
        );
        fs::write(path.join("portcullis.toml"), settings).unwrap();
        let passwd = fs::read_to_string("/etc/passwd").unwrap();
        let passwd = format!("{passwd}{USER}:x:{UID}:{UID}::/home/{USER}:/bin/sh\n");
        fs::write(path.join("passwd"), passwd).unwrap();
        for name in ["home", "ssh", "home/faulty"] {
            fs::create_dir(path.join(name)).unwrap();
        }
        chown(path.join("home").join(USER), Some(UID), Some(UID)).unwrap();
        let ssh = path.join("ssh");
        fs::write(ssh.join("sshd_config"), "UsePAM no\n").unwrap();
        let new_key = |file: &Path| {
            let mut keygen = Command::new("ssh-keygen");
            keygen
                .args(["-q", "-t", "ed25519", "-C", "tester", "-N", "", "-f"])
                .arg(file);
            assert!(keygen.status().unwrap().success());
            fs::read_to_string(file.with_extension("pub"))
                .unwrap()
                .trim()
                .to_owned()
        };
        new_key(&ssh.join("ssh_host_ed25519_key"));
        let keys = ["a", "b"].map(|name| new_key(&path.join(name)));
        // Nothing may wait for an answer while it knocks.
        for address in ["10.9.0.1", "fd09::1"] {
            stranger.run(&format!("ping -q -c 3 -i 0.2 {address}"));
        }
        Self {
            host,
            stranger,
            folder,
            child: None,
            keys,
        }
    }

    /// One of its files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A spec that lets in SSH and what is knocked at as open. The other one lets in one thing more, and has
    /// another key.
    pub fn spec(&self, generation: u64, other: bool) -> Spec {
        let rule =
            |id: &str, protocol: &str, port: u16| json!({"id": id, "protocol": protocol, "from_port": port});
        let mut rules = vec![
            rule("ssh", "tcp", 22),
            rule("open", "tcp", 8080),
            rule("open-udp", "udp", 8080),
        ];
        if other {
            rules.push(rule("web", "tcp", 8081));
        }
        let spec = json!({
            "version": 1, "generation": generation, "instance": {"id": "i-1"},
            "authorized_keys": [{"user": USER, "key": self.keys[usize::from(other)]}],
            "firewall": {"ingress": rules},
            "control_plane": {"sources": ["10.9.0.2/32"], "report_url": "https://10.9.0.2:9/reports"},
        });
        Spec::from_json(spec.to_string().as_bytes()).unwrap()
    }

    /// Starts the daemon and waits for its report.
    pub fn start(&mut self) -> Report {
        self.spawn();
        self.until_answers()
    }

    /// Starts it.
    pub fn spawn(&mut self) {
        self.spawn_after("true");
    }

    /// Starts it up to the moment before the program: whoever traces it lets it go on.
    pub fn spawn_stopped(&mut self) {
        self.spawn_after("kill -STOP $$");
        let stat = format!("/proc/{}/stat", self.pid());
        eventually(START_TIME, "it waits", || {
            let said = fs::read_to_string(&stat).unwrap();
            let state = said.rsplit_once(") ").map(|(_, rest)| rest.chars().next());
            if state == Some(Some('T')) {
                Ok(())
            } else {
                Err(said)
            }
        });
    }

    fn spawn_after(&mut self, first: &str) {
        assert!(self.child.is_none(), "there is a daemon");
        let mounts = format!(
            "mount --bind $0/passwd /etc/passwd && mount --bind $0/home /home && \
             mount --bind $0/ssh /etc/ssh && {first} && exec $1 --config $0/portcullis.toml run"
        );
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .unwrap();
        let child = self
            .inside(&["unshare", "--mount", "sh", "-c", &mounts])
            .arg(self.folder.path())
            .arg(env!("CARGO_BIN_EXE_portcullis"))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    /// Waits until the daemon answers. It must not have ended.
    pub fn until_answers(&mut self) -> Report {
        eventually(START_TIME, "the daemon answers", || {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "the daemon ended, {ended:?}: {}", self.log());
            self.status().ok_or_else(|| self.log())
        })
    }

    /// Its report, if it answers. Not ready is an answer too: no sshd runs here.
    pub fn status(&self) -> Option<Report> {
        let said = self.portcullis(&["status", "--format", "json"], b"");
        serde_json::from_slice(&said.stdout).ok()
    }

    /// One of the program's commands, with something on its standard input; it has half a minute.
    pub fn portcullis(&self, arguments: &[&str], input: &[u8]) -> Output {
        let file = self.path("input");
        fs::write(&file, input).unwrap();
        self.inside(&["timeout", "30", env!("CARGO_BIN_EXE_portcullis"), "--config"])
            .arg(self.path("portcullis.toml"))
            .args(arguments)
            .stdin(fs::File::open(&file).unwrap())
            .output()
            .unwrap()
    }

    /// The gate before the network, as a boot makes it: without a table of ours, by what is on disk.
    pub fn lockdown(&self) {
        // For a moment after its end, the kernel may still hold the table for the daemon before.
        eventually(START_TIME, "a gate as lockdown makes it", || {
            let _ = self
                .inside(&["nft", "delete", "table", "inet", "portcullis"])
                .output();
            let said = self.portcullis(&["lockdown"], b"");
            if said.status.success() { Ok(()) } else { Err(said) }
        });
    }

    /// A command inside of its network.
    pub fn inside(&self, words: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", self.host.name()]).args(words);
        command
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Ends it, without a word.
    pub fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        self.until_alone();
    }

    /// It was killed while it was traced: who traced it, in this process too, has waited for its end.
    pub fn was_killed(&mut self) {
        let mut killed = self.child.take().unwrap();
        assert!(!Path::new(&format!("/proc/{}", killed.id())).exists());
        assert!(killed.wait().is_err(), "nobody has waited for it");
        self.until_alone();
    }

    /// A program that it had just begun to start holds what it had open for a moment more, until it is that program.
    fn until_alone(&self) {
        let socket = self.path("control.sock");
        eventually(START_TIME, "nobody listens", || {
            match UnixStream::connect(&socket) {
                Ok(_) => Err("somebody does"),
                Err(_) => Ok(()),
            }
        });
    }

    /// The spec that is accepted, on disk.
    pub fn accepted(&self) -> Spec {
        let bytes = fs::read(self.path("state/spec.json")).unwrap();
        Spec::from_json(documents::content(&bytes).unwrap()).unwrap()
    }

    /// The gate and the key file as they are.
    pub fn look(&self) -> Look {
        Look {
            table: self.table(),
            key_file: fs::read_to_string(self.path("home/faulty/.ssh/authorized_keys")).unwrap_or_default(),
        }
    }

    /// The gate as the kernel holds it, without the counters' numbers and without who owns it; empty if there is
    /// none.
    pub fn table(&self) -> String {
        let listed = self
            .inside(&["nft", "-s", "list", "table", "inet", "portcullis"])
            .output()
            .unwrap();
        as_held(&String::from_utf8(listed.stdout).unwrap())
    }

    /// What the daemons of this bench have logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    /// Counts in the kernel what comes and what passes, from now on.
    pub fn witness(&self) {
        fs::write(self.path("witness"), witness()).unwrap();
        self.host
            .run(&format!("nft -f {}", self.path("witness").display()));
    }

    /// Does something while the stranger knocks without pause.
    pub fn while_knocking<T>(&self, act: impl FnOnce() -> T) -> T {
        let both =
            |last: &str| [format!("10.9.0.{last}"), format!("fd09::{last}")].map(|a| a.parse().unwrap());
        let stranger = &self.stranger;
        let enter = |knock: &(dyn Fn() -> u16 + Sync)| stranger.enter(knock);
        while_knocking(enter, both("2"), both("1"), act)
    }

    /// Nothing passed that no spec lets in; all passed that each of them does. Gives how many packets were kept
    /// out and let in.
    #[track_caller]
    pub fn was_never_open(&self) -> [u64; 2] {
        let counter = counters(&self.host.run("nft -j list counters table inet witness"));
        for family in ["ipv4", "ipv6"] {
            let of = |what: &str| counter(&format!("{what}_{family}"));
            assert_eq!(
                of("passed_open"),
                of("arrived_open"),
                "what was let in, over {family}"
            );
        }
        self.let_nothing_else_in()
    }

    /// As [`Self::was_never_open`], where there was not always a spec.
    #[track_caller]
    pub fn let_nothing_else_in(&self) -> [u64; 2] {
        let counter = counters(&self.host.run("nft -j list counters table inet witness"));
        for family in ["ipv4", "ipv6"] {
            let of = |what: &str| counter(&format!("{what}_{family}"));
            assert_eq!(of("passed_closed"), 0, "packets passed over {family}");
            assert!(of("passed_open") > 0, "nothing was let in over {family}");
            assert!(of("arrived_closed") > 100 && of("arrived_open") > 100, "{family}");
        }
        ["arrived_closed", "passed_open"]
            .map(|what| counter(&format!("{what}_ipv4")) + counter(&format!("{what}_ipv6")))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
