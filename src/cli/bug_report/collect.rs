//! Gathering what a bug report holds. Each part is asked for by itself: one that fails is one that is missing.
//!
//! May not live here: taking secrets out, the archive.

mod kernel;
mod logs;

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::{FailureNote, secrets};
use crate::agent::state::Store;
use crate::cli::Global;
use crate::config::{DEFAULT_FILE, Settings};
use crate::policy::redaction::{Redactor, without_comments_and_secrets};
use crate::system::command::{ask_within, said};
use crate::system::{archive, files};

/// How long one program may take; a machine in trouble is slow.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest part, in bytes; of a longer one the end is kept.
const MAX_PART: usize = 2 << 20;
/// Largest file of settings or state that is read.
const MAX_FILE: usize = 4 << 20;

/// A file of the bundle.
pub struct Entry {
    /// Its name.
    pub name: String,
    /// What it is, for people.
    pub what: String,
    /// Its content, without secrets.
    pub text: String,
    /// How many secrets were in it.
    pub removed: usize,
    /// Whether it was longer.
    pub shortened: bool,
}

/// What was had.
pub struct Gathered {
    /// Which instance, fit for a file's name.
    pub instance: String,
    /// The files, in the order of their names.
    pub entries: Vec<Entry>,
    /// What could not be had.
    pub failures: Vec<FailureNote>,
    /// Takes secrets out, before anything is cut: half a secret would not be found.
    redactor: Redactor,
}

impl Gathered {
    fn text(&mut self, name: &str, what: &str, text: Result<String, String>) {
        match text {
            Ok(text) => {
                let (text, removed) = self.redactor.clean(&text);
                let (text, shortened) = the_end(text);
                self.entries.push(Entry {
                    name: name.to_owned(),
                    what: what.to_owned(),
                    text,
                    removed,
                    shortened,
                });
            }
            Err(reason) => self.failed(what, reason),
        }
    }

    fn json(&mut self, name: &str, what: &str, document: Result<Value, String>) {
        let text = document.and_then(|mut document| {
            without_comments_and_secrets(&mut document);
            serde_json::to_string_pretty(&document).map_err(|e| e.to_string())
        });
        self.text(name, what, text);
    }

    fn failed(&mut self, what: &str, reason: impl Into<String>) {
        let (reason, _) = self.redactor.clean(&reason.into());
        let what = what.to_owned();
        self.failures.push(FailureNote { what, reason });
    }
}

/// The end of a long text, from the beginning of a line.
fn the_end(text: String) -> (String, bool) {
    if text.len() <= MAX_PART {
        return (text, false);
    }
    let mut at = text.len() - MAX_PART;
    while !text.is_char_boundary(at) {
        at += 1;
    }
    let end = &text[at..];
    let end = end.split_once('\n').map_or(end, |(_, lines)| lines);
    (end.to_owned(), true)
}

/// Gathers all of it; `problem` is why these settings are not the instance's own.
pub async fn all(global: &Global, settings: &Settings, problem: Option<&str>) -> Gathered {
    let mut gathered = Gathered {
        instance: "instance".to_owned(),
        entries: Vec::new(),
        failures: Vec::new(),
        redactor: secrets::known(settings, &settings_files(global)),
    };
    if let Some(problem) = problem {
        gathered.failed("settings", format!("the defaults are assumed here: {problem}"));
    }
    agent(&mut gathered, global, problem.is_some()).await;
    specs(&mut gathered, settings);
    configuration(&mut gathered, global);
    gathered.json("versions.json", "versions of what is involved", versions().await);
    kernel::gate(&mut gathered, settings).await;
    logs::journal(&mut gathered).await;
    logs::audit(&mut gathered, settings);
    logs::units(&mut gathered).await;
    gathered.json(
        "storage.json",
        "room on disks, and the state folder's files by size",
        storage(settings),
    );
    for (name, what, program, arguments) in SYSTEM {
        if let Some(program) = find(program) {
            gathered.text(name, what, told(&program, arguments).await);
        }
    }
    gathered.entries.sort_by(|a, b| a.name.cmp(&b.name));
    gathered
}

