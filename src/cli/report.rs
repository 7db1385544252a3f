//! The health report, as people like to read it: what fails comes first and says since when, why and what
//! to do; what passes takes a line.
//!
//! May not live here: asking for it, printing it a second time.

use anstyle::{AnsiColor, Style};
use jiff::{SignedDuration, Timestamp};
use portcullis_protocol::situation::Deliveries;
use portcullis_protocol::text::plain;
use portcullis_protocol::{Check, Report, Situation, Status};

use super::{Failure, Format, print as print_text, print_json, screen};

/// Prints a report in the format that was asked for.
pub fn print(report: &Report, format: Format) -> Result<(), Failure> {
    match format {
        Format::Json => print_json(report),
        Format::Table => print_text(&report_text(report, Timestamp::now(), screen::width())),
    }
}

/// A report of what was looked at just now: nothing is known of before.
pub fn report_text(report: &Report, now: Timestamp, width: usize) -> String {
    let mut page = Page::new(now, width);
    page.verdict(report, None);
    page.fact("instance", &instance(&report.instance.id, report.generation));
    page.fact("agent", &format!("portcullis {}", report.agent.version));
    page.rest(report, None);
    page.end()
}

/// The situation as the daemon tells it.
pub fn situation_text(situation: &Situation, now: Timestamp, width: usize) -> String {
    let report = &situation.report;
    let mut page = Page::new(now, width);
    page.verdict(report, Some(situation.verdict_since));
    page.fact("instance", &instance(&report.instance.id, report.generation));
    page.fact(
        "agent",
        &format!(
            "portcullis {}, first report {}",
            report.agent.version,
            page.moment(situation.started)
        ),
    );
    if let Some(trial) = &situation.trial {
        let generation = report.generation.unwrap_or_default();
        let before = match trial.before {
            Some(before) => format!("generation {before} holds again"),
            None => "nothing is let in again".to_owned(),
        };
        let left = age(trial.until.duration_since(now));
        page.fact(
            "on trial",
            &format!(
                "until {:.0}, in {left}; then {before}. To keep it: portcullis confirm {generation}",
                trial.until
            ),
        );
    }
    page.let_in(situation);
    page.deliveries(situation.deliveries.as_ref());
    page.rest(report, Some(situation));
    page.end()
}

/// Which instance, and which spec holds.
pub fn instance(id: &str, generation: Option<u64>) -> String {
    match generation {
        Some(generation) => format!("{id}, generation {generation}"),
        None => "no spec is accepted yet".to_owned(),
    }
}

/// Columns before the words of a check.
const LABEL: usize = 9;
/// Columns before the words of a fact.
const FACT: usize = 12;

/// Lines, as wide as they may be.
pub struct Page {
    lines: Vec<String>,
    now: Timestamp,
    width: usize,
}

impl Page {
    /// An empty one.
    pub fn new(now: Timestamp, width: usize) -> Self {
        Self {
            lines: Vec::new(),
            now,
            width,
        }
    }

    /// All lines; colours are taken out again where there is no terminal.
    pub fn end(self) -> String {
        self.lines.join("\n")
    }

    /// The first line: what matters.
    pub fn headline(&mut self, word: &str, status: Status, rest: &str) {
        self.hung(
            word.len() + 2,
            &coloured(word, style(status).bold()),
            word.len(),
            rest,
        );
    }

    /// A line of its own.
    pub fn heading(&mut self, text: &str) {
        self.lines.push(String::new());
        self.lines.push(coloured(text, Style::new().bold()));
    }

    /// A name and what it is. Without a name it belongs to the one above.
    pub fn fact(&mut self, name: &str, text: &str) {
        self.hung(FACT, &format!("  {name}"), name.len() + 2, text);
    }

    /// Something to type, which must not be broken.
    pub fn command(&mut self, command: &str, what: &str) {
        self.lines.push(format!("  {command:<46} {what}"));
    }

    /// A moment, and how long ago that is.
    fn moment(&self, moment: Timestamp) -> String {
        format!("{moment:.0}, {} ago", age(self.now.duration_since(moment)))
    }

