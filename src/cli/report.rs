//! The health report, as people like to read it.

use anstyle::{AnsiColor, Style};
use jiff::{SignedDuration, Timestamp};
use portcullis_protocol::{Report, Status};

use super::{Failure, Format, plain_table, print as print_text, print_json};

/// Prints a report in the format that was asked for.
pub fn print(report: &Report, format: Format) -> Result<(), Failure> {
    match format {
        Format::Json => print_json(report),
        Format::Table => print_text(&text(report, Timestamp::now())),
    }
}

fn style(status: Status) -> Style {
    let colour = match status {
        Status::Pass => AnsiColor::Green,
        Status::Warn => AnsiColor::Yellow,
        Status::Unknown => AnsiColor::BrightBlack,
        Status::Fail => AnsiColor::Red,
    };
    Style::new().fg_color(Some(colour.into()))
}

/// Colours are taken out again where there is no terminal.
fn coloured(text: &str, style: Style) -> String {
    format!("{style}{text}{style:#}")
}

fn text(report: &Report, now: Timestamp) -> String {
    let id = match report.instance.id.as_str() {
        "" => "(no spec yet)",
        id => id,
    };
    let generation = report
        .generation
        .map_or_else(|| "none".to_owned(), |g| g.to_string());
    let verdict = match report.ready {
        true => coloured("READY", style(Status::Pass).bold()),
        false => coloured("NOT READY", style(Status::Fail).bold()),
    };
    let mut lines = vec![format!(
        "{verdict}  instance {id}, generation {generation}, portcullis {}",
        report.agent.version
    )];
    if let Some(reason) = &report.refused_spec {
        lines.push(coloured(
            "A spec was refused, nothing of it is used:",
            style(Status::Fail),
        ));
        lines.extend(reason.lines().map(|line| format!("  {line}")));
    }
    lines.push(table(report, now));
    let remedies: Vec<String> = report
        .checks
        .iter()
        .filter(|check| check.status != Status::Pass)
        .filter_map(|check| {
            check
                .remedy
                .as_ref()
                .map(|remedy| format!("  {}: {remedy}", check.id))
        })
        .collect();
    if !remedies.is_empty() {
        lines.push("What to do:".to_owned());
        lines.extend(remedies);
    }
    lines.join("\n")
}

fn table(report: &Report, now: Timestamp) -> String {
    let mut table = plain_table(["STATUS", "CHECK", "REQUIREMENT", "SINCE", "SUMMARY"]);
    for check in &report.checks {
        table.add_row([
            check.status.to_string(),
            check.id.to_string(),
            check.requirement.to_string(),
            age(now.duration_since(check.since)),
            check.summary.clone(),
        ]);
    }
    let rows = table.to_string();
    let mut lines = rows.lines();
    let head = lines.next().unwrap_or_default().trim_end().to_owned();
    // The status is coloured after the columns are laid out, so that colours have no width.
    let body = lines.zip(&report.checks).map(|(line, check)| {
        let word = check.status.to_string();
        line.trim_end()
            .replacen(&word, &coloured(&word, style(check.status)), 1)
    });
    std::iter::once(head).chain(body).collect::<Vec<_>>().join("\n")
}

/// One unit is enough to know how long something has been so.
fn age(duration: SignedDuration) -> String {
    let seconds = duration.as_secs().max(0);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_a_check_and_a_remedy_for_what_fails() {
        let json = include_str!("../../crates/portcullis-protocol/tests/report-v1.json");
        let mut report: Report = serde_json::from_str(json).unwrap();
        let good = text(&report, report.time);
        assert!(
            good.contains("READY") && good.contains("ssh.service is active"),
            "{good}"
        );
        assert!(!good.contains("What to do"));
        report.checks[0].status = Status::Fail;
        report.checks[0].remedy = Some("start it".into());
        report.ready = false;
        let bad = text(&report, report.time);
        assert!(
            bad.contains("NOT READY") && bad.contains("sshd.running: start it"),
            "{bad}"
        );
    }
}
