//! Reading what a caller asks for: names, rules and keys as the command line has them.
//!
//! May not live here: what is then done with them (launch.rs).

use std::fs;
use std::path::Path;

use portcullis_protocol::{FirewallRule, PortRange, Protocol, PublicKey};

use crate::{Error, Result};

/// Checks an instance's name: 1 to 32 of a-z, 0-9 and `-`, which begins with a letter.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let letters = name
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if letters && name.len() <= 32 && name.bytes().next().is_some_and(|b| b.is_ascii_lowercase()) {
        return Ok(());
    }
    Err(Error::BadInput(format!(
        "{name:?} is not an instance's name: 1 to 32 of a-z, 0-9 and '-', a letter first"
    )))
}

/// Reads a rule as the command line has it: `22/tcp`, `80-90/udp@10.0.0.0/8`, `icmp`.
///
/// # Errors
/// Which part of it is wrong.
pub fn parse_allow(text: &str) -> Result<FirewallRule, String> {
    let (what, source) = text
        .split_once('@')
        .map_or((text, None), |(what, source)| (what, Some(source)));
    let (ports, protocol) = match what.split_once('/') {
        Some((ports, protocol)) => (Some(ports.parse::<PortRange>()?), protocol.parse::<Protocol>()?),
        None => (None, what.parse::<Protocol>()?),
    };
    // A bare number would be an IP protocol, but who writes 22 means a port.
    if protocol.has_ports() != ports.is_some() || matches!(protocol, Protocol::Number(_)) {
        return Err(format!(
            "{text:?}: write it like 22/tcp, 80-90/udp@10.0.0.0/8 or icmp"
        ));
    }
    let sources = source.map(str::parse).transpose()?.into_iter().collect();
    let id: String = std::iter::once("allow-").chain([text]).collect::<String>();
    let id = id.replace(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '.', "-");
    Ok(FirewallRule {
        id: id.parse()?,
        protocol,
        ports,
        sources,
    })
}

/// Reads public keys from a file: one a line; empty lines and those that begin with `#` are skipped.
///
/// # Errors
/// When the file can't be read or a line is not a key; with the line's number.
pub fn read_keys(path: &Path) -> Result<Vec<PublicKey>> {
    let text = fs::read_to_string(path).map_err(Error::file("read", path))?;
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    let keys = lines.map(|(number, line)| {
        let key = line.parse::<PublicKey>();
        key.map_err(|e| Error::BadInput(format!("{}: line {}: {e}", path.display(), number + 1)))
    });
    let keys = keys.collect::<Result<Vec<_>>>()?;
    if keys.is_empty() {
        return Err(Error::BadInput(format!("{}: no key is in it", path.display())));
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_of_the_command_line() {
        for (text, id, shown) in [
            ("22/tcp", "allow-22-tcp", "22/tcp from anywhere"),
            (
                "80-90/udp@10.0.0.0/8",
                "allow-80-90-udp-10.0.0.0-8",
                "80-90/udp from 10.0.0.0/8",
            ),
            ("icmp", "allow-icmp", "icmp from anywhere"),
            (
                "443/any@fd00::/8",
                "allow-443-any-fd00---8",
                "443/any from fd00::/8",
            ),
        ] {
            let rule = parse_allow(text).unwrap();
            assert_eq!(rule.to_string(), format!("{id}: {shown}"));
        }
        for bad in [
            "",
            "22",
            "tcp",
            "22/icmp",
            "0/tcp",
            "9-1/tcp",
            "22/tcp@x",
            "22/tcp/udp",
            "70000/tcp",
        ] {
            assert!(parse_allow(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names() {
        for good in ["a", "gpu-0"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "..", "a/b", "-a", "0", "A", "a b", &"a".repeat(33)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_bad_key_is_named_by_its_line() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "# mine\n\nssh-rsa nonsense\n").unwrap();
        let error = read_keys(file.path()).unwrap_err();
        assert!(
            error.to_string().contains("line 3") && error.exit_code() == 2,
            "{error}"
        );
    }
}
