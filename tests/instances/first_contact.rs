//! First contact with a real instance: the token is used once, a wrong one learns nothing, and a clock that is
//! off by 20 years neither keeps the control plane out nor lets anybody in.
//!
//! May not live here: what a client makes of a wrong answer (the library's own tests).

use std::path::PathBuf;
use std::time::Duration;

use portcullis_protocol::Secret;
use portcullis_protocol::identity::{FirstContact, Identity};
use portcullis_provision::ca::ClientCertificate;
use portcullis_provision::client::{AgentClient, ClientError, blocking};

use crate::endpoint::{Answer, curl, files, with_certificate};
use crate::lab::{Lab, Machine, Run, SOON, eventually, host};

const ASK: &str = "/v1/identity?nonce=00112233445566778899aabbccddeeff";

fn get(lab: &Lab, machine: &Machine, path: &str, options: &[&str]) -> Answer {
    curl(&lab.provider.network().path(), machine, path, options).unwrap()
}

/// A new token, in the next generation.
pub fn expect(machine: &mut Machine, token: &Secret) {
    let (new, at) = (token.clone(), machine.spec.generation.next());
    machine.push(|spec| spec.control_plane.as_mut().unwrap().enrolment_token = Some(new));
    assert_eq!(machine.spec.generation, at);
}

fn client(machine: &Machine, certificate: Option<&ClientCertificate>) -> AgentClient {
    machine.instance.client(certificate).unwrap()
}

/// First contact to its end, as the library does it.
pub fn introduce(machine: &Machine, token: &Secret) -> Result<(), ClientError> {
    let (client, id) = (client(machine, None), machine.instance.id());
    let contact = blocking(client.first_contact(token, id))?;
    assert_eq!(&contact.identity, machine.instance.identity().unwrap());
    blocking(client.finish(token, &contact))
}

#[test]
fn a_token_is_used_once_and_does_not_come_back() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let first = machine.spec.enrolment_token().unwrap().clone();
    let kept = |token: &Secret| {
        let found = machine
            .instance
            .exec(&["grep", "-rlF", token.expose(), "/var/lib/portcullis"]);
        found.unwrap().stdout
    };
    // It was launched and waited for: that is a first contact.
    assert_eq!(get(&lab, &machine, ASK, &[]).status, 404);
    assert_eq!(kept(&first), "");
    let file = machine.ok("cat /etc/portcullis/spec.json");
    assert!(file.contains(first.expose()), "the injected file still has it");
    machine.ok("systemctl restart portcullis");
    let report = machine.until_ready();
    assert_eq!((report.generation, &report.refused_spec), (Some(1), &None));
    assert_eq!(get(&lab, &machine, ASK, &[]).status, 404);
    // Nor by a higher generation that names it again.
    let same = first.clone();
    let mut again = machine.next(|spec| spec.control_plane.as_mut().unwrap().enrolment_token = Some(same));
    assert!(machine.apply(&again).success());
    assert_eq!(get(&lab, &machine, ASK, &[]).status, 404);

    // Another one is another first contact, also on trial.
    let second = Secret::new("7".repeat(64));
    again.generation = again.generation.next();
    again.control_plane.as_mut().unwrap().enrolment_token = Some(second.clone());
    let trial = machine.run_with("portcullis apply --spec - --confirm 5m", &again.to_json());
    assert!(trial.success(), "{trial:?}");
    assert_eq!(get(&lab, &machine, ASK, &[]).status, 200);
    introduce(&machine, &second).unwrap();
    assert_eq!(get(&lab, &machine, ASK, &[]).status, 404);
    let found = machine
        .instance
        .exec(&["grep", "-rlF", second.expose(), "/var/lib/portcullis"]);
    assert_eq!(found.unwrap().stdout, "");
    machine.ok(&format!("portcullis confirm {}", again.generation));
    machine.ok("systemctl restart portcullis");
    machine.until_ready();
    assert_eq!(get(&lab, &machine, ASK, &[]).status, 404);
}

