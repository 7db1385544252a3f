//! The audit log on disk, as the daemon writes it: each record is there before its call is answered. What can't
//! be written waits in memory.
//!
//! May not live here: what a record says (`policy::audit`), file system calls (`system::audit_file`).

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::log::id;
use crate::policy::audit::chain::{GENESIS, Head, Resume, Sealed, resume, seal};
use crate::policy::audit::limiter::Limiter;
use crate::policy::audit::{Event, MAX_LINE, Moment, Outcome};
use crate::system::audit_file::{self, NEWEST, Newest};
use crate::system::clock;

/// Files that a log has at most.
const FILES: u64 = 4;
/// Records that wait in memory at most; then the newest are counted and dropped.
const MAX_WAITING: usize = 256;
/// When it is tried again to write what waits.
const RETRY: Duration = Duration::from_secs(60);
/// Most records of refusals within ten minutes: of strangers, and of callers who are known.
const STRANGERS: u32 = 30;
const KNOWN: u32 = 200;

/// The log.
#[derive(Debug)]
pub struct Log {
    folder: PathBuf,
    /// Most bytes of one file.
    max_file: u64,
    boot: String,
    file: Option<Newest>,
    /// The last record's number and hash, and the number of the oldest.
    seq: u64,
    hash: String,
    first: Option<u64>,
    /// The generation that held at the last record.
    generation: Option<u64>,
    waiting: VecDeque<Event>,
    dropped: u64,
    /// Why it can't be written, as the journal was told.
    failing: Option<String>,
    retry: Option<Instant>,
    strangers: Limiter,
    known: Limiter,
}

impl Log {
    /// The log in a folder. Nothing is read or written yet.
    pub fn new(folder: PathBuf, max_bytes: u64) -> Self {
        Self {
            folder,
            max_file: max_bytes / FILES,
            boot: clock::this_boot().unwrap_or_default(),
            file: None,
            seq: 0,
            hash: GENESIS.to_owned(),
            first: None,
            generation: None,
            waiting: VecDeque::new(),
            dropped: 0,
            failing: None,
            retry: None,
            strangers: Limiter::new(STRANGERS),
            known: Limiter::new(KNOWN),
        }
    }

    /// The log's folder in the state folder.
    pub fn folder(state: &Path) -> PathBuf {
        state.join("audit")
    }

