//! What is mounted and swapped to, and the block devices beneath, as /proc and /sys tell it.
//!
//! Everything is read below a root, so that recorded trees are read by the same code. No device is opened. May not
//! live here: what it proves (`policy::storage`).

pub mod ask;
mod elsewhere;
pub mod watch;

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::policy::storage::answers::Answers;
use crate::policy::storage::mounts::{Number, mounts, swaps};
use crate::policy::storage::{Backing, Device, Kind, Look, Storage, Volume, volumes};

/// Most devices that are walked over; more are unknown.
const MAX_DEVICES: usize = 1024;
/// Most bytes of a file of sysfs: they are pages.
const MAX_ATTRIBUTE: u64 = 4096;
/// Most bytes of mountinfo.
const MAX_MOUNTS: u64 = 16 << 20;

/// Looks at the instance.
///
/// # Errors
/// When the kernel does not tell what is mounted.
pub async fn observe() -> Result<Storage, String> {
    let sight = super::as_user::off_thread(|| Sight::of(Path::new("/"))).await;
    let sight = sight.map_err(|error| error.to_string())??;
    let answers = match sight.questions() {
        questions if questions.is_none() => Answers::default(),
        questions => ask::ask(questions).await,
    };
    let finish = move || sight.with(answers);
    super::as_user::off_thread(finish)
        .await
        .map_err(|error| error.to_string())
}

/// What privileged programs have to be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Questions {
    /// Tables of the device mapper.
    pub tables: bool,
    /// ZFS's properties and pools.
    pub zfs: bool,
}

impl Questions {
    fn is_none(self) -> bool {
        !self.tables && !self.zfs
    }
}

/// What can be seen without a privilege.
pub struct Sight {
    root: PathBuf,
    storage: Storage,
}

impl Sight {
    /// Reads /proc and /sys below a root.
    ///
    /// # Errors
    /// When mountinfo or swaps can't be read; the file is named.
    pub fn of(root: &Path) -> Result<Self, String> {
        // The first process sees the host as it is; a sandboxed daemon has mounts of its own.
        let mounted = read_proc(root, "proc/1/mountinfo")
            .or_else(|_| read_proc(root, "proc/self/mountinfo"))
            .and_then(|text| mounts(&text))?;
        let swapped = match read_proc(root, "proc/swaps") {
            Ok(text) => swaps(&text)?,
            // A kernel without swap has no such file.
            Err(_) if !root.join("proc/swaps").exists() => Vec::new(),
            Err(reason) => return Err(reason),
        };
        let look = Sysfs { root };
        let (mut volumes, places) = volumes(&mounted, &swapped, &look);
        volumes.extend(elsewhere::volumes(root, &volumes));
        let mut sight = Self {
            root: root.to_owned(),
            storage: Storage {
                volumes,
                devices: BTreeMap::new(),
                unread: BTreeMap::new(),
                places,
                astray: BTreeMap::new(),
                answers: Answers::default(),
                pools: BTreeMap::new(),
            },
        };
        let devices = sight.storage.volumes.iter().filter_map(|v| match &v.backing {
            Backing::Devices(devices) => Some(devices.clone()),
            _ => None,
        });
        let start = devices.flatten().collect();
        sight.walk(start);
        sight.storage.astray = elsewhere::astray(root, &sight.storage);
        Ok(sight)
    }

    /// What of it only privileged programs can tell.
    pub fn questions(&self) -> Questions {
        let mut devices = self.storage.devices.values();
        let is_zfs = |volume: &Volume| matches!(volume.backing, Backing::Zfs(_));
        let zfs = self.storage.volumes.iter().any(is_zfs);
        Questions {
            // What a pool is on is not known before ZFS is asked.
            tables: zfs || devices.any(|device| matches!(device.kind, Kind::Mapped { .. })),
            zfs,
        }
    }

