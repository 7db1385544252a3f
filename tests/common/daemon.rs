//! A daemon of a test's own: in a network namespace, with its settings and state in a temporary folder.
//!
//! May not live here: what only a real instance has (systemd, users, a boot).
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use super::{Namespace, eventually};

/// A daemon that ends with its test.
pub struct Daemon {
    child: Child,
    namespace: String,
    folder: tempfile::TempDir,
}

impl Daemon {
    /// Starts one and waits until it answers.
    pub fn start(namespace: &Namespace) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().display();
        let settings = format!(
            "[paths]\nspec = \"{path}/injected.json\"\nstate = \"{path}/state\"\nsocket = \"{path}/control.sock\"\n"
        );
        fs::write(folder.path().join("portcullis.toml"), settings).unwrap();
        let log = File::create(folder.path().join("log")).unwrap();
        let child = command(namespace.name(), &folder)
            .arg("run")
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let daemon = Self {
            child,
            namespace: namespace.name().to_owned(),
            folder,
        };
        eventually(Duration::from_secs(20), "the daemon answers", || {
            let status = daemon.portcullis(&["status", "--format", "json"], b"");
            // Not ready is an answer too: there is no sshd. Without a daemon there is no report.
            match serde_json::from_slice::<portcullis_protocol::Report>(&status.stdout) {
                Ok(_) => Ok(()),
                Err(_) => Err(daemon.log()),
            }
        });
        daemon
    }

    /// One of the program's commands, with something on its standard input.
    pub fn portcullis(&self, arguments: &[&str], input: &[u8]) -> Output {
        let mut child = command(&self.namespace, &self.folder)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        std::thread::scope(|scope| {
            // One that refuses early does not read all.
            scope.spawn(move || drop(stdin.write_all(input)));
            child.wait_with_output().unwrap()
        })
    }

    /// Ends it, without a word.
    pub fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The accepted spec's file.
    pub fn accepted(&self) -> PathBuf {
        self.folder.path().join("state/spec.json")
    }

    /// The file that cloud-init would write.
    pub fn injected(&self) -> PathBuf {
        self.folder.path().join("injected.json")
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop();
    }
}

fn command(namespace: &str, folder: &tempfile::TempDir) -> Command {
    let mut command = Command::new("ip");
    command.args([
        "netns",
        "exec",
        namespace,
        env!("CARGO_BIN_EXE_portcullis"),
        "--config",
    ]);
    command.arg(folder.path().join("portcullis.toml"));
    command
}
