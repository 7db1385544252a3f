//! The chain of the log's lines: each holds the hash of the one before, and its own. Sealing, checking a
//! whole log, and finding out where a daemon goes on that was killed or lost power.
//!
//! A line is one JSON document that ends in `,"hash":"…"}`. The hash is SHA-256 (FIPS 180-4), in lower-case
//! hex, of the bytes before that end, closed with `}`. So nothing depends on how somebody else writes JSON.
//!
//! What the chain does not prove: there is no secret in it, so whoever is root can write a new log, whole and
//! with a head that fits. It shows what was changed by accident, by a program, or by whoever did not take that
//! trouble. A hash that left the instance in time, in the journal of another host, shows the rest.
//!
//! May not live here: files.

use portcullis_protocol::identity::to_hex;
use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use super::changes::Changes;
use super::{Event, MAX_LINE};

/// What the first record of a log names as the hash before it.
pub const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// Bytes of a line's end: `,"hash":"`, 64 digits, `"}`.
const SEAL: usize = 9 + 64 + 2;
/// Numbers are those that every JSON parser keeps exactly (RFC 8259 section 6); a damaged one must not be
/// what the chain goes on from.
const LAST_NUMBER: u64 = (1 << 53) - 1;
/// Most problems that are told of one log.
const MAX_PROBLEMS: usize = 20;

/// A record: an event at its place in the chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its number: 1, and one more each time.
    pub seq: u64,
    /// The hash of the one before.
    pub prev: String,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// A record as it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The line, with its end.
    pub line: String,
    /// Its hash.
    pub hash: String,
    /// What happened, cleaned.
    pub event: Event,
}

/// Where the chain is: kept beside the log, so that lines which are cut off at its end are missed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The last record's number.
    pub seq: u64,
    /// Its hash.
    pub hash: String,
    /// The number of the oldest record that was kept; none if nobody knows.
    pub first: Option<u64>,
}

impl Head {
    /// Always as long, so that it can be written over in place, also where a disk is full.
    pub const BYTES: usize = 192;

    /// As the file has it.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Texts and numbers always make JSON.
        let text = serde_json::to_string(self).unwrap_or_default();
        format!("{text:<width$}\n", width = Self::BYTES - 1).into_bytes()
    }

    /// From the file; `None` if it holds none.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let head: Self = serde_json::from_slice(bytes).ok()?;
        (head.seq <= LAST_NUMBER).then_some(head)
    }
}

/// Puts an event at its place in the chain.
pub fn seal(event: Event, seq: u64, prev: &str) -> Sealed {
    let mut event = event.cleaned();
    let mut body = body(&event, seq, prev);
    if body.len() + SEAL >= MAX_LINE {
        // Names full of quotes: what happened matters more than what they were.
        event.changes = Changes {
            others: vec!["too long to be told".to_owned()],
            ..Changes::default()
        };
        event.parameters.clear();
        body = self::body(&event, seq, prev);
    }
    let hash = hash(body.as_bytes());
    body.pop();
    let line = format!("{body},\"hash\":\"{hash}\"}}\n");
    Sealed { line, hash, event }
}

fn body(event: &Event, seq: u64, prev: &str) -> String {
    let record = Record {
        seq,
        prev: prev.to_owned(),
        event: event.clone(),
    };
    // Texts, numbers and lists of them always make JSON.
    serde_json::to_string(&record).unwrap_or_else(|_| "{}".to_owned())
}

fn hash(bytes: &[u8]) -> String {
    to_hex(digest(&SHA256, bytes).as_ref())
}

/// A line, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// The record.
    pub record: Record,
    /// The hash that it states.
    pub hash: String,
    /// Whether that is the hash of its content.
    pub is_whole: bool,
}

impl Line {
    /// Reads one, without its end.
    ///
    /// # Errors
    /// Why it is no record.
    pub fn read(line: &[u8]) -> Result<Self, String> {
        let at = line
            .len()
            .checked_sub(SEAL)
            .ok_or("it is too short for a record")?;
        let (body, seal) = line.split_at(at);
        let stated = seal
            .strip_prefix(b",\"hash\":\"")
            .and_then(|rest| rest.strip_suffix(b"\"}"))
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .ok_or("it does not end in a hash")?;
        let closed = [body, b"}"].concat();
        let record: Record = serde_json::from_slice(&closed).map_err(|e| format!("it is no record: {e}"))?;
        if record.seq > LAST_NUMBER {
            return Err("it is no record: its number can't be".to_owned());
        }
        Ok(Self {
            record,
            hash: stated.to_owned(),
            is_whole: hash(&closed) == stated,
        })
    }
}

