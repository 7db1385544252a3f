//! `portcullis front`: the process that speaks to the network. It is nobody on this host.
//!
//! May not live here: what it serves (`health`).

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use clap::Args;
use nix::sys::prctl;
use rustix::thread::{CapabilitySet, capabilities};

use super::{Failure, Global, runtime};
use crate::health::link::{self, Agent};
use crate::{channel, log};

#[derive(Args, Debug)]
pub struct FrontArguments {
    /// The daemon started this and is at the other end of standard input.
    #[arg(long)]
    inherited: bool,
}

pub fn run(global: &Global, arguments: &FrontArguments) -> Result<(), Failure> {
    give_up_rights()?;
    log::start(global.verbose, false);
    let failed = |e: io::Error| Failure::Failed(format!("the daemon's end of the channel: {e}"));
    let path = channel::socket(&global.settings()?.socket);
    runtime()?.block_on(async {
        let agent = match arguments.inherited {
            true => Agent::Parent(inherited().map_err(failed)?),
            false => Agent::At(path),
        };
        tokio::select! {
            () = link::run(agent) => Ok(()),
            over = terminated() => over.map_err(failed),
        }
    })
}

/// Standard input as the channel.
fn inherited() -> io::Result<tokio::net::UnixStream> {
    let stream = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    stream.set_nonblocking(true)?;
    tokio::net::UnixStream::from_std(stream)
}

/// Being told to end is no failure.
async fn terminated() -> io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    signal(SignalKind::terminate())?.recv().await;
    Ok(())
}

/// A hole in what speaks to the network must not be root: this refuses to be, or to be able to become it.
fn give_up_rights() -> Result<(), Failure> {
    let failed = |e: io::Error| Failure::Failed(format!("can't give up rights: {e}"));
    let (effective, real) = (nix::unistd::geteuid(), nix::unistd::getuid());
    let rights = capabilities(None).map_err(|e| failed(e.into()))?;
    if effective.is_root() || real.is_root() || rights.permitted != CapabilitySet::empty() {
        return Err(Failure::NotPermitted(format!(
            "the front runs as a user without rights: systemctl start portcullis-front, or \
             runuser -u {} -- portcullis front",
            channel::FRONT_USER
        )));
    }
    prctl::set_no_new_privs().map_err(|e| failed(e.into()))
}
