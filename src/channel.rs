//! What the two processes tell each other: the agent, which is root, and the front, which speaks to the
//! network and is nobody. One JSON document a line, of bounded length.
//!
//! May not live here: who may be at the other end, what a message does (`agent::front`, `health::link`).

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use portcullis_protocol::control::{Answer, MAX_LINE, Request};
use portcullis_protocol::{Report, Secret};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt};
use zeroize::{Zeroize, Zeroizing};

use crate::config::LimitSettings;
use crate::health::enrol::Errand;
use crate::health::push::offer::{Offer, Said};
use crate::identity::time::KnownTime;

/// The front's user. systemd-sysusers makes it (`systemd/portcullis.sysusers`).
pub const FRONT_USER: &str = "portcullis";
/// The socket's name, beside the control socket.
pub const SOCKET_NAME: &str = "front.sock";
/// Most certificates that a caller may show.
pub const MAX_CHAIN: usize = 8;
/// Most bytes of them together. TLS allows 16 MB; a certificate has 1 or 2 kB.
pub const MAX_CHAIN_BYTES: usize = 64 << 10;
/// Longest line from the front, in bytes: a request with a spec, and a chain as numbers (`255,`).
pub const MAX_FROM_FRONT: usize = MAX_LINE + 4 * MAX_CHAIN_BYTES + 4096;
/// Longest line to the front, in bytes: a report of very many keys, and it once more as the text of a change. It
/// comes from root: a limit against mistakes.
pub const MAX_TO_FRONT: usize = 64 << 20;
/// What a reader keeps between lines.
const KEPT: usize = 16 << 10;

/// A caller over HTTPS, as far as TLS proved it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Remote {
    /// When its connection came, as time since boot.
    pub since: Duration,
    /// Where it came from.
    pub address: SocketAddr,
    /// The caller's certificate and those that it sent with it, DER; none for anybody. TLS proved that the
    /// caller has the first one's key.
    pub chain: Vec<Vec<u8>>,
}

/// How the endpoint is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// Where it listens.
    pub listen: SocketAddr,
    /// How much callers may take of it.
    pub limits: LimitSettings,
    /// The TLS key, PKCS#8 in PEM. The front has it in memory alone.
    pub key: Secret,
    /// The certificate and those between it and its authority, PEM.
    pub certificates: String,
    /// Whose certificates callers may show, PEM; none: nobody's.
    pub client_ca: Option<String>,
    /// What is known of the time, by which their dates are judged.
    pub time: KnownTime,
}

/// From the agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToFront {
    /// How the endpoint is to be from now on.
    Setup(Arc<Setup>),
    /// The last report.
    Report(Arc<Report>),
    /// What is to be pushed. The newest report goes by itself, and before.
    Offer(Offer),
    /// What is to be carried to the control plane; nothing any more.
    Errand(Option<Errand>),
    /// What was asked is answered.
    Answer {
        /// The call's number.
        id: u64,
        /// The answer.
        answer: Answer,
    },
}

/// From the front. None of it is believed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum FromFront {
    /// A caller asks.
    Call {
        /// A number of the front's choice, for the answer.
        id: u64,
        /// What is asked.
        request: Request,
        /// Who asks.
        remote: Remote,
    },
    /// How pushing goes.
    Said(Said),
    /// The endpoint listens, or can't.
    Listening {
        /// Why it can't.
        error: Option<String>,
    },
}

/// The socket that belongs to a control socket.
pub fn socket(control: &Path) -> std::path::PathBuf {
    control.with_file_name(SOCKET_NAME)
}

/// A message as one line. It is wiped after use: it may hold the TLS key.
///
/// # Errors
/// When the message can't be written as JSON.
pub fn line<T: Serialize>(message: &T) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut line = Zeroizing::new(Vec::with_capacity(KEPT));
    serde_json::to_writer(&mut *line, message).map_err(io::Error::other)?;
    line.push(b'\n');
    Ok(line)
}

/// Messages from the other end, one by one.
pub struct Lines<R> {
    source: R,
    /// What was read and not handed on. Wiped after each message: no buffer keeps its rest.
    read: Zeroizing<Vec<u8>>,
    /// How much of it holds no end of a line.
    looked_at: usize,
    most: usize,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    /// Lines of at most that many bytes, without their ends.
    pub fn new(source: R, most: usize) -> Self {
        Self {
            source,
            read: Zeroizing::new(Vec::with_capacity(KEPT)),
            looked_at: 0,
            most,
        }
    }

