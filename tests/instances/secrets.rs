//! Known secrets are used in all ways that there are, and then looked for wherever somebody else could see them.
//!
//! Each place has its positive control: a word that the test itself puts there is found by the same look.
//! May not live here: what a bundle for support holds (`bug_report`), who may ask for what (`access`).

use std::collections::BTreeSet;

use portcullis_protocol::Secret;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::{Value, json};

use crate::api::Api;
use crate::lab::{Lab, Machine, SOON, eventually};
use crate::push_auth::{TOKEN_PORT, rsa_key};
use crate::receiver::{Asked, Authority, HOST, PATIENTLY, PORT, Server, no_content, push_to_us, put, trust};

/// Not a secret: what the test puts into each place to see that it would be found.
const CONTROL: &str = "control-word-that-is-found";
const BEARER: &str = "bearer-5d41402abc4b2a76b9719d911017c592";
const GRANTED: &str = "granted-7d793037a0760186574b0282f2f435e7";
const EXTERNAL_ID: &str = "external-9e107d9d372bb6826bd81d3542a419d6";
const SECOND_TOKEN: &str = "second-e4d909c290d0fb1ca068ffaddf22cbd0";

/// What is looked for, by name.
struct Hunt<'a> {
    machine: &'a Machine,
    known: Vec<(&'static str, String)>,
    /// When the instance was made, in seconds since 1970.
    since: String,
}

impl<'a> Hunt<'a> {
    fn new(machine: &'a Machine, mut known: Vec<(&'static str, String)>) -> Self {
        known.push(("control", CONTROL.to_owned()));
        assert!(known.iter().all(|(_, secret)| secret.len() > 20), "{known:?}");
        let since = machine.ok("stat -c %Z /var/lib/cloud/seed/nocloud/user-data");
        let hunt = Self {
            machine,
            known,
            since,
        };
        hunt.patterns("patterns", |_| true);
        hunt.patterns("secrets", |name| name != "control");
        hunt
    }

    /// A file for `grep -f`, for root alone.
    fn patterns(&self, file: &str, wanted: impl Fn(&str) -> bool) {
        let chosen = self.known.iter().filter(|(name, _)| wanted(name));
        let lines: Vec<&str> = chosen.map(|(_, secret)| secret.as_str()).collect();
        let script = format!("umask 077; mkdir -p /run/hunt; cat > /run/hunt/{file}");
        let output = self
            .machine
            .run_with(&script, (lines.join("\n") + "\n").as_bytes());
        assert!(output.success(), "{output:?}");
    }

    /// The names of what is in a text.
    fn in_text(&self, text: &str) -> BTreeSet<&'static str> {
        let found = self.known.iter().filter(|(_, secret)| text.contains(secret));
        found.map(|(name, _)| *name).collect()
    }

    /// The control is in it, and no secret.
    #[track_caller]
    fn only_control(&self, place: &str, text: &str) {
        assert_eq!(self.in_text(text), BTreeSet::from(["control"]), "{place}");
    }

    /// All files on all file systems that were written since the instance was made and that hold any of it, with
    /// mode and owner.
    fn in_files(&self) -> Vec<String> {
        let listed = self.machine.run(&format!(
            "find / \\( -path /proc -o -path /sys -o -path /dev -o -path /run/hunt \\) -prune -o \\
                -type f -newerct @{} -print0 | xargs -0 -r grep -laF -f /run/hunt/patterns | xargs -r stat -c '%a %U %n'",
            self.since
        ));
        listed.stdout.lines().map(str::to_owned).collect()
    }
}

/// Looks at the arguments and the environment of every process, again and again, and keeps what it finds.
fn watch_processes(machine: &Machine) {
    let script = "while :; do grep -aoHF -f /run/hunt/patterns /proc/[0-9]*/cmdline /proc/[0-9]*/environ >> /run/hunt/seen; \
                  echo >> /run/hunt/rounds; sleep 0.05; done";
    put(machine, "../../run/hunt/watch", "600", script);
    machine.ok("systemd-run --quiet --unit=hunt sh /run/hunt/watch");
    eventually(SOON, "a first round", || {
        match machine.run("cat /run/hunt/rounds").stdout.len() {
            0 => Err("none"),
            _ => Ok(()),
        }
    });
}

