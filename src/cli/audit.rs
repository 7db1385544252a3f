//! `portcullis audit`: who changed what, who was refused, and whether the log of that is whole. It reads the
//! files, so it works where no daemon does.

use std::path::Path;
use std::time::Duration;

use clap::{Args, Subcommand};
use jiff::Timestamp;
use serde_json::json;

use super::{Failure, Format, Global, plain_table, print, print_json, require_root};
use crate::agent::audit::log::Log;
use crate::config::{AUDIT_BYTES, duration};
use crate::policy::audit::chain::{Head, Known, LogFile, Record, Verdict, lines, verify};
use crate::policy::audit::clean;
use crate::system::audit_file;

/// The widest cell of the table, in bytes.
const MAX_CELL: usize = 120;

#[derive(Args, Debug)]
pub struct AuditArguments {
    #[command(subcommand)]
    command: Option<AuditCommand>,
    /// Only what happened within this time, by the wall clock, like 1h or 30m.
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<Duration>,
}

#[derive(Debug, Subcommand)]
enum AuditCommand {
    /// Check that the log is as it was written: no line changed, missing, moved or cut off.
    #[command(
        long_about = "Check that the log is as it was written: no line changed, missing, moved or cut off. Exit code \
            0 if it is, 1 if not, with the file and the line. The chain of hashes holds no secret: whoever was root \
            may have written the log anew, and only a hash that left the instance before that shows it (--head).",
        after_help = "Examples:\n  portcullis audit verify\n  portcullis audit verify --head \
            $(journalctl -D /backup -o json MESSAGE_ID=5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e68 | tail -1 | jq -r .AUDIT_HASH)"
    )]
    Verify {
        /// A record's hash that was written down elsewhere: it must be there.
        #[arg(long, value_name = "HASH", value_parser = hash)]
        head: Option<String>,
    },
}

fn since(text: &str) -> Result<Duration, String> {
    duration(text).ok_or_else(|| "a time is expected, like \"1h\" or \"30m\"".to_owned())
}

fn hash(text: &str) -> Result<String, String> {
    match text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit()) {
        true => Ok(text.to_ascii_lowercase()),
        false => Err("a SHA-256 in hex is expected: 64 digits".to_owned()),
    }
}

pub fn run(global: &Global, arguments: &AuditArguments) -> Result<(), Failure> {
    require_root("reading the audit log")?;
    let folder = Log::folder(&global.settings()?.state_dir);
    let (files, head) = load(&folder)?;
    match &arguments.command {
        None => show(global, &files, head.as_ref(), arguments.since),
        Some(_) if arguments.since.is_some() => Err(Failure::BadInput(
            "--since is for showing; the whole log is checked".to_owned(),
        )),
        Some(AuditCommand::Verify { .. }) if files.is_empty() && head.is_none() => Err(Failure::Failed(
            format!("{}: there is no audit log", folder.display()),
        )),
        Some(AuditCommand::Verify { head: hash }) => {
            let known = Known {
                head: head.as_ref(),
                hash: hash.as_deref(),
            };
            tell(global, &verify(&files, known), head.is_some())
        }
    }
}

/// All files and the head, as they were at one moment: the daemon may write and rotate meanwhile. The head is
/// read first, since it is written last.
pub fn load(folder: &Path) -> Result<(Vec<LogFile>, Option<Head>), Failure> {
    let failed = |error: std::io::Error| Failure::Failed(format!("{}: {error}", folder.display()));
    for _ in 0..10 {
        let names = audit_file::names(folder).map_err(failed)?;
        let head = audit_file::head(folder).map_err(failed)?;
        let read = |name: &String| {
            audit_file::read(folder, name, *AUDIT_BYTES.end()).map(|bytes| LogFile {
                name: name.clone(),
                bytes,
            })
        };
        let files: Result<Vec<LogFile>, _> = names.iter().map(read).collect();
        if audit_file::names(folder).map_err(failed)? == names {
            let head = head.and_then(|bytes| Head::from_bytes(&bytes));
            return Ok((files.map_err(failed)?, head));
        }
    }
    Err(Failure::Failed(format!(
        "{}: it changes all the time",
        folder.display()
    )))
}

