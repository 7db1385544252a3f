//! Encryption at rest: from what is mounted and swapped to, down to the disks.
//!
//! Seen is what `system::storage` filled in; judged is each volume, by the worst way down from it. May not live
//! here: what the check says of it (`readiness::storage`).

pub mod answers;
pub mod cipher;
pub mod mounts;
pub mod places;
#[cfg(test)]
mod tests;
pub mod walk;

use std::collections::{BTreeMap, BTreeSet};

use answers::Answers;
use mounts::{Mount, Number, Swap};
use places::{Holds, Place, without_volume};

/// Mount points that have to be readable before anything can be decrypted (the Boot Loader Specification, UEFI).
pub const BOOT: [&str; 3] = ["/boot", "/boot/efi", "/efi"];

/// What kind of block device it is, and what it has that others have not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Of the device mapper.
    Mapped {
        /// Its name there.
        name: String,
        /// Who made it begins this, by convention: `CRYPT-LUKS2-…`, `LVM-…`; may be empty.
        uuid: String,
    },
    /// Software RAID.
    Raid {
        /// For example `raid1`.
        level: String,
    },
    /// A file as a device.
    Loop {
        /// The file; none if the kernel does not tell.
        file: Option<String>,
        /// Whether the file has no name any more.
        removed: bool,
    },
    /// A part of a disk.
    Partition,
    /// Memory. With a disk beneath that pages move on to, for zram with `backing_dev`.
    Memory,
    /// A cache before a disk.
    Bcache {
        /// Whether a cache is attached now: without one, none is among what is beneath.
        cached: bool,
    },
    /// Nothing is beneath it.
    Disk {
        /// Its serial number, if it tells one.
        serial: Option<String>,
    },
}

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The kernel's name, for example `dm-0`.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// What is beneath it.
    pub below: Vec<Number>,
}

/// What holds a volume's data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// All of these devices.
    Devices(Vec<Number>),
    /// A file or folder of that path, on another volume.
    Path(String),
    /// A dataset of ZFS.
    Zfs(String),
    /// Another machine.
    Share,
    /// It can't be told, for that reason.
    Unknown(String),
}

/// Something that data can be written to and that outlives power: a file system, or a swap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Where it is mounted, shortest first, some of them; a swap's path. None if that is not where the first process
    /// sees it: in another mount namespace alone, or nowhere any more but still in use.
    pub points: Vec<String>,
    /// The file system's type, or `swap`.
    pub kind: String,
    /// What the file system says that it is mounted from.
    pub source: String,
    /// What holds it.
    pub backing: Backing,
    /// Whether it is mounted nowhere but at [`BOOT`], for root alone to write to.
    pub for_boot: bool,
    /// Whether fscrypt keeps its metadata there: single folders may be encrypted.
    pub fscrypt: bool,
}

/// All that was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Storage {
    /// What is mounted and swapped to.
    pub volumes: Vec<Volume>,
    /// The devices that were walked over.
    pub devices: BTreeMap<Number, Device>,
    /// What could not be read of a device, and why.
    pub unread: BTreeMap<Number, String>,
    /// All mounts, for paths.
    pub places: Vec<Place>,
    /// Files of swaps and loops that are not where their paths lead to, and why that is thought.
    pub astray: BTreeMap<String, String>,
    /// What privileged programs told.
    pub answers: Answers,
    /// The devices of ZFS's pools.
    pub pools: BTreeMap<String, Vec<Number>>,
}

/// File systems that hold nothing once the power is gone, or no data of users: the firmware's variables and crash
/// records (efivarfs, pstore) are in chips, and what the kernel shows of itself is nowhere.
const NOT_PERSISTENT: [&str; 37] = [
    "autofs",
    "binder",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "cpuset",
    "debugfs",
    "devpts",
    "devtmpfs",
    "dmabuf",
    "efivarfs",
    "fuse.gvfsd-fuse",
    "fuse.lxcfs",
    "fuse.portal",
    "fusectl",
    "hugetlbfs",
    "ipathfs",
    "mqueue",
    "nfsd",
    "nsfs",
    "pidfs",
    "pipefs",
    "proc",
    "pstore",
    "ramfs",
    "resctrl",
    "rootfs",
    "rpc_pipefs",
    "securityfs",
    "selinuxfs",
    "smackfs",
    "sockfs",
    "sysfs",
    "tmpfs",
    "tracefs",
];

/// File systems whose data another machine keeps.
const SHARES: [&str; 14] = [
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "fuse.glusterfs",
    "fuse.s3fs",
    "fuse.sshfs",
    "gpfs",
    "lustre",
    "nfs",
    "nfs4",
    "smb3",
    "virtiofs",
];

/// So many mount points of a volume are told.
const POINTS: usize = 3;

/// Whether a file system of this type may hold data when the power is gone.
pub fn is_persistent(kind: &str) -> bool {
    NOT_PERSISTENT.binary_search(&kind).is_err()
}

/// What of a mount only a look at the instance can say.
pub trait Look {
    /// The devices of the btrfs file system that is mounted from this source.
    fn btrfs(&self, source: &str) -> Result<Vec<Number>, String>;
    /// The device of a node in /dev.
    fn device(&self, path: &str) -> Result<Number, String>;
    /// Whether somebody but root may write to this mount point.
    fn others_may_write(&self, point: &str) -> bool;
    /// Whether fscrypt's metadata is at this mount point.
    fn has_fscrypt(&self, point: &str) -> bool;
}

