//! Reports that wait for the control plane, on disk: a file each, named by its number, in the state folder.
//!
//! A number is used for one report only, whatever ends the process: `spool/stream.json` says which is next, and
//! is on disk before the last report that had one is removed.
//! May not live here: what goes when there is no room (`policy::spool`), sending.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use portcullis_protocol::identity::to_hex;
use portcullis_protocol::{CheckId, Report, Status};
use serde::{Deserialize, Serialize};

use crate::health::push::offer::Change;
use crate::policy::spool::{Bounds, Queue, Waiting};
use crate::system::{documents, files};

const FOLDER: &str = "spool";
const STREAM_FILE: &str = "stream.json";
const MAX_STREAM_BYTES: usize = 64 << 10;
/// Reports have some 10 kB.
const MAX_REPORT_BYTES: usize = 4 << 20;
/// Numbers are those that every JSON parser keeps exactly (RFC 8259 section 6). A file with a higher one is
/// damaged, and so is a stream that is to go on with one.
const LAST_NUMBER: u64 = (1 << 53) - 1;

/// What is worth telling at once: the rest of a report changes all the time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct News {
    ready: bool,
    generation: Option<u64>,
    checks: Vec<(CheckId, Status)>,
}

impl News {
    /// What a report tells.
    pub fn of(report: &Report) -> Self {
        let checks = report.checks.iter().map(|check| (check.id, check.status));
        Self {
            ready: report.ready,
            generation: report.generation,
            checks: checks.collect(),
        }
    }
}

/// What is kept beside the reports.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Stream {
    /// Numbers count in this stream.
    id: String,
    /// The next number, if no report with a higher one waits.
    next: u64,
    dropped: u64,
    /// What was told last.
    last: Option<News>,
}

/// The reports that wait.
pub struct Spool {
    folder: PathBuf,
    id: String,
    queue: Queue,
    last: Option<News>,
    /// Whether the stream's file is there.
    is_kept: bool,
    /// Files of reports that are done with and could not be removed.
    left: Vec<PathBuf>,
}

/// What adding a report did.
#[derive(Debug, PartialEq, Eq)]
pub enum Added {
    /// It tells nothing new.
    NoNews,
    /// It waits; so many others had to go.
    Waits {
        /// How many.
        dropped: usize,
    },
}

impl Spool {
    /// The spool as an earlier process left it in the state folder. With a reason, if that can't be used: then
    /// it is empty, and another stream.
    pub fn open(state: &Path, bounds: Bounds) -> (Self, Option<String>) {
        let folder = state.join(FOLDER);
        let named = |file: &Path, error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
        let file = folder.join(STREAM_FILE);
        let stream = documents::load::<Stream>(&file, MAX_STREAM_BYTES).map_err(|e| named(&file, &e));
        let stream = stream.and_then(|stream| match stream {
            Some(stream) if stream.next > LAST_NUMBER => Err(named(&file, &"its next number can't be")),
            stream => Ok(stream),
        });
        let waiting = listed(&folder).map_err(|e| named(&folder, &e));
        let (stream, waiting, reason) = match (stream, waiting) {
            (Ok(Some(stream)), Ok(waiting)) => (Some(stream), waiting, None),
            // Reports without a stream are the rest of a removed one.
            (Ok(None), Ok(_)) => (None, Vec::new(), None),
            (Err(reason), _) | (_, Err(reason)) => (None, Vec::new(), Some(reason)),
        };
        let (waiting, doubled) = each_number_once(waiting);
        let is_kept = stream.is_some();
        let stream = stream.unwrap_or_else(|| Stream {
            id: new_id(),
            next: 1,
            dropped: 0,
            last: None,
        });
        let (queue, over) = Queue::restore(waiting, stream.next, stream.dropped, bounds);
        let mut spool = Self {
            folder,
            id: stream.id,
            queue,
            last: stream.last,
            is_kept,
            left: Vec::new(),
        };
        spool.last = spool.newest_news().or(spool.last);
        let left = over.iter().chain(&doubled);
        spool.left = left.map(|report| spool.path(report)).collect();
        (spool, reason)
    }

    /// The stream that numbers count in.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The reports that wait.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Adds a report if it tells something new. It is on disk when this returns.
    ///
    /// # Errors
    /// When it can't be written. It is news no more then, and counts as dropped.
    pub fn add(&mut self, report: &Report) -> io::Result<Added> {
        let news = News::of(report);
        if self.last.as_ref() == Some(&news) {
            return Ok(Added::NoNews);
        }
        let readiness = self.last.as_ref().is_none_or(|last| last.ready != news.ready);
        self.last = Some(news);
        let written = self.write(report, readiness);
        if written.is_err() {
            self.queue.count_dropped();
        }
        written.map(|dropped| Added::Waits { dropped })
    }

    fn write(&mut self, report: &Report, readiness: bool) -> io::Result<usize> {
        let body = serde_json::to_vec(report).map_err(io::Error::other)?;
        let file = documents::enclose(&body);
        if !self.is_kept {
            self.begin()?;
        }
        let bytes = file.len() as u64;
        let waiting = Waiting {
            sequence: self.queue.next(),
            bytes,
            readiness,
        };
        files::replace(&self.path(&waiting), &file, 0o600)?;
        let over = self.queue.add(bytes, readiness);
        if !over.is_empty() {
            for report in &over {
                self.left.push(self.path(report));
            }
            self.clean();
        }
        Ok(over.len())
    }

