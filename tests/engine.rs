//! The engine in a real kernel: small changes are small, others' hands are kept off, and what others did
//! is told and undone.
//!
//! May not live here: which packets pass (`gate`, `packets`).
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::Namespace;
use portcullis::agent::gate::guard::Guard;
use portcullis::config::Settings;
use portcullis::policy::firewall::{Inputs, ruleset};
use portcullis::policy::observation;
use portcullis::policy::ruleset::Ruleset;
use portcullis::policy::ruleset::change::steps;
use portcullis::system::nftables::events::Events;
use portcullis::system::nftables::{Error, Held, Nftables, Owner};
use portcullis_protocol::Spec;

fn spec(peers: u32, rules: &[&str]) -> Spec {
    let peers: Vec<String> = (0..peers)
        .map(|i| {
            format!(
                r#"{{"instance":"p{i}","addresses":["10.{}.{}.{}"]}}"#,
                i >> 16,
                i >> 8 & 255,
                i & 255
            )
        })
        .collect();
    let json = format!(
        r#"{{"version":1,"generation":1,"instance":{{"id":"i-1"}},
           "cluster":{{"id":"c","peers":[{}]}},"firewall":{{"ingress":[{}]}}}}"#,
        peers.join(","),
        rules.join(",")
    );
    Spec::from_json(json.as_bytes()).unwrap()
}

const SSH: &str = r#"{"id":"ssh","protocol":"tcp","from_port":22}"#;
const WEB: &str =
    r#"{"id":"web","protocol":"tcp","from_port":80,"ip_ranges":["10.9.0.0/24","192.0.2.0/24"]}"#;
const DNS: &str = r#"{"id":"dns","protocol":"udp","from_port":53,"ip_ranges":["10.9.0.0/24"]}"#;

fn planned(peers: u32, rules: &[&str]) -> Ruleset {
    let spec = spec(peers, rules);
    ruleset(Inputs {
        spec: Some(&spec),
        ..Inputs::default()
    })
}

fn read(nftables: &mut Nftables) -> Held {
    nftables.read().unwrap().expect("there is a table")
}

/// Settings of a guard: an exclusive table or a shared one.
fn settings(exclusive_table: bool) -> Settings {
    Settings {
        exclusive_table,
        ..Settings::default()
    }
}

/// A runtime as the daemon has it.
fn wait<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(20), future)
            .await
            .expect("in time")
    })
}

fn is_in_place(gate: &observation::Gate) -> bool {
    gate.applied.is_ok()
        && gate
            .held
            .as_ref()
            .is_ok_and(|held| held.as_ref() == Some(&gate.planned))
}

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
            // Each transaction, in order: the first after the flush shuts, the ones after it fill.
            let monitor = Events::open(0).unwrap();
            common::run("nft flush ruleset");
            while monitor
                .next()
                .await
                .unwrap()
                .is_none_or(|author| author.name == "nft")
            {}
            let held = read(&mut Nftables::open().unwrap()).ruleset;
            assert_eq!(
                held.chains,
                guard.seen().planned.chains,
                "shut with the first transaction"
            );
            seen.wait_for(|gate| gate.repaired == 1 && is_in_place(gate))
                .await
                .unwrap();
            assert!(read(&mut Nftables::open().unwrap()).ruleset == *guard.seen().planned);
        });
    });
}

/// A host and a stranger on one link.
fn world() -> (Namespace, Namespace) {
    let (host, stranger) = (Namespace::new("host"), Namespace::new("stranger"));
    host.connect("eth0", &stranger, "eth0");
    for (namespace, address) in [(&host, "10.9.0.1/24"), (&stranger, "10.9.0.2/24")] {
        common::run(&format!("ip -n {} addr add {address} dev eth0", namespace.name()));
    }
    (host, stranger)
}

/// A connection from one namespace to a listener in another: both ends.
fn session(from: &Namespace, to: &Namespace, port: u16) -> (TcpStream, TcpStream) {
    let listener = to.enter(|| TcpListener::bind(("0.0.0.0", port)).unwrap());
    let address = common::run(&format!("ip -n {} -4 -o addr show dev eth0", to.name()));
    let address = address
        .split_whitespace()
        .nth(3)
        .unwrap()
        .split('/')
        .next()
        .unwrap()
        .to_owned();
    let address: SocketAddr = format!("{address}:{port}").parse().unwrap();
    let client = from.enter(|| TcpStream::connect_timeout(&address, Duration::from_secs(1)).unwrap());
    let (server, _) = listener.accept().unwrap();
    for end in [&client, &server] {
        end.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
    }
    // The port goes on being listened on: that is what makes the session one from outside.
    std::mem::forget(listener);
    (client, server)
}

/// Whether bytes still get from one end to the other.
fn flows(mut from: &TcpStream, mut to: &TcpStream) -> bool {
    use std::io::{Read, Write};
    from.write_all(b"x").is_ok() && to.read(&mut [0]).is_ok_and(|n| n == 1)
}

