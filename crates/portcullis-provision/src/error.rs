//! The library's error: what failed, on which file or command, and what to do about it.
//!
//! May not live here: secrets. Whatever goes into a message may end up in a log.

use std::io;
use std::path::{Path, PathBuf};

use crate::client::ClientError;

/// Result of this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The caller asked for something that can't be (exit code 2). The text names the value or field.
    #[error("{0}")]
    BadInput(String),
    /// The caller may not (exit code 3).
    #[error("{0}")]
    NotPermitted(String),
    /// A file operation failed.
    #[error("can't {action} {}: {source}", path.display())]
    File {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A program ended with a failure.
    #[error("`{command}` failed ({status}){}", indented(output))]
    Command {
        /// The command line; never holds a secret.
        command: String,
        /// How it ended.
        status: String,
        /// The last lines of its output.
        output: String,
    },
    /// An instance did not become ready in time.
    #[error("{name} is not ready after {waited_s} s:{}", indented(&reasons.join("\n")))]
    NotReady {
        /// Which instance.
        name: String,
        /// How long it was waited for, in seconds.
        waited_s: u64,
        /// What still fails, each with its remedy.
        reasons: Vec<String>,
    },
    /// The agent could not be asked.
    #[error("{name}: {source}")]
    Agent {
        /// Which instance.
        name: String,
        /// Why.
        source: ClientError,
    },
    /// Anything else; the text says what and what to do.
    #[error("{0}")]
    Failed(String),
}

impl Error {
    /// The exit code of the contract: 1 failed, 2 bad input, 3 not permitted.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::BadInput(_) => 2,
            Self::NotPermitted(_) => 3,
            Self::Agent {
                source: ClientError::Status { status, code, .. },
                ..
            } => of_status(*status, code.as_deref()),
            _ => 1,
        }
    }

    /// For `map_err` on a file operation.
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }
}

/// The exit code for what the agent answered: the same as its own commands have. `superseded` is a conflict
/// with what holds now, and not the caller's mistake.
fn of_status(status: u16, code: Option<&str>) -> u8 {
    match status {
        401 | 403 => 3,
        400 | 404 | 413 | 422 => 2,
        409 if code != Some("superseded") => 2,
        _ => 1,
    }
}

/// The text on lines of its own, each indented; empty for an empty text.
fn indented(text: &str) -> String {
    text.trim_end()
        .lines()
        .fold(String::new(), |all, line| all + "\n  " + line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_agent_answers_has_an_exit_code() {
        for (status, code, exit) in [
            (403, None, 3),
            (404, Some("not-found"), 2),
            (409, Some("dangerous"), 2),
            (409, Some("superseded"), 1),
            (412, Some("other-generation"), 1),
            (422, None, 2),
            (500, Some("failed"), 1),
            (503, None, 1),
        ] {
            assert_eq!(of_status(status, code), exit, "{status} {code:?}");
        }
    }

    #[test]
    fn a_failed_command_shows_its_output_indented() {
        let error = Error::Command {
            command: "ip netns add x".into(),
            status: "exit status: 1".into(),
            output: "a\nb\n".into(),
        };
        assert_eq!(
            error.to_string(),
            "`ip netns add x` failed (exit status: 1)\n  a\n  b"
        );
        assert_eq!(error.exit_code(), 1);
    }
}
