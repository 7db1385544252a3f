//! `portcullis firewall exposure`: what listens, who gets at it, and by which rule.
//!
//! It looks by itself, as `check` and `explain` do: what it says is the kernel's word of this moment, with or
//! without the daemon, and root at a terminal may know which program it is.
//! May not live here: judging (`policy::exposure`).

use std::sync::Arc;

use anstyle::{AnsiColor, Style};
use jiff::Timestamp;
use portcullis_protocol::{Check, CheckId};
use serde_json::json;

use super::report::{Page, coloured, wrapped};
use super::{Failure, Format, Global, print, print_json, require_root, runtime, screen};
use crate::agent::state::Store;
use crate::agent::{exposure, gate, neighbours};
use crate::policy::exposure::{Exposure, Grant, Listener, Reach, Unserved, Who};
use crate::policy::observation::{Observations, Observed};
use crate::policy::readiness::checks;
use crate::policy::ruleset::Family;

/// Columns before a port, and of it: `65535/tcp` and a gap.
const INDENT: usize = 2;
const PORT: usize = 11;
/// At most so many columns for what listens.
const WHAT: usize = 32;

/// What is said of each kind, in order.
const SECTIONS: [(Reach, &str); 8] = [
    (Reach::Anybody, "Open to anybody"),
    (Reach::Unknown, "Not known: a rule of somebody else decides"),
    (Reach::Named, "Open to named sources"),
    (Reach::Peers, "Open to the cluster's peers alone"),
    (Reach::Base, "Open as far as every host needs it"),
    (Reach::Containers, "For this host's containers alone"),
    (Reach::Nobody, "Shut: it listens, and the gate lets nobody in"),
    (Reach::Loopback, "On loopback: for this host alone"),
];

pub fn run(global: &Global) -> Result<(), Failure> {
    require_root("looking at what listens")?;
    let settings = global.settings()?;
    let spec = Store::new(&settings.state_dir).spec().ok().flatten();
    let seen: Observed<Exposure> = runtime()?.block_on(async {
        let gate = Arc::new(gate::observe(&settings, spec.as_ref()));
        // Beside what is held, not what is planned: nobody has to have planned anything.
        let held = gate.held.as_ref().ok().cloned().flatten().unwrap_or_default();
        let others = neighbours::look(&held, &settings.links).await;
        exposure::look(&gate, &others, &settings.links, true).await
    });
    let observations = Observations {
        exposure: seen.clone(),
        ..Observations::unseen("not asked for")
    };
    let all = checks(spec.as_ref(), &observations, &[], Timestamp::now());
    let check = all
        .into_iter()
        .find(|check| check.id == CheckId::ExposureListeners);
    let (exposure, check) = match (seen, check) {
        (Ok(exposure), Some(check)) => (exposure, check),
        (Err(reason), _) => return Err(Failure::Failed(reason)),
        (Ok(_), None) => return Err(Failure::Failed("there is no such check".to_owned())),
    };
    match global.format {
        Format::Json => print_json(&json!({
            "status": check.status,
            "summary": check.summary,
            "remedy": check.remedy,
            "exposure": exposure,
        })),
        Format::Table => print(&text(&exposure, &check, screen::width())),
    }
}

fn text(exposure: &Exposure, check: &Check, width: usize) -> String {
    let mut page = Page::new(Timestamp::UNIX_EPOCH, width);
    let word = check.status.to_string().to_uppercase();
    page.headline(&word, check.status, &check.summary);
    if let Some(remedy) = &check.remedy {
        page.fact("to do", remedy);
    }
    let longest = exposure
        .listeners
        .iter()
        .map(|one| what(one).chars().count())
        .max();
    let columns = Columns {
        what: longest.unwrap_or_default().min(WHAT),
        width,
    };
    let mut lines = vec![page.end()];
    for (reach, title) in SECTIONS {
        let here: Vec<&Listener> = exposure
            .listeners
            .iter()
            .filter(|one| one.reach == reach)
            .collect();
        if here.is_empty() {
            continue;
        }
        lines.push(heading(title, reach));
        for listener in here {
            lines.extend(columns.row(&port(listener), &what(listener), &details(listener)));
        }
    }
    if !exposure.unserved.is_empty() {
        lines.push(heading("Open, and nobody listens", Reach::Base));
        for unserved in &exposure.unserved {
            lines.extend(columns.unserved(unserved));
        }
    }
    let notes = notes(exposure);
    if !notes.is_empty() {
        lines.push(String::new());
    }
    for note in notes {
        lines.extend(wrapped(&note, width));
    }
    lines.join("\n")
}

