//! `make bench`: what happens between power-on and handing over, and what is open meanwhile, on real instances of images
//! with portcullis, with what users would take instead, and with nothing.
//!
//! Needs root and the package that `make deb` made; makes an image for each contender.
//! May not live here: the tables themselves, one file each.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod containers;
mod power_on;
mod prober;
mod site;
mod weight;

#[path = "../common/mod.rs"]
mod benches;
#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/instances/lab.rs"]
#[allow(dead_code)]
mod lab;

use std::process::ExitCode;

use benches::Benchmark;
use site::Site;

const BOOT: Benchmark<Site> = Benchmark {
    name: "boot",
    place: 1,
    title: "From power-on to handing over",
    method: "Real instances (systemd as the first process, sshd, cloud-init with user-data) that differ in what shuts \
             them. A program listens in each from before the network comes up, on a port that no rule names, and a stranger on \
             the same network tries it all the while. Every image has what it needs baked in: nothing is \
             downloaded at boot, which favours the script. The package, as it ships.",
    groups: &[
        ("power-on", |site| power_on::run(site)),
        ("containers", |site| vec![containers::run(site)]),
        ("weight", |site| weight::run(site)),
    ],
    site: || {
        let site = Site::new();
        let beside = site.versions();
        Ok((site, beside))
    },
};

fn main() -> ExitCode {
    BOOT.run()
}
