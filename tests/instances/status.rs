//! `portcullis status`, as an operator sees it in an incident.
//!
//! May not live here: what the checks say of sshd and the gate.

use portcullis_protocol::{CheckId, Report, Status};
use serde_json::Value;

use crate::lab::{Lab, Machine, READY_TIME, SOON, eventually};

/// Starts something inside that goes on, and whose output is kept in `/run/NAME`.
fn starts(machine: &Machine, name: &str, command: &str) {
    machine.ok(&format!(
        "nohup {command} </dev/null >/run/{name} 2>&1 & echo $! >/run/{name}.pid"
    ));
}

/// Waits until that has said something that a look finds.
#[track_caller]
fn until_said<T>(machine: &Machine, name: &str, what: &str, mut look: impl FnMut(&str) -> Option<T>) -> T {
    eventually(READY_TIME, what, || {
        let said = machine.run(&format!("cat /run/{name}")).stdout;
        look(&said).ok_or(said)
    })
}

/// One a line; the last line may not be whole yet.
fn documents(said: &str) -> Vec<Value> {
    let whole = said.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    whole.map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What was said since the last time that a line began with that word.
fn since<'a>(said: &'a str, word: &str) -> Option<&'a str> {
    said.rfind(&format!("\n{word}")).map(|at| &said[at + 1..])
}

#[test]
fn watching_tells_each_change_by_itself() {
    let lab = Lab::new();
    let machine = lab.launch();
    starts(&machine, "text", "portcullis status --watch");
    starts(&machine, "json", "portcullis status --watch --format json");
    until_said(&machine, "text", "ready at first", |said| {
        said.starts_with("READY").then_some(())
    });
    let first = until_said(&machine, "json", "a first document", |said| documents(said).pop());
    let first: Report = serde_json::from_value(first).unwrap();
    assert!(first.ready);

    machine.ok("systemctl stop ssh");
    until_said(&machine, "text", "sshd's end", |said| {
        let incident = since(said, "NOT READY")?;
        let words = [
            "sshd.running (BREV-SSH-1): ",
            "to do: ",
            "lets in   rule ",
            "Passing (",
        ];
        words.iter().all(|words| incident.contains(words)).then_some(())
    });
    until_said(&machine, "json", "sshd's end", |said| {
        let last: Report = serde_json::from_value(documents(said).pop()?).ok()?;
        (last.check(CheckId::SshdRunning)?.status == Status::Fail).then_some(())
    });

    machine.ok("systemctl start ssh");
    until_said(&machine, "text", "ready again", |said| {
        since(said, "NOT READY")?.contains("\nREADY").then_some(())
    });
    // A document is one change: nothing is said twice in a row.
    let told = documents(&machine.run("cat /run/json").stdout);
    let news = |document: &Value| {
        let mut document = document.clone();
        for same in ["time", "host"] {
            document.as_object_mut().unwrap().remove(same);
        }
        document
    };
    assert!(told.windows(2).all(|pair| news(&pair[0]) != news(&pair[1])));

    // A new generation with nothing else to tell is a change too.
    machine.ok("portcullis firewall add --id web --protocol tcp --port 8080");
    until_said(&machine, "text", "the rule", |said| {
        said.contains("rule web: 8080/tcp from anywhere").then_some(())
    });
    // Who stops looking is no burden: the daemon lets go.
    let clients = "ss -xH | grep -c ' /run/portcullis/control.sock ' || [ $? = 1 ]";
    assert_eq!(machine.ok(clients), "2");
    machine.ok("kill $(cat /run/text.pid) $(cat /run/json.pid)");
    eventually(SOON, "nobody is followed", || {
        match machine.ok(clients).as_str() {
            "0" => Ok(()),
            count => Err(count.to_owned()),
        }
    });
}

