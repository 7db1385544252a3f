//! Changes that the control plane makes after launch, over the HTTPS API, by curl.
//!
//! May not live here: what is refused whatever it says (`api_refusals`), `portcullisctl` (`api_commands`),
//! changes made on the instance (`changes`), and reading (`endpoint`).

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;

use portcullis_protocol::Spec;
use portcullis_provision::local::{Output, Outsider, in_namespace};
use portcullis_provision::reach::{Reached, Transport, listen_inside};
use serde_json::{Value, json};

use crate::endpoint::{Answer, curl, files, with_certificate};
use crate::lab::{Lab, Machine, Run, SOON, USER, vantage};
use crate::login::ssh;

use Reached::{Filtered, Open};
use Transport::Tcp;

/// A control plane with a certificate, and the instance that it talks to.
pub struct Api<'a> {
    lab: &'a Lab,
    machine: &'a Machine,
    certificate: [PathBuf; 2],
}

impl<'a> Api<'a> {
    pub fn new(lab: &'a Lab, machine: &'a Machine) -> Self {
        let certificate = files(lab, "right", &lab.provider.client_certificate().unwrap());
        Self {
            lab,
            machine,
            certificate,
        }
    }

    /// A request with curl's options.
    pub fn with(&self, options: &[&str], method: &str, path: &str, body: &[u8]) -> Answer {
        let file = self.lab.path("body");
        std::fs::write(&file, body).unwrap();
        let data = format!("@{}", file.display());
        let mut all = vec!["-X", method];
        all.extend(with_certificate(&self.certificate));
        if !body.is_empty() {
            all.extend(["--data-binary", &data, "-H", "content-type: application/json"]);
        }
        all.extend(options);
        curl(&self.lab.provider.network().path(), self.machine, path, &all).unwrap()
    }

    pub fn ask(&self, method: &str, path: &str, body: &Value) -> Answer {
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        self.with(&[], method, path, body.as_bytes())
    }

    /// It is done; the generation, and whether anything changed.
    #[track_caller]
    pub fn done(&self, method: &str, path: &str, body: &Value) -> (u64, bool) {
        done(&self.ask(method, path, body))
    }

    /// It is refused with a problem document, which names what is wrong, and nothing changes.
    #[track_caller]
    pub fn refused(&self, answer: impl FnOnce() -> Answer, status: u16, words: &str) {
        let before = state(self.machine);
        let answer = answer();
        assert_eq!(
            (answer.status, answer.kind.as_str()),
            (status, "application/problem+json"),
            "{answer:?}"
        );
        let problem: Value = serde_json::from_str(&answer.body).unwrap();
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains(words), "{words}: {detail}");
        assert_eq!(problem["status"], status);
        assert_eq!(state(self.machine), before, "{answer:?}");
    }
}

#[track_caller]
fn done(answer: &Answer) -> (u64, bool) {
    assert_eq!(answer.status, 200, "{answer:?}");
    let document: Value = serde_json::from_str(&answer.body).unwrap();
    assert!(document["ready"].is_boolean(), "{document}");
    (
        document["generation"].as_u64().unwrap(),
        document["changed"].as_bool().unwrap(),
    )
}

/// All that a change would change: what is on disk, and the kernel's rules.
pub fn state(machine: &Machine) -> [String; 2] {
    let disk = machine.ok("cd /var/lib/portcullis && sha256sum *.json ~ubuntu/.ssh/authorized_keys");
    [disk, machine.table()]
}

/// A rule for one TCP port.
pub fn rule(id: &str, port: u16) -> Value {
    json!({"id": id, "protocol": "tcp", "from_port": port, "to_port": port})
}

/// A login with one of the lab's keys.
pub fn logs_in(lab: &Lab, machine: &Machine, stranger: &Outsider, key: &str) -> Output {
    ssh(lab, machine, stranger, &lab.path(key))
        .args(["-o", "BatchMode=yes", "id -un"])
        .output_text()
}

#[track_caller]
pub fn is_let_in(output: &Output) {
    assert_eq!(output.stdout, format!("{USER}\n"), "{output:?}");
}

#[track_caller]
pub fn is_turned_away(output: &Output) {
    assert!(
        output.stderr.contains("Permission denied (publickey)"),
        "{output:?}"
    );
}

/// A key whose fingerprint has to be escaped in a path.
fn key_with_slash(lab: &Lab) -> (String, String) {
    for number in 0..200 {
        let name = format!("slash-{number}");
        let key = lab.new_key(&name);
        if key.fingerprint().contains('/') {
            return (name, key.fingerprint());
        }
    }
    panic!("no fingerprint with a slash in 200 keys");
}