    /// The whole, with what they told.
    pub fn with(mut self, answers: Answers) -> Storage {
        // The stores of snapshots are not listed beneath what they are of.
        let mut start: VecDeque<Number> = answers.stores.values().flatten().copied().collect();
        for (pool, paths) in &answers.pools {
            let look = Sysfs { root: &self.root };
            let devices: Result<Vec<Number>, String> = paths.iter().map(|path| look.device(path)).collect();
            // One that can't be found makes the pool unknown.
            if let Ok(devices) = devices {
                start.extend(devices.iter().copied());
                self.storage.pools.insert(pool.clone(), devices);
            }
        }
        self.walk(start);
        self.storage.answers = answers;
        self.storage
    }

    /// Reads these devices and all beneath them, each once.
    fn walk(&mut self, mut to_see: VecDeque<Number>) {
        while let Some(number) = to_see.pop_front() {
            let Storage { devices, unread, .. } = &mut self.storage;
            if devices.contains_key(&number) || unread.contains_key(&number) {
                continue;
            }
            let seen = match devices.len() < MAX_DEVICES {
                true => device(&self.root, number),
                false => Err(format!("there are more than {MAX_DEVICES} devices")),
            };
            match seen {
                Ok(device) => {
                    to_see.extend(device.below.iter().copied());
                    devices.insert(number, device);
                }
                Err(reason) => {
                    unread.insert(number, reason);
                }
            }
        }
    }
}

fn read_proc(root: &Path, file: &str) -> Result<String, String> {
    read(&root.join(file), MAX_MOUNTS).map_err(|error| format!("/{file}: {error}"))
}

