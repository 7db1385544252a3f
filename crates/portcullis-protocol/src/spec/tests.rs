//! What a spec may say, and how errors name what it may not.

use super::*;

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFkKc52EQpKAMBtUiDp/N8hykSeuzBRx5gN48WTPDhWS alice";

fn spec(rest: &str) -> Result<Spec, SpecError> {
    Spec::from_json(format!(r#"{{"version":1,"generation":3,"instance":{{"id":"i-1"}}{rest}}}"#).as_bytes())
}

#[test]
fn the_contract_example_is_read_whole() {
    let json = include_str!("../../tests/spec-v1.json");
    let spec = Spec::from_json(json.as_bytes()).unwrap();
    assert_eq!(spec.peer_addresses().count(), 2);
    assert_eq!(spec.firewall.ingress.len(), 1);
    assert_eq!(Spec::from_json(&spec.to_json()).unwrap(), spec);
}

#[test]
fn missing_sections_mean_none() {
    let spec = spec("").unwrap();
    assert!(spec.firewall.ingress.is_empty() && spec.authorized_keys.is_empty());
    assert_eq!(spec.peer_addresses().count(), 0);
}

#[test]
fn each_problem_names_its_field_and_value() {
    for (rest, expected) in [
        (r#","colour":"red""#, "colour: unknown field `colour`"),
        (
            r#","firewall":{"ingress":[{"id":"a","from_port":22},{"id":"a","from_port":23}]}"#,
            "firewall.ingress[1].id: \"a\" is taken by firewall.ingress[0]",
        ),
        (
            r#","firewall":{"ingress":[{"id":"a","from_port":70000}]}"#,
            "firewall.ingress[0]: from_port of rule a is 70000",
        ),
        (
            r#","cluster":{"id":"c","peers":[{"instance":"i-2","addresses":["10.0.0.1"]},{"instance":"i-2","addresses":["10.0.0.2"]}]}"#,
            "cluster.peers[1].instance: i-2 is already peers[0]",
        ),
        (
            r#","cluster":{"id":"c","peers":[{"instance":"i-2","addresses":["10.0.0.1"]},{"instance":"i-3","addresses":["10.0.0.1"]}]}"#,
            "cluster.peers[1].addresses: 10.0.0.1 is already an address of peers[0]",
        ),
        (
            r#","cluster":{"id":"c","peers":[{"instance":"i-2","addresses":["0.0.0.0"]}]}"#,
            "cluster.peers[0].addresses[0]: 0.0.0.0 can't be a peer's address",
        ),
        (
            r#","cluster":{"id":"c","peers":[{"instance":"i-1","addresses":["10.0.0.1"]}]}"#,
            "i-1 is this instance itself",
        ),
        (
            r#","cluster":{"id":"c","peers":[{"instance":"i-2","addresses":[]}]}"#,
            "peer i-2 has no address",
        ),
        (
            r#","cluster":{"id":"c","peers":[{"instance":"i-2","addresses":["10.0.0.1"]},{"instance":"i-3","addresses":["::ffff:10.0.0.1"]}]}"#,
            "cluster.peers[1].addresses: 10.0.0.1 is already an address of peers[0]",
        ),
        (
            r#","cluster":{"id":"c","peers":[{"instance":"i-2","addresses":["0.0.0.0/0"]}]}"#,
            "cluster.peers[0].addresses[0]: \"0.0.0.0/0\" is not an IP address: a peer is one host, not a range",
        ),
        (
            r#","cluster":{"id":"c","peers":[{"instance":"i-2","addresses":["::/0"]}]}"#,
            "\"::/0\" is not an IP address",
        ),
        (
            r#","firewall":{"ingress":[{"id":"a","from_port":90,"to_port":80}]}"#,
            "firewall.ingress[0]: to_port of rule a: the range 90 to 80 is reversed",
        ),
        (
            r#","authorized_keys":[{"user":"u","key":"ssh-ed25519 AAAA"}]"#,
            "authorized_keys[0].key: not an OpenSSH public key",
        ),
        (
            r#","authorized_keys":[{"user":"u","key":"KEY"},{"user":"u","key":"KEY"}]"#,
            "authorized_keys[1].key: SHA256:",
        ),
        (
            r#","authorized_keys":[{"user":"../x","key":"KEY"}]"#,
            "authorized_keys[0].user: \"../x\" is not a login name",
        ),
        (
            r#","control_plane":{"report_url":"http://x/"}"#,
            "control_plane.report_url: \"http://x/\": only https",
        ),
    ] {
        let error = spec(&rest.replace("KEY", KEY)).unwrap_err().to_string();
        assert!(error.contains(expected), "{rest}\n{error}");
    }
}

#[test]
fn limits_are_named() {
    let list =
        |count: usize, item: &dyn Fn(usize) -> String| (0..count).map(item).collect::<Vec<_>>().join(",");
    let rule = |i: usize| format!(r#"{{"id":"r{i}","protocol":"icmp"}}"#);
    let peer = |i: usize| {
        format!(
            r#"{{"instance":"p{i}","addresses":["fd00::{:x}:{:x}"]}}"#,
            i >> 16,
            i & 0xffff
        )
    };
    let address = |i: usize| format!(r#""fd00::{:x}:{:x}""#, i >> 16, i & 0xffff);
    for (limit, over, expected) in [
        (
            format!(r#","firewall":{{"ingress":[{}]}}"#, list(MAX_RULES, &rule)),
            format!(r#","firewall":{{"ingress":[{}]}}"#, list(100_001, &rule)),
            "firewall.ingress: 100001 rules are too many: at most 1000",
        ),
        (
            format!(r#","cluster":{{"id":"c","peers":[{}]}}"#, list(MAX_PEERS, &peer)),
            format!(
                r#","cluster":{{"id":"c","peers":[{}]}}"#,
                list(MAX_PEERS + 1, &peer)
            ),
            "cluster.peers: 100001 peers are too many: at most 100000",
        ),
        (
            format!(
                r#","cluster":{{"id":"c","peers":[{{"instance":"p","addresses":[{}]}}]}}"#,
                list(2 * MAX_PEERS, &address)
            ),
            format!(
                r#","cluster":{{"id":"c","peers":[{{"instance":"p","addresses":[{}]}}]}}"#,
                list(2 * MAX_PEERS + 1, &address)
            ),
            "cluster.peers: 200001 addresses are too many: at most 200000",
        ),
        (
            format!(
                r#","control_plane":{{"sources":[{}]}}"#,
                list(MAX_SOURCES, &address)
            ),
            format!(
                r#","control_plane":{{"sources":[{}]}}"#,
                list(MAX_SOURCES + 1, &address)
            ),
            "control_plane.sources: 100001 sources are too many: at most 100000",
        ),
    ] {
        assert!(
            spec(&limit).is_ok(),
            "{expected}: what is at the limit is accepted"
        );
        assert_eq!(spec(&over).unwrap_err().to_string(), expected);
    }
}

#[test]
fn host_bits_are_taken_off_with_a_warning() {
    let spec = spec(
        r#","firewall":{"ingress":[
             {"id":"a","from_port":22,"ip_ranges":["10.0.0.0/8","10.0.0.3/8"]},
             {"id":"b","from_port":23,"ip_ranges":["2001:db8::1/32","192.0.2.7","::ffff:10.0.0.0/104"]}]},
           "control_plane":{"sources":["192.0.2.1/24"]}"#,
    )
    .unwrap();
    let warnings: Vec<String> = spec.warnings().iter().map(ToString::to_string).collect();
    assert_eq!(
        warnings,
        [
            "firewall.ingress[0].ip_ranges[1]: 10.0.0.3/8 has host bits: it is taken as 10.0.0.0/8",
            "firewall.ingress[1].ip_ranges[0]: 2001:db8::1/32 has host bits: it is taken as 2001:db8::/32",
            "control_plane.sources[0]: 192.0.2.1/24 has host bits: it is taken as 192.0.2.0/24",
        ]
    );
    // The durable copy says the same.
    assert_eq!(
        Spec::from_json(&spec.to_json()).unwrap().warnings().len(),
        warnings.len()
    );
}

#[test]
fn form_is_checked_before_meaning() {
    assert!(Spec::from_json(b"{").unwrap_err().to_string().contains("EOF"));
    assert!(
        Spec::from_json(br#"{"version":2,"generation":1,"instance":{"id":"i"}}"#)
            .unwrap_err()
            .to_string()
            .contains("version: 2 is not known")
    );
    assert!(
        Spec::from_json(br#"{"version":1,"generation":0,"instance":{"id":"i"}}"#)
            .unwrap_err()
            .to_string()
            .contains("generation: 0 is not a generation")
    );
    assert!(spec("").is_ok());
}

#[test]
fn secrets_do_not_show_in_debug() {
    let spec = spec(r#","control_plane":{"enrolment_token":"hunter2","external_id":"hunter3"}"#).unwrap();
    assert!(!format!("{spec:?}").contains("hunter"));
}

proptest::proptest! {
    #[test]
    fn nothing_written_by_a_stranger_panics(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
        let _ = Spec::from_json(&bytes);
    }

    /// Any one byte of a good spec changed: read or refused, never a panic, and never half.
    #[test]
    fn a_changed_byte_is_read_or_refused(at in 0usize..1500, byte: u8) {
        let mut json = include_bytes!("../../tests/spec-v1.json").to_vec();
        let at = at % json.len();
        json[at] = byte;
        if let Ok(spec) = Spec::from_json(&json) {
            proptest::prop_assert_eq!(Spec::from_json(&spec.to_json()).unwrap(), spec);
        }
    }
}

#[test]
fn secrets_are_left_out_and_kept() {
    let secrets = r#","control_plane":{"enrolment_token":"hunter2","external_id":"swordfish"}"#;
    let accepted = spec(secrets).unwrap();
    let seen = |text: &str| ["hunter2", "swordfish"].map(|secret| text.contains(secret));
    assert_eq!(seen(&String::from_utf8(accepted.to_json()).unwrap()), [true; 2]);
    let mut shown = accepted.without_secrets();
    let text = String::from_utf8(shown.to_json()).unwrap();
    assert_eq!(seen(&text), [false; 2], "{text}");
    shown.keep_secrets_of(&accepted);
    assert_eq!(shown, accepted);
    // What is named anew is not kept, and who takes the control plane away takes all of it.
    let mut new = accepted.without_secrets();
    new.control_plane.as_mut().unwrap().enrolment_token = Some(Secret::new("another"));
    new.keep_secrets_of(&accepted);
    assert_eq!(new.enrolment_token().unwrap().expose(), "another");
    let mut none = Spec {
        control_plane: None,
        ..accepted.clone()
    };
    none.keep_secrets_of(&accepted);
    assert_eq!(none.control_plane, None);
}

#[test]
fn a_token_that_can_be_guessed_is_warned_of() {
    let warned = |token: &str| {
        let spec = spec(&format!(r#","control_plane":{{"enrolment_token":"{token}"}}"#)).unwrap();
        spec.warnings().iter().any(|warning| {
            let text = warning.to_string();
            assert!(!text.contains(token), "{text}");
            text.starts_with("control_plane.enrolment_token: ")
        })
    };
    assert!(warned("hunter2") && warned(&"a".repeat(21)));
    assert!(!warned(&"a".repeat(22)));
}
