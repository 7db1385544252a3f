//! Waiting for files to change: inotify(7), awaited.
//!
//! Folders are watched, not files: a file that is replaced by a rename, or not there yet, is seen too.
//! May not live here: what a change means.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::path::Path;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};

use super::descriptors::Readable;

/// What a place was watched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Topic {
    /// The injected spec.
    Spec,
    /// Users of the system.
    Accounts,
    /// sshd's configuration and host keys.
    Sshd,
    /// Users' key files and the folders above them.
    Keys,
    /// The system bus.
    Bus,
    /// Credentials for pushing reports.
    Credentials,
    /// The daemon's control socket.
    Control,
}

impl Topic {
    const ALL: [Self; 7] = [
        Self::Spec,
        Self::Accounts,
        Self::Sshd,
        Self::Keys,
        Self::Bus,
        Self::Control,
        Self::Credentials,
    ];
}

/// What of a folder matters.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    topic: Topic,
    /// One name in it; none: all of them.
    name: Option<OsString>,
    /// Whether the folder's own mode, owner and place matter too.
    itself: bool,
}

impl Place {
    fn concerns(&self, event: &InotifyEvent) -> bool {
        let written = AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO;
        // Who writes a spec makes an empty file first; only a whole one is worth reading.
        if self.topic == Topic::Spec && !event.mask.intersects(written) {
            return false;
        }
        match (&self.name, &event.name) {
            (_, None) => self.itself,
            (Some(name), Some(changed)) => name == changed,
            (None, Some(_)) => true,
        }
    }
}

/// Watches folders.
pub struct Watch {
    inotify: Readable<Inotify>,
    places: Vec<(WatchDescriptor, Place)>,
}

impl Watch {
    /// Starts.
    ///
    /// # Errors
    /// When the kernel gives no more inotify instances (`fs.inotify.max_user_instances`).
    pub fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let inotify = Readable::new(inotify)?;
        Ok(Self {
            inotify,
            places: Vec::new(),
        })
    }

    /// Watches one file, there or not yet, in a folder that must be there.
    ///
    /// # Errors
    /// When the folder can't be watched.
    pub fn file(&mut self, topic: Topic, path: &Path) -> io::Result<()> {
        self.add_file(topic, path, false)
    }

    /// Watches one file as [`Self::file`], and who may write to its folder.
    ///
    /// # Errors
    /// When the folder can't be watched.
    pub fn file_and_folder(&mut self, topic: Topic, path: &Path) -> io::Result<()> {
        self.add_file(topic, path, true)
    }

    /// Watches a folder with all that is directly in it.
    ///
    /// # Errors
    /// When the folder can't be watched.
    pub fn folder(&mut self, topic: Topic, path: &Path) -> io::Result<()> {
        self.add(
            path,
            Place {
                topic,
                name: None,
                itself: true,
            },
        )
    }

    /// How many places are watched.
    pub fn places(&self) -> usize {
        self.places.len()
    }

    fn add_file(&mut self, topic: Topic, path: &Path, itself: bool) -> io::Result<()> {
        let name = path.file_name().unwrap_or_default().to_owned();
        self.add(
            path.parent().unwrap_or(Path::new("/")),
            Place {
                topic,
                name: Some(name),
                itself,
            },
        )
    }

    fn add(&mut self, folder: &Path, place: Place) -> io::Result<()> {
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        let watch = self.inotify.source().add_watch(folder, flags)?;
        if !self.places.contains(&(watch, place.clone())) {
            self.places.push((watch, place));
        }
        Ok(())
    }

    /// Waits until something changed, and says for which topics. Lost events count as a change of all.
    ///
    /// # Errors
    /// As read(2).
    pub async fn changed(&mut self) -> io::Result<BTreeSet<Topic>> {
        loop {
            let events = self
                .inotify
                .read(|inotify| inotify.read_events().map_err(Into::into))
                .await?;
            let mut topics = BTreeSet::new();
            for event in events {
                if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                    topics.extend(Topic::ALL);
                }
                let concerned = self
                    .places
                    .iter()
                    .filter(|(watch, place)| *watch == event.wd && place.concerns(&event));
                topics.extend(concerned.map(|(_, place)| place.topic));
                if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                    // The folder is gone; the number may be given to another one.
                    self.places.retain(|(watch, _)| *watch != event.wd);
                }
            }
            if !topics.is_empty() {
                return Ok(topics);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_file_is_seen_when_it_comes_and_others_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let mut watch = Watch::new().unwrap();
        watch.file(Topic::Spec, &folder.path().join("spec.json")).unwrap();
        std::fs::write(folder.path().join("other"), "x").unwrap();
        std::fs::write(folder.path().join("new"), "x").unwrap();
        std::fs::rename(folder.path().join("new"), folder.path().join("spec.json")).unwrap();
        assert_eq!(watch.changed().await.unwrap(), [Topic::Spec].into());
        let more = tokio::time::timeout(std::time::Duration::from_millis(20), watch.changed()).await;
        assert!(more.is_err(), "{more:?}");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_spec_is_seen_when_it_is_whole() {
        use std::io::Write;
        let folder = tempfile::tempdir().unwrap();
        let mut watch = Watch::new().unwrap();
        watch.file(Topic::Spec, &folder.path().join("spec.json")).unwrap();
        let mut file = std::fs::File::create(folder.path().join("spec.json")).unwrap();
        file.write_all(b"{").unwrap();
        let none = tokio::time::timeout(std::time::Duration::from_millis(20), watch.changed()).await;
        assert!(none.is_err(), "{none:?}");
        drop(file);
        assert_eq!(watch.changed().await.unwrap(), [Topic::Spec].into());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn other_files_of_a_home_are_no_event_and_its_mode_is() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let mut watch = Watch::new().unwrap();
        watch
            .file_and_folder(Topic::Keys, &folder.path().join(".ssh"))
            .unwrap();
        std::fs::write(folder.path().join(".bash_history"), "x").unwrap();
        let none = tokio::time::timeout(std::time::Duration::from_millis(20), watch.changed()).await;
        assert!(none.is_err(), "{none:?}");
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o770)).unwrap();
        assert_eq!(watch.changed().await.unwrap(), [Topic::Keys].into());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_change_of_mode_is_seen() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let mut watch = Watch::new().unwrap();
        watch.folder(Topic::Keys, folder.path()).unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o770)).unwrap();
        assert_eq!(watch.changed().await.unwrap(), [Topic::Keys].into());
    }
}