type Asked = (&'static str, &'static str, &'static str, &'static [&'static str]);

/// What other programs are asked for; one that is not installed is left out.
const SYSTEM: [Asked; 7] = [
    (
        "addresses.txt",
        "interfaces and addresses",
        "ip",
        &["address", "show"],
    ),
    (
        "routes.txt",
        "routes of all tables",
        "ip",
        &["route", "show", "table", "all"],
    ),
    (
        "listeners.txt",
        "listening sockets and their programs",
        "ss",
        &["-ltnup"],
    ),
    (
        "clock.txt",
        "the clock and who sets it",
        "timedatectl",
        &["show", "--all"],
    ),
    ("sshd.txt", "sshd's effective configuration", "sshd", &["-T"]),
    (
        "cloud-init.txt",
        "how far cloud-init got",
        "cloud-init",
        &["status", "--long"],
    ),
    ("mounts.txt", "mounted file systems", "findmnt", &["--df"]),
];

/// What the agent says of itself, from its own commands: they know what to do without a daemon.
async fn agent(gathered: &mut Gathered, global: &Global, with_defaults: bool) {
    let own = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/usr/bin/portcullis"));
    let mut places: Vec<String> = Vec::new();
    // The instance's own settings would be refused.
    let config = match with_defaults {
        true => {
            places.push("--default-settings".to_owned());
            &None
        }
        false => &global.config,
    };
    for (name, path) in [("--config", config), ("--socket", &global.socket)] {
        if let Some(path) = path {
            places.extend([name.to_owned(), path.display().to_string()]);
        }
    }
    let with = |words: &[&str]| {
        let words = words.iter().map(|word| (*word).to_owned());
        words.chain(places.iter().cloned()).collect::<Vec<String>>()
    };
    let report = document(&own, &with(&["status", "--format", "json"])).await;
    if let Some(id) = report.as_ref().ok().and_then(instance_of) {
        gathered.instance = id;
    }
    let has_daemon = report.as_ref().is_ok_and(|report| report.get("daemon").is_none());
    let what = match has_daemon {
        true => "the health report, as the daemon has it",
        false => "what can be said without the daemon",
    };
    gathered.json("report.json", what, report);
    let status = told_whatever_it_means(&own, &with(&["status"])).await;
    gathered.text("status.txt", "`portcullis status`", status);
    // The daemon's word and a look of our own may differ; that is worth knowing.
    let check = document(&own, &with(&["check", "--format", "json"])).await;
    gathered.json(
        "check.json",
        "`portcullis check`: a look at everything, made now",
        check,
    );
}

fn instance_of(report: &Value) -> Option<String> {
    let id = report
        .pointer("/instance/id")
        .or_else(|| report.get("instance"))?
        .as_str()?;
    let fit = |c: char| {
        if c.is_ascii_alphanumeric() || ".-".contains(c) {
            c
        } else {
            '_'
        }
    };
    let id: String = id.chars().take(64).map(fit).collect();
    (!id.is_empty()).then_some(id)
}

fn specs(gathered: &mut Gathered, settings: &Settings) {
    let store = Store::new(&settings.state_dir);
    let accepted = store.spec().map_err(|e| e.to_string());
    let trial = match &accepted {
        Ok(spec) => store.trial(spec.as_ref()).map_err(|e| e.to_string()),
        Err(_) => Ok(None),
    };
    match accepted {
        Ok(Some(spec)) => gathered.json(
            "spec.json",
            "the accepted spec",
            serde_json::to_value(spec.without_secrets()).map_err(|e| e.to_string()),
        ),
        Ok(None) => gathered.failed("the accepted spec", "there is none yet"),
        Err(reason) => gathered.failed("the accepted spec", reason),
    }
    match trial {
        Ok(Some(trial)) => gathered.json(
            "trial.json",
            "the spec on trial",
            serde_json::to_value(trial.spec.without_secrets()).map_err(|e| e.to_string()),
        ),
        Ok(None) => {}
        Err(reason) => gathered.failed("the spec on trial", reason),
    }
}

/// The files of the settings, whether they can be used or not.
fn settings_files(global: &Global) -> Vec<PathBuf> {
    let main = global.config.as_deref().unwrap_or(Path::new(DEFAULT_FILE));
    let folder = main.parent().unwrap_or(Path::new("/")).join("conf.d");
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|end| end == "toml"));
    files.sort();
    files.insert(0, main.to_owned());
    files
}