fn show(
    global: &Global,
    files: &[LogFile],
    head: Option<&Head>,
    since: Option<Duration>,
) -> Result<(), Failure> {
    let from = since.and_then(|time| Timestamp::now().checked_sub(time).ok());
    let records = lines(files).map(|line| line.record);
    let records: Vec<Record> = records
        .filter(|record| from.is_none_or(|from| record.event.time >= from))
        .collect();
    let is_whole = verify(files, Known { head, hash: None }).is_whole();
    match global.format {
        Format::Json => print_json(&json!({"whole": is_whole, "records": records}))?,
        Format::Table if records.is_empty() => print("There is no record.")?,
        Format::Table => print(&table(&records))?,
    }
    if !is_whole {
        eprintln!("portcullis: warning: the audit log is not as it was written: portcullis audit verify");
    }
    Ok(())
}

/// Somebody may have written into the log what a terminal takes for more than text.
fn table(records: &[Record]) -> String {
    let mut table = plain_table(["TIME", "WHO", "WHAT", "RESULT", "GENERATION", "CHANGES"]);
    for record in records {
        let event = &record.event;
        let number = |generation: Option<u64>| generation.map_or("-".to_owned(), |g| g.to_string());
        let generation = match event.generation_before == event.generation {
            true => number(event.generation),
            false => format!(
                "{} > {}",
                number(event.generation_before),
                number(event.generation)
            ),
        };
        let lists = event.changes.lists();
        let changes = lists.iter().filter(|(_, list)| !list.is_empty());
        let mut told: Vec<String> = changes
            .map(|(name, list)| format!("{name} {}", list.join(", ")))
            .collect();
        told.extend(event.reason.clone());
        let time = event.time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let cells = [
            time,
            event.who.to_string(),
            event.asked(),
            event.result.as_str().to_owned(),
            generation,
            told.join("; "),
        ];
        table.add_row(cells.map(|cell| clean(&cell, MAX_CELL)));
    }
    table.to_string()
}

fn tell(global: &Global, verdict: &Verdict, has_head: bool) -> Result<(), Failure> {
    match global.format {
        Format::Json => {
            print_json(&json!({"whole": verdict.is_whole(), "head_known": has_head, "log": verdict}))?;
        }
        Format::Table => print(&text(verdict, has_head))?,
    }
    match verdict.is_whole() {
        true => Ok(()),
        false => Err(Failure::NotReady),
    }
}

fn text(verdict: &Verdict, has_head: bool) -> String {
    let mut text: Vec<String> = Vec::new();
    for problem in &verdict.problems {
        let (file, reason) = (clean(&problem.file, 100), clean(&problem.reason, 300));
        text.push(match problem.line {
            0 => format!("{file}, at its end: {reason}"),
            line => format!("{file} line {line}: {reason}"),
        });
    }
    if verdict.unfinished_bytes > 0 {
        text.push(format!(
            "The last line was never finished ({} bytes): power was lost, or it is being written.",
            verdict.unfinished_bytes
        ));
    }
    if !has_head {
        text.push("The head is not there: a cut at the log's end would not be seen.".to_owned());
    }
    let number = |number: Option<u64>| number.map_or("none".to_owned(), |n| n.to_string());
    text.push(format!(
        "{}: {} records, {} to {}, head {}",
        if verdict.is_whole() { "Whole" } else { "BROKEN" },
        verdict.records,
        number(verdict.first),
        number(verdict.last),
        verdict
            .head
            .as_deref()
            .map_or("none".to_owned(), |hash| clean(hash, 100)),
    ));
    text.join("\n")
}
