//! `/metrics`: what the agent has counted, with what the endpoint has, as the caller reads it.
//!
//! Strangers can make counters go up and no more: labels are routes that exist, methods that are known, and
//! classes of statuses.
//! May not live here: what the agent counts (`agent::metrics`).

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use portcullis_protocol::control::{Answer, Request as Ask};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::extract::ControlPlane;
use super::limits::TurnedAway;
use super::problem::Problem;
use super::server::{Shared, ask, unexpected};

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: &'static str,
    route: String,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    kind: &'static str,
}

/// Counters by result, each there from the start: a curve that begins at its first event does not show it.
type Results = Family<ResultLabels, Counter>;

fn results(all: [&'static str; 3]) -> Results {
    let family = Results::default();
    for result in all {
        drop(family.get_or_create(&ResultLabels { result }));
    }
    family
}

/// What the endpoint counts. A clone counts for the same.
#[derive(Clone)]
pub struct Counts {
    requests: Family<RequestLabels, Counter>,
    handshakes: Results,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            handshakes: results(["done", "failed", "timeout"]),
        }
    }
}

impl Counts {
    /// Counts the end of a TLS handshake.
    pub(super) fn handshake<T, E, L>(&self, handshake: &Result<Result<T, E>, L>) {
        let result = match handshake {
            Ok(Ok(_)) => "done",
            Ok(Err(_)) => "failed",
            Err(_) => "timeout",
        };
        self.handshakes.get_or_create(&ResultLabels { result }).inc();
    }

    fn answered(&self, method: &'static str, route: String, status: StatusCode) {
        let code = match status.as_u16() / 100 {
            2 => "2xx",
            3 => "3xx",
            4 => "4xx",
            5 => "5xx",
            _ => "other",
        };
        self.requests
            .get_or_create(&RequestLabels { method, route, code })
            .inc();
    }

    fn registry(&self, turned_away: TurnedAway) -> Registry {
        let mut registry = Registry::default();
        registry.register(
            "portcullis_http_requests",
            "Requests to the HTTPS endpoint, by route and class of status",
            self.requests.clone(),
        );
        registry.register(
            "portcullis_tls_handshakes",
            "TLS handshakes with callers of the endpoint",
            self.handshakes.clone(),
        );
        let TurnedAway {
            connections,
            evicted,
            requests,
        } = turned_away;
        let kinds = Family::<KindLabels, Counter>::default();
        for (kind, count) in [
            ("connection", connections),
            ("evicted", evicted),
            ("request", requests),
        ] {
            kinds.get_or_create(&KindLabels { kind }).inc_by(count);
        }
        registry.register(
            "portcullis_http_turned_away",
            "New connections, connections that made room for others, and requests that were too many",
            kinds,
        );
        registry
    }
}

/// Counts a request and its answer.
pub(super) async fn count(State(counts): State<Counts>, request: Request, next: Next) -> Response {
    let method = match *request.method() {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::PUT => "PUT",
        Method::POST => "POST",
        Method::DELETE => "DELETE",
        _ => "other",
    };
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or("other", MatchedPath::as_str).to_owned();
    let response = next.run(request).await;
    counts.answered(method, route, response.status());
    response
}

pub(super) async fn metrics(
    caller: ControlPlane,
    State(shared): State<Shared>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let Answer::Metrics { mut text } = ask(&shared, &caller.0, Ask::Metrics).await? else {
        return Err(unexpected());
    };
    encode(&mut text, &shared.counts.registry(shared.limits.turned_away())).map_err(|_| unexpected())?;
    let accept = headers.get_all(header::ACCEPT).iter();
    let accept: Vec<&str> = accept.filter_map(|value| value.to_str().ok()).collect();
    let (kind, text) = match takes_open_metrics(&accept.join(",")) {
        true => (OPEN_METRICS, text),
        false => (PROMETHEUS, as_prometheus(&text)),
    };
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

/// Whether a caller with this `Accept` is told in OpenMetrics 1.0: unless it would rather have the older format
/// (RFC 9110 section 12.5.1). Without one, or with one that names neither, it is.
fn takes_open_metrics(accept: &str) -> bool {
    let open = quality(accept, "application/openmetrics-text");
    let plain = quality(accept, "text/plain");
    plain.is_none_or(|plain| plain <= 0.0 || open.is_some_and(|open| open >= plain))
}

/// How much a media type is wanted; by the most specific range that covers it.
fn quality(accept: &str, kind: &str) -> Option<f32> {
    let all = kind.split_once('/').map(|(main, _)| format!("{main}/*"));
    let found = accept.split(',').filter_map(|range| {
        let mut parts = range.split(';').map(str::trim);
        let name = parts.next()?.to_ascii_lowercase();
        let specificity = match name.as_str() {
            name if name == kind => 2,
            name if Some(name) == all.as_deref() => 1,
            "*/*" => 0,
            _ => return None,
        };
        let mut quality: f32 = 1.0;
        for (key, value) in parts.filter_map(|part| part.split_once('=')) {
            match key.trim().to_ascii_lowercase().as_str() {
                "q" => quality = value.trim().parse().ok()?,
                // Drafts of OpenMetrics had other versions.
                "version" if kind.ends_with("openmetrics-text") && value.trim() != "1.0.0" => return None,
                _ => {}
            }
        }
        Some((specificity, quality))
    });
    found
        .max_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)))
        .map(|(_, quality)| quality)
}

