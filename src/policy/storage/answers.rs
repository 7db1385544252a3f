//! What privileged programs say of storage: `dmsetup table` (dmsetup(8)), `zfs get` (zfs-get(8)) and `zpool list`
//! (zpool-list(8)), one after the other in one text.
//!
//! dmsetup shows zeros in place of a key, or the name that the key has in the kernel's keyring: its length is told,
//! the key is not. May not live here: asking them.

use std::collections::BTreeMap;

use super::cipher::{Algorithm, Worth, algorithm_with};
use super::mounts::Number;

/// What is asked of `zfs get`, in its order.
pub const ZFS_PROPERTIES: &str = "encryption,keystatus,keyformat";

/// A piece of a device of the device mapper, as the kernel maps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// dm-crypt.
    Crypt {
        /// Its cipher, for example `aes-xts-plain64`.
        cipher: String,
        /// Length of the whole key, in bits.
        key_bits: u32,
        /// The device beneath.
        below: Option<Number>,
        /// How many sectors of 512 bytes it covers.
        sectors: u64,
        /// What more it is told, for example `allow_discards`.
        options: Vec<String>,
    },
    /// A target that keeps writes, or what they replace, on another device: dm-snapshot. The kernel does not list
    /// that device beneath the origin.
    Snapshot {
        /// Whose blocks are kept.
        origin: Number,
        /// Where.
        store: Number,
    },
    /// Another target, for example `linear`.
    Other(String),
}

impl Segment {
    /// How it encrypts; none for what is not dm-crypt's.
    pub fn algorithm(&self) -> Option<Algorithm> {
        let Self::Crypt {
            cipher,
            key_bits,
            sectors,
            options,
            ..
        } = self
        else {
            return None;
        };
        let value = |option: &String| option.strip_prefix("integrity_key_size:")?.parse::<u32>().ok();
        let checksum = options
            .iter()
            .find_map(value)
            .map(|bytes| bytes.saturating_mul(8));
        let mut found = algorithm_with(cipher, *key_bits, checksum);
        // These vectors have 32 bits and count sectors.
        if found.worth == Worth::Strong && cipher.ends_with("-plain") && *sectors > 1 << 32 {
            found.worth = Worth::Lesser("vectors that come again after 2 TiB".to_owned());
        }
        Some(found)
    }
}

/// A dataset of ZFS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dataset {
    /// `encryption`, for example `aes-256-gcm` or `off`.
    pub encryption: String,
    /// `keystatus`, for example `available`.
    pub key_status: String,
    /// `keyformat`, for example `raw`.
    pub key_format: String,
}

/// All that was told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// The tables, by the devices' names in the device mapper.
    pub tables: BTreeMap<String, Vec<Segment>>,
    /// What else is written to when a device is: the stores of its snapshots.
    pub stores: BTreeMap<Number, Vec<Number>>,
    /// ZFS's datasets, by their names.
    pub datasets: BTreeMap<String, Dataset>,
    /// The devices of ZFS's pools, by the pools' names.
    pub pools: BTreeMap<String, Vec<String>>,
    /// Why something may be missing: the first line that is no answer, or the reason that nothing was asked.
    pub problem: Option<String>,
}

impl Answers {
    /// None, for that reason.
    pub fn none(reason: impl Into<String>) -> Self {
        Self {
            problem: Some(reason.into()),
            ..Self::default()
        }
    }

