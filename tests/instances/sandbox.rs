//! What the daemon may do on an instance, and what becomes of one that hangs.
//!
//! May not live here: the front's rights (`front.rs`), the text of the units (`lifecycle.rs`).

use portcullis_provision::reach::{Reached, Transport};

use crate::lab::{Lab, Machine, READY_TIME, eventually, vantage};

/// CAP_DAC_READ_SEARCH, CAP_SETGID, CAP_SETUID and CAP_NET_ADMIN (linux/capability.h).
const CAPABILITIES: u64 = 1 << 2 | 1 << 6 | 1 << 7 | 1 << 12;

/// Each line: what is tried, and how. Root succeeds with all of it, or the test would prove nothing.
const TRIES: [(&str, &str); 11] = [
    ("change an owner", "chown 12345 /run/probe.own"),
    ("take a file over by its mode", "chmod 0777 /run/probe.other"),
    ("write programs", "touch /usr/bin/probe"),
    ("write settings of the system", "touch /etc/probe"),
    ("write what boots", "touch /boot/probe"),
    ("list kernel modules", "test -n \"$(ls -A /usr/lib/modules)\""),
    ("write kernel settings", "echo 1 >/proc/sys/net/ipv4/ip_forward"),
    ("make a namespace", "unshare --net true"),
    ("mount", "mount -t tmpfs none /mnt"),
    ("make a device", "mknod /run/probe.node c 1 3"),
    (
        "send raw frames",
        "python3 -c 'import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)'",
    ),
];

/// The names of what succeeds, run by root or as a unit with the daemon's own sandbox.
fn successes(machine: &Machine, run: &str) -> Vec<String> {
    machine.ok("rm -f /run/probe.node /run/probe.out /usr/bin/probe /etc/probe /boot/probe; umount /mnt 2>/dev/null; \
        echo 0 >/proc/sys/net/ipv4/ip_forward; mkdir -p /usr/lib/modules/probe; \
        touch /run/probe.own /run/probe.other; chown 0 /run/probe.own; chown 54321 /run/probe.other");
    machine.ok(run);
    let out = machine.ok("cat /run/probe.out");
    assert_eq!(out.lines().last(), Some("done"), "{out}");
    let lines = out
        .lines()
        .filter_map(|line| line.strip_prefix("could ").map(str::to_owned));
    lines.collect()
}

#[test]
fn the_daemon_has_the_rights_that_are_written_down_and_no_others() {
    let lab = Lab::new();
    let machine = lab.launch();
    let status = machine.ok(&format!("cat /proc/{}/status", machine.main_pid()));
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().to_owned()
    };
    let set = |name: &str| u64::from_str_radix(&field(name), 16).unwrap();
    for name in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(set(name), CAPABILITIES, "{name}");
    }
    assert_eq!((set("CapInh:"), set("CapAmb:")), (0, 0));
    assert_eq!(
        (field("NoNewPrivs:"), field("Seccomp:")),
        ("1".into(), "2".into())
    );

    let mut script = "exec >/run/probe.out 2>&1\n".to_owned();
    for (name, attempt) in TRIES {
        script += &format!("if ( {attempt} ); then echo 'could {name}'; fi\n");
    }
    script += "test -r /var/lib/portcullis/tls.key && echo 'could read its state'\n";
    script += "touch /var/lib/portcullis/probe && echo 'could write its state'\necho done\n";
    machine.run_with("cat >/run/probe.sh", script.as_bytes());
    let mut all: Vec<&str> = TRIES.iter().map(|(name, _)| *name).collect();
    all.extend(["read its state", "write its state"]);
    assert_eq!(successes(&machine, "sh /run/probe.sh"), all, "as root");

    // The daemon's unit, with the script in the program's place.
    machine.ok("sed -e 's|^ExecStart=.*|ExecStart=/bin/sh /run/probe.sh|' -e 's/^Type=.*/Type=oneshot/' \
        -e '/^Restart/d; /^WatchdogSec/d; /^Wants/d; /^After=portcullis/d; /^RuntimeDirectory/d' \
        $(systemctl show -P FragmentPath portcullis) >/run/systemd/system/probe.service && systemctl daemon-reload");
    let can = successes(&machine, "systemctl start probe");
    assert_eq!(
        can,
        ["read its state", "write its state"],
        "in the daemon's sandbox"
    );
}

#[test]
fn a_daemon_that_hangs_is_started_again_by_its_watchdog_and_the_gate_holds() {
    let lab = Lab::new();
    let machine = lab.launch();
    let stranger = lab.stranger();
    assert_eq!(machine.unit("portcullis", "WatchdogUSec"), "3min");
    machine.ok("mkdir -p /run/systemd/system/portcullis.service.d \
        && printf '[Service]\\nWatchdogSec=3\\n' >/run/systemd/system/portcullis.service.d/soon.conf \
        && systemctl daemon-reload && systemctl restart portcullis");
    machine.until_ready();
    let (pid, table) = (machine.main_pid(), machine.table());
    machine.ok(&format!("kill -STOP {pid}"));
    eventually(READY_TIME, "systemd ends it", || {
        let entries = machine.run("journalctl -b -u portcullis -o cat").stdout;
        if entries.contains("Watchdog timeout") {
            Ok(())
        } else {
            Err(entries)
        }
    });
    assert_eq!(machine.table(), table);
    let from = vantage(&stranger);
    assert_eq!(
        machine.seen_from(&from, Transport::Tcp, 22),
        [Reached::Open; 2],
        "what a rule names"
    );
    assert_eq!(
        machine.seen_from(&from, Transport::Tcp, 81),
        [Reached::Filtered; 2],
        "what no rule names"
    );
    eventually(READY_TIME, "another daemon", || match machine.main_pid() {
        0 => Err(0),
        now if now == pid => Err(now),
        _ => Ok(()),
    });
    machine.until_ready();
    assert_eq!(machine.table(), table);
}
