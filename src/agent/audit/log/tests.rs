//! Tests of the log on disk: it goes on after every end, and bounds itself.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use portcullis_protocol::control::Refusal;

use super::*;
use crate::policy::audit::chain::{Known, LogFile, Verdict, lines, verify};
use crate::policy::audit::who::Who;

const SMALL: u64 = 128 << 10;

fn started(folder: &Path) -> Log {
    let mut log = Log::new(folder.to_owned(), SMALL);
    log.start(Some(1));
    log
}

fn change(log: &Log, action: &str) -> Event {
    let mut event = Event::note(log.moment(), action, Some(1));
    event.result = Outcome::Changed;
    event
}

fn refusal(log: &Log, address: &str) -> Event {
    let mut event = change(log, "add-rule");
    event.who = Who::remote(address.to_owned(), None);
    event.result = Outcome::Refused;
    event.refusal = Some(Refusal::NotPermitted);
    event
}

fn files(folder: &Path) -> Vec<LogFile> {
    let names = audit_file::names(folder).unwrap();
    let read = |name: String| LogFile {
        bytes: fs::read(folder.join(&name)).unwrap(),
        name,
    };
    names.into_iter().map(read).collect()
}

fn verdict(folder: &Path) -> Verdict {
    let head = Head::from_bytes(&audit_file::head(folder).unwrap().unwrap());
    let known = Known {
        head: head.as_ref(),
        hash: None,
    };
    verify(&files(folder), known)
}

#[track_caller]
fn is_whole(folder: &Path, records: u64) {
    let verdict = verdict(folder);
    assert!(verdict.is_whole() && verdict.unfinished_bytes == 0, "{verdict:?}");
    assert_eq!(verdict.records, records);
}

fn actions(folder: &Path) -> Vec<String> {
    lines(&files(folder))
        .map(|line| line.record.event.action)
        .collect()
}

fn last_reason(folder: &Path) -> String {
    let files = files(folder);
    let reasons = lines(&files).filter_map(|line| line.record.event.reason);
    reasons.last().unwrap()
}

#[test]
fn the_chain_goes_on_over_restarts_and_an_unfinished_line() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("audit");
    let mut log = started(&folder);
    log.record(change(&log, "one"));
    // The same daemon again in the same boot is nothing new.
    let mut log = started(&folder);
    log.record(change(&log, "two"));
    is_whole(&folder, 3);
    assert_eq!(actions(&folder), ["start", "one", "two"]);
    let path = folder.join(NEWEST);
    let mut bytes = fs::read(&path).unwrap();
    bytes.extend(b"{\"seq\":4,\"prev\":\"12");
    fs::write(&path, bytes).unwrap();
    let mut log = started(&folder);
    log.record(change(&log, "three"));
    is_whole(&folder, 5);
    assert_eq!(actions(&folder), ["start", "one", "two", "log", "three"]);
    assert!(last_reason(&folder).starts_with("19 bytes of a line that was never finished"));
    // A generation that no record tells of.
    let mut log = Log::new(folder.clone(), SMALL);
    log.start(Some(2));
    is_whole(&folder, 6);
    assert!(last_reason(&folder).starts_with("another generation holds"));
}

#[test]
fn what_is_done_to_the_log_while_the_daemon_runs_is_recorded_and_stays_to_be_seen() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("audit");
    let mut log = started(&folder);
    for _ in 0..3 {
        log.record(change(&log, "x"));
    }
    let path = folder.join(NEWEST);
    let bytes = fs::read(&path).unwrap();
    let cut = bytes.iter().position(|b| *b == b'\n').unwrap() + 1;
    fs::write(&path, &bytes[..cut]).unwrap();
    log.record(change(&log, "after"));
    assert_eq!(actions(&folder), ["start", "log", "after"]);
    assert!(last_reason(&folder).contains("the log ends at record 1, and record 4 was written"));
    let problems = verdict(&folder).problems;
    assert_eq!(
        (problems.len(), problems[0].line, problems[0].reason.as_str()),
        (1, 2, "records 2 to 4 are missing before this line")
    );
    // Taken away whole: the head still knows.
    fs::remove_file(&path).unwrap();
    log.record(change(&log, "anew"));
    assert_eq!(actions(&folder), ["log", "anew"]);
    assert!(!verdict(&folder).is_whole());
}

#[test]
fn it_is_bounded_and_the_chain_goes_over_its_files() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("audit");
    let mut log = started(&folder);
    let mut records = 0;
    while log.first.unwrap_or(1) == 1 {
        log.record(change(&log, &format!("action {records}")));
        records += 1;
        assert!(records < 5000);
    }
    for _ in 0..50 {
        log.record(change(&log, "more"));
    }
    let size: usize = files(&folder).iter().map(|file| file.bytes.len()).sum();
    assert!(size as u64 <= SMALL && size as u64 > SMALL / 2, "{size}");
    let verdict = verdict(&folder);
    assert!(verdict.is_whole(), "{verdict:?}");
    assert_eq!(verdict.last, Some(records + 51));
    assert_eq!((verdict.first, files(&folder).len()), (log.first, 4));
    let mut log = started(&folder);
    log.record(change(&log, "after"));
    assert!(self::verdict(&folder).is_whole());
    // The oldest one taken away is missed.
    let oldest = audit_file::names(&folder).unwrap().remove(0);
    fs::remove_file(folder.join(oldest)).unwrap();
    let reason = self::verdict(&folder).problems.remove(0).reason;
    assert!(reason.contains("are missing before this line"), "{reason}");
}

#[test]
fn what_cannot_be_written_waits_and_a_gap_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let parent = folder.path().join("state");
    // Nothing can be made below a file, whoever asks.
    fs::write(&parent, "").unwrap();
    let folder = parent.join("audit");
    let mut log = started(&folder);
    for n in 0..MAX_WAITING + 7 {
        log.record(change(&log, &format!("waits {n}")));
    }
    assert_eq!((log.waiting.len(), log.dropped), (MAX_WAITING, 7));
    assert!(log.due().is_some());
    fs::remove_file(&parent).unwrap();
    log.tend();
    assert_eq!((log.waiting.len(), log.dropped, log.due()), (0, 0, None));
    is_whole(&folder, MAX_WAITING as u64 + 1);
    assert_eq!(actions(&folder)[0], "waits 0");
    assert_eq!(last_reason(&folder), "7 records could not be kept");
}

#[test]
fn refusals_of_strangers_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("audit");
    let mut log = started(&folder);
    for n in 0..2000 {
        // One who comes again, and many who come once.
        log.record(refusal(&log, "192.0.2.1:9"));
        log.record(refusal(&log, &format!("198.51.100.{}:9", n % 250)));
    }
    let before = actions(&folder).len();
    assert_eq!(before, 1 + STRANGERS as usize);
    // They cost those who are known nothing.
    log.record(change(&log, "known"));
    assert!(log.due().is_some());
    log.stop();
    let told: u64 = lines(&files(&folder))
        .filter_map(|line| line.record.event.parameters.get("count")?.parse::<u64>().ok())
        .sum();
    assert_eq!(told, 4000 - u64::from(STRANGERS));
    assert_eq!(log.due(), None);
    assert!(verdict(&folder).is_whole());
    let mode = fs::metadata(folder.join(NEWEST)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}
