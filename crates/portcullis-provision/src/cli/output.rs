//! How results look: tables for people, JSON for programs.
//!
//! May not live here: what is in them.

use std::io::Write as _;

use anstyle::{AnsiColor, Style};
use comfy_table::{Table, presets};
use portcullis_protocol::text::plain;
use portcullis_protocol::{Report, Status};
use serde::Serialize;

use crate::{Error, Result};

/// Writes text to standard output; colours only if that is a terminal. A reader that went away is
/// no error.
pub(super) fn print(text: &str) {
    let _ = anstream::stdout().write_all(text.as_bytes());
}

/// Writes one JSON document to standard output.
pub(super) fn print_json(value: &impl Serialize) -> Result<()> {
    let json = serde_json::to_string_pretty(value).map_err(|e| Error::Failed(format!("JSON: {e}")))?;
    print(&(json + "\n"));
    Ok(())
}

/// A table without lines.
pub(super) fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let text = table.to_string();
    text.lines()
        .map(|line| line.trim_end().to_owned() + "\n")
        .collect()
}

/// A word in the colour of its meaning.
pub(super) fn coloured(word: &str, status: Status) -> String {
    let colour = match status {
        Status::Pass => AnsiColor::Green,
        Status::Warn | Status::Unknown => AnsiColor::Yellow,
        Status::Fail => AnsiColor::Red,
    };
    let style = Style::new().fg_color(Some(colour.into()));
    format!("{style}{word}{style:#}")
}

/// A report for people: what the instance is, then its checks.
pub(super) fn report(name: &str, report: &Report) -> String {
    let ready = if report.ready {
        coloured("ready", Status::Pass)
    } else {
        coloured("not ready", Status::Fail)
    };
    let generation = report
        .generation
        .map_or("none".to_owned(), |generation| generation.to_string());
    let mut text = format!(
        "{name} ({}): {ready}, generation {generation}, agent {}\n",
        printable(&report.instance.id),
        printable(&report.agent.version)
    );
    let width = |length: fn(&portcullis_protocol::Check) -> usize| {
        report.checks.iter().map(length).max().unwrap_or(0)
    };
    let ids = width(|check| check.id.as_str().len());
    let requirements = width(|check| check.requirement.id().len());
    for check in &report.checks {
        let status = coloured(&format!("{:<7}", check.status), check.status);
        let (id, requirement) = (check.id, check.requirement);
        let summary = printable(&check.summary);
        text += &format!("  {status}  {id:<ids$}  {requirement:<requirements$}  {summary}\n");
        if let (Status::Warn | Status::Fail, Some(remedy)) = (check.status, &check.remedy) {
            text += &format!("  {:7}  {:ids$}  remedy: {}\n", "", "", printable(remedy));
        }
    }
    text
}

/// Text from an instance, without what could command the terminal.
pub(super) fn printable(text: &str) -> String {
    plain(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_can_not_command_the_terminal() {
        assert_eq!(printable("a\x1b[2Jb\n"), "a [2Jb ");
    }

    #[test]
    fn tables_have_no_trailing_spaces() {
        let text = table(
            &["NAME", "X"],
            vec![vec!["a".into(), "long".into()], vec!["b".into(), "".into()]],
        );
        assert!(text.lines().all(|line| line == line.trim_end()), "{text:?}");
        assert_eq!(text.lines().count(), 3);
    }
}
