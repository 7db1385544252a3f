//! Reports while the control plane is away: nothing that changed is lost or told twice, over restarts and
//! kills, within bounds; and a receiver that asks for patience gets it.
//!
//! May not live here: how the instance proves who it is (`push_auth`).

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use portcullis_protocol::{CheckId, Status};

use crate::lab::{Lab, Machine, SOON, allow, eventually};
use crate::receiver::{Asked, HOST, PATIENTLY, PORT, Server, no_content, push_to_us, set_up, told};

/// How many reports wait on the instance's disk.
fn waiting(machine: &Machine) -> usize {
    let count = "ls /var/lib/portcullis/spool | grep -cE '^[0-9]{20}[.]' || [ $? = 1 ]";
    machine.ok(count).parse().unwrap()
}

#[track_caller]
fn until_none_waits(machine: &Machine) {
    eventually(SOON, "no report waits", || match waiting(machine) {
        0 => Ok(()),
        count => Err(count),
    });
}

/// Another generation that changes nothing of readiness.
fn add_rule(machine: &mut Machine) {
    let port = 8000 + machine.spec.generation.get();
    machine.push(|spec| spec.firewall.ingress.push(allow(&format!("{port}/tcp"))));
}

/// What arrived, each number once. One that arrives twice is the same report under the same key.
#[track_caller]
fn once_each(arrived: &[Asked]) -> BTreeMap<u64, Asked> {
    let mut once: BTreeMap<u64, Asked> = BTreeMap::new();
    let mut last = 0;
    for asked in arrived.iter().filter(|asked| asked.is_change()) {
        let number = asked.number("portcullis-sequence");
        assert!(number >= last, "{number} after {last}");
        last = number;
        let key = format!("\"{}-{number}\"", asked.header("portcullis-stream"));
        assert_eq!(asked.header("idempotency-key"), key);
        if let Some(before) = once.insert(number, asked.clone()) {
            assert_eq!(before.body, asked.body, "{number} is two reports");
        }
    }
    once
}

#[test]
fn what_changes_while_the_control_plane_is_away_arrives_once_and_in_order() {
    let lab = Lab::new();
    let (mut machine, authority) = set_up(&lab, "");
    let receiver = Server::reports(&lab, &authority, &[]);
    push_to_us(&mut machine);
    let mut first = receiver.all_until(PATIENTLY, "generation 2, ready", |asked| {
        let report = asked.report();
        asked.is_change() && report.ready && report.generation == Some(2)
    });
    machine.until_ready();
    until_none_waits(&machine);
    first.extend(receiver.finish());

    add_rule(&mut machine);
    machine.ok("systemctl stop ssh");
    machine.until_check(CheckId::SshdRunning, Status::Fail);
    machine.ok("systemctl restart portcullis");
    machine.ok("systemctl start ssh");
    machine.until_ready();
    add_rule(&mut machine);
    // The control: they wait on disk, and a daemon that is killed does not take them with it.
    eventually(SOON, "both generations and readiness wait", || {
        match waiting(&machine) {
            count @ 4.. => Ok(count),
            count => Err(count),
        }
    });
    let killed = machine.main_pid();
    machine.ok(&format!("kill -9 {killed}"));
    eventually(SOON, "another daemon", || match machine.main_pid() {
        pid if pid != 0 && pid != killed => Ok(()),
        pid => Err(pid),
    });
    machine.until_ready();
    add_rule(&mut machine);
    assert_eq!(machine.spec.generation.get(), 5);

    // The first of them arrives, and the answer says that it did not.
    let receiver = Server::reports(&lab, &authority, &["500 Internal Server Error"]);
    let mut rest = receiver.all_until(PATIENTLY, "generation 5, ready", |asked| {
        let report = asked.report();
        asked.is_change() && report.ready && report.generation == Some(5)
    });
    until_none_waits(&machine);
    rest.extend(receiver.finish());
    let all = once_each(&[first, rest.clone()].concat());
    let numbers: Vec<u64> = all.keys().copied().collect();
    let expected: Vec<u64> = (1..=numbers.len() as u64).collect();
    assert_eq!(numbers, expected);
    let streams: BTreeSet<&str> = all
        .values()
        .map(|asked| asked.header("portcullis-stream"))
        .collect();
    assert_eq!(streams.len(), 1, "{streams:?}");
    assert!(all.values().all(|asked| asked.number("portcullis-dropped") == 0));
    let reports: Vec<_> = all.values().map(Asked::report).collect();
    assert!(reports.is_sorted_by_key(|report| report.time));
    assert!(reports.is_sorted_by_key(|report| report.generation));
    let mut readiness: Vec<bool> = rest.iter().map(|asked| asked.report().ready).collect();
    readiness.dedup();
    assert!(
        readiness.windows(2).any(|pair| pair == [true, false]),
        "{readiness:?}"
    );
    println!(
        "{} changes arrived, {} while nobody was there",
        all.len(),
        rest.len() - 1
    );
}

