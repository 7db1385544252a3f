//! What becomes of a file that something goes wrong with.
//!
//! May not live here: which files, and what has to hold afterwards.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use portcullis::system::documents;

/// What a file is after it was damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// A bit in the middle is another.
    Flipped,
    /// A digit or letter near the end is its neighbour: a document is still one, and says something else.
    OtherWord,
    /// A third of it is there.
    Truncated,
    Empty,
    /// A folder stands in its place.
    Folder,
    /// A link to a device without an end.
    Endless,
    /// A named pipe, to which nobody writes.
    Pipe,
    /// What a later version wrote.
    Newer,
    /// A gibibyte of nothing.
    Huge,
}

use Damage::{Empty, Endless, Flipped, Folder, Huge, Newer, OtherWord, Pipe, Truncated};

/// What damages any file.
pub const DAMAGES: [Damage; 8] = [Flipped, Truncated, Empty, Folder, Endless, Pipe, Newer, Huge];

impl Damage {
    /// Does it to a file.
    pub fn apply(self, path: &Path) {
        let mut bytes = fs::read(path).unwrap();
        fs::remove_file(path).unwrap();
        match self {
            Flipped => {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 0x80;
                fs::write(path, bytes).unwrap();
            }
            OtherWord => {
                let last = bytes.iter().rposition(u8::is_ascii_alphanumeric).unwrap();
                bytes[last] ^= 1;
                fs::write(path, bytes).unwrap();
            }
            Truncated => fs::write(path, &bytes[..bytes.len() / 3]).unwrap(),
            Empty => fs::write(path, "").unwrap(),
            Folder => fs::create_dir(path).unwrap(),
            Endless => symlink("/dev/zero", path).unwrap(),
            Pipe => mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap(),
            Newer => documents::replace(path, br#"{"version":99,"later":[{}]}"#).unwrap(),
            Huge => File::create(path).unwrap().set_len(1 << 30).unwrap(),
        }
    }
}
