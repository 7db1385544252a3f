//! The hunter of secrets: known words, looked for wherever somebody else could see them.
//!
//! May not live here: how secrets get onto an instance (`secrets`, `memory`).

use std::collections::{BTreeMap, BTreeSet};

use crate::lab::{Machine, SOON, eventually};
use crate::receiver::put;

/// Not a secret: what a test puts into each place to see that it would be found.
pub const CONTROL: &str = "control-word-that-is-found";

/// Tells which known words are in a process' memory, and in which mapping.
const IN_MEMORY: &str = r#"
import sys
known = [line.rstrip(b"\n") for line in open("/run/hunt/patterns", "rb")]
with open(f"/proc/{sys.argv[1]}/maps") as maps, open(f"/proc/{sys.argv[1]}/mem", "rb", 0) as memory:
    for line in maps:
        words = line.split(None, 5)
        place = words[5].strip() if len(words) > 5 else "anonymous"
        if not words[1].startswith("r") or place.startswith(("[vvar", "[vsyscall")):
            continue
        start, end = (int(part, 16) for part in words[0].split("-"))
        held = b""
        try:
            memory.seek(start)
            while start + len(held) < end:
                more = memory.read(end - start - len(held))
                if not more:
                    break
                held += more
        except OSError:
            pass  # The end of a file that is mapped further.
        for number, word in enumerate(known):
            if word in held:
                print(number, held.count(word), place)
"#;

/// What is looked for, by name.
pub struct Hunt<'a> {
    pub machine: &'a Machine,
    known: Vec<(&'static str, String)>,
    /// When the instance was made, in seconds since 1970.
    since: String,
}

impl<'a> Hunt<'a> {
    pub fn new(machine: &'a Machine, mut known: Vec<(&'static str, String)>) -> Self {
        known.push(("control", CONTROL.to_owned()));
        assert!(known.iter().all(|(_, secret)| secret.len() > 20), "{known:?}");
        let since = machine.ok("stat -c %Z /var/lib/cloud/seed/nocloud/user-data");
        let hunt = Self {
            machine,
            known,
            since,
        };
        hunt.patterns("patterns", |_| true);
        hunt.patterns("secrets", |name| name != "control");
        put(machine, "../../run/hunt/in-memory", "600", IN_MEMORY);
        hunt
    }

    /// A file for `grep -f`, for root alone.
    fn patterns(&self, file: &str, wanted: impl Fn(&str) -> bool) {
        let chosen = self.known.iter().filter(|(name, _)| wanted(name));
        let lines: Vec<&str> = chosen.map(|(_, secret)| secret.as_str()).collect();
        let script = format!("umask 077; mkdir -p /run/hunt; cat > /run/hunt/{file}");
        let output = self
            .machine
            .run_with(&script, (lines.join("\n") + "\n").as_bytes());
        assert!(output.success(), "{output:?}");
    }

    /// The names of what is in a text.
    pub fn in_text(&self, text: &str) -> BTreeSet<&'static str> {
        let found = self.known.iter().filter(|(_, secret)| text.contains(secret));
        found.map(|(name, _)| *name).collect()
    }

    /// The control is in it, and no secret.
    #[track_caller]
    pub fn only_control(&self, place: &str, text: &str) {
        assert_eq!(self.in_text(text), BTreeSet::from(["control"]), "{place}");
    }

    /// All files on all file systems that were written since the instance was made and that hold any of it, with
    /// mode and owner.
    pub fn in_files(&self) -> Vec<String> {
        let listed = self.machine.run(&format!(
            "find / \\( -path /proc -o -path /sys -o -path /dev -o -path /run/hunt \\) -prune -o \\
                -type f -newerct @{} -print0 | xargs -0 -r grep -laF -f /run/hunt/patterns | xargs -r stat -c '%a %U %n'",
            self.since
        ));
        listed.stdout.lines().map(str::to_owned).collect()
    }

    /// The names of the secrets that are in a file.
    pub fn secrets_of(&self, path: &str) -> BTreeSet<&'static str> {
        let script = format!("grep -aohF -f /run/hunt/secrets '{path}'");
        self.in_text(&self.machine.run(&script).stdout)
    }

    /// The names of what is in a unit's memory, with where it is.
    #[track_caller]
    pub fn in_memory(&self, unit: &str) -> BTreeMap<&'static str, Vec<String>> {
        let pid = self.machine.unit(unit, "MainPID");
        let found = self.machine.ok(&format!("python3 /run/hunt/in-memory {pid}"));
        let mut places: BTreeMap<&'static str, Vec<String>> = BTreeMap::new();
        for line in found.lines() {
            let (number, place) = line.split_once(' ').unwrap();
            let (name, _) = self.known[number.parse::<usize>().unwrap()];
            places.entry(name).or_default().push(place.to_owned());
        }
        places
    }

    /// Looks at the arguments and the environment of every process, again and again, and keeps what it finds.
    pub fn watch_processes(&self) {
        let script = "while :; do grep -aoHF -f /run/hunt/patterns /proc/[0-9]*/cmdline /proc/[0-9]*/environ >> /run/hunt/seen; \
                      echo >> /run/hunt/rounds; sleep 0.05; done";
        put(self.machine, "../../run/hunt/watch", "600", script);
        self.machine
            .ok("systemd-run --quiet --unit=hunt sh /run/hunt/watch");
        eventually(SOON, "a first round", || {
            match self.machine.run("cat /run/hunt/rounds").stdout.len() {
                0 => Err("none"),
                _ => Ok(()),
            }
        });
    }
}
