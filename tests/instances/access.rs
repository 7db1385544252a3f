//! Roles over the HTTPS API, by curl and openssl: what each may do, and the owner's way to revoke and narrow it.
//!
//! May not live here: which certificates get in at all (`access_certificates`), what changes do (`api`).

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use portcullis_protocol::access::{AccessList, Role};
use portcullis_provision::local::AGENT_PORT;
use serde_json::{Value, json};

use crate::api::{Api, rule, state};
use crate::endpoint::{Answer, curl, files, with_certificate};
use crate::lab::{Lab, Machine, SOON, USER, eventually, inside};

/// Message ids of the daemon's log.
pub const REFUSED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e64";
const CHANGED: &str = "5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e65";

pub fn of_role(lab: &Lab, role: Role) -> [PathBuf; 2] {
    let certificate = lab.provider.client_certificate_for(role).unwrap();
    files(lab, role.as_str(), &certificate)
}

/// Asks with a certificate.
#[track_caller]
pub fn ask(
    lab: &Lab,
    machine: &Machine,
    certificate: &[PathBuf; 2],
    method: &str,
    path: &str,
    body: &Value,
) -> Answer {
    let body = body.to_string();
    let mut options = vec!["-X", method, "-H", "If-Match: *"];
    options.extend(with_certificate(certificate));
    if body != "null" {
        options.extend(["--data-binary", &body]);
    }
    curl(&lab.provider.network().path(), machine, path, &options).unwrap()
}

/// It is a 403 that says why.
#[track_caller]
pub fn is_refused(answer: &Answer, words: &str) {
    let kind = "application/problem+json";
    assert_eq!((answer.status, answer.kind.as_str()), (403, kind), "{answer:?}");
    let problem: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(problem["code"], "not-permitted", "{answer:?}");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains(words), "{words}: {detail}");
}

#[track_caller]
pub fn list(machine: &Machine) -> AccessList {
    serde_json::from_str(&machine.ok("portcullis access list --format json")).unwrap()
}

