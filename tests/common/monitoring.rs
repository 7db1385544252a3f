//! What `packaging/monitoring` asks of Prometheus: the expressions of its dashboard and of its alerts.
//!
//! May not live here: guarantees.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::Value;

/// One of the shipped files.
pub fn file(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("packaging/monitoring");
    folder.join(name)
}

/// Its text.
pub fn text(name: &str) -> String {
    std::fs::read_to_string(file(name)).unwrap()
}

/// The dashboard's panels, rows left out.
pub fn panels() -> Vec<Value> {
    let dashboard: Value = serde_json::from_str(&text("dashboard.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().clone();
    let panels: Vec<Value> = panels
        .into_iter()
        .filter(|panel| panel["type"] != "row")
        .collect();
    assert!(panels.len() > 20, "{}", panels.len());
    panels
}

/// The dashboard's expressions with a value for each variable of Grafana's, and the title of their panel.
pub fn dashboard_expressions() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for panel in panels() {
        let title = panel["title"].as_str().unwrap().to_owned();
        for target in panel["targets"].as_array().unwrap() {
            let expression = target["expr"].as_str().unwrap();
            let expression = expression
                .replace("$job", ".*")
                .replace("$instance", ".*")
                .replace("$__rate_interval", "1m")
                .replace("$__range", "1h");
            assert!(!expression.contains('$'), "{title}: {expression}");
            found.push((title.clone(), expression));
        }
    }
    found
}

/// The alerts: name, expression, and all that is said of each.
pub fn alerts() -> Vec<(String, String, String)> {
    let text = text("alerts.yml");
    let blocks = text.split("- alert: ").skip(1);
    let alerts = blocks.map(|block| {
        let name = block.lines().next().unwrap().trim().to_owned();
        let line = block.lines().find_map(|line| line.trim().strip_prefix("expr: "));
        let expression = line.unwrap().to_owned();
        assert!(!expression.starts_with('>'), "{name}: one line, please");
        (name, expression, block.to_owned())
    });
    alerts.collect()
}

/// The metrics that an expression names.
pub fn names(expression: &str) -> BTreeSet<String> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let words = expression.split(|c| !is_word(c));
    let metrics = words.filter(|word| word.starts_with("portcullis_") || word.starts_with("process_"));
    metrics.map(str::to_owned).collect()
}
