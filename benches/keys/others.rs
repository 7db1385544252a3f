//! What keys are put in place with instead: a shell script as user data has it, and cloud-init's own code.
//! google-guest-agent is not in Debian, so it is not among them.
//!
//! May not live here: portcullis.

use std::fmt::Write;

use portcullis_protocol::AuthorizedKey;

use crate::site::Site;
use crate::stats::Samples;

const ROUNDS: usize = 5;

/// Nobody reads back what it wrote, and it may be gone after a power cut.
const SCRIPT: &str = r#"
set -e
for file in /run/bench-keys/*; do
    user=${file##*/}
    ssh-keygen -l -f "$file"
    install -d -m 700 -o "$user" -g "$user" "/home/$user/.ssh"
    install -m 600 -o "$user" -g "$user" "$file" "/home/$user/.ssh/authorized_keys"
done
"#;

/// What cloud-init does for `ssh_authorized_keys`, for all users in one process.
const CLOUD_INIT: &str = r#"
import os
from cloudinit.ssh_util import setup_user_keys
for user in os.listdir("/run/bench-keys"):
    with open("/run/bench-keys/" + user) as keys:
        setup_user_keys(set(keys.read().splitlines()), user)
"#;

pub fn write(site: &Site, keys: &[AuthorizedKey]) -> Vec<(String, Samples)> {
    let mut files = "mkdir -p /run/bench-keys\n".to_owned();
    for chunk in keys.chunk_by(|a, b| a.user == b.user) {
        let lines: Vec<String> = chunk.iter().map(|key| key.key.to_line()).collect();
        let (user, lines) = (&chunk[0].user, lines.join("\n"));
        writeln!(files, "cat > /run/bench-keys/{user} <<'EOF'\n{lines}\nEOF").unwrap();
    }
    files.push_str(&format!("cat > /run/bench.sh <<'END'\n{SCRIPT}\nEND\n"));
    files.push_str(&format!("cat > /run/bench.py <<'END'\n{CLOUD_INIT}\nEND\n"));
    let made = site.machine.run_with("sh", files.as_bytes());
    assert!(made.success(), "{made:?}");
    let mut rows = Vec::new();
    for (name, command) in [
        (
            "a script: `ssh-keygen -l`, `install` for each user; not durable",
            "sh /run/bench.sh",
        ),
        ("the same, and `sync`", "sh /run/bench.sh; sync"),
        (
            "cloud-init's setup_user_keys; not durable",
            "python3 /run/bench.py",
        ),
    ] {
        let taken = Samples::of(ROUNDS, |_| {
            site.machine.ok("rm -rf /home/u??/.ssh");
            site.settle();
            site.took(command)
        });
        rows.push((name.to_owned(), taken));
    }
    site.machine.ok("rm -rf /home/u??/.ssh");
    rows
}
