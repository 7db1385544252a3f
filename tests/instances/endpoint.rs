//! The HTTPS endpoint of an instance, asked by other programs than ours: curl and openssl.
//!
//! May not live here: what a report says.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use portcullis_protocol::Report;
use portcullis_provision::ca::{Ca, ClientCertificate, DEFAULT_LIFETIME};
use portcullis_provision::local::{AGENT_PORT, Output, in_namespace};
use portcullis_provision::reach::{Reached, Transport};

use crate::lab::{Lab, Machine, Run, SOON, allow, eventually, inside, vantage};

use Reached::{Filtered, Open};

/// What curl got: the HTTP status, the content type, the body.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub kind: String,
    pub body: String,
}

/// Asks an instance's endpoint, whatever certificate it shows.
pub fn curl(namespace: &Path, machine: &Machine, path: &str, options: &[&str]) -> Result<Answer, Output> {
    let mut command = inside(namespace, "curl");
    command
        .args(["-sSk", "--max-time", "8", "-w", "\n%{http_code} %{content_type}"])
        .args(options)
        .arg(format!("https://{}:{AGENT_PORT}{path}", machine.v4()));
    let output = command.output_text();
    if !output.success() {
        return Err(output);
    }
    let (body, last) = output.stdout.rsplit_once('\n').unwrap();
    let (status, kind) = last.split_once(' ').unwrap();
    Ok(Answer {
        status: status.parse().unwrap(),
        kind: kind.to_owned(),
        body: body.to_owned(),
    })
}

/// A client certificate in files, as curl wants it.
pub fn files(lab: &Lab, name: &str, certificate: &ClientCertificate) -> [PathBuf; 2] {
    let files = [lab.path(&format!("{name}.pem")), lab.path(&format!("{name}.key"))];
    std::fs::write(&files[0], &certificate.certificate_pem).unwrap();
    std::fs::write(&files[1], &certificate.key_pem).unwrap();
    files
}

/// curl's options for it.
pub fn with_certificate(files: &[PathBuf; 2]) -> [&str; 4] {
    [
        "--cert",
        files[0].to_str().unwrap(),
        "--key",
        files[1].to_str().unwrap(),
    ]
}

#[test]
fn anybody_let_in_may_ask_for_readiness_and_only_the_control_plane_for_the_report() {
    let lab = Lab::new();
    let machine = lab.launch();
    let beside = lab.provider.network().path();
    let get = |path: &str, options: &[&str]| curl(&beside, &machine, path, options);
    for version in [
        ["--tlsv1.3", "--tls-max", "1.3"],
        ["--tlsv1.2", "--tls-max", "1.2"],
    ] {
        for path in ["/livez", "/readyz"] {
            let answer = get(path, &version).unwrap();
            assert_eq!(
                (answer.status, answer.body.as_str()),
                (200, "ok"),
                "{path} {version:?}"
            );
        }
    }
    // The end of the boot may change a check between the two questions; then both are asked again.
    eventually(SOON, "the checks that the report has", || {
        let verbose = get("/readyz?verbose", &[]).unwrap().body;
        let lines = machine.status().checks;
        let lines = lines
            .iter()
            .map(|check| format!("{} {}\n", check.id, check.status));
        match lines.into_iter().find(|line| !verbose.contains(line)) {
            Some(line) => Err(format!("{line} {verbose}")),
            None => Ok(()),
        }
    });

    let refused = get("/v1/health", &[]).unwrap();
    assert_eq!(
        (refused.status, refused.kind.as_str()),
        (403, "application/problem+json")
    );
    let absent = get("/no/such/path", &[]).unwrap();
    assert_eq!(
        (absent.status, absent.kind.as_str()),
        (404, "application/problem+json")
    );
    let problem: serde_json::Value = serde_json::from_str(&absent.body).unwrap();
    assert_eq!(problem["status"], 404);
    assert_eq!(get("/livez", &["-X", "DELETE"]).unwrap().status, 405);

    let right = files(&lab, "right", &lab.provider.client_certificate().unwrap());
    for version in ["1.3", "1.2"] {
        let mut options = with_certificate(&right).to_vec();
        options.extend(["--tls-max", version]);
        let answer = get("/v1/health", &options).unwrap();
        let report: Report = serde_json::from_str(&answer.body).unwrap();
        assert_eq!(
            (report.instance.id.as_str(), report.ready),
            (machine.instance.id(), true)
        );
    }
    let other = Ca::open_or_init(&lab.path("other-ca")).unwrap();
    let wrong = files(
        &lab,
        "wrong",
        &other.issue("control-plane", DEFAULT_LIFETIME).unwrap(),
    );
    for path in ["/v1/health", "/livez"] {
        let failed = get(path, &with_certificate(&wrong)).unwrap_err();
        assert!(failed.stderr.contains("alert"), "{failed:?}");
    }

    // Not ready is said with a status that load balancers understand.
    machine.ok("systemctl stop ssh");
    let answer = eventually(SOON, "503", || {
        let answer = get("/readyz", &[]).unwrap();
        if answer.status == 503 {
            Ok(answer)
        } else {
            Err(answer)
        }
    });
    assert!(
        answer.body.lines().any(|line| line == "sshd.running"),
        "{answer:?}"
    );
    assert_eq!(get("/livez", &[]).unwrap().status, 200);
}

