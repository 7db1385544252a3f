//! Callers that take too much of the HTTPS endpoint: too many, too slow, too large, too often, too strange.
//! Who behaves is answered meanwhile.
//!
//! May not live here: what single limits count (`health::limits`).

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use portcullis_provision::ca::ClientCertificate;
use portcullis_provision::local::{AGENT_PORT, in_namespace};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use crate::common::Over;
use crate::common::anybody::Anybody;
use crate::endpoint::{curl, files, with_certificate};
use crate::lab::{Lab, Machine, allow, eventually};

/// How long deadlines of the endpoint (10 to 30 s) may take to be seen on a loaded machine.
pub const DEADLINES: Duration = Duration::from_secs(120);

pub type Tls = StreamOwned<ClientConnection, TcpStream>;

pub fn dial(from: &Path, address: IpAddr) -> std::io::Result<TcpStream> {
    let address = SocketAddr::new(address, AGENT_PORT);
    let stream = in_namespace(from, || TcpStream::connect_timeout(&address, DEADLINES))??;
    stream.set_read_timeout(Some(DEADLINES))?;
    stream.set_write_timeout(Some(DEADLINES))?;
    Ok(stream)
}

pub fn tls(stream: TcpStream, certificate: Option<&ClientCertificate>) -> std::io::Result<Tls> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody));
    let config = match certificate {
        None => config.with_no_client_auth(),
        Some(certificate) => {
            let chain = CertificateDer::from_pem_slice(certificate.certificate_pem.as_bytes()).unwrap();
            let key = PrivateKeyDer::from_pem_slice(certificate.key_pem.as_bytes()).unwrap();
            config.with_client_auth_cert(vec![chain], key).unwrap()
        }
    };
    let name = ServerName::try_from("portcullis").unwrap();
    let mut connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut stream = stream;
    while connection.is_handshaking() {
        connection.complete_io(&mut stream)?;
    }
    Ok(StreamOwned::new(connection, stream))
}

/// Sends and reads all that comes until the other side closes.
fn says(stream: &mut Tls, bytes: &[u8]) -> String {
    // It may close while we still talk.
    let _ = stream.write_all(bytes).and_then(|()| stream.flush());
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// An instance whose endpoint anybody reaches.
pub fn open_to_all(lab: &Lab) -> Machine {
    let mut machine = lab.launch();
    machine.push(|spec| spec.firewall.ingress.push(allow("7443/tcp")));
    machine
}

pub fn is_answered(from: &Path, machine: &Machine, path: &str, options: &[&str]) {
    let answer = curl(from, machine, path, options).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
}

/// How many connections with an address the instance has.
fn connections(machine: &Machine, with: IpAddr) -> usize {
    let peer = format!("([[:space:]]|:|\\[){with}\\]?:[0-9]+[[:space:]]*$");
    let list = format!("ss -Htn state established sport = :{AGENT_PORT} | grep -cE '{peer}' ; true");
    machine.ok(&list).parse().unwrap()
}

#[test]
fn slow_callers_of_one_source_hold_up_nobody_else() {
    let lab = Lab::new();
    let machine = open_to_all(&lab);
    let (stranger, other) = (lab.stranger(), lab.provider.outsider("other").unwrap());
    let right = files(&lab, "right", &lab.provider.client_certificate().unwrap());
    let beside = lab.provider.network().path();
    let from = stranger.path();
    // Of these the newest stay: half of them never end their handshake, half never end their header.
    let mut raw: Vec<TcpStream> = (0..60).filter_map(|_| dial(&from, machine.v4()).ok()).collect();
    let mut http: Vec<Tls> = Vec::new();
    for _ in 0..16 {
        http.push(tls(dial(&from, machine.v4()).unwrap(), None).unwrap());
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let slowly = scope.spawn(|| {
            let header = b"GET /livez HTTP/1.1\r\nhost: x\r\nx: "
                .iter()
                .chain(std::iter::repeat(&b'y'));
            // A record of 1024 bytes with the beginning of a ClientHello.
            let hello = [22, 3, 1, 4, 0, 1, 0, 3, 252, 3, 3];
            let mut sent = 0;
            for byte in header {
                // Those that were ended refuse it.
                let part = [hello.get(sent).copied().unwrap_or(7)];
                raw.retain_mut(|stream| stream.write_all(&part).is_ok());
                http.retain_mut(|stream| stream.write_all(&[*byte]).and_then(|()| stream.flush()).is_ok());
                sent += 1;
                if done.load(Ordering::SeqCst) || (raw.is_empty() && http.is_empty()) {
                    break;
                }
                std::thread::sleep(Duration::from_secs(1));
            }
            sent
        });
        let over = Over(&done);
        let held = connections(&machine, stranger.addresses()[0]);
        assert!((10..=32).contains(&held), "one source has {held} connections");
        for _ in 0..5 {
            is_answered(&beside, &machine, "/v1/health", &with_certificate(&right));
            is_answered(&other.path(), &machine, "/livez", &[]);
            is_answered(&from, &machine, "/livez", &[]);
        }
        // Each of them is ended, however long it goes on.
        eventually(DEADLINES, "no slow connection is left", || {
            match connections(&machine, stranger.addresses()[0]) {
                0 => Ok(()),
                some => Err(some),
            }
        });
        drop(over);
        assert!(slowly.join().unwrap() > 1, "they were slow");
    });
    let told = machine.ok("journalctl -b -o json MESSAGE_ID=5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e74");
    assert!(told.contains("\"EVICTED\""), "the operator is told: {told}");
}

