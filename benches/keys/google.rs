//! google-guest-agent with keys in its metadata: the agent is Debian's, the metadata service is a small responder
//! after Google's documents (long polls with an etag), since there is no cloud here.
//!
//! May not live here: portcullis, and scripts (`others`).

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use portcullis_figures::{Cell, Row, Samples};
use portcullis_protocol::AuthorizedKey;

use crate::lab::{READY_TIME, eventually};
use crate::others::FILES;
use crate::site::{Moment, Site, USERS};

/// Debian's package.
pub const PACKAGE: &str = "google-guest-agent";

const ROUNDS: usize = 5;

/// `ssh-keys` has a line `USER:KEY` for each. A poll that names the present etag waits for another.
const METADATA: &str = r#"
import http.server, json, os, time, urllib.parse
FILE = "/run/google-keys"
def attributes():
    with open(FILE) as file:
        keys = file.read()
    document = {"instance": {"attributes": {"ssh-keys": keys}, "id": 1, "networkInterfaces": []},
                "project": {"attributes": {}, "projectId": "p"}}
    return str(os.stat(FILE).st_mtime_ns), document
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        query = urllib.parse.parse_qs(urllib.parse.urlparse(self.path).query)
        until = time.monotonic() + float(query.get("timeout_sec", ["0"])[0])
        etag, document = attributes()
        while query.get("last_etag") == [etag] and time.monotonic() < until:
            time.sleep(0.002)
            etag, document = attributes()
        body = json.dumps(document).encode()
        self.send_response(200)
        for name, value in (("Metadata-Flavor", "Google"), ("ETag", etag), ("Content-Type", "application/json"),
                            ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
    def do_PUT(self):
        self.send_response(200)
        self.end_headers()
    do_POST = do_PUT
    def log_message(self, *arguments):
        pass
http.server.ThreadingHTTPServer(("169.254.169.254", 80), Handler).serve_forever()
"#;

/// So that it does not run until it is asked to.
pub fn keep_from_starting(overlay: &Path) {
    let units = overlay.join("etc/systemd/system");
    fs::create_dir_all(&units).unwrap();
    for unit in [
        "google-guest-agent",
        "google-startup-scripts",
        "google-shutdown-scripts",
    ] {
        symlink("/dev/null", units.join(format!("{unit}.service"))).unwrap();
    }
}

/// From the change of the metadata to the last user's file.
pub fn write(site: &Site, keys: &[AuthorizedKey]) -> Row {
    let mut lines = String::new();
    for key in keys {
        lines += &format!("{}:{}\n", key.user, key.key.to_line());
    }
    let machine = &site.machine;
    assert!(
        machine
            .run_with("cat > /run/all-keys", lines.as_bytes())
            .success()
    );
    assert!(
        machine
            .run_with("cat > /run/metadata.py", METADATA.as_bytes())
            .success()
    );
    // The agent's configuration stays Debian's; the responder's address is on loopback, as nothing else has it here.
    machine.ok(&format!(
        "set -e; rm -rf {FILES}; ip address add 169.254.169.254/32 dev lo
         : > /run/google-keys
         systemd-run -q --unit metadata python3 /run/metadata.py
         for try in $(seq 500); do curl -s http://169.254.169.254/ >/run/metadata.json && break; sleep 0.02; done
         test -s /run/metadata.json
         systemd-run -q --unit google google_guest_agent"
    ));
    let taken = Samples::of(ROUNDS, |_| {
        site.settle();
        let (start, _) =
            site.timed("cp /run/all-keys /run/google-keys.new; mv /run/google-keys.new /run/google-keys");
        let last = files(site, USERS);
        assert!(last > start, "files of this round");
        machine.ok(": > /run/google-keys");
        files(site, 0);
        last - start
    });
    machine.ok(
        "systemctl stop google metadata; ip address del 169.254.169.254/32 dev lo; rm -rf /home/u??/.ssh",
    );
    let until = "they are written, not durable, not read back";
    Row::theirs(
        "google-guest-agent",
        vec![taken.into(), Cell::Said(until.to_owned())],
    )
}

/// Waits until so many users have a file with all their keys: when the last was changed.
fn files(site: &Site, count: usize) -> Moment {
    let found = "grep -c ssh-ed25519 /home/u??/.ssh/authorized_keys 2>/dev/null | grep -c ':100$'; \
                 stat -c %.9Z /home/u??/.ssh/authorized_keys 2>/dev/null | sort -n | tail -n 1";
    let said = eventually(READY_TIME, "google-guest-agent wrote keys", || {
        let said = site.machine.run(found).stdout;
        let has = said.lines().next() == Some(count.to_string().as_str());
        if has { Ok(said) } else { Err(said) }
    });
    Moment::from_secs_f64(
        said.lines()
            .nth(1)
            .and_then(|line| line.parse().ok())
            .unwrap_or_default(),
    )
}
