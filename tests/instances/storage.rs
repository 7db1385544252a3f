//! Encryption at rest, as an instance with the package sees it.
//!
//! May not live here: real encryption, which this machine's kernel may not have (`tests/kernel`).

use portcullis_protocol::{CheckId, Status};

use crate::lab::{Lab, SOON, eventually};

#[test]
fn a_root_from_outside_is_unknown_and_a_claim_does_not_change_that() {
    let lab = Lab::new();
    let mut machine = lab.launch();
    let check = machine.until_check(CheckId::StorageEncrypted, Status::Unknown);
    eventually(SOON, "a look", || {
        let check = machine.status().check(CheckId::StorageEncrypted).unwrap().clone();
        match check.summary.contains("not to be seen from inside") {
            true => Ok(()),
            false => Err(check.summary),
        }
    });
    assert!(!check.required);
    machine.push(|spec| {
        let claim = r#"{"attested":[{"by":"cloud.example"}]}"#;
        spec.storage = Some(serde_json::from_str(claim).unwrap());
    });
    let check = machine.status().check(CheckId::StorageEncrypted).unwrap().clone();
    assert_eq!(check.status, Status::Unknown, "{check:?}");

    // Who may ask the unit is root alone, and it goes with the daemon.
    for unit in ["portcullis-storage.socket", "portcullis-storage@.service"] {
        let output = machine.run(&format!("systemd-analyze verify --man=no {unit}"));
        assert!(output.success(), "{output:?}");
        assert_eq!((output.stdout.trim(), output.stderr.trim()), ("", ""), "{unit}");
    }
    assert_eq!(machine.unit("portcullis-storage.socket", "ActiveState"), "active");
    assert_eq!(
        machine.ok("stat -c '%U %a' /run/portcullis-storage.sock"),
        "root 600"
    );
    machine.ok("systemctl stop portcullis");
    assert_eq!(
        machine.unit("portcullis-storage.socket", "ActiveState"),
        "inactive"
    );
    machine.ok("test ! -e /run/portcullis-storage.sock && systemctl start portcullis");
    machine.until_ready();
    assert_eq!(machine.unit("portcullis-storage.socket", "ActiveState"), "active");
}
