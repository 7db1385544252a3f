//! Keys that say more than a key: second lines, control characters, endless comments, options that run
//! commands. Refused where they come in, with a message that can be read.
//!
//! May not live here: what ssh-keygen thinks of a key (`keygen`).

use std::fs;

use portcullis::system::key_files::{install, read_back};
use portcullis_protocol::key::KeyLine;
use portcullis_protocol::{AuthorizedKey, PublicKey, Spec};
use serde_json::json;

use super::home::*;

/// The refusal, which is the same however the key comes.
#[track_caller]
fn refused(line: &str) -> String {
    assert!(line.parse::<PublicKey>().is_err(), "{line:?}");
    let error = line.parse::<KeyLine>().unwrap_err();
    let spec = spec(line).unwrap_err();
    assert!(spec.contains(&error), "{spec:?} does not say {error:?}");
    assert!(spec.contains("authorized_keys[0].key"), "{spec}");
    assert!(
        spec.len() < 1000,
        "the message repeats the key: {} bytes",
        spec.len()
    );
    assert!(!spec.contains(char::is_control), "{spec:?}");
    error
}

fn spec(line: &str) -> Result<Spec, String> {
    let spec = json!({
        "version": 1, "generation": 1, "instance": {"id": "i-1"},
        "authorized_keys": [{"user": "alice", "key": line}],
    });
    Spec::from_json(spec.to_string().as_bytes()).map_err(|error| error.to_string())
}

#[test]
fn a_second_line_or_a_control_character_is_refused() {
    assert_eq!(spec(KEY).unwrap().authorized_keys.len(), 1);
    for smuggled in [
        "\n",
        "\r",
        "\r\n",
        "\0",
        "\u{b}",
        "\u{c}",
        "\u{1b}[2K",
        "\u{7f}",
        "\u{85}",
        "\u{8}",
    ] {
        let (kind, rest) = KEY.split_once(' ').unwrap();
        let (body, comment) = rest.split_once(' ').unwrap();
        for line in [
            format!("{KEY}{smuggled}{OTHER}"),
            format!("{KEY}{smuggled}"),
            format!("{smuggled}{KEY}"),
            format!("{kind}{smuggled}{rest}"),
            format!("{kind} {}{smuggled}{} {comment}", &body[..20], &body[20..]),
            format!("{kind} {body}{smuggled}{comment}"),
        ] {
            let error = refused(&line);
            assert!(
                error.contains("one line without control characters"),
                "{line:?}: {error}"
            );
        }
    }
}

#[test]
fn an_endless_comment_is_refused() {
    let error = refused(&format!("{KEY} {}", "x".repeat(1 << 20)));
    assert!(error.contains("bytes is too long: at most 8192"), "{error}");
    let error = refused(&" x".repeat(1 << 19));
    assert!(error.contains("is too long"), "{error}");
    let longest = format!("{KEY} {}", "x".repeat(8192 - KEY.len() - 1));
    assert!(longest.parse::<PublicKey>().is_ok());
}

#[test]
fn options_that_run_commands_or_open_ways_are_refused() {
    for option in [
        r#"command="sh""#,
        r#"COMMAND="sh""#,
        r#"Command="sh""#,
        r#"no-pty,command="sh""#,
        r#"command="sh",no-pty"#,
        r#"command="a\" b""#,
        r#"environment="LD_PRELOAD=/tmp/x.so""#,
        r#"ENVIRONMENT="PATH=/tmp""#,
        r#"restrict,environment="A=B""#,
        r#"tunnel="0""#,
        r#"Tunnel="0""#,
        r#"restrict,tunnel="1""#,
        r#"expiry-time="20300101Z",command="sh""#,
        r#"no-pty,no-pty,tunnel="0",no-pty"#,
        r#"from="10.0.0.0/8",command="sh""#,
        "command=sh",
        "command",
    ] {
        refused(&format!("{option} {KEY}"));
        refused(&format!("{option}\t{KEY}"));
        refused(&format!(" {option} {KEY}"));
    }
    // An option whose quotation does not end, or ends where the key begins.
    for line in [
        format!(r#"no-pty," {KEY}"#),
        format!(r#"from="x {KEY}"#),
        format!(r#"from="{KEY}""#),
    ] {
        refused(&line);
    }
}

/// A comment may say anything; it stays a comment.
#[test]
fn a_comment_is_nothing_but_a_comment() {
    let homes = Homes::new();
    let user = homes.user("alice", ALICE);
    for comment in [
        r#"command="sh""#,
        "#",
        "#portcullis",
        "# END portcullis",
        "# BEGIN portcullis (managed: lines that end in #portcullis are overwritten)",
        OTHER,
        "\u{2028}ssh-rsa \u{202e}x",
        "%h $(id) `id` \\",
        "  two  spaces",
    ] {
        let (key, _) = KEY.rsplit_once(' ').unwrap();
        let key: AuthorizedKey =
            serde_json::from_value(json!({"user": "alice", "key": format!("{key} {comment}")})).unwrap();
        let outcome = install(&user, &config(), std::slice::from_ref(&key)).unwrap();
        let file = fs::read_to_string(&outcome.path).unwrap();
        let lines: Vec<&str> = file.lines().collect();
        assert_eq!(lines.len(), 3, "{file}");
        assert!(lines[1].starts_with("ssh-ed25519 AAAA"), "{file}");
        let found = read_back(&user, &config()).unwrap().keys;
        assert_eq!(found.len(), 1, "{comment}");
        assert!(found[0].key.same_key(&key.key));
        install(&user, &config(), &[]).unwrap();
        assert_eq!(fs::read(&outcome.path).unwrap(), b"");
    }
}
