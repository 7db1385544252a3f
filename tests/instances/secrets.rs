//! Known secrets are used in all ways that there are, and then looked for wherever somebody else could see them.
//!
//! Each place has its positive control: a word that the test itself puts there is found by the same look.
//! May not live here: what a bundle for support holds (`bug_report`), who may ask for what (`access`).

use std::sync::Arc;
use std::time::Duration;

use portcullis_protocol::Secret;
use portcullis_provision::client::blocking;
use portcullis_provision::enrol::Registrar;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::{Value, json};

use crate::api::Api;
use crate::enrol::{self, Desk};
use crate::hunt::{CONTROL, Hunt};
use crate::lab::{Lab, Machine, SOON, eventually};
use crate::push_auth::{TOKEN_PORT, rsa_key};
use crate::receiver::{Asked, Authority, HOST, PATIENTLY, PORT, Server, no_content, push_to_us, put, trust};

const BEARER: &str = "bearer-5d41402abc4b2a76b9719d911017c592";
pub const GRANTED: &str = "granted-7d793037a0760186574b0282f2f435e7";
const EXTERNAL_ID: &str = "external-9e107d9d372bb6826bd81d3542a419d6";
const GIVEN_TOKEN: &str = "given-c9f0f895fb98ab9159f51fd0297e236d";
const SECOND_TOKEN: &str = "second-e4d909c290d0fb1ca068ffaddf22cbd0";

/// A receiver of reports and one who gives out tokens; both keep what they got.
pub fn control_plane(lab: &Lab, authority: &Authority) -> (Server, Server) {
    let receiver = Server::start(lab, (HOST, PORT), Some(authority.tls()), |_| no_content());
    let tokens = Server::start(lab, (HOST, TOKEN_PORT), Some(authority.tls()), |_| {
        let token = json!({"access_token": GRANTED, "token_type": "Bearer", "expires_in": 3600,
            "issued_token_type": "urn:ietf:params:oauth:token-type:access_token"});
        (
            "200 OK\r\ncontent-type: application/json".to_owned(),
            token.to_string(),
        )
    });
    (receiver, tokens)
}

pub fn service_key(key: &str) -> String {
    json!({"alg": "RS256", "private-key": key, "kid": "k", "iss": "i", "sub": "s"}).to_string()
}

pub fn service_account(key_file: &str) -> String {
    format!(
        "[report.auth]\nkind = \"service-account\"\nkey_file = \"{key_file}\"\n\
         token_url = \"https://{HOST}:{TOKEN_PORT}/oauth2/token/exchange\""
    )
}

pub fn authorized<'a>(with: &'a str) -> impl Fn(&Asked) -> bool + 'a {
    move |asked| asked.header("authorization") == format!("Bearer {with}")
}

/// The last line of a key in PEM that is all of the key.
fn line_of(pem: &str) -> String {
    pem.lines().nth(1).unwrap().to_owned()
}

