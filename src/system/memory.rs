//! Keeping this process' memory to itself: a crash must not write secrets to a disk.
//!
//! May not live here: wiping secrets (`zeroize`, `portcullis_protocol::Secret`).

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// What is left out of a core (core(5)): everything. In hexadecimal.
const NOTHING: &str = "0";
const FILTER: &str = "/proc/self/coredump_filter";

/// Sees to it that a crash of this process leaves no core with its memory, whoever started it and whatever
/// collects cores: no core as a file (`RLIMIT_CORE`), none for a collector, which is not bound by that limit
/// (`PR_SET_DUMPABLE`), and nothing in one that is written all the same (`coredump_filter`). With that no
/// process without CAP_SYS_PTRACE reads its memory either (ptrace(2)).
///
/// # Errors
/// What could not be set; the others are.
pub fn keep_out_of_cores() -> Result<(), String> {
    let named = |what: &str, done: io::Result<()>| done.err().map(|error| format!("{what}: {error}"));
    // In this order: who is no root can't write the filter of a process that is not dumpable.
    let failed = [
        named(FILTER, std::fs::write(FILTER, NOTHING)),
        named("RLIMIT_CORE", no_core_file()),
        named("PR_SET_DUMPABLE", stay_undumpable()),
    ];
    let failed: Vec<String> = failed.into_iter().flatten().collect();
    match failed.is_empty() {
        true => Ok(()),
        false => Err(failed.join("; ")),
    }
}

fn no_core_file() -> io::Result<()> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    match setrlimit(Resource::Core, none) {
        // A unit that may set no limits was given this one.
        Err(_) if is_limited() => Ok(()),
        done => done.map_err(Into::into),
    }
}

/// Whether the limit is none at all already (proc_pid_limits(5)).
fn is_limited() -> bool {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let core = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max core file size"));
    core.is_some_and(|core| core.split_whitespace().take(2).eq(["0", "0"]))
}

/// The second of these again: the kernel sets it to `fs.suid_dumpable` whenever a thread changes who it is
/// (PR_SET_DUMPABLE(2const)), and that is 2 where systemd collects cores: dumped, for root.
///
/// # Errors
/// As prctl(2).
pub fn stay_undumpable() -> io::Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{dumpable_behavior, getrlimit};

    #[test]
    fn nothing_of_this_process_goes_into_a_core() {
        keep_out_of_cores().unwrap();
        assert_eq!(dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
        let limit = getrlimit(Resource::Core);
        assert_eq!((limit.current, limit.maximum), (Some(0), Some(0)));
        let filter = std::fs::read_to_string(FILTER).unwrap();
        assert_eq!(u32::from_str_radix(filter.trim(), 16), Ok(0));
        assert!(is_limited());
    }
}
