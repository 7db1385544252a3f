//! Each secret may be a credential of systemd: of the unit, in a file, as text or encrypted, or of the system.
//!
//! May not live here: keys that credentials bring (`keys`), where secrets may be seen (`secrets`).

use std::fs;

use portcullis_protocol::access::Role;
use portcullis_protocol::identity::to_hex;
use portcullis_protocol::{CheckId, Secret, Status};
use portcullis_provision::ca::{ClientName, DEFAULT_LIFETIME};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use crate::endpoint::{curl, files, with_certificate};
use crate::first_contact::introduce;
use crate::lab::{Lab, Machine, Run as _, USER, eventually};
use crate::push_auth::rsa_key;
use crate::receiver::{Authority, HOST, PATIENTLY, PORT, Server, no_content, push_to_us, put};
use crate::secrets::{GRANTED, authorized, control_plane, service_account, service_key};

const TOKEN: &str = "portcullis.enrolment_token";
const EXTERNAL_ID: &str = "portcullis.external_id";
const TLS_KEY: &str = "portcullis.tls_key";
const ASK: &str = "/v1/identity?nonce=00112233445566778899aabbccddeeff";

/// The status of a path, for a caller without a certificate or with one.
fn status(lab: &Lab, machine: &Machine, path: &str, options: &[&str]) -> u16 {
    eventually(PATIENTLY, "the endpoint answers", || {
        let answer =
            curl(&lab.provider.network().path(), machine, path, options).map_err(|e| format!("{e:?}"))?;
        if answer.status == 503 {
            Err(answer.body)
        } else {
            Ok(answer.status)
        }
    })
}

/// The unit's credentials from now on.
fn give(machine: &Machine, lines: &str) {
    let drop_in = format!("[Service]\n{lines}\n");
    put(
        machine,
        "../systemd/system/portcullis.service.d/given.conf",
        "600",
        &drop_in,
    );
    machine.ok("systemctl daemon-reload; systemctl restart portcullis");
}

/// A credential that only this machine can read, where the shipped drop-in looks for it.
fn seal(machine: &Machine, name: &str, text: &str) {
    let script = format!(
        "mkdir -m 700 -p /etc/credstore.encrypted; rm -f /etc/credstore.encrypted/{name}
         systemd-creds encrypt --with-key=host --name={name} - /etc/credstore.encrypted/{name}"
    );
    let output = machine.run_with(&script, text.as_bytes());
    assert!(output.success(), "{output:?}");
    let line = text.lines().max_by_key(|line| line.len()).unwrap();
    let seen = machine.run(&format!("grep -F '{line}' /etc/credstore.encrypted/{name}"));
    assert_eq!(seen.code, Some(1), "{seen:?}");
}

#[test]
fn the_token_may_be_a_credential_of_the_system_or_of_the_unit() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let token = |number: u8| Secret::new(number.to_string().repeat(64));
    let first_contact = |machine: &Machine, token: &Secret| {
        assert_eq!(status(&lab, machine, ASK, &[]), 200);
        introduce(machine, token).unwrap();
        assert_eq!(status(&lab, machine, ASK, &[]), 404);
        let kept = format!("grep -rlF {} /var/lib/portcullis", token.expose());
        assert_eq!(machine.run(&kept).stdout, "");
    };
    assert_eq!(status(&lab, &machine, ASK, &[]), 404, "the spec's was used");

    // As a container's manager or the firmware hands it to the whole system.
    let folder = lab.path("instances/one/credentials");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join(TOKEN), token(1).expose()).unwrap();
    let key = lab.new_key("system").to_line();
    fs::write(folder.join(format!("portcullis.authorized_keys.{USER}")), &key).unwrap();
    lab.provider.reboot("one").unwrap();
    machine = lab.machine("one");
    machine.until_ready();
    let held = machine.ok(&format!("cat /run/credentials/@system/{TOKEN}"));
    assert_eq!(held, token(1).expose());
    machine.ok(&format!("grep -F '{key}' ~{USER}/.ssh/authorized_keys"));
    first_contact(&machine, &token(1));
    machine.ok("systemctl restart portcullis");
    machine.until_ready();
    assert_eq!(
        status(&lab, &machine, ASK, &[]),
        404,
        "it is still there, and was used"
    );

    // The unit's own comes before the system's.
    machine.ok("mkdir -p /etc/systemd/system/portcullis.service.d");
    put(&machine, "../../root/token", "600", token(2).expose());
    give(&machine, &format!("LoadCredential={TOKEN}:/root/token"));
    first_contact(&machine, &token(2));
    give(&machine, &format!("SetCredential={TOKEN}:{}", token(3).expose()));
    first_contact(&machine, &token(3));
    machine.ok("rm /etc/systemd/system/portcullis.service.d/given.conf
        cp /usr/share/doc/portcullis/examples/credentials.conf /etc/systemd/system/portcullis.service.d/");
    seal(&machine, TOKEN, token(4).expose());
    machine.ok("systemctl daemon-reload; systemctl restart portcullis");
    first_contact(&machine, &token(4));

    // Two at once are both over with the first: nobody waits for a second contact.
    seal(&machine, TOKEN, token(5).expose());
    machine.ok("systemctl restart portcullis");
    let both = machine.next(|spec| spec.control_plane.as_mut().unwrap().enrolment_token = Some(token(6)));
    assert!(machine.apply(&both).success());
    first_contact(&machine, &token(6));
    machine.ok("systemctl restart portcullis");
    assert_eq!(status(&lab, &machine, ASK, &[]), 404);

    // One that can't be used is named, and is none.
    machine.ok(&format!("rm /etc/credstore.encrypted/{TOKEN}"));
    put(&machine, "../../root/token", "600", "\n");
    give(&machine, &format!("LoadCredential={TOKEN}:/root/token"));
    assert_eq!(status(&lab, &machine, ASK, &[]), 404);
    let told = machine.ok("journalctl -b -u portcullis -o cat MESSAGE_ID=5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e90");
    assert!(told.contains(TOKEN) && told.contains("is empty"), "{told}");
}