#[test]
fn without_a_daemon_it_says_so_and_what_the_kernel_holds() {
    let lab = Lab::new();
    let machine = lab.launch();
    let ready = machine.run("portcullis status");
    assert!(
        ready.success() && ready.stdout.starts_with("READY  since "),
        "{ready:?}"
    );
    starts(&machine, "text", "portcullis status --watch");
    starts(&machine, "json", "portcullis status --watch --format json");
    until_said(&machine, "text", "ready", |said| {
        said.contains("READY").then_some(())
    });
    until_said(&machine, "json", "ready", |said| (!said.is_empty()).then_some(()));

    machine.ok("systemctl stop portcullis");
    let said = machine.run("portcullis status");
    assert_eq!((said.code, said.stderr.as_str()), (Some(1), ""), "{said:?}");
    for words in [
        "NO DAEMON",
        "portcullis.service is inactive (dead) since ",
        &format!("{}, generation 1 (from disk)", machine.instance.id()),
        "systemctl start portcullis",
        "journalctl -u portcullis",
        "firewall.default-deny  what no rule lets in is dropped",
    ] {
        assert!(said.stdout.contains(words), "{words}: {}", said.stdout);
    }
    assert!(!said.stdout.contains("FAIL"), "{}", said.stdout);
    let json: Value = serde_json::from_str(&machine.run("portcullis status --format json").stdout).unwrap();
    assert_eq!(
        (&json["ready"], &json["unit"]["active"], &json["generation"]),
        (&false.into(), &"inactive".into(), &1.into()),
        "{json:#}"
    );
    until_said(&machine, "text", "no daemon", |said| {
        said.contains("is inactive (dead)").then_some(())
    });
    until_said(&machine, "json", "no daemon", |said| {
        (documents(said).pop()?["unit"]["active"] == "inactive").then_some(())
    });

    // The kernel is asked each time.
    machine.ok("nft delete table inet portcullis");
    let open = machine.run("portcullis status");
    let words = "FAIL     firewall.applied (BREV-NET-2): the kernel holds no table";
    assert!(open.code == Some(1) && open.stdout.contains(words), "{open:?}");

    machine.ok("systemctl start portcullis");
    until_said(&machine, "text", "the daemon is back", |said| {
        since(said, "NO DAEMON")?.contains("\nREADY").then_some(())
    });
    until_said(&machine, "json", "the daemon is back", |said| {
        (documents(said).pop()?["ready"] == true).then_some(())
    });

    // One that runs and does not answer.
    machine.ok("kill -STOP $(systemctl show -P MainPID portcullis)");
    let silent = machine.run("portcullis status");
    machine.ok("kill -CONT $(systemctl show -P MainPID portcullis)");
    assert_eq!(silent.code, Some(1), "{silent:?}");
    for words in [
        "no answer within 10 s",
        "is active (running)",
        "systemctl restart portcullis",
    ] {
        assert!(silent.stdout.contains(words), "{words}: {silent:?}");
    }
    assert!(machine.run("portcullis status").success());
    let stranger = machine.run("sudo -u nobody portcullis status");
    assert!(
        stranger.code == Some(3) && stranger.stderr.contains("only root"),
        "{stranger:?}"
    );
}

#[test]
fn colours_and_width_are_the_terminals() {
    let lab = Lab::new();
    let machine = lab.launch();
    let on_terminal = |before: &str, what: &str| {
        let line = format!("TERM=xterm script -qec 'stty cols 60 rows 12; {before} {what}' /dev/null");
        machine.run(&line).stdout
    };
    let coloured = on_terminal("", "portcullis status");
    assert!(coloured.contains("\u{1b}["), "{coloured:?}");
    let plain = on_terminal("NO_COLOR=1", "portcullis status");
    assert!(!plain.contains('\u{1b}') && plain.contains("READY"), "{plain:?}");
    // A word that is longer than the page, as a command to paste may be, is not broken.
    let too_wide = |line: &&str| line.trim_end().chars().count() > 60 && line.trim().contains(' ');
    assert_eq!(plain.lines().find(too_wide), None, "{plain}");
    let piped = machine.ok("TERM=xterm portcullis status | cat");
    assert!(!piped.contains('\u{1b}') && !piped.contains('…'), "{piped:?}");
    assert!(piped.lines().any(|line| line.len() > 60), "{piped}");
    // A screen is drawn over, and what does not fit is left out from below.
    let watched = on_terminal("NO_COLOR=1", "timeout 10 portcullis status --watch");
    let screen = watched.rsplit("\u{1b}[H\u{1b}[2J").next().unwrap();
    assert!(watched.contains("\u{1b}[H\u{1b}[2J"), "{watched:?}");
    assert!(
        screen.starts_with("READY") && screen.contains(" more lines"),
        "{screen:?}"
    );
    assert!(screen.trim_end().lines().count() < 12, "{screen:?}");
}
