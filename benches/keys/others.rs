//! What keys are put in place with instead: a shell script as user data has it, and cloud-init's own code.
//!
//! May not live here: portcullis, and agents (`google`).

use std::fmt::Write;

use portcullis_figures::{Cell, Row, Samples};
use portcullis_protocol::AuthorizedKey;

use crate::site::Site;

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

/// A folder inside with a file of keys for each user.
pub const FILES: &str = "/run/bench-keys";

pub fn write(site: &Site, keys: &[AuthorizedKey]) -> Vec<Row> {
    let mut files = format!("mkdir -p {FILES}\n");
    for chunk in keys.chunk_by(|a, b| a.user == b.user) {
        let lines: Vec<String> = chunk.iter().map(|key| key.key.to_line()).collect();
        let (user, lines) = (&chunk[0].user, lines.join("\n"));
        writeln!(files, "cat > {FILES}/{user} <<'EOF'\n{lines}\nEOF").unwrap();
    }
    files.push_str(&format!("cat > /run/bench.sh <<'END'\n{SCRIPT}\nEND\n"));
    files.push_str(&format!("cat > /run/bench.py <<'END'\n{CLOUD_INIT}\nEND\n"));
    let made = site.machine.run_with("sh", files.as_bytes());
    assert!(made.success(), "{made:?}");
    let not_durable = "they are written, not durable, not read back";
    let mut rows = Vec::new();
    for (name, command, until) in [
        (
            "a script: `ssh-keygen -l`, `install` for each user",
            "sh /run/bench.sh",
            not_durable,
        ),
        (
            "the script, and `sync`",
            "sh /run/bench.sh; sync",
            "they are on disk, not read back",
        ),
        (
            "cloud-init's `setup_user_keys`",
            "python3 /run/bench.py",
            not_durable,
        ),
    ] {
        let taken = Samples::of(ROUNDS, |_| {
            site.machine.ok("rm -rf /home/u??/.ssh");
            site.settle();
            site.took(command)
        });
        rows.push(Row::theirs(
            name,
            vec![taken.into(), Cell::Said(until.to_owned())],
        ));
    }
    site.machine.ok("rm -rf /home/u??/.ssh");
    rows
}