#[test]
fn known_secrets_are_seen_by_nobody_else() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let authority = Authority::new();
    let (key, _) = rsa_key(&lab, "service-account");
    let first_token = machine.spec.enrolment_token().unwrap().expose().to_owned();
    let known = vec![
        ("first token", first_token),
        ("given token", GIVEN_TOKEN.to_owned()),
        ("second token", SECOND_TOKEN.to_owned()),
        ("external id", EXTERNAL_ID.to_owned()),
        ("bearer", BEARER.to_owned()),
        ("granted", GRANTED.to_owned()),
        ("service account", line_of(&key)),
        ("tls key", line_of(&machine.ok("cat /var/lib/portcullis/tls.key"))),
    ];
    let (clients, client) = (Authority::new(), "gpu-0");
    let (certificate, client_key) = clients.client(client);
    let known = [known, vec![("client key", line_of(&client_key))]].concat();
    let scanned = lab.machine("one");
    let hunt = Hunt::new(&scanned, known);
    hunt.watch_processes();
    let _desk = enrol_by_a_credential(&lab, &mut machine, &authority);
    push_by_a_certificate(
        &lab,
        &mut machine,
        &authority,
        (&clients, &certificate, &client_key),
    );

    // The control comes in as a rule's name: it is in rules, reports, the audit log, and what is pushed.
    let (receiver, _tokens) = control_plane(&lab, &authority);
    put(&machine, "report.token", "600", BEARER);
    trust(
        &machine,
        &authority,
        "[report.auth]\nkind = \"bearer\"\ntoken_file = \"/etc/portcullis/report.token\"",
    );
    receiver.until(PATIENTLY, "a report with the token", authorized(BEARER));
    put(&machine, "report-key.json", "600", &service_key(&key));
    trust(
        &machine,
        &authority,
        &service_account("/etc/portcullis/report-key.json"),
    );
    receiver.until(PATIENTLY, "one by the service account", authorized(GRANTED));
    let api = Api::new(&lab, &machine);
    let rule = json!({"id": CONTROL, "protocol": "tcp", "from_port": 8080, "to_port": 8080});
    api.done("POST", "/v1/firewall/rules", &rule);
    let told = receiver.until(PATIENTLY, "the change", |asked| {
        String::from_utf8_lossy(&asked.body).contains("\"generation\":4")
    });
    let texts: Vec<(&str, String)> = [
        ("GET /v1/spec", "/v1/spec"),
        ("GET /v1/health", "/v1/health"),
        ("GET /metrics", "/metrics"),
        (
            "GET /v1/identity",
            "/v1/identity?nonce=00112233445566778899aabbccddeeff",
        ),
    ]
    .map(|(name, path)| (name, api.ask("GET", path, &Value::Null).body))
    .into();
    hunt.only_control(texts[0].0, &texts[0].1);
    for (name, text) in &texts {
        assert!(!text.is_empty(), "{name}");
        let secrets: Vec<&str> = hunt
            .in_text(text)
            .into_iter()
            .filter(|name| *name != "control")
            .collect();
        assert!(secrets.is_empty(), "{name}: {secrets:?}");
    }
    assert!(
        hunt.in_text(&String::from_utf8_lossy(&told.body))
            .is_subset(&["control"].into())
    );

    // Another token and an external id on standard input, the receiver away: the spool fills.
    drop(receiver);
    let mut changed = machine.spec.clone();
    changed.generation = changed.generation.next().next();
    let control_plane = changed.control_plane.as_mut().unwrap();
    control_plane.enrolment_token = Some(Secret::new(SECOND_TOKEN));
    control_plane.external_id = Some(Secret::new(EXTERNAL_ID));
    let rule = serde_json::from_value(rule).unwrap();
    changed.firewall.ingress.push(rule);
    let output = machine.apply(&changed);
    assert!(output.success(), "{output:?}");
    crash(&machine);

    scanned.ok(&format!(
        "logger {CONTROL}; nft add table inet other '{{ comment \"{CONTROL}\"; }}'
         systemd-run --quiet --unit=shown -E A={CONTROL} sh -c 'sleep 100; : {CONTROL}'
         install -m 644 /dev/null /srv/public; echo {CONTROL} > /srv/public"
    ));
    let journal = scanned.ok("journalctl --no-pager -o export");
    hunt.only_control("journal", &journal);
    // Each process could keep its memory out of cores, the one without rights too.
    assert!(!journal.contains("a crash could write secrets"), "it could not");
    hunt.only_control("audit log", &scanned.ok("portcullis audit --format json"));
    let bundle = scanned.ok("portcullis bug-report -o - 2>/dev/null | tar -xzOf -");
    assert!(
        bundle.contains("manifest") || bundle.contains("A bug report of portcullis"),
        "{bundle}"
    );
    hunt.only_control("bug report", &bundle);
    for look in [
        "portcullis status",
        "portcullis status --format json",
        "portcullis check --format json",
    ] {
        let said = scanned.run(look).stdout;
        assert!(
            said.len() > 200 && hunt.in_text(&said).is_subset(&["control"].into()),
            "{look}: {said}"
        );
    }
    processes_show_only_the_control(&hunt);
    files_hold_it_for_root_alone(&hunt);
}