/// A file of the log.
#[derive(Clone, Debug)]
pub struct LogFile {
    /// Its name.
    pub name: String,
    /// Its content.
    pub bytes: Vec<u8>,
}

/// What is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The file.
    pub file: String,
    /// The line, from 1; 0 is the end of the file.
    pub line: usize,
    /// What is wrong with it.
    pub reason: String,
}

/// What is known of a log as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// How many lines are records with the hash of their content.
    pub records: u64,
    /// The first record's number.
    pub first: Option<u64>,
    /// The last record's number.
    pub last: Option<u64>,
    /// The last record's hash: with this, `verify --head` shows later that nothing was cut off.
    pub head: Option<String>,
    /// Bytes of a last line that was never finished: power was lost while it was written, or it is being
    /// written. Its call was never answered. Not a sign of a change.
    pub unfinished_bytes: usize,
    /// What is wrong; the log is whole without any. The first twenty are told.
    pub problems: Vec<Problem>,
}

impl Verdict {
    /// Whether nothing is wrong.
    pub fn is_whole(&self) -> bool {
        self.problems.is_empty()
    }
}

/// What is compared with the log's end.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known<'a> {
    /// The head that the daemon keeps.
    pub head: Option<&'a Head>,
    /// A hash that somebody wrote down: one of the records must have it.
    pub hash: Option<&'a str>,
}

/// The lines of a log that can be read, in their order, whether whole or not.
pub fn lines(files: &[LogFile]) -> impl Iterator<Item = Line> {
    let lines = files
        .iter()
        .flat_map(|file| file.bytes.split(|byte| *byte == b'\n'));
    lines.filter_map(|line| Line::read(line).ok())
}

/// Checks a log, from its oldest file to its newest.
pub fn verify(files: &[LogFile], known: Known<'_>) -> Verdict {
    let mut check = Check {
        known,
        verdict: Verdict::default(),
        before: None,
        has_head: false,
        has_hash: false,
    };
    for (at, file) in files.iter().enumerate() {
        check.file(file, at + 1 == files.len());
    }
    check.end(files.last().map_or("audit.log", |file| &file.name));
    check.verdict
}

struct Check<'a> {
    known: Known<'a>,
    verdict: Verdict,
    /// Number and hash of the line before; none at the beginning and after what is no record.
    before: Option<(u64, String)>,
    has_head: bool,
    has_hash: bool,
}