    /// Now.
    pub fn moment(&self) -> Moment {
        Moment {
            time: Timestamp::now(),
            boot: self.boot.clone(),
            since_boot_ms: u64::try_from(clock::since_boot().as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// Opens it, and notes what is worth it: a new boot, a line that was never finished, a generation that no
    /// record tells of, an end that is not what was written.
    pub fn start(&mut self, generation: Option<u64>) {
        self.generation = generation;
        let last = match self.open() {
            Ok(found) => found.last,
            Err(error) => return self.failed(&error),
        };
        let mut note = Event::note(self.moment(), "start", generation);
        match last {
            None => note.reason = Some("the log begins".to_owned()),
            Some(last) => {
                note.generation_before = last.generation;
                if last.generation != generation {
                    let reason = "another generation holds than the last record says: the daemon ended before it \
                                  could write, or a trial ended with its boot";
                    note.reason = Some(reason.to_owned());
                } else if last.boot == self.boot {
                    // A daemon that is restarted all the time must not turn the log over.
                    return self.flush();
                }
            }
        }
        self.push(note);
    }

    /// Writes a record. When this returns it is on the disk, or waits in memory and the journal has it. What is
    /// no change is counted instead when it comes too often.
    pub fn record(&mut self, event: Event) {
        let now = clock::since_boot();
        self.tell_counted(now, false);
        self.generation = event.generation;
        if event.result != Outcome::Changed && event.result != Outcome::Noted {
            let key = format!("{}, {}, {:?}", event.who.key(), event.action, event.refusal);
            let limiter = match event.who.is_stranger() {
                true => &mut self.strangers,
                false => &mut self.known,
            };
            if !limiter.admit(&key, now) {
                return;
            }
        }
        self.push(event);
    }

    /// When [`Self::tend`] has something to do.
    pub fn due(&self) -> Option<Instant> {
        let counted = self.strangers.next().into_iter().chain(self.known.next()).min();
        let counted = counted.map(|due| Instant::now() + due.saturating_sub(clock::since_boot()));
        counted.into_iter().chain(self.retry).min()
    }

    /// Writes what waits, and what was counted and is due.
    pub fn tend(&mut self) {
        self.tell_counted(clock::since_boot(), false);
        self.flush();
    }

    /// Writes all that is only in memory: the daemon ends.
    pub fn stop(&mut self) {
        self.tell_counted(clock::since_boot(), true);
        self.flush();
    }

    fn tell_counted(&mut self, now: Duration, all: bool) {
        let strangers = self.strangers.due(now, all);
        for untold in strangers.into_iter().chain(self.known.due(now, all)) {
            let mut note = Event::note(self.moment(), "more-like-this", self.generation);
            let of = untold.key.unwrap_or_else(|| "other callers".to_owned());
            note.reason = Some(format!("and {} more like this", untold.count));
            note.parameters = [
                ("count".to_owned(), untold.count.to_string()),
                ("of".to_owned(), of),
            ]
            .into();
            self.push(note);
        }
    }

    fn push(&mut self, event: Event) {
        if self.waiting.len() >= MAX_WAITING {
            self.flush();
        }
        let text = event.text();
        let record = json(&event);
        match self.waiting.len() >= MAX_WAITING {
            true => self.dropped += 1,
            false => {
                self.waiting.push_back(event);
                self.flush();
            }
        }
        if self.failing.is_some() {
            warn!(
                MESSAGE_ID = id::AUDIT_FAILED,
                RECORD = record,
                "not in the audit log yet: {text}"
            );
        }
    }

    fn flush(&mut self) {
        self.retry = None;
        while let Some(event) = self.waiting.front().cloned() {
            match self.write(event) {
                Ok(()) => drop(self.waiting.pop_front()),
                Err(error) => return self.failed(&error),
            }
        }
        if self.dropped > 0 {
            let mut note = Event::note(self.moment(), "gap", self.generation);
            note.reason = Some(format!("{} records could not be kept", self.dropped));
            if let Err(error) = self.write(note) {
                return self.failed(&error);
            }
            self.dropped = 0;
        }
        if self.failing.take().is_some() {
            info!(MESSAGE_ID = id::AUDIT, "the audit log is written again");
        }
    }

    fn failed(&mut self, error: &io::Error) {
        self.retry = Some(Instant::now() + RETRY);
        let reason = format!("{}: {error}", self.folder.display());
        if self.failing.as_ref() != Some(&reason) {
            error!(
                MESSAGE_ID = id::AUDIT_FAILED,
                REASON = reason,
                "the audit log can't be written, its records wait in memory: {reason}"
            );
            self.failing = Some(reason);
        }
    }

    fn write(&mut self, event: Event) -> io::Result<()> {
        if self.file.as_ref().is_some_and(|file| !file.is_as_left()) {
            self.file = None;
        }
        if self.file.is_none() {
            self.open()?;
        }
        self.append(event)
    }

    /// Appends at the chain's end, in a new file if this one is full.
    fn append(&mut self, event: Event) -> io::Result<()> {
        let seq = self.seq + 1;
        let sealed = seal(event, seq, &self.hash);
        let line = sealed.line.as_bytes();
        let mut file = self.file.take().ok_or(io::ErrorKind::NotFound)?;
        if file.length() > 0 && file.length() + line.len() as u64 > self.max_file {
            file = file.rotate(self.seq)?;
            self.remove_oldest(&file)?;
        }
        match file.append(line) {
            Ok(()) => {}
            Err((error, is_as_before)) => {
                self.file = is_as_before.then_some(file);
                return Err(error);
            }
        }
        (self.seq, self.hash) = (seq, sealed.hash.clone());
        self.first.get_or_insert(seq);
        self.keep_head(&file);
        self.file = Some(file);
        journal(seq, &sealed);
        Ok(())
    }

    /// Where the chain is, beside it. It is behind if this fails, which hides nothing that is there.
    fn keep_head(&self, file: &Newest) {
        let head = Head {
            seq: self.seq,
            hash: self.hash.clone(),
            first: self.first,
        };
        if let Err(error) = file.set_head(&head.to_bytes()) {
            warn!(MESSAGE_ID = id::AUDIT_FAILED, %error, "the audit log's head can't be written: a cut at its end would not be seen");
        }
    }

    /// The head says first that they are gone: a crash in between leaves more than it knows of, not less.
    fn remove_oldest(&mut self, file: &Newest) -> io::Result<()> {
        let names = audit_file::names(&self.folder)?;
        let keep = usize::try_from(FILES).unwrap_or(usize::MAX);
        for name in names.iter().take(names.len().saturating_sub(keep)) {
            if let Some(last) = audit_file::last_of(name) {
                self.first = Some(last + 1);
                self.keep_head(file);
                audit_file::remove(&self.folder, name)?;
            }
        }
        Ok(())
    }

    /// Finds the chain's end and opens the newest file there. What is wrong with it becomes a record.
    fn open(&mut self) -> io::Result<Resume> {
        let names = audit_file::names(&self.folder)?;
        let head = audit_file::head(&self.folder)?;
        let head = head.and_then(|bytes| Head::from_bytes(&bytes));
        let (mut tail, mut unfinished) = (Vec::new(), 0);
        for name in names.iter().rev() {
            tail = audit_file::tail(&self.folder, name, 2 * MAX_LINE as u64)?;
            if name == NEWEST {
                unfinished = resume(&tail, None).unfinished;
            }
            if tail.contains(&b'\n') {
                break;
            }
        }
        let found = resume(&tail, head.as_ref());
        self.file = Some(Newest::open(&self.folder, unfinished as u64)?);
        (self.seq, self.hash) = (found.seq, found.hash.clone());
        self.first = match &head {
            Some(head) => head.first,
            None if names.is_empty() => Some(1),
            None => None,
        };
        self.note_found(&found, unfinished, head.is_none() && !names.is_empty())?;
        Ok(found)
    }

    fn note_found(&mut self, found: &Resume, unfinished: usize, headless: bool) -> io::Result<()> {
        let unfinished = (unfinished > 0).then(|| {
            format!("{unfinished} bytes of a line that was never finished were cut off: no call was answered for it")
        });
        let headless =
            headless.then(|| "its head was not there: a cut at its end would not be seen".to_owned());
        let reasons: Vec<String> = unfinished
            .into_iter()
            .chain(headless)
            .chain(found.broken.clone())
            .collect();
        if reasons.is_empty() {
            return Ok(());
        }
        let reason = reasons.join("; ");
        if found.broken.is_some() {
            error!(
                MESSAGE_ID = id::AUDIT_BROKEN,
                REASON = reason,
                "the audit log is not as it was left: {reason}"
            );
        }
        let mut note = Event::note(self.moment(), "log", self.generation);
        note.reason = Some(reason);
        self.append(note)
    }
}

fn json(event: &Event) -> String {
    // Texts, numbers and lists of them always make JSON.
    serde_json::to_string(event).unwrap_or_default()
}

/// The journal gets each record with its hash: what leaves the host with it can't be written anew there.
fn journal(seq: u64, sealed: &Sealed) {
    let event = &sealed.event;
    info!(
        MESSAGE_ID = id::AUDIT,
        AUDIT_SEQ = seq,
        AUDIT_HASH = sealed.hash,
        AUDIT_ACTION = event.action,
        AUDIT_WHO = event.who.to_string(),
        AUDIT_RESULT = event.result.as_str(),
        GENERATION = event.generation,
        RECORD = sealed.line.trim_end(),
        "audit {seq}: {}",
        event.text()
    );
}

#[cfg(test)]
mod tests;