    fn verdict(&mut self, report: &Report, since: Option<Timestamp>) {
        let since = since.map_or_else(String::new, |since| format!("since {}", self.moment(since)));
        let blocking: Vec<&str> = report.blocking().map(|check| check.id.as_str()).collect();
        if report.ready {
            self.headline("READY", Status::Pass, &since);
        } else {
            let colon = if since.is_empty() { "" } else { ": " };
            let rest = format!("{since}{colon}{}", blocking.join(", "));
            self.headline("NOT READY", Status::Fail, &rest);
        }
    }

    fn let_in(&mut self, situation: &Situation) {
        let Some(let_in) = &situation.let_in else {
            self.fact(
                "lets in",
                "nobody: what this host began is answered, and nothing else",
            );
            return;
        };
        let rules = let_in.rules.iter().map(|rule| format!("rule {rule}"));
        let cluster = let_in.cluster.iter().map(|cluster| match let_in.peers {
            0 => format!("cluster {cluster}: no other member yet"),
            peers => format!("cluster {cluster}: its {peers} other members, on every port"),
        });
        let sources: Vec<String> = let_in.control_plane.iter().map(ToString::to_string).collect();
        let control_plane = (!sources.is_empty())
            .then(|| format!("control plane: the HTTPS endpoint, from {}", sources.join(", ")));
        let mut lines: Vec<String> = rules.chain(cluster).chain(control_plane).collect();
        if lines.is_empty() {
            lines.push("nobody: no rule, no peer, no control plane".to_owned());
        }
        for (at, line) in lines.iter().enumerate() {
            self.fact(if at == 0 { "lets in" } else { "" }, line);
        }
        self.fact("keys", &format!("{} in the spec", let_in.keys));
    }

    fn deliveries(&mut self, deliveries: Option<&Deliveries>) {
        let Some(deliveries) = deliveries else { return };
        let mut text = match deliveries.last_success {
            Some(moment) => format!("the last was taken {}", self.moment(moment)),
            None => "none was taken yet".to_owned(),
        };
        if let (1.., Some(oldest)) = (deliveries.queued, deliveries.oldest) {
            text += &format!("; {} wait, since {}", deliveries.queued, self.moment(oldest));
        }
        if let Some(error) = &deliveries.last_error {
            text += &format!("; the last try failed: {error}");
        }
        self.fact("reports", &text);
    }

    fn rest(&mut self, report: &Report, situation: Option<&Situation>) {
        if let Some(reason) = &report.refused_spec {
            self.heading("A spec was refused, nothing of it is used:");
            for line in reason.lines() {
                self.hung(2, "", 0, line);
            }
        }
        self.checks(&report.checks, situation.map(|situation| situation.started));
    }

    /// The checks: those that need somebody first, the worst of them on top.
    pub fn checks(&mut self, checks: &[Check], first_report: Option<Timestamp>) {
        let mut bad: Vec<&Check> = checks.iter().filter(|check| needs_somebody(check)).collect();
        bad.sort_by_key(|check| (!check.blocks_readiness(), std::cmp::Reverse(check.status)));
        for check in bad {
            self.bad(check, first_report);
        }
        let rest = |status| {
            checks
                .iter()
                .filter(move |c| c.status == status && !needs_somebody(c))
        };
        self.list("Not known", rest(Status::Unknown).collect());
        self.list("Passing", rest(Status::Pass).collect());
    }

    fn bad(&mut self, check: &Check, first_report: Option<Timestamp>) {
        self.lines.push(String::new());
        let word = check.status.to_string().to_uppercase();
        let label = coloured(&word, style(check.status).bold());
        let what = format!("{} ({}): {}", check.id, check.requirement, check.summary);
        self.hung(LABEL, &label, word.len(), &what);
        if let Some(first) = first_report {
            let earlier = if check.since == first {
                ", or longer: that was the first report"
            } else {
                ""
            };
            let since = format!("since {}{earlier}", self.moment(check.since));
            self.hung(LABEL, "", 0, &since);
        }
        if !check.required {
            self.hung(LABEL, "", 0, "the instance may be ready all the same");
        }
        if let Some(remedy) = &check.remedy {
            self.hung(LABEL, "", 0, &format!("to do: {remedy}"));
        }
    }

