//! The engine in a real kernel: small changes are small, others' hands are kept off, and what others did
//! is told and undone.
//!
//! May not live here: which packets pass (`gate`, `packets`).
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::table::{DNS, SSH, WEB, is_in_place, planned, read, settings, spec, wait};
use common::{Namespace, eventually};
use portcullis::agent::gate::guard::Guard;
use portcullis::policy::observation;
use portcullis::policy::ruleset::change::steps;
use portcullis::system::nftables::events::Events;
use portcullis::system::nftables::{Error, Nftables, Owner};

#[test]
fn a_change_does_only_what_differs_and_is_what_was_planned() {
    let host = Namespace::new("change");
    host.enter(|| {
        let mut nftables = Nftables::open().unwrap();
        nftables.replace(&planned(3, &[SSH, WEB])).unwrap();
        // Handles of what stays are the same afterwards: it was not made anew.
        let ssh_handle = || {
            let listing = common::run("nft -a list chain inet portcullis gate");
            let line = listing.lines().find(|line| line.contains("\"rule ssh\"")).unwrap();
            line.rsplit_once("# handle ").unwrap().1.to_owned()
        };
        let handle = ssh_handle();
        for plan in [
            planned(4, &[SSH, WEB]),
            planned(2, &[SSH, WEB, DNS]),
            planned(0, &[SSH, r#"{"id":"web","protocol":"tcp","from_port":80,"ip_ranges":["10.9.0.0/25","192.0.3.0/24"]}"#]),
            planned(3000, &[SSH]),
            planned(0, &[SSH]),
        ] {
            let before = read(&mut nftables);
            let steps = steps(&before.ruleset, &plan).unwrap();
            nftables.change(&before, &steps).unwrap();
            let after = nftables.read_after(&before, &plan).unwrap().unwrap();
            assert_eq!(after.ruleset, plan, "{:#?}", after.ruleset.diff(&plan));
            assert_eq!(read(&mut nftables), after, "what is trusted is what is there");
            assert_eq!(ssh_handle(), handle);
        }
    });
}

#[test]
fn a_change_of_what_is_no_longer_there_is_refused_whole() {
    let host = Namespace::new("moved");
    host.enter(|| {
        let mut nftables = Nftables::open().unwrap();
        nftables.replace(&planned(1, &[SSH])).unwrap();
        let before = read(&mut nftables);
        common::run("nft add table inet neighbour");
        let steps = steps(&before.ruleset, &planned(2, &[SSH])).unwrap();
        assert!(matches!(nftables.change(&before, &steps), Err(Error::Moved)));
        assert_eq!(read(&mut nftables).ruleset, before.ruleset);
        // What a large set holds is not taken on trust when somebody else's transaction followed ours.
        nftables.replace(&planned(3000, &[SSH])).unwrap();
        let (before, plan) = (read(&mut nftables), planned(3001, &[SSH]));
        let steps = portcullis::policy::ruleset::change::steps(&before.ruleset, &plan).unwrap();
        nftables.change(&before, &steps).unwrap();
        common::run("nft delete element inet portcullis peers4 { 10.0.0.1 }");
        let after = nftables.read_after(&before, &plan).unwrap().unwrap();
        assert!(after.ruleset != plan, "the missing element is seen");
        assert_eq!(steps.len(), 1);
    });
}

/// NixOS#286584, firewalld#863: another program's flush.
#[test]
fn an_exclusive_table_is_out_of_others_reach_and_can_be_inherited() {
    let host = Namespace::new("owner");
    host.enter(|| {
        let plan = planned(2, &[SSH]);
        let mut first = Nftables::open_writer(true).unwrap();
        first.replace(&plan).unwrap();
        assert!(first.is_exclusive(), "this kernel knows owner and persist");
        let held = read(&mut first);
        assert_eq!((held.owner, &held.ruleset), (Owner::Us, &plan));
        for attack in [
            "nft delete table inet portcullis",
            "nft flush chain inet portcullis gate",
            "nft insert rule inet portcullis gate accept",
            "nft add element inet portcullis peers4 { 203.0.113.9 }",
            "nft add table inet portcullis { flags dormant ; }",
        ] {
            let words: Vec<&str> = attack.split(' ').collect();
            let output = std::process::Command::new(words[0])
                .args(&words[1..])
                .output()
                .unwrap();
            let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(
                complaint.contains("Operation not permitted"),
                "{attack}: {complaint}"
            );
        }
        common::run("nft flush ruleset");
        let mut other = Nftables::open_writer(true).unwrap();
        assert_eq!(read(&mut other).ruleset, plan);
        assert!(matches!(read(&mut other).owner, Owner::Other(port) if port == first.port()));
        assert!(other.replace(&planned(0, &[])).is_err());
        // Whoever made it ends: it stays, and can be taken over as it is.
        drop(first);
        let orphan = read(&mut other);
        assert_eq!((orphan.owner, &orphan.ruleset), (Owner::Orphan, &plan));
        other.adopt().unwrap();
        let adopted = read(&mut other);
        assert_eq!((adopted.owner, &adopted.ruleset), (Owner::Us, &plan));
        // The positive control: without an owner, the flush takes it.
        drop(other);
        common::run("nft flush ruleset");
        assert!(Nftables::open().unwrap().read().unwrap().is_none());
    });
}

#[test]
fn foreign_changes_are_told_with_their_author_and_our_own_are_not() {
    let host = Namespace::new("events");
    host.enter(|| {
        wait(async {
            let mut nftables = Nftables::open().unwrap();
            let events = Events::open(nftables.port()).unwrap();
            let quiet = || tokio::time::timeout(Duration::from_millis(50), events.next());
            nftables.replace(&planned(1, &[SSH])).unwrap();
            assert!(quiet().await.is_err(), "our own change is no news");
            common::run("nft add table inet neighbour");
            common::run("nft add table ip portcullis");
            assert!(quiet().await.is_err(), "other tables are no concern of ours");
            common::run("nft insert rule inet portcullis gate accept");
            let author = events.next().await.unwrap().expect("the kernel tells who");
            assert_eq!(author.name, "nft");
            assert!(author.pid > 0);
            common::run("nft flush ruleset");
            assert_eq!(events.next().await.unwrap().expect("known").name, "nft");
            assert!(quiet().await.is_err());
        });
    });
}

#[test]
fn what_others_change_is_undone_at_once_and_counted() {
    let host = Namespace::new("drift");
    host.enter(|| {
        wait(async {
            let guard = Guard::start(&settings(false)).unwrap();
            let mut seen = guard.watch();
            let spec = Arc::new(spec(2, &[SSH, WEB]));
            let gate = guard.enforce(Some(spec)).await;
            assert!(
                is_in_place(&gate) && !gate.owned && gate.repaired == 0,
                "{gate:?}"
            );
            let changes = [
                "nft flush ruleset",
                "nft delete table inet portcullis",
                "nft flush chain inet portcullis gate",
                "nft insert rule inet portcullis gate accept",
                "nft add element inet portcullis peers4 { 203.0.113.9 }",
                "nft delete element inet portcullis peers4 { 10.0.0.1 }",
                "nft chain inet portcullis gate { policy accept ; }",
                "nft add table inet portcullis { flags dormant ; }",
                "nft add chain inet portcullis more { type filter hook input priority 0 ; policy drop ; }",
            ];
            for (repaired, change) in (1..).zip(changes) {
                common::run(change);
                let gate = seen
                    .wait_for(|gate| gate.repaired == repaired && is_in_place(gate))
                    .await;
                let gate = gate.expect(change).clone();
                assert!(
                    gate.culprit.as_ref().is_some_and(|by| by.starts_with("\"nft\"")),
                    "{change}: {gate:?}"
                );
                assert_eq!(
                    read(&mut Nftables::open().unwrap()).ruleset,
                    *gate.planned,
                    "{change}"
                );
            }
        });
    });
}

/// The question whether it can be leaves no trace.
#[test]
fn a_table_that_nobody_owns_becomes_the_daemons_own() {
    let host = Namespace::new("nobody");
    host.enter(|| {
        let plan = planned(2, &[SSH]);
        let mut nftables = Nftables::open().unwrap();
        nftables.replace(&plan).unwrap();
        assert_eq!(read(&mut nftables).owner, Owner::Nobody);
        let guard = Guard::start(&settings(true)).unwrap();
        let gate = wait(guard.enforce(Some(Arc::new(spec(2, &[SSH])))));
        assert!(is_in_place(&gate) && gate.owned, "{gate:?}");
        let tables = common::run("nft list tables");
        assert_eq!(tables, "table inet portcullis\n");
    });
}

/// A dump of the table that is loaded again: with the table gone, beside it, and while nobody owns it.
#[test]
fn a_dump_that_is_loaded_again_neither_opens_nor_shuts_anything() {
    for exclusive in [false, true] {
        let host = Namespace::new("dump");
        host.enter(|| {
            wait(async {
                let guard = Guard::start(&settings(exclusive)).unwrap();
                let mut seen = guard.watch();
                let spec = Arc::new(spec(2, &[SSH, WEB]));
                let first = guard.enforce(Some(spec)).await;
                assert!(is_in_place(&first) && first.owned == exclusive);
                let dump = tempfile::NamedTempFile::new().unwrap();
                let listing = common::run("nft -s list ruleset");
                for prefix in ["", "flush ruleset\n"] {
                    std::fs::write(dump.path(), format!("{prefix}{listing}")).unwrap();
                    let before = guard.seen().repaired;
                    let loaded = std::process::Command::new("nft")
                        .arg("-f")
                        .arg(dump.path())
                        .output()
                        .unwrap();
                    assert_eq!(loaded.status.success(), !exclusive, "{loaded:?}");
                    if !exclusive {
                        let repaired =
                            |gate: &Arc<observation::Gate>| gate.repaired > before && is_in_place(gate);
                        seen.wait_for(repaired).await.unwrap();
                    }
                    assert_eq!(
                        read(&mut Nftables::open().unwrap()).ruleset,
                        *first.planned,
                        "{prefix:?}"
                    );
                }
            });
        });
    }
}

/// Changes that let nothing in wait in a storm; those that do never wait.
#[test]
fn a_storm_wears_nobody_out_and_leaves_nothing_open() {
    let host = Namespace::new("storm");
    host.enter(|| {
        wait(async {
            let guard = Guard::start(&settings(false)).unwrap();
            let mut seen = guard.watch();
            guard.enforce(Some(Arc::new(spec(2, &[SSH, WEB])))).await;
            let begin = Instant::now();
            let mut script = String::new();
            for _ in 0..200 {
                script.push_str("nft delete element inet portcullis peers4 { 10.0.0.1 } 2>/dev/null || true\n");
            }
            let run = |script: &str| {
                let status = std::process::Command::new("sh").arg("-c").arg(script).status().unwrap();
                assert!(status.success());
            };
            run(&script);
            let seconds = begin.elapsed().as_secs() + 1;
            let repaired = guard.seen().repaired;
            assert!((1..=6 * seconds).contains(&repaired), "{repaired} in {seconds} s");
            // In the middle of it, the gate is opened: shut at once, not when the storm is over.
            run("nft delete element inet portcullis peers4 { 10.0.0.1 }; nft flush chain inet portcullis gate");
            let before = Instant::now();
            seen.wait_for(|gate| gate.repaired > repaired && is_in_place(gate)).await.unwrap();
            assert!(before.elapsed() < Duration::from_millis(500), "{:?}", before.elapsed());
            let repaired = guard.seen().repaired;
            run("nft delete element inet portcullis peers4 { 10.0.0.1 }");
            seen.wait_for(|gate| gate.repaired > repaired && is_in_place(gate)).await.unwrap();
            assert_eq!(read(&mut Nftables::open().unwrap()).ruleset, *guard.seen().planned);
        });
    });
}

#[test]
fn with_many_peers_the_gate_is_shut_before_they_are_back() {
    let host = Namespace::new("fill");
    host.enter(|| {
        wait(async {
            let guard = Guard::start(&settings(false)).unwrap();
            let mut seen = guard.watch();
            guard.enforce(Some(Arc::new(spec(50_000, &[SSH])))).await;
            // Each transaction, in order: the first after the flush shuts, the one after it lets the peers in.
            let monitor = Events::open(0).unwrap();
            common::run("nft flush ruleset");
            while monitor
                .next()
                .await
                .unwrap()
                .is_none_or(|author| author.name == "nft")
            {}
            let held = read(&mut Nftables::open().unwrap()).ruleset;
            let planned = guard.seen().planned.clone();
            let shut = planned.without_large_sets(2048).unwrap();
            assert!(shut.chains[0].rules.len() < planned.chains[0].rules.len());
            // Reading takes a while: the second one may be through already.
            assert!(
                [&shut, &*planned].contains(&&held),
                "shut with the first transaction: {held}"
            );
            seen.wait_for(|gate| gate.repaired == 1 && is_in_place(gate))
                .await
                .unwrap();
            assert!(read(&mut Nftables::open().unwrap()).ruleset == *guard.seen().planned);
        });
    });
}

/// A set is made with room for more, not for any number; peers stay let in while it gets more.
#[test]
fn a_set_grows_beyond_its_room() {
    let host = Namespace::new("room");
    host.enter(|| {
        wait(async {
            let guard = Guard::start(&settings(true)).unwrap();
            let gate = guard.enforce(Some(Arc::new(spec(10, &[SSH])))).await;
            assert!(is_in_place(&gate));
            let gate = guard.enforce(Some(Arc::new(spec(20_000, &[SSH])))).await;
            assert!(is_in_place(&gate) && gate.owned, "{:?}", gate.applied);
            assert!(read(&mut Nftables::open().unwrap()).ruleset == *gate.planned);
            // The kernel really refuses what goes beyond it.
            let mut nftables = Nftables::open_writer(false).unwrap();
            drop(guard);
            eventually(Duration::from_secs(10), "the owner is gone", || {
                nftables.replace(&planned(10, &[SSH]))
            });
            let before = read(&mut nftables);
            let steps = steps(&before.ruleset, &planned(20_000, &[SSH])).unwrap();
            let refused = nftables.change(&before, &steps);
            assert!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
        });
    });
}
