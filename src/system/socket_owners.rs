//! Which program holds a socket, from proc(5): for root at a terminal. The daemon has no right to look into
//! other processes, and is not given it for a name.
//!
//! May not live here: units (`listeners`), showing names: a process chooses its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::policy::exposure::socket::Program;

/// How many descriptors are looked at, all processes together.
const MAX_DESCRIPTORS: usize = 500_000;
/// systemd holds what it passes on; who got it is the better answer.
const INIT: u32 = 1;

/// The programs that hold these sockets, by inode. What could not be looked into is missing.
pub fn programs(inodes: &BTreeSet<u32>) -> BTreeMap<u32, Program> {
    let mut holders: BTreeMap<u32, u32> = BTreeMap::new();
    let mut left = MAX_DESCRIPTORS;
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<u32> = processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_by_key(|pid| (*pid == INIT, *pid));
    for pid in pids {
        let folder = fs::read_dir(format!("/proc/{pid}/fd"));
        for entry in folder.into_iter().flatten().flatten() {
            let Some(rest) = left.checked_sub(1) else { break };
            left = rest;
            let target = fs::read_link(entry.path()).unwrap_or_default();
            if let Some(inode) = inode(target.as_os_str().as_bytes())
                && inodes.contains(&inode)
            {
                holders.entry(inode).or_insert(pid);
            }
        }
    }
    holders
        .into_iter()
        .filter_map(|(inode, pid)| Some((inode, program(pid)?)))
        .collect()
}

/// Of `socket:[4711]`.
fn inode(target: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(target).ok()?;
    text.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

fn program(pid: u32) -> Option<Program> {
    let folder = Path::new("/proc").join(pid.to_string());
    let name = fs::read(folder.join("comm")).ok()?;
    let name = name.strip_suffix(b"\n").unwrap_or(&name);
    let file = fs::read_link(folder.join("exe")).ok();
    Some(Program {
        pid,
        file: file.map(|file| file.to_string_lossy().into_owned()),
        name: String::from_utf8_lossy(name).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::net::TcpListener;

    #[test]
    fn a_sockets_program_is_this_one() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let local = listener.local_addr().unwrap();
        let found = super::super::listeners::read(&BTreeMap::new()).unwrap();
        let inode = found.sockets.iter().find(|s| s.local == local).unwrap().inode;
        let programs = programs(&[inode].into());
        let program = programs.get(&inode).expect("a program");
        let own = std::env::current_exe().unwrap();
        assert_eq!(program.file.as_deref(), own.to_str());
        assert_eq!(inode_of("socket:[12]"), Some(12));
        assert_eq!(inode_of("pipe:[12]"), None);
    }

    fn inode_of(text: &str) -> Option<u32> {
        super::inode(text.as_bytes())
    }
}
