//! The process that speaks to the network: what it may do, what it may say, and what is left when it, or the
//! daemon, dies.
//!
//! May not live here: what the endpoint serves (`endpoint`, `api`), what is pushed (`push`).

use base64::Engine as _;
use portcullis::channel::MAX_FROM_FRONT;
use portcullis_protocol::{CheckId, Status};
use portcullis_provision::ca::{Ca, DEFAULT_LIFETIME};
use portcullis_provision::local::Output;
use serde_json::{Value, json};

use crate::endpoint::{curl, files, with_certificate};
use crate::lab::{Lab, Machine, READY_TIME, SOON, eventually};

const UNIT: &str = "portcullis-front";

/// Says what it is given to the daemon on the front's socket; prints the first answer, or that the channel
/// was closed.
const PRETENDER: &str = r#"
import socket, sys
said = sys.stdin.buffer.read()
channel = socket.socket(socket.AF_UNIX)
channel.settimeout(40)
try:
    channel.connect("/run/portcullis/front.sock")
except PermissionError:
    sys.exit("not permitted")
try:
    channel.sendall(said)
    for line in channel.makefile("rb"):
        if line.startswith(b'{"answer"'):
            print(line.decode(), end="")
            sys.exit()
except (BrokenPipeError, ConnectionResetError):
    pass
print("closed")
"#;

fn front_pid(machine: &Machine) -> String {
    machine.unit(UNIT, "MainPID")
}

/// What a process of a user hears who pretends to be the front.
fn pretend(machine: &Machine, user: &str, said: &[u8]) -> Output {
    machine.run_with(
        &format!("setpriv --reuid {user} --regid \"$(id -g {user})\" --clear-groups python3 /usr/local/lib/pretender.py"),
        said,
    )
}

fn call(request: &Value, chain: &[Vec<u8>]) -> Vec<u8> {
    let remote = json!({"since": {"secs": 1, "nanos": 0}, "address": "192.0.2.9:4711", "chain": chain});
    let call = json!({"call": {"id": 1, "request": request, "remote": remote}});
    format!("{call}\n").into_bytes()
}

fn der(pem: &str) -> Vec<Vec<u8>> {
    let body: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    vec![base64::engine::general_purpose::STANDARD.decode(body).unwrap()]
}

/// The endpoint answers with this status.
#[track_caller]
fn until_readyz(lab: &Lab, machine: &Machine, status: u16) -> String {
    let beside = lab.provider.network().path();
    eventually(READY_TIME, &format!("/readyz is {status}"), || {
        match curl(&beside, machine, "/readyz", &[]) {
            Ok(answer) if answer.status == status => Ok(answer.body),
            other => Err(format!("{other:?}")),
        }
    })
}

#[test]
fn the_front_has_no_rights_and_sees_no_secrets() {
    let lab = Lab::new();
    let machine = lab.launch();
    let pid = front_pid(&machine);
    let user = machine.ok("id -u portcullis");
    let status = machine.ok(&format!("cat /proc/{pid}/status"));
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(field("Uid:"), vec![user.clone(); 4]);
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    assert_eq!(
        (field("NoNewPrivs:"), field("Seccomp:")),
        (vec!["1".into()], vec!["2".into()])
    );
    assert_eq!(field("Groups:"), [machine.ok("id -g portcullis")]);
    // Who listens is the front, and the daemon does not.
    let listens = machine.ok("ss -Hltnp 'sport = :7443'");
    assert!(listens.contains(&format!("pid={pid},")), "{listens}");
    assert!(
        !listens.contains(&format!("pid={},", machine.main_pid())),
        "{listens}"
    );

    let as_front = |script: &str| {
        machine.run(&format!(
            "setpriv --reuid portcullis --regid portcullis --clear-groups {script}"
        ))
    };
    assert!(
        as_front("cat /etc/portcullis/portcullis.toml").success(),
        "it can read at all"
    );
    for secret in [
        "ls /var/lib/portcullis",
        "cat /var/lib/portcullis/tls.key",
        "cat /etc/portcullis/spec.json",
        "ls /run/portcullis",
        "portcullis status",
        "nft list ruleset",
    ] {
        assert!(machine.run(secret).success(), "{secret} as root");
        assert!(!as_front(secret).success(), "{secret}");
    }
    // A process of the same user can't look into its memory, where the TLS key is.
    assert!(!as_front(&format!("head -c 1 /proc/{pid}/environ")).success());
    let root = machine.run("portcullis front");
    assert!(
        root.code == Some(3) && root.stderr.contains("without rights"),
        "{root:?}"
    );

    let exposure = machine.ok(&format!("systemd-analyze security --no-pager {UNIT}.service"));
    let line = exposure
        .lines()
        .find(|line| line.contains("Overall exposure level"))
        .unwrap();
    println!("{line}");
    let score: f64 = line
        .rsplit_once(": ")
        .unwrap()
        .1
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert!(score <= 2.0, "{exposure}");
    let verified = machine.run(&format!("systemd-analyze verify --man=no {UNIT}.service"));
    assert!(verified.success() && verified.stderr.is_empty(), "{verified:?}");
    for pid in [pid, machine.main_pid().to_string()] {
        println!(
            "PSS of {pid}: {}",
            machine.ok(&format!("grep ^Pss: /proc/{pid}/smaps_rollup"))
        );
    }
}

