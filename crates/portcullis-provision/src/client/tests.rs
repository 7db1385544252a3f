//! The client against servers that are honest, and against some that are not.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rcgen::{CertificateParams, KeyPair};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoClientAuth, WebPkiClientVerifier};
use std::io::{Read as _, Write as _};

use portcullis_protocol::Secret;
use portcullis_protocol::identity::{Identity, to_hex};
use ring::hmac;

use super::*;
use crate::ca::Ca;

const HOST_KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFkKc52EQpKAMBtUiDp/N8hykSeuzBRx5gN48WTPDhWS";
const TOKEN: &str = "the token";

/// What a test server answers with: status line and body for a path.
type Handler = Arc<dyn Fn(&str) -> (u16, String) + Send + Sync>;

struct Server {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = std::net::TcpStream::connect(self.address);
    }
}

fn serve(key: &KeyPair, clients: Arc<dyn ClientCertVerifier>, handler: Handler) -> Server {
    let certificate = CertificateParams::new(["agent".to_owned()])
        .unwrap()
        .self_signed(key)
        .unwrap();
    let der = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let config =
        rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(clients)
            .with_single_cert(vec![certificate.der().clone()], der)
            .unwrap();
    let (config, stop) = (Arc::new(config), Arc::new(AtomicBool::new(false)));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = Server {
        address: listener.local_addr().unwrap(),
        stop: Arc::clone(&stop),
    };
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            let connection = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut tls = rustls::StreamOwned::new(connection, stream.unwrap());
            let mut request = Vec::new();
            let mut buffer = [0; 1024];
            while !request.ends_with(b"\r\n\r\n") {
                match tls.read(&mut buffer) {
                    Ok(length) if length > 0 => request.extend_from_slice(&buffer[..length]),
                    _ => break,
                }
            }
            let request = String::from_utf8_lossy(&request).into_owned();
            let Some(path) = request.split(' ').nth(1) else {
                continue;
            };
            let (status, body) = handler(path);
            let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n", body.len());
            let _ = tls.write_all((head + &body).as_bytes());
            let _ = tls.flush();
        }
    });
    server
}

fn spki(key: &KeyPair) -> String {
    use rcgen::PublicKeyData as _;
    to_hex(ring::digest::digest(&ring::digest::SHA256, &key.subject_public_key_info()).as_ref())
}

fn identity(spki: &str, token: &str, nonce: &str) -> String {
    let mut identity = Identity {
        instance: "i-1".into(),
        tls_spki_sha256: spki.into(),
        host_keys: vec![HostKey::from_line(HOST_KEY).unwrap()],
        nonce: nonce.into(),
        mac: String::new(),
        challenge: None,
    };
    let key = hmac::Key::new(hmac::HMAC_SHA256, token.as_bytes());
    identity.mac = to_hex(hmac::sign(&key, &identity.message()).as_ref());
    serde_json::to_string(&identity).unwrap()
}

fn nonce(path: &str) -> &str {
    path.split_once("nonce=").unwrap().1
}

fn client(server: &Server, pin: Option<String>) -> AgentClient {
    AgentClient::new(server.address, PlainDialer, pin, None).unwrap()
}

fn enrol(server: &Server) -> Result<PinnedIdentity, ClientError> {
    blocking(client(server, None).enrol(&Secret::new(TOKEN), "i-1"))
}

fn refusal(server: &Server) -> String {
    let error = enrol(server).unwrap_err();
    assert!(matches!(error, ClientError::NotProven { .. }), "{error}");
    error.to_string()
}

#[test]
fn an_honest_agent_is_pinned_and_asked() {
    let key = KeyPair::generate().unwrap();
    let own = spki(&key);
    let handler: Handler = Arc::new(move |path| match path {
        "/livez" => (200, "ok".into()),
        "/readyz" => (503, "sshd.running\nkeys.installed\n".into()),
        "/v1/health" => (403, "who are you?".into()),
        path => (200, identity(&own, TOKEN, nonce(path))),
    });
    let server = serve(&key, Arc::new(NoClientAuth), handler);
    let pinned = enrol(&server).unwrap();
    assert_eq!(
        (pinned.tls_spki_sha256.as_str(), pinned.host_keys.len()),
        (spki(&key).as_str(), 1)
    );
    let client = client(&server, Some(pinned.tls_spki_sha256));
    blocking(client.livez()).unwrap();
    assert_eq!(
        blocking(client.readyz()).unwrap().unwrap_err(),
        ["sshd.running", "keys.installed"]
    );
    let error = blocking(client.health()).unwrap_err().to_string();
    assert_eq!(error, "/v1/health answered 403: who are you?");
}

#[test]
fn a_man_in_the_middle_with_a_key_of_his_own_is_refused() {
    let (honest, own) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let genuine = spki(&honest);
    // He passes the agent's genuine, well signed answer on.
    let handler: Handler = Arc::new(move |path| (200, identity(&genuine, TOKEN, nonce(path))));
    let server = serve(&own, Arc::new(NoClientAuth), handler);
    assert!(refusal(&server).contains("another TLS key than the one that this connection shows"));
}

#[test]
fn a_swapped_key_is_refused_after_pinning() {
    let (honest, own) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let server = serve(&own, Arc::new(NoClientAuth), Arc::new(|_| (200, "ok".into())));
    let error = blocking(client(&server, Some(spki(&honest))).livez()).unwrap_err();
    assert!(matches!(error, ClientError::WrongKey { .. }), "{error}");
    assert!(error.to_string().contains(&spki(&own)), "{error}");
}

