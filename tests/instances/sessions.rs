//! Sessions and the keys that opened them: they end with their key, if the image says so, and no others.
//!
//! May not live here: who logs in at all (`login`), what sshd's lines mean (`policy::ssh_log`).

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use portcullis::log::id::{SSH_SESSION_ENDED, SSH_SESSION_LEFT};
use portcullis_protocol::{AuthorizedKey, Spec};
use portcullis_provision::local::Outsider;

use crate::client::Client;
use crate::lab::{Lab, Machine, Run, SOON, USER, eventually, host};
use crate::login::{ssh, ssh_as};
use crate::releases::{self, BOOKWORM, BULLSEYE, Release, TRIXIE};

/// How long a session may live after its key.
const AT_ONCE: Duration = Duration::from_secs(2);

/// One key's sessions: a shell, a connection that only forwards a port, and one that shells share.
struct Sessions {
    shell: Client,
    forward: Client,
    forwarded: PathBuf,
    master: Client,
    shared: Client,
}

impl Sessions {
    fn open(lab: &Lab, machine: &Machine, from: &Outsider, key: &str) -> Self {
        let connect = || ssh(lab, machine, from, &lab.path(key));
        let name = |what: &str| format!("{key}'s {what}");
        let forwarded = lab.path(&format!("{key}.forward"));
        let forward = Client::start(
            &name("forward"),
            connect()
                .args(["-N", "-L"])
                .arg(format!("{}:127.0.0.1:22", forwarded.display())),
        );
        let control = lab.path(&format!("{key}.control"));
        let master = Client::start(&name("master"), connect().args(["-N", "-M", "-S"]).arg(&control));
        eventually(SOON, "the shared connection is there", || {
            std::fs::metadata(&control)
        });
        let sessions = Self {
            shell: Client::shell(&name("shell"), &mut connect()),
            forward,
            forwarded,
            master,
            shared: Client::shell(&name("shared shell"), connect().arg("-S").arg(&control)),
        };
        eventually(SOON, "a port is forwarded", || sessions.banner());
        sessions
    }

    /// What comes through the forwarded port.
    fn banner(&self) -> std::io::Result<()> {
        let mut stream = UnixStream::connect(&self.forwarded)?;
        stream.set_read_timeout(Some(SOON))?;
        let mut start = [0; 8];
        stream.read_exact(&mut start)?;
        assert_eq!(&start, b"SSH-2.0-");
        Ok(())
    }

    #[track_caller]
    fn live(&mut self) {
        self.shell.answers();
        self.shared.answers();
        self.banner().unwrap();
        assert!(self.master.is_running() && self.forward.is_running());
    }

    #[track_caller]
    fn until_ended(&mut self, limit: Duration) {
        let end = Instant::now() + limit;
        for client in [
            &mut self.shell,
            &mut self.forward,
            &mut self.master,
            &mut self.shared,
        ] {
            client.until_ended(end.saturating_duration_since(Instant::now()));
        }
    }
}

fn key(lab: &Lab, user: &str, name: &str) -> AuthorizedKey {
    AuthorizedKey {
        user: user.parse().unwrap(),
        options: portcullis_protocol::KeyOptions::default(),
        key: lab.public_key(name),
        expires: None,
    }
}

/// An instance where each of these lets `USER` in.
fn launch(lab: &Lab, names: &[&str], end_sessions: bool) -> Machine {
    launch_on(&BOOKWORM, lab, names, end_sessions)
}

fn launch_on(release: &Release, lab: &Lab, names: &[&str], end_sessions: bool) -> Machine {
    let mut machine = releases::launch(lab, release);
    if end_sessions {
        machine.set("keys", "end_sessions = true");
        machine.until_ready();
    }
    let keys: Vec<AuthorizedKey> = names.iter().map(|name| key(lab, USER, name)).collect();
    machine.push(|spec| spec.authorized_keys.extend(keys));
    machine.until_ready();
    machine
}

/// The next spec, without a key.
fn without(lab: &Lab, machine: &Machine, name: &str) -> Spec {
    let key = lab.public_key(name);
    machine.next(|spec| spec.authorized_keys.retain(|k| k.key != key))
}

