//! Tests of the chain: whatever is done to a log is found, and where.

use proptest::prelude::*;

use super::super::tests::event;
use super::*;

/// A log over several files, and its head.
fn log(lines: usize, files: usize) -> (Vec<LogFile>, Head) {
    let (mut hash, mut all) = (GENESIS.to_owned(), Vec::new());
    for seq in 1..=lines {
        let sealed = seal(event(&format!("action-{seq}")), seq as u64, &hash);
        hash = sealed.hash;
        all.push(sealed.line);
    }
    let each = lines.div_ceil(files);
    let files = all.chunks(each).enumerate();
    let files = files.map(|(at, lines)| LogFile {
        name: format!("file-{at}"),
        bytes: lines.concat().into_bytes(),
    });
    let head = Head {
        seq: lines as u64,
        hash,
        first: Some(1),
    };
    (files.collect(), head)
}

fn check(files: &[LogFile], head: &Head) -> Verdict {
    let known = Known {
        head: Some(head),
        hash: None,
    };
    verify(files, known)
}

fn split(bytes: &[u8]) -> Vec<Vec<u8>> {
    bytes
        .split_inclusive(|b| *b == b'\n')
        .map(<[u8]>::to_vec)
        .collect()
}

/// What is found in a log of one file whose lines were changed.
fn found(change: impl FnOnce(&mut Vec<Vec<u8>>)) -> Vec<(usize, String)> {
    let (mut files, head) = log(6, 1);
    let mut lines = split(&files[0].bytes);
    change(&mut lines);
    files[0].bytes = lines.concat();
    let problems = check(&files, &head).problems;
    problems.into_iter().map(|p| (p.line, p.reason)).collect()
}

#[test]
fn a_whole_log_is_whole_over_its_files_and_each_line_is_one_document() {
    let (files, head) = log(10, 3);
    let verdict = check(&files, &head);
    assert!(verdict.is_whole(), "{verdict:?}");
    assert_eq!(
        (verdict.records, verdict.first, verdict.last),
        (10, Some(1), Some(10))
    );
    assert_eq!(verdict.head.as_ref(), Some(&head.hash));
    assert_eq!(lines(&files).count(), 10);
    for line in split(&files[0].bytes) {
        let value: serde_json::Value = serde_json::from_slice(&line).unwrap();
        assert!(
            value["seq"].is_u64() && value["who"]["kind"] == "agent",
            "{value}"
        );
    }
    // The oldest file was rotated away, as the head knows.
    let rotated = Head {
        first: Some(5),
        ..head.clone()
    };
    assert!(check(&files[1..], &rotated).is_whole());
    let verdict = check(&files[1..], &head);
    assert_eq!(
        verdict.problems,
        [Problem {
            file: "file-1".into(),
            line: 1,
            reason: "records 1 to 4 are missing before this line".into()
        }]
    );
}

#[test]
fn what_was_done_is_told_with_its_line() {
    assert_eq!(found(|_| ()), []);
    let one = |problems: Vec<(usize, String)>| {
        assert_eq!(problems.len(), 1, "{problems:?}");
        problems.into_iter().next().unwrap()
    };
    let (line, reason) = one(found(|lines| drop(lines.remove(2))));
    assert_eq!(
        (line, reason.as_str()),
        (3, "record 3 is missing before this line")
    );
    let (line, reason) = one(found(|lines| {
        let text = String::from_utf8(lines[3].clone()).unwrap();
        lines[3] = text.replace("action-4", "action-x").into_bytes();
    }));
    assert_eq!(
        (line, reason.as_str()),
        (4, "record 4 is not as it was written: its hash is another one")
    );
    let (line, reason) = one(found(|lines| {
        lines.truncate(4);
    }));
    assert_eq!((line, reason.as_str()), (0, "records 5 to 6 are cut off"));
    let swapped = found(|lines| lines.swap(1, 2));
    assert_eq!(swapped[0], (2, "record 2 is missing before this line".to_owned()));
    assert_eq!(swapped[1], (3, "record 2 stands after record 3".to_owned()));
    // One that was made anew, with a hash that fits itself.
    let forged = found(|lines| {
        lines[3] = seal(event("forged"), 4, GENESIS).line.into_bytes();
    });
    assert_eq!(forged[0].0, 4);
    assert_eq!(forged[1].0, 5, "{forged:?}");
    let inserted = found(|lines| lines.insert(2, b"{}\n".to_vec()));
    assert_eq!(inserted, [(3, "it is too short for a record".to_owned())]);
    assert_eq!(
        found(|lines| lines[5] = lines[5][..40].to_vec())[0].1,
        "record 6 is cut off"
    );
}