impl Check<'_> {
    fn problem(&mut self, file: &str, line: usize, reason: impl Into<String>) {
        if self.verdict.problems.len() < MAX_PROBLEMS {
            self.verdict.problems.push(Problem {
                file: file.to_owned(),
                line,
                reason: reason.into(),
            });
        }
    }

    fn file(&mut self, file: &LogFile, is_newest: bool) {
        let mut rest = file.bytes.as_slice();
        let mut number = 0;
        while !rest.is_empty() {
            number += 1;
            let Some(end) = rest.iter().position(|byte| *byte == b'\n') else {
                match is_newest {
                    true => self.verdict.unfinished_bytes = rest.len(),
                    false => self.problem(
                        &file.name,
                        number,
                        "it was never finished, and newer files follow",
                    ),
                }
                return;
            };
            let (line, more) = rest.split_at(end);
            rest = more.get(1..).unwrap_or_default();
            self.line(&file.name, number, line);
        }
    }

    fn line(&mut self, file: &str, number: usize, bytes: &[u8]) {
        let line = match Line::read(bytes) {
            Ok(line) => line,
            Err(reason) => {
                self.problem(file, number, reason);
                self.before = None;
                return;
            }
        };
        let seq = line.record.seq;
        match line.is_whole {
            true => self.verdict.records += 1,
            false => self.problem(
                file,
                number,
                format!("record {seq} is not as it was written: its hash is another one"),
            ),
        }
        if let Some(reason) = self.place(&line) {
            self.problem(file, number, reason);
        }
        if let Some(head) = self.known.head.filter(|head| head.seq == seq) {
            self.has_head = true;
            if head.hash != line.hash {
                self.problem(
                    file,
                    number,
                    format!("record {seq} is not the one that the head knows"),
                );
            }
        }
        self.has_hash |= line.is_whole && self.known.hash == Some(line.hash.as_str());
        self.verdict.first.get_or_insert(seq);
        self.verdict.last = Some(seq);
        self.verdict.head = Some(line.hash.clone());
        self.before = Some((seq, line.hash));
    }

    /// What is wrong with where a line stands.
    fn place(&self, line: &Line) -> Option<String> {
        let seq = line.record.seq;
        let Some((before, hash)) = &self.before else {
            let is_first = self.verdict.first.is_none();
            let oldest = self.known.head.and_then(|head| head.first).unwrap_or(seq);
            return match seq {
                _ if is_first && seq > oldest => Some(missing(oldest, seq - 1)),
                1 if line.record.prev != GENESIS => Some("record 1 does not begin a chain".to_owned()),
                _ => None,
            };
        };
        match before.saturating_add(1) {
            next if seq > next => Some(missing(next, seq - 1)),
            next if seq < next => Some(format!("record {seq} stands after record {before}")),
            _ if line.record.prev != *hash => Some(format!(
                "record {seq} does not follow the record {before} that stands before it"
            )),
            _ => None,
        }
    }

    fn end(&mut self, newest: &str) {
        let last = self.verdict.last.unwrap_or(0);
        match self.known.head {
            Some(head) if head.seq > last => {
                let reason = match head.seq - last {
                    1 => format!("record {} is cut off", head.seq),
                    _ => format!("records {} to {} are cut off", last + 1, head.seq),
                };
                self.problem(newest, 0, reason);
            }
            Some(head) if !self.has_head && self.verdict.is_whole() => {
                let reason = format!("record {}, which the head knows, is not there", head.seq);
                self.problem(newest, 0, reason);
            }
            _ => {}
        }
        if self.known.hash.is_some() && !self.has_hash {
            let reason = "no record has that hash: it was cut off or changed, or it is older than the log";
            self.problem(newest, 0, reason);
        }
    }
}

fn missing(from: u64, to: u64) -> String {
    match from == to {
        true => format!("record {from} is missing before this line"),
        false => format!("records {from} to {to} are missing before this line"),
    }
}

/// Where the chain goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resume {
    /// The last record's number; 0 before the first.
    pub seq: u64,
    /// Its hash.
    pub hash: String,
    /// The last record, if there is one that can be read.
    pub last: Option<Event>,
    /// Bytes at the end of the newest file that are no finished line, and to be cut off.
    pub unfinished: usize,
    /// What is wrong with the end, if it is not what it should be.
    pub broken: Option<String>,
}

/// Finds where the chain goes on after `tail`, the end of the newest file that holds a finished line. Only the
/// last line is looked at: a daemon must come up fast, and `verify` looks at all of them.
pub fn resume(tail: &[u8], head: Option<&Head>) -> Resume {
    let finished = tail
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |at| at + 1);
    let unfinished = tail.len() - finished;
    let whole = tail.get(..finished.saturating_sub(1)).unwrap_or_default();
    let begin = whole
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |at| at + 1);
    let last = whole.get(begin..).filter(|line| !line.is_empty());
    let read = last.map(Line::read);
    let mut broken = match &read {
        Some(Err(reason)) => Some(format!("the last line of the log was changed: {reason}")),
        Some(Ok(line)) if !line.is_whole => Some(format!(
            "record {} was changed: its hash is another one",
            line.record.seq
        )),
        _ => None,
    };
    let line = read.and_then(Result::ok);
    let (mut seq, mut hash) = line.as_ref().map_or((0, GENESIS.to_owned()), |line| {
        (line.record.seq, line.hash.clone())
    });
    if let Some(head) = head.filter(|head| head.seq >= seq) {
        let other = match head.seq > seq {
            true => Some(format!(
                "the log ends at record {seq}, and record {} was written",
                head.seq
            )),
            false if head.hash != hash => Some(format!("record {seq} is another one than was written")),
            false => None,
        };
        broken = broken.or(other);
        // What comes next is after what was written, whatever is there: the gap stays to be seen.
        (seq, hash) = (head.seq, head.hash.clone());
    }
    Resume {
        seq,
        hash,
        last: line.map(|line| line.record.event),
        unfinished,
        broken,
    }
}

#[cfg(test)]
mod tests;