/// Qubes agent#399, firewalld#601.
#[test]
fn a_revoked_rule_or_peer_ends_its_sessions_and_no_others() {
    let (host, stranger) = world();
    let rule = |port: u16| format!(r#"{{"id":"p{port}","protocol":"tcp","from_port":{port}}}"#);
    let (a, b) = (rule(1001), rule(1002));
    let guard = host.enter(|| Guard::start(&settings(true)).unwrap());
    let peer = Spec::from_json(
        br#"{"version":1,"generation":1,"instance":{"id":"i-1"},
            "cluster":{"id":"c","peers":[{"instance":"p","addresses":["10.9.0.2"]}]}}"#,
    );
    let none = spec(0, &[]);
    wait(guard.enforce(Some(Arc::new(spec(0, &[&a, &b])))));
    let revoked = session(&stranger, &host, 1001);
    let stays = session(&stranger, &host, 1002);
    let outbound = session(&host, &stranger, 1003);
    let all = |pairs: &[(&(TcpStream, TcpStream), bool)]| {
        for ((client, server), expected) in pairs {
            assert_eq!(flows(client, server), *expected);
            assert_eq!(flows(server, client), *expected);
        }
    };
    all(&[(&revoked, true), (&stays, true), (&outbound, true)]);
    wait(guard.enforce(Some(Arc::new(spec(0, &[&b])))));
    all(&[(&revoked, false), (&stays, true), (&outbound, true)]);
    // Both ends were told, rather than left waiting.
    for mut end in [&revoked.0, &revoked.1] {
        let read = std::io::Read::read(&mut end, &mut [0]);
        assert!(
            !matches!(&read, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock),
            "{read:?}"
        );
    }
    // A peer, the same.
    wait(guard.enforce(Some(Arc::new(peer.unwrap()))));
    let from_peer = session(&stranger, &host, 1004);
    all(&[(&from_peer, true), (&stays, true), (&outbound, true)]);
    wait(guard.enforce(Some(Arc::new(none))));
    all(&[(&from_peer, false), (&stays, false), (&outbound, true)]);
}

/// Packets of a revoked session are dropped even where its socket can't be ended, and even if this host
/// goes on sending: its packets must not look like the start of a flow of its own.
#[test]
fn a_revoked_session_is_not_revived_by_what_this_host_sends() {
    let (host, stranger) = world();
    let rule = r#"{"id":"p","protocol":"tcp","from_port":1001}"#;
    host.enter(|| Nftables::open().unwrap().replace(&planned(0, &[rule])).unwrap());
    let (client, server) = session(&stranger, &host, 1001);
    assert!(flows(&client, &server) && flows(&server, &client));
    // The engine alone: no socket is ended.
    host.enter(|| Nftables::open().unwrap().replace(&planned(0, &[])).unwrap());
    assert!(flows(&server, &client), "out is not filtered");
    assert!(!flows(&client, &server) && !flows(&client, &server));
    assert!(!flows(&client, &server), "still, after this host has sent again");
}

#[test]
fn sessions_older_than_the_gate_go_on_and_new_ones_do_not_begin() {
    let (host, stranger) = world();
    let inbound = session(&stranger, &host, 1001);
    let outbound = session(&host, &stranger, 1002);
    let guard = host.enter(|| Guard::start(&settings(true)).unwrap());
    let gate = wait(guard.enforce(Some(Arc::new(spec(0, &[SSH])))));
    assert_eq!(gate.kept, 1, "one host");
    // Whoever speaks first after the gate is there.
    assert!(flows(&inbound.0, &inbound.1) && flows(&inbound.1, &inbound.0));
    assert!(flows(&outbound.1, &outbound.0) && flows(&outbound.0, &outbound.1));
    let refused = stranger.enter(|| {
        TcpStream::connect_timeout(&"10.9.0.1:1001".parse().unwrap(), Duration::from_millis(300)).is_err()
    });
    assert!(refused, "a new session is not let in");
    // The next daemon goes on keeping it, as long as there is a session.
    let next = |guard: Guard| {
        drop(guard);
        let owner = || host.enter(|| read(&mut Nftables::open().unwrap()).owner);
        while owner() != Owner::Orphan {
            std::thread::yield_now();
        }
        host.enter(|| Guard::start(&settings(true)).unwrap())
    };
    let guard = next(guard);
    assert_eq!(wait(guard.enforce(Some(Arc::new(spec(0, &[SSH]))))).kept, 1);
    assert!(flows(&inbound.0, &inbound.1) && flows(&outbound.1, &outbound.0));
    drop((inbound, outbound));
    let guard = next(guard);
    assert_eq!(wait(guard.enforce(Some(Arc::new(spec(0, &[SSH]))))).kept, 0);
}
