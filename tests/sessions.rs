//! Live sessions and the gate: what is revoked ends, what is older goes on, nothing else is touched.
//!
//! May not live here: sessions of containers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use common::table::{SSH, planned, read, settings, spec, wait};
use common::{Namespace, eventually, host_and_stranger};
use portcullis::agent::gate::guard::Guard;
use portcullis::system::nftables::{Nftables, Owner};
use portcullis_protocol::Spec;

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
    let (host, stranger) = host_and_stranger();
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
    let (host, stranger) = host_and_stranger();
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
    let (host, stranger) = host_and_stranger();
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
        eventually(Duration::from_secs(10), "the owner is gone", || match owner() {
            Owner::Orphan => Ok(()),
            other => Err(other),
        });
        host.enter(|| Guard::start(&settings(true)).unwrap())
    };
    let guard = next(guard);
    assert_eq!(wait(guard.enforce(Some(Arc::new(spec(0, &[SSH]))))).kept, 1);
    assert!(flows(&inbound.0, &inbound.1) && flows(&outbound.1, &outbound.0));
    drop((inbound, outbound));
    let guard = next(guard);
    assert_eq!(wait(guard.enforce(Some(Arc::new(spec(0, &[SSH]))))).kept, 0);
}