    /// A new stream: what an old one left is not of it.
    fn begin(&mut self) -> io::Result<()> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)?;
        for report in listed(&self.folder)? {
            files::remove(&self.path(&report))?;
        }
        self.keep()
    }

    /// The oldest change that waits. One whose file can't be read any more counts as dropped.
    pub fn oldest(&mut self) -> Option<Change> {
        while let Some(oldest) = self.queue.oldest() {
            let path = self.path(&oldest);
            match body(&path) {
                Ok(body) => {
                    return Some(Change {
                        sequence: oldest.sequence,
                        body,
                    });
                }
                Err(error) => {
                    tracing::warn!(
                        MESSAGE_ID = crate::log::id::REPORT_DROPPED,
                        %error,
                        "{}: a report that waited is lost",
                        path.display()
                    );
                    self.queue.count_dropped();
                    self.done(oldest.sequence);
                }
            }
        }
        None
    }

    /// Since when the oldest waits.
    pub fn waits_since(&self) -> Option<Timestamp> {
        let meta = fs::metadata(self.path(&self.queue.oldest()?)).ok()?;
        Timestamp::try_from(meta.modified().ok()?).ok()
    }

    /// Takes out a change that was delivered, or is given up. Its file goes when the disk allows it; until
    /// then another process would deliver it once more, under the same number.
    pub fn done(&mut self, sequence: u64) {
        if let Some(report) = self.queue.take(sequence) {
            self.left.push(self.path(&report));
            self.clean();
        }
    }

    /// Counts a change that is given up.
    pub fn given_up(&mut self, sequence: u64) {
        self.queue.count_dropped();
        self.done(sequence);
    }

    fn clean(&mut self) {
        let removed = self.keep().and_then(|()| {
            while let Some(path) = self.left.last() {
                files::remove(path)?;
                self.left.pop();
            }
            Ok(())
        });
        if let Err(error) = removed {
            tracing::debug!(%error, "the spool is not cleaned up yet");
        }
    }

    /// Makes the numbers durable.
    fn keep(&mut self) -> io::Result<()> {
        let stream = Stream {
            id: self.id.clone(),
            next: self.queue.next(),
            dropped: self.queue.dropped(),
            last: self.last.clone(),
        };
        documents::save(&self.folder.join(STREAM_FILE), &stream)?;
        self.is_kept = true;
        Ok(())
    }

    /// What the newest report that waits tells.
    fn newest_news(&self) -> Option<News> {
        let newest = self.queue.newest()?;
        let report = body(&self.path(&newest)).ok()?;
        Some(News::of(&serde_json::from_str(&report).ok()?))
    }

    fn path(&self, report: &Waiting) -> PathBuf {
        let kind = if report.readiness { "readiness" } else { "check" };
        self.folder.join(format!("{:020}.{kind}.json", report.sequence))
    }
}

fn new_id() -> String {
    let mut bytes = [0u8; 8];
    // Without randomness two streams of one instance could be taken for one, which is told by its clock.
    if ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut bytes).is_err() {
        bytes = Timestamp::now().as_microsecond().to_be_bytes();
    }
    to_hex(&bytes)
}

/// The reports of a folder, in order. Other files are not ours.
fn listed(folder: &Path) -> io::Result<Vec<Waiting>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut reports = Vec::new();
    for entry in entries {
        let entry = entry?;
        let Some((sequence, readiness)) = entry.file_name().to_str().and_then(parsed) else {
            continue;
        };
        reports.push(Waiting {
            sequence,
            bytes: entry.metadata()?.len(),
            readiness,
        });
    }
    reports.sort_unstable_by_key(|report| report.sequence);
    Ok(reports)
}

/// A number stands for one report: the first of each, and those that have the number of another one.
fn each_number_once(reports: Vec<Waiting>) -> (Vec<Waiting>, Vec<Waiting>) {
    let mut last = None;
    reports
        .into_iter()
        .partition(|report| last.replace(report.sequence) != Some(report.sequence))
}

fn parsed(name: &str) -> Option<(u64, bool)> {
    let (number, kind) = name.split_once('.')?;
    let readiness = match kind {
        "readiness.json" => true,
        "check.json" => false,
        _ => return None,
    };
    let is_number = number.len() == 20 && number.bytes().all(|b| b.is_ascii_digit());
    let number: u64 = is_number.then(|| number.parse().ok())??;
    (number <= LAST_NUMBER).then_some((number, readiness))
}

fn body(path: &Path) -> io::Result<Arc<str>> {
    let bytes = documents::read(path, MAX_REPORT_BYTES)?.ok_or(io::ErrorKind::NotFound)?;
    let text = String::from_utf8(bytes).map_err(io::Error::other)?;
    Ok(text.into())
}

#[cfg(test)]
#[path = "spool_tests.rs"]
mod tests;