#[test]
fn each_process_outlives_the_other() {
    let lab = Lab::new();
    let machine = lab.launch();
    until_readyz(&lab, &machine, 200);
    let (daemon, table) = (machine.main_pid(), machine.table());
    let front = front_pid(&machine);
    machine.ok(&format!("kill -9 {front}"));
    eventually(SOON, "another front", || {
        let now = front_pid(&machine);
        if now != "0" && now != front {
            Ok(())
        } else {
            Err(now)
        }
    });
    until_readyz(&lab, &machine, 200);
    assert_eq!((machine.main_pid(), machine.table()), (daemon, table.clone()));
    machine.until_check(CheckId::TransitTls, Status::Pass);

    // Long enough to be seen.
    machine.ok("mkdir -p /run/systemd/system/portcullis.service.d
        printf '[Service]\\nRestartSec=6\\n' > /run/systemd/system/portcullis.service.d/test.conf
        systemctl daemon-reload");
    machine.ok(&format!("kill -9 {daemon}"));
    assert_eq!(until_readyz(&lab, &machine, 503), "the agent is not there\n");
    let beside = lab.provider.network().path();
    assert_eq!(curl(&beside, &machine, "/livez", &[]).unwrap().status, 200);
    assert_eq!(machine.table(), table);
    until_readyz(&lab, &machine, 200);
    assert_ne!(machine.main_pid(), daemon);
}

#[test]
fn the_channel_believes_nobody() {
    let lab = Lab::new();
    let machine = lab.launch();
    let daemon = machine.main_pid();
    machine.run_with("cat > /usr/local/lib/pretender.py", PRETENDER.as_bytes());
    let other = Ca::open_or_init(&lab.path("other-ca")).unwrap();
    let right = lab.provider.client_certificate().unwrap();
    let right = der(&right.certificate_pem);
    let forged = der(&other
        .issue("control-plane", DEFAULT_LIFETIME)
        .unwrap()
        .certificate_pem);
    let status = json!({"request": "status"});
    // The real one would take its place again at once.
    machine.ok(&format!("systemctl stop {UNIT}"));

    let heard = pretend(&machine, "portcullis", &call(&status, &right));
    assert!(
        heard.stdout.contains(r#""answer":"report""#),
        "the front's own user is heard: {heard:?}"
    );
    // By the file's mode, and by the kernel's word where the mode says nothing.
    let stranger = pretend(&machine, "nobody", &call(&status, &right));
    assert!(stranger.stderr.contains("not permitted"), "{stranger:?}");
    machine.ok("chmod 666 /run/portcullis/front.sock");
    for user in ["nobody", "root"] {
        let stranger = pretend(&machine, user, &call(&status, &right));
        assert_eq!(stranger.stdout.trim(), "closed", "{user}: {stranger:?}");
    }

    for (what, chain) in [
        ("another authority", forged.as_slice()),
        ("none", [].as_slice()),
        ("garbage", [vec![1, 2, 3]].as_slice()),
    ] {
        let heard = pretend(&machine, "portcullis", &call(&status, chain));
        assert!(
            heard.stdout.contains(r#""kind":"not-permitted""#),
            "{what}: {heard:?}"
        );
    }
    let nested =
        json!({"request": "if-generation", "generation": 1, "change": {"request": "trust-host-keys"}});
    for (what, said) in [
        ("no JSON", b"nonsense\n".to_vec()),
        ("nothing that is a message", b"{}\n".to_vec()),
        ("bytes", vec![0xff; 4096]),
        ("too long a message", vec![b' '; MAX_FROM_FRONT + 1]),
        (
            "host's business",
            call(&json!({"request": "trust-host-keys"}), &right),
        ),
        ("host's business within", call(&nested, &right)),
        (
            "a request that there is not",
            call(&json!({"request": "shell"}), &right),
        ),
        ("a long chain", call(&status, &vec![vec![0; 10]; 9])),
    ] {
        let said = if what == "bytes" {
            [said, b"\n".to_vec()].concat()
        } else {
            said
        };
        let heard = pretend(&machine, "portcullis", &said);
        assert_eq!(heard.stdout.trim(), "closed", "{what}: {heard:?}");
    }
    assert_eq!(machine.main_pid(), daemon, "it lives");
    machine.ok(&format!("systemctl start {UNIT}"));
    until_readyz(&lab, &machine, 200);
    let certificate = files(&lab, "right", &lab.provider.client_certificate().unwrap());
    let beside = lab.provider.network().path();
    let answer = curl(&beside, &machine, "/v1/health", &with_certificate(&certificate)).unwrap();
    assert_eq!(answer.status, 200);
}