/// The settings as values: comments in the files are whoever's who wrote them.
fn configuration(gathered: &mut Gathered, global: &Global) {
    let mut read = Map::new();
    for file in settings_files(global) {
        let name = file.display().to_string();
        match settings_of(&file) {
            Ok(Some(settings)) => {
                read.insert(name, settings);
            }
            Ok(None) => {}
            Err(reason) => gathered.failed(&name, reason),
        }
    }
    gathered.json(
        "settings.json",
        "the settings of each file",
        Ok(Value::Object(read)),
    );
}

fn settings_of(file: &Path) -> Result<Option<Value>, String> {
    let Some(bytes) = files::read(file, MAX_FILE).map_err(|e| e.to_string())? else {
        return Ok(None);
    };
    let text = String::from_utf8(bytes).map_err(|_| "is no text".to_owned())?;
    // The error as it prints itself shows the line, and whatever is in it.
    let settings: toml::Value = toml::from_str(&text).map_err(|e| format!("is no TOML: {}", e.message()))?;
    serde_json::to_value(settings)
        .map(Some)
        .map_err(|e| e.to_string())
}

/// A program on the system's path.
fn find(program: &str) -> Option<PathBuf> {
    [
        "/usr/local/sbin",
        "/usr/local/bin",
        "/usr/sbin",
        "/usr/bin",
        "/sbin",
        "/bin",
    ]
    .iter()
    .map(|folder| Path::new(folder).join(program))
    .find(|path| path.is_file())
}

