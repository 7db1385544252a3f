//! The agent as a program of a system: units, journal, package, background, and what it costs.
//!
//! May not live here: what it enforces.

use std::time::Duration;

use serde_json::Value;

use crate::lab::{Lab, Machine, SOON, eventually};

/// Fields of a process's `stat` or `status` that are numbers.
fn number(machine: &Machine, script: &str) -> u64 {
    let text = machine.ok(script);
    text.parse().unwrap_or_else(|e| panic!("{script}: {text:?}: {e}"))
}

#[test]
fn without_a_supervisor_it_goes_to_the_background_once() {
    let lab = Lab::new();
    let machine = lab.launch();
    let table = machine.table();
    machine.ok("systemctl stop portcullis");
    let run = "portcullis run --daemonize --pid-file /run/test.pid </dev/null >/run/out 2>&1";
    machine.ok(run);
    let pid = eventually(SOON, "a pid file", || {
        let text = machine.run("cat /run/test.pid").stdout;
        text.trim().parse::<u32>().map_err(|e| format!("{text:?}: {e}"))
    });
    assert_eq!(
        machine.ok(&format!("readlink /proc/{pid}/exe")),
        "/usr/bin/portcullis"
    );
    machine.until_ready();
    assert_eq!(machine.table(), table);

    for second in [
        run,
        "portcullis run --daemonize --pid-file /run/other.pid </dev/null",
        "portcullis run </dev/null",
    ] {
        let output = machine.run(second);
        // One that is in the background already can say so only in the log.
        if !second.contains("other.pid") {
            assert_eq!(
                output.code,
                Some(1),
                "{second}: {output:?} {}",
                machine.ok("cat /run/out")
            );
        }
        eventually(SOON, "one daemon", || {
            let daemons = machine.ok("pgrep -x portcullis");
            if daemons == pid.to_string() {
                Ok(())
            } else {
                Err(daemons)
            }
        });
    }
    assert_eq!(machine.ok("cat /run/test.pid").trim(), pid.to_string());
    assert!(machine.status().ready);
    machine.ok(&format!("kill {pid}"));
    eventually(SOON, "it ended", || {
        if machine.run(&format!("test -d /proc/{pid}")).success() {
            Err("it runs")
        } else {
            Ok(())
        }
    });
    assert_eq!(machine.table(), table);
    machine.ok("systemctl start portcullis");
    machine.until_ready();
}

#[test]
fn the_units_are_sound_and_say_how_it_is() {
    let lab = Lab::new();
    let machine = lab.launch();
    for unit in [
        "portcullis.service",
        "portcullis-front.service",
        "portcullis-lockdown.service",
    ] {
        let output = machine.run(&format!("systemd-analyze verify --man=no {unit}"));
        assert!(output.success(), "{output:?}");
        assert_eq!((output.stdout.trim(), output.stderr.trim()), ("", ""), "{unit}");
        assert_eq!(machine.unit(unit, "ActiveState"), "active");
        // The front is wanted by the daemon, and enabled with it.
        let enabled = if unit.contains("front") {
            "static"
        } else {
            "enabled"
        };
        assert_eq!(machine.unit(unit, "UnitFileState"), enabled, "{unit}");
        let exposure = machine
            .run(&format!("systemd-analyze security --no-pager {unit}"))
            .stdout;
        println!("{unit}: {}", exposure.lines().last().unwrap_or_default());
    }
    let property = |name: &str| machine.unit("portcullis", name);
    assert_eq!(
        (property("Type"), property("NRestarts")),
        ("notify".into(), "0".into())
    );
    assert_eq!(property("StatusText"), "Ready, generation 1");
    assert_ne!(property("WatchdogUSec"), "0");
    machine.ok("systemctl stop ssh");
    eventually(SOON, "systemctl says what blocks", || {
        let text = property("StatusText");
        if text.starts_with("Not ready") && text.contains("sshd.running") {
            Ok(())
        } else {
            Err(text)
        }
    });
}

