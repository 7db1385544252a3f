//! The spool over restarts, full and damaged disks.
//!
//! May not live here: order and bounds alone (`policy::spool`).

use std::os::unix::fs::PermissionsExt;

use super::*;

const BOUNDS: Bounds = Bounds {
    reports: 4,
    bytes: 1 << 20,
};

fn report(generation: u64, ready: bool) -> Report {
    let text = include_str!("../../crates/portcullis-protocol/tests/report-v1.json");
    let mut report: Report = serde_json::from_str(text).unwrap();
    report.generation = Some(generation);
    report.ready = ready;
    report
}

fn open(state: &Path) -> Spool {
    let (spool, reason) = Spool::open(state, BOUNDS);
    assert_eq!(reason, None);
    spool
}

fn generation(change: &Change) -> u64 {
    serde_json::from_str::<Report>(&change.body)
        .unwrap()
        .generation
        .unwrap()
}

/// Number and generation of all that waits, in order.
fn drained(spool: &mut Spool) -> Vec<(u64, u64)> {
    let next = || {
        let change = spool.oldest()?;
        spool.done(change.sequence);
        Some((change.sequence, generation(&change)))
    };
    std::iter::from_fn(next).collect()
}

#[test]
fn news_wait_in_order_over_restarts_and_no_number_is_used_twice() {
    let state = tempfile::tempdir().unwrap();
    let mut spool = open(state.path());
    let id = spool.id().to_owned();
    assert!(spool.oldest().is_none());
    for number in 1..=2 {
        assert_eq!(
            spool.add(&report(number, true)).unwrap(),
            Added::Waits { dropped: 0 }
        );
        assert_eq!(spool.add(&report(number, true)).unwrap(), Added::NoNews);
    }
    // Ended at any moment: what was added is there.
    let mut spool = open(state.path());
    assert_eq!(spool.id(), id);
    assert_eq!(spool.add(&report(2, true)).unwrap(), Added::NoNews);
    spool.add(&report(3, true)).unwrap();
    let first = spool.oldest().unwrap();
    assert_eq!((first.sequence, generation(&first)), (1, 1));
    spool.done(1);
    // Delivered twice, or after it was dropped: nothing happens.
    spool.done(1);
    let mut spool = open(state.path());
    assert!(spool.waits_since().is_some());
    assert_eq!(drained(&mut spool), [(2, 2), (3, 3)]);
    assert_eq!(fs::read_dir(state.path().join(FOLDER)).unwrap().count(), 1);
    let mut spool = open(state.path());
    assert_eq!(spool.add(&report(3, true)).unwrap(), Added::NoNews);
    spool.add(&report(4, true)).unwrap();
    assert_eq!(drained(&mut spool), [(4, 4)]);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let folder = state.path().join(FOLDER);
    assert_eq!((mode(&folder), mode(&folder.join(STREAM_FILE))), (0o700, 0o600));
}

#[test]
fn a_full_spool_keeps_readiness_and_counts_the_rest() {
    let state = tempfile::tempdir().unwrap();
    let mut spool = open(state.path());
    // 1 and 5 say something of readiness.
    for number in 1..=4 {
        spool.add(&report(number, true)).unwrap();
    }
    assert_eq!(spool.add(&report(5, false)).unwrap(), Added::Waits { dropped: 1 });
    assert_eq!(spool.add(&report(6, false)).unwrap(), Added::Waits { dropped: 1 });
    let mut spool = open(state.path());
    assert_eq!(spool.queue().dropped(), 2);
    assert_eq!(drained(&mut spool), [(1, 1), (4, 4), (5, 5), (6, 6)]);
    // Smaller bounds than before.
    for number in 7..=10 {
        spool.add(&report(number, false)).unwrap();
    }
    let bounds = Bounds { reports: 2, ..BOUNDS };
    let (mut spool, _) = Spool::open(state.path(), bounds);
    assert_eq!(spool.queue().dropped(), 4);
    assert_eq!(drained(&mut spool), [(9, 9), (10, 10)]);
    assert_eq!(fs::read_dir(state.path().join(FOLDER)).unwrap().count(), 1);
}

