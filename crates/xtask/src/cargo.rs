//! What Cargo resolved for the agent's program: its packages, who needs whom, and what is known of each.
//!
//! `cargo tree` says what is compiled in, with the features of a build of the whole workspace, as `make release`
//! does it; `cargo metadata` knows licences; `Cargo.lock` has the hashes.
//! May not live here: formats.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::{fs, io};

use serde_json::Value;

/// The package that the program is built from.
pub const ROOT: &str = "portcullis";

/// A package, by its name and version.
pub type Id = (String, String);

/// One package.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Package {
    /// Its licence (SPDX expression).
    pub license: Option<String>,
    /// Its SHA-256 in the registry; none for a package of this workspace.
    pub checksum: Option<String>,
    /// What it needs: to be linked with, or to be compiled.
    pub needs: BTreeSet<Id>,
}

/// The packages of a program.
pub struct Resolved {
    /// The package that the program is built from.
    pub root: Id,
    /// All packages, that one included.
    pub packages: BTreeMap<Id, Package>,
}

/// Asks Cargo.
///
/// # Errors
/// When it does not answer, or the lock file is not current.
pub fn resolved() -> io::Result<Resolved> {
    let tree = cargo(&[
        "tree",
        "--locked",
        "--workspace",
        "-e",
        "normal,build",
        "--prefix",
        "depth",
        "--format",
        " {p}",
    ])?;
    let mut all = edges(&tree);
    let root = all.keys().find(|(name, _)| name == ROOT).cloned();
    let root = root.ok_or_else(|| io::Error::other("cargo tree does not name the agent"))?;
    let (mut packages, mut waiting) = (BTreeMap::new(), vec![root.clone()]);
    while let Some(id) = waiting.pop() {
        if let Some(needs) = all.remove(&id) {
            waiting.extend(needs.iter().cloned());
            packages.insert(
                id,
                Package {
                    needs,
                    ..Package::default()
                },
            );
        }
    }
    add_licenses(&mut packages)?;
    add_checksums(&mut packages, &fs::read_to_string("Cargo.lock")?);
    Ok(Resolved { root, packages })
}

fn cargo(arguments: &[&str]) -> io::Result<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo).args(arguments).output()?;
    if !output.status.success() {
        return Err(io::Error::other(
            String::from_utf8_lossy(&output.stderr).into_owned(),
        ));
    }
    String::from_utf8(output.stdout).map_err(io::Error::other)
}

/// Who needs whom, from lines of a depth and a package. A package's needs stand below its first line; the later
/// ones are marked with `(*)`.
pub fn edges(tree: &str) -> BTreeMap<Id, BTreeSet<Id>> {
    let mut edges: BTreeMap<Id, BTreeSet<Id>> = BTreeMap::new();
    let mut above: Vec<Id> = Vec::new();
    for line in tree.lines() {
        let mut words = line.split_whitespace();
        let (Some(depth), Some(name), Some(version)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let Ok(depth) = depth.parse::<usize>() else {
            continue;
        };
        let id = (name.to_owned(), version.trim_start_matches('v').to_owned());
        above.truncate(depth);
        if let Some(above) = above.last() {
            edges.entry(above.clone()).or_default().insert(id.clone());
        }
        edges.entry(id.clone()).or_default();
        above.push(id);
    }
    edges
}

fn add_licenses(packages: &mut BTreeMap<Id, Package>) -> io::Result<()> {
    let host = cargo_host()?;
    let metadata = cargo(&[
        "metadata",
        "--locked",
        "--format-version",
        "1",
        "--filter-platform",
        &host,
    ])?;
    let metadata: Value = serde_json::from_str(&metadata)?;
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let text = |field: &str| package[field].as_str().unwrap_or_default().to_owned();
        if let Some(known) = packages.get_mut(&(text("name"), text("version"))) {
            // Cargo's old way to write OR.
            let license = package["license"].as_str();
            known.license = license.map(|license| license.replace('/', " OR "));
        }
    }
    Ok(())
}

fn cargo_host() -> io::Result<String> {
    let version = cargo(&["-vV"])?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned)
        .ok_or_else(|| io::Error::other("cargo does not tell its host"))
}

/// From the lock file, whose form is Cargo's own and fixed: a block for each package.
fn add_checksums(packages: &mut BTreeMap<Id, Package>, lock: &str) {
    for block in lock.split("[[package]]") {
        let field = |name: &str| {
            let line = block
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(" = \""));
            line.and_then(|value| value.strip_suffix('"')).map(str::to_owned)
        };
        if let (Some(name), Some(version)) = (field("name"), field("version"))
            && let Some(known) = packages.get_mut(&(name, version))
        {
            known.checksum = field("checksum");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> Id {
        (name.to_owned(), "1.0.0".to_owned())
    }

    #[test]
    fn a_tree_becomes_edges() {
        let tree = "0 a v1.0.0 (/x)\n1 b v1.0.0\n2 c v1.0.0 (proc-macro)\n1 c v1.0.0 (proc-macro)\n\n0 d v1.0.0 (/y)\n1 b v1.0.0 (*)\n";
        let edges = edges(tree);
        assert_eq!(edges[&id("a")], [id("b"), id("c")].into());
        assert_eq!(edges[&id("b")], [id("c")].into());
        assert_eq!(edges[&id("d")], [id("b")].into());
        assert!(edges[&id("c")].is_empty());
    }

    #[test]
    fn a_lock_file_has_the_hashes() {
        let mut packages = BTreeMap::from([(id("a"), Package::default()), (id("b"), Package::default())]);
        add_checksums(
            &mut packages,
            "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\nchecksum = \"00ff\"\n\n[[package]]\nname = \"b\"\nversion = \"1.0.0\"\n",
        );
        assert_eq!(packages[&id("a")].checksum.as_deref(), Some("00ff"));
        assert_eq!(packages[&id("b")].checksum, None);
    }
}
