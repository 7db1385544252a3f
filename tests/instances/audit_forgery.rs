//! The audit log keeps its lines whatever names callers and programs choose.
//!
//! May not live here: what is recorded of whom, and what is done to the log (`audit`).

use portcullis_provision::local::Output;
use serde_json::{Value, json};

use crate::api::{Api, rule};
use crate::audit::{LOG, is_whole, records};
use crate::lab::{Lab, SOON, eventually};

/// One record per line, whatever is written into what callers may choose.
#[test]
fn nobody_forges_a_line() {
    let lab = Lab::new();
    let machine = lab.launch();
    let api = Api::new(&lab, &machine);
    let before = records(&machine).len();
    let nasty = "x%0A%7B%22seq%22%3A99%7D%0D%1B%5B2J%C2%9B1m%E2%80%AE";
    for path in ["/v1/firewall/rules/", "/v1/keys/", "/v1/cluster/peers/"] {
        let answer = api.ask("DELETE", &format!("{path}{nasty}"), &Value::Null);
        assert_eq!(answer.status, 404, "{answer:?}");
    }
    // Names that could be kept are never that.
    let forged = "a\n\u{1b}[2Jb";
    for (method, path, body) in [
        ("POST", "/v1/firewall/rules".to_owned(), rule(forged, 1)),
        (
            "PUT",
            format!("/v1/cluster/peers/{nasty}"),
            json!({"addresses": ["192.0.2.9"]}),
        ),
        (
            "POST",
            "/v1/keys".to_owned(),
            json!({"user": forged, "key": lab.public_key("id").to_line()}),
        ),
    ] {
        assert_eq!(api.ask(method, &path, &body).status, 422, "{path}");
    }
    // Nor does a program's name.
    machine.ok("name=$(printf '/root/p\\n\\033[2Jq'); cp /usr/bin/portcullis \"$name\"; ! \"$name\" firewall revoke \"$(printf 'y\\n\\033[2J')\"");
    // Three names of nothing, three that can't be names, and the command.
    let all = eventually(SOON, "seven records", || {
        let all = records(&machine);
        match all.len() - before {
            7 => Ok(all),
            _ => Err(format!("{:#?}", &all[before..])),
        }
    });
    let rule = all[before]["parameters"]["rule"].as_str().unwrap();
    assert_eq!(rule, "x\\n{\"seq\":99}\\r\\u{1b}[2J\\u{9b}1m\\u{202e}");
    let by_command = all[before..]
        .iter()
        .find(|record| record["who"]["kind"] == "local");
    let command = by_command.unwrap()["who"]["command"].as_str().unwrap();
    assert!(command.starts_with("p\\n\\u{1b}[2Jq"), "{command}");
    is_whole(&machine);
    let lines: usize = machine.ok(&format!("wc -l < {LOG}")).parse().unwrap();
    assert_eq!(lines, all.len());
    let plain = |output: Output| {
        let odd = |c: char| c.is_control() && c != '\n' || c == '\u{202e}';
        assert!(output.success() && !output.stdout.contains(odd), "{output:?}");
        output.stdout
    };
    plain(machine.run(&format!("cat {LOG}")));
    assert_eq!(
        plain(machine.run("portcullis audit")).lines().count(),
        all.len() + 1
    );
    let journal = machine.run("journalctl -b -o cat --all MESSAGE_ID=5b3f2d0c1a5e4c6e8d0f7a9b1c2d3e68");
    assert_eq!(plain(journal).lines().count(), all.len());
}
