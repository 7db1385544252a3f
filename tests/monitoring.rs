//! The shipped alerts, dashboard and scrape configuration, as Prometheus' own tools read them.
//!
//! May not live here: what an instance answers (`instances/metrics.rs`).
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeSet;
use std::process::Command;

use common::monitoring::{alerts, dashboard_expressions, file, names, panels, text};
use serde_json::{Value, json};

/// Runs promtool on a file.
fn promtool(arguments: &[&str], file: &std::path::Path) -> Result<String, String> {
    let output = Command::new("promtool").args(arguments).arg(file).output();
    let output = output.expect("promtool is there (packaging/setup)");
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    match output.status.success() {
        true => Ok(said.concat()),
        false => Err(said.concat()),
    }
}

#[test]
fn alerts_fire_when_they_should_and_only_then() {
    promtool(&["check", "rules"], &file("alerts.yml")).unwrap();
    promtool(&["test", "rules"], &file("alerts_test.yml")).unwrap();
    // The same tests fail with other limits.
    let folder = tempfile::tempdir().unwrap();
    let rules = text("alerts.yml").replace("> 1000", "> 1000000");
    std::fs::write(folder.path().join("alerts.yml"), rules).unwrap();
    let tests = folder.path().join("alerts_test.yml");
    std::fs::write(&tests, text("alerts_test.yml")).unwrap();
    let said = promtool(&["test", "rules"], &tests).unwrap_err();
    assert!(said.contains("PortcullisDeniedFlood"), "{said}");
}

#[test]
fn each_alert_is_tried_and_says_what_to_do() {
    let (tests, log) = (text("alerts_test.yml"), include_str!("../src/log.rs"));
    let alerts = alerts();
    assert!(alerts.len() >= 15, "{}", alerts.len());
    for (name, _, block) in &alerts {
        let fires = format!("alertname=\"{name}\",alertstate=\"firing\"");
        assert!(tests.contains(&fires), "{name} is not tried");
        for field in ["severity: ", "summary: ", "description: ", "runbook: "] {
            assert!(block.contains(field), "{name} has no {field}");
        }
        for id in block.split("MESSAGE_ID=").skip(1) {
            let id: String = id.chars().take_while(char::is_ascii_hexdigit).collect();
            assert!(log.contains(&format!("\"{id}\"")), "{name} names {id}");
        }
    }
}

#[test]
fn prometheus_takes_the_scrape_configuration() {
    promtool(&["check", "config", "--syntax-only"], &file("prometheus.yml")).unwrap();
    // One that it does not take.
    let folder = tempfile::tempdir().unwrap();
    let wrong = folder.path().join("prometheus.yml");
    std::fs::write(
        &wrong,
        text("prometheus.yml").replace("cert_file:", "certificate:"),
    )
    .unwrap();
    promtool(&["check", "config", "--syntax-only"], &wrong).unwrap_err();
}

#[test]
fn prometheus_takes_the_dashboards_expressions() {
    let check = |expressions: &[String]| {
        let rules = expressions
            .iter()
            .enumerate()
            .map(|(number, expression)| json!({"record": format!("panel:{number}"), "expr": expression}));
        let rules: Vec<Value> = rules.collect();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("rules.yml");
        // JSON is YAML.
        std::fs::write(
            &file,
            json!({"groups": [{"name": "a", "rules": rules}]}).to_string(),
        )
        .unwrap();
        promtool(&["check", "rules"], &file)
    };
    let all: Vec<String> = dashboard_expressions().into_iter().map(|(_, e)| e).collect();
    check(&all).unwrap();
    check(&["sum(portcullis_ready".to_owned()]).unwrap_err();
}

#[test]
fn the_dashboards_panels_ask_whichever_source_is_chosen_and_do_not_overlap() {
    let mut taken = BTreeSet::new();
    let mut ids = BTreeSet::new();
    let source = json!({"type": "prometheus", "uid": "${datasource}"});
    for panel in panels() {
        let title = &panel["title"];
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}");
        assert_eq!(panel["datasource"], source, "{title}");
        for target in panel["targets"].as_array().unwrap() {
            assert_eq!(target["datasource"], source, "{title}");
            assert!(
                !names(target["expr"].as_str().unwrap()).is_empty()
                    || target["expr"].as_str().unwrap().contains("up{")
            );
        }
        let place = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        assert!(place("x") + place("w") <= 24, "{title}");
        for x in place("x")..place("x") + place("w") {
            for y in place("y")..place("y") + place("h") {
                assert!(taken.insert((x, y)), "{title} overlaps another panel");
            }
        }
    }
    let dashboard: Value = serde_json::from_str(&text("dashboard.json")).unwrap();
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let variables: Vec<&str> = variables.iter().map(|v| v["name"].as_str().unwrap()).collect();
    assert_eq!(variables, ["datasource", "job", "instance"]);
}
