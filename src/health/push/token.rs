//! Tokens that end: kept while they last, and renewed before.
//!
//! May not live here: where they come from.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use portcullis_protocol::Secret;
use reqwest::header::HeaderValue;
use serde::Deserialize;
use tokio::time::Instant;

/// Largest value of an `Authorization` header: servers commonly take 8 KiB for all headers.
const MAX_VALUE: usize = 7 << 10;
/// A token that says nothing of its life is used for this long.
pub const UNKNOWN_LIFE: Duration = Duration::from_secs(300);
/// The longest that a token is believed to last.
const MAX_LIFE: Duration = Duration::from_secs(24 * 3600);

/// What goes into the `Authorization` header, and how long it holds. Times are those of the monotonic clock:
/// the wall clock may be wrong, and be set.
pub struct Token {
    value: HeaderValue,
    renew: Instant,
    ends: Instant,
}

impl Token {
    /// A token of a scheme (RFC 9110, 11.4). It is renewed when 80 % of its life is over.
    ///
    /// # Errors
    /// When it has bytes that no token has (RFC 9110, `token68`), or is too large.
    pub fn new(scheme: &str, token: &Secret, life: Duration) -> Result<Self, String> {
        let life = life.min(MAX_LIFE);
        let now = Instant::now();
        Ok(Self {
            value: authorization(scheme, token)?,
            renew: now + life.mul_f64(0.8),
            ends: now + life,
        })
    }

    /// Whether it is time for another one.
    pub fn is_due(&self, now: Instant) -> bool {
        now >= self.renew
    }

    /// Whether it still holds.
    pub fn holds(&self, now: Instant) -> bool {
        now < self.ends
    }

    /// The header's value.
    pub fn value(&self) -> HeaderValue {
        self.value.clone()
    }
}

/// The header's value for a token.
///
/// # Errors
/// As [`Token::new`].
pub fn authorization(scheme: &str, token: &Secret) -> Result<HeaderValue, String> {
    let token = token.expose();
    if token.is_empty()
        || !token
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._~+/=".contains(&b))
    {
        return Err("the token is empty or has bytes that no token has".to_owned());
    }
    if token.len() > MAX_VALUE {
        return Err(format!("the token is larger than {MAX_VALUE} bytes"));
    }
    let text = zeroize::Zeroizing::new(format!("{scheme} {token}"));
    let mut value = HeaderValue::from_str(&text).map_err(|e| e.to_string())?;
    value.set_sensitive(true);
    Ok(value)
}

/// How long a JWT lasts by its own word, `exp` less `iat`: a difference, so that no clock matters. Its
/// signature is for the receiver to check.
pub fn jwt_life(token: &str) -> Option<Duration> {
    #[derive(Deserialize)]
    struct Claims {
        exp: u64,
        iat: u64,
    }
    let claims = token.split('.').nth(1)?;
    let claims: Claims = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()?;
    Some(Duration::from_secs(claims.exp.checked_sub(claims.iat)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_renewed_before_it_ends() {
        let before = Instant::now();
        let token = Token::new("Bearer", &Secret::new("abc"), Duration::from_secs(1000)).unwrap();
        let made = |seconds| before + Duration::from_secs(seconds);
        assert!(!token.is_due(made(799)) && token.holds(made(799)));
        // Two minutes in between are enough for the slowest machine.
        assert!(token.is_due(made(920)) && token.holds(made(920)));
        assert!(token.is_due(made(1120)) && !token.holds(made(1120)));
    }

    #[test]
    fn what_is_no_token_is_refused_and_none_is_shown() {
        for bad in ["", "a b", "a\r\nx: y", "é", &"a".repeat(8 << 10)] {
            assert!(authorization("Bearer", &Secret::new(bad)).is_err(), "{bad:?}");
        }
        let value = authorization("Bearer", &Secret::new("a-._~+/=9")).unwrap();
        assert_eq!(value, "Bearer a-._~+/=9");
        assert_eq!(format!("{value:?}"), "Sensitive");
    }

    #[test]
    fn a_jwts_life_is_a_difference() {
        let token = |claims: &str| format!("e30.{}.sig", URL_SAFE_NO_PAD.encode(claims));
        assert_eq!(
            jwt_life(&token(r#"{"iat":100,"exp":3700}"#)),
            Some(Duration::from_secs(3600))
        );
        for bad in [r#"{"iat":100,"exp":99}"#, r#"{"exp":99}"#, "x"] {
            assert_eq!(jwt_life(&token(bad)), None, "{bad}");
        }
        assert_eq!(jwt_life("abc"), None);
    }
}
