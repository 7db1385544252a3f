//! The bundle for whoever helps from afar: what is in it, what is not, and that it comes in the worst of states.
//!
//! May not live here: secrets in other places (`secrets`).

use std::collections::BTreeMap;

use portcullis_protocol::{AuthorizedKey, KeyOptions, PublicKey, Secret};
use serde_json::Value;

use crate::lab::{Lab, Machine, USER};
use crate::receiver::put;

/// Unpacks a bundle inside and gives its files, by name without the folder.
#[track_caller]
fn unpacked(machine: &Machine, file: &str) -> BTreeMap<String, String> {
    let listed = machine.ok(&format!(
        "rm -rf /run/bundle && mkdir /run/bundle && tar -xzf {file} -C /run/bundle --strip-components 1 && ls /run/bundle"
    ));
    let files = listed
        .lines()
        .map(|name| (name.to_owned(), machine.ok(&format!("cat /run/bundle/{name}"))));
    files.collect()
}

fn parsed(files: &BTreeMap<String, String>, name: &str) -> Value {
    let text = files
        .get(name)
        .unwrap_or_else(|| panic!("{name} is in {:?}", files.keys()));
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{name}: {e}: {text}"))
}

const TOKEN: &str = "bearer-known-secret-0123456789";
const EXTERNAL_ID: &str = "external-known-secret-0123456789";
const NAME: &str = "alice@known-comment.example";

/// An instance that knows a token, an external id and a key whose comment names somebody.
fn with_secrets(lab: &Lab) -> Machine {
    let mut machine = lab.launch();
    put(&machine, "token", "600", TOKEN);
    put(
        &machine,
        "conf.d/report.toml",
        "644",
        "# whoever wrote this\n[report.auth]\nkind = \"bearer\"\ntoken_file = \"/etc/portcullis/token\"\n",
    );
    machine.ok("systemctl restart portcullis");
    let line = lab.new_key("second").to_line();
    let words: Vec<&str> = line.split(' ').collect();
    let key: PublicKey = format!("{} {} {NAME}", words[0], words[1]).parse().unwrap();
    machine.push(|spec| {
        let control_plane = spec.control_plane.as_mut().unwrap();
        control_plane.external_id = Some(Secret::new(EXTERNAL_ID));
        spec.authorized_keys.push(AuthorizedKey {
            user: USER.parse().unwrap(),
            options: KeyOptions::default(),
            key,
            expires: None,
        });
    });
    machine.until_ready();
    machine
}

