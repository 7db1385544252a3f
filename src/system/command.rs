//! Asking another program something: a clean environment, no input, an end in sight.
//!
//! May not live here: what the answer means.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

/// How long a program may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Runs a program to its end, whatever its status. It is killed if it takes longer than 5 s, or if
/// nobody waits any more.
///
/// # Errors
/// It could not be started, or did not end in time.
pub async fn ask<A: AsRef<OsStr>>(
    program: &Path,
    arguments: impl IntoIterator<Item = A>,
) -> Result<Output, String> {
    ask_within(TIMEOUT, program, arguments).await
}

/// As [`ask`], with another limit.
///
/// # Errors
/// As [`ask`].
pub async fn ask_within<A: AsRef<OsStr>>(
    limit: Duration,
    program: &Path,
    arguments: impl IntoIterator<Item = A>,
) -> Result<Output, String> {
    let output = Command::new(program)
        .args(arguments)
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    match timeout(limit, output).await {
        Ok(Ok(output)) => Ok(output),
        Ok(Err(error)) => Err(format!("can't run {}: {error}", program.display())),
        Err(_) => Err(format!(
            "{} did not end within {} s",
            program.display(),
            limit.as_secs()
        )),
    }
}

/// What a program said, fit for one line of a report: its error output, else its output.
pub fn said(output: &Output) -> String {
    let text = if output.stderr.is_empty() {
        &output.stdout
    } else {
        &output.stderr
    };
    let text = String::from_utf8_lossy(text);
    text.trim()
        .chars()
        .take(400)
        .flat_map(char::escape_debug)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_program_is_asked_without_our_environment() {
        let output = ask(Path::new("/usr/bin/env"), [""; 0]).await.unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(text.lines().count(), 2, "{text}");

        let output = ask(Path::new("/bin/sh"), ["-c", "echo 'a\nb' >&2; exit 3"])
            .await
            .unwrap();
        assert_eq!(
            (output.status.code(), said(&output)),
            (Some(3), "a\\nb".to_owned())
        );

        let error = ask(Path::new("/no/such"), [""; 0]).await.unwrap_err();
        assert!(error.starts_with("can't run /no/such"), "{error}");
    }
}
