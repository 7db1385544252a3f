//! Who an instance is to the receiver of its reports: certificates, tokens in files, a service account's key,
//! the platforms' identities.
//!
//! Signatures are checked by openssl. The metadata services are the smallest that answer as the platforms'
//! documentation says: nobody offers one to test with that signs identities.
//! May not live here: what is pushed when (`push`, `spool`).

use std::collections::BTreeSet;
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};

use crate::lab::{Lab, Machine, Run, eventually, host};
use crate::receiver::{
    Answer, Asked, Authority, HOST, PATIENTLY, PORT, Server, no_content, push_to_us, put, told, trust,
};

/// Where tokens are given out.
pub const TOKEN_PORT: u16 = 8445;
/// Where every platform's metadata service is.
const METADATA: &str = "169.254.169.254";

fn status(head: &str) -> Answer {
    (head.to_owned(), String::new())
}

fn unauthorized() -> Answer {
    status("401 Unauthorized\r\nwww-authenticate: Bearer")
}

/// A receiver that takes what the closure says.
fn receiver(lab: &Lab, authority: &Authority, takes: impl Fn(&Asked) -> bool + Send + 'static) -> Server {
    Server::start(lab, (HOST, PORT), Some(authority.tls()), move |asked| {
        if takes(asked) {
            no_content()
        } else {
            unauthorized()
        }
    })
}

/// Waits until a delivery failed for a reason; the control plane got nothing of it.
#[track_caller]
fn until_failed(machine: &Machine, reason: &str) {
    eventually(PATIENTLY, reason, || {
        let journal = machine.run("journalctl -u portcullis -o cat").stdout;
        match journal.contains(reason) {
            true => Ok(()),
            false => Err(journal.lines().rev().take(5).collect::<Vec<_>>().join("\n")),
        }
    });
}

#[test]
fn a_token_in_a_file_is_read_again_when_it_changes_and_only_if_it_is_secret() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let authority = Authority::new();
    let settings = "[report.auth]\nkind = \"bearer\"\ntoken_file = \"/etc/portcullis/report.token\"";
    put(&machine, "report.token", "600", "first-token\n");
    trust(&machine, &authority, settings);
    let wanted = Arc::new(Mutex::new("Bearer first-token"));
    let known = wanted.clone();
    let receiver = receiver(&lab, &authority, move |asked| {
        asked.header("authorization") == *known.lock().unwrap()
    });
    push_to_us(&mut machine);
    receiver.until(PATIENTLY, "the first token", |asked| {
        asked.header("authorization") == "Bearer first-token"
    });
    machine.until_ready();

    // The receiver takes another one from now on; nobody restarts the daemon.
    let pid = machine.main_pid();
    *wanted.lock().unwrap() = "Bearer second-token";
    machine.push(|spec| spec.firewall.ingress.push(crate::lab::allow("81/tcp")));
    until_failed(&machine, "answered 401");
    put(&machine, "report.token", "600", "second-token\n");
    let asked = receiver.until(PATIENTLY, "the second token", |asked| {
        asked.header("authorization") == "Bearer second-token"
    });
    assert!(asked.is_change());
    assert_eq!(machine.main_pid(), pid);

    // A secret that others can read is none.
    put(&machine, "report.token", "644", "second-token\n");
    until_failed(
        &machine,
        "report.auth.token_file: /etc/portcullis/report.token: others can get at this secret",
    );
    assert!(told(&machine, "6e") > 0);
    let before = receiver.got.try_iter().count();
    machine.push(|spec| spec.firewall.ingress.push(crate::lab::allow("82/tcp")));
    let reason = "the report was not delivered: report.auth.token_file";
    until_failed(&machine, reason);
    println!("{before} requests before the file was opened to others");
    put(&machine, "report.token", "600", "second-token\n");
    receiver.until(PATIENTLY, "generation 4", |asked| {
        asked.report().generation == Some(4) && asked.header("authorization") == "Bearer second-token"
    });
    let journal = machine.ok("journalctl -u portcullis -u portcullis-front -o export");
    assert!(!journal.contains("first-token") && !journal.contains("second-token"));
}