fn read(path: &Path, limit: u64) -> io::Result<String> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::other(format!("longer than {limit} bytes")));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// One line of sysfs; none if there is no such file.
fn attribute(path: &Path) -> io::Result<Option<String>> {
    match read(path, MAX_ATTRIBUTE) {
        // The kernel adds one line feed; a name may end with one of its own.
        Ok(text) => Ok(Some(text.strip_suffix('\n').unwrap_or(&text).to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn device(root: &Path, number: Number) -> Result<Device, String> {
    let shown = format!("/sys/dev/block/{number}");
    let folder = fs::canonicalize(root.join(format!("sys/dev/block/{number}")))
        .map_err(|error| format!("{shown}: {error}"))?;
    read_device(root, &folder, number).map_err(|error| format!("{shown}: {error}"))
}

fn read_device(root: &Path, folder: &Path, number: Number) -> io::Result<Device> {
    let name = folder
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let attribute = |file: &str| attribute(&folder.join(file));
    let mut below = slaves(folder)?;
    let kind = if let Some(mapped) = attribute("dm/name")? {
        Kind::Mapped {
            name: mapped,
            uuid: attribute("dm/uuid")?.unwrap_or_default(),
        }
    } else if let Some(level) = attribute("md/level")? {
        Kind::Raid { level }
    } else if attribute("partition")?.is_some() {
        below.extend(self::attribute(&folder.join("../dev"))?.and_then(|text| text.parse::<Number>().ok()));
        Kind::Partition
    } else if number.major == 7 {
        let file = attribute("loop/backing_file")?;
        // The kernel marks a removed file so; its data are where they were.
        let name = file.as_deref().map(|file| file.strip_suffix(" (deleted)"));
        Kind::Loop {
            removed: name.is_some_and(|name| name.is_some()),
            file: name.flatten().map(str::to_owned).or(file),
        }
    } else if name.starts_with("zram") {
        let backing = attribute("backing_dev")?.filter(|device| device != "none");
        if let Some(device) = backing {
            let found = Sysfs { root }.device(&device).map_err(io::Error::other)?;
            below.push(found);
        }
        Kind::Memory
    } else if number.major == 1 {
        // RAM disks (Documentation/admin-guide/devices.txt).
        Kind::Memory
    } else if folder.join("bcache").is_dir() && name.starts_with("bcache") {
        Kind::Bcache {
            cached: folder.join("bcache/cache").exists(),
        }
    } else {
        let serial = attribute("serial")?.or(attribute("device/serial")?);
        let serial = serial.map(|serial| serial.trim().chars().take(64).collect());
        Kind::Disk {
            serial: serial.filter(|serial: &String| !serial.is_empty()),
        }
    };
    Ok(Device { name, kind, below })
}

/// What the kernel links as beneath a device.
fn slaves(folder: &Path) -> io::Result<Vec<Number>> {
    let entries = match fs::read_dir(folder.join("slaves")) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut below = Vec::new();
    for entry in entries {
        below.push(number_of(&entry?.path())?);
    }
    below.sort();
    Ok(below)
}

/// The numbers of the device of this folder.
fn number_of(folder: &Path) -> io::Result<Number> {
    let text = read(&folder.join("dev"), MAX_ATTRIBUTE)?;
    text.trim_end().parse().map_err(io::Error::other)
}

/// Questions about single mounts.
struct Sysfs<'a> {
    root: &'a Path,
}

impl Sysfs<'_> {
    fn block(&self) -> PathBuf {
        self.root.join("sys/class/block")
    }

    /// The folder of the device of that name in the device mapper.
    fn mapped(&self, name: &str) -> io::Result<Option<PathBuf>> {
        for entry in fs::read_dir(self.block())? {
            let folder = entry?.path();
            if attribute(&folder.join("dm/name"))?.as_deref() == Some(name) {
                return Ok(Some(folder));
            }
        }
        Ok(None)
    }
}

impl Look for Sysfs<'_> {
    fn btrfs(&self, source: &str) -> Result<Vec<Number>, String> {
        let source = self.device(source)?;
        let fail = |error: io::Error| format!("/sys/fs/btrfs: {error}");
        for file_system in fs::read_dir(self.root.join("sys/fs/btrfs")).map_err(fail)? {
            let folder = file_system.map_err(fail)?.path().join("devices");
            // Beside the file systems stands what this kernel's btrfs can do.
            let Ok(devices) = fs::read_dir(folder) else {
                continue;
            };
            let numbers: io::Result<Vec<Number>> = devices.map(|device| number_of(&device?.path())).collect();
            let mut numbers = numbers.map_err(fail)?;
            if numbers.contains(&source) {
                numbers.sort();
                return Ok(numbers);
            }
        }
        Err("/sys/fs/btrfs does not tell its devices".to_owned())
    }

    fn device(&self, path: &str) -> Result<Number, String> {
        let fail = |error: io::Error| format!("{path}: {error}");
        let Some(name) = path.strip_prefix("/dev/") else {
            return Err(format!("{path} is no path of a device"));
        };
        let mapped = match name.strip_prefix("mapper/") {
            Some(mapped) => self.mapped(mapped).map_err(fail)?,
            None => None,
        };
        // A link of udev's leads to the kernel's name; where sysfs has a sub-folder's sign, it is `!`.
        let link = fs::read_link(self.root.join("dev").join(name)).ok();
        let target = link.as_deref().and_then(Path::file_name);
        let plain = target.map_or(name.replace('/', "!"), |name| name.to_string_lossy().into_owned());
        let folder = mapped.unwrap_or_else(|| self.block().join(plain));
        number_of(&folder).map_err(fail)
    }

    fn others_may_write(&self, point: &str) -> bool {
        use std::os::unix::fs::MetadataExt;
        let path = self.root.join(point.trim_start_matches('/'));
        // What can't be looked at is not let off.
        fs::symlink_metadata(path).map_or(true, |found| found.uid() != 0 || found.mode() & 0o022 != 0)
    }

    fn has_fscrypt(&self, point: &str) -> bool {
        self.root
            .join(point.trim_start_matches('/'))
            .join(".fscrypt")
            .is_dir()
    }
}
