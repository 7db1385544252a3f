//! `portcullis bug-report`: what somebody needs who helps from afar, in one file, without secrets.
//!
//! It works without the daemon, and where nothing can be written. What could not be had is said, in the file too.
//! May not live here: gathering (`collect`), what is secret (`policy::redaction`).

mod collect;
mod secrets;

use std::io::{ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use self::collect::Entry;
use super::{Failure, Format, Global, plain_table, print_json, require_root, runtime};
use crate::config::Settings;
use crate::system::archive::{Archive, write_new};

#[derive(Args, Debug)]
pub struct BugReportArguments {
    /// The new file, or a folder for it, or `-` for standard output, where no disk has room.
    #[arg(long, short, value_name = "FILE|FOLDER|-", default_value = ".")]
    output: PathBuf,
}

/// What is in a bundle and what is not; a copy of it is in the bundle.
#[derive(Debug, Serialize)]
struct Manifest {
    /// Version of the bundle's form.
    version: u32,
    /// The agent's.
    agent: &'static str,
    /// When it was made.
    time: Timestamp,
    /// The files.
    files: Vec<FileNote>,
    /// What could not be had, and why.
    failures: Vec<FailureNote>,
}

#[derive(Debug, Serialize)]
struct FileNote {
    name: String,
    what: String,
    bytes: usize,
    /// How many secrets were found in it and taken out.
    removed: usize,
    /// Whether it was longer.
    shortened: bool,
}

#[derive(Clone, Debug, Serialize)]
struct FailureNote {
    what: String,
    reason: String,
}

pub fn run(global: &Global, arguments: &BugReportArguments) -> Result<(), Failure> {
    require_root("a bug report")?;
    let to_stdout = arguments.output == Path::new("-");
    if to_stdout && std::io::stdout().is_terminal() {
        return Err(Failure::BadInput(
            "standard output is a terminal: portcullis bug-report -o - | ssh HOST 'cat > report.tar.gz'"
                .to_owned(),
        ));
    }
    // Settings that can't be read are one more thing to report. The error shows the line, and what is in it.
    let (settings, problem) = match global.settings() {
        Ok(settings) => (settings, None),
        Err(_) => (
            Settings::default(),
            Some("they can't be used, `portcullis check` says why"),
        ),
    };
    let time = Timestamp::now();
    let gathered = runtime()?.block_on(collect::all(global, &settings, problem));
    let name = format!(
        "portcullis-bug-report-{}-{}",
        gathered.instance,
        time.strftime("%Y%m%dT%H%M%SZ")
    );
    let manifest = Manifest {
        version: 1,
        agent: env!("CARGO_PKG_VERSION"),
        time,
        files: gathered.entries.iter().map(note).collect(),
        failures: gathered.failures,
    };
    let files: Vec<(String, String)> = gathered
        .entries
        .into_iter()
        .map(|entry| (entry.name, entry.text))
        .collect();
    let bytes = pack(&name, &manifest, &files).map_err(|e| Failure::Failed(e.to_string()))?;
    let place = match to_stdout {
        true => put_out(&bytes).map(|()| None)?,
        false => Some(save(&arguments.output, &name, &bytes)?),
    };
    tell(global.format, &manifest, place.as_deref(), bytes.len())
}

fn note(entry: &Entry) -> FileNote {
    FileNote {
        name: entry.name.clone(),
        what: entry.what.clone(),
        bytes: entry.text.len(),
        removed: entry.removed,
        shortened: entry.shortened,
    }
}

fn pack(name: &str, manifest: &Manifest, files: &[(String, String)]) -> std::io::Result<Vec<u8>> {
    let time = u64::try_from(manifest.time.as_second()).unwrap_or_default();
    let mut archive = Archive::new(name, time);
    archive.add("README.txt", readme(manifest).as_bytes())?;
    archive.add("manifest.json", &serde_json::to_vec_pretty(manifest)?)?;
    for (name, text) in files {
        archive.add(name, text.as_bytes())?;
    }
    archive.finish()
}

fn put_out(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    let written = out.write_all(bytes).and_then(|()| out.flush());
    written.map_err(|e| Failure::Failed(format!("standard output: {e}")))
}

/// Writes it where it was asked for; a folder gets a file named after the bundle.
fn save(output: &Path, name: &str, bytes: &[u8]) -> Result<PathBuf, Failure> {
    let path = match output.is_dir() {
        true => output.join(format!("{name}.tar.gz")),
        false => output.to_owned(),
    };
    let place = path.display();
    let elsewhere = "write it elsewhere, for example to a file system in memory (-o /run), or send it away at once: \
                     portcullis bug-report -o - | ssh HOST 'cat > report.tar.gz'";
    write_new(&path, bytes).map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => {
            Failure::BadInput(format!("{place}: is there already, and is not written over"))
        }
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            Failure::Failed(format!("{place}: the disk is full: {elsewhere}"))
        }
        ErrorKind::ReadOnlyFilesystem => {
            Failure::Failed(format!("{place}: the disk can only be read: {elsewhere}"))
        }
        _ => Failure::Failed(format!("{place}: {error}")),
    })?;
    Ok(path)
}

const ADVICE: &str = "Secrets that are known were taken out, and comments of keys. Addresses, user names, host names and what \
    the log says are in it: look at it before you send it, and send it to nobody whom you would not tell that.";

/// The list of what is in a bundle, for people.
fn contents(manifest: &Manifest) -> String {
    let mut table = plain_table(["FILE", "BYTES", "SECRETS REMOVED", "WHAT"]);
    for file in &manifest.files {
        let what = match file.shortened {
            true => format!("{} (only its end)", file.what),
            false => file.what.clone(),
        };
        table.add_row([
            file.name.clone(),
            file.bytes.to_string(),
            file.removed.to_string(),
            what,
        ]);
    }
    let mut text = table.to_string();
    for failure in &manifest.failures {
        text += &format!("\nnot had: {}: {}", failure.what, failure.reason);
    }
    text
}

fn readme(manifest: &Manifest) -> String {
    format!(
        "A bug report of portcullis {}, made at {:.0}.\n\n{ADVICE}\n\n{}\n",
        manifest.agent,
        manifest.time,
        contents(manifest)
    )
}

/// Standard output has the bundle if there is no place; then people are told beside it.
fn tell(format: Format, manifest: &Manifest, place: Option<&Path>, bytes: usize) -> Result<(), Failure> {
    let Some(place) = place else {
        eprintln!("{}\n\n{ADVICE}", contents(manifest));
        return Ok(());
    };
    if format == Format::Json {
        return print_json(&serde_json::json!({"file": place, "bytes": bytes, "manifest": manifest}));
    }
    let shown = place.display();
    super::print(&format!(
        "{}\n\n{shown} ({bytes} bytes, for root alone)\n{ADVICE}\nTo look at it: tar -xOzf {shown} | less",
        contents(manifest)
    ))
}
