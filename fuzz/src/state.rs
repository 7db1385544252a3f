//! What the agent itself wrote to disk, read back after anything may have happened to it: the spool of
//! reports, the audit log.
//!
//! May not live here: disks that are full (`tests/instances/faults.rs`).

use std::fs;
use std::path::Path;

use portcullis::agent::spool::{Added, Spool};
use portcullis::policy::audit::MAX_LINE;
use portcullis::policy::audit::chain::{GENESIS, Head, Known, Line, LogFile, lines, resume, seal, verify};
use portcullis::policy::spool::Bounds;
use portcullis::system::documents;
use portcullis_protocol::Report;

use crate::parts;

const BOUNDS: Bounds = Bounds {
    reports: 4,
    bytes: 4096,
};

fn report(ready: bool, generation: u64) -> Report {
    let json = format!(
        r#"{{"version":1,"instance":{{"id":"i"}},"agent":{{"version":"0.1.0"}},"generation":{generation},"ready":{ready},
        "time":"2026-11-22T00:00:00Z","checks":[],"host_keys":[],
        "host":{{"uptime_s":12,"memory_bytes":0,"load":[0,0,0],"disks":[]}}}}"#
    );
    serde_json::from_str(&json).unwrap()
}

/// A file as we would have written it, if it is not one as it is on disk: no fuzzer finds a checksum.
fn written(bytes: &[u8]) -> Vec<u8> {
    match bytes.starts_with(br#"{"sha256""#) {
        true => bytes.to_vec(),
        false => documents::enclose(bytes),
    }
}

/// A spool with any files in it: opened, it keeps within its bounds, takes reports, gives them back in order
/// and whole, and no number twice, also not by the next process.
pub fn spool(data: &[u8]) -> bool {
    let parts = parts(data);
    let state = tempfile::tempdir_in(if Path::new("/dev/shm").is_dir() {
        "/dev/shm"
    } else {
        "/tmp"
    })
    .unwrap();
    let folder = state.path().join("spool");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("stream.json"), written(parts[0])).unwrap();
    for file in parts[1..].iter().take(8) {
        // A name on the first line.
        let (name, content) = match file.iter().position(|byte| *byte == b'\n') {
            Some(at) => (&file[..at], &file[at + 1..]),
            None => (*file, &[][..]),
        };
        let name = String::from_utf8_lossy(name);
        if (1..200).contains(&name.len()) && !name.contains(['/', '\0']) && name != "." && name != ".." {
            fs::write(folder.join(name.as_ref()), written(content)).unwrap();
        }
    }
    let (mut spool, reason) = Spool::open(state.path(), BOUNDS);
    let was_kept = reason.is_none() && spool.queue().next() > 1;
    assert!(spool.queue().len() <= BOUNDS.reports);
    let (id, mut numbers) = (spool.id().to_owned(), Vec::new());
    for generation in [u64::MAX - 1, u64::MAX] {
        let next = spool.queue().next();
        match spool.add(&report(true, generation)).unwrap() {
            Added::NoNews => assert_eq!(spool.queue().next(), next),
            Added::Waits { .. } => {
                assert_eq!(spool.queue().newest().map(|report| report.sequence), Some(next));
                assert!(spool.queue().next() > next, "a number is used again");
            }
        }
    }
    while let Some(change) = spool.oldest() {
        assert!(
            numbers.last().is_none_or(|last| *last < change.sequence),
            "{numbers:?} {}",
            change.sequence
        );
        assert!(serde_json::from_str::<serde_json::Value>(&change.body).is_ok());
        numbers.push(change.sequence);
        spool.done(change.sequence);
    }
    assert!(numbers.len() <= BOUNDS.reports);
    let next = spool.queue().next();
    drop(spool);
    let (again, reason) = Spool::open(state.path(), BOUNDS);
    assert_eq!(reason, None);
    assert!(
        again.id() != id || again.queue().next() >= next,
        "{} after {next}",
        again.queue().next()
    );
    assert!(again.queue().is_empty());
    was_kept
}

/// Two files of a log and its head: whatever they are, they are judged; a log that is taken for whole is the
/// one that was sealed, line for line; and the chain goes on from where it was left.
pub fn audit(data: &[u8]) -> bool {
    let parts = parts(data);
    let [head, older, newer] = parts[..] else {
        return false;
    };
    let head = Head::from_bytes(head);
    if let Some(head) = &head {
        let bytes = head.to_bytes();
        assert_eq!(Head::from_bytes(&bytes).as_ref(), Some(head));
    }
    let file = |name: &str, bytes: &[u8]| LogFile {
        name: name.to_owned(),
        bytes: bytes.to_vec(),
    };
    let files = [file("audit.log.1", older), file("audit.log", newer)];
    let known = Known {
        head: head.as_ref(),
        hash: None,
    };
    let verdict = verify(&files, known);
    assert!(verdict.problems.len() <= 20);
    if verdict.is_whole() {
        let mut before: Option<Line> = None;
        for line in lines(&files) {
            assert!(line.is_whole);
            if let Some(before) = &before {
                assert_eq!(line.record.seq, before.record.seq + 1);
                assert_eq!(line.record.prev, before.hash);
            }
            before = Some(line);
        }
        let flipped = flip(newer, data.len());
        if let Some(flipped) = flipped {
            let changed = [files[0].clone(), file("audit.log", &flipped)];
            assert!(!verify(&changed, known).is_whole(), "a changed byte is not seen");
        }
    }
    // The agent takes the newest file that holds a finished line.
    if !newer.contains(&b'\n') {
        return false;
    }
    let resumed = resume(newer, head.as_ref());
    let Some(event) = lines(&files).last().map(|line| line.record.event) else {
        return false;
    };
    let Some(next) = resumed.seq.checked_add(1) else {
        return false;
    };
    let sealed = seal(event, next, &resumed.hash);
    assert!(sealed.line.len() <= MAX_LINE && sealed.line.ends_with('\n'));
    let read = Line::read(sealed.line.trim_end().as_bytes()).unwrap();
    assert!(read.is_whole && read.record.seq == next && read.record.event == sealed.event);
    if resumed.broken.is_none() && (resumed.seq > 0 || resumed.hash == GENESIS) && verdict.is_whole() {
        let kept = &newer[..newer.len() - resumed.unfinished];
        let gone_on = [
            files[0].clone(),
            file("audit.log", &[kept, sealed.line.as_bytes()].concat()),
        ];
        let verdict = verify(&gone_on, Known::default());
        assert!(verdict.is_whole(), "{:?}", verdict.problems);
    }
    verdict.is_whole() && verdict.records > 0
}

/// A finished line with one bit of it changed.
fn flip(log: &[u8], at: usize) -> Option<Vec<u8>> {
    let finished = log.iter().rposition(|byte| *byte == b'\n')?;
    let mut changed = log.to_vec();
    let at = at % finished.max(1);
    changed[at] ^= 1 << (at % 8);
    // A line end more or less may only move what is unfinished.
    let line_end = changed[at] == b'\n' || log[at] == b'\n';
    (!line_end).then_some(changed)
}