#[track_caller]
fn revoke(lab: &Lab, machine: &mut Machine, name: &str) {
    let spec = without(lab, machine, name);
    let applied = machine.apply(&spec);
    assert!(applied.success(), "{applied:?}");
}

/// The daemon's lines with this message id: user, fingerprint, from where, session, text.
fn told(machine: &Machine, id: &str) -> Vec<String> {
    let fields = "USER FINGERPRINT REMOTE SESSION MESSAGE";
    let lines = machine.ok(&format!(
        "journalctl -b -o json _EXE=/usr/bin/portcullis MESSAGE_ID={id}"
    ));
    let lines = lines
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let text = |line: serde_json::Value| {
        let values = fields
            .split(' ')
            .map(|f| line[f].as_str().unwrap_or("-").to_owned());
        values.collect::<Vec<_>>().join("|")
    };
    lines.map(text).collect()
}

/// Waits until there are so many: a session is gone before its line is there.
#[track_caller]
fn until_told(machine: &Machine, id: &str, count: usize) -> Vec<String> {
    eventually(SOON, id, || {
        let lines = told(machine, id);
        if lines.len() == count {
            Ok(lines)
        } else {
            Err(lines)
        }
    })
}

fn runs(machine: &Machine, command: &str) -> bool {
    machine.run(&format!("pgrep -fx '{command}'")).success()
}

#[test]
fn sessions_end_with_their_key_if_the_image_says_so_and_others_live() {
    sessions_end_with_their_key_on(&BOOKWORM);
}

/// Its OpenSSH is the oldest.
#[test]
fn sessions_end_with_their_key_on_debian_11() {
    sessions_end_with_their_key_on(&BULLSEYE);
}

/// Its OpenSSH has a program of its own for sessions.
#[test]
fn sessions_end_with_their_key_on_debian_13_with_sshd_behind_a_socket() {
    sessions_end_with_their_key_on(&TRIXIE);
}

fn sessions_end_with_their_key_on(release: &Release) {
    let lab = Lab::new();
    lab.new_key("second");
    let mut machine = launch_on(release, &lab, &["second"], false);
    let stranger = lab.stranger();
    let mut first = Sessions::open(&lab, &machine, &stranger, "id");
    let mut second = Sessions::open(&lab, &machine, &stranger, "second");
    // Without the setting all live on, though the key is no good any more.
    revoke(&lab, &mut machine, "second");
    let mut refused = Client::start(
        "second",
        ssh(&lab, &machine, &stranger, &lab.path("second")).arg("true"),
    );
    refused.until_ended(SOON);
    assert_eq!(refused.process.wait().unwrap().code(), Some(255));
    std::thread::sleep(AT_ONCE);
    second.live();
    first.live();

    machine.set("keys", "end_sessions = true");
    machine.until_ready();
    machine.push(|spec| spec.authorized_keys.push(key(&lab, USER, "second")));
    machine.until_ready();
    // What outlives a terminal does not outlive a session, and what does not want to end does.
    second
        .shell
        .types("nohup sleep 4001 & (trap '' TERM HUP; exec sleep 4002) &");
    first.shell.types("nohup sleep 4003 &");
    eventually(SOON, "programs run", || {
        let all = ["sleep 4001", "sleep 4002", "sleep 4003"].map(|line| runs(&machine, line));
        if all == [true; 3] { Ok(()) } else { Err(all) }
    });
    second.live();
    revoke(&lab, &mut machine, "second");
    let revoked = Instant::now();
    second.until_ended(AT_ONCE);
    eprintln!("ended {:?} after the answer", revoked.elapsed());
    eventually(AT_ONCE, "nothing is left of them", || {
        let left = ["sleep 4001", "sleep 4002"].map(|line| runs(&machine, line));
        if left == [false; 2] { Ok(()) } else { Err(left) }
    });
    let fingerprint = lab.public_key("second").fingerprint();
    let lines = until_told(&machine, SSH_SESSION_ENDED, 3);
    let address = stranger.addresses()[0];
    for line in lines {
        assert!(
            line.starts_with(&format!("{USER}|{fingerprint}|{address}|")),
            "{line}"
        );
        assert!(line.contains("open for "), "{line}");
    }
    first.live();
    assert!(runs(&machine, "sleep 4003"));
    assert_eq!(told(&machine, SSH_SESSION_LEFT), [""; 0]);
}