#[test]
fn a_replayed_answer_is_refused() {
    let key = KeyPair::generate().unwrap();
    let old = identity(&spki(&key), TOKEN, "00ff");
    let server = serve(
        &key,
        Arc::new(NoClientAuth),
        Arc::new(move |_| (200, old.clone())),
    );
    assert!(refusal(&server).contains("a replay"));
}

/// The MAC is over fingerprints: a key beside one has to be its own.
#[test]
fn a_host_key_that_is_not_of_its_fingerprint_is_refused() {
    let key = KeyPair::generate().unwrap();
    let with = |replaced: &'static str| {
        let own = spki(&key);
        let handler: Handler = Arc::new(move |path| {
            let answer = identity(&own, TOKEN, nonce(path));
            assert!(answer.contains(HOST_KEY));
            (200, answer.replace(HOST_KEY, replaced))
        });
        serve(&key, Arc::new(NoClientAuth), handler)
    };
    let pinned = enrol(&with(HOST_KEY)).unwrap();
    assert_eq!(pinned.host_keys[0].key.as_deref(), Some(HOST_KEY));
    let other = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBmyqUQGxHHYKqmHp4WZVvAcW0vTDhrlWHFNqV9uYHCd";
    assert!(refusal(&with(other)).contains("comes with another key"));
}

#[test]
fn a_wrong_token_and_a_wrong_instance_are_refused() {
    let key = KeyPair::generate().unwrap();
    let own = spki(&key);
    let handler: Handler = Arc::new(move |path| (200, identity(&own, "another token", nonce(path))));
    let server = serve(&key, Arc::new(NoClientAuth), handler);
    assert!(refusal(&server).contains("enrolment token"));

    let own = spki(&key);
    let handler: Handler = Arc::new(move |path| (200, identity(&own, TOKEN, nonce(path))));
    let server = serve(&key, Arc::new(NoClientAuth), handler);
    let error = blocking(client(&server, None).enrol(&Secret::new(TOKEN), "i-2")).unwrap_err();
    assert!(error.to_string().contains("not \"i-2\""), "{error}");
}

#[test]
fn without_a_pin_nothing_but_enrolment_is_asked() {
    let key = KeyPair::generate().unwrap();
    let server = serve(&key, Arc::new(NoClientAuth), Arc::new(|_| (200, "ok".into())));
    let error = blocking(client(&server, None).livez()).unwrap_err();
    assert!(error.to_string().contains("no key is pinned"), "{error}");
}

#[test]
fn the_client_certificate_is_what_the_authority_vouches_for() {
    let folder = tempfile::tempdir().unwrap();
    let ca = Ca::init(folder.path()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(ca.certificate_pem().as_bytes()).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .unwrap();
    let key = KeyPair::generate().unwrap();
    let server = serve(&key, clients, Arc::new(|_| (200, "ok".into())));
    let ask = |certificate: Option<&ClientCertificate>| {
        let client = AgentClient::new(server.address, PlainDialer, Some(spki(&key)), certificate).unwrap();
        blocking(async move { client.livez().await })
    };
    ask(Some(
        &ca.issue("control-plane", crate::ca::DEFAULT_LIFETIME).unwrap(),
    ))
    .unwrap();
    assert!(ask(None).is_err());
    let other = tempfile::tempdir().unwrap();
    let foreign = Ca::init(other.path())
        .unwrap()
        .issue("control-plane", crate::ca::DEFAULT_LIFETIME)
        .unwrap();
    assert!(ask(Some(&foreign)).is_err());
}

#[test]
fn nobody_there_is_said_with_the_address() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let client = AgentClient::new(address, PlainDialer, Some("00".into()), None).unwrap();
    let error = blocking(client.livez()).unwrap_err().to_string();
    assert!(
        error.contains(&address.to_string()) && error.contains("refused"),
        "{error}"
    );
}

/// That the new connection got through is what the confirmation proves.
#[test]
fn a_change_on_trial_is_confirmed_over_another_connection() {
    let key = KeyPair::generate().unwrap();
    let asked = Arc::new(std::sync::Mutex::new(Vec::new()));
    let asking = Arc::clone(&asked);
    let handler: Handler = Arc::new(move |path| {
        asking.lock().unwrap().push(path.to_owned());
        let until = match path.starts_with("/v1/confirm/") {
            true => "null",
            false => "\"2026-11-22T00:00:00Z\"",
        };
        let answer = format!(r#"{{"generation":7,"changed":true,"confirm_until":{until},"ready":true}}"#);
        (200, answer)
    });
    let server = serve(&key, Arc::new(NoClientAuth), handler);
    let client = client(&server, Some(spki(&key)));
    let trial = Terms {
        confirm: Some(Duration::from_secs(60)),
        force: false,
    };
    let changed = blocking(client.revoke_key("SHA256:a/b", trial)).unwrap();
    assert_eq!((changed.generation, changed.confirm_until), (7, None));
    assert_eq!(
        *asked.lock().unwrap(),
        ["/v1/keys/SHA256%3Aa%2Fb?confirm=60s&force=false", "/v1/confirm/7"]
    );
}

#[test]
fn a_refused_change_says_why_in_the_agents_words() {
    let key = KeyPair::generate().unwrap();
    let problem =
        r#"{"status":409,"title":"Conflict","detail":"SSH is\u001b no longer let in","code":"dangerous"}"#;
    let server = serve(
        &key,
        Arc::new(NoClientAuth),
        Arc::new(move |_| (409, problem.into())),
    );
    let client = client(&server, Some(spki(&key)));
    let error = blocking(client.revoke_rule("ssh", Terms::default())).unwrap_err();
    assert_eq!(
        error.to_string(),
        "/v1/firewall/rules/ssh answered 409: SSH is\\u{1b} no longer let in"
    );
    assert!(matches!(error, ClientError::Status { code: Some(code), .. } if code == "dangerous"));
}
