//! A prober that knocks without pause, and witnesses in the kernel who count what came and what passed.
//!
//! May not live here: what is knocked at, and what ought to pass.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::socket::AddressFamily;
use serde_json::Value;

use super::Over;
use super::packets::{Header, SYN, raw, send, tcp, udp, with_checksum};

/// Where something listens that nobody may reach.
pub const CLOSED: u16 = 9000;
/// Where something listens that a rule lets everybody reach.
pub const OPEN: u16 = 8080;
/// A round is one packet to each port, by TCP and UDP, over IPv4 and IPv6.
const PACE: Duration = Duration::from_millis(3);
/// A prober ends by itself, after a minute, and before it runs out of ports.
const MOST_ROUNDS: u16 = 20_000;

/// Knocks from the calling thread's namespace until told to stop; gives the number of rounds. The
/// neighbours have to be known: nothing may wait for an answer.
fn knock(from: [IpAddr; 2], at: [IpAddr; 2], stop: &AtomicBool) -> u16 {
    let sockets = [AddressFamily::Inet, AddressFamily::Inet6].map(raw);
    for round in 1..MOST_ROUNDS {
        let start = Instant::now();
        if stop.load(Ordering::Relaxed) {
            return round;
        }
        for ((socket, source), destination) in sockets.iter().zip(from).zip(at) {
            let header = Header {
                source,
                destination,
                hop_limit: 64,
                number: round,
            };
            for port in [CLOSED, OPEN] {
                // Each is a flow of its own.
                let from = 20_000 + round;
                for (protocol, body) in [(6, tcp(from, port, SYN, b"")), (17, udp(from, port, b"?"))] {
                    let body = with_checksum(body, protocol, &header);
                    send(socket, &header.datagram(protocol, &body), destination, 0);
                }
            }
        }
        std::thread::sleep(PACE.saturating_sub(start.elapsed()));
    }
    MOST_ROUNDS
}

/// Does something while somebody knocks. `enter` calls its function on a thread in the prober's namespace.
pub fn while_knocking<T>(
    enter: impl FnOnce(&(dyn Fn() -> u16 + Sync)) -> u16 + Send,
    from: [IpAddr; 2],
    at: [IpAddr; 2],
    act: impl FnOnce() -> T,
) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let knocking = scope.spawn(|| enter(&|| knock(from, at, &stop)));
        let over = Over(&stop);
        let done = act();
        drop(over);
        let rounds = knocking.join().unwrap();
        println!("{rounds} rounds of knocks");
        assert!(rounds < MOST_ROUNDS, "the prober ended first");
        done
    })
}

/// Table `inet witness`: counts what arrives right before the gate, and what passed it right behind.
/// Of each flow the first packet; the counters are `arrived_closed_ipv4`, `passed_open_ipv6` and so on.
pub fn witness() -> String {
    let chain = |name: &str, priority: i16| {
        let counter = |family: &str, port: u16, what: &str| {
            let first = ["tcp flags & (fin|syn|rst|ack) == syn tcp", "udp"];
            first
                .map(|first| {
                    format!(
                        "meta nfproto {family} {first} dport {port} counter name {name}_{what}_{family}\n"
                    )
                })
                .concat()
        };
        let rules =
            ["ipv4", "ipv6"].map(|family| counter(family, CLOSED, "closed") + &counter(family, OPEN, "open"));
        format!(
            "chain {name} {{ type filter hook prerouting priority {priority}; policy accept;\niifname lo accept\n{}}}\n",
            rules.concat()
        )
    };
    let counters = ["arrived", "passed"].map(|name| {
        ["closed_ipv4", "closed_ipv6", "open_ipv4", "open_ipv6"]
            .map(|rest| format!("counter {name}_{rest} {{ }}\n"))
            .concat()
    });
    format!(
        "table inet witness {{\n{}{}{}}}\n",
        counters.concat(),
        chain("arrived", -151),
        chain("passed", -149)
    )
}

/// The packets of the counters of table `witness`, by name.
pub fn counters(listing: &str) -> impl Fn(&str) -> u64 + use<> {
    let json: Value = serde_json::from_str(listing).unwrap();
    let all = json["nftables"].as_array().unwrap().clone();
    move |name| {
        let found = all
            .iter()
            .map(|object| &object["counter"])
            .find(|counter| counter["name"] == name);
        found.unwrap_or_else(|| panic!("no counter {name}"))["packets"]
            .as_u64()
            .unwrap()
    }
}