#[test]
fn a_rule_opens_a_port_when_the_answer_is_there_and_its_end_ends_sessions() {
    let lab = Lab::new();
    let machine = lab.launch();
    let api = Api::new(&lab, &machine);
    machine.ok("systemd-run --quiet --unit=echo ncat -l -k 9000 --sh-exec cat");
    machine.ok("timeout 10 sh -c 'until ncat -z 127.0.0.1 9000; do sleep 0.1; done'");
    let stranger = lab.stranger();
    let from = vantage(&stranger);
    assert_eq!(machine.seen_from(&from, Tcp, 9000), [Filtered; 2]);

    let web = rule("web", 9000);
    assert_eq!(api.done("POST", "/v1/firewall/rules", &web), (2, true));
    assert_eq!(machine.seen_from(&from, Tcp, 9000), [Open; 2]);
    let log = machine.ok("journalctl -b -o json -u portcullis SOURCE='control plane'");
    assert!(log.contains("generation 2 was accepted"), "{log}");
    assert_eq!(api.done("POST", "/v1/firewall/rules", &web), (2, false));
    let other = rule("web", 9001);
    api.refused(
        || api.ask("POST", "/v1/firewall/rules", &other),
        409,
        "revoke it first",
    );

    let address = SocketAddr::new(machine.v4(), 9000);
    let mut held = in_namespace(&stranger.path(), || TcpStream::connect(address))
        .unwrap()
        .unwrap();
    held.set_read_timeout(Some(SOON)).unwrap();
    let mut echoed = [0; 4];
    held.write_all(b"ping").unwrap();
    held.read_exact(&mut echoed).unwrap();
    assert_eq!(&echoed, b"ping");

    assert_eq!(
        api.done("DELETE", "/v1/firewall/rules/web", &Value::Null),
        (3, true)
    );
    assert_eq!(machine.seen_from(&from, Tcp, 9000), [Filtered; 2]);
    match held.read(&mut echoed) {
        Ok(0) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        other => panic!("the session goes on: {other:?}"),
    }
    api.refused(
        || api.ask("DELETE", "/v1/firewall/rules/web", &Value::Null),
        404,
        "web",
    );
    let ssh = format!("/v1/firewall/rules/{}", machine.spec.firewall.ingress[0].id);
    api.refused(
        || api.ask("DELETE", &ssh, &Value::Null),
        409,
        "SSH is no longer let in",
    );
    assert_eq!(
        api.done("DELETE", &format!("{ssh}?force=true"), &Value::Null),
        (4, true)
    );
    assert_eq!(machine.seen_from(&from, Tcp, 22), [Filtered; 2]);
    // Durable: the next daemon has it.
    machine.ok("systemctl restart portcullis");
    assert_eq!(machine.until_generation(4).generation, Some(4));
}

#[test]
fn a_key_logs_in_when_the_answer_is_there_and_is_refused_when_it_is_revoked() {
    let lab = Lab::new();
    let machine = lab.launch();
    let api = Api::new(&lab, &machine);
    let stranger = lab.stranger();
    let (name, fingerprint) = key_with_slash(&lab);
    let key = json!({"user": USER, "key": lab.public_key(&name).to_line()});
    is_let_in(&logs_in(&lab, &machine, &stranger, "id"));
    is_turned_away(&logs_in(&lab, &machine, &stranger, &name));

    let escaped = fingerprint.replace('/', "%2F").replace('+', "%2B");
    let short = escaped.strip_prefix("SHA256:").unwrap();
    let (mut generation, _) = (1, ());
    for form in [escaped.as_str(), short] {
        assert_eq!(api.done("POST", "/v1/keys", &key), (generation + 1, true));
        is_let_in(&logs_in(&lab, &machine, &stranger, &name));
        assert_eq!(api.done("POST", "/v1/keys", &key), (generation + 1, false));
        let path = format!("/v1/keys/{form}");
        assert_eq!(api.done("DELETE", &path, &Value::Null), (generation + 2, true));
        is_turned_away(&logs_in(&lab, &machine, &stranger, &name));
        api.refused(
            || api.ask("DELETE", &path, &Value::Null),
            404,
            &lab.public_key("id").fingerprint(),
        );
        generation += 2;
    }
    is_let_in(&logs_in(&lab, &machine, &stranger, "id"));
    for (wrong, words) in [
        (json!({"user": "../root", "key": key["key"]}), "user"),
        (json!({"user": USER, "key": "ssh-dss AAAA"}), "key"),
        (
            json!({"user": USER, "key": key["key"], "expires": "2020-01-01T00:00:00Z"}),
            "expires",
        ),
        (json!({"user": USER, "key": key["key"], "role": "x"}), "role"),
    ] {
        api.refused(|| api.ask("POST", "/v1/keys", &wrong), 422, words);
    }
}