#[test]
fn a_wrong_proof_learns_nothing_and_ends_nothing() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let post = |machine: &Machine, body: &str| {
        let options = ["-X", "POST", "-H", "content-type: application/json", "-d", body];
        get(&lab, machine, "/v1/identity/done", &options)
    };
    let proof = |identity: &Identity, spki: &str, token: &str, challenge: &str| {
        let mut contact = FirstContact {
            instance: identity.instance.clone(),
            tls_spki_sha256: spki.to_owned(),
            challenge: challenge.to_owned(),
            time: jiff::Timestamp::now(),
            mac: String::new(),
        };
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, token.as_bytes());
        let mac = ring::hmac::sign(&key, &contact.message());
        contact.mac = portcullis_protocol::identity::to_hex(mac.as_ref());
        serde_json::to_string(&contact).unwrap()
    };
    let token = "8".repeat(64);
    // Before there is a token: the answer that all wrong ones get.
    let nobody: Identity = serde_json::from_value(serde_json::json!({
        "instance": machine.instance.id(), "tls_spki_sha256": "00", "host_keys": [], "nonce": "", "mac": ""
    }))
    .unwrap();
    let refused = post(&machine, &proof(&nobody, "00", &token, "00"));
    assert_eq!(
        (refused.status, refused.kind.as_str()),
        (403, "application/problem+json")
    );

    expect(&mut machine, &Secret::new(token.clone()));
    let identity: Identity = serde_json::from_str(&get(&lab, &machine, ASK, &[]).body).unwrap();
    let (ours, fresh) = (
        identity.tls_spki_sha256.as_str(),
        identity.challenge.as_deref().unwrap(),
    );
    let other_key = "0".repeat(64);
    for (what, body) in [
        ("another token", proof(&identity, ours, &"9".repeat(64), fresh)),
        ("no token", proof(&identity, ours, "", fresh)),
        ("a key in between", proof(&identity, &other_key, &token, fresh)),
        (
            "a made up challenge",
            proof(&identity, ours, &token, &"0".repeat(80)),
        ),
    ] {
        let answer = post(&machine, &body);
        assert_eq!((answer.status, &answer.body), (403, &refused.body), "{what}");
        assert_eq!(get(&lab, &machine, ASK, &[]).status, 200, "{what}");
    }
    assert_eq!(post(&machine, "{}").status, 422);
    assert_eq!(
        post(&machine, &format!("{{\"x\":\"{}\"}}", "x".repeat(5000))).status,
        413
    );
    let right = proof(&identity, ours, &token, fresh);
    assert_eq!(post(&machine, &right).status, 204);
    // A replay.
    let again = post(&machine, &right);
    assert_eq!((again.status, again.body), (403, refused.body));
    assert_eq!(get(&lab, &machine, ASK, &[]).status, 404);
}

/// The daemon and its front live in another year from now on, and know of no other.
pub fn shift_clock(machine: &Machine, days: i64) {
    let library = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";
    let bytes = std::fs::read(library).unwrap();
    let put = "cat > /usr/local/lib/libfaketime.so.1";
    assert!(machine.run_with(put, &bytes).success());
    machine.ok(&format!(
        "for unit in portcullis portcullis-front; do mkdir -p /etc/systemd/system/$unit.service.d
         printf '[Service]\\nEnvironment=LD_PRELOAD=/usr/local/lib/libfaketime.so.1 FAKETIME={days:+}d \
         FAKETIME_DONT_FAKE_MONOTONIC=1 FAKETIME_NO_CACHE=1 NO_FAKE_STAT=1\\n' > /etc/systemd/system/$unit.service.d/clock.conf; done
         rm -f /var/lib/portcullis/time.json; systemctl daemon-reload; systemctl restart portcullis"
    ));
    let real = host("date").arg("+%Y").succeed();
    let said = machine.status().time.to_string();
    let said: i64 = said[..4].parse().unwrap();
    let years = said - real.trim().parse::<i64>().unwrap();
    assert!(
        (years - days / 365).abs() <= 1,
        "the daemon's clock is shifted: {years} years"
    );
}

#[test]
fn a_clock_that_is_off_by_20_years_neither_breaks_nor_weakens_it() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let ca = lab.provider.ca().unwrap();
    let ended = ca.issue("control-plane", Duration::from_secs(1)).unwrap();
    let ended = files(&lab, "ended", &ended);
    eventually(SOON, "the short certificate ends", || {
        let text = host("openssl")
            .args(["x509", "-checkend", "0", "-noout", "-in"])
            .arg(&ended[0])
            .output_text();
        if text.success() { Err(text) } else { Ok(()) }
    });
    let holds = files(&lab, "holds", &lab.provider.client_certificate().unwrap());
    let namespace = lab.provider.network().path();
    let health = |machine: &Machine, files: &[PathBuf; 2]| {
        curl(&namespace, machine, "/v1/health", &with_certificate(files))
    };
    assert_eq!(health(&machine, &holds).unwrap().status, 200);
    // A certificate holds for the whole of its last second.
    eventually(SOON, "who shows the ended one is refused", || {
        match health(&machine, &ended) {
            Err(_) => Ok(()),
            Ok(answer) => Err(format!("{answer:?}")),
        }
    });
    for (number, days) in [-7300, 7300].into_iter().enumerate() {
        shift_clock(&machine, days);
        // Nothing is known of the time but that clock, and when the authority was made: nobody is let in.
        let holds = lab.provider.client_certificate().unwrap();
        let holds = files(&lab, &format!("holds{days}"), &holds);
        assert!(health(&machine, &holds).is_err(), "{days}");
        assert!(health(&machine, &ended).is_err(), "{days}");
        // Keys are pinned, and dates don't matter for that. Who proves that he may, tells the time.
        let token = Secret::new(number.to_string().repeat(64));
        expect(&mut machine, &token);
        introduce(&machine, &token).unwrap();
        let answer = health(&machine, &holds);
        assert_eq!(answer.unwrap().status, 200, "{days}");
        assert!(health(&machine, &ended).is_err(), "{days}");
        let told = "journalctl -u portcullis -o cat MESSAGE_ID=5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e79 | grep -c .";
        assert_eq!(machine.ok(told), (number + 1).to_string());
        // And whoever comes after it knows it too.
        machine.ok("systemctl restart portcullis");
        assert_eq!(health(&machine, &holds).unwrap().status, 200, "{days}");
        assert!(health(&machine, &ended).is_err(), "{days}");
    }
}
