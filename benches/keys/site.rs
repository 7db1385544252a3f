//! An instance with many users, keys for them, and a clock inside of it.
//!
//! May not live here: what is measured.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use portcullis::log::id;
use portcullis_protocol::{AuthorizedKey, Spec};
use ring::signature::{Ed25519KeyPair, KeyPair};

use crate::google;
use crate::lab::{Lab, Machine, SOON, eventually};

pub const USERS: usize = 100;
pub const KEYS_EACH: usize = 100;

/// Where a spec is handed over, inside.
const SPEC: &str = "/run/bench-spec.json";

pub struct Site {
    pub machine: Machine,
    pub lab: Lab,
}

/// When something happened inside, as time since 1970.
pub type Moment = Duration;

impl Site {
    pub fn new() -> Self {
        let lab = Lab::new();
        let mut request = lab.request("one", "c-1");
        request.image.packages = vec![google::PACKAGE.to_owned()];
        let overlay = lab.path("overlay");
        google::keep_from_starting(&overlay);
        request.image.overlay = Some(overlay);
        let machine = lab.launch_many(&[request]).remove(0);
        let names: Vec<String> = (0..USERS).map(user).collect();
        machine.ok(&format!(
            "for user in {}; do useradd --create-home --password '*' $user; done",
            names.join(" ")
        ));
        let site = Self { machine, lab };
        site.settle();
        site
    }

    /// What it is compared with.
    pub fn versions(&self) -> Vec<String> {
        let inside = |script: &str| self.machine.ok(script);
        let package = |name: &str| inside(&format!("dpkg-query -W -f '${{Package}} ${{Version}}' {name}"));
        vec![
            inside("sshd -V 2>&1 | grep OpenSSH | cut -d, -f1"),
            package("cloud-init"),
            package(google::PACKAGE),
        ]
    }

    /// Waits until looks because of files that changed are over: they come 0.8 s apart.
    pub fn settle(&self) {
        std::thread::sleep(Duration::from_secs(1));
        self.machine.status();
    }

    /// Runs a script inside: when it began and ended by the clock there.
    #[track_caller]
    pub fn timed(&self, script: &str) -> (Moment, Moment) {
        let said = self
            .machine
            .ok(&format!("date +%s%N\n({script}) >/dev/null\ndate +%s%N"));
        let mut lines = said
            .lines()
            .map(|line| Duration::from_nanos(line.parse().unwrap()));
        (lines.next().unwrap(), lines.next().unwrap())
    }

    #[track_caller]
    pub fn took(&self, script: &str) -> Duration {
        let (start, end) = self.timed(script);
        end - start
    }

    /// Makes these the keys of the next generation, by `portcullis apply`: when it began, and when it was over.
    pub fn apply(&mut self, keys: &[AuthorizedKey]) -> (Moment, Moment) {
        let spec: Spec = self.machine.next(|spec| spec.authorized_keys = keys.to_vec());
        self.machine.run_with(&format!("cat > {SPEC}"), &spec.to_json());
        let times = self.timed(&format!("portcullis apply --spec {SPEC}"));
        self.machine.spec = spec;
        times
    }

    /// When the last of so many key files was in its place, after a moment: the daemon's own words.
    pub fn written(&self, since: Moment, count: usize) -> Moment {
        let command = format!(
            "journalctl -q -o json --output-fields=USER,_SOURCE_REALTIME_TIMESTAMP --since=@{} MESSAGE_ID={}",
            since.as_secs(),
            id::KEYS_WRITTEN
        );
        let at = |entry: &serde_json::Value| {
            let micros = entry["_SOURCE_REALTIME_TIMESTAMP"].as_str().unwrap();
            Duration::from_micros(micros.parse().unwrap())
        };
        eventually(SOON, "key files are written", || {
            let said = self.machine.ok(&command);
            let entries = said.lines().map(|line| serde_json::from_str(line).unwrap());
            let times: Vec<Moment> = entries.map(|entry| at(&entry)).filter(|at| *at > since).collect();
            let last = times.iter().max().copied();
            last.filter(|_| times.len() == count).ok_or(times.len())
        })
    }

    /// From a change of a file to the report that was written after it.
    pub fn looked(&self, change: &str) -> Duration {
        self.settle();
        let (changed, _) = self.timed(change);
        let changed = Timestamp::from_nanosecond(i128::try_from(changed.as_nanos()).unwrap()).unwrap();
        eventually(SOON, "a look", || {
            let time = self.machine.status().time;
            if time > changed { Ok(time) } else { Err(time) }
        })
        .duration_since(changed)
        .try_into()
        .unwrap()
    }

    /// Each key file's inode and times.
    pub fn key_files(&self) -> BTreeMap<String, String> {
        let found = self
            .machine
            .ok("find /home/u?? -name authorized_keys -printf '%p %i %T@ %C@\\n'");
        let split = |line: &str| {
            let (path, state) = line.split_once(' ').unwrap();
            (path.to_owned(), state.to_owned())
        };
        found.lines().map(split).collect()
    }
}

/// The name of a user.
pub fn user(number: usize) -> String {
    format!("u{number:02}")
}

/// A valid key, of which nobody has the private half.
pub fn key(number: usize) -> String {
    let mut seed = [7; 32];
    seed[..8].copy_from_slice(&number.to_be_bytes());
    let pair = Ed25519KeyPair::from_seed_unchecked(&seed).unwrap();
    let mut blob = Vec::new();
    for part in [&b"ssh-ed25519"[..], pair.public_key().as_ref()] {
        blob.extend(u32::try_from(part.len()).unwrap().to_be_bytes());
        blob.extend(part);
    }
    format!("ssh-ed25519 {} key-{number}", STANDARD.encode(blob))
}

/// So many keys for each of so many users.
pub fn keys(users: usize, each: usize) -> Vec<AuthorizedKey> {
    let of = |number: usize| AuthorizedKey {
        user: user(number / each).parse().unwrap(),
        options: Default::default(),
        key: key(number).parse().unwrap(),
        expires: None,
    };
    (0..users * each).map(of).collect()
}