/// Whether a mount holds nothing of anybody's. A user may call a program's file system what he likes: without
/// root's doing, such names count below /run/user alone, where the desktop mounts its own.
fn is_nothing(mount: &Mount) -> bool {
    let by_root = || user_of(mount).is_none() || mount.point.starts_with("/run/user/");
    !is_persistent(&mount.kind) && (!mount.kind.starts_with("fuse.") || by_root())
}

/// The user, other than root, who mounted a program's file system (Documentation/filesystems/fuse.rst).
fn user_of(mount: &Mount) -> Option<String> {
    mount.option("user_id").filter(|user| user != "0")
}

/// The volumes among what is mounted and swapped to, and what is at which mount point.
pub fn volumes(mounts: &[Mount], swaps: &[Swap], look: &impl Look) -> (Vec<Volume>, Vec<Place>) {
    let mut volumes: Vec<Volume> = Vec::new();
    let mut index: BTreeMap<(Number, &str, &str), usize> = BTreeMap::new();
    let mut places = Vec::new();
    for mount in mounts {
        let place = |holds: Holds| Place {
            id: mount.id,
            parent: mount.parent,
            point: mount.point.clone(),
            holds,
        };
        if is_nothing(mount) {
            places.push(place(without_volume(&mount.kind)));
            continue;
        }
        // One file system may be mounted from several names of its device; one without a device is another one.
        let source = if mount.device.major == 0 {
            mount.source.as_str()
        } else {
            ""
        };
        let key = (mount.device, mount.kind.as_str(), source);
        let at = *index.entry(key).or_insert_with(|| {
            volumes.push(Volume {
                points: Vec::new(),
                kind: mount.kind.clone(),
                source: mount.source.clone(),
                backing: backing(mount, look),
                for_boot: false,
                fscrypt: false,
            });
            volumes.len() - 1
        });
        if let Some(volume) = volumes.get_mut(at) {
            volume.points.push(mount.point.clone());
        }
        places.push(place(Holds::Volume(at)));
    }
    for volume in &mut volumes {
        let of_boot = |point: &String| BOOT.contains(&point.as_str()) && !look.others_may_write(point);
        volume.for_boot = volume.points.iter().all(of_boot);
        volume.fscrypt = matches!(volume.kind.as_str(), "ext4" | "f2fs" | "ubifs")
            && volume.points.iter().any(|point| look.has_fscrypt(point));
        let points: BTreeSet<(usize, String)> = volume.points.drain(..).map(|p| (p.len(), p)).collect();
        volume.points = points.into_iter().map(|(_, point)| point).take(POINTS).collect();
    }
    volumes.extend(swaps.iter().map(|swap| swap_volume(swap, look)));
    (volumes, places)
}

fn swap_volume(swap: &Swap, look: &impl Look) -> Volume {
    let backing = match (swap.is_file, look.device(&swap.path)) {
        (true, _) => Backing::Path(swap.path.clone()),
        (false, Ok(device)) => Backing::Devices(vec![device]),
        (false, Err(reason)) => Backing::Unknown(reason),
    };
    Volume {
        points: vec![swap.path.clone()],
        kind: "swap".to_owned(),
        source: swap.path.clone(),
        backing,
        for_boot: false,
        fscrypt: false,
    }
}

fn backing(mount: &Mount, look: &impl Look) -> Backing {
    let kind = mount.kind.as_str();
    if mount.device.major != 0 {
        return Backing::Devices(vec![mount.device]);
    }
    if let Some(user) = user_of(mount).filter(|_| kind == "fuse" || kind.starts_with("fuse.")) {
        return Backing::Unknown(format!("a program of user {user} keeps its data ({kind})"));
    }
    if SHARES.binary_search(&kind).is_ok() {
        return Backing::Share;
    }
    match kind {
        "btrfs" => match look.btrfs(&mount.source) {
            Ok(devices) => Backing::Devices(devices),
            Err(reason) => Backing::Unknown(reason),
        },
        "zfs" => Backing::Zfs(mount.source.clone()),
        "overlay" => overlay(mount),
        "ecryptfs" => Backing::Unknown("eCryptfs is not examined".to_owned()),
        _ if kind == "fuse" || kind.starts_with("fuse.") => {
            Backing::Unknown(format!("a program keeps its data ({kind})"))
        }
        _ => Backing::Unknown(format!("{kind} names no device: where its data is can't be told")),
    }
}

/// What is written goes to the upper folder; without one, nothing is written.
fn overlay(mount: &Mount) -> Backing {
    let (what, folder) = match mount.option("upperdir") {
        Some(upper) => ("upper folder", upper),
        None => {
            let lower = mount.option("lowerdir").unwrap_or_default();
            let first = lower.split(':').next().unwrap_or_default();
            ("first lower folder", first.to_owned())
        }
    };
    // Some kernels show overlayfs's own escapes in it, some don't, and a step up may lead elsewhere.
    let is_whole =
        folder.starts_with('/') && !folder.contains('\\') && !folder.split('/').any(|part| part == "..");
    match is_whole {
        true => Backing::Path(folder),
        false => Backing::Unknown(format!("its {what} {folder:?} is no path that can be followed")),
    }
}