/// Enrols at the control plane's address by a token that is a credential, encrypted on disk.
fn enrol_by_a_credential(lab: &Lab, machine: &mut Machine, authority: &Authority) -> Desk {
    trust(machine, authority, "");
    let registrar = Registrar::open_or_init(&lab.path("registrar"), Duration::from_secs(3600)).unwrap();
    let (registrar, id) = (Arc::new(registrar), machine.instance.id().to_owned());
    registrar.expect(&id, Secret::new(GIVEN_TOKEN)).unwrap();
    let clerk = registrar.clone();
    let desk = Desk::new(
        lab,
        authority,
        registrar.certificate_pem(),
        Box::new(move |request, _| clerk.enrol(request).ok()),
    );
    let seal = "mkdir -p /etc/systemd/system/portcullis.service.d; mkdir -m 700 /etc/credstore.encrypted
        cp /usr/share/doc/portcullis/examples/credentials.conf /etc/systemd/system/portcullis.service.d/
        cd /etc/credstore.encrypted
        systemd-creds encrypt --with-key=host --name=portcullis.enrolment_token - portcullis.enrolment_token
        systemctl daemon-reload; systemctl restart portcullis";
    let sealed = machine.run_with(seal, GIVEN_TOKEN.as_bytes());
    assert!(sealed.success(), "{sealed:?}");
    machine.push(|spec| {
        let control_plane = spec.control_plane.as_mut().unwrap();
        control_plane.enrol_url = Some(enrol::URL.parse().unwrap());
    });
    let pem = registrar.certificate_pem();
    eventually(PATIENTLY, "it is certified", || {
        blocking(enrol::by_authority(lab, machine, pem, &id).livez())
    });
    desk
}

/// Pushes by a certificate whose key is in a file.
fn push_by_a_certificate(
    lab: &Lab,
    machine: &mut Machine,
    authority: &Authority,
    (clients, certificate, key): (&Authority, &str, &str),
) {
    let der = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    let tls = Some(authority.tls_for(&[der(&clients.pem)]));
    let receiver = Server::start(lab, (HOST, PORT), tls, |_| no_content());
    put(machine, "report.crt", "644", certificate);
    put(machine, "report.key", "600", key);
    let auth = "[report.auth]\nkind = \"mtls\"\nclient_certificate = \"/etc/portcullis/report.crt\"\n\
                client_key = \"/etc/portcullis/report.key\"";
    trust(machine, authority, auth);
    push_to_us(machine);
    let asked = receiver.next(PATIENTLY);
    assert_eq!(asked.certificate.as_deref(), Some(&*der(certificate)));
}

/// A crash with cores allowed, by an abort as after a panic, and by a bad access.
fn crash(machine: &Machine) {
    machine.ok(
        "cd /etc/systemd/system; for unit in portcullis portcullis-front; do
            mkdir -p $unit.service.d; printf '[Service]\\nLimitCORE=infinity\\n' > $unit.service.d/core.conf
         done; systemctl daemon-reload; systemctl restart portcullis
         grep -q '^core$' /proc/sys/kernel/core_pattern",
    );
    for (unit, signal) in [
        ("portcullis", "ABRT"),
        ("portcullis", "SEGV"),
        ("portcullis-front", "ABRT"),
        ("portcullis-front", "SEGV"),
    ] {
        machine.until_ready();
        let main = || machine.unit(unit, "MainPID");
        let pid = main();
        // The first SIGSEGV only takes the runtime's own handler away: it waits for the access to fail again.
        eventually(SOON, "another process", || match main() {
            now if now == pid => {
                machine.run(&format!("kill -{signal} {pid}"));
                Err(now)
            }
            now if now == "0" => Err(now),
            _ => Ok(()),
        });
    }
    machine.until_ready();
    // The control: what does not protect itself leaves a core, with its memory, where it worked.
    let script = format!("x={CONTROL}; kill -SEGV $$");
    put(machine, "../../run/hunt/crash", "600", &script);
    machine.run(
        "systemd-run --quiet --wait -p LimitCORE=infinity -p WorkingDirectory=/srv bash /run/hunt/crash",
    );
    let cores = machine.ok("find / \\( -path /proc -o -path /sys \\) -prune -o -type f -name 'core*' -newer /etc/systemd/system/portcullis-front.service.d/core.conf -print");
    assert_eq!(cores, "/srv/core");
    let found = machine.run(&format!("grep -aqF {CONTROL} /srv/core"));
    assert!(found.success(), "{found:?}");
}

