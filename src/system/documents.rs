//! JSON files of the state, each with a checksum: `{"sha256":"…","content":…}`. A file that is not what was written is
//! damaged, also where a flipped bit made another one that can be read.
//!
//! No seal: who may write the file can write the checksum. Two kinds of files do without, as they prove themselves: the
//! audit log (a chain), key and certificate (a signature).
//! May not live here: what is in them.

use std::io;
use std::path::Path;

use portcullis_protocol::identity::to_hex;
use ring::digest::{SHA256, digest};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::files;

/// More bytes than `sha256`, its value and what is around the content.
const FRAME: usize = 128;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document<'a> {
    /// Of the content's bytes as they are in the file.
    sha256: &'a str,
    #[serde(borrow)]
    content: &'a RawValue,
}

/// The document of a content, which has to be JSON.
#[must_use]
pub fn enclose(content: &[u8]) -> Vec<u8> {
    let content = content.trim_ascii();
    let sum = to_hex(digest(&SHA256, content).as_ref());
    [
        br#"{"sha256":""#,
        sum.as_bytes(),
        br#"","content":"#,
        content,
        b"}\n",
    ]
    .concat()
}

/// The content of a document.
///
/// # Errors
/// In words, when it is not one, or its content is not what was written.
pub fn content(document: &[u8]) -> Result<&[u8], String> {
    let document: Document<'_> = serde_json::from_slice(document).map_err(|e| e.to_string())?;
    let content = document.content.get().as_bytes();
    match to_hex(digest(&SHA256, content).as_ref()) == document.sha256 {
        true => Ok(content),
        false => Err("its content is not what was written: the checksum is another one".to_owned()),
    }
}

/// Reads the content of a document, of up to `limit` bytes; `None` if there is no file.
///
/// # Errors
/// As [`files::read`], and `InvalidData` when it is damaged.
pub fn read(path: &Path, limit: usize) -> io::Result<Option<Vec<u8>>> {
    let bytes = files::read(path, limit + FRAME)?;
    let content = bytes.map(|bytes| content(&bytes).map(<[u8]>::to_vec));
    content.transpose().map_err(damaged)
}

/// As [`read`], as what it stands for.
///
/// # Errors
/// As [`read`], and `InvalidData` when it is no `T`.
pub fn load<T: DeserializeOwned>(path: &Path, limit: usize) -> io::Result<Option<T>> {
    let content = read(path, limit)?;
    let parsed = content.map(|content| serde_json::from_slice(&content));
    parsed.transpose().map_err(damaged)
}

/// Puts a document in the place of the file, for root alone, as [`files::replace`] does.
///
/// # Errors
/// As there.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    files::replace(path, &enclose(content), 0o600)
}

/// As [`replace`], with what makes JSON: texts, numbers, lists and structures of them.
///
/// # Errors
/// As there; and when it makes none, as a map with keys that are no texts.
pub fn save<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    replace(path, &serde_json::to_vec(value).map_err(io::Error::other)?)
}

fn damaged(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTENT: &[u8] = br#"{"rules":[{"port":22,"source":"203.0.113.0/24"}]}"#;

    #[test]
    fn no_flipped_bit_is_taken_for_what_was_written() {
        let document = enclose(CONTENT);
        assert_eq!(content(&document), Ok(CONTENT));
        for at in 0..document.len() {
            for bit in 0..8 {
                let mut flipped = document.clone();
                flipped[at] ^= 1 << bit;
                let read = content(&flipped);
                assert!(read.is_err(), "{}", String::from_utf8_lossy(&flipped));
            }
        }
        // The line end at the end says nothing.
        for end in 0..document.len() - 1 {
            assert!(content(&document[..end]).is_err(), "{end}");
        }
    }

    #[test]
    fn documents_of_others_are_refused() {
        let sum = "0".repeat(64);
        for text in [
            String::from_utf8_lossy(CONTENT).into_owned(),
            format!(r#"{{"sha256":"{sum}"}}"#),
            format!(r#"{{"sha256":"{sum}","content":1}}"#),
            format!(r#"{{"sha256":"{sum}","content":1,"content":1}}"#),
            format!(r#"{{"sha256":"{sum}","content":1,"more":1}}"#),
        ] {
            assert!(content(text.as_bytes()).is_err(), "{text}");
        }
        assert!(content(&enclose(b"no JSON")).is_err());
    }

    proptest::proptest! {
        #[test]
        fn what_is_written_reads_back(texts: Vec<String>) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("x.json");
            save(&path, &texts).unwrap();
            proptest::prop_assert_eq!(load::<Vec<String>>(&path, 1 << 20).unwrap(), Some(texts));
        }
    }

    #[test]
    fn damage_is_told_from_what_the_file_system_says() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.json");
        let kind = |limit| load::<u8>(&path, limit).unwrap_err().kind();
        assert_eq!(load::<u8>(&path, 10).unwrap(), None);
        save(&path, &"a text").unwrap();
        assert_eq!(kind(10), io::ErrorKind::InvalidData);
        std::fs::write(&path, "{").unwrap();
        assert_eq!(kind(10), io::ErrorKind::InvalidData);
        std::fs::write(&path, vec![b' '; 1000]).unwrap();
        assert_eq!(kind(10), io::ErrorKind::FileTooLarge);
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert_eq!(kind(10), io::ErrorKind::Other);
    }
}