    /// Reads what they said. A line that is no answer costs nothing but itself.
    pub fn read(text: &str) -> Self {
        let mut answers = Self::default();
        let mut pool = None;
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            let is_read = match line.contains('\t') {
                true => answers.zfs(line, &mut pool),
                false => answers.table(line),
            };
            if !is_read && line != "No devices found" {
                let line: String = line.trim().chars().take(200).collect();
                answers.problem.get_or_insert(line.escape_debug().to_string());
            }
        }
        answers
    }

    /// `name: start length target parameters…`; without a table, there is nothing after the name.
    fn table(&mut self, line: &str) -> bool {
        let Some((name, rest)) = line
            .split_once(": ")
            .or_else(|| Some((line.strip_suffix(':')?, "")))
        else {
            return false;
        };
        // Whoever makes a name with such characters could make it look like another device's line.
        if name.is_empty() || name.contains(' ') {
            return false;
        }
        let words: Vec<&str> = rest.split_ascii_whitespace().collect();
        if words.is_empty() {
            self.tables.entry(name.to_owned()).or_default();
            return true;
        }
        let Some(segment) = segment(&words) else {
            return false;
        };
        if let Segment::Snapshot { origin, store } = segment {
            self.stores.entry(origin).or_default().push(store);
        }
        self.tables.entry(name.to_owned()).or_default().push(segment);
        true
    }

    /// `dataset TAB property TAB value`, or a line of `zpool list -v -H -P`: the pool's own begins with its name,
    /// those of what it consists of with a tab.
    fn zfs(&mut self, line: &str, pool: &mut Option<String>) -> bool {
        let fields: Vec<&str> = line.split('\t').collect();
        match fields.as_slice() {
            ["", device, ..] => {
                let Some(devices) = pool.as_ref().and_then(|pool| self.pools.get_mut(pool)) else {
                    return false;
                };
                // What groups devices (mirror-0) is no path.
                if device.starts_with('/') {
                    devices.push((*device).to_owned());
                }
                true
            }
            [
                dataset,
                property @ ("encryption" | "keystatus" | "keyformat"),
                value,
            ] => {
                let dataset = self.datasets.entry((*dataset).to_owned()).or_default();
                let place = match *property {
                    "encryption" => &mut dataset.encryption,
                    "keystatus" => &mut dataset.key_status,
                    _ => &mut dataset.key_format,
                };
                (*value).clone_into(place);
                true
            }
            [name, _, _, _, ..] if !name.contains(' ') => {
                *pool = Some((*name).to_owned());
                self.pools.entry((*name).to_owned()).or_default();
                true
            }
            _ => false,
        }
    }
}

/// `start length target parameters…`
fn segment(words: &[&str]) -> Option<Segment> {
    let (start, length) = (words.first()?, words.get(1)?);
    let _: u64 = start.parse().ok()?;
    let sectors = length.parse().ok()?;
    let target = *words.get(2)?;
    let parameters = words.get(3..).unwrap_or_default();
    Some(match (target, parameters) {
        // cipher key iv_offset device offset [count options…]
        ("crypt", [cipher, key, rest @ ..]) => Segment::Crypt {
            cipher: (*cipher).to_owned(),
            key_bits: key_bits(key)?,
            below: rest.get(1).and_then(|number| number.parse().ok()),
            sectors,
            options: rest.iter().skip(4).map(|option| (*option).to_owned()).collect(),
        },
        ("crypt", _) => return None,
        ("snapshot", [origin, store, ..]) => Segment::Snapshot {
            origin: origin.parse().ok()?,
            store: store.parse().ok()?,
        },
        ("snapshot", _) => return None,
        (target, _) => Segment::Other(target.to_owned()),
    })
}

