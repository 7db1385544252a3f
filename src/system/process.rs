//! What this process takes of the host.
//!
//! May not live here: other processes (`callers`), the host as a whole (`host`).

use sysinfo::{ProcessRefreshKind, ProcessesToUpdate, System, get_current_pid};

use crate::policy::observation::Observed;

/// What this process takes, now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Process {
    /// Time on processors since its start, in user and kernel mode, in seconds.
    pub cpu_seconds: f64,
    /// Resident memory, in bytes.
    pub resident_bytes: u64,
    /// Address space, in bytes.
    pub virtual_bytes: u64,
    /// When it was started: seconds since 1970, by the clock as it is now.
    pub start_time: u64,
    /// Open descriptors, if the kernel tells.
    pub open_files: Option<usize>,
    /// Most descriptors that it may open, if the kernel tells.
    pub open_files_limit: Option<usize>,
}

/// Looks at this process; proc_pid_stat(5).
///
/// # Errors
/// When /proc does not tell.
pub fn observe() -> Observed<Process> {
    let pid = get_current_pid().map_err(|e| e.to_string())?;
    let mut system = System::new().map_err(|e| e.to_string())?;
    let wanted = ProcessRefreshKind::nothing()
        .with_cpu()
        .with_memory()
        .without_tasks();
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[pid]), false, wanted);
    let process = system.process(pid).ok_or("/proc does not tell of this process")?;
    Ok(Process {
        cpu_seconds: process.accumulated_cpu_time() as f64 / 1000.0,
        resident_bytes: process.memory(),
        virtual_bytes: process.virtual_memory(),
        start_time: process.start_time(),
        open_files: process.open_files(),
        open_files_limit: process.open_files_limit(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_this_process() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let seen = observe().unwrap();
        drop(file);
        assert!(seen.resident_bytes > 100_000, "{seen:?}");
        assert!(seen.virtual_bytes > seen.resident_bytes, "{seen:?}");
        assert!(seen.open_files >= Some(4), "{seen:?}");
        assert!(seen.open_files_limit > seen.open_files, "{seen:?}");
        let now = jiff::Timestamp::now().as_second() as u64;
        assert!(
            (now - 86_400..=now + 1).contains(&seen.start_time),
            "{seen:?} {now}"
        );
    }
}