/// The entries of the daemon's journal with a message id.
fn entries(machine: &Machine, id: &str) -> Vec<Value> {
    let text = machine.ok(&format!("journalctl -b -o json MESSAGE_ID={id}"));
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn micros(entry: &Value) -> u64 {
    entry["__REALTIME_TIMESTAMP"].as_str().unwrap().parse().unwrap()
}

#[test]
fn the_journal_has_a_message_id_for_each_step_to_ready() {
    let lab = Lab::new();
    let machine = lab.launch();
    let accepted = entries(&machine, "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e03");
    assert_eq!(accepted.len(), 1, "{accepted:#?}");
    assert_eq!(accepted[0]["GENERATION"], "1");
    assert_eq!(accepted[0]["SOURCE"], "/etc/portcullis/spec.json");
    assert_eq!(accepted[0]["_SYSTEMD_UNIT"], "portcullis.service");
    let readiness = entries(&machine, "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e0a");
    let ready = readiness.iter().find(|entry| entry["READY"] == "true").unwrap();
    let written = machine
        .ok("stat -c %.6Y /etc/portcullis/spec.json")
        .replace('.', "");
    let written: u64 = written.parse().unwrap();
    // sshd is started again by cloud-init; the first time counts.
    let listening = machine.ok("journalctl -b -u ssh -o json -g 'Server listening' | head -1");
    let listening: Value = serde_json::from_str(&listening).unwrap();
    assert!(
        micros(ready) >= micros(&listening),
        "ready before anybody could log in"
    );
    let seconds = |later: u64, earlier: u64| (later as f64 - earlier as f64) / 1e6;
    println!(
        "spec written to accepted: {:.3} s",
        seconds(micros(&accepted[0]), written)
    );
    println!("spec written to ready: {:.3} s", seconds(micros(ready), written));
    println!(
        "sshd listens to ready: {:.3} s",
        seconds(micros(ready), micros(&listening))
    );
    assert!(micros(ready) >= micros(&accepted[0]));
    // No secret of the spec is in it.
    let all = machine.ok(
        "journalctl -b -o export _SYSTEMD_UNIT=portcullis.service + _SYSTEMD_UNIT=portcullis-front.service",
    );
    let control_plane = machine.spec.control_plane.as_ref().unwrap();
    for secret in [&control_plane.enrolment_token, &control_plane.external_id] {
        assert!(!all.contains(secret.as_ref().unwrap().expose()));
    }
    assert!(all.contains("5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e03"));
}

/// journald may look who said something when its process is gone.
#[test]
fn what_lockdown_says_at_its_end_is_found_by_the_units_name() {
    let lab = Lab::new();
    let machine = lab.launch();
    machine.ok("printf '[firewall' > /etc/portcullis/conf.d/bad.toml
        systemctl kill -s STOP systemd-journald
        systemctl restart portcullis-lockdown; result=$?
        systemctl kill -s CONT systemd-journald && journalctl --sync && exit $result");
    let told = machine.ok("journalctl -b -u portcullis-lockdown -o verbose --no-pager");
    assert!(told.contains("/etc/portcullis/conf.d/bad.toml"), "{told}");
}

#[test]
fn a_purge_leaves_nothing() {
    let lab = Lab::new();
    let machine = lab.launch();
    let find = "find / -xdev -path /proc -prune -o -path /sys -prune -o -path /run/systemd -prune -o -name '*portcullis*' -print";
    let before = machine.ok(find);
    for path in ["/usr/bin/portcullis", "/etc/portcullis", "/var/lib/portcullis"] {
        assert!(before.lines().any(|line| line == path), "{path} of {before}");
    }
    let files = machine.ok("dpkg -L portcullis");
    machine.table();
    let output = machine.run("DEBIAN_FRONTEND=noninteractive dpkg --purge portcullis 2>&1");
    assert!(output.success(), "{output:?}");
    assert_eq!(machine.ok(find), "");
    let left = machine.ok(&format!(
        "for f in {}; do test -d $f || test ! -e $f || echo $f; done",
        files.replace('\n', " ")
    ));
    assert_eq!(left, "");
    assert!(!machine.run("nft list table inet portcullis").success());
    for unit in ["portcullis", "portcullis-front", "portcullis-lockdown"] {
        assert!(!machine.run(&format!("systemctl cat {unit}")).success(), "{unit}");
        assert_ne!(machine.unit(unit, "ActiveState"), "active");
    }
    assert!(!machine.run("pgrep -x portcullis").success());
    // It boots without it, and whoever could log in still can.
    let keys = machine.ok("cat ~ubuntu/.ssh/authorized_keys");
    assert!(keys.contains(&lab.public_key("id").to_line()), "{keys}");
}

#[test]
fn an_idle_daemon_does_nothing() {
    let lab = Lab::new();
    let machine = lab.launch();
    let pid = machine.main_pid();
    let ticks = || number(&machine, &format!("awk '{{print $14+$15}}' /proc/{pid}/stat"));
    // Boot's last jobs, and threads that outlive their work for a while.
    eventually(Duration::from_secs(30), "quiet with two threads", || {
        let before = ticks();
        std::thread::sleep(Duration::from_secs(2));
        let threads = number(
            &machine,
            &format!("awk '/^Threads:/ {{print $2}}' /proc/{pid}/status"),
        );
        // The loop's and the gate's.
        if (ticks(), threads) == (before, 2) {
            Ok(())
        } else {
            Err((threads, ticks() - before))
        }
    });
    // The time is what is measured: nothing to wait for.
    let before = ticks();
    std::thread::sleep(Duration::from_secs(10));
    let used = ticks() - before;
    assert!(used <= 1, "{used} ticks in 10 s without work");
    let pss = number(
        &machine,
        &format!("awk '/^Pss:/ {{print $2}}' /proc/{pid}/smaps_rollup"),
    );
    println!("idle: {used} ticks in 10 s, PSS {pss} KiB, CPU since start {before} ticks");
    assert!(pss < 32 * 1024, "PSS {pss} KiB");
    assert_eq!(machine.main_pid(), pid);
}