#[test]
fn a_key_that_expires_ends_its_session_and_not_before() {
    let lab = Lab::new();
    lab.new_key("second");
    let mut machine = launch(&lab, &[], true);
    let stranger = lab.stranger();
    let end = Timestamp::now() + SignedDuration::from_secs(3);
    let mut expiring = key(&lab, USER, "second");
    expiring.expires = Some(end);
    machine.push(|spec| spec.authorized_keys.push(expiring));
    let mut first = Client::shell("id", &mut ssh(&lab, &machine, &stranger, &lab.path("id")));
    let mut second = Client::shell("second", &mut ssh(&lab, &machine, &stranger, &lab.path("second")));
    assert!(Timestamp::now() < end, "the machine is too slow for this test");
    second.until_ended(SOON);
    let after = Timestamp::now().duration_since(end);
    assert!(
        after.is_positive() && after < SignedDuration::from_secs(2),
        "{after:?}"
    );
    first.answers();
}

#[test]
fn nobody_ends_a_session_by_writing_what_sshd_writes() {
    let lab = Lab::new();
    lab.new_key("second");
    lab.new_key("root");
    let mut machine = launch(&lab, &["second"], true);
    let stranger = lab.stranger();
    machine.push(|spec| {
        let keys = [key(&lab, "root", "root"), key(&lab, "root", "second")];
        spec.authorized_keys.extend(keys);
    });
    machine.until_ready();
    let connect = |name: &str| ssh(&lab, &machine, &stranger, &lab.path(name));
    let mut own = Client::shell("id", &mut connect("id"));
    let mut revoked = Client::shell("second", &mut connect("second"));
    let mut root = Client::shell(
        "root",
        &mut ssh_as("root", &lab, &machine, &stranger, &lab.path("root")),
    );
    // Processes of sshd for the sessions that are to live: those that logind calls their leaders.
    let leaders = machine.ok(
        "for s in $(loginctl list-sessions --no-legend | awk '{print $1}'); do \
            loginctl show-session -P Leader $s; done",
    );
    assert!(leaders.lines().count() >= 3, "{leaders}");
    // A user says of each that the key which will be revoked opened it, in every way that a user has.
    let forge = format!(
        r#"import os, shutil, socket, subprocess, sys
fingerprint, leaders = sys.argv[1], sys.argv[2:]
def line(user): return f"Accepted publickey for {{user}} from 192.0.2.7 port 5 ssh2: ED25519 {{fingerprint}}"
syslog = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); syslog.connect("/dev/log")
native = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); native.connect("/run/systemd/journal/socket")
os.makedirs("/home/{USER}/usr/sbin", exist_ok=True)
shutil.copy("/usr/bin/logger", "/home/{USER}/usr/sbin/sshd")
for user in ["root", "{USER}"]:
    subprocess.run(["logger", "-t", "sshd", line(user)], check=True)
    subprocess.run(["systemd-cat", "-t", "sshd", "echo", line(user)], check=True)
    for pid in leaders:
        syslog.send(f"<38>sshd[{{pid}}]: {{line(user)}}".encode())
        subprocess.run(["/home/{USER}/usr/sbin/sshd", "-t", f"sshd[{{pid}}]", line(user)], check=True)
        native.send(f"_UID=0\n_PID={{pid}}\n_EXE=/usr/sbin/sshd\n_TRANSPORT=syslog\nSYSLOG_PID={{pid}}\n"
            f"SYSLOG_IDENTIFIER=sshd\nMESSAGE={{line(user)}}\n".encode())
