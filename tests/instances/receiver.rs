//! Servers of this process, in the namespace of the control plane: what reports are pushed to, what gives out
//! tokens, and what plays a platform's metadata service.
//!
//! May not live here: what an answer means to the instance.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver as Channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use portcullis_protocol::Report;
use portcullis_provision::local::in_namespace;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};

use crate::lab::{Lab, Machine, SOON};

/// The control plane's address on the instances' network.
pub const HOST: &str = "10.77.0.1";
/// Where reports go to.
pub const PORT: u16 = 8444;
/// The same for a spec.
pub const URL: &str = "https://10.77.0.1:8444/v1/report";

/// Deliveries after a long time away: the pusher's waits have grown by then.
pub const PATIENTLY: Duration = Duration::from_secs(120);

/// An authority, with a server certificate for the control plane's address.
pub struct Authority {
    pub pem: String,
    issuer: Issuer<'static, KeyPair>,
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let name = &mut params.distinguished_name;
        name.push(DnType::CommonName, "receiver's authority");
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        let issuer = Issuer::new(params, key);
        let key = KeyPair::generate().unwrap();
        let mut server = CertificateParams::new(vec![HOST.to_owned()]).unwrap();
        // Of now, as real ones are.
        let (now, year) = (SystemTime::now(), Duration::from_secs(365 * 86_400));
        (server.not_before, server.not_after) = ((now - year).into(), (now + year).into());
        let server = server.signed_by(&key, &issuer).unwrap();
        Self {
            pem,
            issuer,
            chain: vec![server.der().clone()],
            key: PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der())),
        }
    }

    /// A certificate of this authority and its key, as PEM.
    pub fn client(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    /// A server that takes anybody.
    pub fn tls(&self) -> Arc<ServerConfig> {
        self.server(None)
    }

    /// A server that only takes clients with a certificate of these authorities.
    pub fn tls_for(&self, authorities: &[CertificateDer<'static>]) -> Arc<ServerConfig> {
        let mut roots = RootCertStore::empty();
        for authority in authorities {
            roots.add(authority.clone()).unwrap();
        }
        self.server(Some(roots))
    }

    fn server(&self, clients: Option<RootCertStore>) -> Arc<ServerConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = match clients {
            Some(roots) => {
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.build().unwrap())
            }
            None => builder.with_no_client_auth(),
        };
        let config = builder.with_single_cert(self.chain.clone(), self.key.clone_key());
        Arc::new(config.unwrap())
    }
}

/// A request.
#[derive(Clone, Debug)]
pub struct Asked {
    pub time: Instant,
    /// Method and path.
    pub line: String,
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
    /// The client's certificate.
    pub certificate: Option<Vec<u8>>,
}

impl Asked {
    pub fn report(&self) -> Report {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    pub fn number(&self, name: &str) -> u64 {
        self.header(name).parse().unwrap()
    }

    pub fn is_change(&self) -> bool {
        self.header("portcullis-report") == "change"
    }
}

/// Status line, with headers after it if there are some, and a body.
pub type Answer = (String, String);

pub fn no_content() -> Answer {
    ("204 No Content".to_owned(), String::new())
}

/// A server, until dropped. Requests are answered one after the other.
pub struct Server {
    namespace: PathBuf,
    address: (&'static str, u16),
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    pub got: Channel<Asked>,
}

impl Server {
    /// Serves at an address of the control plane's namespace.
    pub fn start(
        lab: &Lab,
        address: (&'static str, u16),
        tls: Option<Arc<ServerConfig>>,
        mut answer: impl FnMut(&Asked) -> Answer + Send + 'static,
    ) -> Self {
        let namespace = lab.provider.network().path();
        let listener = in_namespace(&namespace, || TcpListener::bind(address));
        let listener = listener.unwrap().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, got) = mpsc::channel();
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                // A client that does not trust us, or is not trusted, hangs up; that is for the test to see.
                if let Ok(asked) = serve(stream, tls.clone(), &mut answer) {
                    let _ = sender.send(asked);
                }
            }
        });
        Self {
            namespace,
            address,
            stop,
            thread: Some(thread),
            got,
        }
    }

    /// A receiver of reports that answers with these heads, one after the other, then with success.
    pub fn reports(lab: &Lab, authority: &Authority, answers: &[&str]) -> Self {
        let mut answers: VecDeque<String> = answers.iter().map(|&head| head.to_owned()).collect();
        Self::start(lab, (HOST, PORT), Some(authority.tls()), move |asked| {
            assert_eq!(asked.line, "POST /v1/report");
            let head = answers.pop_front();
            head.map_or_else(no_content, |head| (head, String::new()))
        })
    }

    /// The next request, within the limit.
    #[track_caller]
    pub fn next(&self, limit: Duration) -> Asked {
        self.got.recv_timeout(limit).expect("a request arrives")
    }

    /// Takes requests until one is as wanted; all of them.
    #[track_caller]
    pub fn all_until(&self, limit: Duration, what: &str, wanted: impl Fn(&Asked) -> bool) -> Vec<Asked> {
        let end = Instant::now() + limit;
        let mut all = Vec::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let Ok(asked) = self.got.recv_timeout(left) else {
                panic!("no {what} among {} requests: {:?}", all.len(), all.last());
            };
            let found = wanted(&asked);
            all.push(asked);
            if found {
                return all;
            }
        }
    }

    /// As [`Self::all_until`]; the one that was wanted.
    #[track_caller]
    pub fn until(&self, limit: Duration, what: &str, wanted: impl Fn(&Asked) -> bool) -> Asked {
        self.all_until(limit, what, wanted).pop().unwrap()
    }
}