/// What is true of all, or was not looked at.
fn notes(exposure: &Exposure) -> Vec<String> {
    let mut notes = Vec::new();
    let all = || exposure.listeners.iter().flat_map(|listener| &listener.by);
    let peers = all().filter_map(|grant| match grant.who {
        Who::Peers { addresses } => Some(addresses),
        _ => None,
    });
    if let Some(addresses) = peers.max() {
        notes.push(format!(
            "The cluster's peers ({addresses} addresses) reach all of it but what is on loopback."
        ));
    }
    if !exposure.internal_interfaces.is_empty() {
        let names: Vec<String> = exposure
            .internal_interfaces
            .iter()
            .map(|name| plain(name))
            .collect();
        notes.push(format!(
            "What comes by {} (this host's containers) is not filtered: it reaches all of it too.",
            names.join(", ")
        ));
    }
    if exposure.clients > 0 {
        notes.push(format!(
            "Not shown: UDP sockets with a port that nobody chose, as clients have them ({}); no rule opens them.",
            exposure.clients
        ));
    }
    notes.extend(
        exposure
            .not_looked_into
            .iter()
            .map(|why| plain(&format!("Not looked into: {why}"))),
    );
    notes
}

fn heading(title: &str, reach: Reach) -> String {
    let colour = match reach {
        Reach::Anybody => Some(AnsiColor::Yellow),
        Reach::Unknown => Some(AnsiColor::Red),
        _ => None,
    };
    let style = Style::new().bold().fg_color(colour.map(Into::into));
    format!("\n{}", coloured(title, style))
}

fn port(listener: &Listener) -> String {
    format!("{}/{}", listener.port, listener.protocol)
}

/// The program and its unit, or where the port leads to.
fn what(listener: &Listener) -> String {
    let program = listener.program.as_ref().map(|program| plain(program.short()));
    let unit = listener.unit.as_deref().map(plain);
    match (program, unit) {
        (Some(program), Some(unit)) if unit.split('.').next() == Some(&program) => unit,
        (Some(program), Some(unit)) => format!("{program} ({unit})"),
        (Some(one), None) | (None, Some(one)) => one,
        (None, None) if !listener.published_to.is_empty() => "a container, or a redirect".to_owned(),
        (None, None) => format!("a process of uid {}", listener.uid.unwrap_or_default()),
    }
}

/// A line each: who, by which rule; where it leads, where it is bound, what it says of it.
fn details(listener: &Listener) -> Vec<(String, Option<Style>)> {
    let mut lines: Vec<(String, Option<Style>)> = Vec::new();
    for grant in listener.by.iter().filter(|grant| !is_of_peers(grant)) {
        lines.push((plain(&by(grant, listener)), None));
        if let Some(other) = &grant.dropped_by {
            lines.push((plain(&format!("but {other}: see firewall.conflicts")), None));
        }
    }
    let to: Vec<&str> = listener.published_to.iter().map(String::as_str).collect();
    if !to.is_empty() {
        lines.push((plain(&format!("leads to {}", to.join(", "))), None));
    }
    if let Some(bound) = bound(listener) {
        lines.push((plain(&bound), None));
    }
    if let Some(cleartext) = listener.cleartext.filter(|_| listener.is_reachable()) {
        let colour = (listener.reach == Reach::Anybody).then(|| AnsiColor::Yellow.into());
        lines.push((cleartext.words(), Some(Style::new().fg_color(colour))));
    }
    lines
}

