//! Facts about the host.

use portcullis_protocol::report::{Disk, HostFacts};
use sysinfo::{Disks, MemoryRefreshKind, RefreshKind, System};

/// Uptime, memory, load and disks, as they are now. What the system does not tell is zero or left out.
pub fn facts() -> HostFacts {
    let memory = MemoryRefreshKind::nothing().with_ram();
    let system = System::new_with_specifics(RefreshKind::nothing().with_memory(memory));
    let load = System::load_average().unwrap_or_default();
    let disks = Disks::new_with_refreshed_list();
    HostFacts {
        uptime_s: System::uptime().unwrap_or_default(),
        memory_bytes: system.map_or(0, |system| system.total_memory()),
        load: [load.one, load.five, load.fifteen],
        disks: disks
            .iter()
            .flatten()
            .map(|disk| Disk {
                mount: disk.mount_point().display().to_string(),
                total_bytes: disk.total_space(),
                available_bytes: disk.available_space(),
            })
            .collect(),
    }
}
