//! Enrolment of a real instance: by the token once, by its certificate from then on; and what somebody in the
//! control plane's place can do.
//!
//! May not live here: which requests the control plane refuses (the library's own tests).

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use portcullis_protocol::Secret;
use portcullis_protocol::enrolment::{EnrolmentAnswer, EnrolmentRequest};
use portcullis_provision::client::{AgentClient, ClientError, NamespaceDialer, blocking};
use portcullis_provision::enrol::Registrar;
use portcullis_provision::instance_ca::{InstanceCa, SigningRequest};
use portcullis_provision::local::{AGENT_PORT, in_namespace};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};

use crate::lab::{Lab, Machine, Run, SOON, eventually};
use crate::receiver::{self, Authority};

const PORT: u16 = 8447;
pub const URL: &str = "https://10.77.0.1:8447/v1/enrol";

/// What a desk does with a request, and with the certificates that came with it: an answer, or none (403).
pub type Clerk =
    Box<dyn FnMut(&EnrolmentRequest, &[CertificateDer<'static>]) -> Option<EnrolmentAnswer> + Send>;

/// A control plane's address for requests, until dropped.
pub struct Desk {
    namespace: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Desk {
    /// `clients` is the authority whose certificates a caller may show.
    pub fn new(lab: &Lab, authority: &Authority, clients: &str, mut clerk: Clerk) -> Self {
        let namespace = lab.provider.network().path();
        let listener = in_namespace(&namespace, || TcpListener::bind(("10.77.0.1", PORT)));
        let listener = listener.unwrap().unwrap();
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(clients.as_bytes()).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
        let tls = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier.allow_unauthenticated().build().unwrap())
            .with_single_cert(authority.chain.clone(), authority.key.clone_key())
            .unwrap();
        let (tls, stop) = (Arc::new(tls), Arc::new(AtomicBool::new(false)));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                // A client that hangs up is for the test to see.
                let _ = attend(stream, tls.clone(), &mut clerk);
            }
        });
        let thread = Some(thread);
        Self {
            namespace,
            stop,
            thread,
        }
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = in_namespace(&self.namespace, || TcpStream::connect(("10.77.0.1", PORT)));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn attend(stream: TcpStream, tls: Arc<ServerConfig>, clerk: &mut Clerk) -> std::io::Result<()> {
    stream.set_read_timeout(Some(SOON))?;
    let connection = ServerConnection::new(tls).map_err(std::io::Error::other)?;
    let mut reader = BufReader::new(StreamOwned::new(connection, stream));
    let (mut length, mut line) = (0, String::new());
    reader.read_line(&mut line)?;
    assert_eq!(line.trim_end(), "POST /v1/enrol HTTP/1.1");
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
    let request: EnrolmentRequest = serde_json::from_slice(&body).map_err(std::io::Error::other)?;
    let stream = reader.get_mut();
    let shown = stream.conn.peer_certificates().unwrap_or_default().to_vec();
    let (head, body) = match clerk(&request, &shown) {
        Some(answer) => (
            "200 OK",
            serde_json::to_string(&answer).map_err(std::io::Error::other)?,
        ),
        None => ("403 Forbidden", String::new()),
    };
    let head = format!(
        "HTTP/1.1 {head}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes())?;
    stream.conn.send_close_notify();
    stream.flush()
}

/// An instance, pinned and ready, with its own desk's authority trusted, and a registrar.
fn set_up(lab: &Lab, lifetime: Duration) -> (Machine, Authority, Arc<Registrar>) {
    let (machine, authority) = receiver::set_up(lab, "");
    let registrar = Registrar::open_or_init(&lab.path("registrar"), lifetime).unwrap();
    (machine, authority, Arc::new(registrar))
}

/// Tells the instance to enrol.
fn send(machine: &mut Machine, token: &Secret) {
    let token = token.clone();
    machine.push(|spec| {
        let control_plane = spec.control_plane.as_mut().unwrap();
        control_plane.enrol_url = Some(URL.parse().unwrap());
        control_plane.enrolment_token = Some(token);
    });
}

/// A client that knows the authority, and no pin.
pub fn by_authority(lab: &Lab, machine: &Machine, pem: &str, instance: &str) -> AgentClient {
    let address = SocketAddr::new(machine.v4(), AGENT_PORT);
    let dialer = NamespaceDialer::new(lab.provider.network().path());
    let client = AgentClient::new(address, dialer, None, None).unwrap();
    client.with_authority(pem, instance)
}

fn served(lab: &Lab, machine: &Machine) -> String {
    let mut openssl = lab.beside("openssl");
    let address = format!("{}:{AGENT_PORT}", machine.v4());
    let output = openssl.args(["s_client", "-connect", &address]).output_text();
    let text = output.stdout;
    let end = text
        .find("-----END CERTIFICATE-----")
        .unwrap_or_else(|| panic!("{text}"));
    text[text.find("-----BEGIN").unwrap()..end].to_owned()
}

#[test]
fn an_instance_enrols_once_and_renews_by_its_certificate() {
    let lab = Lab::new();
    let (mut machine, authority, registrar) = set_up(&lab, Duration::from_secs(45));
    let (id, pinned) = (
        machine.instance.id().to_owned(),
        machine.instance.identity().unwrap().clone(),
    );
    let token = Secret::new("5".repeat(64));
    registrar.expect(&id, token.clone()).unwrap();
    let requests = Arc::new(Mutex::new(Vec::new()));
    let (seen, desk) = (requests.clone(), registrar.clone());
    let clerk: Clerk = Box::new(move |request, shown| {
        seen.lock().unwrap().push((request.clone(), shown.to_vec()));
        let answer = match shown.is_empty() {
            true => desk.enrol(request),
            false => desk.renew(shown, request),
        };
        answer.ok()
    });
    let _desk = Desk::new(&lab, &authority, registrar.certificate_pem(), clerk);
    let pem = registrar.certificate_pem();
    // Not yet: it shows what it made itself.
    assert!(blocking(by_authority(&lab, &machine, pem, &id).livez()).is_err());
    send(&mut machine, &token);
    let enrolled = |instance: &str| blocking(by_authority(&lab, &machine, pem, instance).livez());
    eventually(Duration::from_secs(60), "it shows its certificate", || {
        enrolled(&id)
    });
    // The same keys as were pinned, and the pin goes on.
    assert_eq!(registrar.identity(&id).unwrap(), pinned);
    blocking(machine.instance.client(None).unwrap().livez()).unwrap();
    let other = enrolled("i-other").unwrap_err();
    assert!(
        matches!(other, ClientError::Exchange { .. }) && other.to_string().contains("not for instance"),
        "{other}"
    );
    // Other programs know it by its name.
    let file = lab.path("registrar").join("instance-ca.pem");
    let curl = |name: &str| {
        let mut curl = lab.beside("curl");
        curl.args(["-sS", "--max-time", "8", "--cacert", file.to_str().unwrap()])
            .args(["--connect-to", &format!("::{}:{AGENT_PORT}", machine.v4())])
            .arg(format!("https://{name}:{AGENT_PORT}/livez"));
        curl.output_text()
    };
    assert_eq!(curl(&id).stdout, "ok");
    assert!(!curl("i-other").success());
    // The token is over, and the certificate outlives the daemon.
    let found = machine.run(&format!("grep -rlF {} /var/lib/portcullis", token.expose()));
    assert_eq!(found.stdout, "");
    machine.ok("systemctl restart portcullis");
    machine.until_ready();
    enrolled(&id).unwrap();
    let before = served(&lab, &machine);
    let files = machine.ok("stat -c '%a %n' /var/lib/portcullis/tls.key /var/lib/portcullis/enrolled.json");
    assert!(
        files.lines().count() == 2 && files.lines().all(|line| line.starts_with("600 ")),
        "{files}"
    );
    eventually(Duration::from_secs(120), "it renews its certificate", || {
        let now = served(&lab, &machine);
        if now != before { Ok(()) } else { Err("the same") }
    });
    enrolled(&id).unwrap();
    let requests = requests.lock().unwrap();
    let first: Vec<_> = requests
        .iter()
        .filter(|(request, _)| request.mac.is_some())
        .collect();
    assert!(
        first.len() == 1 && first[0].1.is_empty(),
        "one request by the token"
    );
    assert!(
        requests.len() >= 2 && requests[1].1.len() == 2,
        "others by the certificate"
    );
    assert!(
        !serde_json::to_string(&first[0].0)
            .unwrap()
            .contains(token.expose())
    );
}

#[test]
fn who_answers_in_the_control_planes_place_is_not_believed() {
    let lab = Lab::new();
    let (mut machine, authority, registrar) = set_up(&lab, Duration::from_secs(3600));
    let id = machine.instance.id().to_owned();
    let token = Secret::new("6".repeat(64));
    registrar.expect(&id, token.clone()).unwrap();
    let rogue = InstanceCa::open_or_init(&lab.path("rogue")).unwrap();
    let issue = move |request: &EnrolmentRequest, instance: &str| {
        let signing = SigningRequest::from_pem(&request.csr).unwrap();
        rogue
            .issue(instance, &request.nonce, &signing, Duration::from_secs(3600))
            .unwrap()
    };
    let (desk, mut number) = (registrar.clone(), 0);
    // He trusts himself, sees all, and has an authority of his own; the token he has not.
    let clerk: Clerk = Box::new(move |request, _| {
        number += 1;
        let chain = issue(request, &request.instance);
        match number {
            1 => None,
            2 => Some(EnrolmentAnswer { chain, mac: None }),
            3 => Some(EnrolmentAnswer {
                chain,
                mac: request.mac.clone(),
            }),
            // The genuine answer, with another certificate in it: and it was given away by that, once.
            4 => Some(EnrolmentAnswer {
                chain,
                ..desk.enrol(request).unwrap()
            }),
            // The same request is answered the same.
            _ => desk.enrol(request).ok(),
        }
    });
    let before = served(&lab, &machine);
    let _desk = Desk::new(&lab, &authority, registrar.certificate_pem(), clerk);
    send(&mut machine, &token);
    let journal = || machine.ok("journalctl -b -o cat MESSAGE_ID=5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e7b");
    let told = eventually(Duration::from_secs(60), "four answers are refused", || {
        let told = journal();
        if told.matches("proves nothing").count() >= 3 {
            Ok(told)
        } else {
            Err(told)
        }
    });
    assert!(
        told.contains("answered 403") && told.contains("was not made with the enrolment token"),
        "{told}"
    );
    let pem = registrar.certificate_pem();
    eventually(Duration::from_secs(60), "the genuine answer is taken", || {
        blocking(by_authority(&lab, &machine, pem, &id).livez())
    });
    assert_ne!(served(&lab, &machine), before);
    assert_eq!(
        &registrar.identity(&id).unwrap(),
        machine.instance.identity().unwrap()
    );
}
