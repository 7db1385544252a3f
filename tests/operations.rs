//! The page for incidents: each check has its section, and each command in it can be typed as it stands.
//!
//! May not live here: whether a command helps; that is tried where its feature is.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/sources.rs"]
mod sources;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use portcullis_protocol::CheckId;
use sources::rust_files;

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// What stands in backquotes, and the lines of fenced blocks.
fn code(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (index, part) in text.split("```").enumerate() {
        match index % 2 {
            0 => found.extend(part.split('`').skip(1).step_by(2).map(str::to_owned)),
            // The first line names the language.
            _ => found.extend(part.lines().skip(1).map(str::to_owned)),
        }
    }
    found
}

/// Our commands among them, without what they are piped into and without comments. A line broken in backquotes is
/// one.
fn commands(text: &str) -> BTreeSet<Vec<String>> {
    let words = |line: String| -> Vec<String> {
        let line = line.replace('\n', " ");
        let line = line.split([';', '|', '#', '&']).next().unwrap_or_default();
        line.split_whitespace().map(str::to_owned).collect()
    };
    let all = code(text).into_iter().map(words).filter(|words| words.len() > 1);
    all.filter(|words| {
        matches!(
            words.first().map(String::as_str),
            Some("portcullis" | "portcullisctl")
        )
    })
    .collect()
}

#[track_caller]
fn parses(words: &[String]) {
    let program = match words[0].as_str() {
        "portcullis" => portcullis::cli::command(),
        _ => portcullis_provision::cli::command(),
    };
    if let Err(error) = program.try_get_matches_from(words) {
        panic!("{words:?}: {error}");
    }
}

#[test]
fn each_check_has_a_section_from_symptom_to_fix() {
    let page = read("docs/operations.md");
    for id in CheckId::ALL {
        let heading = format!("\n### `{id}`\n");
        let section = page.split_once(&heading).map(|(_, rest)| rest);
        let section = section.unwrap_or_else(|| panic!("docs/operations.md has no section {id}"));
        let section = section.split("\n#").next().unwrap();
        for step in ["- Command: `", "- Meaning: ", "- Fix: "] {
            assert!(section.contains(step), "{id} lacks {step:?}:\n{section}");
        }
    }
    let known: BTreeSet<String> = CheckId::ALL.iter().map(ToString::to_string).collect();
    for heading in page.lines().filter_map(|line| line.strip_prefix("### `")) {
        assert!(
            known.contains(heading.trim_end_matches('`')),
            "{heading} is no check"
        );
    }
}

#[test]
fn each_command_of_the_page_can_be_typed() {
    let found = commands(&read("docs/operations.md"));
    assert!(found.len() > 25, "only {} commands: {found:?}", found.len());
    found.iter().for_each(|words| parses(words));
    // Every command of the agent but those that only units start is on it.
    for subcommand in portcullis::cli::command()
        .get_subcommands()
        .map(clap::Command::get_name)
    {
        let is_on_it = found
            .iter()
            .any(|words| words[0] == "portcullis" && words.get(1).is_some_and(|w| w == subcommand));
        assert!(
            is_on_it || ["run", "front", "plan", "help"].contains(&subcommand),
            "{subcommand} is not on the page"
        );
    }
}

/// The same for what remedies tell people to type.
#[test]
fn each_command_of_a_remedy_can_be_typed() {
    let mut found = BTreeSet::new();
    for text in rust_files("src/policy/readiness").into_values() {
        // Comments have backquotes of their own.
        let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        found.extend(commands(&lines.collect::<Vec<_>>().join("\n")));
    }
    assert!(
        found
            .iter()
            .any(|words| words.contains(&"trust-host-keys".to_owned())),
        "{found:?}"
    );
    for words in &found {
        // A remedy may name a command without what it is given.
        let program = portcullis::cli::command();
        match program.try_get_matches_from(words) {
            Err(error) if error.kind() != clap::error::ErrorKind::MissingRequiredArgument => {
                panic!("{words:?}: {error}");
            }
            _ => {}
        }
    }
}

/// Links within the page lead somewhere: headings become anchors as the hosts of repositories make them.
#[test]
fn links_within_the_page_lead_somewhere() {
    let page = read("docs/operations.md");
    let anchor = |heading: &str| -> String {
        let kept = heading.trim().to_lowercase();
        let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    let headings = page.lines().filter(|line| line.starts_with('#'));
    let anchors: BTreeSet<String> = headings
        .map(|line| anchor(line.trim_start_matches('#')))
        .collect();
    let links: Vec<&str> = page
        .split("](#")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
        .collect();
    assert!(links.len() > 4);
    for link in links {
        assert!(anchors.contains(link), "#{link} leads nowhere: {anchors:?}");
    }
}