#[test]
fn a_full_spool_keeps_readiness_and_the_newest_and_tells_what_is_missing() {
    let lab = Lab::new();
    let (mut machine, authority) = set_up(&lab, "spool_reports = 3");
    push_to_us(&mut machine);
    machine.until_ready();
    for _ in 0..6 {
        add_rule(&mut machine);
    }
    machine.until_ready();
    eventually(SOON, "three reports wait", || match waiting(&machine) {
        3 => Ok(()),
        count => Err(count),
    });
    let receiver = Server::reports(&lab, &authority, &[]);
    let arrived = receiver.all_until(PATIENTLY, "the newest", |asked| {
        asked.is_change() && asked.report().generation == Some(8)
    });
    let all = once_each(&arrived);
    assert!(all.len() <= 3, "{:?}", all.keys());
    assert!(all.contains_key(&1), "{:?}", all.keys());
    let (newest, last) = all.last_key_value().unwrap();
    assert_eq!(last.number("portcullis-dropped"), newest - all.len() as u64);
    assert!(last.number("portcullis-dropped") >= 4, "{:?}", all.keys());
    assert!(told(&machine, "6d") > 0);
}

#[test]
fn a_date_to_come_back_at_is_kept_by_the_receivers_clock() {
    let lab = Lab::new();
    let (mut machine, authority) = set_up(&lab, "");
    // A receiver whose clock is 20 years ahead.
    let now = SystemTime::now() + Duration::from_secs(20 * 365 * 24 * 3600);
    let date = |time| httpdate::fmt_http_date(time);
    let busy = format!(
        "503 Service Unavailable\r\ndate: {}\r\nretry-after: {}",
        date(now),
        date(now + Duration::from_secs(8))
    );
    let receiver = Server::reports(&lab, &authority, &["500 Internal Server Error", &busy]);
    push_to_us(&mut machine);
    let [first, second] = [receiver.next(PATIENTLY).time, receiver.next(PATIENTLY).time];
    // What changes meanwhile waits too.
    add_rule(&mut machine);
    let third = receiver.next(PATIENTLY).time;
    println!(
        "asked again after {:?}, then after {:?}",
        second - first,
        third - second
    );
    assert!(third - second >= Duration::from_secs(7), "{:?}", third - second);
    // Without a word of the receiver it is asked sooner.
    assert!(second - first < third - second);
}

#[test]
fn a_change_that_can_not_be_kept_is_told_all_the_same_and_counted() {
    let lab = Lab::new();
    let (mut machine, authority) = set_up(&lab, "");
    let receiver = Server::reports(&lab, &authority, &[]);
    push_to_us(&mut machine);
    receiver.until(PATIENTLY, "generation 2", |asked| {
        asked.is_change() && asked.report().generation == Some(2)
    });
    machine.until_ready();
    until_none_waits(&machine);
    // Folders in the way of the next report's file: root can't write there either, as on a full disk.
    let place = "cd /var/lib/portcullis/spool; n=$(grep -oE '\"next\":[0-9]+' stream.json | cut -d: -f2)
        for kind in readiness check; do";
    let name = "$(printf '.%020d.%s.json.new' $n $kind)";
    machine.ok(&format!("{place} mkdir {name}; done"));
    add_rule(&mut machine);
    let asked = receiver.until(PATIENTLY, "generation 3", |asked| {
        asked.report().generation == Some(3)
    });
    assert!(!asked.is_change());
    assert!(asked.number("portcullis-dropped") >= 1);
    let last = asked.number("portcullis-sequence");
    machine.ok(&format!("{place} rmdir {name}; done"));
    add_rule(&mut machine);
    let asked = receiver.until(PATIENTLY, "generation 4", |asked| {
        asked.report().generation == Some(4)
    });
    assert!(asked.is_change());
    assert_eq!(asked.number("portcullis-sequence"), last + 1);
}

#[test]
fn a_report_that_is_refused_again_and_again_holds_up_no_others() {
    let lab = Lab::new();
    let (mut machine, authority) = set_up(&lab, "");
    let receiver = Server::start(&lab, (HOST, PORT), Some(authority.tls()), |asked| {
        match (asked.is_change(), asked.number("portcullis-sequence")) {
            (true, 1) => ("422 Unprocessable Content".to_owned(), String::new()),
            _ => no_content(),
        }
    });
    push_to_us(&mut machine);
    add_rule(&mut machine);
    let arrived = receiver.all_until(PATIENTLY, "generation 3", |asked| {
        asked.is_change() && asked.report().generation == Some(3)
    });
    let refused = arrived
        .iter()
        .filter(|asked| asked.number("portcullis-sequence") == 1);
    assert_eq!(refused.count(), 5);
    let (first, last) = (&arrived[5], &arrived[arrived.len() - 1]);
    assert_eq!(first.number("portcullis-sequence"), 2);
    assert_eq!(last.number("portcullis-dropped"), 1);
    assert!(told(&machine, "6d") > 0);
}