#[test]
fn a_token_may_be_a_credential_of_systemd() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let authority = Authority::new();
    machine.ok("mkdir -p /etc/systemd/system/portcullis.service.d
        printf '[Service]\\nSetCredential=report.token:from-systemd\\n' > /etc/systemd/system/portcullis.service.d/token.conf
        systemctl daemon-reload");
    let settings = "[report.auth]\nkind = \"bearer\"\ntoken_file = \"credential:report.token\"";
    trust(&machine, &authority, settings);
    let receiver = Server::reports(&lab, &authority, &[]);
    push_to_us(&mut machine);
    let asked = receiver.next(PATIENTLY);
    assert_eq!(asked.header("authorization"), "Bearer from-systemd");
}

#[test]
fn a_receiver_that_asks_for_a_certificate_gets_the_owners_or_the_instances_own() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let (authority, clients) = (Authority::new(), Authority::new());
    let own = machine.ok("cat /var/lib/portcullis/tls.crt");
    let own = CertificateDer::from_pem_slice(own.as_bytes()).unwrap();
    let known = [
        CertificateDer::from_pem_slice(clients.pem.as_bytes()).unwrap(),
        own.clone(),
    ];
    trust(&machine, &authority, "");
    let tls = Some(authority.tls_for(&known));
    let receiver = Server::start(&lab, (HOST, PORT), tls, |_| no_content());
    push_to_us(&mut machine);
    // Without one: refused in the handshake.
    until_failed(&machine, "the report was not delivered");
    assert!(receiver.got.try_recv().is_err());

    let (certificate, key) = clients.client("gpu-0");
    put(&machine, "report.crt", "644", &certificate);
    put(&machine, "report.key", "600", &key);
    let settings = "[report.auth]\nkind = \"mtls\"\nclient_certificate = \"/etc/portcullis/report.crt\"\n\
                    client_key = \"/etc/portcullis/report.key\"";
    trust(&machine, &authority, settings);
    let asked = receiver.until(PATIENTLY, "a report", |asked| asked.is_change());
    let expected = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
    assert_eq!(asked.certificate.as_deref(), Some(&*expected));
    machine.until_ready();

    trust(&machine, &authority, "[report.auth]\nkind = \"mtls\"");
    receiver.until(PATIENTLY, "a report by the instance's own key", |asked| {
        asked.certificate.as_deref() == Some(&*own)
    });
}

/// A private RSA key, as PEM, and the file of its public half.
pub fn rsa_key(lab: &Lab, name: &str) -> (String, String) {
    let (key, public) = (lab.path(name), lab.path(&format!("{name}.pub.pem")));
    let mut openssl = host("openssl");
    openssl.args([
        "genpkey",
        "-algorithm",
        "RSA",
        "-pkeyopt",
        "rsa_keygen_bits:2048",
        "-out",
    ]);
    openssl.arg(&key).succeed();
    let mut openssl = host("openssl");
    openssl.args(["pkey", "-pubout", "-in"]).arg(&key);
    openssl.arg("-out").arg(&public).succeed();
    (
        fs::read_to_string(key).unwrap(),
        public.to_str().unwrap().to_owned(),
    )
}

/// The header and the claims of a JWT whose signature openssl finds good.
fn checked_jwt(lab: &Lab, public: &str, token: &str) -> Result<(Value, Value), String> {
    let (signed, signature) = token.rsplit_once('.').ok_or("not a JWT")?;
    let (header, claims) = signed.split_once('.').ok_or("not a JWT")?;
    let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|e| e.to_string())?;
    fs::write(lab.path("jwt"), signed).unwrap();
    fs::write(lab.path("jwt.sig"), signature).unwrap();
    let mut openssl = host("openssl");
    openssl.args(["dgst", "-sha256", "-verify", public, "-signature"]);
    let said = openssl
        .arg(lab.path("jwt.sig"))
        .arg(lab.path("jwt"))
        .output_text();
    if !said.success() {
        return Err(format!("{said:?}"));
    }
    let part = |text: &str| serde_json::from_slice(&URL_SAFE_NO_PAD.decode(text).unwrap()).unwrap();
    Ok((part(header), part(claims)))
}

