//! The way down from each volume to the disks, and what it proves.
//!
//! A device that encrypts ends the way. Where the way parts (RAID, LVM, btrfs), the worst leg counts. May not live
//! here: what the check makes of it (`readiness::storage`).

use std::collections::{BTreeMap, BTreeSet};

use portcullis_protocol::spec::storage::Attestation;

use super::answers::Segment;
use super::cipher::{Algorithm, Worth};
use super::mounts::Number;
use super::places::Holds;
use super::{Backing, Device, Kind, Storage, Volume};

/// How well a volume is known to be encrypted at rest; worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// Nothing between the file system and a disk encrypts, and nobody says that the disk does.
    Absent,
    /// It could not be found out.
    Unknown,
    /// The provider says that it encrypts the disk.
    Attested,
    /// The kernel encrypts what is written, by its own account.
    Verified,
}

impl State {
    /// The word in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Unknown => "unknown",
            Self::Attested => "attested",
            Self::Verified => "verified",
        }
    }
}

/// What was found on the way down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// How well it is known.
    pub state: State,
    /// Why, in words.
    pub reason: String,
    /// Encrypted, and somebody should know how.
    pub lesser: Option<String>,
    /// The way down; of several, the worst.
    pub path: Vec<Number>,
    /// The algorithms on all ways.
    pub algorithms: BTreeSet<String>,
}

impl Found {
    fn new(state: State, reason: impl Into<String>) -> Self {
        Self {
            state,
            reason: reason.into(),
            lesser: None,
            path: Vec::new(),
            algorithms: BTreeSet::new(),
        }
    }

    fn unknown(reason: impl Into<String>) -> Self {
        Self::new(State::Unknown, reason)
    }

    /// If nothing better is known, then at least that it may be encrypted.
    fn perhaps(self, reason: String) -> Self {
        match self.state {
            State::Absent => Self {
                state: State::Unknown,
                reason,
                ..self
            },
            _ => self,
        }
    }

    fn through(mut self, device: Number) -> Self {
        self.path.insert(0, device);
        self
    }
}

/// A volume with what was found of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged<'a> {
    /// Which.
    pub volume: &'a Volume,
    /// What was found.
    pub found: Found,
}

impl Judged<'_> {
    /// Whether it is let off: what firmware and boot loader read can't be encrypted.
    pub fn is_excused(&self) -> bool {
        self.volume.for_boot && self.found.state < State::Verified
    }
}

/// Judges each volume that holds something when the power is gone. A folder of another volume (the overlays of
/// containers) is not told apart from it.
pub fn judge<'a>(storage: &'a Storage, claims: &[Attestation]) -> Vec<Judged<'a>> {
    let mut walk = Walk {
        storage,
        claims,
        known: BTreeMap::new(),
        under_way: BTreeSet::new(),
        volumes: BTreeSet::new(),
    };
    let mut judged = Vec::new();
    for (at, volume) in storage.volumes.iter().enumerate() {
        if volume.kind != "swap" && walk.is_folder(at, volume) {
            continue;
        }
        let found = walk.volume(at);
        judged.extend(found.map(|found| Judged { volume, found }));
    }
    judged
}

/// Deeper than the kernel lets devices be stacked in earnest.
const DEPTH: usize = 64;

struct Walk<'a> {
    storage: &'a Storage,
    claims: &'a [Attestation],
    known: BTreeMap<Number, Option<Found>>,
    under_way: BTreeSet<Number>,
    volumes: BTreeSet<usize>,
}

/// Nothing where nothing outlives power.
type Way = Option<Found>;

