//! The algorithms that an SSH server offers, read from its side of a connection: SSH_MSG_KEXINIT, which
//! comes in clear (RFC 4253 section 7.1).
//!
//! May not live here: which of them are good (`policy::ssh_algorithms`).

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, ReadBuf};

use crate::policy::observation::{Algorithms, Observed};

/// Message numbers (RFC 4253 section 12).
const IGNORE: u8 = 2;
const DEBUG: u8 = 4;
const KEXINIT: u8 = 20;

/// A cookie comes before the lists, in bytes.
const COOKIE: usize = 16;

/// Most bytes that are noted: the largest packet that everybody has to take (RFC 4253 section 6.1).
const MAX_NOTED: usize = 35_000;

/// What was read from a server so far, up to the size of a packet.
pub type Noted = Arc<Mutex<Vec<u8>>>;

/// A reader that notes what went through it.
pub struct Tee<R> {
    inner: R,
    noted: Noted,
}

impl<R> Tee<R> {
    /// Reads from `inner`; what comes is found in the second value too.
    pub fn new(inner: R) -> (Self, Noted) {
        let noted = Noted::default();
        let tee = Self {
            inner,
            noted: noted.clone(),
        };
        (tee, noted)
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for Tee<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let done = Pin::new(&mut self.inner).poll_read(context, buffer);
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        let room = MAX_NOTED - noted.len();
        noted.extend(buffer.filled()[before..].iter().take(room));
        done
    }
}

/// The algorithms that the packets after a server's identification offer, in its order. Names that only
/// say what the server can do besides (RFC 8308, strict key exchange) are among the key exchanges.
///
/// # Errors
/// There is no whole SSH_MSG_KEXINIT.
pub fn offered(noted: &Noted) -> Observed<Algorithms> {
    let noted = noted.lock().unwrap_or_else(PoisonError::into_inner);
    parse(&noted).ok_or_else(|| "the server's SSH_MSG_KEXINIT could not be read".to_owned())
}

fn parse(mut bytes: &[u8]) -> Option<Algorithms> {
    let payload = loop {
        let (payload, rest) = packet(bytes)?;
        match payload.split_first()? {
            (&KEXINIT, payload) => break payload,
            (&(IGNORE | DEBUG), _) => bytes = rest,
            _ => return None,
        }
    };
    let mut rest = payload.get(COOKIE..)?;
    let (kex, host_keys) = (list(&mut rest)?, list(&mut rest)?);
    let ciphers = both(list(&mut rest)?, list(&mut rest)?);
    let macs = both(list(&mut rest)?, list(&mut rest)?);
    Some(Algorithms {
        kex,
        host_keys,
        ciphers,
        macs,
    })
}

/// The payload of a packet in clear, and what comes after it (RFC 4253 section 6).
fn packet(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, bytes) = bytes.split_first_chunk()?;
    let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
    let (packet, rest) = bytes.split_at_checked(length)?;
    let (padding, padded) = packet.split_first()?;
    let payload = padded.len().checked_sub(usize::from(*padding))?;
    Some((&padded[..payload], rest))
}

/// A name-list (RFC 4251 section 5): printable US-ASCII, separated by commas.
fn list(rest: &mut &[u8]) -> Option<Vec<String>> {
    let (length, bytes) = rest.split_first_chunk()?;
    let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
    let (names, after) = bytes.split_at_checked(length)?;
    *rest = after;
    if !names.iter().all(u8::is_ascii_graphic) {
        return None;
    }
    let names = std::str::from_utf8(names).ok()?.split(',');
    Some(names.filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

/// What is offered in either direction.
fn both(mut to_server: Vec<String>, to_client: Vec<String>) -> Vec<String> {
    for name in to_client {
        if !to_server.contains(&name) {
            to_server.push(name);
        }
    }
    to_server
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(payload: &[u8]) -> Vec<u8> {
        let padding = 4;
        let length = u32::try_from(payload.len() + 1 + padding).unwrap();
        let mut packet = length.to_be_bytes().to_vec();
        packet.push(u8::try_from(padding).unwrap());
        packet.extend(payload);
        packet.extend(vec![0; padding]);
        packet
    }

    fn kexinit(lists: &[&str]) -> Vec<u8> {
        let mut payload = vec![KEXINIT];
        payload.extend([7; COOKIE]);
        for list in lists {
            payload.extend(u32::try_from(list.len()).unwrap().to_be_bytes());
            payload.extend(list.as_bytes());
        }
        payload.extend([0; 5]);
        payload
    }

    const LISTS: [&str; 10] = [
        "k1,k2", "h1", "c1,c2", "c2,c3", "m1", "m1", "none", "none", "", "",
    ];

    #[test]
    fn lists_are_read_in_their_order_and_both_directions_count() {
        let expected = Algorithms {
            kex: vec!["k1".into(), "k2".into()],
            host_keys: vec!["h1".into()],
            ciphers: vec!["c1".into(), "c2".into(), "c3".into()],
            macs: vec!["m1".into()],
        };
        let mut bytes = packed(&kexinit(&LISTS));
        assert_eq!(parse(&bytes), Some(expected.clone()));
        // What comes later does not matter, and messages without meaning may come first.
        bytes.extend(b"rest");
        let mut ignored = packed(&[IGNORE, 0, 0, 0, 0]);
        ignored.extend(&bytes);
        assert_eq!(parse(&ignored), Some(expected));
    }

    #[test]
    fn what_is_cut_off_or_something_else_is_no_answer() {
        let bytes = packed(&kexinit(&LISTS));
        for end in 0..bytes.len() {
            assert_eq!(parse(&bytes[..end]), None, "{end}");
        }
        assert_eq!(parse(&packed(&[1, 0, 0, 0, 2])), None);
        assert_eq!(parse(&packed(&kexinit(&["a b"; 10]))), None);
        assert_eq!(parse(&packed(&[])), None);
        assert_eq!(parse(&[0, 0, 0, 1, 9]), None);
    }

    proptest::proptest! {
        #[test]
        fn no_server_makes_it_panic(bytes in proptest::collection::vec(0_u8.., 0..200)) {
            let _ = parse(&bytes);
            let mut payload = vec![KEXINIT];
            payload.extend(&bytes);
            let _ = parse(&packed(&payload));
        }
    }
}