#[test]
fn old_tls_is_refused() {
    let lab = Lab::new();
    let machine = lab.launch();
    let connect = |version: &str| {
        lab.beside("openssl")
            .args([
                "s_client",
                "-brief",
                version,
                "-cipher",
                "ALL:@SECLEVEL=0",
                "-connect",
            ])
            .arg(format!("{}:{AGENT_PORT}", machine.v4()))
            .output_text()
    };
    for version in ["-tls1", "-tls1_1"] {
        let output = connect(version);
        // It is the agent that says no, not this openssl.
        assert!(
            !output.success() && output.stderr.contains("SSL alert number"),
            "{output:?}"
        );
    }
    let output = connect("-tls1_2");
    assert!(
        output.success() && output.stderr.contains("TLSv1.2"),
        "{output:?}"
    );
}

#[test]
fn a_stranger_reaches_the_endpoint_only_by_a_rule() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let stranger = lab.stranger();
    let seen = |machine: &Machine| machine.seen_from(&vantage(&stranger), Transport::Tcp, AGENT_PORT);
    assert_eq!(seen(&machine), [Filtered; 2]);
    machine.push(|spec| spec.firewall.ingress.push(allow("7443/tcp")));
    assert_eq!(seen(&machine), [Open; 2]);
    let answer = curl(&stranger.path(), &machine, "/livez", &[]).unwrap();
    assert_eq!(answer.status, 200);
    let answer = curl(&stranger.path(), &machine, "/v1/health", &[]).unwrap();
    assert_eq!(answer.status, 403);
}

/// The resident memory of the daemon and of its front, in KiB.
fn memory(machine: &Machine) -> u64 {
    let pids = [
        machine.main_pid().to_string(),
        machine.unit("portcullis-front", "MainPID"),
    ];
    let of = |pid: &String| {
        let text = machine.ok(&format!("awk '/^VmRSS:/ {{print $2}}' /proc/{pid}/status"));
        text.parse::<u64>().unwrap()
    };
    pids.iter().map(of).sum()
}