#[test]
fn files_that_are_swapped_or_missing_are_found() {
    let (mut files, head) = log(9, 3);
    files.swap(0, 1);
    assert!(!check(&files, &head).is_whole());
    let (mut files, head) = log(9, 3);
    files.remove(1);
    let verdict = check(&files, &head);
    assert_eq!(
        (
            verdict.problems[0].file.as_str(),
            verdict.problems[0].reason.as_str()
        ),
        ("file-2", "records 4 to 6 are missing before this line")
    );
    let verdict = check(&[], &head);
    assert_eq!(verdict.problems[0].reason, "records 1 to 9 are cut off");
}

#[test]
fn a_hash_that_was_written_down_is_found_or_missed() {
    let (files, head) = log(5, 1);
    let known = |hash| Known {
        head: None,
        hash: Some(hash),
    };
    assert!(verify(&files, known(&head.hash)).is_whole());
    let mut cut = files.clone();
    let lines = split(&files[0].bytes);
    cut[0].bytes = lines[..4].concat();
    // Without a head, nobody misses the last line.
    assert!(verify(&cut, Known::default()).is_whole());
    assert!(!verify(&cut, known(&head.hash)).is_whole());
}

#[test]
fn a_torn_line_is_no_tampering_and_the_chain_goes_on() {
    let (files, head) = log(3, 1);
    let mut bytes = files[0].bytes.clone();
    let next = seal(event("next"), 4, &head.hash);
    bytes.extend(&next.line.as_bytes()[..50]);
    let torn = [LogFile {
        name: "audit.log".into(),
        bytes: bytes.clone(),
    }];
    let verdict = check(&torn, &head);
    assert!(
        verdict.is_whole() && verdict.unfinished_bytes == 50,
        "{verdict:?}"
    );
    let found = resume(&bytes, Some(&head));
    assert_eq!((found.seq, &found.hash, found.unfinished), (3, &head.hash, 50));
    assert_eq!(
        (found.broken, found.last.unwrap().action.as_str()),
        (None, "action-3")
    );
    // The head is written after the line: one that knows less is no gap.
    let old = Head {
        seq: 2,
        ..head.clone()
    };
    assert_eq!(resume(&files[0].bytes, Some(&old)).broken, None);
    assert_eq!(resume(&files[0].bytes, None).seq, 3);
    assert_eq!(resume(b"", None).hash, GENESIS);
}

#[test]
fn a_log_that_was_cut_goes_on_after_what_was_written_and_stays_broken() {
    let (files, head) = log(5, 1);
    let lines = split(&files[0].bytes);
    let found = resume(&lines[..3].concat(), Some(&head));
    assert_eq!((found.seq, &found.hash), (5, &head.hash));
    assert!(found.broken.unwrap().contains("ends at record 3"));
    let next = seal(event("next"), 6, &head.hash);
    let mut bytes = lines[..3].concat();
    bytes.extend(next.line.as_bytes());
    let head = Head {
        seq: 6,
        hash: next.hash,
        first: Some(1),
    };
    let files = [LogFile {
        name: "audit.log".into(),
        bytes,
    }];
    let problems = check(&files, &head).problems;
    assert_eq!(problems.len(), 1);
    assert_eq!(
        (problems[0].line, problems[0].reason.as_str()),
        (4, "records 4 to 5 are missing before this line")
    );
}

