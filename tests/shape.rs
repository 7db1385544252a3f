//! The shape of the house, and the documents that must not drift from it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/sources.rs"]
mod sources;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use portcullis_protocol::requirement::Requirement;
use sources::rust_files;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn all_files() -> Vec<(PathBuf, String)> {
    ["src", "tests", "crates", "benches", "fuzz"]
        .iter()
        .flat_map(|folder| rust_files(folder))
        .collect()
}

/// Deciding has no effects, so it can't import what has.
#[test]
fn policy_never_imports_system() {
    for (path, text) in rust_files("src/policy") {
        for effect in [
            "crate::system",
            "crate::agent",
            "std::fs",
            "std::net::Tcp",
            "std::process",
            "tokio::",
            "Timestamp::now",
        ] {
            // A word in a comment is no import.
            let used = text
                .lines()
                .any(|line| !line.trim_start().starts_with("//") && line.contains(effect));
            assert!(!used, "{} uses {effect}", path.display());
        }
    }
}

/// What speaks to the network asks the agent, and does nothing itself.
#[test]
fn the_front_never_imports_what_has_rights() {
    // Modules that are tests alone.
    let modules = fs::read_to_string("src/health/mod.rs").unwrap();
    let of_tests = |path: &Path| {
        let name = path.file_stem().unwrap().to_string_lossy();
        modules.contains(&format!("#[cfg(test)]\nmod {name};"))
    };
    for (path, text) in rust_files("src/health") {
        if of_tests(&path) {
            continue;
        }
        let text = text
            .split("#[cfg(test)]")
            .next()
            .unwrap()
            .replace("crate::system::clock", "");
        for right in [
            "crate::agent",
            "crate::system",
            "crate::policy",
            "std::fs",
            "std::process",
        ] {
            let used = text
                .lines()
                .any(|line| !line.trim_start().starts_with("//") && line.contains(right));
            assert!(!used, "{} uses {right}", path.display());
        }
    }
}

#[test]
fn unsafe_stands_in_one_module_with_a_reason_each() {
    for (path, text) in rust_files("src").into_iter().chain(rust_files("crates")) {
        let blocks = text.matches("unsafe {").count();
        if path.ends_with("system/descriptors.rs") {
            assert_eq!(
                blocks,
                text.matches("// SAFETY:").count(),
                "a block without a SAFETY note"
            );
        } else {
            assert_eq!(blocks, 0, "{} has an unsafe block", path.display());
            assert!(!text.contains("allow(unsafe_code)"), "{}", path.display());
        }
    }
}

#[test]
fn every_file_says_what_lives_there_and_is_not_too_long() {
    for (path, text) in all_files() {
        assert!(
            text.starts_with("//!"),
            "{} does not say what lives there",
            path.display()
        );
        let lines = text.lines().count();
        assert!(
            lines <= 520,
            "{} has {lines} lines: is it still one room?",
            path.display()
        );
    }
}

/// No test that is ignored, and none that passes by leaving early.
#[test]
fn no_test_is_ignored() {
    for (path, text) in all_files() {
        let ignored = concat!("#[ign", "ore");
        assert!(!text.contains(ignored), "{} ignores a test", path.display());
    }
}

fn security() -> String {
    fs::read_to_string(root().join("SECURITY.md")).unwrap()
}

#[test]
fn security_answers_every_requirement() {
    let text = security();
    for requirement in Requirement::ALL {
        assert!(
            text.contains(&format!("| {} |", requirement.id())),
            "SECURITY.md lacks {requirement}"
        );
    }
}

/// Whoever reads a guarantee can go to the test that tries it.
#[test]
fn security_names_only_tests_that_exist() {
    let functions: String = all_files().into_iter().map(|(_, text)| text).collect();
    let text = security();
    let named: Vec<&str> = text
        .split("test:`")
        .skip(1)
        .filter_map(|rest| rest.split('`').next())
        .collect();
    assert!(named.len() >= 20, "only {} tests are named", named.len());
    for name in named {
        assert!(
            functions.contains(&format!("fn {name}(")),
            "SECURITY.md names the test {name}, which does not exist"
        );
    }
}

#[test]
fn the_changelog_knows_this_version() {
    let changelog = fs::read_to_string(root().join("CHANGELOG.md")).unwrap();
    assert!(changelog.contains(env!("CARGO_PKG_VERSION")));
}

/// One TLS stack and one provider of cryptography in what ships: rustls with ring.
#[test]
fn no_second_provider_of_cryptography_comes_in() {
    for package in ["portcullis", "portcullis-provision"] {
        let mut cargo = std::process::Command::new(env!("CARGO"));
        cargo
            .current_dir(root())
            .args(["tree", "--locked", "--offline", "-e", "normal"]);
        let output = cargo.args(["--prefix", "none", "-p", package]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let crates: BTreeSet<&str> = text.lines().filter_map(|line| line.split(' ').next()).collect();
        for wanted in ["ring", "rustls"] {
            assert!(crates.contains(wanted), "{package} is looked at: {crates:?}");
        }
        for other in [
            "aws-lc-rs",
            "aws-lc-sys",
            "openssl",
            "openssl-sys",
            "native-tls",
            "boring",
            "mbedtls",
        ] {
            assert!(!crates.contains(other), "{package} has {other}");
        }
    }
}