/// A receiver of reports and one who gives out tokens; both keep what they got.
fn control_plane(lab: &Lab, authority: &Authority) -> (Server, Server) {
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

fn service_key(key: &str) -> String {
    json!({"alg": "RS256", "private-key": key, "kid": "k", "iss": "i", "sub": "s"}).to_string()
}

fn service_account(key_file: &str) -> String {
    format!(
        "[report.auth]\nkind = \"service-account\"\nkey_file = \"{key_file}\"\n\
         token_url = \"https://{HOST}:{TOKEN_PORT}/oauth2/token/exchange\""
    )
}

fn authorized<'a>(with: &'a str) -> impl Fn(&Asked) -> bool + 'a {
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
        ("second token", SECOND_TOKEN.to_owned()),
        ("external id", EXTERNAL_ID.to_owned()),
        ("bearer", BEARER.to_owned()),
        ("granted", GRANTED.to_owned()),
        ("service account", line_of(&key)),
        ("tls key", line_of(&machine.ok("cat /var/lib/portcullis/tls.key"))),
    ];
    let scanned = lab.machine("one");
    let hunt = Hunt::new(&scanned, known);
    watch_processes(&scanned);

    // The control comes in as a rule's name: it is in rules, reports, the audit log, and what is pushed.
    let (receiver, _tokens) = control_plane(&lab, &authority);
    put(&machine, "report.token", "600", BEARER);
    trust(
        &machine,
        &authority,
        "[report.auth]\nkind = \"bearer\"\ntoken_file = \"/etc/portcullis/report.token\"",
    );
    push_to_us(&mut machine);
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
        String::from_utf8_lossy(&asked.body).contains("\"generation\":3")
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
    let cores = machine.ok("find / \\( -path /proc -o -path /sys \\) -prune -o -type f -name 'core*' -newer /etc/systemd/system/portcullis.service.d/core.conf -print");
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

/// Where a secret is known to lie, and why; nobody but root may read any of it.
const PLACES: [&str; 7] = [
    // Where the owner put it.
    "/etc/portcullis/report.token",
    "/etc/portcullis/report-key.json",
    "/etc/portcullis/spec.json",
    // Where the agent keeps it.
    "/var/lib/portcullis/tls.key",
    "/var/lib/portcullis/spec.json",
    // What cloud-init keeps of the user-data: the token in it is used by then.
    "/var/lib/cloud/",
    "/run/cloud-init/",
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
        let only_control = hunt
            .machine
            .run(&format!("grep -aqF -f /run/hunt/secrets '{path}'"))
            .code
            == Some(1);
        if only_control {
            continue;
        }
        with_secrets += 1;
        assert!(
            PLACES.iter().any(|place| path.starts_with(place)),
            "{line}: not a place for a secret"
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
    assert!(with_secrets >= 4, "{listed:?}");
}

/// Every setting that names a secret takes a credential of systemd, from a file that the unit is given.
#[test]
fn each_secret_of_the_settings_may_be_a_credential_of_systemd() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let (authority, clients) = (Authority::new(), Authority::new());
    let (certificate, client_key) = clients.client("gpu-0");
    let (key, _) = rsa_key(&lab, "service-account");
    for (name, text) in [
        ("ca", &authority.pem),
        ("crt", &certificate),
        ("key", &client_key),
        ("account", &service_key(&key)),
    ] {
        put(&machine, &format!("../../root/{name}"), "600", text);
    }
    machine.ok(
        "mkdir -p /etc/systemd/system/portcullis.service.d; cd /etc/systemd/system/portcullis.service.d
         { echo '[Service]'; for name in ca crt key account; do echo LoadCredential=report.$name:/root/$name; done; } > report.conf
         systemctl daemon-reload",
    );
    let known = [CertificateDer::from_pem_slice(clients.pem.as_bytes()).unwrap()];
    let tls = Some(authority.tls_for(&known));
    let receiver = Server::start(&lab, (HOST, PORT), tls, |_| no_content());
    let use_auth = |machine: &Machine, auth: &str| {
        let text = format!("[report]\nca_file = \"credential:report.ca\"\ninterval = \"1s\"\n{auth}\n");
        put(machine, "conf.d/report.toml", "644", &text);
        machine.ok("systemctl restart portcullis");
    };
    use_auth(
        &machine,
        "[report.auth]\nkind = \"mtls\"\nclient_certificate = \"credential:report.crt\"\nclient_key = \"credential:report.key\"",
    );
    push_to_us(&mut machine);
    let asked = receiver.next(PATIENTLY);
    let expected = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
    assert_eq!(asked.certificate.as_deref(), Some(&*expected));
    drop(receiver);

    let (receiver, _tokens) = control_plane(&lab, &authority);
    use_auth(&machine, &service_account("credential:report.account"));
    receiver.until(PATIENTLY, "one by the service account", authorized(GRANTED));

    // Without it the report says which is missing, and no other file is taken in its place.
    machine.ok("rm /etc/systemd/system/portcullis.service.d/report.conf; systemctl daemon-reload; systemctl restart portcullis");
    eventually(PATIENTLY, "the missing credential is named", || {
        let journal = machine.run("journalctl -u portcullis -o cat -n 50").stdout;
        match journal.contains("/run/credentials/portcullis.service/report.ca: No such file") {
            true => Ok(()),
            false => Err(journal),
        }
    });
}