#[test]
fn the_longest_record_fits_into_a_line_and_the_head_into_its_place() {
    let mut long = event(&"\"".repeat(500));
    long.reason = Some("\\\u{1b}".repeat(5000));
    for n in 0..50 {
        long.parameters
            .insert(format!("{n}{}", "\"".repeat(100)), "\\".repeat(10_000));
    }
    long.changes.peers_added = vec!["\"".repeat(128); 100];
    long.changes.keys_added = vec!["\\".repeat(128); 100];
    long.changes.keys_removed = vec!["\\".repeat(128); 100];
    long.changes.rules_added = vec!["\\".repeat(128); 100];
    long.changes.peers_changed = vec!["\\".repeat(128); 100];
    let sealed = seal(long, LAST_NUMBER, GENESIS);
    assert!(sealed.line.len() <= MAX_LINE, "{}", sealed.line.len());
    assert!(Line::read(sealed.line.trim_end().as_bytes()).unwrap().is_whole);
    let head = Head {
        seq: LAST_NUMBER,
        hash: sealed.hash,
        first: Some(LAST_NUMBER),
    };
    assert_eq!(head.to_bytes().len(), Head::BYTES);
    assert_eq!(Head::from_bytes(&head.to_bytes()), Some(head));
    assert_eq!(Head::from_bytes(b""), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_flipped_bit_is_found(lines in 1_usize..6, files in 1_usize..4, at: prop::sample::Index, bit in 0_u8..8) {
        let (mut files, head) = log(lines, files);
        let file = at.index(files.len());
        let byte = at.index(files[file].bytes.len());
        files[file].bytes[byte] ^= 1 << bit;
        prop_assert!(!check(&files, &head).is_whole());
    }

    #[test]
    fn removed_swapped_and_inserted_lines_are_found(lines in 2_usize..8, at: prop::sample::Index, to: prop::sample::Index, what in 0..3) {
        let (mut files, head) = log(lines, 1);
        let mut all = split(&files[0].bytes);
        let (at, to) = (at.index(lines), to.index(lines));
        match what {
            0 => drop(all.remove(at)),
            1 => {
                prop_assume!(at != to);
                all.swap(at, to);
            }
            _ => {
                let copy = all[at].clone();
                all.insert(to, copy);
            }
        }
        files[0].bytes = all.concat();
        prop_assert!(!check(&files, &head).is_whole());
    }

    #[test]
    fn any_cut_at_the_end_is_found(lines in 1_usize..6, cut: prop::sample::Index) {
        let (mut files, head) = log(lines, 1);
        let keep = cut.index(files[0].bytes.len());
        files[0].bytes.truncate(keep);
        prop_assert!(!check(&files, &head).is_whole());
        let found = resume(&files[0].bytes, Some(&head));
        prop_assert!(found.broken.is_some());
        prop_assert_eq!((found.seq, found.hash), (head.seq, head.hash));
    }

    #[test]
    fn nothing_that_stands_in_a_log_panics(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let file = LogFile { name: "x".into(), bytes: bytes.clone() };
        let _ = verify(&[file], Known::default());
        let _ = resume(&bytes, None);
        let _ = Head::from_bytes(&bytes);
    }

    /// What somebody writes into a name stays inside of its record.
    #[test]
    fn no_text_forges_a_line(text in any::<String>()) {
        let mut event = event("x");
        event.reason = Some(format!("{text}\n{{\"seq\":2}},\"hash\":\"{GENESIS}\"}}"));
        let sealed = seal(event, 1, GENESIS);
        prop_assert_eq!(sealed.line.matches('\n').count(), 1);
        prop_assert!(!sealed.line.trim_end().chars().any(char::is_control));
        let line = Line::read(sealed.line.trim_end().as_bytes()).unwrap();
        prop_assert!(line.is_whole);
        prop_assert_eq!(line.record.seq, 1);
    }
}

/// A disk that gives back other bits must not have the next number overflow.
#[test]
fn a_number_that_can_not_be_is_none() {
    let sealed = seal(event("x"), u64::MAX, GENESIS);
    assert!(Line::read(sealed.line.trim_end().as_bytes()).is_err());
    let head = |seq| Head {
        seq,
        hash: GENESIS.to_owned(),
        first: Some(1),
    };
    assert_eq!(Head::from_bytes(&head(u64::MAX).to_bytes()), None);
    assert_eq!(Head::from_bytes(&head(7).to_bytes()), Some(head(7)));
}
