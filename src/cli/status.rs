//! `portcullis status`: the daemon's last report.

use std::path::Path;
use std::time::Duration;

use clap::Args;
use portcullis_protocol::Report;
use portcullis_protocol::control::{Answer, Refusal, Request};

use super::{Failure, Global, report, runtime};
use crate::agent::control;

/// How often `--watch` asks again.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Args, Debug)]
pub struct StatusArguments {
    /// Print again whenever a check changes, until interrupted.
    #[arg(long)]
    watch: bool,
}

pub fn run(global: &Global, arguments: &StatusArguments) -> Result<(), Failure> {
    let socket = global.settings()?.socket;
    runtime()?.block_on(async {
        let mut shown = ask_report(&socket).await?;
        report::print(&shown, global.format)?;
        if !arguments.watch {
            return if shown.ready {
                Ok(())
            } else {
                Err(Failure::NotReady)
            };
        }
        loop {
            tokio::time::sleep(WATCH_INTERVAL).await;
            let now = ask_report(&socket).await?;
            if now.checks != shown.checks || now.generation != shown.generation {
                report::print(&now, global.format)?;
                shown = now;
            }
        }
    })
}

pub async fn ask_report(socket: &Path) -> Result<Report, Failure> {
    match ask(socket, &Request::Status).await? {
        Answer::Report { report } => Ok(*report),
        other => Err(unexpected(&other)),
    }
}

/// Asks the daemon; a refusal becomes the failure that its kind says.
pub async fn ask(socket: &Path, request: &Request) -> Result<Answer, Failure> {
    let answer = control::call(socket, request).await.map_err(|error| {
        let text = format!("{}: {error}", socket.display());
        match error.kind() {
            std::io::ErrorKind::PermissionDenied => {
                Failure::NotPermitted(format!("{text} (only root may ask)"))
            }
            _ => Failure::Failed(format!(
                "{text} (is the daemon running? `systemctl status portcullis`)"
            )),
        }
    })?;
    match answer {
        Answer::Refused {
            kind: Refusal::BadInput | Refusal::NotFound | Refusal::Conflict | Refusal::Dangerous,
            message,
        } => Err(Failure::BadInput(message)),
        Answer::Refused {
            kind: Refusal::NotPermitted,
            message,
        } => Err(Failure::NotPermitted(message)),
        Answer::Refused {
            kind: Refusal::Failed | Refusal::Superseded | Refusal::OtherGeneration | Refusal::StorageFull,
            message,
        } => Err(Failure::Failed(message)),
        answer => Ok(answer),
    }
}

/// A daemon of another version may answer what was not asked.
pub fn unexpected(answer: &Answer) -> Failure {
    let text = format!("{answer:?}");
    Failure::Failed(format!(
        "the daemon answered something else: {}",
        text.chars().take(80).collect::<String>()
    ))
}
