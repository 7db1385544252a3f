//! `portcullisctl known-hosts` and `ssh`: nobody types "yes" to a host key that is not known.
//!
//! May not live here: where the keys come from (the library's `known_hosts`).

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use portcullis_protocol::UserName;
use tokio::signal::unix::{SignalKind, signal};

use super::{Context, output};
use crate::known_hosts::{KnownHosts, Login, Ssh};
use crate::local::State;
use crate::{Error, Result};

#[derive(clap::Args)]
#[command(after_help = "\
The keys are told by each instance's agent, over the TLS key that was pinned at first contact, and are \
printed only while the agent says that they are those that it saw first.

Examples:
  portcullisctl known-hosts >> ~/.ssh/known_hosts
  portcullisctl known-hosts gpu-0 --format json | jq -r '.keys[].fingerprint'")]
pub(super) struct Arguments {
    /// The instance; all that run, if left out
    name: Option<String>,
}

impl Arguments {
    pub(super) fn run(&self, context: &Context) -> Result<u8> {
        let provider = context.provider()?;
        let certificate = provider.client_certificate()?;
        if let Some(name) = &self.name {
            let known = KnownHosts::ask(&mut provider.get(name)?, &certificate)?;
            if context.json() {
                output::print_json(&known)?;
            } else {
                output::print(&known.lines());
            }
            return Ok(0);
        }
        let mut instances = provider.list()?;
        instances.retain(|instance| instance.has_agent() && instance.state() == State::Running);
        let (mut all, mut code) = (Vec::new(), 0);
        for instance in &mut instances {
            match KnownHosts::ask(instance, &certificate) {
                Ok(known) => {
                    if !context.json() {
                        output::print(&known.lines());
                    }
                    all.push(known);
                }
                // One that can't be trusted must not hide the others.
                Err(error) => {
                    eprintln!("portcullisctl: {error}");
                    code = 1;
                }
            }
        }
        if context.json() {
            output::print_json(&all)?;
        }
        Ok(code)
    }
}

#[derive(clap::Args)]
#[command(after_help = "\
The exit code is ssh's: the command's, or 255; it is 1 if the instance's host keys may not be trusted.

Examples:
  portcullisctl ssh gpu-0
  portcullisctl ssh gpu-0 --identity ~/.ssh/id_ed25519 -- nvidia-smi
  portcullisctl ssh gpu-0 --user root -- -N -L 8888:localhost:8888")]
pub(super) struct SshArguments {
    /// The instance
    name: String,
    /// Whose login; the user of the spec's first key, if left out
    #[arg(long)]
    user: Option<UserName>,
    /// The private key's file; else ssh's own defaults and agent
    #[arg(long, value_name = "FILE")]
    identity: Option<PathBuf>,
    /// A command to run there, or more options of ssh before it
    #[arg(last = true)]
    arguments: Vec<OsString>,
}

impl SshArguments {
    pub(super) fn run(self, context: &Context) -> Result<u8> {
        let provider = context.provider()?;
        let mut instance = provider.get(&self.name)?;
        let known = KnownHosts::ask(&mut instance, &provider.client_certificate()?)?;
        let login = Login {
            user: self.user,
            identity: self.identity,
            arguments: self.arguments,
        };
        let mut ssh = Ssh::new(&instance, &known, &login)?;
        run_to_its_end(&mut ssh.command)
    }
}

/// Runs a program in the foreground, and gives its exit code. An interrupt from the terminal goes to all
/// that run there: it is for the program to end, and for us to clear up after it.
pub(super) fn run_to_its_end(command: &mut Command) -> Result<u8> {
    let program = command.get_program().to_string_lossy().into_owned();
    let failed = |e: std::io::Error| Error::Failed(format!("can't run {program}: {e}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let status = runtime.map_err(failed)?.block_on(async {
        let _noticed = signal(SignalKind::interrupt())?;
        command.status()
    });
    let code = status.map_err(failed)?.code();
    // A signal ended it: what ssh itself says when it fails.
    Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(255))
}
