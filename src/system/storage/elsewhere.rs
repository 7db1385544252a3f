//! What the first process's mounts do not show: file systems that are in use elsewhere, and files that are not where
//! their paths lead to.
//!
//! A mount in another mount namespace, or one that was detached while in use, is in no list of the host's. But each
//! file system that is in use has a folder in sysfs (Documentation/ABI/testing/sysfs-fs-ext4 and its like). May not
//! live here: what it proves.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use super::number_of;
use crate::policy::storage::mounts::Number;
use crate::policy::storage::places::Holds;
use crate::policy::storage::{Backing, Kind, Storage, Volume};

/// The first namespace of process ids has this number, and no other one (`PROC_PID_INIT_INO` in linux/proc_ns.h).
const HOST: &str = "pid:[4026531836]";

/// Volumes that are in use and among none of these. A container sees all of the host's, which are not its own: it is
/// told none.
pub fn volumes(root: &Path, known: &[Volume]) -> Vec<Volume> {
    let namespace = fs::read_link(root.join("proc/self/ns/pid"));
    if !namespace.is_ok_and(|name| name.as_os_str() == HOST) {
        return Vec::new();
    }
    let of = |volume: &Volume| match &volume.backing {
        Backing::Devices(devices) => devices.clone(),
        _ => Vec::new(),
    };
    let known: BTreeSet<Number> = known.iter().flat_map(of).collect();
    let mut found = Vec::new();
    // By the device's name each; beside them stands what is no device's.
    for kind in ["ext4", "xfs", "f2fs"] {
        for name in names(&root.join("sys/fs").join(kind)) {
            let device = number_of(&root.join("sys/class/block").join(&name)).ok();
            if let Some(device) = device.filter(|device| !known.contains(device)) {
                found.push(volume(kind, &name, vec![device]));
            }
        }
    }
    for uuid in names(&root.join("sys/fs/btrfs")) {
        let folder = root.join("sys/fs/btrfs").join(uuid).join("devices");
        let names = names(&folder);
        let devices: Vec<Number> = names
            .iter()
            .filter_map(|name| number_of(&folder.join(name)).ok())
            .collect();
        if let Some(name) = names
            .first()
            .filter(|_| devices.iter().all(|one| !known.contains(one)))
        {
            // One that can't be read leaves a gap, and a gap is unknown.
            let is_whole = devices.len() == names.len();
            found.push(volume("btrfs", name, if is_whole { devices } else { Vec::new() }));
        }
    }
    found
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn volume(kind: &str, device: &str, devices: Vec<Number>) -> Volume {
    Volume {
        points: Vec::new(),
        kind: kind.to_owned(),
        source: format!("/dev/{}", device.replace('!', "/")),
        backing: Backing::Devices(devices),
        for_boot: false,
        fscrypt: false,
    }
}

/// Files of swaps and loops that are not where their paths lead to. The kernel tells a path as the file's own mount
/// namespace had it; in the host's, it may lead elsewhere.
pub fn astray(root: &Path, storage: &Storage) -> BTreeMap<String, String> {
    let swaps = storage.volumes.iter().filter_map(|volume| match &volume.backing {
        Backing::Path(path) if volume.kind == "swap" => Some((path, false)),
        _ => None,
    });
    let loops = storage.devices.values().filter_map(|device| match &device.kind {
        Kind::Loop {
            file: Some(file),
            removed,
        } => Some((file, *removed)),
        _ => None,
    });
    let mut astray = BTreeMap::new();
    for (path, removed) in swaps.chain(loops) {
        // Others' machines and programs are not asked: they might not answer.
        let Some(place) = storage.place_of(path).filter(|place| match place.holds {
            Holds::Volume(at) => {
                let volume = storage.volumes.get(at);
                volume.is_some_and(|volume| matches!(volume.backing, Backing::Devices(_) | Backing::Zfs(_)))
            }
            Holds::Memory => true,
            Holds::Other => false,
        }) else {
            continue;
        };
        // Of a removed file, its folder is what can be looked for.
        let looked_for = match (removed, path.rsplit_once('/')) {
            (true, Some((folder, _))) => folder,
            _ => path,
        };
        if let Err(error) = is_there(root, &place.point, looked_for) {
            astray.insert(path.clone(), error.to_string());
        }
    }
    astray
}

/// Whether there is something at this path, on the mount at this point and no other one, without a link.
fn is_there(root: &Path, point: &str, path: &str) -> io::Result<()> {
    let rest = path.strip_prefix(point).unwrap_or_default().trim_matches('/');
    if rest.is_empty() {
        return Ok(());
    }
    let mount = File::open(root.join(point.trim_start_matches('/')))?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
    openat2(
        mount,
        rest,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        resolve,
    )?;
    Ok(())
}
