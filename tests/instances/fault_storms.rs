//! What comes again and again while changes are made: other programs' flushes, a manager that is executed anew, a
//! bus that goes and comes, a front that is killed, events by the ten thousand, and strangers who flood the HTTPS
//! endpoint. Each change that was acknowledged stands, the gate is shut throughout, and after each storm the instance
//! is ready without a hand.
//!
//! May not live here: one fault at a time (`faults`), clocks that are wrong (`first_contact`), what each limit of the
//! endpoint does (`limits`).

use std::collections::{BTreeSet, VecDeque};
use std::io::{ErrorKind, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use portcullis::system::documents;
use portcullis_protocol::{PortRange, Spec};
use portcullis_provision::local::{Outsider, in_namespace};
use portcullis_provision::reach::{Reached, Transport, listen_inside};
use serde_json::Value;

use crate::api::{Api, rule};
use crate::common::Over;
use crate::endpoint::{curl, files, with_certificate};
use crate::lab::{Lab, Machine, READY_TIME, allow, eventually, vantage};
use crate::limits::{DEADLINES, Tls, dial, is_answered, open_to_all, own_memory, tls};

use Reached::{Filtered, Open};
use Transport::Tcp;

/// How often other programs' tables are flushed, how often the manager is executed anew and the bus restarted, and
/// how often the front is killed.
const FLUSHES: u32 = 100;
const TURNS: u32 = 5;
const KILLS: u32 = 12;
/// Events of each kind.
const EVENTS: u32 = 10_000;

/// Rules that are asked for and taken back by the script while a storm goes on; prints how many changes were
/// made. Each has to be.
const CHANGES: &str = "changes=0; while [ -e /run/storm ]; do
    portcullis firewall add --id storm --protocol tcp --port 9009 > /dev/null || exit 1
    portcullis firewall revoke storm > /dev/null || exit 1
    changes=$((changes + 2))
done; echo $changes";

/// Runs a script while changes are made. Gives how many, and what the script printed.
#[track_caller]
fn while_changing(machine: &Machine, storm: &str) -> (u32, String) {
    let before = machine.status().generation.unwrap();
    machine.ok("touch /run/storm");
    let (changes, printed) = std::thread::scope(|scope| {
        let changing = scope.spawn(|| machine.run(CHANGES));
        let printed = machine.run(storm);
        machine.ok("rm /run/storm");
        (changing.join().unwrap(), printed)
    });
    assert!(printed.success(), "{printed:?}");
    assert!(changes.success(), "{changes:?}");
    let changes: u32 = changes.stdout.trim().parse().unwrap();
    // Nothing that was acknowledged is lost, and nothing came that was not asked for.
    let after = machine.until_ready().generation.unwrap();
    assert_eq!(after, before + u64::from(changes));
    (changes, printed.stdout)
}

/// What the daemon has used: processor time in milliseconds, and memory now in KiB.
fn used(machine: &Machine) -> [u64; 2] {
    let pid = machine.main_pid();
    let time = machine.ok(&format!("awk '{{print ($14 + $15) * 1000}}' /proc/{pid}/stat"));
    let hertz: u64 = machine.ok("getconf CLK_TCK").parse().unwrap();
    let memory = machine.ok(&format!("awk '/^Pss:/ {{print $2}}' /proc/{pid}/smaps_rollup"));
    [time.parse::<u64>().unwrap() / hertz, memory.parse().unwrap()]
}

/// The front is killed while rules are added over the API. Gives how many calls were answered and not.
fn kill_fronts(lab: &Lab, machine: &Machine) -> [usize; 2] {
    let certificate = files(lab, "storm", &lab.provider.client_certificate().unwrap());
    let beside = lab.provider.network().path();
    let add = |port: u16| {
        let body = rule(&format!("api-{port}"), port).to_string();
        let mut options = with_certificate(&certificate).to_vec();
        options.extend([
            "-X",
            "POST",
            "-H",
            "content-type: application/json",
            "--data-binary",
            &body,
        ]);
        curl(&beside, machine, "/v1/firewall/rules", &options)
    };
    let (mut answered, mut lost) = (BTreeSet::new(), 0);
    std::thread::scope(|scope| {
        let killing = scope.spawn(|| {
            machine.ok(&format!(
                "for i in $(seq {KILLS}); do
                    until pid=$(systemctl show -P MainPID portcullis-front); [ \"$pid\" != 0 ]; do sleep 0.05; done
                    kill -9 $pid; sleep 2
                done"
            ))
        });
        for port in 20_000.. {
            match add(port) {
                Ok(answer) if answer.status == 200 => _ = answered.insert(format!("api-{port}")),
                // Without a front nobody answers; one without a daemon says so. Neither is a yes.
                _ => lost += 1,
            }
            if killing.is_finished() {
                break;
            }
        }
        killing.join().unwrap();
    });
    eventually(READY_TIME, "a call is answered", || match add(19_999) {
        Ok(answer) if answer.status == 200 => Ok(()),
        other => Err(format!("{other:?}")),
    });
    let list: Value = serde_json::from_str(&machine.ok("portcullis firewall list --format json")).unwrap();
    let rules = list["ingress"].as_array().unwrap();
    let ids: BTreeSet<String> = rules
        .iter()
        .map(|rule| rule["rule"]["id"].as_str().unwrap().to_owned())
        .collect();
    assert!(
        ids.is_superset(&answered),
        "acknowledged and lost: {answered:?}, {ids:?}"
    );
    [answered.len(), lost]
}

#[test]
fn storms_pass_over_and_nothing_that_was_acknowledged_is_lost() {
    let lab = Lab::new();
    let machine = lab.launch();
    listen_inside(&machine.instance, &[(Tcp, 9000)]).unwrap();
    let stranger = lab.stranger();
    let from = vantage(&stranger);
    let (pid, table) = (machine.main_pid(), machine.table());
    let as_before = |machine: &Machine| {
        machine.until_ready();
        assert_eq!((machine.main_pid(), machine.table()), (pid, table.clone()));
        assert_eq!(machine.seen_from(&from, Tcp, 9000), [Filtered; 2]);
        assert_eq!(machine.seen_from(&from, Tcp, 22), [Open; 2]);
    };

    // The positive control is the other table, which each flush takes.
    let (changes, _) = while_changing(
        &machine,
        &format!(
            "for i in $(seq {FLUSHES}); do
                nft add table inet neighbour && nft flush ruleset && ! nft list table inet neighbour 2> /dev/null \\
                    && nft list chain inet portcullis gate | grep -q 'policy drop' || exit 1
            done"
        ),
    );
    println!("{FLUSHES} flushes, {changes} changes meanwhile");
    as_before(&machine);

    let (changes, _) = while_changing(
        &machine,
        &format!("for i in $(seq {TURNS}); do systemctl daemon-reexec || exit 1; done"),
    );
    println!("{TURNS} executions of the manager, {changes} changes meanwhile");
    as_before(&machine);

    let (changes, _) = while_changing(
        &machine,
        &format!(
            "for i in $(seq {TURNS}); do
                systemctl stop dbus.socket dbus.service && ! busctl status > /dev/null 2>&1 || exit 1
                systemctl start dbus.socket dbus.service || exit 1
            done"
        ),
    );
    println!("{TURNS} restarts of the bus, {changes} changes meanwhile");
    as_before(&machine);

    let before = used(&machine);
    // Links, tables, and files that key files and sshd's settings are beside.
    let (changes, _) = while_changing(
        &machine,
        &format!(
            "half=$(({EVENTS} / 2))
            {{ for i in $(seq $half); do echo link set dev lo mtu $((60000 + i % 2)); echo link set dev lo mtu 65536; done; }} > /run/links
            ip -batch /run/links || exit 1
            {{ for i in $(seq $half); do echo add table inet other; echo delete table inet other; done; }} > /run/tables
            split -l 500 /run/tables /run/tables- && for part in /run/tables-*; do nft -f $part || exit 1; done
            for i in $(seq {EVENTS}); do : > /etc/ssh/storm; done; rm /etc/ssh/storm
            for i in $(seq {EVENTS}); do : > ~ubuntu/.ssh/storm; done; rm ~ubuntu/.ssh/storm"
        ),
    );
    as_before(&machine);
    let after = used(&machine);
    let processor = after[0] - before[0];
    println!(
        "4 x {EVENTS} events, {changes} changes meanwhile: {processor} ms of the processor; {} KiB of memory, {} before",
        after[1], before[1]
    );
    assert!(processor < 30_000, "{processor} ms of the processor");
    assert!(after[1] < before[1] + 16 * 1024, "{before:?} {after:?}");

    let [answered, lost] = kill_fronts(&lab, &machine);
    println!("{KILLS} kills of the front: {answered} calls were answered, {lost} were not");
    assert!(answered > 0 && lost > 0);
    machine.until_ready();
    assert_eq!(machine.main_pid(), pid);
    assert_eq!(machine.seen_from(&from, Tcp, 9000), [Filtered; 2]);
}

/// Strangers who flood; with one alone the limit of one source would do it.
const FLOODERS: usize = 8;
/// How many connections they make at least, and at most, and how many each of them holds of each kind.
const CONNECTIONS: usize = 2_000;
const MOST_CONNECTIONS: usize = 20_000;
const HELD: usize = 40;
/// How many changes are made at least, and at most, while they do.
const CHANGES_IN_FLOOD: u32 = 30;
const MOST_CHANGES: u32 = 600;
/// Where nobody is let in: TCP, and the next one UDP.
const SHUT: u16 = 9000;

/// What goes on while changes are made.
#[derive(Default)]
struct Flood {
    is_over: AtomicBool,
    connections: AtomicUsize,
    knocks: AtomicUsize,
}

impl Flood {
    fn goes_on(&self) -> bool {
        !self.is_over.load(Ordering::SeqCst)
    }

    /// One stranger's connections, over IPv4 and IPv6: handshakes and headers and bodies that never end and go on
    /// byte by byte, and garbage.
    fn pour(&self, from: &Path, to: [IpAddr; 2]) {
        let (mut raw, mut http) = (VecDeque::<TcpStream>::new(), VecDeque::<Tls>::new());
        let body = "POST /v1/firewall/rules HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 60000\r\n\r\n{";
        let header = "GET /livez HTTP/1.1\r\nhost: x\r\nx: ";
        for number in 0.. {
            if !self.goes_on() {
                return;
            }
            if self.connections.load(Ordering::SeqCst) < MOST_CONNECTIONS {
                // They may be turned away at any step. IPv4 and IPv6 in turn, and of each four kinds; most are cheap.
                if let Ok(mut stream) = dial(from, to[number % 2]) {
                    self.connections.fetch_add(1, Ordering::SeqCst);
                    match number / 2 % 8 {
                        6 => http.extend(says_in_tls(stream, body)),
                        7 => http.extend(says_in_tls(stream, header)),
                        raw_kind => {
                            // A record of 1024 bytes with the beginning of a ClientHello.
                            let hello: &[u8] = &[22, 3, 1, 4, 0, 1, 0, 3, 252, 3, 3];
                            let said = if raw_kind < 3 { hello } else { &[0xa5; 4096] };
                            let _ = stream.write_all(said);
                            raw.push_back(stream);
                        }
                    }
                }
            }
            if number % 8 == 0 {
                raw.drain(..raw.len().saturating_sub(HELD));
                http.drain(..http.len().saturating_sub(HELD));
                raw.retain_mut(|stream| stream.write_all(&[7]).is_ok());
                http.retain_mut(|stream| stream.write_all(b" ").and_then(|()| stream.flush()).is_ok());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Knocks at the shut port for UDP, hundreds of times a second.
    fn knock(&self, from: &Path, at: [IpAddr; 2]) {
        let bind = || {
            let any = [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()];
            any.map(|any| UdpSocket::bind((any, 0)).unwrap())
        };
        let sockets = in_namespace(from, bind).unwrap();
        while self.goes_on() {
            for (socket, at) in sockets.iter().zip(at) {
                if socket.send_to(b"knock", (at, SHUT + 1)).is_ok() {
                    self.knocks.fetch_add(1, Ordering::SeqCst);
                }
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// The beginning of a request, if it may be said.
fn says_in_tls(stream: TcpStream, begin: &str) -> Option<Tls> {
    let mut stream = tls(stream, None).ok()?;
    stream
        .write_all(begin.as_bytes())
        .and_then(|()| stream.flush())
        .ok()?;
    Some(stream)
}

/// What was answered with yes is on disk and in the kernel now: a rule for this port, or none.
#[track_caller]
fn is_made(machine: &Machine, port: u16, is_there: bool) -> Spec {
    let document = machine.ok("cat /var/lib/portcullis/spec.json");
    let spec = Spec::from_json(documents::content(document.as_bytes()).unwrap()).unwrap();
    let only = PortRange::new(port, port).unwrap();
    let on_disk = spec.firewall.ingress.iter().any(|rule| rule.ports == Some(only));
    assert_eq!(on_disk, is_there, "{port} on disk: {spec:?}");
    let table = machine.table();
    let mut numbers = table.split(|c: char| !c.is_ascii_digit());
    let in_kernel = numbers.any(|number| number == port.to_string());
    assert_eq!(in_kernel, is_there, "{port} in the kernel: {table}");
    spec
}

/// A rule comes over the API, another by `portcullis apply`, the first one goes: again and again until the flood is
/// large enough. Gives the number of changes, and the most memory in KiB.
fn change_meanwhile(api: &Api<'_>, machine: &Machine, flood: &Flood) -> (u32, u64) {
    let (mut changes, mut memory) = (0, 0);
    // Not one beside the other: neighbours would become one range.
    for port in (20_000..).step_by(3) {
        if changes >= CHANGES_IN_FLOOD && flood.connections.load(Ordering::SeqCst) >= CONNECTIONS {
            break;
        }
        assert!(
            changes < MOST_CHANGES,
            "the flood does not come: {}",
            flood.connections.load(Ordering::SeqCst)
        );
        let ask = |method: &str, path: &str, body: &[u8]| {
            let answer = api.with(&["--max-time", "60"], method, path, body);
            assert_eq!(answer.status, 200, "{changes} changes, {answer:?}");
        };
        ask(
            "POST",
            "/v1/firewall/rules",
            rule("web", port).to_string().as_bytes(),
        );
        let mut spec = is_made(machine, port, true);
        spec.generation = spec.generation.next();
        spec.firewall.ingress.push(allow(&format!("{}/tcp", port + 1)));
        let output = machine.run_with("portcullis apply --spec -", &spec.to_json());
        assert!(output.success(), "{changes} changes, {output:?}");
        is_made(machine, port + 1, true);
        ask("DELETE", "/v1/firewall/rules/web", b"");
        is_made(machine, port, false);
        changes += 3;
        memory = memory.max(own_memory(machine));
    }
    (changes, memory)
}

/// The control: both ports are reached, over IPv4 and IPv6, once a rule names them.
fn both_ports_were_shut(machine: &Machine, stranger: &Outsider, heard: &UdpSocket) {
    machine.ok(&format!(
        "portcullis firewall add --id shut --protocol any --port {SHUT}-{}",
        SHUT + 1
    ));
    assert_eq!(machine.seen_from(&vantage(stranger), Tcp, SHUT), [Open; 2]);
    let addresses = machine.instance.addresses();
    let once = Flood::default();
    std::thread::scope(|scope| {
        let _over = Over(&once.is_over);
        scope.spawn(|| once.knock(&stranger.path(), addresses));
        let mut over = BTreeSet::new();
        eventually(DEADLINES, "knocks are heard over IPv4 and IPv6", || {
            while let Ok((_, from)) = heard.recv_from(&mut [0; 8]) {
                over.insert(from.ip().to_canonical().is_ipv4());
            }
            if over.len() == 2 { Ok(()) } else { Err(over.len()) }
        });
    });
}

#[test]
fn strangers_who_flood_the_endpoint_hold_up_no_change_and_open_nothing() {
    let lab = Lab::new();
    let machine = open_to_all(&lab);
    listen_inside(&machine.instance, &[(Tcp, SHUT)]).unwrap();
    let (inside, addresses) = (machine.instance.network_namespace(), machine.instance.addresses());
    let heard = in_namespace(&inside, || UdpSocket::bind((Ipv6Addr::UNSPECIFIED, SHUT + 1)))
        .unwrap()
        .unwrap();
    heard.set_nonblocking(true).unwrap();
    let outsider = |name: String| lab.provider.outsider(&name).unwrap();
    let flooders: Vec<Outsider> = (0..FLOODERS)
        .map(|number| outsider(format!("flood-{number}")))
        .collect();
    let stranger = lab.stranger();
    let from = vantage(&stranger);
    let api = Api::new(&lab, &machine);
    for _ in 0..20 {
        is_answered(&stranger.path(), &machine, "/livez", &[]);
    }
    let pids = |machine: &Machine| (machine.main_pid(), machine.unit("portcullis-front", "MainPID"));
    let (pid, before, generation) = (
        pids(&machine),
        own_memory(&machine),
        machine.status().generation.unwrap(),
    );
    let flood = Flood::default();
    let ((changes, most), probes) = std::thread::scope(|scope| {
        let over = Over(&flood.is_over);
        for flooder in &flooders {
            scope.spawn(|| flood.pour(&flooder.path(), addresses));
        }
        scope.spawn(|| flood.knock(&stranger.path(), addresses));
        let probing = scope.spawn(|| {
            let mut probes = 0;
            while flood.goes_on() {
                assert_eq!(machine.seen_from(&from, Tcp, SHUT), [Filtered; 2]);
                probes += 1;
            }
            probes
        });
        let made = change_meanwhile(&api, &machine, &flood);
        drop(over);
        (made, probing.join().unwrap())
    });
    let [connections, knocks] = [&flood.connections, &flood.knocks].map(|count| count.load(Ordering::SeqCst));
    println!(
        "{connections} connections, {changes} changes meanwhile; {knocks} knocks and {probes} connections to shut ports; \
         {before} KiB before, {most} KiB at most"
    );
    assert!(knocks > 1_000 && probes > 1, "{knocks} {probes}");
    let nothing = heard.recv(&mut [0; 8]).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
    assert!(
        most < before + 16 * 1024,
        "{before} KiB before, {most} KiB at most"
    );
    // It was a flood: the endpoint had to turn them away.
    let told = machine.ok("journalctl -b -o json MESSAGE_ID=5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e74");
    assert!(told.contains("\"EVICTED\""), "{told}");
    assert_eq!(
        machine.until_ready().generation,
        Some(generation + u64::from(changes))
    );
    assert_eq!(pids(&machine), pid);

    both_ports_were_shut(&machine, &stranger, &heard);
    eventually(DEADLINES, "a flooder is served again", || {
        match curl(&flooders[0].path(), &machine, "/livez", &[]) {
            Ok(answer) if answer.status == 200 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}