impl Walk<'_> {
    fn is_folder(&self, at: usize, volume: &Volume) -> bool {
        match &volume.backing {
            Backing::Path(path) if !is_root(volume) => {
                let place = self.storage.place_of(path);
                place.is_some_and(|place| match place.holds {
                    Holds::Volume(other) => other != at,
                    Holds::Memory => true,
                    Holds::Other => false,
                })
            }
            _ => false,
        }
    }

    fn volume(&mut self, at: usize) -> Way {
        let volume = self.storage.volumes.get(at)?;
        if !self.volumes.insert(at) {
            return Some(Found::unknown("what it is made of goes round in a circle"));
        }
        let found = match &volume.backing {
            Backing::Devices(devices) => self.all(devices),
            // An overlay for the root was mounted from outside: its folders are not where they were then.
            Backing::Path(path) if is_root(volume) => Some(Found::unknown(format!(
                "the folder that it writes to, {path}, is not to be seen from inside"
            ))),
            Backing::Path(path) => self.path(path),
            Backing::Zfs(dataset) => self.zfs(dataset),
            Backing::Share => Some(self.share(&volume.source)),
            Backing::Unknown(reason) => Some(Found::unknown(reason.clone())),
        };
        self.volumes.remove(&at);
        found
    }

    fn path(&mut self, path: &str) -> Way {
        if let Some(reason) = self.storage.astray.get(path) {
            return Some(Found::unknown(format!(
                "{path} is not where that leads to now ({reason})"
            )));
        }
        let Some(place) = self.storage.place_of(path) else {
            return Some(Found::unknown(format!("{path} is on nothing that is mounted")));
        };
        match place.holds {
            Holds::Volume(at) => self.volume(at),
            Holds::Memory => None,
            Holds::Other => Some(Found::unknown(format!(
                "{path} is on {}, which is no storage that can be followed",
                place.point
            ))),
        }
    }

    /// All of them hold a part: the worst counts.
    fn all(&mut self, devices: &[Number]) -> Way {
        if devices.is_empty() {
            return Some(Found::unknown("the kernel names no device beneath"));
        }
        let ways: Vec<Found> = devices.iter().filter_map(|device| self.device(*device)).collect();
        let algorithms = ways.iter().flat_map(|way| way.algorithms.clone()).collect();
        let lesser = ways.iter().find_map(|way| way.lesser.clone());
        let worst = ways.into_iter().min_by_key(|way| way.state)?;
        Some(Found {
            algorithms,
            lesser,
            ..worst
        })
    }

    fn device(&mut self, number: Number) -> Way {
        if let Some(known) = self.known.get(&number) {
            return known.clone();
        }
        if self.under_way.len() >= DEPTH || !self.under_way.insert(number) {
            return Some(Found::unknown("its devices go round in a circle").through(number));
        }
        let found = match (
            self.storage.devices.get(&number),
            self.storage.unread.get(&number),
        ) {
            (_, Some(reason)) => Some(Found::unknown(reason.clone())),
            (Some(device), None) => self.known_device(device),
            (None, None) => Some(Found::unknown(format!("the device {number} was not looked at"))),
        };
        let found = found.map(|found| found.through(number));
        self.under_way.remove(&number);
        self.known.insert(number, found.clone());
        found
    }

    fn known_device(&mut self, device: &Device) -> Way {
        match &device.kind {
            Kind::Mapped { name, uuid } => self.mapped(device, name, uuid),
            Kind::Raid { .. } | Kind::Partition => self.all(&device.below),
            Kind::Loop { file: Some(file), .. } => self.path(file),
            Kind::Loop { file: None, .. } => Some(Found::unknown(format!(
                "the kernel does not tell the file of {}",
                device.name
            ))),
            Kind::Memory if device.below.is_empty() => None,
            Kind::Memory => self.all(&device.below),
            // What the cache holds is plain if it is: both are beneath, while one is attached.
            Kind::Bcache { cached } => self.all(&device.below).map(|found| match found.state {
                State::Absent => found,
                _ if *cached && device.below.len() > 1 => found,
                _ => Found {
                    state: State::Unknown,
                    reason: format!("the cache of {} is not told", device.name),
                    ..found
                },
            }),
            Kind::Disk { serial } => Some(self.disk(&device.name, serial.as_deref())),
        }
    }

    fn mapped(&mut self, device: &Device, name: &str, uuid: &str) -> Way {
        let segments = self.storage.answers.tables.get(name).map(Vec::as_slice);
        let beneath = self.all(&device.below)?;
        let Some(segments) = segments.filter(|segments| !segments.is_empty()) else {
            let why = self.storage.answers.problem.as_deref();
            let why = why.unwrap_or("the kernel's table of it was not told");
            return Some(if encrypts_nothing(uuid) {
                beneath
            } else {
                let what = made_by(uuid).unwrap_or("a device of the device mapper");
                beneath.perhaps(format!(
                    "{} is {what}; its cipher is not known: {why}",
                    device.name
                ))
            });
        };
        let crypt = segments.iter().filter(|one| matches!(one, Segment::Crypt { .. }));
        let is_other = |segment: &Segment| matches!(segment, Segment::Crypt { below, .. } if below.is_none_or(|below| !device.below.contains(&below)));
        Some(if crypt.count() < segments.len() {
            self.other_target(device, uuid, segments, beneath)
        } else if segments.iter().any(is_other) {
            beneath.perhaps(format!("{} changed while it was looked at", device.name))
        } else {
            encrypted(&device.name, segments, beneath)
        })
    }

    /// Not, or not all, dm-crypt's.
    fn other_target(&mut self, device: &Device, uuid: &str, segments: &[Segment], beneath: Found) -> Found {
        let name = &device.name;
        // cryptsetup maps a range of a self-encrypting drive with a plain target.
        if uuid.starts_with("CRYPT-LUKS2-OPAL-") {
            return beneath.perhaps(format!(
                "{name}: the drive itself encrypts (OPAL), and its word can't be checked by the kernel"
            ));
        }
        let other = |segment: &Segment| match segment {
            Segment::Other(target) => Some(target.clone()),
            _ => None,
        };
        let mut others = segments.iter().filter_map(other);
        if let Some(target) = others.clone().find(|target| target.contains("crypt")) {
            return beneath.perhaps(format!("{name}: the target {target} is not known here"));
        }
        if !others.any(|target| target == "snapshot-origin") {
            return beneath;
        }
        // What a write replaces is copied to the snapshots first, wherever they are.
        let stores = &self.storage.answers.stores;
        let stores = device.below.iter().filter_map(|origin| stores.get(origin));
        let all: Vec<Number> = device.below.iter().chain(stores.flatten()).copied().collect();
        self.all(&all).unwrap_or(beneath)
    }

    fn zfs(&mut self, dataset: &str) -> Way {
        let answers = &self.storage.answers;
        // A snapshot is encrypted as what it was made of.
        let dataset = dataset.split('@').next().unwrap_or(dataset);
        let why = answers.problem.as_deref().unwrap_or("zfs did not tell of it");
        let Some(told) = answers.datasets.get(dataset) else {
            return Some(Found::unknown(format!("ZFS's encryption is not known: {why}")));
        };
        let (bits, mode) = match told.encryption.as_str() {
            "off" => {
                let pool = dataset.split('/').next().unwrap_or(dataset);
                return match self.storage.pools.get(pool) {
                    Some(devices) => self.all(devices),
                    None => Some(Found::unknown(format!(
                        "the devices of the pool {pool} are not known: {why}"
                    ))),
                };
            }
            "aes-256-gcm" => (256, "GCM"),
            "aes-256-ccm" => (256, "CCM"),
            "aes-192-gcm" => (192, "GCM"),
            "aes-192-ccm" => (192, "CCM"),
            "aes-128-gcm" => (128, "GCM"),
            "aes-128-ccm" => (128, "CCM"),
            other => {
                return Some(Found::unknown(format!(
                    "ZFS's encryption {other:?} is not known here"
                )));
            }
        };
        if told.key_status != "available" {
            let status = &told.key_status;
            return Some(Found::unknown(format!(
                "{dataset} is mounted, and ZFS says that its key is {status:?}"
            )));
        }
        let name = format!("AES-{bits}-{mode}");
        Some(Found {
            lesser: (bits < 256).then(|| format!("a key of {bits} bits, not of 256")),
            algorithms: [name.clone()].into(),
            ..Found::new(State::Verified, format!("ZFS encrypts {dataset} with {name}"))
        })
    }

    fn share(&self, source: &str) -> Found {
        let named = |claim: &&Attestation| claim.disks.iter().any(|disk| disk.as_str() == source);
        match self.claims.iter().find(named) {
            Some(claim) => attested(claim, source),
            None => Found::unknown("another machine keeps the data"),
        }
    }

    fn disk(&self, name: &str, serial: Option<&str>) -> Found {
        let meant = |claim: &&Attestation| {
            let is_it = |disk: &str| disk == name || Some(disk) == serial;
            claim.disks.is_empty() || claim.disks.iter().any(|disk| is_it(disk.as_str()))
        };
        match self.claims.iter().find(meant) {
            Some(claim) => attested(claim, name),
            None => Found::new(
                State::Absent,
                format!("nothing between the file system and the disk {name} encrypts"),
            ),
        }
    }
}

