//! Which mount a path leads to: as the kernel walks it, from mount to mount.
//!
//! Not by the longest mount point alone: a mount at `/a` hides one that was at `/a/b` before. May not live here: what
//! is mounted there.

use super::Storage;

/// What is at a mount point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// The volume of this index.
    Volume(usize),
    /// Memory: gone with the power.
    Memory,
    /// Neither: what the kernel shows of itself, or a program.
    Other,
}

/// A mount, as far as paths go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number.
    pub id: u32,
    /// The mount that it is on.
    pub parent: u32,
    /// Where.
    pub point: String,
    /// What is there.
    pub holds: Holds,
}

impl Place {
    fn is_before(&self, path: &str) -> bool {
        let rest = path.strip_prefix(self.point.trim_end_matches('/'));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

/// What a file system of this type keeps, of those that hold no volume.
pub fn without_volume(kind: &str) -> Holds {
    match kind {
        "tmpfs" | "ramfs" | "rootfs" | "devtmpfs" => Holds::Memory,
        _ => Holds::Other,
    }
}

impl Storage {
    /// The mount that a whole path leads to now; none if it leads to none that is known.
    pub fn place_of(&self, path: &str) -> Option<&Place> {
        // A step up may leave the mount, a link too; the latter is looked for where the path is used.
        if !path.starts_with('/') || path.split('/').any(|part| part == "..") {
            return None;
        }
        let is_mounted = |id: u32| self.places.iter().any(|place| place.id == id);
        let is_first = |place: &&Place| place.parent == place.id || !is_mounted(place.parent);
        let mut here = self.places.iter().filter(is_first).find(|p| p.point == "/")?;
        // Each mount is entered once at most.
        for _ in 0..self.places.len() {
            let next = self
                .places
                .iter()
                .filter(|place| place.parent == here.id && place.id != here.id && place.is_before(path));
            match next.min_by_key(|place| place.point.len()) {
                Some(next) => here = next,
                None => return Some(here),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_leads_to_what_is_seen_there() {
        let mounts = [
            (20, 1, "/"),
            (21, 20, "/var"),
            (22, 21, "/var/lib"),
            (23, 22, "/var/lib"),
            (24, 20, "/va"),
            (25, 20, "/a"),
            (26, 25, "/a/b"),
            // Over /a: what is at /a/b is not to be reached any more.
            (27, 25, "/a"),
        ];
        let places = mounts.map(|(id, parent, point)| Place {
            id,
            parent,
            point: point.to_owned(),
            holds: Holds::Volume(id as usize),
        });
        let storage = Storage {
            places: places.to_vec(),
            ..Storage::default()
        };
        let id = |path: &str| storage.place_of(path).map(|place| place.id);
        for (path, expected) in [
            ("/swap", 20),
            ("/var", 21),
            ("/variable", 20),
            ("/var/lib/x", 23),
            ("/var/library", 21),
            ("/a/b/image", 27),
        ] {
            assert_eq!(id(path), Some(expected), "{path}");
        }
        assert_eq!(id("/var/../a"), None);
        assert_eq!(id("var"), None);
        assert_eq!(Storage::default().place_of("/"), None);
    }
}
