//! Asking what only the superuser's programs can tell: `dmsetup table`, `zfs get`, `zpool list`.
//!
//! The kernel gives tables of the device mapper to who has `CAP_SYS_ADMIN` and opens a device node. The daemon has
//! neither, so it asks a unit that has these and nothing else: systemd starts it for each connection. May not live
//! here: reading the answers.

use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::thread::{CapabilitySet, capabilities};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::Questions;
use crate::policy::storage::answers::{Answers, ZFS_PROPERTIES};
use crate::system::command;

/// Where `portcullis-storage.socket` listens.
const SOCKET: &str = "/run/portcullis-storage.sock";
/// How long the unit may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes of an answer: tables of a thousand devices.
const MAX_ANSWER: u64 = 4 << 20;

/// Asks directly where this process may, else through the unit.
pub async fn ask(questions: Questions) -> Answers {
    let may = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN));
    match may {
        true => ask_programs(questions).await,
        false => ask_unit(Path::new(SOCKET)).await,
    }
}

/// Asks the unit behind this socket.
pub async fn ask_unit(socket: &Path) -> Answers {
    let read = async {
        let mut text = Vec::new();
        let stream = UnixStream::connect(socket).await?;
        stream.take(MAX_ANSWER).read_to_end(&mut text).await?;
        io::Result::Ok(text)
    };
    let why = match timeout(TIMEOUT, read).await {
        Ok(Ok(text)) if text.is_empty() => "it says nothing".to_owned(),
        Ok(Ok(text)) => return Answers::read(&String::from_utf8_lossy(&text)),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {} s", TIMEOUT.as_secs()),
    };
    Answers::none(format!("portcullis-storage.socket: {why}"))
}

async fn ask_programs(questions: Questions) -> Answers {
    let zfs: [&[&str]; 2] = [
        &[
            "zfs",
            "get",
            "-H",
            "-t",
            "filesystem",
            "-o",
            "name,property,value",
            ZFS_PROPERTIES,
        ],
        &["zpool", "list", "-v", "-H", "-P"],
    ];
    let tables: [&[&str]; 1] = [&["dmsetup", "--manglename", "none", "table"]];
    let tables = tables.iter().filter(|_| questions.tables);
    let commands = tables.chain(zfs.iter().filter(|_| questions.zfs));
    let mut text = String::new();
    let mut problem = None;
    for command in commands {
        let Some((program, arguments)) = command.split_first() else {
            continue;
        };
        match command::ask(Path::new(program), arguments).await {
            Ok(output) if output.status.success() => text += &String::from_utf8_lossy(&output.stdout),
            Ok(output) => problem = Some(format!("{program}: {}", command::said(&output))),
            Err(reason) => problem = Some(reason),
        }
    }
    let mut answers = Answers::read(&text);
    answers.problem = problem.or(answers.problem);
    answers
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixListener;

    #[tokio::test]
    async fn a_unit_is_asked_and_one_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let none = ask_unit(&socket).await;
        let problem = none.problem.unwrap();
        assert!(
            problem.starts_with("portcullis-storage.socket: No such file"),
            "{problem}"
        );

        let listener = UnixListener::bind(&socket).unwrap();
        let answer = async |text: &str| {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(text.as_bytes()).await.unwrap();
        };
        let (answers, ()) = tokio::join!(ask_unit(&socket), answer("vg-root: 0 8 linear 254:1 2048\n"));
        assert_eq!(answers.problem, None);
        assert_eq!(answers.tables.len(), 1);
        let (answers, ()) = tokio::join!(ask_unit(&socket), answer(""));
        assert_eq!(
            answers.problem.unwrap(),
            "portcullis-storage.socket: it says nothing"
        );
    }
}