/// The fields of a form.
fn form(asked: &Asked, name: &str) -> String {
    let fields = url::form_urlencoded::parse(&asked.body);
    let mut fields = fields
        .filter(|(field, _)| field == name)
        .map(|(_, value)| value.into_owned());
    fields.next().unwrap_or_default()
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// The instance's settings for a service account with this key.
fn use_service_account(machine: &Machine, authority: &Authority, key: &str) {
    let key = json!({"subject-credentials": {
        "alg": "RS256", "private-key": key, "kid": "publickey-1", "iss": "serviceaccount-1", "sub": "serviceaccount-1"
    }});
    put(machine, "report-key.json", "600", &key.to_string());
    let settings = format!(
        "interval = \"1s\"\n[report.auth]\nkind = \"service-account\"\nkey_file = \"/etc/portcullis/report-key.json\"\n\
         token_url = \"https://{HOST}:{TOKEN_PORT}/oauth2/token/exchange\""
    );
    trust(machine, authority, &settings);
}

#[test]
fn a_service_accounts_key_is_exchanged_for_tokens_that_are_renewed_before_they_end() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let authority = Authority::new();
    let (key, public) = rsa_key(&lab, "service-account");
    let (other_key, _) = rsa_key(&lab, "other");
    let given = Arc::new(AtomicUsize::new(0));
    let (counted, grants) = (given.clone(), Arc::new(AtomicUsize::new(0)));
    let refusing = grants.clone();
    // It knows who signs only by what the test's process checks: that is below.
    let tokens = Server::start(&lab, (HOST, TOKEN_PORT), Some(authority.tls()), move |asked| {
        assert_eq!(asked.line, "POST /oauth2/token/exchange");
        if refusing.load(Ordering::SeqCst) == 0 {
            return (
                "400 Bad Request".to_owned(),
                json!({"error": "invalid_grant"}).to_string(),
            );
        }
        let number = counted.fetch_add(1, Ordering::SeqCst) + 1;
        let token = json!({
            "access_token": format!("token-{number}"), "token_type": "Bearer", "expires_in": 5,
            "issued_token_type": "urn:ietf:params:oauth:token-type:access_token"
        });
        (
            "200 OK\r\ncontent-type: application/json".to_owned(),
            token.to_string(),
        )
    });
    let refused = Arc::new(Mutex::new(BTreeSet::new()));
    let stolen = refused.clone();
    let receiver = receiver(&lab, &authority, move |asked| {
        !stolen.lock().unwrap().contains(asked.header("authorization"))
    });
    use_service_account(&machine, &authority, &other_key);
    push_to_us(&mut machine);
    until_failed(&machine, "no token for the service account");
    until_failed(&machine, "answered 400 Bad Request (invalid_grant)");
    assert!(receiver.got.try_recv().is_err());
    // The control for the check below: that is not our key's signature.
    let asked = tokens.next(PATIENTLY);
    assert!(checked_jwt(&lab, &public, &form(&asked, "subject_token")).is_err());

    grants.store(1, Ordering::SeqCst);
    use_service_account(&machine, &authority, &key);
    receiver.until(PATIENTLY, "the first report", |asked| asked.is_change());
    let good = |asked: &Asked| checked_jwt(&lab, &public, &form(asked, "subject_token")).is_ok();
    let asked = tokens.until(PATIENTLY, "an assertion of the key", good);
    let (header, claims) = checked_jwt(&lab, &public, &form(&asked, "subject_token")).unwrap();
    assert_eq!(
        header,
        json!({"alg": "RS256", "typ": "JWT", "kid": "publickey-1"})
    );
    assert_eq!(
        (&claims["iss"], &claims["sub"]),
        (&json!("serviceaccount-1"), &json!("serviceaccount-1"))
    );
    let ends = claims["exp"].as_u64().unwrap();
    assert!((now() - 60..=now() + 300).contains(&ends), "{claims}");
    assert_eq!(
        form(&asked, "grant_type"),
        "urn:ietf:params:oauth:grant-type:token-exchange"
    );
    assert_eq!(
        form(&asked, "subject_token_type"),
        "urn:ietf:params:oauth:token-type:jwt"
    );

    // It goes on with other tokens, each in use before the last one ends, and the receiver refuses none.
    let mut seen = BTreeSet::new();
    let start = Instant::now();
    while seen.len() < 3 {
        seen.insert(receiver.next(PATIENTLY).header("authorization").to_owned());
        assert!(start.elapsed() < PATIENTLY, "{seen:?}");
    }
    assert!(
        !machine
            .ok("journalctl -u portcullis -o cat")
            .contains("answered 401")
    );

    // One that is revoked before its time is replaced at once.
    let last = receiver.next(PATIENTLY).header("authorization").to_owned();
    refused.lock().unwrap().insert(last.clone());
    receiver.until(PATIENTLY, "another token", |asked| {
        asked.header("authorization") != last
    });
    let journal = machine.ok("journalctl -u portcullis -u portcullis-front -o export");
    assert!(!journal.contains("token-1") && !journal.contains("PRIVATE KEY"));
}

