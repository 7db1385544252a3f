//! Reports that are pushed: to a receiver of this process, in the namespace of the control plane.
//!
//! May not live here: what a report says.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use portcullis_protocol::{Check, CheckId, Report};
use portcullis_provision::local::in_namespace;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::lab::{Lab, Machine, SOON, eventually};

const PORT: u16 = 8444;
const URL: &str = "https://10.77.0.1:8444/v1/report";

/// An authority and a server certificate for the control plane's address.
struct Authority {
    pem: String,
    tls: Arc<ServerConfig>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "receiver's authority");
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        let key = KeyPair::generate().unwrap();
        let server = CertificateParams::new(vec!["10.77.0.1".to_owned()]).unwrap();
        let server = server.signed_by(&key, &issuer).unwrap();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![server.der().clone()], key)
            .unwrap();
        Self {
            pem,
            tls: Arc::new(tls),
        }
    }
}

/// A receiver that keeps what it gets, until dropped.
struct Receiver {
    namespace: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    got: mpsc::Receiver<(Instant, Report)>,
}

impl Receiver {
    /// Answers with the given heads, one after the other, then with success.
    fn new(lab: &Lab, authority: &Authority, answers: &[&str]) -> Self {
        let namespace = lab.provider.network().path();
        let listener = in_namespace(&namespace, || TcpListener::bind(("10.77.0.1", PORT)));
        let listener = listener.unwrap().unwrap();
        let answers: VecDeque<String> = answers.iter().map(|&head| head.to_owned()).collect();
        let answers = Mutex::new(answers);
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, got) = mpsc::channel();
        let (tls, stopped) = (authority.tls.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                // A client that does not trust us hangs up; that is for the test to see.
                if let Ok(report) = receive(stream, tls.clone(), &answers) {
                    let _ = sender.send((Instant::now(), report));
                }
            }
        });
        Self {
            namespace,
            stop,
            thread: Some(thread),
            got,
        }
    }

    /// The next report, within the limit.
    #[track_caller]
    fn next(&self, limit: Duration) -> (Instant, Report) {
        self.got.recv_timeout(limit).expect("a report arrives")
    }

    /// Takes reports until one is as wanted.
    #[track_caller]
    fn until(&self, what: &str, wanted: impl Fn(&Report) -> bool) -> (Instant, Report) {
        eventually(SOON, what, || match self.got.recv_timeout(SOON) {
            Ok((time, report)) if wanted(&report) => Ok((time, report)),
            other => Err(format!("{other:?}")),
        })
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = in_namespace(&self.namespace, || TcpStream::connect(("10.77.0.1", PORT)));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn receive(
    stream: TcpStream,
    tls: Arc<ServerConfig>,
    answers: &Mutex<VecDeque<String>>,
) -> std::io::Result<Report> {
    stream.set_read_timeout(Some(SOON))?;
    let connection = ServerConnection::new(tls).map_err(std::io::Error::other)?;
    let mut reader = BufReader::new(StreamOwned::new(connection, stream));
    let mut length = 0;
    let mut first = String::new();
    reader.read_line(&mut first)?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim_end().to_ascii_lowercase().split_once(": ") {
            Some(("content-length", number)) => length = number.parse().map_err(std::io::Error::other)?,
            None => break,
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let head = answers
        .lock()
        .unwrap()
        .pop_front()
        .unwrap_or_else(|| "204 No Content".into());
    let answer = format!("HTTP/1.1 {head}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
    let stream = reader.get_mut();
    stream.write_all(answer.as_bytes())?;
    stream.conn.send_close_notify();
    stream.flush()?;
    assert_eq!(first.trim_end(), "POST /v1/report HTTP/1.1");
    serde_json::from_slice(&body).map_err(std::io::Error::other)
}

/// Makes the instance trust an authority for the push.
fn trust(machine: &Machine, authority: &Authority) {
    let put = "cat > /etc/portcullis/receiver.pem
        printf '[report]\\nca_file = \"/etc/portcullis/receiver.pem\"\\n' > /etc/portcullis/conf.d/report.toml
        systemctl restart portcullis";
    assert!(machine.run_with(put, authority.pem.as_bytes()).success());
}

fn push_to_us(machine: &mut Machine) {
    machine.push(|spec| {
        let control_plane = spec.control_plane.as_mut().unwrap();
        control_plane.report_url = Some(URL.parse().unwrap());
    });
}

#[test]
fn a_report_is_pushed_when_a_spec_is_accepted_and_at_once_when_readiness_changes() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let authority = Authority::new();
    trust(&machine, &authority);
    let receiver = Receiver::new(&lab, &authority, &[]);
    push_to_us(&mut machine);
    let (_, report) = receiver.until("ready with generation 2", |r| r.ready && r.generation == Some(2));
    assert_eq!(report.instance.id, machine.instance.id());

    let start = Instant::now();
    machine.ok("systemctl stop ssh");
    // What is less urgent may be told before it.
    let (arrived, report) = receiver.until("not ready", |report| !report.ready);
    println!(
        "a stopped sshd was told to the control plane after {:?}",
        arrived - start
    );
    assert!(arrived - start < Duration::from_secs(3), "{report:#?}");
    // A report in the middle of the change is followed by one that has all of it.
    let stopped = |check: &Check| check.id == CheckId::SshdRunning;
    if !report.blocking().any(stopped) {
        receiver.until("sshd.running fails", |report| report.blocking().any(stopped));
    }
    machine.ok("systemctl start ssh");
    receiver.until("ready again", |report| report.ready);
    let quiet = receiver.got.recv_timeout(Duration::from_secs(2));
    assert!(
        matches!(quiet, Err(RecvTimeoutError::Timeout)),
        "nothing changed: {quiet:?}"
    );
}

#[test]
fn a_busy_receiver_is_asked_again_when_it_said() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let authority = Authority::new();
    trust(&machine, &authority);
    let answers = [
        "503 Service Unavailable\r\nretry-after: 2",
        "429 Too Many Requests\r\nretry-after: 3",
        "500 Internal Server Error",
    ];
    let receiver = Receiver::new(&lab, &authority, &answers);
    push_to_us(&mut machine);
    let times: Vec<Instant> = (0..4).map(|_| receiver.next(SOON).0).collect();
    let waits: Vec<Duration> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    println!("asked again after {waits:?}");
    assert!((1.9..4.0).contains(&waits[0].as_secs_f64()), "{waits:?}");
    assert!((2.9..5.0).contains(&waits[1].as_secs_f64()), "{waits:?}");
}

#[test]
fn a_receiver_that_is_away_or_not_trusted_gets_nothing_and_harms_nothing() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let (authority, other) = (Authority::new(), Authority::new());
    trust(&machine, &authority);
    let (pid, impostor) = (machine.main_pid(), Receiver::new(&lab, &other, &[]));
    push_to_us(&mut machine);
    machine.until_ready();
    let tried =
        "journalctl -u portcullis-front -o cat MESSAGE_ID=5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e0b | grep -c .";
    eventually(SOON, "a refused delivery is in the journal", || {
        let count = machine.run(tried);
        if count.stdout.trim() == "0" {
            Err(count)
        } else {
            Ok(())
        }
    });
    assert!(impostor.got.try_recv().is_err());
    drop(impostor);
    let start = Instant::now();
    let again: u32 = machine.ok(tried).parse().unwrap();
    eventually(SOON, "nobody is there", || {
        let count: u32 = machine.ok(tried).parse().unwrap();
        if count > again { Ok(()) } else { Err(count) }
    });
    assert!(machine.until_ready().ready);
    let receiver = Receiver::new(&lab, &authority, &[]);
    let (arrived, report) = receiver.next(Duration::from_secs(20));
    println!("delivered {:?} after the receiver was gone", arrived - start);
    assert_eq!(report.generation, Some(2));
    assert_eq!(machine.main_pid(), pid);
}