/// The same in Prometheus' text format 0.0.4. Samples are written alike; there, a family has the whole name of
/// its samples, units are no matter, and an info is a gauge.
fn as_prometheus(text: &str) -> String {
    let mut written = String::with_capacity(text.len());
    let mut help = None;
    for line in text.lines() {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        match words[..] {
            ["#", "HELP", name, text] => help = Some((name, text)),
            ["#", "TYPE", name, kind] => {
                let (suffix, kind) = match kind {
                    "counter" => ("_total", "counter"),
                    "info" => ("_info", "gauge"),
                    "unknown" => ("", "untyped"),
                    kind => ("", kind),
                };
                if let Some((_, text)) = help.take().filter(|(of, _)| *of == name) {
                    written.push_str(&format!("# HELP {name}{suffix} {text}\n"));
                }
                written.push_str(&format!("# TYPE {name}{suffix} {kind}\n"));
            }
            ["#", ..] => {}
            _ => {
                written.push_str(line);
                written.push('\n');
            }
        }
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_format_is_for_who_would_rather_have_it() {
        for accept in [
            "",
            "*/*",
            "application/openmetrics-text",
            // Prometheus 2.42.
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
             text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            "text/html,application/xhtml+xml,*/*;q=0.8",
            "application/json",
            "text/plain;q=0,application/openmetrics-text;q=0.1",
            "Application/OpenMetrics-Text; Version=1.0.0; Q=1.0, text/plain",
            "q=;;,=,/",
        ] {
            assert!(takes_open_metrics(accept), "{accept}");
        }
        for accept in [
            "text/plain",
            "text/*",
            "text/plain;version=0.0.4;q=1,*/*;q=0.1",
            "application/openmetrics-text;version=0.0.1,text/plain;q=0.5",
            "application/openmetrics-text;q=0.3,text/plain;q=0.5",
            "application/openmetrics-text;q=0,*/*",
        ] {
            assert!(!takes_open_metrics(accept), "{accept}");
        }
    }

    #[test]
    fn the_same_is_said_in_the_older_format() {
        let counts = Counts::default();
        counts.answered("GET", "/readyz".to_owned(), StatusCode::OK);
        let mut text = "# HELP portcullis_build The agent.\n# TYPE portcullis_build info\n\
                        portcullis_build_info{version=\"1\"} 1\n"
            .to_owned();
        encode(&mut text, &counts.registry(TurnedAway::default())).unwrap();
        assert!(text.ends_with("# EOF\n"), "{text}");
        let prometheus = as_prometheus(&text);
        for block in [
            "# HELP portcullis_build_info The agent.\n# TYPE portcullis_build_info gauge\n\
             portcullis_build_info{version=\"1\"} 1\n",
            "# TYPE portcullis_http_requests_total counter\n\
             portcullis_http_requests_total{method=\"GET\",route=\"/readyz\",code=\"2xx\"} 1\n",
            "portcullis_tls_handshakes_total{result=\"timeout\"} 0\n",
        ] {
            assert!(prometheus.contains(block), "{block}: {prometheus}");
        }
        for gone in ["# UNIT", "# EOF", " info\n"] {
            assert!(!prometheus.contains(gone), "{gone}: {prometheus}");
        }
        let samples = |text: &str| text.lines().filter(|l| !l.starts_with('#')).count();
        assert_eq!(samples(&prometheus), samples(&text));
    }
}
