//! Running programs: here, and inside an instance.
//!
//! May not live here: a shell line made of parts from outside. Arguments are passed one by one.

use std::io::Write as _;
use std::process::{Child, Command, Stdio};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use crate::{Error, Result};

/// How a program ended and what it said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output; bytes that are not UTF-8 are replaced.
    pub stdout: String,
    /// Standard error, likewise.
    pub stderr: String,
}

impl Output {
    /// Whether it ended with code 0.
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }
}

/// Runs a program to its end with `input` on its standard input, whatever its exit code.
///
/// # Errors
/// When it can't be started; the message names it.
pub(crate) fn capture(command: &mut Command, input: &[u8]) -> Result<Output> {
    let name = line(command);
    let failed = |e: std::io::Error| Error::Failed(format!("can't run `{name}`: {e}"));
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().map_err(failed)?;
    let output = std::thread::scope(|scope| {
        keep_going(&child).map(|watch| scope.spawn(watch));
        if let Some(mut stdin) = child.stdin.take() {
            // A program that does not read its input is not an error of ours.
            let _ = stdin.write_all(input);
        }
        child.wait_with_output()
    });
    let output = output.map_err(failed)?;
    Ok(Output {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Lets a program go on whenever it is stopped, until it ends.
///
/// nsenter(1) stops itself when the program that it runs inside is stopped, and systemd stops all processes of an
/// instance for a moment when it shuts down. That one goes on or is killed; nsenter, out here, would stay as it is for
/// ever, and with it the instance: its end waits until nsenter has taken notice of the program's.
fn keep_going(child: &Child) -> Option<impl FnOnce() + Send + use<>> {
    let process = Pid::from_raw(i32::try_from(child.id()).ok()?);
    Some(move || {
        // Its end is looked at and left to who waits for its output.
        let changes = WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        loop {
            match waitid(Id::Pid(process), changes) {
                Ok(WaitStatus::Stopped(..)) => _ = kill(process, Signal::SIGCONT),
                Err(Errno::EINTR) => {}
                _ => return,
            }
        }
    })
}

/// Runs a program that has to succeed; gives its standard output.
///
/// # Errors
/// When it can't be started or fails, with the last lines of its output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments);
    let output = capture(&mut command, b"")?;
    if output.success() {
        return Ok(output.stdout);
    }
    Err(failure(line(&command), &output))
}

/// The error for a program that failed.
pub(crate) fn failure(command: String, output: &Output) -> Error {
    let said = if output.stderr.trim().is_empty() {
        &output.stdout
    } else {
        &output.stderr
    };
    Error::Command {
        command,
        status: output
            .code
            .map_or("ended by a signal".into(), |code| format!("exit code {code}")),
        output: tail(said, 12),
    }
}

/// The last lines of a text.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.trim_end().lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_program_is_named_with_what_it_said() {
        let error = run("sh", &["-c", "echo why >&2; exit 3"])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("sh -c") && error.contains("exit code 3") && error.ends_with("\n  why"),
            "{error}"
        );
        let error = run("no-such-program", &[]).unwrap_err().to_string();
        assert!(error.contains("no-such-program"), "{error}");
    }

    #[test]
    fn one_that_is_stopped_goes_on() {
        let script = "kill -STOP $$; echo once; kill -STOP $$; echo twice; exit 5";
        let output = capture(Command::new("sh").args(["-c", script]), b"").unwrap();
        assert_eq!((output.code, output.stdout.as_str()), (Some(5), "once\ntwice\n"));
    }

    #[test]
    fn input_and_code_pass_through() {
        let output = capture(Command::new("sh").args(["-c", "cat; exit 4"]), b"hello").unwrap();
        assert_eq!((output.code, output.stdout.as_str()), (Some(4), "hello"));
    }
}
