//! What must hold for any bytes that come from outside of the agent: from the network, the kernel, other
//! programs, users, and from disks that were damaged. A target takes bytes, has the agent's own code read
//! them, and panics if something does not hold. `fuzz/run` feeds the targets from a fuzzer; the tests here,
//! from the seeds.
//!
//! May not live here: fuzzers (`targets/`), parsers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod channel;
mod documents;
mod kernel;
mod keys;
mod outside;
mod ssh;
mod state;
mod storage;

/// A target: whether there was anything to be read from the bytes. If so, it held.
pub type Target = fn(&[u8]) -> bool;

/// All targets. Each has seeds below `fuzz/seeds`, and a program in `fuzz/targets`.
pub const TARGETS: &[(&str, Target)] = &[
    ("answers", outside::answers),
    ("audit", state::audit),
    ("certificate", outside::certificate),
    ("channel", channel::channel),
    ("control", documents::control),
    ("foreign", kernel::foreign),
    ("front", channel::front),
    ("http", documents::http),
    ("injected", keys::injected),
    ("kexinit", ssh::kexinit),
    ("keys", keys::keys),
    ("logins", ssh::logins),
    ("merge", keys::merged),
    ("netlink", kernel::netlink),
    ("nftables", kernel::nftables),
    ("packets", kernel::packets),
    ("settings", documents::settings),
    ("spec", documents::spec),
    ("spool", state::spool),
    ("sshd", ssh::sshd),
    ("storage", storage::storage),
];

/// Has a target look at bytes.
///
/// # Panics
/// When what must hold does not, or there is no such target.
pub fn check(name: &str, data: &[u8]) -> bool {
    let (_, target) = TARGETS
        .iter()
        .find(|(known, _)| *known == name)
        .expect("a target");
    target(data)
}

/// The parts of an input that holds several: each ends at a line of `%%`.
fn parts(data: &[u8]) -> Vec<&[u8]> {
    const END: &[u8] = b"\n%%\n";
    let (mut rest, mut parts) = (data, Vec::new());
    while let Some(at) = rest.windows(END.len()).position(|window| window == END) {
        parts.push(&rest[..at]);
        rest = &rest[at + END.len()..];
    }
    parts.push(rest);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    fn folder(path: &str) -> Vec<(String, Vec<u8>)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        let entries = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let mut files: Vec<_> = entries
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_file())
            .map(|path| {
                let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
                (name, fs::read(path).unwrap())
            })
            .collect();
        files.sort();
        files
    }

    /// Seeds are examples, and what fuzzers found: that stays mended.
    #[test]
    fn every_target_holds_on_its_seeds_and_reads_some_of_them() {
        for (name, target) in TARGETS {
            let seeds = folder(&format!("seeds/{name}"));
            let read = seeds.iter().filter(|(_, bytes)| target(bytes)).count();
            assert!(read > 0, "{name}: none of {} seeds is read", seeds.len());
        }
    }

    #[test]
    fn every_target_holds_on_seeds_that_are_cut_off_or_have_a_bit_flipped() {
        for (name, target) in TARGETS {
            for (_, seed) in folder(&format!("seeds/{name}")) {
                // Some hundred of each, however long the seed is.
                let step = seed.len() / 100 + 1;
                for at in (0..seed.len()).step_by(step) {
                    target(&seed[..at]);
                    let mut flipped = seed.clone();
                    flipped[at] ^= 1 << (at % 8);
                    target(&flipped);
                }
            }
        }
    }

    #[test]
    fn every_target_has_a_program() {
        let programs: Vec<String> = folder("targets").into_iter().map(|(name, _)| name).collect();
        let targets: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
        assert_eq!(programs, targets);
        for (name, text) in folder("targets") {
            let text = String::from_utf8(text).unwrap();
            assert!(
                text.contains(&format!("check(\"{name}\", data)")),
                "{name}: {text}"
            );
        }
    }

    #[test]
    fn parts_are_split_at_their_ends() {
        assert_eq!(parts(b"a\n%%\nb\n%%\n"), [&b"a"[..], b"b", b""]);
        assert_eq!(parts(b"%%"), [&b"%%"[..]]);
    }
}
