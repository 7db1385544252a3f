//! `make bench`: what the HTTPS endpoint of a real instance costs, beside nginx with a static file and
//! prometheus-node-exporter, in one run.
//!
//! All three are asked over the instance's loopback, with TLS and a key of the same kind, by programs that
//! Debian has: wrk, and h2load for a fixed rate. Needs root, the package that `make deb` made, and what
//! `packaging/setup bench` installs.
//! May not live here: the tables themselves, one file each.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod memory;
mod requests;
mod servers;

#[path = "../common/mod.rs"]
mod benches;
#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/instances/lab.rs"]
#[allow(dead_code)]
mod lab;

use std::process::ExitCode;

use benches::Benchmark;
use servers::Site;

const ENDPOINT: Benchmark<Site> = Benchmark {
    name: "endpoint",
    place: 4,
    title: "The endpoint",
    method: "TLS 1.3 over loopback, a P-256 key for each, on a real instance: portcullis' `/readyz` with its limits lifted, \
             nginx with a file of 2 bytes and a worker for each processor, prometheus-node-exporter's front page. The \
             package, as it ships. Round by round, so that a busy minute of the machine is not one server's alone.",
    groups: &[
        // First: what is idle must not have been busy.
        ("memory", |site| vec![memory::run(site)]),
        ("requests", |site| vec![requests::run(site)]),
        ("latency", |site| vec![requests::latency(site)]),
        ("handshakes", |site| vec![requests::handshakes(site)]),
    ],
    site: || {
        let site = Site::new();
        let beside = site.versions();
        Ok((site, beside))
    },
};

fn main() -> ExitCode {
    ENDPOINT.run()
}
