//! `make bench`: the gate beside what users would pick instead, in one run.
//!
//! Needs root and the programs that `packaging/setup bench` installs. Everything happens in network
//! namespaces made here.
//! May not live here: the tables themselves, one file each.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod apply;
mod contenders;
mod drift;
mod packets;
mod peers;
mod raw;
mod sandbox;
mod specs;
mod world;

#[path = "../common/mod.rs"]
mod benches;
#[path = "../../tests/common/mod.rs"]
mod common;

use std::process::ExitCode;

use benches::Benchmark;

const GATE: Benchmark<()> = Benchmark {
    name: "gate",
    place: 2,
    title: "The gate",
    method: "In network namespaces with a host and a stranger on one veth pair. Programs that think they own the \
             machine see folders of their own over `/etc`, `/run` and `/var`. Built as the release is, but without \
             link-time optimisation.",
    groups: &[
        ("apply", |()| vec![apply::run()]),
        ("drift", |()| vec![drift::run()]),
        ("peers", |()| peers::run()),
        ("packets", |()| packets::run()),
    ],
    site: || Ok(((), sandbox::versions()?)),
};

fn main() -> ExitCode {
    GATE.run()
}
