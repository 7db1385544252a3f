//! Ready means that a login would work now: what takes it away is told at once.
//!
//! May not live here: faults of the gate and of the machine (`faults`).

use std::time::Duration;

use crate::keys::Door;
use crate::lab::{SOON, eventually};

/// What takes a login away, and what gives it back.
const LOSSES: [(&str, &str, &str); 5] = [
    ("sshd stops", "systemctl stop ssh", "systemctl start ssh"),
    // For a group, Debian's own sshd is less strict than OpenSSH if it is the user's private one.
    (
        "the home becomes writable by others",
        "chmod o+w /home/ubuntu",
        "chmod o-w /home/ubuntu",
    ),
    (
        "the file is edited away, and something else is in its place",
        "cd /home/ubuntu/.ssh && mv authorized_keys kept && mkdir authorized_keys",
        "cd /home/ubuntu/.ssh && rmdir authorized_keys && mv kept authorized_keys",
    ),
    (
        "the account expires",
        "usermod -e 1970-01-02 ubuntu",
        "usermod -e '' ubuntu",
    ),
    (
        "the folder is closed to its user",
        "chmod 000 /home/ubuntu/.ssh",
        "chmod 700 /home/ubuntu/.ssh",
    ),
];

#[test]
fn readiness_is_lost_with_the_login_and_comes_back_with_it() {
    let door = Door::new();
    let machine = &door.machine;
    for (what, loss, mend) in LOSSES {
        door.lets_in("id");
        machine.until_ready();
        let start = std::time::Instant::now();
        machine.ok(loss);
        eventually(SOON, what, || match machine.status().ready {
            true => Err("still ready"),
            false => Ok(()),
        });
        println!("{what}: not ready after {:?}", start.elapsed());
        assert!(
            start.elapsed() < Duration::from_secs(2),
            "{what}: {:?}",
            start.elapsed()
        );
        // It is no false alarm: nobody gets in.
        let refused = door.try_login("id");
        assert_eq!(refused.code, Some(255), "{what}: {refused:?}");
        machine.ok(mend);
        machine.until_ready();
    }
    // A key that is merely edited away is put back, and sshd is asked again.
    machine.ok("sed -i /portcullis$/d /home/ubuntu/.ssh/authorized_keys");
    let id = door.lab.public_key("id");
    eventually(SOON, "the key is back", || {
        let file = machine.ok("cat /home/ubuntu/.ssh/authorized_keys");
        match file.contains(&id.to_line()) {
            true => Ok(()),
            false => Err(file),
        }
    });
    machine.until_ready();
    door.lets_in("id");
}