impl Server {
    /// Ends it; what it got and nobody took yet.
    pub fn finish(mut self) -> Vec<Asked> {
        self.halt();
        self.got.try_iter().collect()
    }

    fn halt(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = in_namespace(&self.namespace, || TcpStream::connect(self.address));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.halt();
        }
    }
}

fn serve(
    stream: TcpStream,
    tls: Option<Arc<ServerConfig>>,
    answer: &mut impl FnMut(&Asked) -> Answer,
) -> std::io::Result<Asked> {
    stream.set_read_timeout(Some(SOON))?;
    let Some(tls) = tls else {
        return exchange(&mut BufReader::new(stream), answer, |_| None);
    };
    let connection = ServerConnection::new(tls).map_err(std::io::Error::other)?;
    let mut reader = BufReader::new(StreamOwned::new(connection, stream));
    let asked = exchange(&mut reader, answer, |stream| {
        let chain = stream.conn.peer_certificates();
        chain.and_then(|chain| Some(chain.first()?.to_vec()))
    })?;
    let stream = reader.get_mut();
    stream.conn.send_close_notify();
    stream.flush()?;
    Ok(asked)
}

fn exchange<S: Read + Write>(
    reader: &mut BufReader<S>,
    answer: &mut impl FnMut(&Asked) -> Answer,
    certificate: impl Fn(&S) -> Option<Vec<u8>>,
) -> std::io::Result<Asked> {
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else {
            break;
        };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let length = headers.get("content-length").map_or("0", String::as_str);
    let mut body = vec![0; length.parse().map_err(std::io::Error::other)?];
    reader.read_exact(&mut body)?;
    let line = first.trim_end().strip_suffix(" HTTP/1.1").map(str::to_owned);
    let asked = Asked {
        time: Instant::now(),
        line: line.ok_or_else(|| std::io::Error::other(first))?,
        headers,
        body,
        certificate: certificate(reader.get_ref()),
    };
    let (head, text) = answer(&asked);
    let length = text.len();
    let answer = format!("HTTP/1.1 {head}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{text}");
    reader.get_mut().write_all(answer.as_bytes())?;
    reader.get_mut().flush()?;
    Ok(asked)
}

/// Makes the instance trust an authority for the push, with more settings of `[report]`.
#[track_caller]
pub fn trust(machine: &Machine, authority: &Authority, settings: &str) {
    put(machine, "receiver.pem", "644", &authority.pem);
    let text = format!("[report]\nca_file = \"/etc/portcullis/receiver.pem\"\n{settings}\n");
    put(machine, "conf.d/report.toml", "644", &text);
    machine.ok("systemctl restart portcullis");
}

/// An instance, ready, that trusts a new authority of the control plane, with these settings below `[report]`.
pub fn set_up(lab: &Lab, settings: &str) -> (Machine, Authority) {
    let (machine, authority) = (lab.launch(), Authority::new());
    trust(&machine, &authority, settings);
    (machine, authority)
}

/// Puts a file below /etc/portcullis, whole.
#[track_caller]
pub fn put(machine: &Machine, name: &str, mode: &str, text: &str) {
    let script =
        format!("umask 077; f=/etc/portcullis/{name}; cat > $f.new && chmod {mode} $f.new && mv $f.new $f");
    let output = machine.run_with(&script, text.as_bytes());
    assert!(output.success(), "{output:?}");
}

/// Has the instance push to the receiver.
pub fn push_to_us(machine: &mut Machine) {
    machine.push(|spec| {
        let control_plane = spec.control_plane.as_mut().unwrap();
        control_plane.report_url = Some(URL.parse().unwrap());
    });
}

/// How often the journal has a message.
#[track_caller]
pub fn told(machine: &Machine, message: &str) -> usize {
    let id = format!("5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e{message}");
    let count = format!("journalctl -u portcullis -o cat MESSAGE_ID={id} | grep -c . || [ $? = 1 ]");
    machine.ok(&count).parse().unwrap()
}