/// What the three services know of the instance, signed with the platform's key.
struct Platform {
    pkcs7: String,
    jwt: String,
}

/// Signs as the platforms do: a PKCS #7 message with the document in it, and a JWT.
fn platform(lab: &Lab, audience: &str) -> Platform {
    rsa_key(lab, "platform");
    let (key, certificate) = (lab.path("platform"), lab.path("platform.crt"));
    let mut openssl = host("openssl");
    openssl
        .args(["req", "-x509", "-days", "2", "-subj", "/CN=platform", "-key"])
        .arg(&key);
    openssl.arg("-out").arg(&certificate).succeed();
    let document = json!({"instanceId": "i-0a1b2c3d", "accountId": "123456789012", "region": "eu-north-1",
        "pendingTime": "2026-11-24T00:00:00Z", "privateIp": "10.77.0.2", "version": "2017-09-30"});
    fs::write(lab.path("document"), document.to_string()).unwrap();
    let mut openssl = host("openssl");
    openssl.args(["smime", "-sign", "-nodetach", "-binary", "-outform", "PEM", "-in"]);
    openssl
        .arg(lab.path("document"))
        .arg("-signer")
        .arg(&certificate)
        .arg("-inkey")
        .arg(&key);
    let pem = openssl.succeed();
    // IMDS gives the lines without those at the beginning and the end.
    let pkcs7: Vec<&str> = pem.lines().filter(|line| !line.starts_with("-----")).collect();
    let encoded = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let claims = json!({"iss": "https://accounts.google.com", "aud": audience, "sub": "107", "iat": now(),
        "exp": now() + 3600, "google": {"compute_engine": {"instance_id": "152986662232938449"}}});
    let signed = format!(
        "{}.{}",
        encoded(json!({"alg": "RS256", "kid": "1", "typ": "JWT"})),
        encoded(claims)
    );
    fs::write(lab.path("to-sign"), &signed).unwrap();
    let mut openssl = host("openssl");
    openssl
        .args(["dgst", "-sha256", "-sign"])
        .arg(&key)
        .arg("-out")
        .arg(lab.path("signed"));
    openssl.arg(lab.path("to-sign")).succeed();
    let signature = URL_SAFE_NO_PAD.encode(fs::read(lab.path("signed")).unwrap());
    Platform {
        pkcs7: pkcs7.join("\n"),
        jwt: format!("{signed}.{signature}"),
    }
}

