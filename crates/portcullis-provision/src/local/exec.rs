//! Running programs: here, and inside an instance.
//!
//! May not live here: a shell line made of parts from outside. Arguments are passed one by one.

use std::io::Write as _;
use std::process::{Command, Stdio};

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
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not read its input is not an error of ours.
        let _ = stdin.write_all(input);
    }
    let output = child.wait_with_output().map_err(failed)?;
    Ok(Output {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
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
    fn input_and_code_pass_through() {
        let output = capture(Command::new("sh").args(["-c", "cat; exit 4"]), b"hello").unwrap();
        assert_eq!((output.code, output.stdout.as_str()), (Some(4), "hello"));
    }
}