#[test]
fn garbage_huge_headers_and_idle_connections_do_no_harm() {
    let lab = Lab::new();
    let machine = lab.launch();
    let pids = || (machine.main_pid(), machine.unit("portcullis-front", "MainPID"));
    let before_all = pids();
    let beside = lab.provider.network().path();
    let address = SocketAddr::new(machine.v4(), AGENT_PORT);
    let dial = || {
        let connect = || TcpStream::connect_timeout(&address, Duration::from_millis(500));
        in_namespace(&beside, connect).unwrap()
    };
    let answers = || {
        eventually(SOON, "it answers", || {
            match curl(&beside, &machine, "/livez", &[]) {
                Ok(answer) if answer.status == 200 => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
    };
    answers();
    let before = memory(&machine);
    for garbage in [
        b"\0".repeat(70_000),
        b"\x16\x03\x01\xff\xff".repeat(9_000),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
    ] {
        // The agent may hang up while we still talk.
        let _ = dial().unwrap().write_all(&garbage);
        answers();
    }

    let header = lab.path("header");
    std::fs::write(&header, format!("x: {}\n", "y".repeat(200_000))).unwrap();
    let option = format!("@{}", header.display());
    let huge = curl(&beside, &machine, "/livez", &["-H", &option]);
    assert!(
        huge.as_ref().map_or(true, |answer| answer.status >= 400),
        "{huge:?}"
    );
    answers();

    // Well-formed headers without end, as fast as they are taken, over TLS.
    let mut endless = slow_client(&lab, &address);
    let mut stdin = endless.stdin.take().unwrap();
    let _ = stdin.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n");
    for number in 0..20_000 {
        if stdin.write_all(format!("x{number}: y\r\n").as_bytes()).is_err() {
            break;
        }
    }
    drop(stdin);
    let _ = endless.kill();
    let _ = endless.wait();
    answers();

    // More than are served at once; the kernel takes some more into its queue, and no more.
    let mut idle: Vec<TcpStream> = Vec::new();
    while idle.len() < 300
        && let Ok(connection) = dial()
    {
        idle.push(connection);
    }
    assert!(idle.len() > 128, "{}", idle.len());
    assert!(machine.status().ready, "it goes on with its work");
    let during = memory(&machine);
    let count = idle.len();
    drop(idle);
    answers();
    println!("resident: {before} KiB, with {count} idle connections {during} KiB");
    assert!(during < before + 16 * 1024, "{before} KiB, then {during} KiB");
    assert_eq!(pids(), before_all);
}

/// An openssl that sends what it is given.
fn slow_client(lab: &Lab, address: &SocketAddr) -> std::process::Child {
    let mut command: Command = lab.beside("openssl");
    command
        .args(["s_client", "-quiet", "-connect"])
        .arg(address.to_string());
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn().unwrap()
}

/// A connection from before the change shows nothing about whether one gets in after it.
#[test]
fn the_control_plane_confirms_a_change_over_a_connection_that_is_newer() {
    let lab = Lab::new();
    let machine = lab.launch();
    let beside = lab.provider.network().path();
    let certificate = files(&lab, "right", &lab.provider.client_certificate().unwrap());
    let address = format!("{}:{AGENT_PORT}", machine.v4());
    let mut old = inside(&beside, "openssl")
        .args(["s_client", "-quiet", "-connect", &address])
        .args([
            "-cert",
            certificate[0].to_str().unwrap(),
            "-key",
            certificate[1].to_str().unwrap(),
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (mut ask, mut answers) = (
        old.stdin.take().unwrap(),
        BufReader::new(old.stdout.take().unwrap()),
    );
    let mut status = |request: &str| {
        write!(ask, "{request} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        loop {
            let mut line = String::new();
            assert!(answers.read_line(&mut line).unwrap() > 0, "it hung up");
            // A body before it may have no line end.
            if let Some((_, status)) = line.split_once("HTTP/1.1 ") {
                return status[..3].to_owned();
            }
        }
    };
    assert_eq!(
        status("GET /livez"),
        "200",
        "the old connection is there before the change"
    );
    let spec = machine.next(|spec| spec.firewall.ingress.push(allow("9000/tcp")));
    let applied = machine.run_with("portcullis apply --spec - --confirm 60s", &spec.to_json());
    assert!(applied.success(), "{applied:?}");
    let path = format!("/v1/confirm/{}", spec.generation);
    assert_eq!(status(&format!("POST {path}")), "409", "over the old connection");
    old.kill().unwrap();
    old.wait().unwrap();

    let post = |path: &str, options: &[&str]| {
        let options: Vec<&str> = ["-X", "POST"].iter().chain(options).copied().collect();
        curl(&beside, &machine, path, &options).unwrap().status
    };
    let with = with_certificate(&certificate);
    assert_eq!(post(&path, &[]), 403, "without a certificate");
    assert_eq!(post("/v1/confirm/99", &with), 409);
    assert_eq!(post("/v1/confirm/soon", &with), 400);
    machine.ok("test -e /var/lib/portcullis/trial.json");
    assert_eq!(post(&path, &with), 200);
    machine.ok("! test -e /var/lib/portcullis/trial.json");
    assert_eq!(post(&path, &with), 409, "once is enough");
}