#[test]
fn what_can_not_be_written_counts_as_dropped_and_uses_no_number() {
    let state = tempfile::tempdir().unwrap();
    let mut spool = open(state.path());
    spool.add(&report(1, true)).unwrap();
    let folder = state.path().join(FOLDER);
    // In the way of the temporary file, also for root.
    let obstacle = folder.join(format!(".{:020}.check.json.new", 2));
    fs::create_dir(&obstacle).unwrap();
    assert!(spool.add(&report(2, true)).is_err());
    assert_eq!(spool.add(&report(2, true)).unwrap(), Added::NoNews);
    fs::remove_dir(&obstacle).unwrap();
    spool.add(&report(3, true)).unwrap();
    assert_eq!(drained(&mut spool), [(1, 1), (2, 3)]);
    assert_eq!(open(state.path()).queue().dropped(), 1);
}

#[test]
fn numbers_that_are_not_durable_keep_the_report() {
    let state = tempfile::tempdir().unwrap();
    let mut spool = open(state.path());
    spool.add(&report(1, true)).unwrap();
    let obstacle = state.path().join(FOLDER).join(format!(".{STREAM_FILE}.new"));
    fs::create_dir(&obstacle).unwrap();
    spool.done(1);
    assert!(spool.oldest().is_none());
    // Another process delivers it once more, under its number, and goes on after it.
    let mut again = open(state.path());
    assert_eq!(again.oldest().unwrap().sequence, 1);
    assert_eq!(again.queue().next(), 2);
    fs::remove_dir(&obstacle).unwrap();
    spool.add(&report(2, true)).unwrap();
    assert_eq!(drained(&mut spool), [(2, 2)]);
    assert!(open(state.path()).oldest().is_none());
}

#[test]
fn damage_is_told_and_starts_another_stream() {
    let state = tempfile::tempdir().unwrap();
    let mut spool = open(state.path());
    for number in 1..=3 {
        spool.add(&report(number, true)).unwrap();
    }
    let folder = state.path().join(FOLDER);
    fs::write(folder.join(format!("{:020}.check.json", 2)), "{\"version\":").unwrap();
    let mut spool = open(state.path());
    let id = spool.id().to_owned();
    assert_eq!(drained(&mut spool), [(1, 1), (3, 3)]);
    assert_eq!(spool.queue().dropped(), 1);
    spool.add(&report(4, true)).unwrap();
    fs::write(folder.join(STREAM_FILE), "{").unwrap();
    let (mut spool, reason) = Spool::open(state.path(), BOUNDS);
    assert!(reason.unwrap().contains("stream.json"));
    assert_ne!(spool.id(), id);
    spool.add(&report(5, true)).unwrap();
    assert_eq!(drained(&mut spool), [(1, 5)]);
}

#[test]
fn a_number_stands_for_one_report_whatever_a_disk_gives_back() {
    let state = tempfile::tempdir().unwrap();
    let folder = state.path().join(FOLDER);
    let mut spool = open(state.path());
    spool.add(&report(1, true)).unwrap();
    spool.add(&report(2, false)).unwrap();
    let file = |name: &str| folder.join(name);
    // The same number once more, and one that is higher than any.
    let ready = file("00000000000000000002.readiness.json");
    fs::copy(&ready, file("00000000000000000002.check.json")).unwrap();
    fs::copy(&ready, file("18446744073709551615.check.json")).unwrap();
    let mut spool = open(state.path());
    assert_eq!(drained(&mut spool), [(1, 1), (2, 2)]);
    assert_eq!(spool.queue().next(), 3);
    assert_eq!(drained(&mut open(state.path())), []);
    // A stream that would go on with a number that can't be is another one.
    let mut stream: Stream = documents::load(&file(STREAM_FILE), MAX_STREAM_BYTES)
        .unwrap()
        .unwrap();
    stream.next = u64::MAX;
    documents::save(&file(STREAM_FILE), &stream).unwrap();
    let (mut spool, reason) = Spool::open(state.path(), BOUNDS);
    assert!(reason.unwrap().contains(STREAM_FILE));
    spool.add(&report(3, true)).unwrap();
    assert_eq!(drained(&mut spool), [(1, 3)]);
}