#[test]
fn a_bug_report_holds_what_helps_and_no_secret() {
    let lab = Lab::new();
    let machine = with_secrets(&lab);
    // Somebody wrote secrets where the bundle looks: they are known, and found.
    machine.ok(&format!(
        "nft add table inet other '{{ comment \"{TOKEN}\"; }}'; nft list ruleset | grep -q {TOKEN}"
    ));
    machine.ok("cd /run; portcullis bug-report > /run/said");
    let said = machine.ok("cat /run/said");
    for words in [
        "report.json",
        "journal.txt",
        "look at it before you send it",
        "for root alone",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    let name = machine.ok("cd /run; ls portcullis-bug-report-*.tar.gz");
    assert!(name.contains(machine.spec.instance.id.as_str()), "{name}");
    assert_eq!(machine.ok(&format!("stat -c %a:%u /run/{name}")), "600:0");
    let files = unpacked(&machine, &format!("/run/{name}"));
    let manifest = parsed(&files, "manifest.json");
    assert_eq!(manifest["failures"], Value::Array(vec![]), "{manifest:#}");

    assert_eq!(parsed(&files, "report.json")["ready"], true);
    assert_eq!(parsed(&files, "check.json")["ready"], true);
    assert!(
        files["status.txt"].starts_with("READY"),
        "{}",
        files["status.txt"]
    );
    assert!(files["ruleset.txt"].contains("It is what the accepted spec asks for."));
    assert!(files["ruleset.txt"].contains("policy drop"));
    assert!(
        files["other-tables.txt"].contains("table inet other"),
        "{files:#?}"
    );
    assert!(files["journal.txt"].contains("MESSAGE_ID="), "{files:#?}");
    assert!(files["units.txt"].contains("Id=portcullis.service"));
    assert!(files["sshd.txt"].contains("pubkeyauthentication yes"));
    let versions = parsed(&files, "versions.json");
    assert!(
        versions["programs"]["ssh"]
            .as_str()
            .unwrap()
            .starts_with("OpenSSH"),
        "{versions:#}"
    );
    assert_eq!(versions["distribution"]["ID"], "debian");
    let audit = parsed(&files, "audit.json");
    assert_eq!(audit["whole"], true, "{audit:#}");
    assert!(!audit["records"].as_array().unwrap().is_empty());
    let settings = parsed(&files, "settings.json");
    assert_eq!(
        settings["/etc/portcullis/conf.d/report.toml"]["report"]["auth"]["token_file"],
        "/etc/portcullis/token"
    );
    let storage = parsed(&files, "storage.json");
    let state = storage["state"]["files"].as_array().unwrap();
    assert!(state.iter().any(|file| file["name"] == "tls.key"), "{storage:#}");

    // The keys are there, who they belong to is not; nor is anything secret.
    let spec = &files["spec.json"];
    assert!(spec.contains("[comment]") && spec.contains("AAAAC3Nz"), "{spec}");
    let nft = manifest["files"]
        .as_array()
        .unwrap()
        .iter()
        .find(|file| file["name"] == "nft.txt");
    assert_eq!(nft.unwrap()["removed"], 1, "{manifest:#}");
    let tls_key = machine.ok("sed -n 2p /var/lib/portcullis/tls.key");
    assert!(tls_key.len() > 20);
    for secret in [TOKEN, EXTERNAL_ID, NAME, "whoever wrote this", &tls_key] {
        let found = machine.run_with("grep -rF -f - /run/bundle /run/said", secret.as_bytes());
        assert_eq!((found.code, found.stdout.as_str()), (Some(1), ""), "{secret}");
    }
}

#[test]
fn a_bug_report_comes_without_daemon_settings_or_room() {
    let lab = Lab::new();
    let machine = with_secrets(&lab);
    machine.ok("systemctl stop portcullis");
    put(
        &machine,
        "conf.d/zz.toml",
        "644",
        "password = hunter2-hunter2-hunter2\n",
    );
    // A full disk says so, with the way out, and leaves nothing behind.
    machine.ok(
        "mkdir /run/full; mount -t tmpfs -o size=64k none /run/full; head -c 60k /dev/zero > /run/full/x",
    );
    let output = machine.run("portcullis bug-report -o /run/full");
    assert_eq!(output.code, Some(1), "{output:?}");
    assert!(
        output.stderr.contains("the disk is full") && output.stderr.contains("-o -"),
        "{output:?}"
    );
    assert_eq!(machine.ok("ls /run/full"), "x");
    let said = machine.ok("portcullis bug-report -o - 2>&1 >/run/out.tar.gz");
    assert!(said.contains("look at it before you send it"), "{said}");
    let files = unpacked(&machine, "/run/out.tar.gz");
    assert!(
        files["status.txt"].starts_with("NO DAEMON"),
        "{}",
        files["status.txt"]
    );
    let report = parsed(&files, "report.json");
    assert!(
        report["daemon"].as_str().unwrap().contains("control.sock"),
        "{report:#}"
    );
    assert!(files["ruleset.txt"].contains("policy drop"));
    let manifest = parsed(&files, "manifest.json");
    let failures = manifest["failures"].to_string();
    assert!(
        failures.contains("zz.toml") && failures.contains("is no TOML"),
        "{failures}"
    );
    let found = machine.run("grep -rF hunter2 /run/bundle");
    assert_eq!(found.code, Some(1), "{found:?}");

    // What the remedies lead to is there, without a network and without a browser.
    machine.ok(
        "zcat /usr/share/man/man7/portcullis-operations.7.gz | grep -q '^.SS firewall.default-deny' && \
         grep -q firewall.default-deny /usr/share/doc/portcullis/operations.md",
    );

    machine.ok("touch /run/there");
    let output = machine.run("portcullis bug-report -o /run/there");
    assert_eq!(output.code, Some(2), "{output:?}");
    assert!(output.stderr.contains("is there already"), "{output:?}");
    let output = machine.run("setpriv --reuid=nobody --clear-groups portcullis bug-report -o -");
    assert_eq!(output.code, Some(3), "{output:?}");
}
