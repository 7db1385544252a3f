//! Legacy iptables (xtables), which netlink does not show: its own program tells what it holds.
//!
//! May not live here: what the rules mean (`policy::foreign::iptables`).

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::command::{ask, said};
use crate::policy::foreign::{Foreign, iptables};
use crate::policy::ruleset::Family;

/// Where distributions put it.
const FOLDERS: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// How much of rules is taken: some 10,000 of them.
const MAX_BYTES: usize = 1 << 20;

/// The tables of legacy iptables, of both families. What is loaded and can't be looked into is named
/// with the reason.
pub async fn read() -> Foreign {
    let mut foreign = Foreign::default();
    for family in Family::BOTH {
        match read_family(family).await {
            Ok(mut tables) => foreign.tables.append(&mut tables),
            Err(reason) => foreign.unread.push(reason),
        }
    }
    foreign
}

async fn read_family(family: Family) -> Result<Vec<crate::policy::foreign::Table>, String> {
    let (names, program) = match family {
        Family::Ipv4 => ("ip_tables_names", "iptables-legacy-save"),
        Family::Ipv6 => ("ip6_tables_names", "ip6tables-legacy-save"),
    };
    let loaded = loaded(&Path::new("/proc/thread-self/net").join(names))?;
    if loaded.is_empty() {
        return Ok(Vec::new());
    }
    let unread = |reason: &str| {
        format!("legacy iptables tables of {family} are loaded ({loaded}) and can't be looked into: {reason}")
    };
    let Some(path) = find(program) else {
        return Err(unread(&format!(
            "install {program} (package iptables), or unload them"
        )));
    };
    let output = ask(&path, [""; 0]).await.map_err(|reason| unread(&reason))?;
    if !output.status.success() {
        let said = said(&output);
        return Err(unread(&format!(
            "{program}: {said}; it wants CAP_NET_RAW, which the daemon has not: run `portcullis check` as root"
        )));
    }
    if output.stdout.len() > MAX_BYTES {
        return Err(unread("they hold too many rules"));
    }
    Ok(iptables::parse(family, &String::from_utf8_lossy(&output.stdout)))
}

/// Names of the tables that are loaded in this network namespace; empty without legacy iptables.
fn loaded(file: &Path) -> Result<String, String> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(text.split_whitespace().collect::<Vec<_>>().join(", ")),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(format!("{}: {error}", file.display())),
    }
}

fn find(program: &str) -> Option<PathBuf> {
    FOLDERS
        .iter()
        .map(|folder| Path::new(folder).join(program))
        .find(|path| path.is_file())
}
