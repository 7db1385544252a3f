//! Changes over the HTTPS API that are refused: from whom, in what form, without room for them.
//!
//! May not live here: changes that are made (`api`).

use portcullis_provision::ca::{Ca, DEFAULT_LIFETIME};

use crate::api::{Api, rule, state};
use crate::endpoint::{curl, files, with_certificate};
use crate::lab::Lab;

/// Each way to change something.
const CHANGES: [(&str, &str); 8] = [
    ("GET", "/v1/spec"),
    ("PUT", "/v1/spec"),
    ("POST", "/v1/firewall/rules"),
    ("DELETE", "/v1/firewall/rules/web"),
    ("PUT", "/v1/cluster/peers/i-new"),
    ("DELETE", "/v1/cluster/peers/i-new"),
    ("POST", "/v1/keys"),
    ("DELETE", "/v1/keys/SHA256:x"),
];

#[test]
fn nobody_but_the_control_plane_changes_anything() {
    let lab = Lab::new();
    let machine = lab.launch();
    let api = Api::new(&lab, &machine);
    let beside = lab.provider.network().path();
    let body = rule("web", 9000).to_string();
    let other = Ca::open_or_init(&lab.path("other-ca")).unwrap();
    let issued = other.issue("control-plane", DEFAULT_LIFETIME).unwrap();
    let wrong = files(&lab, "wrong", &issued);
    for (method, path) in CHANGES {
        let options = ["-X", method, "--data-binary", &body];
        api.refused(
            || curl(&beside, &machine, path, &options).unwrap(),
            403,
            "a client certificate of the control plane",
        );
        let before = state(&machine);
        let mut with_wrong = options.to_vec();
        with_wrong.extend(with_certificate(&wrong));
        let failed = curl(&beside, &machine, path, &with_wrong).unwrap_err();
        assert!(failed.stderr.contains("alert"), "{failed:?}");
        assert_eq!(state(&machine), before);
    }
    // The same with the right one.
    let (_, changed) = api.done("POST", "/v1/firewall/rules", &rule("web", 9000));
    assert!(changed);
}

#[test]
fn what_is_malformed_is_a_problem_that_names_it_and_changes_nothing() {
    let lab = Lab::new();
    let machine = lab.launch();
    let api = Api::new(&lab, &machine);
    let rules = "/v1/firewall/rules";
    let known = ["-H", "If-Match: \"1\""];
    for (method, path, body, status, words) in [
        ("POST", rules, "{", 400, "not one JSON document"),
        ("POST", rules, "", 400, "not one JSON document"),
        (
            "POST",
            rules,
            r#"{"id":"a","from_port":1} {}"#,
            400,
            "not one JSON",
        ),
        ("POST", rules, r#"{"id":"a","port":1}"#, 422, "port"),
        (
            "POST",
            rules,
            r#"{"id":"a","protocol":"tcp","from_port":70000}"#,
            422,
            "70000",
        ),
        (
            "POST",
            rules,
            r#"{"id":"a","from_port":1,"ip_ranges":["300.0.0.0/8"]}"#,
            422,
            "ip_ranges[0]",
        ),
        ("POST", "/v1/keys", "[1]", 422, "a JSON object"),
        (
            "PUT",
            "/v1/spec",
            r#"{"version":1,"generation":2,"instance":{"id":"i"},"colour":1}"#,
            422,
            "colour",
        ),
        (
            "PUT",
            "/v1/spec",
            r#"{"version":9,"generation":2,"instance":{"id":"i"}}"#,
            422,
            "version",
        ),
        ("PATCH", "/v1/spec", "{}", 405, "method"),
        ("GET", "/v1/keys", "", 405, "method"),
        ("POST", "/v1/keys/a/b", "{}", 404, "nothing at this path"),
        ("POST", "/v1/firewall/rules?confirm=60s", "{}", 422, "id"),
        ("DELETE", "/v1/firewall/rules/a?confirm=1s", "", 400, "?confirm="),
        ("DELETE", "/v1/firewall/rules/a?sudo=1", "", 400, "sudo"),
        ("DELETE", "/v1/firewall/rules/%ff", "", 400, "UTF-8"),
    ] {
        api.refused(|| api.with(&known, method, path, body.as_bytes()), status, words);
    }
    let harmless = rule("web", 9000).to_string();
    api.refused(
        || api.with(&[], "POST", "/v1/firewall/rules?force=true", harmless.as_bytes()),
        400,
        "?force",
    );
    let huge = vec![b' '; (16 << 20) + 1];
    api.refused(|| api.with(&known, "PUT", "/v1/spec", &huge), 413, "bytes");
    // Without its length said first, and so cut off while it comes.
    let chunked = ["-H", "If-Match: \"1\"", "-H", "Transfer-Encoding: chunked"];
    api.refused(|| api.with(&chunked, "PUT", "/v1/spec", &huge), 413, "limit");
    let (_, changed) = api.done("POST", rules, &rule("web", 9000));
    assert!(changed);
}

#[test]
fn a_full_disk_is_said_in_public_words_only() {
    let lab = Lab::new();
    let machine = lab.launch();
    let api = Api::new(&lab, &machine);
    // In the daemon's own mount namespace: it does not see mounts that come later elsewhere.
    let there = |script: &str| {
        let pid = machine.main_pid();
        machine.ok(&format!("nsenter -t {pid} -m sh -c '{script}'"))
    };
    there(
        "mkdir -p /run/small && mount -t tmpfs -o size=64k,mode=700 small /run/small && \
         cp -a /var/lib/portcullis/. /run/small/ && mount --bind /run/small /var/lib/portcullis",
    );
    assert!(api.done("POST", "/v1/firewall/rules", &rule("before", 9000)).1);
    there("! dd if=/dev/zero of=/var/lib/portcullis/filler bs=4k status=none");
    let answer = api.ask("POST", "/v1/firewall/rules", &rule("web", 9001));
    assert_eq!(answer.status, 507, "{answer:?}");
    assert!(!answer.body.contains("/var/lib"), "{answer:?}");
    let log = machine.ok("journalctl -b -u portcullis -o cat");
    assert!(
        log.contains("/var/lib/portcullis/spec.json: No space left"),
        "{log}"
    );
    assert!(!machine.table().contains("9001"));
    there("rm /var/lib/portcullis/filler");
    assert!(api.done("POST", "/v1/firewall/rules", &rule("web", 9001)).1);
    assert!(machine.table().contains("9001"));
}