fn is_root(volume: &Volume) -> bool {
    volume.kind == "overlay" && volume.points.iter().any(|point| point == "/")
}

fn attested(claim: &Attestation, what: &str) -> Found {
    let by = &claim.by;
    let with = match &claim.algorithm {
        Some(algorithm) => format!(" with {algorithm}"),
        None => String::new(),
    };
    Found::new(
        State::Attested,
        format!("{by} says that it encrypts {what}{with}; that can't be seen from inside"),
    )
}

/// All of the device is dm-crypt's.
fn encrypted(device: &str, segments: &[Segment], beneath: Found) -> Found {
    let judged: Vec<Algorithm> = segments.iter().filter_map(Segment::algorithm).collect();
    for Algorithm { worth, .. } in &judged {
        if let Worth::Nothing(reason) = worth {
            return match beneath.state {
                State::Absent => Found {
                    reason: format!("{device}: {reason}"),
                    ..beneath
                },
                _ => beneath,
            };
        }
    }
    for Algorithm { worth, .. } in &judged {
        if let Worth::Unknown(reason) = worth {
            return beneath.perhaps(format!("{device}: {reason}"));
        }
    }
    let algorithms: BTreeSet<String> = judged.iter().map(|one| one.name.clone()).collect();
    let lesser = judged.iter().find_map(|one| match &one.worth {
        Worth::Lesser(reason) => Some(format!("{device}: {reason}")),
        _ => None,
    });
    let names: Vec<&str> = algorithms.iter().map(String::as_str).collect();
    Found {
        state: State::Verified,
        reason: format!("the kernel encrypts {device} with {}", names.join(", ")),
        lesser,
        path: beneath.path,
        algorithms,
    }
}

