//! `make bench`: what keys cost on a real instance, from `portcullis apply` to sshd's answer, beside what
//! scripts, cloud-init and google-guest-agent do.
//!
//! Needs root and the package that `make deb` made. The instance is made here and gone afterwards.
//! May not live here: the tables themselves, one file each.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod google;
mod others;
mod probe;
mod site;
mod write;

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

const KEYS: Benchmark<Site> = Benchmark {
    name: "keys",
    place: 3,
    title: "Keys",
    method: "On a real instance (systemd, sshd, homes on overlayfs) with 100 users. sshd is asked for its configuration \
             once for all users, since none of its files can tell them apart, that is, holds no `Match`; with a `Match` it \
             is asked once for each. The package, as it ships.",
    groups: &[
        ("write", |site| vec![write::run(site)]),
        ("probe", |site| vec![probe::run(site)]),
    ],
    site: || {
        let site = Site::new();
        let beside = site.versions();
        Ok((site, beside))
    },
};

fn main() -> ExitCode {
    KEYS.run()
}
