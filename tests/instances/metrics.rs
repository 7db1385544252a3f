//! `/metrics` of an instance: a real Prometheus scrapes it by mutual TLS and sees what happens to it, and
//! others' parsers read it.
//!
//! May not live here: what is counted without an instance (unit tests), the shipped files' own form
//! (`tests/monitoring.rs`).

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use portcullis_protocol::CheckId;
use portcullis_provision::local::{AGENT_PORT, in_namespace};
use serde_json::{Value, json};

use crate::api::{Api, rule};
use crate::common::monitoring::{alerts, dashboard_expressions, file, names, text};
use crate::endpoint::{curl, files};
use crate::lab::{Lab, Machine, Run, eventually, host};

/// Several scrapes, on a loaded machine.
const SEEN_TIME: Duration = Duration::from_secs(60);
/// What `/metrics` says that it is, in each of its forms.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Prometheus where the control plane is, until dropped.
struct Prometheus<'a> {
    lab: &'a Lab,
    process: Child,
}

impl<'a> Prometheus<'a> {
    /// Scrapes an instance by the shipped configuration, but more often.
    fn start(lab: &'a Lab, machine: &Machine) -> Self {
        files(lab, "client", &lab.provider.client_certificate().unwrap());
        let own = machine.ok("cat /var/lib/portcullis/tls.crt");
        std::fs::write(lab.path("instances.pem"), own).unwrap();
        let mut configuration = text("prometheus.yml");
        let target = format!("'{}:{AGENT_PORT}'", machine.v4());
        for (example, ours) in [
            ("_interval: 30s", "_interval: 2s"),
            ("alerts.yml", file("alerts.yml").to_str().unwrap()),
            ("'192.0.2.10:7443', '[2001:db8::10]:7443'", &target),
            ("/etc/prometheus/portcullis", lab.path("").to_str().unwrap()),
        ] {
            assert!(configuration.contains(example), "{example}: {configuration}");
            configuration = configuration.replace(example, ours);
        }
        let config_file = lab.path("prometheus.yml");
        std::fs::write(&config_file, configuration).unwrap();
        let log = std::fs::File::create(lab.path("prometheus.log")).unwrap();
        let process = Command::new("nsenter")
            .arg(format!("--net={}", lab.provider.network().path().display()))
            .args(["--", "prometheus", "--web.listen-address=127.0.0.1:9090"])
            .arg(format!("--config.file={}", config_file.display()))
            .arg(format!("--storage.tsdb.path={}", lab.path("tsdb").display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { lab, process }
    }

    /// Asks its API.
    fn get(&self, path: &str, query: &str) -> Result<Value, String> {
        let output = self
            .lab
            .beside("curl")
            .args(["-sSG", "--max-time", "8", "--data-urlencode"])
            .arg(format!("query={query}"))
            .arg(format!("http://127.0.0.1:9090/api/v1/{path}"))
            .output_text();
        let answer: Value = serde_json::from_str(&output.stdout).map_err(|_| {
            let log = std::fs::read_to_string(self.lab.path("prometheus.log")).unwrap_or_default();
            format!("{output:?}\n{log}")
        })?;
        match answer["status"] == "success" {
            true => Ok(answer["data"].clone()),
            false => Err(answer.to_string()),
        }
    }

    /// The values of an expression, now.
    fn values(&self, expression: &str) -> Result<Vec<f64>, String> {
        let data = self.get("query", expression)?;
        let samples = data["result"].as_array().ok_or("no result")?;
        let values = samples.iter().map(|sample| {
            let text = sample["value"][1].as_str().ok_or("no value")?;
            text.parse().map_err(|e| format!("{text}: {e}"))
        });
        values.collect()
    }

    /// Waits until an expression has one value, and that is as wanted.
    #[track_caller]
    fn until(&self, expression: &str, wanted: impl Fn(f64) -> bool) -> f64 {
        eventually(SEEN_TIME, expression, || {
            match self.values(expression).as_deref() {
                Ok([value]) if wanted(*value) => Ok(*value),
                // Why a scrape fails is said with its target.
                other => Err(format!("{other:?} {:?}", self.get("targets", ""))),
            }
        })
    }
}

impl Drop for Prometheus<'_> {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn prometheus_sees_what_happens_to_an_instance() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    // As on a kernel without owner and persist: others can flush the table.
    machine.set("firewall", "exclusive_table = false");
    machine.until_ready();
    let prometheus = Prometheus::start(&lab, &machine);
    prometheus.until("up", |up| up == 1.0);
    prometheus.until("portcullis_ready", |ready| ready == 1.0);
    let generation = machine.status().generation.unwrap() as f64;
    prometheus.until("portcullis_spec_generation", |seen| seen == generation);
    prometheus.until("count(portcullis_check_status)", |n| {
        n == 4.0 * CheckId::ALL.len() as f64
    });
    prometheus.until("sum(portcullis_check_status)", |n| n == CheckId::ALL.len() as f64);
    // In the year 4096.
    let ends = "portcullis_tls_certificate_expiry_timestamp_seconds{certificate=\"instance\"}";
    prometheus.until(ends, |end| end == 67_090_118_400.0);
    let version = format!(
        "portcullis_build_info{{version=\"{}\"}}",
        env!("CARGO_PKG_VERSION")
    );
    prometheus.until(&version, |one| one == 1.0);
    prometheus.until("process_resident_memory_bytes", |bytes| {
        (1e6..2e8).contains(&bytes)
    });

    denied_packets_are_counted_by_reason(&lab, &machine, &prometheus);

    drift_is_counted_and_told(&machine, &prometheus);

    // What is there only at times: a trial, and a report that nobody takes.
    let spec = machine.next(|spec| {
        let control_plane = spec.control_plane.as_mut().unwrap();
        control_plane.report_url = Some("https://10.77.0.1:9/v1/report".parse().unwrap());
    });
    let applied = machine.run_with("portcullis apply --spec - --confirm 600s", &spec.to_json());
    assert!(applied.success(), "{applied:?}");
    machine.spec = spec;
    prometheus.until("portcullis_spec_trial_end_timestamp_seconds - time()", |s| {
        (0.0..=600.0).contains(&s)
    });
    prometheus.until("time() - portcullis_report_queue_oldest_timestamp_seconds", |s| {
        s < 600.0
    });

    let cost = [
        "avg_over_time(scrape_duration_seconds[1m])",
        "scrape_samples_scraped",
    ];
    println!(
        "a scrape: {:?}",
        cost.map(|expression| prometheus.values(expression))
    );
    each_panel_shows_something(&prometheus);
    alerts_name_what_is_there(&prometheus);

    machine.ok("systemctl stop ssh");
    prometheus.until("portcullis_ready", |ready| ready == 0.0);
    prometheus.until(
        "portcullis_check_status{check=\"sshd.running\",status=\"fail\"}",
        |n| n == 1.0,
    );
}

fn denied_packets_are_counted_by_reason(lab: &Lab, machine: &Machine, prometheus: &Prometheus<'_>) {
    let denied = |reason: &str| format!("portcullis_packets_denied_total{{reason=\"{reason}\"}}");
    let before = ["udp", "other"].map(|reason| prometheus.until(&denied(reason), |_| true));
    let (stranger, to) = (lab.stranger(), machine.v4());
    in_namespace(&stranger.path(), || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        for _ in 0..7 {
            socket.send_to(b"knock", (to, 4999)).unwrap();
        }
    })
    .unwrap();
    prometheus.until(&denied("udp"), |n| n >= before[0] + 7.0);
    prometheus.until(&denied("other"), |n| n == before[1]);
    prometheus.until("portcullis_denied_bytes_total{reason=\"udp\"}", |n| {
        n >= 7.0 * 33.0
    });
}