"#
    );
    assert!(
        machine
            .run_with("cat > /tmp/forge.py", forge.as_bytes())
            .success()
    );
    let fingerprint = lab.public_key("second").fingerprint();
    let leaders = leaders.replace('\n', " ");
    own.types(&format!(
        "python3 /tmp/forge.py {fingerprint} {leaders} && echo forged-$((40 + 2))"
    ));
    own.until_said("forged-42");
    // The lines are there, under sshd's name and the numbers of its processes.
    for pid in leaders.split(' ') {
        eventually(SOON, "forged lines are in the journal", || {
            let lines = machine.ok(&format!(
                "journalctl -b -o cat -t sshd SYSLOG_PID={pid} _UID=1000 | grep -c 'for root.*{fingerprint}'"
            ));
            if lines.parse::<u32>().unwrap() >= 2 {
                Ok(())
            } else {
                Err(lines)
            }
        });
    }
    revoke(&lab, &mut machine, "second");
    revoked.until_ended(AT_ONCE);
    until_told(&machine, SSH_SESSION_ENDED, 1);
    std::thread::sleep(AT_ONCE);
    own.answers();
    root.answers();
    assert_eq!(told(&machine, SSH_SESSION_ENDED).len(), 1);
}

#[test]
fn who_keeps_a_key_out_of_the_file_does_not_keep_the_session() {
    let lab = Lab::new();
    lab.new_key("second");
    let mut machine = launch(&lab, &["second"], true);
    let stranger = lab.stranger();
    let connect = |name: &str| Client::shell(name, &mut ssh(&lab, &machine, &stranger, &lab.path(name)));
    let (mut second, mut first) = (connect("second"), connect("id"));
    // What the daemon does not find in the file when the key is revoked, it can't take away.
    first.types("while sed -i /portcullis/d ~/.ssh/authorized_keys; do :; done & echo began-$((1 + 1))");
    first.until_said("began-2");
    let file = format!("/home/{USER}/.ssh/authorized_keys");
    eventually(SOON, "the keys are gone from the file", || {
        let file = machine.ok(&format!("cat {file}"));
        if file.contains("ssh-ed25519") {
            Err(file)
        } else {
            Ok(())
        }
    });
    revoke(&lab, &mut machine, "second");
    second.until_ended(AT_ONCE);
    first.answers();
}

#[test]
fn a_certificates_session_ends_with_its_authority_and_with_no_other_that_it_names() {
    let lab = Lab::new();
    for name in ["authority", "named", "holder"] {
        lab.new_key(name);
    }
    let mut machine = launch(&lab, &["authority", "named"], true);
    let stranger = lab.stranger();
    let authority = lab.public_key("authority");
    machine.ok(&format!(
        "echo 'cert-authority {authority}' >> ~{USER}/.ssh/authorized_keys"
    ));
    machine.until_ready();
    // The authority chooses the id, and it says that another one signed.
    let id = format!(
        "x (serial 1) CA ED25519 {}",
        lab.public_key("named").fingerprint()
    );
    host("ssh-keygen")
        .args(["-q", "-I", &id, "-n", USER, "-s"])
        .args([lab.path("authority"), lab.path("holder.pub")])
        .succeed();
    let connect = |name: &str| {
        let mut command = ssh(&lab, &machine, &stranger, &lab.path(name));
        Client::shell(name, &mut command)
    };
    let (mut holder, mut named, mut first) = (connect("holder"), connect("named"), connect("id"));
    revoke(&lab, &mut machine, "named");
    named.until_ended(AT_ONCE);
    std::thread::sleep(AT_ONCE);
    holder.answers();
    revoke(&lab, &mut machine, "authority");
    holder.until_ended(AT_ONCE);
    first.answers();
    let lines = until_told(&machine, SSH_SESSION_ENDED, 2);
    assert!(lines[1].contains(&authority.fingerprint()), "{lines:?}");
}

