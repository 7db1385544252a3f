//! What ships: that the program is hardened and tells nothing of where it was built, that its bill of materials
//! is whole, that Debian takes the package, and that the table of dependencies is current.
//!
//! May not live here: how a package behaves on an instance (`instances/lifecycle.rs`).
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn output(command: &mut Command) -> (bool, String) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    (output.status.success(), said.concat())
}

fn said(command: &mut Command) -> String {
    let (success, said) = output(command);
    assert!(success, "{command:?}: {said}");
    said
}

/// The package that `PORTCULLIS_TEST_DEB` names, else the newest that was made.
fn deb() -> PathBuf {
    if let Some(named) = std::env::var_os("PORTCULLIS_TEST_DEB") {
        return named.into();
    }
    let entries = fs::read_dir(root().join("target/debian")).expect("run `make deb`");
    let debs = entries.map(|entry| entry.unwrap().path());
    let debs = debs.filter(|path| path.extension().is_some_and(|kind| kind == "deb"));
    let newest = debs.max_by_key(|path| fs::metadata(path).unwrap().modified().unwrap());
    newest.expect("run `make deb`")
}

/// What is in the package, unpacked once.
fn unpacked() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let made = || {
        let folder = tempfile::tempdir().unwrap();
        said(Command::new("dpkg-deb").arg("-x").arg(deb()).arg(folder.path()));
        folder
    };
    FOLDER.get_or_init(made).path()
}

fn program() -> PathBuf {
    unpacked().join("usr/bin/portcullis")
}

fn readelf(what: &str, file: &Path) -> String {
    said(Command::new("readelf").arg("-W").arg(what).arg(file))
}

/// What a program lacks of what linkers can do against exploits (checksec's list, as far as it means Rust).
fn lacks(file: &Path) -> Vec<&'static str> {
    let (header, segments, dynamic) = (readelf("-h", file), readelf("-l", file), readelf("-d", file));
    let stack = segments.lines().find(|line| line.contains("GNU_STACK"));
    // Flags stand before the alignment; E is "may be executed".
    let stack_may_run = stack.is_none_or(|line| line.split_whitespace().rev().nth(1).unwrap().contains('E'));
    let writable_code = segments
        .lines()
        .any(|line| line.contains("LOAD") && line.contains("RWE"));
    let checks = [
        (
            "PIE",
            header.contains("DYN (Position-Independent Executable") && dynamic.contains("PIE"),
        ),
        ("RELRO", segments.contains("GNU_RELRO")),
        (
            "BIND_NOW",
            dynamic.contains("BIND_NOW") || dynamic.contains("Flags: NOW"),
        ),
        ("a stack that can't be executed", !stack_may_run),
        ("memory that is writable or executable, not both", !writable_code),
        (
            "no search path of its own",
            !dynamic.contains("RPATH") && !dynamic.contains("RUNPATH"),
        ),
        ("no relocations in code", !dynamic.contains("TEXTREL")),
    ];
    checks
        .iter()
        .filter(|(_, held)| !held)
        .map(|(name, _)| *name)
        .collect()
}

#[test]
fn the_program_is_hardened() {
    assert_eq!(lacks(&program()), [""; 0]);
    // The same look at a program that is not.
    let folder = tempfile::tempdir().unwrap();
    let (source, weak) = (folder.path().join("a.c"), folder.path().join("weak"));
    fs::write(&source, "int main(void) { return 0; }").unwrap();
    let mut gcc = Command::new("gcc");
    gcc.args([
        "-no-pie",
        "-z",
        "execstack",
        "-Wl,-z,norelro,-z,lazy,-rpath,/tmp",
        "-o",
    ]);
    said(gcc.arg(&weak).arg(&source));
    let expected = [
        "PIE",
        "RELRO",
        "BIND_NOW",
        "a stack that can't be executed",
        "no search path of its own",
    ];
    assert_eq!(lacks(&weak), expected);
}

/// Texts of a program, as strings(1) finds them.
fn texts(file: &Path) -> String {
    said(Command::new("strings").args(["-n", "6"]).arg(file))
}