/// And the alert fires.
fn drift_is_counted_and_told(machine: &Machine, prometheus: &Prometheus<'_>) {
    prometheus.until("portcullis_gate_repairs_total", |n| n == 0.0);
    machine.ok("nft flush ruleset");
    prometheus.until("portcullis_gate_repairs_total", |n| n >= 1.0);
    prometheus.until(
        "ALERTS{alertname=\"PortcullisGateRepaired\",alertstate=\"firing\"}",
        |n| n == 1.0,
    );
}

/// What is asked is there, and joins find their other side.
fn each_panel_shows_something(prometheus: &Prometheus<'_>) {
    for (title, expression) in dashboard_expressions() {
        eventually(SEEN_TIME, &format!("{title}: {expression}"), || {
            let values = prometheus.values(&expression)?;
            // On a good day there is nothing there.
            match values.is_empty() && title != "What is wrong" {
                true => Err("nothing".to_owned()),
                false => Ok(()),
            }
        });
    }
}

fn alerts_name_what_is_there(prometheus: &Prometheus<'_>) {
    let there = prometheus.get("label/__name__/values", "").unwrap();
    let there: BTreeSet<String> = serde_json::from_value(there).unwrap();
    for (alert, expression, block) in alerts() {
        let named = names(&expression);
        assert!(!named.is_empty() || expression.starts_with("up{"), "{alert}");
        // Texts ask too.
        let missing: Vec<String> = named
            .union(&names(&block))
            .filter(|name| !there.contains(*name))
            .cloned()
            .collect();
        assert!(missing.is_empty(), "{alert}: {missing:?}");
    }
    let rules = prometheus.get("rules", "").unwrap();
    let rules = rules["groups"][0]["rules"].as_array().unwrap();
    assert_eq!(rules.len(), alerts().len());
    assert!(rules.iter().all(|rule| rule["health"] == "ok"), "{rules:#?}");
}