    /// One line a check, cut where the page ends.
    fn list(&mut self, title: &str, checks: Vec<&Check>) {
        if checks.is_empty() {
            return;
        }
        self.heading(&format!("{title} ({})", checks.len()));
        let longest = checks.iter().map(|check| check.id.as_str().len()).max();
        let longest = longest.unwrap_or_default();
        for check in checks {
            let name = format!("  {:longest$}", check.id);
            let words = plain(&check.summary);
            let room = self.width.saturating_sub(longest + 4).max(20);
            let cut = if words.chars().count() > room {
                let start: String = words.chars().take(room - 1).collect();
                format!("{}…", start.trim_end())
            } else {
                words
            };
            self.lines
                .push(format!("{}  {cut}", coloured(&name, style(check.status))));
        }
    }

    /// A label, and words beside it that stay in their column.
    fn hung(&mut self, column: usize, label: &str, label_width: usize, text: &str) {
        let room = self.width.saturating_sub(column).max(20);
        let gap = " ".repeat(column.saturating_sub(label_width));
        for (at, line) in wrapped(&plain(text), room).iter().enumerate() {
            let start = match at {
                0 => format!("{label}{gap}"),
                _ => " ".repeat(column),
            };
            self.lines.push(format!("{start}{line}").trim_end().to_owned());
        }
    }
}

/// What an operator should look at: everything but what passes, and what may be unknown.
fn needs_somebody(check: &Check) -> bool {
    match check.status {
        Status::Pass => false,
        Status::Unknown => check.required,
        Status::Warn | Status::Fail => true,
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

pub fn coloured(text: &str, style: Style) -> String {
    format!("{style}{text}{style:#}")
}

/// Lines of at most so many characters, broken between words; a longer word has a line of its own.
pub fn wrapped(text: &str, room: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let last = lines.last_mut();
        match last.filter(|line| line.is_empty() || line.chars().count() + 1 + word.chars().count() <= room) {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) => {
                line.push(' ');
                line.push_str(word);
            }
            None => lines.push(word.to_owned()),
        }
    }
    lines
}