/// The length of `0000…`, of `:64:logon:description` (in bytes) or of `-`, no key at all.
fn key_bits(key: &str) -> Option<u32> {
    if key == "-" {
        return Some(0);
    }
    match key.strip_prefix(':') {
        Some(described) => {
            let bytes: u32 = described.split(':').next()?.parse().ok()?;
            bytes.checked_mul(8)
        }
        None => {
            let is_hex = key.bytes().all(|b| b.is_ascii_hexdigit());
            (is_hex && key.len() <= 8192).then_some(key.len() as u32 * 4)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn tables_are_read_and_what_is_none_is_told() {
        let text = "plain: 0 204800 crypt aes-xts-plain64 00000000000000000000000000000000\
            00000000000000000000000000000000 0 254:1 0\n\
            luks: 0 172032 crypt aes-xts-plain64 :64:logon:cryptsetup:6f0c-d0 0 254:2 32768 1 allow_discards\n\
            vg-two: 0 8192 linear 253:0 2048\n\
            vg-two: 8192 8192 linear 253:0 43008\n\
            vg-snap: 0 16384 snapshot 253:15 253:16 P 8\n\
            odd\\x20name: 0 8 linear 253:0 0\n\
            empty: \n";
        let answers = Answers::read(text);
        assert_eq!(answers.problem, None);
        let number = |major, minor| Number { major, minor };
        let crypt = |key_bits, minor, sectors, options: &[&str]| Segment::Crypt {
            cipher: "aes-xts-plain64".to_owned(),
            key_bits,
            below: Some(number(254, minor)),
            sectors,
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        };
        assert_eq!(answers.tables["plain"], [crypt(256, 1, 204800, &[])]);
        assert_eq!(
            answers.tables["luks"],
            [crypt(512, 2, 172032, &["allow_discards"])]
        );
        assert_eq!(answers.stores[&number(253, 15)], [number(253, 16)]);
        assert!(answers.tables.contains_key("odd\\x20name"));
        assert_eq!(
            answers.tables["vg-two"],
            vec![Segment::Other("linear".to_owned()); 2]
        );
        assert_eq!(answers.tables["empty"], []);

        let failed = Answers::read("/dev/mapper/control: open failed: Operation not permitted\nmore\n");
        assert!(failed.tables.is_empty());
        assert!(failed.problem.unwrap().contains("not permitted"));
        assert_eq!(Answers::read("No devices found\n"), Answers::default());
    }

    #[test]
    fn short_vectors_and_long_checksums_count() {
        let worth = |line: &str| {
            let answers = Answers::read(line);
            answers.tables["x"][0].algorithm().unwrap().worth
        };
        let key = ":64:logon:x";
        let small = format!("x: 0 4294967296 crypt aes-xts-plain {key} 0 254:0 0\n");
        assert_eq!(worth(&small), Worth::Strong);
        let large = small.replace("4294967296", "4294967297");
        assert!(matches!(worth(&large), Worth::Lesser(_)));
        assert_eq!(worth(&large.replace("plain", "plain64")), Worth::Strong);
        let sealed = "x: 0 8 crypt capi:authenc(hmac(sha256),xts(aes))-random :96:logon:x 0 254:0 0 1 integrity:32:aead\n";
        assert_eq!(worth(sealed), Worth::Strong);
        let more = sealed.replace("1 integrity:32:aead", "2 integrity:32:aead integrity_key_size:64");
        assert!(matches!(worth(&more), Worth::Lesser(_)));
    }

    #[test]
    fn zfs_is_read() {
        let text = "tank\tencryption\toff\ntank\tkeystatus\t-\ntank\tkeyformat\tnone\n\
            tank/home\tencryption\taes-256-gcm\ntank/home\tkeystatus\tavailable\ntank/home\tkeyformat\traw\n\
            tank\t960M\t1.2M\t959M\t-\t-\t0%\t0%\t1.00x\tONLINE\t-\n\
            \tmirror-0\t960M\t1.2M\t959M\t-\t-\t0%\t0.12%\t-\tONLINE\n\
            \t/dev/vdb1\t-\t-\t-\t-\t-\t-\t-\t-\tONLINE\n\
            \t/dev/vdc1\t-\t-\t-\t-\t-\t-\t-\t-\tONLINE\n";
        let answers = Answers::read(text);
        assert_eq!(answers.problem, None);
        assert_eq!(answers.pools["tank"], ["/dev/vdb1", "/dev/vdc1"]);
        assert_eq!(answers.datasets["tank"].encryption, "off");
        let home = &answers.datasets["tank/home"];
        assert_eq!(
            [&home.encryption, &home.key_status, &home.key_format],
            ["aes-256-gcm", "available", "raw"]
        );
    }

    proptest! {
        #[test]
        fn each_crypt_table_comes_back(
            name in "[a-zA-Z0-9#+:=@_.-]{0,20}[a-zA-Z0-9]", cipher in "(capi:)?[a-z0-9(),-]{1,30}", bytes in 0u32..=512,
            is_hex in any::<bool>(), below in (0u32..4096, 0u32..1048576),
        ) {
            let key = match (is_hex, bytes) {
                (true, 0) => "-".to_owned(),
                (true, _) => "00".repeat(bytes as usize),
                (false, _) => format!(":{bytes}:logon:cryptsetup:x-d0"),
            };
            let below = Number { major: below.0, minor: below.1 };
            let line = format!("{name}: 0 4096 crypt {cipher} {key} 0 {below} 4096 2 sector_size:4096 no_read_workqueue\n");
            let answers = Answers::read(&line);
            prop_assert_eq!(&answers.problem, &None);
            let options = ["sector_size:4096", "no_read_workqueue"].map(str::to_owned).to_vec();
            let expected = Segment::Crypt { cipher, key_bits: bytes * 8, below: Some(below), sectors: 4096, options };
            prop_assert_eq!(&answers.tables[&name], &vec![expected]);
        }

        #[test]
        fn nothing_panics(text in "[a-z0-9: \t\n/-]{0,120}") {
            let _ = Answers::read(&text);
        }
    }
}