async fn told(program: &Path, arguments: &[impl AsRef<str>]) -> Result<String, String> {
    let output = asked(program, arguments).await?;
    if !output.status.success() {
        return Err(format!("{}: {}", program.display(), said(&output)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// For programs whose exit code is part of the answer.
async fn told_whatever_it_means(program: &Path, arguments: &[impl AsRef<str>]) -> Result<String, String> {
    let output = asked(program, arguments).await?;
    if output.stdout.is_empty() {
        return Err(said(&output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

async fn document(program: &Path, arguments: &[impl AsRef<str>]) -> Result<Value, String> {
    let text = told_whatever_it_means(program, arguments).await?;
    serde_json::from_str(&text).map_err(|e| e.to_string())
}

async fn asked(program: &Path, arguments: &[impl AsRef<str>]) -> Result<Output, String> {
    ask_within(PATIENCE, program, arguments.iter().map(AsRef::as_ref)).await
}

/// Programs that say their version when asked for it; OpenSSH's client belongs to its server.
const VERSIONS: [(&str, &str); 10] = [
    ("systemctl", "--version"),
    ("ssh", "-V"),
    ("nft", "--version"),
    ("iptables", "--version"),
    ("ufw", "--version"),
    ("firewall-cmd", "--version"),
    ("cloud-init", "--version"),
    ("docker", "--version"),
    ("podman", "--version"),
    ("containerd", "--version"),
];

async fn versions() -> Result<Value, String> {
    let mut versions = Map::new();
    for (program, option) in VERSIONS {
        let version = match find(program) {
            None => Value::Null,
            Some(path) => match asked(&path, &[option]).await {
                Ok(output) => {
                    let text = [output.stdout, output.stderr].concat();
                    let text = String::from_utf8_lossy(&text).into_owned();
                    text.lines().next().unwrap_or_default().trim().into()
                }
                Err(reason) => json!({"not_had": reason}),
            },
        };
        versions.insert(program.to_owned(), version);
    }
    let kernel = nix::sys::utsname::uname().map_err(|e| e.to_string())?;
    let text = |part: &std::ffi::OsStr| part.to_string_lossy().into_owned();
    Ok(json!({
        "portcullis": env!("CARGO_PKG_VERSION"),
        "kernel": {"release": text(kernel.release()), "version": text(kernel.version()), "machine": text(kernel.machine())},
        "distribution": distribution(),
        "programs": versions,
    }))
}

/// os-release(5).
fn distribution() -> Map<String, Value> {
    let bytes = files::read(Path::new("/etc/os-release"), MAX_FILE);
    let text = String::from_utf8_lossy(&bytes.ok().flatten().unwrap_or_default()).into_owned();
    let wanted = ["ID", "VERSION_ID", "PRETTY_NAME", "VERSION_CODENAME", "ID_LIKE"];
    let fields = text.lines().filter_map(|line| line.split_once('='));
    fields
        .filter(|(name, _)| wanted.contains(name))
        .map(|(name, value)| (name.to_owned(), value.trim_matches('"').into()))
        .collect()
}

fn storage(settings: &Settings) -> Result<Value, String> {
    let room = |path: &Path| match nix::sys::statvfs::statvfs(path) {
        Ok(found) => json!({
            "bytes": found.blocks() * found.fragment_size(),
            "available_bytes": found.blocks_available() * found.fragment_size(),
            "files": found.files(),
            "available_files": found.files_available(),
            "read_only": found.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY),
        }),
        Err(error) => json!({"not_had": error.desc()}),
    };
    let places = [
        Path::new("/"),
        &settings.state_dir,
        Path::new("/run"),
        Path::new("/tmp"),
    ];
    let rooms: Map<String, Value> = places
        .iter()
        .map(|path| (path.display().to_string(), room(path)))
        .collect();
    let listed = archive::list(&settings.state_dir).map_err(|e| e.to_string());
    let state = match listed {
        Ok(listed) => {
            let total: u64 = listed.iter().map(|entry| entry.size).sum();
            let spool = listed.iter().filter(|entry| entry.name.starts_with("spool/"));
            let spool: Vec<u64> = spool.map(|entry| entry.size).collect();
            let entry = |entry: &archive::Listed| {
                json!({"name": entry.name, "mode": format!("{:o}", entry.mode), "uid": entry.uid, "bytes": entry.size,
                    "modified": entry.modified})
            };
            json!({"bytes": total, "spool": {"files": spool.len(), "bytes": spool.iter().sum::<u64>()},
                "files": listed.iter().map(entry).collect::<Vec<_>>()})
        }
        Err(reason) => json!({"not_had": reason}),
    };
    Ok(json!({"room": rooms, "state": state}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_long_text_whole_lines_at_its_end_are_kept() {
        let line = "äöü 0123456789\n";
        let text = line.repeat(MAX_PART / line.len() + 10);
        let (end, shortened) = the_end(text);
        assert!(shortened && end.len() <= MAX_PART && end.len() > MAX_PART - 100);
        assert!(end.starts_with("äöü"), "{}", &end[..10]);
        assert_eq!(the_end("short".to_owned()), ("short".to_owned(), false));
    }

    #[test]
    fn a_name_of_an_instance_is_no_path() {
        let named = |report: Value| instance_of(&report);
        assert_eq!(named(json!({"instance": {"id": "i-0a1"}})).unwrap(), "i-0a1");
        assert_eq!(named(json!({"instance": "../../x y"})).unwrap(), ".._.._x_y");
        assert_eq!(named(json!({"instance": ""})), None);
    }

    #[test]
    fn a_file_that_is_no_toml_is_not_quoted() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.toml");
        std::fs::write(&file, "token = hunter2hunter2\n").unwrap();
        let reason = settings_of(&file).unwrap_err();
        assert!(
            reason.contains("is no TOML") && !reason.contains("hunter2"),
            "{reason}"
        );
        std::fs::write(&file, "[health]\nlisten = \"[::]:1\" # of Alice\n").unwrap();
        assert_eq!(
            settings_of(&file).unwrap().unwrap(),
            json!({"health": {"listen": "[::]:1"}})
        );
        assert_eq!(settings_of(&folder.path().join("none")), Ok(None));
    }
}
