//! `portcullis run`: the daemon.

use std::path::PathBuf;

use clap::Args;

use super::{Failure, Global, require_root, runtime};
use crate::agent::events;
use crate::log;

#[derive(Args, Debug)]
pub struct RunArguments {
    /// Go to the background; for images without a supervisor.
    #[arg(long)]
    daemonize: bool,
    /// Where the daemon's process id is written and locked.
    #[arg(long, value_name = "FILE", requires = "daemonize")]
    pid_file: Option<PathBuf>,
}

pub fn run(global: &Global, arguments: &RunArguments) -> Result<(), Failure> {
    require_root("the daemon")?;
    // Settings are checked while there is still a terminal to complain to.
    let settings = global.settings()?;
    if arguments.daemonize {
        // A fork keeps only the thread that calls it: there is no runtime and no thread before this.
        daemonize(arguments)?;
    }
    log::start(global.verbose);
    runtime()?
        .block_on(events::run(settings))
        .map_err(Failure::Failed)
}

fn daemonize(arguments: &RunArguments) -> Result<(), Failure> {
    let mut daemon = daemonix::Daemonize::new().umask(0o077);
    if let Some(file) = &arguments.pid_file {
        // The daemon works in /, so the name must not depend on where it was started.
        let file = std::path::absolute(file).map_err(|e| Failure::BadInput(e.to_string()))?;
        daemon = daemon.pid_file(file);
    }
    daemon
        .start()
        .map_err(|e| Failure::Failed(format!("can't go to the background: {e}")))
}
