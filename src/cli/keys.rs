//! `portcullis keys`: who is let in by which key, and by which host keys this instance is known.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use comfy_table::Table;
use jiff::Timestamp;
use portcullis_protocol::control::{Answer, Request};
use portcullis_protocol::key::KeyLine;
use portcullis_protocol::key_report::{Accepted, KeyReport};
use portcullis_protocol::report::HostKey;
use portcullis_protocol::text::plain;
use portcullis_protocol::{AuthorizedKey, CheckId, UserName};
use serde_json::json;

use super::apply::{TermsArguments, change};
use super::status::{ask, ask_report, unexpected};
use super::{Failure, Format, Global, plain_table, print, print_json, read_input, require_root, runtime};
use crate::agent::key_audit::{self, AuditedUser};
use crate::agent::state::Store;

#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Show the keys of all sources: where each is, and whether sshd would accept it.
    List,
    /// Let a key in, in addition; it is durable and in place when this returns.
    #[command(
        after_help = "Examples:\n  portcullis keys add --user ubuntu id_ed25519.pub\n  \
        portcullis keys add --user ubuntu --expires 2027-01-01T00:00:00Z - < id_ed25519.pub"
    )]
    Add(AddArguments),
    /// Let a key in no longer, whoever named it. A user's own lines are not touched.
    #[command(
        after_help = "Example:\n  portcullis keys revoke SHA256:ioWt1wgLzcFiKEMHeMRvL3kvGv4ijTlZ1FEXNNIlfyY"
    )]
    Revoke(RevokeArguments),
    /// Look at every key that sshd would read, of all users, their own included.
    #[command(after_help = "Example:\n  portcullis keys audit --format json | jq '.users[].files[].lines[]'")]
    Audit,
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

#[derive(Args, Debug)]
pub struct AddArguments {
    /// Whose login it opens.
    #[arg(long)]
    user: UserName,
    /// When it ends, as RFC 3339 says times; never, if left out.
    #[arg(long, value_name = "TIME")]
    expires: Option<Timestamp>,
    /// The public key, one line; `-` reads standard input.
    #[arg(value_name = "FILE|-")]
    file: PathBuf,
}

#[derive(Args, Debug)]
pub struct RevokeArguments {
    /// The key's fingerprint, as `portcullis keys list` and `ssh-keygen -l` show it.
    fingerprint: String,
    #[command(flatten)]
    terms: TermsArguments,
}

pub fn run(global: &Global, command: &KeysCommand) -> Result<(), Failure> {
    match command {
        KeysCommand::List => list(global),
        KeysCommand::Add(arguments) => {
            let key = read_key(arguments)?;
            change(global, "adding a key", &Request::AddKey { key })
        }
        KeysCommand::Revoke(arguments) => {
            let request = Request::RevokeKey {
                fingerprint: arguments.fingerprint.clone(),
                confirm_s: arguments.terms.confirm_s(),
                force: arguments.terms.force(),
            };
            change(global, "revoking a key", &request)
        }
        KeysCommand::Audit => audit(global),
        KeysCommand::TrustHostKeys => trust_host_keys(global),
    }
}

/// Most bytes of a file with one key.
const MAX_KEY_FILE: u64 = 64 << 10;

fn read_key(arguments: &AddArguments) -> Result<AuthorizedKey, Failure> {
    let (name, bytes) = read_input(&arguments.file, MAX_KEY_FILE)?;
    let bad = |reason: &str| Failure::BadInput(format!("{name}: {reason}"));
    let text = String::from_utf8(bytes).map_err(|_| bad("not text"))?;
    let line = text.trim_end_matches(['\r', '\n']);
    let KeyLine { options, key } = line.parse().map_err(|reason: String| bad(&reason))?;
    if arguments.expires.is_some_and(|end| end <= Timestamp::now()) {
        return Err(Failure::BadInput("--expires: that time is over".to_owned()));
    }
    Ok(AuthorizedKey {
        user: arguments.user.clone(),
        options,
        key,
        expires: arguments.expires,
    })
}

fn list(global: &Global) -> Result<(), Failure> {
    let socket = global.settings()?.socket;
    let report = runtime()?.block_on(ask_report(&socket))?;
    let check = report.check(CheckId::KeysInstalled);
    let evidence = check.and_then(|check| check.evidence.get("keys")).cloned();
    let keys: Vec<KeyReport> = serde_json::from_value(evidence.unwrap_or_else(|| json!([])))
        .map_err(|e| Failure::Failed(format!("the daemon's report is of another version: {e}")))?;
    match global.format {
        Format::Json => print_json(&json!({"keys": keys})),
        Format::Table if keys.is_empty() => print("No key lets anybody in."),
        Format::Table => print(&table(&keys)),
    }
}

fn table(keys: &[KeyReport]) -> String {
    let mut table = plain_table([
        "USER",
        "KEY",
        "FINGERPRINT",
        "COMMENT",
        "FROM",
        "ENDS",
        "ACCEPTED",
        "FILE",
    ]);
    for key in keys {
        let accepted = match key.accepted {
            Accepted::Yes => "yes",
            Accepted::Inferred => "yes (another of its kind was asked)",
            Accepted::No => "NO",
            Accepted::NotAsked => "not asked",
            Accepted::Unknown => "unknown",
        };
        table.add_row([
            key.user.clone(),
            key.algorithm.clone(),
            key.fingerprint.clone(),
            plain(&key.comment),
            key.source.clone(),
            key.expires
                .map_or_else(|| "never".to_owned(), |end| format!("{end:.0}")),
            accepted.to_owned(),
            key.file.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    let reasons = keys.iter().filter_map(|key| {
        let reason = key.reason.as_ref()?;
        Some(format!("{} {}: {reason}", key.user, key.fingerprint))
    });
    with_notes(&table, reasons)
}

/// A table, and below it what does not fit into a cell.
fn with_notes(table: &Table, notes: impl IntoIterator<Item = String>) -> String {
    std::iter::once(table.trim_fmt())
        .chain(notes)
        .collect::<Vec<_>>()
        .join("\n")
}

fn audit(global: &Global) -> Result<(), Failure> {
    require_root("reading everybody's keys")?;
    let settings = global.settings()?;
    let store = Store::new(&settings.state_dir);
    let users = runtime()?.block_on(key_audit::run(&settings, &store));
    let users = users.map_err(Failure::Failed)?;
    match global.format {
        Format::Json => print_json(&json!({"users": users})),
        Format::Table => print(&audit_text(&users)),
    }
}

fn audit_text(users: &[AuditedUser]) -> String {
    let mut table = plain_table([
        "USER",
        "KEY",
        "FINGERPRINT",
        "COMMENT",
        "FROM",
        "WHERE",
        "LOOK AT",
    ]);
    let mut notes = Vec::new();
    for user in users {
        notes.extend(
            user.problem
                .iter()
                .map(|reason| format!("{}: {reason}", user.user)),
        );
        notes.extend(
            user.elsewhere
                .iter()
                .map(|what| format!("{}: sshd also asks {what}", user.user)),
        );
        for file in &user.files {
            let path = file.path.display();
            notes.extend(
                file.problem
                    .iter()
                    .map(|reason| format!("{}: {reason}", user.user)),
            );
            for line in &file.lines {
                table.add_row([
                    user.user.to_string(),
                    line.algorithm.clone(),
                    line.fingerprint.clone(),
                    plain(&line.comment),
                    if line.ours { "portcullis" } else { "the user" }.to_owned(),
                    format!("{path}:{}", line.line),
                    line.notes.join("; "),
                ]);
            }
        }
    }
    with_notes(&table, notes)
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