#[test]
fn a_peer_reaches_everything_from_when_it_joins_until_it_leaves() {
    let lab = Lab::new();
    let machine = lab.launch();
    let api = Api::new(&lab, &machine);
    listen_inside(&machine.instance, &[(Tcp, 9000), (Tcp, 61_000)]).unwrap();
    let stranger = lab.stranger();
    let from = vantage(&stranger);
    let seen = |port| machine.seen_from(&from, Tcp, port);
    assert_eq!([seen(9000), seen(61_000)], [[Filtered; 2]; 2]);
    let path = "/v1/cluster/peers/i-new";
    let body = json!({"addresses": stranger.addresses()});
    assert_eq!(api.done("PUT", path, &body), (2, true));
    assert_eq!([seen(9000), seen(61_000)], [[Open; 2]; 2]);
    assert_eq!(api.done("PUT", path, &body), (2, false));

    api.refused(
        || api.ask("DELETE", path, &Value::Null),
        409,
        "no peer of the cluster is left",
    );
    assert_eq!(
        api.done("DELETE", &format!("{path}?force=true"), &Value::Null),
        (3, true)
    );
    assert_eq!([seen(9000), seen(61_000)], [[Filtered; 2]; 2]);
    // Other addresses replace those that it had.
    assert_eq!(api.done("PUT", path, &body), (4, true));
    assert_eq!(
        api.done("PUT", path, &json!({"addresses": ["192.0.2.9"]})),
        (5, true)
    );
    assert_eq!(seen(9000), [Filtered; 2]);
    for (body, words) in [
        (json!({"addresses": ["10.0.0.0/8"]}), "addresses[0]"),
        (json!({"addresses": ["127.0.0.1"]}), "loopback"),
        (json!({"addresses": []}), "no address"),
        (json!({"address": "10.0.0.1"}), "address"),
    ] {
        api.refused(|| api.ask("PUT", path, &body), 422, words);
    }
    let own = format!("/v1/cluster/peers/{}", machine.instance.id());
    let body = json!({"addresses": ["192.0.2.10"]});
    api.refused(|| api.ask("PUT", &own, &body), 422, "this instance itself");
}

#[test]
fn a_spec_is_read_without_secrets_and_replaced_only_if_nobody_else_changed_it() {
    let lab = Lab::new();
    let machine = lab.launch();
    let api = Api::new(&lab, &machine);
    listen_inside(&machine.instance, &[(Tcp, 9000)]).unwrap();
    let stranger = lab.stranger();
    let from = vantage(&stranger);
    // The token is over, this one is not.
    let control_plane = machine.spec.control_plane.as_ref().unwrap();
    let secret = control_plane.external_id.as_ref().unwrap().expose();
    let on_disk = || machine.ok("cat /var/lib/portcullis/spec.json");
    assert!(on_disk().contains(secret), "it is there to be seen");
    let headers = lab.path("headers");
    let dump = ["-D", headers.to_str().unwrap()];
    let read = api.with(&dump, "GET", "/v1/spec", b"");
    assert_eq!((read.status, read.kind.as_str()), (200, "application/json"));
    assert!(!read.body.contains(secret) && !read.body.contains("external_id"));
    let headers = std::fs::read_to_string(&headers).unwrap();
    assert!(headers.contains("etag: \"1\"\r\n"), "{headers}");

    let mut spec: Spec = serde_json::from_str(&read.body).unwrap();
    spec.generation = spec.generation.next();
    spec.firewall
        .ingress
        .push(serde_json::from_value(rule("web", 9000)).unwrap());
    let put = |options: &[&str], path: &str, spec: &Spec| api.with(options, "PUT", path, &spec.to_json());
    api.refused(|| put(&[], "/v1/spec", &spec), 428, "If-Match");
    let known = ["-H", "If-Match: \"1\""];
    for stale in ["If-Match: \"2\"", "If-Match: W/\"1\"", "If-Match: \"x\""] {
        api.refused(
            || put(&["-H", stale], "/v1/spec", &spec),
            412,
            "generation 1 holds",
        );
    }
    api.refused(|| put(&["-H", "If-Match: 1"], "/v1/spec", &spec), 400, "If-Match");
    assert_eq!(machine.seen_from(&from, Tcp, 9000), [Filtered; 2]);
    assert_eq!(done(&put(&known, "/v1/spec", &spec)), (2, true));
    assert_eq!(machine.seen_from(&from, Tcp, 9000), [Open; 2]);
    // Whose answer was lost may ask again.
    assert_eq!(done(&put(&known, "/v1/spec", &spec)), (2, false));
    assert!(on_disk().contains(secret), "who can't see the secret keeps it");
    // The same condition guards the other changes.
    let web = rule("other", 9001);
    api.refused(
        || api.with(&known, "POST", "/v1/firewall/rules", web.to_string().as_bytes()),
        412,
        "generation 2 holds",
    );

    let mut shut = spec.clone();
    shut.generation = shut.generation.next();
    shut.firewall.ingress.clear();
    let known = ["-H", "If-Match: \"2\""];
    api.refused(
        || put(&known, "/v1/spec", &shut),
        409,
        "SSH is no longer let in from",
    );
    let trial = put(&known, "/v1/spec?confirm=60s", &shut);
    assert_eq!(done(&trial), (3, true));
    assert!(trial.body.contains("\"confirm_until\":\"2"), "{trial:?}");
    assert_eq!(machine.seen_from(&from, Tcp, 22), [Filtered; 2]);
    let web = rule("late", 9002);
    api.refused(
        || api.ask("POST", "/v1/firewall/rules", &web),
        409,
        "awaits confirmation",
    );
    assert_eq!(api.done("POST", "/v1/confirm/3", &Value::Null).0, 3);
    machine.ok("! test -e /var/lib/portcullis/trial.json");
    let old = api.with(&["-H", "If-Match: *"], "PUT", "/v1/spec", &spec.to_json());
    assert_eq!(old.status, 409, "{old:?}");
}
