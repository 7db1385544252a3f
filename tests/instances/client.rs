//! `ssh` that goes on: what is typed into it, what it says, and whether it still runs.
//!
//! May not live here: how it is called (`login`).

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::{SOON, eventually};

/// A running `ssh`; ended when dropped.
pub struct Client {
    name: String,
    pub process: Child,
    said: Arc<Mutex<String>>,
}

impl Client {
    /// Starts it; its output is collected.
    pub fn start(name: &str, command: &mut Command) -> Self {
        let mut process = command
            .args(["-o", "BatchMode=yes"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let (mut output, saying) = (process.stdout.take().unwrap(), said.clone());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut bytes) {
                saying
                    .lock()
                    .unwrap()
                    .push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        });
        let name = name.to_owned();
        Self { name, process, said }
    }

    /// A shell on a terminal.
    pub fn shell(name: &str, command: &mut Command) -> Self {
        let mut client = Self::start(name, command.arg("-tt"));
        client.answers();
        client
    }

    /// What the shell is told to do.
    pub fn types(&mut self, line: &str) {
        let input = self.process.stdin.as_mut().unwrap();
        writeln!(input, "{line}").unwrap();
    }

    /// Waits for its output.
    #[track_caller]
    pub fn until_said(&self, text: &str) {
        eventually(SOON, &format!("{} says {text}", self.name), || {
            let said = self.said.lock().unwrap().clone();
            if said.contains(text) { Ok(()) } else { Err(said) }
        });
    }

    /// The shell at the other end does something.
    #[track_caller]
    pub fn answers(&mut self) {
        let number = self.said.lock().unwrap().len();
        // Only the shell's answer holds the number in this form, not the echo of what was typed.
        self.types(&format!("echo up-$(({number} + 0))-"));
        self.until_said(&format!("up-{number}-"));
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn until_ended(&mut self, limit: Duration) {
        let name = self.name.clone();
        eventually(limit, &format!("{name} ends"), || {
            if self.is_running() { Err("it runs") } else { Ok(()) }
        });
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if self.is_running() {
            let pid = Pid::from_raw(i32::try_from(self.process.id()).unwrap());
            // It passes the signal on to what it watches over.
            let _ = kill(pid, Signal::SIGTERM);
            let _ = self.process.wait();
        }
    }
}
