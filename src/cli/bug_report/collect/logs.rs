//! The logs of a bug report: the journal of our units, the end of the audit log, the states of units.
//!
//! May not live here: other parts of a bug report.

use std::path::Path;

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{Gathered, find, told};
use crate::agent::audit::log::Log;
use crate::cli::audit::load;
use crate::config::Settings;
use crate::policy::audit::chain::{Known, Record, lines, verify};
use crate::policy::audit::clean;

/// Most lines of the journal.
const LINES: &str = "2000";
/// Longest line of it, in bytes.
const MAX_LINE: usize = 2000;
/// How many records of the audit log.
const RECORDS: usize = 200;

/// Units whose state matters to ours; those that are not installed say so.
const UNITS: [&str; 16] = [
    "portcullis.service",
    "portcullis-front.service",
    "portcullis-lockdown.service",
    "ssh.service",
    "ssh.socket",
    "sshd.service",
    "sshd.socket",
    "cloud-init.service",
    "network-pre.target",
    "systemd-networkd.service",
    "nftables.service",
    "ufw.service",
    "firewalld.service",
    "docker.service",
    "chrony.service",
    "systemd-timesyncd.service",
];
/// No property that an administrator may have put a secret into (environment, credentials, command lines).
const PROPERTIES: &str = "--property=Id,LoadState,UnitFileState,ActiveState,SubState,Result,ExecMainStatus,ExecMainCode,\
    NRestarts,StateChangeTimestamp,FragmentPath,DropInPaths,MemoryCurrent,CPUUsageNSec,TasksCurrent,LimitCORE";

/// Adds the journal of our units.
pub async fn journal(gathered: &mut Gathered) {
    let arguments = [
        "--no-pager",
        "--quiet",
        "--output=json",
        "--lines",
        LINES,
        "--unit=portcullis.service",
        "--unit=portcullis-lockdown.service",
        "--unit=portcullis-front.service",
    ];
    let what = "the last 2000 lines of the journal of our units";
    match find("journalctl") {
        None => gathered.failed(what, "journalctl is not there"),
        Some(program) => {
            let listed = told(&program, &arguments).await;
            let one = |json: &str| Some(clean(&gathered.redactor.clean(&line(json)?).0, MAX_LINE));
            let text = listed.map(|listed| listed.lines().filter_map(one).collect::<Vec<_>>().join("\n"));
            gathered.text("journal.txt", what, text);
        }
    }
}

/// One entry on one line, with the fields that are ours: reasons stand in fields of their own.
fn line(json: &str) -> Option<String> {
    let entry: Map<String, Value> = serde_json::from_str(json).ok()?;
    let field = |name: &str| entry.get(name).map(text).unwrap_or_default();
    let micros: i64 = field("__REALTIME_TIMESTAMP").parse().ok()?;
    let time = Timestamp::from_microsecond(micros).ok()?;
    let mut line = format!(
        "{time:.3} {}[{}] <{}> {}",
        field("SYSLOG_IDENTIFIER"),
        field("_PID"),
        field("PRIORITY"),
        field("MESSAGE")
    );
    let ours = entry.iter().filter(|(name, _)| is_ours(name));
    for (name, value) in ours {
        line += &format!(" {name}={}", text(value));
    }
    Some(line)
}

/// The journal gives what is not all printable as an array of bytes, and a field that is there twice as an array
/// of both.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let bytes: Option<Vec<u8>> = parts
                .iter()
                .map(|part| part.as_u64().and_then(|byte| u8::try_from(byte).ok()))
                .collect();
            match bytes {
                Some(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
                None => parts.iter().map(text).collect::<Vec<_>>().join(", "),
            }
        }
        other => other.to_string(),
    }
}

/// Not the journal's own fields, nor those that every entry has (systemd.journal-fields(7)).
fn is_ours(name: &str) -> bool {
    let common = ["MESSAGE", "PRIORITY", "TARGET", "TID"];
    let families = ["_", "SYSLOG_", "CODE_", "JOB_", "INVOCATION_"];
    !common.contains(&name) && !families.iter().any(|family| name.starts_with(family))
}

/// Adds the end of the audit log, and whether it is whole.
pub fn audit(gathered: &mut Gathered, settings: &Settings) {
    let folder = Log::folder(&settings.state_dir);
    let what = "the last 200 records of the audit log, and whether it is whole";
    let document = load(&folder)
        .map_err(|e| e.to_string())
        .and_then(|(files, head)| {
            if files.is_empty() && head.is_none() {
                return Err(format!("{}: there is no audit log", folder.display()));
            }
            let head = head.as_ref();
            let verdict = verify(&files, Known { head, hash: None });
            let all = lines(&files).count();
            let last: Vec<Record> = lines(&files)
                .skip(all.saturating_sub(RECORDS))
                .map(|line| line.record)
                .collect();
            Ok(json!({"whole": verdict.is_whole(), "verification": verdict, "records": last}))
        });
    gathered.json("audit.json", what, document);
}

/// Adds the states of units.
pub async fn units(gathered: &mut Gathered) {
    let program = Path::new("/usr/bin/systemctl");
    let arguments: Vec<&str> = ["show", PROPERTIES].into_iter().chain(UNITS).collect();
    gathered.text("units.txt", "states of units", told(program, &arguments).await);
    let failed = told(
        program,
        &["list-units", "--failed", "--no-pager", "--plain", "--no-legend"],
    )
    .await;
    gathered.text("failed-units.txt", "units that failed", failed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_one_line_with_its_own_fields() {
        let entry = json!({"__REALTIME_TIMESTAMP": "1700000000000000", "_PID": "7", "PRIORITY": "3",
            "SYSLOG_IDENTIFIER": "portcullis", "MESSAGE": "refused\nforged", "ERROR": "no such user",
            "_HOSTNAME": "x", "CODE_FILE": "y", "MESSAGE_ID": "5b"});
        assert_eq!(
            clean(&line(&entry.to_string()).unwrap(), MAX_LINE),
            "2023-11-14T22:13:20.000Z portcullis[7] <3> refused\\nforged ERROR=no such user MESSAGE_ID=5b"
        );
        assert_eq!(line("{"), None);
        let bytes =
            json!({"__REALTIME_TIMESTAMP": "0", "MESSAGE": [104, 105, 27], "A": ["x", "y"]}).to_string();
        assert!(
            line(&bytes).unwrap().ends_with("hi\u{1b} A=x, y"),
            "{:?}",
            line(&bytes)
        );
    }
}