    /// The next message; `None` at the end. A wait that is given up loses nothing.
    ///
    /// # Errors
    /// When the line is too long, broken off, or no message. Nothing after it is to be read then.
    pub async fn next<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
        loop {
            let end = self.read[self.looked_at..].iter().position(|byte| *byte == b'\n');
            let length = end.map_or(self.read.len(), |end| self.looked_at + end);
            if length > self.most {
                return Err(invalid(format!("a message has more than {} bytes", self.most)));
            }
            if end.is_some() {
                let message = serde_json::from_slice(&self.read[..length]);
                self.forget(length + 1);
                return message.map(Some).map_err(|e| invalid(e.to_string()));
            }
            self.looked_at = length;
            self.make_room();
            // Little at once: what comes after a message is moved.
            let mut some = (&mut self.source).take(KEPT as u64);
            if some.read_buf(&mut *self.read).await? == 0 {
                return match self.read.is_empty() {
                    true => Ok(None),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
        }
    }

    /// Room for more. A vector that grows by itself would leave its old place as it was.
    fn make_room(&mut self) {
        if self.read.len() == self.read.capacity() {
            self.replace(self.read.len() * 2, 0);
        }
    }

    /// Wipes a message, and keeps what came after it.
    fn forget(&mut self, length: usize) {
        self.looked_at = 0;
        if self.read.len() == length && self.read.capacity() <= KEPT {
            self.read.zeroize();
        } else {
            self.replace(self.read.len() - length, length);
        }
    }

    /// Moves what is there, but for its beginning, to a place with that much room; the old place is wiped.
    fn replace(&mut self, room: usize, from: usize) {
        let mut read = Zeroizing::new(Vec::with_capacity(room.max(KEPT)));
        read.extend_from_slice(&self.read[from..]);
        self.read = read;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8], most: usize) -> Vec<Result<FromFront, io::ErrorKind>> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut lines = Lines::new(bytes, most);
            let mut read = Vec::new();
            loop {
                match lines.next().await {
                    Ok(Some(message)) => read.push(Ok(message)),
                    Ok(None) => return read,
                    Err(error) => {
                        read.push(Err(error.kind()));
                        return read;
                    }
                }
            }
        })
    }

    fn call() -> FromFront {
        FromFront::Call {
            id: 7,
            request: Request::Status,
            remote: Remote {
                since: Duration::from_millis(1500),
                address: "[2001:db8::1]:4711".parse().unwrap(),
                chain: vec![vec![0, 255, 17]],
            },
        }
    }

    #[test]
    fn messages_come_over_as_they_were_sent() {
        let listening = FromFront::Listening {
            error: Some("in use\n".to_owned()),
        };
        let mut bytes = line(&call()).unwrap().to_vec();
        bytes.extend_from_slice(&line(&listening).unwrap());
        assert_eq!(read(&bytes, 1000), [Ok(call()), Ok(listening)]);
    }

    #[test]
    fn what_is_no_message_ends_the_channel() {
        let whole = line(&call()).unwrap().to_vec();
        let length = whole.len();
        assert_eq!(read(&whole, length - 1), [Ok(call())], "as long as it may be");
        assert_eq!(read(&whole, length - 2), [Err(io::ErrorKind::InvalidData)]);
        assert_eq!(
            read(&whole[..length - 1], 1000),
            [Err(io::ErrorKind::UnexpectedEof)]
        );
        let text = String::from_utf8(whole).unwrap();
        for (what, with) in [
            ("\"id\":7", "\"id\":-7"),
            ("\"id\":7", "\"id\":7,\"uid\":0"),
            ("\"status\"", "\"shell\""),
            ("\"since\"", "\"root\":true,\"since\""),
            ("255", "256"),
            ("call", "local-call"),
        ] {
            assert!(text.contains(what), "{what} {text}");
            let bad = text.replacen(what, with, 1);
            assert_eq!(
                read(bad.as_bytes(), 1000),
                [Err(io::ErrorKind::InvalidData)],
                "{bad}"
            );
        }
    }

    #[test]
    fn a_longest_chain_with_a_longest_spec_fits() {
        let chain = serde_json::to_string(&vec![vec![255u8; MAX_CHAIN_BYTES / MAX_CHAIN]; MAX_CHAIN]);
        assert!(chain.unwrap().len() + MAX_LINE + 500 < MAX_FROM_FRONT);
    }

    proptest::proptest! {
        #[test]
        fn nothing_from_the_other_end_panics(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400)) {
            read(&bytes, 100);
        }

        #[test]
        fn a_message_with_changed_bytes_is_another_or_none(at in 0usize..100, byte: u8) {
            let mut bytes = line(&call()).unwrap().to_vec();
            let at = at % bytes.len();
            bytes[at] = byte;
            read(&bytes, 1000);
        }
    }
}
