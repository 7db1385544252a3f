//! What is told of disks: by `dmsetup`, `zfs` and `zpool`, and by the kernel's lists of mounts and swaps, in which
//! users choose names.
//!
//! May not live here: judging a tree of devices (`tests/storage`).

use portcullis::policy::storage::answers::Answers;
use portcullis::policy::storage::cipher::{Worth, algorithm};
use portcullis::policy::storage::mounts::{mounts, swaps};

use crate::parts;

/// Programs' answers, mountinfo, swaps: each line is read once or told, the telling is one line; and only a cipher
/// with a key of 256 bits is called strong.
pub fn storage(data: &[u8]) -> bool {
    let parts = parts(data);
    let [told, mounted, swapped] = parts[..] else {
        return false;
    };
    let text = |bytes| std::str::from_utf8(bytes);
    let (Ok(told), Ok(mounted), Ok(swapped)) = (text(told), text(mounted), text(swapped)) else {
        return false;
    };
    let answers = Answers::read(told);
    let segments: usize = answers.tables.values().map(Vec::len).sum();
    let devices: usize = answers.pools.values().map(Vec::len).sum();
    assert!(segments + devices <= told.lines().count());
    if let Some(problem) = &answers.problem {
        assert!(!problem.contains(char::is_control), "{problem:?}");
    }
    let mounts = mounts(mounted);
    match &mounts {
        Ok(mounts) => assert_eq!(mounts.len(), mounted.lines().count()),
        Err(reason) => assert!(!reason.contains(char::is_control), "{reason:?}"),
    }
    let swaps = swaps(swapped);
    match &swaps {
        Ok(swaps) => assert_eq!(swaps.len(), swapped.lines().count().saturating_sub(1)),
        Err(reason) => assert!(!reason.contains(char::is_control), "{reason:?}"),
    }
    let mut ciphers = 0;
    for line in told.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        for at in words.windows(2) {
            let bits = at[1]
                .parse()
                .unwrap_or_else(|_| u32::try_from(at[1].len()).unwrap_or(u32::MAX));
            let judged = algorithm(at[0], bits);
            if judged.worth == Worth::Strong {
                assert!(bits >= 256, "{} with {bits} bits", at[0]);
                // The cipher and its mode, before how the initialisation vector is made.
                let mut named = at[0].split('-');
                let (cipher, mode) = (named.next().unwrap_or_default(), named.next());
                assert!(!cipher.contains("null") && !cipher.contains("ecb("), "{}", at[0]);
                assert_ne!(mode, Some("ecb"), "{}", at[0]);
                ciphers += 1;
            }
        }
    }
    segments > 0 && mounts.is_ok_and(|mounts| !mounts.is_empty()) && swaps.is_ok() || ciphers > 0
}
