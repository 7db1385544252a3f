//! What the kernel says is mounted, and where memory is swapped to: /proc/PID/mountinfo and /proc/swaps.
//!
//! May not live here: reading the files; what is beneath a mount.

use std::fmt;
use std::str::FromStr;

/// A block device's numbers (makedev(3)), `253:0`. Major 0 is no block device: the kernel numbers file systems
/// without one that way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Number {
    /// Which driver.
    pub major: u32,
    /// Which of its devices.
    pub minor: u32,
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for Number {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let read = || {
            let (major, minor) = text.split_once(':')?;
            Some(Self {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
            })
        };
        read().ok_or_else(|| format!("{text:?} is not a device's numbers"))
    }
}

/// A line of mountinfo (proc_pid_mountinfo(5)), as far as it matters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its number.
    pub id: u32,
    /// The mount that it is on.
    pub parent: u32,
    /// The file system's device.
    pub device: Number,
    /// Where it is mounted.
    pub point: String,
    /// The file system's type, for example `ext4`.
    pub kind: String,
    /// What the file system says that it is mounted from; anything, for one without a device.
    pub source: String,
    /// The file system's own options, as they stand there: escaped, since a comma may be part of one.
    pub options: String,
}

impl Mount {
    /// The value of one of its own options.
    pub fn option(&self, name: &str) -> Option<String> {
        let mut options = self.options.split(',');
        options.find_map(|option| option.strip_prefix(name)?.strip_prefix('=').map(unescaped))
    }
}

/// A line of /proc/swaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Swap {
    /// The file, or the device's node.
    pub path: String,
    /// Whether it is a file of a file system.
    pub is_file: bool,
}

/// All mounts, in the kernel's order.
///
/// # Errors
/// The first line that is none.
pub fn mounts(text: &str) -> Result<Vec<Mount>, String> {
    text.lines()
        .map(|line| mount(line).ok_or_else(|| format!("{line:?} is no line of mountinfo")))
        .collect()
}

/// `36 35 98:0 /root /point rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn mount(line: &str) -> Option<Mount> {
    let mut fields = line.split(' ');
    let id = fields.next()?.parse().ok()?;
    let parent = fields.next()?.parse().ok()?;
    let device = fields.next()?.parse().ok()?;
    let point = unescaped(fields.nth(1)?);
    // The mount's own options, and then as many optional fields as there are.
    let mut fields = fields.skip(1).skip_while(|field| *field != "-").skip(1);
    Some(Mount {
        id,
        parent,
        device,
        point,
        kind: unescaped(fields.next()?),
        source: unescaped(fields.next()?),
        options: fields.next().unwrap_or_default().to_owned(),
    })
}

/// All active swaps. The kernel ends a removed file's name with `\040(deleted)`.
///
/// # Errors
/// The first line that is none.
pub fn swaps(text: &str) -> Result<Vec<Swap>, String> {
    text.lines()
        .skip(1)
        .map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let path = fields.next().map(unescaped);
            match (path, fields.next()) {
                (Some(path), Some(kind @ ("file" | "partition"))) => Ok(Swap {
                    path,
                    is_file: kind == "file",
                }),
                _ => Err(format!("{line:?} is no line of /proc/swaps")),
            }
        })
        .collect()
}

/// The kernel writes space, tab, line feed, backslash and more as three octal digits after a backslash
/// (`seq_path` and `mangle_path` in fs/seq_file.c). What is no such escape stays as it is.
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        match rest {
            [
                b'\\',
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                after @ ..,
            ] => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As fs/seq_file.c does it for mountinfo: ` \t\n\\` and, for the source, `#`.
    fn escaped(text: &str) -> String {
        let escape = |c: char| match c {
            ' ' | '\t' | '\n' | '\\' | '#' => format!("\\{:03o}", u32::from(c)),
            c => c.to_string(),
        };
        text.chars().map(escape).collect()
    }

    #[test]
    fn the_manual_pages_line_is_read() {
        let line =
            "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 propagate_from:2 - ext3 /dev/root rw,errors=continue";
        let mount = mount(line).unwrap();
        assert_eq!(mount.device, Number { major: 98, minor: 0 });
        assert_eq!((mount.point.as_str(), mount.kind.as_str()), ("/mnt2", "ext3"));
        assert_eq!(mount.source, "/dev/root");
        assert_eq!((mount.id, mount.parent), (36, 35));
        assert_eq!(mount.option("errors").as_deref(), Some("continue"));
        assert_eq!(mount.option("err"), None);
        // The kernel writes a comma of a value so (`seq_show_option`); one that is none ends it.
        let line = "36 35 0:30 / /m rw - overlay o rw,upperdir=/enc\\054/../plain,workdir=/w";
        let upper = super::mount(line).unwrap().option("upperdir");
        assert_eq!(upper.as_deref(), Some("/enc,/../plain"));
    }

    #[test]
    fn what_is_no_line_is_named() {
        for bad in [
            "",
            "36",
            "36 35 98 / / rw - ext3 /dev/root rw",
            "36 35 98:0 / / rw ext3 /dev/root rw",
        ] {
            assert!(mounts(&format!("{bad}\n")).is_err(), "{bad}");
        }
        assert!(swaps("Filename\n/dev/vda2 tape 1 0 -2\n").is_err());
    }

    #[test]
    fn swaps_are_read() {
        let text = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n\
            /dev/dm-1                               partition\t998396\t\t0\t\t-2\n\
            /swap\\040file                           file\t\t1048572\t\t0\t\t-3\n";
        let swaps = swaps(text).unwrap();
        assert_eq!(swaps[0].path, "/dev/dm-1");
        assert!(!swaps[0].is_file);
        assert_eq!(swaps[1].path, "/swap file");
        assert!(swaps[1].is_file);
        assert_eq!(super::swaps("Filename\tType\n").unwrap(), []);
    }

    proptest! {
        #[test]
        fn each_name_comes_back(
            point in "/\\PC{0,20}[ \t\n#\\\\]?\\PC{0,5}", source in "\\PC{1,20}",
            optional in proptest::collection::vec("(shared|master):[0-9]{1,3}", 0..3),
            major in any::<u32>(), minor in any::<u32>(),
        ) {
            let optional: String = optional.iter().map(|field| format!(" {field}")).collect();
            let line = format!(
                "36 35 {major}:{minor} / {} rw{optional} - ext4 {} rw\n", escaped(&point), escaped(&source)
            );
            let read = mounts(&line).unwrap();
            prop_assert_eq!(read.len(), 1);
            prop_assert_eq!(&read[0].point, &point);
            prop_assert_eq!(&read[0].source, &source);
            prop_assert_eq!(read[0].device, Number { major, minor });
        }

        #[test]
        fn swap_names_come_back(path in "/[^\\s\\\\]{0,20}[ \t\n\\\\]?[^\\s\\\\]{0,5}") {
            let text = format!("Filename Type\n{} file 1 0 -2\n", escaped(&path));
            prop_assert_eq!(&swaps(&text).unwrap()[0].path, &path);
        }

        #[test]
        fn nothing_panics(text in "[\\\\0-9 :/a-z\n-]{0,80}") {
            let _ = mounts(&text);
            let _ = swaps(&text);
        }
    }
}