/// Who made a device, by how its uuid begins; for what may encrypt.
pub fn made_by(uuid: &str) -> Option<&'static str> {
    const MAKERS: [(&str, &str); 13] = [
        ("CRYPT-LUKS2-OPAL-", "LUKS2 with OPAL"),
        ("CRYPT-LUKS2-", "LUKS2"),
        ("CRYPT-LUKS1-", "LUKS1"),
        ("CRYPT-PLAIN-", "plain dm-crypt"),
        ("CRYPT-BITLK-", "BitLocker"),
        ("CRYPT-TCRYPT-", "TrueCrypt or VeraCrypt"),
        ("CRYPT-LOOPAES-", "loop-AES"),
        ("CRYPT-FVAULT2-", "FileVault2"),
        ("CRYPT-VERITY-", "dm-verity"),
        ("CRYPT-INTEGRITY-", "dm-integrity"),
        ("CRYPT-SUBDEV-", "dm-integrity beneath LUKS2"),
        ("LVM-", "LVM"),
        ("mpath-", "multipath"),
    ];
    let maker = MAKERS.iter().find(|(start, _)| uuid.starts_with(start));
    maker.map(|(_, name)| *name)
}

/// Whether such a device passes data on as it is.
fn encrypts_nothing(uuid: &str) -> bool {
    const PLAIN: [&str; 7] = [
        "LVM-",
        "mpath-",
        "part",
        "DMRAID-",
        "CRYPT-VERITY-",
        "CRYPT-INTEGRITY-",
        "CRYPT-SUBDEV-",
    ];
    PLAIN.iter().any(|start| uuid.starts_with(start))
}