/// Peers get at everything: that is said once, for all.
fn is_of_peers(grant: &Grant) -> bool {
    matches!(grant.who, Who::Peers { .. })
}

fn by(grant: &Grant, listener: &Listener) -> String {
    let who = grant.who.to_string();
    let mut text = match grant.rule.as_str() {
        "" => who,
        rule if who == "anybody" => rule.to_owned(),
        // Says what it is for already.
        rule if rule.starts_with("base ") => who,
        rule => format!("{rule}: {who}"),
    };
    let every = listener
        .by
        .iter()
        .flat_map(|one| &one.families)
        .collect::<std::collections::BTreeSet<_>>();
    if let (Some(only), true) = (grant.families.first(), grant.families.len() < every.len()) {
        text += &format!(" ({} only)", version(*only));
    }
    text
}

fn version(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "IPv4",
        Family::Ipv6 => "IPv6",
    }
}

/// Where it is bound, unless that is every address of both versions.
fn bound(listener: &Listener) -> Option<String> {
    let on: Vec<&str> = listener.listens_on.iter().map(String::as_str).collect();
    match on.as_slice() {
        [] | ["*"] | ["0.0.0.0", "[::]"] => None,
        ["0.0.0.0"] => Some("on every IPv4 address".to_owned()),
        ["[::]"] => Some("on every IPv6 address".to_owned()),
        all => Some(format!("on {}", all.join(", "))),
    }
}

/// What others named may not command the terminal, nor look like lines of ours: whatever is not plain ASCII
/// is written out.
fn plain(text: &str) -> String {
    let shown = |c: char| -> String {
        if c == ' ' || c.is_ascii_graphic() {
            c.to_string()
        } else {
            c.escape_default().to_string()
        }
    };
    text.chars().map(shown).collect()
}

struct Columns {
    what: usize,
    width: usize,
}

impl Columns {
    fn row(&self, port: &str, what: &str, details: &[(String, Option<Style>)]) -> Vec<String> {
        let column = INDENT + PORT + self.what + 2;
        let room = self.width.saturating_sub(column).max(20);
        let mut right = Vec::new();
        for (text, style) in details {
            for line in wrapped(text, room) {
                right.push(style.map_or_else(|| line.clone(), |style| coloured(&line, style)));
            }
        }
        let left = format!("{:INDENT$}{port:<PORT$}{:<2$}", "", self.fitted(what), self.what);
        let count = right.len().max(1);
        let mut right = right.into_iter();
        (0..count)
            .map(|at| {
                let start = if at == 0 { left.as_str() } else { "" };
                let rest = right.next().unwrap_or_default();
                format!("{start:<width$}  {rest}", width = column - 2)
                    .trim_end()
                    .to_owned()
            })
            .collect()
    }

    fn unserved(&self, unserved: &Unserved) -> Vec<String> {
        let who: Vec<String> = unserved.who.iter().map(ToString::to_string).collect();
        let (ports, indent) = (unserved.ports.join(", "), INDENT + PORT);
        let words = plain(&format!("{}: {ports}, for {}", unserved.rule, who.join(", ")));
        let room = self.width.saturating_sub(indent).max(20);
        let start = |at: usize| if at == 0 { INDENT } else { indent };
        let lines = wrapped(&words, room).into_iter().enumerate();
        lines
            .map(|(at, line)| format!("{:1$}{line}", "", start(at)))
            .collect()
    }

    /// All of it is in the JSON.
    fn fitted(&self, what: &str) -> String {
        if what.chars().count() <= self.what {
            return what.to_owned();
        }
        let start: String = what.chars().take(self.what.saturating_sub(1)).collect();
        format!("{start}…")
    }
}

#[cfg(test)]
mod tests;