/// Answers as EC2's, Compute Engine's and Azure's services do, and refuses what they refuse.
fn metadata(platform: &Platform, asked: &Asked) -> Answer {
    let ok = |text: &str| ("200 OK\r\nmetadata-flavor: Google".to_owned(), text.to_owned());
    let (path, query) = asked.line.split_once('?').unwrap_or((&asked.line, ""));
    let mut query = url::form_urlencoded::parse(query.as_bytes());
    match path {
        // IMDSv2 refuses a request that a proxy passed on, and one without a session.
        "PUT /latest/api/token" if asked.header("x-forwarded-for").is_empty() => {
            let seconds: Result<u32, _> = asked.header("x-aws-ec2-metadata-token-ttl-seconds").parse();
            match seconds {
                Ok(1..=21600) => ok("session=="),
                _ => status("400 Bad Request"),
            }
        }
        "GET /latest/dynamic/instance-identity/rsa2048" => match asked.header("x-aws-ec2-metadata-token") {
            "session==" => ok(&platform.pkcs7),
            _ => status("401 Unauthorized"),
        },
        "GET /computeMetadata/v1/instance/service-accounts/default/identity" => {
            let audience = query
                .find(|(name, _)| name == "audience")
                .map(|(_, value)| value.into_owned());
            match (asked.header("metadata-flavor"), audience.as_deref()) {
                ("Google", Some(crate::receiver::URL)) => ok(&platform.jwt),
                _ => status("403 Forbidden"),
            }
        }
        "GET /metadata/attested/document" => {
            let version = query.find(|(name, _)| name == "api-version");
            match (asked.header("metadata"), version.is_some()) {
                ("true", true) => {
                    let signature = platform.pkcs7.replace('\n', "");
                    ok(&json!({"encoding": "pkcs7", "signature": signature}).to_string())
                }
                _ => status("400 Bad Request"),
            }
        }
        _ => status("404 Not Found"),
    }
}

/// The document of a PKCS #7 message that the platform signed, as openssl finds it.
fn checked_document(lab: &Lab, base64: &str) -> Value {
    let der = STANDARD.decode(base64).unwrap();
    fs::write(lab.path("message"), der).unwrap();
    let mut openssl = host("openssl");
    openssl.args([
        "smime", "-verify", "-inform", "DER", "-purpose", "any", "-binary", "-in",
    ]);
    openssl
        .arg(lab.path("message"))
        .arg("-CAfile")
        .arg(lab.path("platform.crt"));
    serde_json::from_str(&openssl.succeed()).unwrap()
}

#[test]
fn the_platforms_word_goes_with_each_report() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let authority = Authority::new();
    let identity = platform(&lab, crate::receiver::URL);
    let mut ip = lab.beside("ip");
    ip.args(["address", "add", &format!("{METADATA}/32"), "dev", "br0"])
        .succeed();
    let receiver = receiver(&lab, &authority, |asked| {
        !asked.header("authorization").is_empty()
    });
    let use_platform = |name: &str| {
        let auth = format!("[report.auth]\nkind = \"instance-identity\"\nplatform = \"{name}\"");
        trust(&machine, &authority, &auth);
    };
    use_platform("aws");
    push_to_us(&mut machine);
    // Nobody answers there yet, as outside of a cloud.
    until_failed(&machine, "the platform's metadata service");
    assert!(receiver.got.try_recv().is_err());
    let service = Server::start(&lab, (METADATA, 80), None, move |asked| {
        metadata(&identity, asked)
    });
    let by = |scheme: &'static str| {
        let asked = receiver.until(PATIENTLY, scheme, |asked| {
            asked.header("authorization").starts_with(scheme)
        });
        asked
            .header("authorization")
            .strip_prefix(scheme)
            .unwrap()
            .trim()
            .to_owned()
    };
    let document = checked_document(&lab, &by("AWS-Instance-Identity"));
    assert_eq!(document["instanceId"], "i-0a1b2c3d");

    let use_platform = |name: &str| {
        let auth = format!("[report.auth]\nkind = \"instance-identity\"\nplatform = \"{name}\"");
        trust(&machine, &authority, &auth);
    };
    use_platform("gce");
    let public = lab.path("platform.pub.pem");
    let (_, claims) = checked_jwt(&lab, public.to_str().unwrap(), &by("Bearer")).unwrap();
    assert_eq!(claims["aud"], crate::receiver::URL);
    use_platform("azure");
    assert_eq!(
        checked_document(&lab, &by("Azure-Attested-Data"))["instanceId"],
        "i-0a1b2c3d"
    );
    println!("the metadata service was asked {} times", service.finish().len());
}
