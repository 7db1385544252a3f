//! What comes again and again while changes are made: other programs' flushes, a manager that is executed anew, a
//! bus that goes and comes, a front that is killed, and events by the ten thousand. Each change that was
//! acknowledged stands, the gate is shut throughout, and after each storm the instance is ready without a hand.
//!
//! May not live here: one fault at a time (`faults`), clocks that are wrong (`first_contact`).

use std::collections::BTreeSet;

use portcullis_provision::reach::{Reached, Transport, listen_inside};
use serde_json::Value;

use crate::api::rule;
use crate::endpoint::{curl, files, with_certificate};
use crate::lab::{Lab, Machine, READY_TIME, eventually, vantage};

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
    machine.ok("touch /run/storm");
    let (mut answered, mut lost) = (BTreeSet::new(), 0);
    std::thread::scope(|scope| {
        let killing = scope.spawn(|| {
            machine.ok(&format!(
                "for i in $(seq {KILLS}); do
                    until pid=$(systemctl show -P MainPID portcullis-front); [ \"$pid\" != 0 ]; do sleep 0.05; done
                    kill -9 $pid; sleep 2
                done; rm /run/storm"
            ))
        });
        for port in 20_000.. {
            match add(port) {
                Ok(answer) if answer.status == 200 => _ = answered.insert(format!("api-{port}")),
                // Without a front nobody answers; one without a daemon says so. Neither is a yes.
                _ => lost += 1,
            }
            if !machine.run("test -e /run/storm").success() {
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