#[test]
fn a_daemon_that_is_killed_right_after_its_answer_ends_the_session_at_its_next_start() {
    let lab = Lab::new();
    lab.new_key("second");
    let machine = launch(&lab, &["second"], true);
    // Time enough to see that nobody else ends it.
    machine.ok("mkdir /run/systemd/system/portcullis.service.d
        printf '[Service]\\nRestartSec=4\\n' > /run/systemd/system/portcullis.service.d/test.conf
        systemctl daemon-reload");
    let stranger = lab.stranger();
    let connect = |name: &str| Client::shell(name, &mut ssh(&lab, &machine, &stranger, &lab.path(name)));
    let (mut second, mut first) = (connect("second"), connect("id"));
    let spec = without(&lab, &machine, "second");
    let killed = machine.main_pid();
    let apply_and_kill = format!("portcullis apply --spec - && kill -KILL {killed}");
    let applied = machine.run_with(&apply_and_kill, &spec.to_json());
    assert!(applied.success(), "{applied:?}");
    std::thread::sleep(AT_ONCE);
    second.answers();
    assert_eq!(told(&machine, SSH_SESSION_ENDED), [""; 0]);
    second.until_ended(SOON);
    first.answers();
    let fingerprint = lab.public_key("second").fingerprint();
    let lines = until_told(&machine, SSH_SESSION_ENDED, 1);
    assert!(lines[0].contains(&fingerprint), "{lines:?}");
    // And then it is done, for later starts too.
    eventually(SOON, "it is forgotten", || {
        let kept = machine.ok("cat /var/lib/portcullis/session-keys.json");
        if kept.contains(r#""pending":[]"#) && !kept.contains(&fingerprint) {
            Ok(())
        } else {
            Err(kept)
        }
    });
}

#[test]
fn who_revokes_the_key_of_the_own_session_reads_the_answer_first() {
    let lab = Lab::new();
    lab.new_key("second");
    let machine = launch(&lab, &["second"], true);
    let stranger = lab.stranger();
    let mut own = Client::shell("second", &mut ssh(&lab, &machine, &stranger, &lab.path("second")));
    let spec = without(&lab, &machine, "second");
    assert!(
        machine
            .run_with("cat > /tmp/next.json", &spec.to_json())
            .success()
    );
    own.types("sudo portcullis apply --spec /tmp/next.json; echo answer-$(($? + 100))");
    own.until_said("answer-100");
    own.until_ended(AT_ONCE);
    machine.until_generation(spec.generation.get());
}

#[test]
fn a_connection_that_logind_does_not_know_ends_and_one_that_sshd_does_not_tell_of_is_told() {
    let lab = Lab::new();
    lab.new_key("second");
    lab.new_key("third");
    let mut machine = launch(&lab, &["second", "third"], true);
    let stranger = lab.stranger();
    let connect = |machine: &Machine, name: &str| {
        Client::shell(name, &mut ssh(&lab, machine, &stranger, &lab.path(name)))
    };
    let sshd_says = |machine: &Machine, line: &str| {
        machine.ok(&format!(
            "echo '{line}' > /etc/ssh/sshd_config.d/00-test.conf; systemctl restart ssh"
        ));
        machine.until_ready();
    };
    // Without PAM, nobody tells logind, and sshd itself refuses accounts that are locked.
    machine.ok(&format!("usermod -p '*' {USER}"));
    sshd_says(&machine, "UsePAM no");
    let mut unknown_to_logind = connect(&machine, "second");
    let mut other = connect(&machine, "id");
    assert_eq!(machine.ok("loginctl list-sessions --no-legend"), "");
    revoke(&lab, &mut machine, "second");
    unknown_to_logind.until_ended(AT_ONCE);
    other.answers();
    let lines = until_told(&machine, SSH_SESSION_ENDED, 1);
    assert!(
        lines[0].contains("||the SSH session of"),
        "no session of logind's: {lines:?}"
    );
    assert_eq!(told(&machine, SSH_SESSION_LEFT), [""; 0]);

    sshd_says(&machine, "LogLevel ERROR");
    let mut not_in_the_journal = connect(&machine, "third");
    revoke(&lab, &mut machine, "third");
    let lines = until_told(&machine, SSH_SESSION_LEFT, 1);
    assert!(lines[0].contains("LogLevel INFO"), "{lines:?}");
    not_in_the_journal.answers();
    other.answers();
}