#[test]
fn the_external_id_the_tls_key_and_the_spec_may_be_credentials() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let pinned = files(&lab, "right", &lab.provider.client_certificate().unwrap());
    let right = ClientName {
        name: "control-plane".into(),
        role: Role::Operator,
        external_ids: vec![Secret::new("given-a-external-id")],
        lifetime: DEFAULT_LIFETIME,
    };
    let given = files(
        &lab,
        "given",
        &lab.provider.ca().unwrap().issue_for(&right).unwrap(),
    );
    let health = |machine: &Machine, files| status(&lab, machine, "/v1/health", &with_certificate(files));
    assert_eq!(
        (health(&machine, &pinned), health(&machine, &given)),
        (200, 403),
        "the spec has one"
    );

    // The spec comes as a credential too, and has no external id.
    let spec = machine.next(|spec| spec.control_plane.as_mut().unwrap().external_id = None);
    let text = String::from_utf8(spec.to_json()).unwrap();
    put(&machine, "../../root/spec.json", "600", &text);
    put(
        &machine,
        "conf.d/spec.toml",
        "644",
        "[paths]\nspec = \"credential:portcullis.spec\"\n",
    );
    machine.ok("mkdir -p /etc/systemd/system/portcullis.service.d");
    give(&machine, "LoadCredential=portcullis.spec:/root/spec.json");
    machine.spec = spec;
    machine.until_generation(2);
    assert_eq!(
        (health(&machine, &pinned), health(&machine, &given)),
        (200, 200),
        "nobody has one"
    );

    machine.ok(
        "cp /usr/share/doc/portcullis/examples/credentials.conf /etc/systemd/system/portcullis.service.d/",
    );
    seal(&machine, EXTERNAL_ID, "given-a-external-id");
    machine.ok("systemctl daemon-reload; systemctl restart portcullis");
    assert_eq!((health(&machine, &pinned), health(&machine, &given)), (403, 200));
    // One that can't be read lets in nobody.
    machine.ok(&format!("rm /etc/credstore.encrypted/{EXTERNAL_ID}"));
    put(&machine, "../../root/empty", "600", "\n");
    give(&machine, &format!("LoadCredential={EXTERNAL_ID}:/root/empty"));
    assert_eq!((health(&machine, &pinned), health(&machine, &given)), (403, 403));
    give(&machine, "");
    assert_eq!(health(&machine, &pinned), 200);

    a_sealed_key_is_shown_and_not_written(&lab, &machine);
}

/// The key is made outside of the agent and kept by systemd, encrypted.
fn a_sealed_key_is_shown_and_not_written(lab: &Lab, machine: &Machine) {
    let before = machine.instance.identity().unwrap().tls_spki_sha256.clone();
    let key = rcgen::KeyPair::generate().unwrap();
    let expected = ring::digest::digest(
        &ring::digest::SHA256,
        &rcgen::PublicKeyData::subject_public_key_info(&key),
    );
    let shown = || {
        let mut openssl = lab.beside("sh");
        let script = format!(
            "openssl s_client -connect {}:7443 </dev/null 2>/dev/null | openssl x509 -pubkey -noout \
             | openssl pkey -pubin -outform DER | sha256sum",
            machine.v4()
        );
        openssl.args(["-c", &script]).output_text().stdout[..64].to_owned()
    };
    assert_eq!(shown(), before, "the control: the one that was made here");
    seal(machine, TLS_KEY, &key.serialize_pem());
    machine.ok("rm /var/lib/portcullis/tls.key; systemctl restart portcullis");
    machine.until_check(CheckId::TransitTls, Status::Pass);
    assert_eq!(shown(), to_hex(expected.as_ref()));
    assert_eq!(
        machine.run("ls /var/lib/portcullis/tls.key").code,
        Some(2),
        "none is kept on disk"
    );
    let checked = machine.run("portcullis check --format json").stdout;
    let report: portcullis_protocol::Report = serde_json::from_str(&checked).unwrap();
    assert_eq!(report.check(CheckId::TransitTls).unwrap().status, Status::Pass);
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
