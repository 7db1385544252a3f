//! `portcullis apply` and `portcullis confirm`: a new spec, through the daemon.

use std::time::Duration;

use clap::Args;
use portcullis_protocol::control::{Answer, Request};
use serde_json::json;

use super::status::{ask, unexpected};
use super::{Failure, Format, Global, SpecArgument, print, print_json, read_spec, require_root, runtime};
use crate::config::trial_time;

#[derive(Args, Debug)]
pub struct ApplyArguments {
    #[command(flatten)]
    spec: SpecArgument,
    #[command(flatten)]
    terms: TermsArguments,
}

/// How a change is made that might cut off whoever makes it.
#[derive(Args, Debug)]
pub struct TermsArguments {
    /// Take the change back after this time, unless `portcullis confirm` comes over a new connection.
    #[arg(long, value_name = "TIME", value_parser = trial_time)]
    confirm: Option<Duration>,
    /// Make the change even if it could cut you off.
    #[arg(long)]
    force: bool,
}

impl TermsArguments {
    /// Seconds, as the daemon takes them.
    pub fn confirm_s(&self) -> Option<u64> {
        self.confirm.map(|time| time.as_secs())
    }

    /// Whether the change is made in any case.
    pub fn force(&self) -> bool {
        self.force
    }
}

#[derive(Args, Debug)]
pub struct ConfirmArguments {
    /// The generation that awaits confirmation.
    generation: u64,
}

pub fn run(global: &Global, arguments: &ApplyArguments) -> Result<(), Failure> {
    let spec = Box::new(read_spec(&arguments.spec.spec)?);
    for warning in spec.warnings() {
        eprintln!("portcullis: warning: {warning}");
    }
    let request = Request::Apply {
        spec,
        confirm_s: arguments.terms.confirm_s(),
        force: arguments.terms.force,
    };
    change(global, "applying a spec", &request)
}

pub fn confirm(global: &Global, arguments: &ConfirmArguments) -> Result<(), Failure> {
    let generation = arguments.generation;
    change(global, "confirming", &Request::Confirm { generation })
}

/// Asks the daemon for a change, and says what came of it.
pub fn change(global: &Global, what: &str, request: &Request) -> Result<(), Failure> {
    require_root(what)?;
    let socket = global.settings()?.socket;
    let answer = runtime()?.block_on(ask(&socket, request))?;
    let Answer::Applied {
        generation,
        changed,
        confirm_until,
        report,
    } = answer
    else {
        return Err(unexpected(&answer));
    };
    if global.format == Format::Json {
        return print_json(&json!({
            "generation": generation,
            "changed": changed,
            "confirm_until": confirm_until,
            "ready": report.ready,
        }));
    }
    let what = match (confirm_until, changed) {
        (Some(until), _) => format!(
            "is enforced until {until:.0}; to keep it, log in anew and run `portcullis confirm {generation}`"
        ),
        (None, true) => "is accepted, durable and enforced".to_owned(),
        (None, false) => "was accepted already".to_owned(),
    };
    let ready = if report.ready {
        "ready"
    } else {
        "not ready: see `portcullis status`"
    };
    print(&format!("Generation {generation} {what}; {ready}."))
}