#[test]
fn the_program_does_not_tell_where_it_was_built() {
    let text = texts(&program());
    for private in [root().to_str().unwrap(), "/.cargo/", "/.rustup/"] {
        assert!(!text.contains(private), "the program has the path {private}");
    }
    // Paths are looked for where there are some: those of the sources, with their beginning replaced.
    assert!(text.contains("/registry/"), "no source's path is found");
}

fn bill() -> Value {
    let file = unpacked().join("usr/share/doc/portcullis/sbom.cdx.json");
    let file = if file.exists() {
        file
    } else {
        panic!("the package has no sbom.cdx.json")
    };
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

/// Name and version of everything that the bill names.
fn billed(bill: &Value) -> BTreeSet<String> {
    let components = bill["components"].as_array().unwrap();
    let named = components.iter().map(|c| {
        format!(
            "{}-{}",
            c["name"].as_str().unwrap(),
            c["version"].as_str().unwrap()
        )
    });
    named.collect()
}

/// What Cargo resolves for the agent, a package a line.
fn tree(options: &[&str]) -> String {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root()).args([
        "tree",
        "--locked",
        "--offline",
        "--prefix",
        "none",
        "-p",
        "portcullis",
        "--format",
        "{p}",
    ]);
    said(cargo.args(options))
}

/// `NAME-VERSION` of each package that Cargo resolves for the agent, with these kinds of dependencies.
fn resolved(kinds: &str) -> BTreeSet<String> {
    let tree = tree(&["-e", kinds]);
    let packages = tree.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        Some(format!("{}-{}", words.next()?, words.next()?.strip_prefix('v')?))
    });
    packages
        .filter(|package| !package.starts_with("portcullis-0"))
        .collect()
}

#[test]
fn the_bill_of_materials_names_what_is_compiled_in_and_nothing_of_the_tests() {
    let bill = bill();
    assert_eq!(bill["metadata"]["component"]["name"], "portcullis");
    assert_eq!(
        bill["metadata"]["component"]["version"],
        env!("CARGO_PKG_VERSION")
    );
    let billed = billed(&bill);
    let shipped = resolved("normal,build");
    assert!(shipped.len() > 100, "{}", shipped.len());
    // The package is built together with the library, which may ask for more features of a crate.
    assert!(
        billed.is_superset(&shipped),
        "missing: {:?}",
        shipped.difference(&billed).collect::<Vec<_>>()
    );
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let locked: BTreeSet<String> = lock
        .split("[[package]]")
        .filter_map(|block| {
            let field = |name| {
                block
                    .lines()
                    .find_map(|line| line.strip_prefix(name)?.strip_suffix('"'))
            };
            Some(format!("{}-{}", field("name = \"")?, field("version = \"")?))
        })
        .collect();
    assert!(
        billed.is_subset(&locked),
        "not locked: {:?}",
        billed.difference(&locked).collect::<Vec<_>>()
    );
    let tests = resolved("normal,build,dev");
    let for_tests: Vec<_> = tests
        .difference(&shipped)
        .filter(|name| name.starts_with("proptest-"))
        .collect();
    assert!(
        !for_tests.is_empty() && for_tests.iter().all(|name| !billed.contains(*name)),
        "{for_tests:?}"
    );
    for component in bill["components"].as_array().unwrap() {
        let name = component["name"].as_str().unwrap();
        if !name.starts_with("portcullis") {
            assert_eq!(
                component["hashes"][0]["content"].as_str().unwrap().len(),
                64,
                "{name}"
            );
        }
        assert!(component["licenses"][0]["expression"].is_string(), "{name}");
    }
}

/// The program itself names sources: those that can panic say where.
#[test]
fn the_bill_of_materials_names_every_crate_that_the_program_names() {
    let billed = billed(&bill());
    let text = texts(&program());
    let named: BTreeSet<&str> = text
        .split("/registry/index.")
        .skip(1)
        .filter_map(|rest| rest.split('/').nth(1))
        // Paths of files beside one another.
        .filter(|name| *name != "..")
        .collect();
    assert!(named.len() > 30, "{named:?}");
    for name in named {
        assert!(
            billed.contains(name),
            "{name} is in the program and not in the bill"
        );
    }
}

