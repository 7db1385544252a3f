//! Reports that are pushed: to a receiver of this process, in the namespace of the control plane.
//!
//! May not live here: what a report says.

use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use portcullis_protocol::{Check, CheckId, Report, Secret};

use crate::first_contact::{expect, introduce, shift_clock};
use crate::lab::{Lab, SOON, eventually};
use crate::receiver::{Authority, PATIENTLY, Server, push_to_us, set_up, told};

#[test]
fn a_report_is_pushed_when_a_spec_is_accepted_and_at_once_when_readiness_changes() {
    let lab = Lab::new();
    let (mut machine, authority) = set_up(&lab, "");
    let receiver = Server::reports(&lab, &authority, &[]);
    push_to_us(&mut machine);
    let is_ready = |report: &Report| report.ready && report.generation == Some(2);
    let asked = receiver.until(SOON, "ready with generation 2", |asked| is_ready(&asked.report()));
    assert_eq!(asked.report().instance.id, machine.instance.id());

    let start = Instant::now();
    machine.ok("systemctl stop ssh");
    // What is less urgent may be told before it.
    let asked = receiver.until(SOON, "not ready", |asked| !asked.report().ready);
    let (arrived, report) = (asked.time, asked.report());
    println!(
        "a stopped sshd was told to the control plane after {:?}",
        arrived - start
    );
    assert!(arrived - start < Duration::from_secs(3), "{report:#?}");
    // A report in the middle of the change is followed by one that has all of it.
    let stopped = |check: &Check| check.id == CheckId::SshdRunning;
    if !report.blocking().any(stopped) {
        receiver.until(SOON, "sshd.running fails", |asked| {
            asked.report().blocking().any(stopped)
        });
    }
    machine.ok("systemctl start ssh");
    receiver.until(SOON, "ready again", |asked| asked.report().ready);
    let quiet = receiver.got.recv_timeout(Duration::from_secs(2));
    assert!(
        matches!(quiet, Err(RecvTimeoutError::Timeout)),
        "nothing changed: {quiet:?}"
    );
}

#[test]
fn a_busy_receiver_is_asked_again_when_it_said() {
    let lab = Lab::new();
    let (mut machine, authority) = set_up(&lab, "");
    let answers = [
        "503 Service Unavailable\r\nretry-after: 2",
        "429 Too Many Requests\r\nretry-after: 3",
        "500 Internal Server Error",
    ];
    let receiver = Server::reports(&lab, &authority, &answers);
    push_to_us(&mut machine);
    let times: Vec<Instant> = (0..4).map(|_| receiver.next(SOON).time).collect();
    let waits: Vec<Duration> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    println!("asked again after {waits:?}");
    assert!((1.9..4.0).contains(&waits[0].as_secs_f64()), "{waits:?}");
    assert!((2.9..5.0).contains(&waits[1].as_secs_f64()), "{waits:?}");
}

#[test]
fn a_receiver_that_is_away_or_not_trusted_gets_nothing_and_harms_nothing() {
    let lab = Lab::new();
    let (mut machine, authority) = set_up(&lab, "");
    let other = Authority::new();
    let (pid, impostor) = (machine.main_pid(), Server::reports(&lab, &other, &[]));
    push_to_us(&mut machine);
    machine.until_ready();
    eventually(SOON, "a refused delivery is in the journal", || {
        match told(&machine, "0b") {
            0 => Err("it is not"),
            _ => Ok(()),
        }
    });
    assert!(impostor.got.try_recv().is_err());
    drop(impostor);
    let start = Instant::now();
    let again = told(&machine, "0b");
    eventually(SOON, "nobody is there", || {
        let count = told(&machine, "0b");
        if count > again { Ok(()) } else { Err(count) }
    });
    assert!(machine.until_ready().ready);
    let receiver = Server::reports(&lab, &authority, &[]);
    let asked = receiver.next(PATIENTLY);
    println!("delivered {:?} after the receiver was gone", asked.time - start);
    assert_eq!(asked.report().generation, Some(2));
    assert_eq!(machine.main_pid(), pid);
}

#[test]
fn a_receiver_is_judged_by_the_proven_time_where_the_clock_is_wrong() {
    let lab = Lab::new();
    let (mut machine, authority) = set_up(&lab, "");
    let receiver = Server::reports(&lab, &authority, &[]);
    // The other way, the authority's own date tells that it is later than the clock says.
    shift_clock(&machine, 7300);
    push_to_us(&mut machine);
    eventually(SOON, "its certificate is over, by the clock", || {
        match told(&machine, "0b") {
            0 => Err("nothing was tried"),
            _ => Ok(()),
        }
    });
    assert!(receiver.got.try_recv().is_err());
    let token = Secret::new("t".repeat(64));
    expect(&mut machine, &token);
    introduce(&machine, &token).unwrap();
    let asked = receiver.next(PATIENTLY);
    assert_eq!(asked.report().instance.id, machine.instance.id());
}