fn processes_show_only_the_control(hunt: &Hunt<'_>) {
    let machine = hunt.machine;
    eventually(SOON, "the control is seen in both places", || {
        let seen = machine
            .run("grep -c . /run/hunt/rounds; sort -u /run/hunt/seen")
            .stdout;
        let both = ["/cmdline:", "/environ:"]
            .iter()
            .all(|place| seen.contains(place));
        if both { Ok(()) } else { Err(seen) }
    });
    let seen = machine.ok("sort -u /run/hunt/seen; systemctl stop hunt");
    hunt.only_control("arguments and environments", &seen);
    let rounds: u32 = machine.ok("wc -l < /run/hunt/rounds").parse().unwrap();
    println!("the processes were looked at {rounds} times");
}

/// Where which secret is known to lie, and why; nobody but root may read any of it.
const PLACES: [(&str, &[&str]); 9] = [
    // Where the owner put it.
    ("/etc/portcullis/report.token", &["bearer"]),
    ("/etc/portcullis/report.key", &["client key"]),
    ("/etc/portcullis/report-key.json", &["service account"]),
    ("/etc/portcullis/spec.json", &["first token"]),
    // What systemd decrypted for the unit.
    (
        "/run/credentials/portcullis.service/portcullis.enrolment_token",
        &["given token"],
    ),
    // Where the agent keeps it: what was used is in neither.
    ("/var/lib/portcullis/tls.key", &["tls key"]),
    ("/var/lib/portcullis/spec.json", &["second token", "external id"]),
    // What cloud-init keeps of the user-data: the token in it is used by then.
    ("/var/lib/cloud/", &["first token"]),
    ("/run/cloud-init/", &["first token"]),
];

fn files_hold_it_for_root_alone(hunt: &Hunt<'_>) {
    let listed = hunt.in_files();
    let public: Vec<&String> = listed
        .iter()
        .filter(|line| line.ends_with(" /srv/public"))
        .collect();
    assert_eq!(public.len(), 1, "the control: {listed:?}");
    let mut with_secrets = 0;
    for line in &listed {
        let mut words = line.splitn(3, ' ');
        let (mode, owner, path) = (
            words.next().unwrap(),
            words.next().unwrap(),
            words.next().unwrap(),
        );
        // Only the control is in it: that may be anywhere.
        let secrets = hunt.secrets_of(path);
        if secrets.is_empty() {
            continue;
        }
        with_secrets += 1;
        let place = PLACES.iter().find(|(place, _)| path.starts_with(place));
        assert!(
            place.is_some_and(|(_, named)| secrets.iter().all(|name| named.contains(name))),
            "{line}: not a place for {secrets:?}"
        );
        assert!(
            mode.ends_with("00") && owner == "root",
            "{line}: others can read it"
        );
    }
    println!(
        "{with_secrets} files hold secrets, of {} with any word: {listed:#?}",
        listed.len()
    );
    assert!(with_secrets >= 7, "{listed:?}");
}
