//! `portcullis run`: the daemon.

use std::io::{PipeReader, PipeWriter, Read, Write};
use std::path::PathBuf;

use clap::Args;
use daemonix::{Daemonize, Outcome};

use super::{Failure, Global, require_root, runtime};
use crate::agent::events;
use crate::agent::front::StartedBy;
use crate::log;

/// What the daemon tells the process that started it, once it has done its first reconcile.
const STARTED: &str = "started";

#[derive(Args, Debug)]
pub struct RunArguments {
    /// Go to the background; for images without a supervisor.
    #[arg(long)]
    daemonize: bool,
    /// Where the daemon's process id is written and locked.
    #[arg(long, value_name = "FILE", requires = "daemonize")]
    pid_file: Option<PathBuf>,
    /// Who starts the process that speaks to the network: this one, or a unit of its own.
    #[arg(long, value_enum, default_value_t = StartedBy::Child, value_name = "BY")]
    front: StartedBy,
}

pub fn run(global: &Global, arguments: &RunArguments) -> Result<(), Failure> {
    require_root("the daemon")?;
    // Settings are checked while there is still a terminal to complain to.
    let settings = global.settings()?;
    let mut to_parent = None;
    if arguments.daemonize {
        // A fork keeps only the thread that calls it: there is no runtime and no thread before this.
        match daemonize(arguments)? {
            Side::Parent => return Ok(()),
            Side::Daemon(writer) => to_parent = Some(writer),
        }
    }
    log::start(global.verbose, arguments.daemonize);
    let started = || tell(&mut to_parent, STARTED);
    let result = runtime()?.block_on(events::run(settings, arguments.front, started));
    if let Err(reason) = &result {
        tell(&mut to_parent, reason);
    }
    result.map_err(Failure::Failed)
}

/// Tells the waiting process how it went, once. It may have gone away: then nobody wants to know.
fn tell(to_parent: &mut Option<PipeWriter>, text: &str) {
    if let Some(mut writer) = to_parent.take() {
        let _ = writer.write_all(text.as_bytes());
    }
}

enum Side {
    /// The process that was started; the daemon is up.
    Parent,
    /// The daemon, with a way to tell that it is up.
    Daemon(PipeWriter),
}

/// Goes to the background. The process that was started stays until the daemon is up, so that its
/// exit code says how it went.
fn daemonize(arguments: &RunArguments) -> Result<Side, Failure> {
    let failed =
        |reason: &dyn std::fmt::Display| Failure::Failed(format!("can't go to the background: {reason}"));
    let mut daemon = Daemonize::new().umask(0o077);
    if let Some(file) = &arguments.pid_file {
        // The daemon works in /, so the name must not depend on where it was started.
        let file = std::path::absolute(file).map_err(|e| Failure::BadInput(e.to_string()))?;
        daemon = daemon.pid_file(file);
    }
    let (reader, mut writer) = std::io::pipe().map_err(|e| failed(&e))?;
    match daemon.execute() {
        Outcome::Parent(Ok(_)) => {
            drop(writer);
            wait_for_daemon(reader).map(|()| Side::Parent)
        }
        Outcome::Child(Ok(_)) => Ok(Side::Daemon(writer)),
        Outcome::Parent(Err(error)) => Err(failed(&error)),
        Outcome::Child(Err(error)) => {
            // The other process tells it, so that it is told once.
            let _ = write!(writer, "{}", failed(&error));
            Err(Failure::NotReady)
        }
    }
}

fn wait_for_daemon(mut reader: PipeReader) -> Result<(), Failure> {
    let mut text = String::new();
    reader
        .read_to_string(&mut text)
        .map_err(|e| Failure::Failed(e.to_string()))?;
    match text.as_str() {
        STARTED => Ok(()),
        "" => Err(Failure::Failed(
            "the daemon ended before it was up: see the log".to_owned(),
        )),
        reason => Err(Failure::Failed(reason.to_owned())),
    }
}