/// A program reads a text and has nothing to say against it.
fn takes(program: &mut Command, text: &str, file: &std::path::Path) -> Result<String, String> {
    std::fs::write(file, text).unwrap();
    let input = std::fs::File::open(file).unwrap();
    let output = program.stdin(input).output().unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    match output.status.success() {
        true => Ok(said.concat()),
        false => Err(said.concat()),
    }
}

/// The reference parser of OpenMetrics, which tells the families' names.
const REFERENCE_PARSER: &str = "
import sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families
for family in text_string_to_metric_families(sys.stdin.read()):
    assert family.documentation, family.name
    print(family.name, family.type, family.unit or '-')
";

#[test]
fn the_text_is_good_in_both_formats_and_only_for_the_control_plane() {
    let lab = Lab::new();
    let machine = lab.launch();
    let api = Api::new(&lab, &machine);
    let get = |accept: &str| {
        let header = format!("accept: {accept}");
        api.with(&["-H", &header], "GET", "/metrics", b"")
    };
    let beside = lab.provider.network().path();
    api.refused(
        || curl(&beside, &machine, "/metrics", &[]).unwrap(),
        403,
        "a client certificate of the control plane",
    );

    // What strangers ask for makes no labels; what is refused is counted.
    for path in ["/nothing", "/metrics/x", "/v1/keys/a%20b"] {
        curl(&beside, &machine, path, &["-X", "BREW"]).unwrap();
    }
    api.done("POST", "/v1/firewall/rules", &rule("web", 9000));
    assert_eq!(
        api.ask("DELETE", "/v1/firewall/rules/none", &Value::Null).status,
        404
    );
    assert_eq!(
        api.ask("PUT", "/v1/cluster/peers/i-9", &json!({"addresses": ["x"]}))
            .status,
        422
    );

    let open = get("application/openmetrics-text; version=1.0.0");
    assert_eq!((open.status, open.kind.as_str()), (200, OPEN_METRICS));
    let python = || {
        // The system's: its package brings the parser.
        let mut python = host("/usr/bin/python3");
        python.args(["-c", REFERENCE_PARSER]);
        python
    };
    let families = takes(&mut python(), &open.body, &lab.path("text")).unwrap();
    for family in [
        "portcullis_build info -",
        "portcullis_gate_repairs counter -",
        "portcullis_reconcile_duration_seconds histogram seconds",
        "portcullis_denied_bytes counter bytes",
        "process_cpu_seconds counter seconds",
    ] {
        assert!(
            families.lines().any(|line| line == family),
            "{family}: {families}"
        );
    }
    let cut = open.body.replace("# EOF\n", "");
    takes(&mut python(), &cut, &lab.path("text")).unwrap_err();

    let plain = get("text/plain;version=0.0.4");
    assert_eq!((plain.status, plain.kind.as_str()), (200, PROMETHEUS));
    let promtool = || {
        let mut promtool = host("promtool");
        promtool.args(["check", "metrics"]);
        promtool
    };
    let said = takes(&mut promtool(), &plain.body, &lab.path("text")).unwrap();
    assert_eq!(said, "", "promtool has something to say");
    let unloved = plain
        .body
        .replace("portcullis_gate_repairs_total", "portcullis_gate_repairs");
    takes(&mut promtool(), &unloved, &lab.path("text")).unwrap_err();

    for line in [
        "portcullis_http_requests_total{method=\"other\",route=\"other\",code=\"4xx\"} 2",
        "portcullis_http_requests_total{method=\"other\",route=\"/v1/keys/{fingerprint}\",code=\"4xx\"} 1",
        "portcullis_http_requests_total{method=\"GET\",route=\"/metrics\",code=\"4xx\"} 1",
        "portcullis_http_requests_total{method=\"POST\",route=\"/v1/firewall/rules\",code=\"2xx\"} 1",
        "portcullis_agent_requests_total{request=\"add-rule\",caller=\"remote\"} 1",
        "portcullis_agent_requests_total{request=\"revoke-rule\",caller=\"remote\"} 1",
        "portcullis_agent_refusals_total{reason=\"not-found\"} 1",
    ] {
        assert!(plain.body.lines().any(|l| l == line), "{line}: {}", plain.body);
    }
    for chosen in ["nothing", "BREW", "a b", "a%20b"] {
        assert!(!plain.body.contains(chosen), "{chosen}");
    }
    println!(
        "{} bytes, {} samples",
        open.body.len(),
        open.body.lines().filter(|l| !l.starts_with('#')).count()
    );
}
