//! `portcullis keys`: keys that let in, and the host keys by which this instance is known.

use clap::Subcommand;
use portcullis_protocol::control::{Answer, Request};
use portcullis_protocol::report::HostKey;
use serde_json::json;

use super::status::{ask, unexpected};
use super::{Failure, Format, Global, print, print_json, require_root, runtime};

#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Take sshd's host keys as they are now for this instance's own, after you changed them.
    #[command(
        long_about = "Take sshd's host keys as they are now for this instance's own, after you changed them. \
            The check sshd.host-keys passes again, and `portcullisctl known-hosts` gives them out. The daemon \
            never makes or changes a host key.",
        after_help = "Example:\n  ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key\n  \
            systemctl restart ssh\n  portcullis keys trust-host-keys"
    )]
    TrustHostKeys,
}

pub fn run(global: &Global, command: &KeysCommand) -> Result<(), Failure> {
    match command {
        KeysCommand::TrustHostKeys => trust_host_keys(global),
    }
}

fn trust_host_keys(global: &Global) -> Result<(), Failure> {
    require_root("trusting host keys")?;
    let socket = global.settings()?.socket;
    let answer = runtime()?.block_on(ask(&socket, &Request::TrustHostKeys))?;
    let Answer::HostKeys { changed, host_keys } = answer else {
        return Err(unexpected(&answer));
    };
    if global.format == Format::Json {
        return print_json(&json!({"changed": changed, "host_keys": host_keys}));
    }
    let what = match changed {
        true => "These host keys are trusted from now on:",
        false => "These host keys were trusted already:",
    };
    let line = |key: &HostKey| format!("\n  {} {}", key.algorithm, key.fingerprint);
    print(
        &host_keys
            .iter()
            .map(line)
            .fold(what.to_owned(), |all, line| all + &line),
    )
}
