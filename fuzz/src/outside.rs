//! What others than callers tell over the network: certificates, and the answers of receivers and of platforms'
//! metadata services.
//!
//! May not live here: what callers ask (`documents`), what the front tells (`channel`).

use std::time::{Duration, SystemTime};

use portcullis::health::push::patience::{MAX_RETRY_AFTER, retry_after};
use portcullis::health::push::token::{Token, jwt_life};
use portcullis::identity::caller;
use portcullis::identity::certificate::beginnings;
use portcullis_protocol::Secret;

use crate::parts;

/// A stranger's certificate, DER, or a chain in PEM: what is told of it is on one line and short. Nobody has vouched
/// for it by then.
pub fn certificate(data: &[u8]) -> bool {
    let chain = std::str::from_utf8(data).map(beginnings).unwrap_or_default();
    // A certificate in PEM has its two markers.
    assert!(chain.len() <= data.len() / 50);
    let Ok(read) = caller::read(data) else {
        return !chain.is_empty();
    };
    // 200 characters, of up to 4 bytes.
    assert!(read.subject.len() <= 800, "{}", read.subject);
    assert!(!read.subject.contains(char::is_control), "{:?}", read.subject);
    assert!(read.serial.len() <= 3 * data.len());
    let uris: usize = read.uris.iter().map(String::len).sum();
    assert!(uris <= data.len());
    true
}

const TOO_LARGE: &str = match str::from_utf8(&[b'a'; 1 << 16]) {
    Ok(token) => token,
    Err(_) => "",
};

/// `Retry-After` and `Date` of a receiver: waiting is bounded. A token of a metadata service: it fits a header
/// without another line in it, is not shown, and its life is bounded.
pub fn answers(data: &[u8]) -> bool {
    let parts = parts(data);
    let [after, date, token] = parts[..] else {
        return false;
    };
    let (Ok(after), Ok(token)) = (std::str::from_utf8(after), std::str::from_utf8(token)) else {
        return false;
    };
    let date = std::str::from_utf8(date).ok();
    let wait = retry_after(after, date, SystemTime::UNIX_EPOCH);
    assert!(wait.is_none_or(|wait| wait <= MAX_RETRY_AFTER), "{wait:?}");
    let life = jwt_life(token);
    let made = Token::new("Bearer", &Secret::new(token), life.unwrap_or(Duration::MAX));
    match &made {
        Ok(made) => {
            let value = made.value();
            assert!(value.is_sensitive());
            assert_eq!(value.as_bytes(), format!("Bearer {token}").as_bytes());
            assert!(value.as_bytes().iter().all(u8::is_ascii_graphic) || value.as_bytes()[6] == b' ');
            let lines = value.as_bytes().iter().filter(|byte| byte.is_ascii_control());
            assert_eq!(lines.count(), 0);
        }
        // It says of this token what it says of any.
        Err(reason) => {
            let of_others =
                ["", TOO_LARGE].map(|token| Token::new("Bearer", &Secret::new(token), Duration::MAX).err());
            assert!(of_others.contains(&Some(reason.clone())), "{reason}");
        }
    }
    wait.is_some() && life.is_some() && made.is_ok()
}