/// Memory of all of the agent's processes that is their own, in KiB. The program's pages are shared with the other
/// instances of this machine: how much of them is counted depends on who else runs.
pub fn own_memory(machine: &Machine) -> u64 {
    let sum = "for pid in $(pgrep -x portcullis); do grep ^Pss_Anon: /proc/$pid/smaps_rollup; done | awk '{sum += $2} END {print sum}'";
    machine.ok(sum).parse().unwrap()
}

#[test]
fn ten_thousand_connections_leave_the_memory_flat_and_the_gate_alone() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let all = Rlimit {
        current: getrlimit(Resource::Nofile).maximum,
        ..getrlimit(Resource::Nofile)
    };
    setrlimit(Resource::Nofile, all).unwrap();
    let lab = Lab::new();
    let machine = open_to_all(&lab);
    let stranger = lab.stranger();
    let right = files(&lab, "right", &lab.provider.client_certificate().unwrap());
    let beside = lab.provider.network().path();
    for _ in 0..20 {
        is_answered(&beside, &machine, "/livez", &[]);
    }
    let (pid, table, before) = (machine.main_pid(), machine.table(), own_memory(&machine));
    let mut held = Vec::new();
    let mut during = before;
    for number in 1..=10_000 {
        let to = machine.instance.addresses()[number % 2];
        // Some are closed before we know that they are open.
        held.extend(dial(&stranger.path(), to).ok());
        if number % 2000 == 0 {
            is_answered(&beside, &machine, "/v1/health", &with_certificate(&right));
            during = during.max(own_memory(&machine));
        }
    }
    println!(
        "{} connections: {before} KiB before, {during} KiB at most",
        held.len()
    );
    assert!(
        during < before + 8 * 1024,
        "{before} KiB before, {during} KiB at most"
    );
    assert_eq!((machine.main_pid(), machine.table()), (pid, table));
    assert!(machine.until_ready().ready);
    drop(held);
    eventually(DEADLINES, "their source is served again", || {
        match curl(&stranger.path(), &machine, "/livez", &[]) {
            Ok(answer) if answer.status == 200 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

#[test]
fn who_asks_too_often_is_told_to_wait_and_nobody_else() {
    let lab = Lab::new();
    let machine = open_to_all(&lab);
    let (stranger, other) = (lab.stranger(), lab.provider.outsider("other").unwrap());
    let beside = lab.provider.network().path();
    let ask = |from: &Path| tls(dial(from, machine.v4()).unwrap(), None).unwrap();
    let requests = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n".repeat(400);
    let said = says(&mut ask(&stranger.path()), &requests);
    let answered = said.matches("HTTP/1.1 200 OK").count();
    assert!(answered >= 200, "a burst is let through: {answered}");
    let (_, refused) = said
        .split_once("HTTP/1.1 429 Too Many Requests\r\n")
        .expect("it ends in 429");
    let refused = refused.to_ascii_lowercase();
    for header in [
        "retry-after: 1\r\n",
        "application/problem+json",
        "connection: close",
    ] {
        assert!(refused.contains(header), "{header}: {refused}");
    }
    is_answered(&other.path(), &machine, "/livez", &[]);
    eventually(DEADLINES, "it may ask again", || {
        match curl(&stranger.path(), &machine, "/livez", &[]) {
            Ok(answer) if answer.status == 200 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });

    // As many from the control plane's place without a certificate take nothing from who has one.
    let said = says(&mut ask(&beside), &requests);
    assert!(said.contains("HTTP/1.1 429"), "{}", said.len());
    let certificate = lab.provider.client_certificate().unwrap();
    let mut trusted = tls(dial(&beside, machine.v4()).unwrap(), Some(&certificate)).unwrap();
    let mut many = b"GET /v1/health HTTP/1.1\r\nhost: x\r\n\r\n".repeat(500);
    many.extend_from_slice(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    let said = says(&mut trusted, &many);
    let answered = said.matches("HTTP/1.1 200 OK").count();
    assert_eq!(answered, 501);
}

#[test]
fn what_is_no_http_gets_a_refusal_or_a_closed_connection() {
    let lab = Lab::new();
    let machine = open_to_all(&lab);
    let stranger = lab.stranger();
    let from = stranger.path();
    let beside = lab.provider.network().path();
    let asked = |bytes: &[u8]| {
        says(
            &mut tls(dial(&beside, machine.v4()).unwrap(), None).unwrap(),
            bytes,
        )
    };
    let good = "GET /livez HTTP/1.1\r\nhost: x\r\n\r\n";
    let header = |text: String| format!("GET /livez HTTP/1.1\r\nhost: x\r\n{text}\r\n");
    let many: String = (0..300).map(|number| format!("x{number}: y\r\n")).collect();
    for (bytes, status) in [
        (format!("{good}\0\x01garbage\r\n\r\n"), "400 Bad Request"),
        (
            header(format!("x: {}\r\n", "y".repeat(20_000))),
            "431 Request Header",
        ),
        (header(many), "431 Request Header"),
        (
            header("content-length: 1\r\ncontent-length: 2\r\n".to_owned()),
            "400 Bad Request",
        ),
        (
            format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "y".repeat(20_000)),
            "4",
        ),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), ""),
        ("GET /livez\r\n\r\n".to_owned(), ""),
    ] {
        let said = asked(bytes.as_bytes());
        let answers: Vec<&str> = said.split("HTTP/1.1 ").skip(1).collect();
        let last = answers.last().copied().unwrap_or_default();
        assert!(
            last.starts_with(status),
            "{:?}: {said}",
            &bytes[..40.min(bytes.len())]
        );
        assert!(answers.len() <= 2 && !last.starts_with("2"), "{said}");
    }
    let said = asked(b"GET /livez HTTP/1.0\r\n\r\n");
    assert!(
        said.starts_with("HTTP/1.0 200 OK") && said.ends_with("ok"),
        "{said}"
    );

    // What is no TLS is hung up on.
    let mut plain = dial(&beside, machine.v4()).unwrap();
    plain.write_all(good.as_bytes()).unwrap();
    let mut said = Vec::new();
    let _ = plain.read_to_end(&mut said);
    assert!(!String::from_utf8_lossy(&said).contains("HTTP"), "{said:?}");

    // Half-open: the other side is gone, and says nothing any more.
    let address = stranger.addresses()[0];
    let half: Vec<TcpStream> = (0..20).map(|_| dial(&from, machine.v4()).unwrap()).collect();
    let quiet: Vec<Tls> = (0..10)
        .map(|_| tls(dial(&from, machine.v4()).unwrap(), None).unwrap())
        .collect();
    assert!(connections(&machine, address) > 0);
    let cut = format!(
        "ip -n {} link set eth0 down",
        from.file_name().unwrap().to_string_lossy()
    );
    crate::common::run(&cut);
    eventually(
        DEADLINES,
        "half-open connections are given up",
        || match connections(&machine, address) {
            0 => Ok(()),
            some => Err(some),
        },
    );
    drop((half, quiet));
    assert!(machine.until_ready().ready);
}

#[test]
fn large_bodies_that_do_not_come_hold_up_only_large_ones() {
    let lab = Lab::new();
    let machine = lab.launch();
    let api = crate::api::Api::new(&lab, &machine);
    let certificate = lab.provider.client_certificate().unwrap();
    let beside = lab.provider.network().path();
    let head = "PUT /v1/spec HTTP/1.1\r\nhost: x\r\nif-match: *\r\ncontent-length: 9000000\r\n\r\n{";
    let begin = || {
        let mut stream = tls(dial(&beside, machine.v4()).unwrap(), Some(&certificate)).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        stream.flush().unwrap();
        stream
    };
    let mut slow = [begin(), begin(), begin()];
    // What is small goes on.
    assert!(
        api.done("POST", "/v1/firewall/rules", &crate::api::rule("web", 9000))
            .1
    );
    // Two have the room and don't use it; the third had to wait for it, and is told so in the end.
    let mut said: Vec<String> = slow.iter_mut().map(|stream| says(stream, b"")).collect();
    said.sort();
    let [slow, too, waited] = said.as_slice() else {
        panic!("{said:?}")
    };
    assert!(
        slow.starts_with("HTTP/1.1 408") && too.starts_with("HTTP/1.1 408"),
        "{said:?}"
    );
    assert!(
        waited.starts_with("HTTP/1.1 503") && waited.contains("retry-after: "),
        "{said:?}"
    );
    // The room is there again.
    let huge = vec![b' '; 9_000_000];
    let answer = api.with(&["-H", "If-Match: *"], "PUT", "/v1/spec", &huge);
    assert_eq!(answer.status, 400, "{answer:?}");
    assert_eq!(machine.status().generation, Some(2));
}
