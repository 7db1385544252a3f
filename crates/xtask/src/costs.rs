//! What a dependency costs: bytes of the program that its symbols take, and those of all that would go with it.
//!
//! Measured on the program as it ships (`opt-level`, link-time optimisation) but for `strip`, by `nm` of
//! binutils. A function counts for the crate that defines it, also where its types are another one's; what was
//! inlined counts for whom it was inlined into; what has no symbol (strings, unwinding tables) for nobody.
//! May not live here: why a dependency is there (docs/dependencies.md, by hand).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::{fs, io};

use crate::cargo::{Id, Resolved, resolved};

/// Writes the figures into the table: the second and third cell of each row.
///
/// # Errors
/// When the program has no symbols, or a row names no direct dependency.
pub fn write(program: &Path, page: &Path) -> io::Result<()> {
    let resolved = resolved()?;
    let own = by_crate(&symbols(program)?);
    let text = fs::read_to_string(page)?;
    let mut lines = Vec::new();
    for line in text.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        lines.push(match cells[..] {
            ["", name, _, _, why, ""] if name.starts_with('`') => {
                let name = name.trim_matches('`');
                let (alone, with) = cost(&resolved, &own, name)
                    .ok_or_else(|| io::Error::other(format!("{name} is no direct dependency")))?;
                format!("| `{name}` | {} | {} | {why} |", kib(alone), kib(with))
            }
            _ => line.to_owned(),
        });
    }
    fs::write(page, lines.join("\n") + "\n")?;
    let total: u64 = own.values().sum();
    println!("{} of symbols in {}", kib(total), program.display());
    for (name, bytes) in largest(&own) {
        println!("{:>8}  {name}", kib(bytes));
    }
    Ok(())
}

fn largest(own: &BTreeMap<String, u64>) -> Vec<(&str, u64)> {
    let mut all: Vec<(&str, u64)> = own.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
    all.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    all.truncate(25);
    all
}

fn kib(bytes: u64) -> String {
    match bytes {
        0 => "0".to_owned(),
        1..1024 => "<1 KiB".to_owned(),
        _ => format!("{} KiB", bytes / 1024),
    }
}

/// Bytes of a direct dependency itself, and with the packages that nothing else needs.
fn cost(resolved: &Resolved, own: &BTreeMap<String, u64>, name: &str) -> Option<(u64, u64)> {
    let direct = resolved
        .packages
        .get(&resolved.root)?
        .needs
        .iter()
        .find(|(known, _)| known == name)?;
    let bytes = |(name, _): &Id| own.get(&name.replace('-', "_")).copied().unwrap_or(0);
    let kept = reached(resolved, Some(direct));
    let gone = resolved.packages.keys().filter(|id| !kept.contains(*id));
    Some((bytes(direct), gone.map(bytes).sum()))
}

/// What the program needs, without one of its direct dependencies.
fn reached(resolved: &Resolved, without: Option<&Id>) -> BTreeSet<Id> {
    let (mut found, mut waiting) = (BTreeSet::new(), vec![resolved.root.clone()]);
    while let Some(id) = waiting.pop() {
        let needs = resolved.packages.get(&id).map(|package| &package.needs);
        let is_root = id == resolved.root;
        if found.insert(id) {
            let needs = needs.into_iter().flatten();
            waiting.extend(needs.filter(|id| !is_root || Some(*id) != without).cloned());
        }
    }
    found
}

/// Name and size of each symbol.
fn symbols(program: &Path) -> io::Result<Vec<(String, u64)>> {
    let output = Command::new("nm")
        .args(["-S", "-C", "--defined-only"])
        .arg(program)
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let read = |line: &str| {
        let mut words = line.splitn(4, ' ');
        let (_, size, _, name) = (words.next()?, words.next()?, words.next()?, words.next()?);
        Some((name.to_owned(), u64::from_str_radix(size, 16).ok()?))
    };
    let symbols: Vec<_> = text.lines().filter_map(read).collect();
    match symbols.is_empty() {
        true => Err(io::Error::other(format!("{} has no symbols", program.display()))),
        false => Ok(symbols),
    }
}

fn by_crate(symbols: &[(String, u64)]) -> BTreeMap<String, u64> {
    let mut sizes = BTreeMap::new();
    for (name, bytes) in symbols {
        *sizes.entry(crate_of(name)).or_default() += bytes;
    }
    sizes
}

/// The crate that defines a function: of `<a::Type as b::Trait>::call`, `a`; of a trait's implementation for
/// what has no crate, the trait's.
fn crate_of(symbol: &str) -> String {
    // ring's C and assembly carry its version in their names.
    if symbol.contains("ring_core_") {
        return "ring".to_owned();
    }
    let first = |text: &str| {
        let text = text.trim_start_matches(['<', '&', '*', '(', '[', ' ']);
        let text = ["mut ", "const ", "dyn "]
            .iter()
            .fold(text, |text, word| text.strip_prefix(word).unwrap_or(text));
        let end = text
            .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .unwrap_or(text.len());
        let (word, rest) = text.split_at(end);
        let is_path = rest.starts_with("::") || rest.starts_with('[');
        (is_path && !word.is_empty()).then(|| word.to_owned())
    };
    let behind = symbol.split_once(" as ").and_then(|(_, rest)| first(rest));
    first(symbol)
        .or(behind)
        .unwrap_or_else(|| "(no crate)".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cargo::Package;

    #[test]
    fn a_symbol_is_of_the_crate_that_defines_it() {
        for (symbol, expected) in [
            ("serde_json::de::from_str::h0123456789abcdef", "serde_json"),
            (
                "<serde_json::de::Deserializer<R> as serde::Deserializer>::x",
                "serde_json",
            ),
            ("<&mut serde_json::Value as core::fmt::Debug>::fmt", "serde_json"),
            ("<T as tokio::io::AsyncRead>::poll", "tokio"),
            ("tokio[0123456789abcdef]::runtime::run", "tokio"),
            ("ring_core_0_17_14__bn_mul_mont", "ring"),
            ("main", "(no crate)"),
        ] {
            assert_eq!(crate_of(symbol), expected, "{symbol}");
        }
    }

    #[test]
    fn what_goes_with_a_dependency_is_what_nothing_else_needs() {
        let id = |name: &str| (name.to_owned(), "1.0.0".to_owned());
        let needs = |names: &[&str]| Package {
            needs: names.iter().map(|name| id(name)).collect(),
            ..Package::default()
        };
        let resolved = Resolved {
            root: id("agent"),
            packages: BTreeMap::from([
                (id("agent"), needs(&["a-b", "c"])),
                (id("a-b"), needs(&["shared", "alone"])),
                (id("c"), needs(&["shared"])),
                (id("shared"), needs(&[])),
                (id("alone"), needs(&[])),
            ]),
        };
        let own =
            BTreeMap::from([("a_b", 1), ("alone", 10), ("shared", 100)].map(|(k, v)| (k.to_owned(), v)));
        assert_eq!(cost(&resolved, &own, "a-b"), Some((1, 11)));
        assert_eq!(cost(&resolved, &own, "alone"), None);
    }
}