/// The daemon's entries with a message id.
pub fn entries(machine: &Machine, id: &str) -> Vec<Value> {
    let text = machine.ok(&format!(
        "journalctl --sync; journalctl -b -o json MESSAGE_ID={id}"
    ));
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Sets sections of the settings, and waits until the new daemon answers.
fn set(machine: &Machine, text: &str) {
    let written = machine.run_with(
        "cat > /etc/portcullis/conf.d/access.toml && systemctl restart portcullis",
        text.as_bytes(),
    );
    assert!(written.success(), "{written:?}");
    machine.until_ready();
}

/// Each request that changes or tells something, with what it needs.
fn requests(machine: &Machine) -> Vec<(&'static str, &'static str, Value, &'static str)> {
    let spec: Value = serde_json::from_slice(&machine.spec.without_secrets().to_json()).unwrap();
    let key = machine.spec.authorized_keys[0].key.to_line();
    let peer = json!({"addresses": ["192.0.2.77"]});
    vec![
        ("GET", "/v1/health", Value::Null, "health.read"),
        ("GET", "/v1/spec", Value::Null, "spec.read"),
        ("POST", "/v1/firewall/rules", rule("web", 9000), "firewall.write"),
        ("DELETE", "/v1/firewall/rules/web", Value::Null, "firewall.write"),
        ("PUT", "/v1/cluster/peers/i-new", peer, "peers.write"),
        (
            "DELETE",
            "/v1/cluster/peers/i-new?force=true",
            Value::Null,
            "peers.write",
        ),
        (
            "POST",
            "/v1/keys",
            json!({"user": "root", "key": key}),
            "keys.write",
        ),
        ("DELETE", "/v1/keys/SHA256:absent", Value::Null, "keys.write"),
        ("POST", "/v1/confirm/99", Value::Null, "confirm"),
        ("PUT", "/v1/spec", spec, "spec.write"),
    ]
}

#[test]
fn each_role_does_what_it_may_and_nothing_else() {
    let lab = Lab::new();
    let machine = lab.launch();
    for role in Role::ALL {
        let certificate = of_role(&lab, role);
        let may: Vec<&str> = role.permissions().iter().map(|p| p.as_str()).collect();
        for (method, path, body, needed) in requests(&machine) {
            let before = state(&machine);
            let answer = ask(&lab, &machine, &certificate, method, path, &body);
            if may.contains(&needed) {
                // What it says then is another matter: that key is not there, nothing awaits confirmation.
                assert!(answer.status != 403, "{role} {method} {path}: {answer:?}");
            } else {
                is_refused(&answer, &format!("the role {role} lacks the permission {needed}"));
                assert_eq!(state(&machine), before, "{role} {method} {path}");
            }
        }
    }
    let access = list(&machine);
    assert!(access.authority && access.external_id && access.closed.is_none());
    assert_eq!(access.max_lifetime_s, 86_400);
    assert!(access.refused["permission"] >= 7, "{access:?}");
    for role in &access.roles {
        let used = role.last_use.as_ref().unwrap();
        assert_eq!(used.subject, "CN=control-plane");
        assert!(role.revoked.is_none() && !role.narrowed, "{role:?}");
    }
    // Whoever asks for no secret needs no role.
    let anybody = |path: &str| curl(&lab.provider.network().path(), &machine, path, &[]).unwrap();
    assert_eq!(anybody("/livez").status, 200);
    let told = entries(&machine, REFUSED);
    let last = told
        .iter()
        .find(|entry| entry["PERMISSION"] == "keys.write")
        .unwrap();
    assert_eq!(last["SUBJECT"], "CN=control-plane", "{last}");
    assert_eq!(last["REASON"], "permission", "{last}");
    assert!(last["ADDRESS"].as_str().unwrap().starts_with("10."), "{last}");
}

/// A connection that stays open.
pub struct Connection {
    process: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Connection {
    pub fn open(lab: &Lab, machine: &Machine, certificate: &[PathBuf; 2]) -> Self {
        let [certificate, key] = certificate.each_ref().map(|path| path.to_str().unwrap());
        let mut process = inside(&lab.provider.network().path(), "openssl")
            .args([
                "s_client",
                "-quiet",
                "-cert",
                certificate,
                "-key",
                key,
                "-connect",
            ])
            .arg(format!("{}:{AGENT_PORT}", machine.v4()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (ask, answers) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        Self {
            process,
            ask,
            answers: BufReader::new(answers),
        }
    }

    /// The status of one request over it.
    #[track_caller]
    pub fn status(&mut self, request: &str) -> u16 {
        write!(self.ask, "{request} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        loop {
            let mut line = String::new();
            assert!(self.answers.read_line(&mut line).unwrap() > 0, "it hung up");
            // A body before it may have no line end.
            if let Some((_, status)) = line.split_once("HTTP/1.1 ") {
                return status[..3].parse().unwrap();
            }
        }
    }
}

impl Connection {
    /// There is nothing after the last answer.
    #[track_caller]
    pub fn hangs_up(&mut self) {
        let mut rest = String::new();
        self.answers.read_to_string(&mut rest).unwrap();
        assert!(!rest.contains("HTTP/1.1"), "{rest}");
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_revoked_role_is_refused_at_its_next_request_and_loses_its_connections() {
    let lab = Lab::new();
    let machine = lab.launch();
    let (operator, observer) = (of_role(&lab, Role::Operator), of_role(&lab, Role::Observer));
    let requests = [
        "GET /v1/health",
        "GET /v1/spec",
        "DELETE /v1/firewall/rules/ssh?force=true",
    ];
    let mut connections = requests.map(|_| Connection::open(&lab, &machine, &operator));
    let mut other = Connection::open(&lab, &machine, &observer);
    for open in connections.iter_mut().chain([&mut other]) {
        assert_eq!(open.status("GET /v1/health"), 200);
    }

    machine.ok("portcullis access revoke operator");
    for (open, request) in connections.iter_mut().zip(requests) {
        assert_eq!(open.status("GET /livez"), 200, "it is the role that is refused");
        assert_eq!(open.status(request), 403, "{request}");
        open.hangs_up();
    }
    assert_eq!(other.status("GET /v1/health"), 200, "another role");
    let answer = ask(&lab, &machine, &operator, "GET", "/v1/health", &Value::Null);
    is_refused(&answer, "the owner of this instance revoked the role operator");
    let again = machine.ok("portcullis access revoke operator --format json");
    assert!(again.contains("\"changed\": false"), "{again}");
    let shown = machine.ok("portcullis access list");
    let row = shown
        .lines()
        .find(|line| line.trim_start().starts_with("operator"))
        .unwrap_or_else(|| panic!("{shown}"));
    assert!(row.contains("REVOKED since 20") && row.contains(" by "), "{row}");

    // It outlasts a crash and a restart.
    let pid = machine.main_pid();
    machine.ok(&format!("kill -9 {pid}"));
    eventually(SOON, "another daemon", || match machine.main_pid() {
        now if now != 0 && now != pid => Ok(()),
        now => Err(now),
    });
    machine.until_ready();
    let refused = || {
        let answer = ask(&lab, &machine, &operator, "GET", "/v1/health", &Value::Null);
        is_refused(&answer, "revoked the role operator");
    };
    refused();
    machine.ok("systemctl restart portcullis");
    machine.until_ready();
    refused();

    let mut open = Connection::open(&lab, &machine, &operator);
    assert_eq!(open.status("GET /livez"), 200);
    machine.ok("portcullis access restore operator");
    assert_eq!(
        open.status("GET /v1/health"),
        200,
        "over a connection from before"
    );
    let told = entries(&machine, CHANGED);
    let told: Vec<&str> = told
        .iter()
        .filter_map(|entry| entry["MESSAGE"].as_str())
        .collect();
    assert_eq!(
        told,
        [
            "access over HTTPS was revoked: operator",
            "access over HTTPS was restored: operator"
        ]
    );
}

#[test]
fn an_owner_shuts_the_door_for_all_and_opens_it_for_one() {
    let lab = Lab::new();
    let machine = lab.launch();
    let roles = Role::ALL.map(|role| (role, of_role(&lab, role)));
    let who_gets_in = || -> Vec<Role> {
        let asked = roles.iter().filter(|(_, certificate)| {
            let answer = ask(&lab, &machine, certificate, "GET", "/v1/health", &Value::Null);
            assert!([200, 403].contains(&answer.status), "{answer:?}");
            answer.status == 200
        });
        asked.map(|(role, _)| *role).collect()
    };
    assert_eq!(who_gets_in(), Role::ALL);
    machine.ok("portcullis access revoke");
    assert_eq!(who_gets_in(), []);
    machine.ok("portcullis access restore observer");
    assert_eq!(who_gets_in(), [Role::Observer]);
    machine.ok("systemctl restart portcullis");
    machine.until_ready();
    assert_eq!(who_gets_in(), [Role::Observer]);

    // What can't be read is no permission.
    machine.ok("echo '{' > /var/lib/portcullis/access.json; systemctl restart portcullis");
    machine.until_ready();
    assert_eq!(who_gets_in(), []);
    let shown = machine.ok("portcullis access list");
    assert!(
        shown.contains("NOBODY") && shown.contains("access.json: damaged"),
        "{shown}"
    );
    let one = machine.run("portcullis access restore network");
    assert_eq!(one.code, Some(1), "{one:?}");
    assert!(one.stderr.contains("access.json: damaged"), "{one:?}");
    machine.ok("portcullis access restore");
    assert_eq!(who_gets_in(), Role::ALL);

    let wrong = machine.run("portcullis access revoke root");
    assert_eq!(wrong.code, Some(2), "{wrong:?}");
    assert!(
        wrong.stderr.contains("observer, network, keys, operator"),
        "{wrong:?}"
    );
    let nobody = machine.run("setpriv --reuid nobody --clear-groups portcullis access revoke");
    assert_eq!(nobody.code, Some(3), "{nobody:?}");
    assert_eq!(who_gets_in(), Role::ALL);
}

#[test]
fn an_owner_narrows_roles_and_lifetimes() {
    let lab = Lab::new();
    let machine = lab.launch();
    let api = Api::new(&lab, &machine);
    let network = of_role(&lab, Role::Network);
    let key = json!({"user": USER, "key": lab.new_key("second").to_line()});
    api.done("POST", "/v1/keys", &key);
    let web = ask(
        &lab,
        &machine,
        &network,
        "POST",
        "/v1/firewall/rules",
        &rule("web", 9000),
    );
    assert_eq!(web.status, 200, "{web:?}");
    // Keys are the owner's, and a network is only looked at.
    let own = Role::Operator.permissions().iter().map(|p| p.to_string());
    let own: Vec<String> = own.filter(|name| name != "keys.write").collect();
    set(
        &machine,
        &format!("[access.roles]\nnetwork = [\"health.read\"]\noperator = {own:?}\n"),
    );
    let get = |path: &str| ask(&lab, &machine, &network, "GET", path, &Value::Null);
    assert_eq!(get("/v1/health").status, 200);
    is_refused(&get("/v1/spec"), "lacks the permission spec.read");
    let late = ask(
        &lab,
        &machine,
        &network,
        "POST",
        "/v1/firewall/rules",
        &rule("late", 9001),
    );
    is_refused(&late, "lacks the permission firewall.write");
    api.refused(
        || {
            api.ask(
                "DELETE",
                &format!("/v1/keys/{}", fingerprint(&machine)),
                &Value::Null,
            )
        },
        403,
        "lacks the permission keys.write",
    );
    // A whole spec is no way around it.
    let spec: Value = serde_json::from_str(&api.ask("GET", "/v1/spec", &Value::Null).body).unwrap();
    let put = |change: &dyn Fn(&mut Value)| {
        let mut new = spec.clone();
        new["generation"] = json!(spec["generation"].as_u64().unwrap() + 1);
        change(&mut new);
        api.with(
            &["-H", "If-Match: *"],
            "PUT",
            "/v1/spec",
            new.to_string().as_bytes(),
        )
    };
    let without_keys = |new: &mut Value| new["authorized_keys"] = json!([]);
    api.refused(|| put(&without_keys), 403, "lacks the permission keys.write");
    let without_web = |new: &mut Value| {
        let rules = new["firewall"]["ingress"].as_array_mut().unwrap();
        rules.retain(|rule| rule["id"] != "web");
    };
    let done = put(&without_web);
    assert_eq!(done.status, 200, "{done:?}");

    let shown = machine.ok("portcullis access list");
    assert!(
        shown.contains("health.read (narrowed by the settings)"),
        "{shown}"
    );
    set(&machine, "[access]\nmax_lifetime = \"30m\"\n");
    is_refused(
        &ask(&lab, &machine, &network, "GET", "/v1/health", &Value::Null),
        "at most 1800 s",
    );
    // A permission that a role does not have by itself: the settings are refused whole, and say why.
    let wrong = machine.run_with(
        "cat > /etc/portcullis/conf.d/access.toml && portcullis check",
        b"[access.roles]\nobserver = [\"keys.write\"]\n",
    );
    assert_eq!(wrong.code, Some(2), "{wrong:?}");
    assert!(
        wrong
            .stderr
            .contains("access.roles.observer: the role observer does not have \"keys.write\""),
        "{wrong:?}"
    );
}

fn fingerprint(machine: &Machine) -> String {
    let fingerprint = machine.spec.authorized_keys[0].key.fingerprint();
    fingerprint.replace('/', "%2F").replace('+', "%2B")
}