#[test]
fn the_bill_of_materials_is_cyclonedx_and_always_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str| {
        let file = folder.path().join(name);
        // As `make deb` built it.
        let mut xtask = Command::new(root().join("target/release/xtask"));
        said(
            xtask
                .arg("sbom")
                .arg(&file)
                .current_dir(root())
                .env("SOURCE_DATE_EPOCH", "1700000000"),
        );
        fs::read_to_string(file).unwrap()
    };
    let once = write("once");
    assert_eq!(write("twice"), once);
    for varying in ["serialNumber", root().to_str().unwrap(), "file://"] {
        assert!(!once.contains(varying), "{varying}");
    }
    assert!(once.contains("\"timestamp\": \"2023-11-14T22:13:20Z\""));
    // CycloneDX' own validator, with the schema that it ships.
    let validate = |text: &str| {
        let file = folder.path().join("bill.json");
        fs::write(&file, text).unwrap();
        let python = root().join("target/tools/supply/bin/python");
        let script = "import sys\n\
             from cyclonedx.schema import SchemaVersion\n\
             from cyclonedx.validation.json import JsonStrictValidator\n\
             sys.exit(JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1]).read()) is not None)";
        output(Command::new(python).args(["-c", script]).arg(file))
    };
    let shipped = bill().to_string();
    for text in [&once, &shipped] {
        let (valid, said) = validate(text);
        assert!(valid, "{said}");
    }
    assert!(!validate(&once.replace("\"library\"", "\"librarian\"")).0);
}

#[test]
fn debian_takes_the_package() {
    let lintian = |package: &Path| {
        let mut lintian = Command::new("lintian");
        lintian.args([
            "--allow-root",
            "--fail-on",
            "error,warning",
            "--tag-display-limit",
            "0",
        ]);
        output(lintian.arg(package))
    };
    let (clean, said) = lintian(&deb());
    assert!(clean, "{said}");
    // And it would say so: the package without its licence.
    let folder = tempfile::tempdir().unwrap();
    let (tree, poor) = (folder.path().join("tree"), folder.path().join("poor.deb"));
    self::said(Command::new("dpkg-deb").arg("-R").arg(deb()).arg(&tree));
    fs::remove_file(tree.join("usr/share/doc/portcullis/copyright")).unwrap();
    self::said(
        Command::new("dpkg-deb")
            .args(["--root-owner-group", "-Znone", "-b"])
            .arg(&tree)
            .arg(&poor),
    );
    let (clean, said) = lintian(&poor);
    assert!(!clean && said.contains("no-copyright-file"), "{said}");
}

/// Keys of `[dependencies]` in the root manifest, which `cargo metadata` tells in its own words.
fn direct_dependencies() -> BTreeSet<String> {
    let tree = tree(&["--depth", "1", "-e", "normal"]);
    let names = tree.lines().skip(1).filter_map(|line| line.split(' ').next());
    names
        .filter(|name| !name.is_empty() && !name.starts_with("portcullis"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_table_of_dependencies_is_current() {
    let page = fs::read_to_string(root().join("docs/dependencies.md")).unwrap();
    let mut listed = BTreeSet::new();
    for line in page.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let ["", name, alone, with, why, ""] = cells[..] else {
            panic!("not four cells: {line}");
        };
        let name = name.trim_matches('`');
        assert!(listed.insert(name.to_owned()), "{name} twice");
        for size in [alone, with] {
            assert!(
                size == "0" || size.ends_with(" KiB"),
                "{name}: {size:?} is not measured: make dependencies"
            );
        }
        assert!(why.len() > 10, "{name}: why?");
    }
    assert_eq!(
        listed,
        direct_dependencies(),
        "left: the table, right: Cargo.toml"
    );
}