/// The two largest units are enough to know how long something has been so.
fn age(duration: SignedDuration) -> String {
    let seconds = duration.as_secs().max(0);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h {}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d {}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use portcullis_protocol::CheckId;
    use portcullis_protocol::situation::{LetIn, TrialState};

    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn check(id: CheckId, status: Status, summary: &str, remedy: Option<&str>) -> Check {
        Check {
            id,
            status,
            required: !matches!(id, CheckId::SshdPassword | CheckId::StorageEncrypted),
            requirement: id.requirement(),
            summary: summary.to_owned(),
            evidence: BTreeMap::new(),
            since: at("2026-11-24T09:00:00Z"),
            remedy: remedy.map(str::to_owned),
        }
    }

    /// An incident: sshd is down since three minutes, a change is on trial, passwords were always offered.
    fn incident() -> Situation {
        let json = include_str!("../../crates/portcullis-protocol/tests/report-v1.json");
        let mut report: Report = serde_json::from_str(json).unwrap();
        report.generation = Some(3);
        report.ready = false;
        report.checks = vec![
            check(CheckId::SystemdRunning, Status::Pass, "systemd is running", None),
            check(
                CheckId::SshdRunning,
                Status::Fail,
                "ssh.service is inactive (dead) and nothing else that is known here would serve a login",
                Some("systemctl start ssh"),
            ),
            check(
                CheckId::SshdPassword,
                Status::Warn,
                "sshd offers passwords",
                Some("PasswordAuthentication no"),
            ),
            check(CheckId::StorageEncrypted, Status::Unknown, "not examined", None),
        ];
        report.checks[1].since = at("2026-11-24T11:56:55Z");
        Situation {
            report,
            started: at("2026-11-24T09:00:00Z"),
            verdict_since: at("2026-11-24T11:56:55Z"),
            trial: Some(TrialState {
                until: at("2026-11-24T12:00:50Z"),
                before: Some(2),
            }),
            let_in: Some(LetIn {
                rules: vec![
                    serde_json::from_str(r#"{"id":"ssh","protocol":"tcp","from_port":22,"to_port":22}"#)
                        .unwrap(),
                ],
                cluster: Some("c-1".to_owned()),
                peers: 3,
                control_plane: vec!["192.0.2.0/24".parse().unwrap()],
                keys: 2,
            }),
            deliveries: Some(Deliveries {
                last_success: Some(at("2026-11-24T11:50:00Z")),
                last_error: Some("can't connect".to_owned()),
                queued: 2,
                oldest: Some(at("2026-11-24T11:56:55Z")),
            }),
        }
    }

    fn plain(text: &str) -> String {
        anstream::adapter::strip_str(text).to_string()
    }

    #[test]
    fn an_incident_is_told_from_its_top() {
        let situation = incident();
        let text = plain(&situation_text(&situation, at("2026-11-24T12:00:00Z"), 72));
        let expected = "\
NOT READY  since 2026-11-24T11:56:55Z, 3m 5s ago: sshd.running
  instance  i-0a1, generation 3
  agent     portcullis 0.1.0, first report 2026-11-24T09:00:00Z, 3h 0m
            ago
  on trial  until 2026-11-24T12:00:50Z, in 50s; then generation 2 holds
            again. To keep it: portcullis confirm 3
  lets in   rule ssh: 22/tcp from anywhere
            cluster c-1: its 3 other members, on every port
            control plane: the HTTPS endpoint, from 192.0.2.0/24
  keys      2 in the spec
  reports   the last was taken 2026-11-24T11:50:00Z, 10m 0s ago; 2 wait,
            since 2026-11-24T11:56:55Z, 3m 5s ago; the last try failed:
            can't connect

FAIL     sshd.running (BREV-SSH-1): ssh.service is inactive (dead) and
         nothing else that is known here would serve a login
         since 2026-11-24T11:56:55Z, 3m 5s ago
         to do: systemctl start ssh

WARN     sshd.password (BREV-SSH-2): sshd offers passwords
         since 2026-11-24T09:00:00Z, 3h 0m ago, or longer: that was the
         first report
         the instance may be ready all the same
         to do: PasswordAuthentication no

Not known (1)
  storage.encrypted  not examined

Passing (1)
  systemd.running  systemd is running";
        assert_eq!(text, expected);
    }

    #[test]
    fn no_line_is_wider_than_the_page_and_none_is_cut_without_one() {
        let situation = incident();
        let now = at("2026-11-24T12:00:00Z");
        for width in [50, 80] {
            let text = plain(&situation_text(&situation, now, width));
            let widest = text.lines().map(|line| line.chars().count()).max().unwrap();
            assert!(widest <= width, "{widest} {text}");
        }
        let text = plain(&situation_text(&situation, now, usize::MAX));
        assert!(text.contains("inactive (dead) and nothing else that is known here would serve a login\n"));
    }

    #[test]
    fn a_report_without_a_past_says_nothing_of_it() {
        let mut report = incident().report;
        let text = plain(&report_text(&report, report.time, 80));
        assert!(text.starts_with("NOT READY  sshd.running\n"), "{text}");
        assert!(!text.contains("since"), "{text}");
        report.ready = true;
        report.generation = None;
        report.refused_spec = Some("version: 2 is not known\ninstance: missing".to_owned());
        let text = plain(&report_text(&report, report.time, 80));
        assert!(
            text.starts_with("READY\n  instance  no spec is accepted yet\n"),
            "{text}"
        );
        assert!(
            text.contains("A spec was refused, nothing of it is used:\n  version: 2"),
            "{text}"
        );
    }

    #[test]
    fn what_others_wrote_is_no_command_and_no_line() {
        let mut situation = incident();
        situation.report.checks[1].summary = "x\u{1b}[2J\nPassing (9)".to_owned();
        let text = situation_text(&situation, at("2026-11-24T12:00:00Z"), 80);
        assert!(text.contains("x [2J Passing (9)"), "{text:?}");
    }

    #[test]
    fn ages_have_two_units() {
        let of = |seconds| age(SignedDuration::from_secs(seconds));
        assert_eq!(
            [-5, 59, 60, 3_725, 90_000].map(of),
            ["0s", "59s", "1m 0s", "1h 2m", "1d 1h"].map(str::to_owned)
        );
    }
}
