//! A service account: an assertion signed with its key (JWT, RFC 7519, RS256), exchanged for a short-lived
//! token (RFC 8693).
//!
//! May not live here: reading the key's file.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use portcullis_protocol::Secret;
use reqwest::Client;
use reqwest::header::CONTENT_TYPE;
use rustls::SignatureScheme;
use rustls::crypto::ring::sign::any_supported_type;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::client::{bounded_body, describe};
use super::offer::ServiceKey;
use super::token::{Token, UNKNOWN_LIFE};

/// How long an assertion may be used, in seconds: it is sent at once.
const ASSERTION_LIFE: u64 = 300;
/// Largest answer of a token endpoint.
const MAX_ANSWER: usize = 64 << 10;

#[derive(Serialize)]
struct Header<'a> {
    alg: &'a str,
    typ: &'a str,
    kid: &'a str,
}

#[derive(Serialize)]
struct Claims<'a> {
    iss: &'a str,
    sub: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    aud: Option<&'a str>,
    iat: u64,
    exp: u64,
}

/// The assertion: who we are, signed, for [`ASSERTION_LIFE`].
///
/// # Errors
/// When the key is no RSA key of 2048 bits or more that can be used.
pub fn assertion(key: &ServiceKey, audience: Option<&str>, now: SystemTime) -> Result<Secret, String> {
    let der = PrivateKeyDer::from_pem_slice(key.private_key.expose().as_bytes())
        .map_err(|e| format!("the service account's private key is no PEM key: {e:?}"))?;
    let signing = any_supported_type(&der)
        .map_err(|e| format!("the service account's private key can't be used: {e}"))?;
    let signer = signing
        .choose_scheme(&[SignatureScheme::RSA_PKCS1_SHA256])
        .ok_or("the service account's private key is not an RSA key")?;
    let issued = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let header = Header {
        alg: "RS256",
        typ: "JWT",
        kid: &key.id,
    };
    let claims = Claims {
        iss: &key.issuer,
        sub: &key.subject,
        aud: audience,
        iat: issued,
        exp: issued + ASSERTION_LIFE,
    };
    let part = |json: serde_json::Result<Vec<u8>>| {
        let json = json.map_err(|e| e.to_string())?;
        Ok::<_, String>(URL_SAFE_NO_PAD.encode(json))
    };
    let signed = format!(
        "{}.{}",
        part(serde_json::to_vec(&header))?,
        part(serde_json::to_vec(&claims))?
    );
    let signature = signer.sign(signed.as_bytes()).map_err(|e| e.to_string())?;
    Ok(Secret::new(format!(
        "{signed}.{}",
        URL_SAFE_NO_PAD.encode(signature)
    )))
}

#[derive(Deserialize)]
struct Granted {
    access_token: Secret,
    token_type: Option<String>,
    expires_in: Option<u64>,
}

/// A short-lived token for the key.
///
/// # Errors
/// A reason for the operator, without secrets.
pub async fn exchange(
    client: &Client,
    key: &ServiceKey,
    token_url: &str,
    audience: Option<&str>,
) -> Result<Token, String> {
    let assertion = assertion(key, audience, SystemTime::now())?;
    let body = Zeroizing::new(
        url::form_urlencoded::Serializer::new(String::new())
            .append_pair("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange")
            .append_pair(
                "requested_token_type",
                "urn:ietf:params:oauth:token-type:access_token",
            )
            .append_pair("subject_token", assertion.expose())
            .append_pair("subject_token_type", "urn:ietf:params:oauth:token-type:jwt")
            .finish(),
    );
    let answer = client
        .post(token_url)
        .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
        .body(body.as_bytes().to_vec())
        .send()
        .await
        .map_err(|e| format!("no token for the service account: {}", describe(&e)))?;
    let status = answer.status();
    let body = Zeroizing::new(
        bounded_body(answer, MAX_ANSWER)
            .await
            .map_err(|reason| format!("no token for the service account: {token_url}: {reason}"))?,
    );
    if !status.is_success() {
        let code = error_code(&body)
            .map(|code| format!(" ({code})"))
            .unwrap_or_default();
        return Err(format!(
            "no token for the service account: {token_url} answered {status}{code}"
        ));
    }
    // serde's error may quote what it read.
    let granted: Granted = serde_json::from_slice(&body)
        .map_err(|_| format!("no token for the service account: {token_url}: its answer is no token"))?;
    if granted
        .token_type
        .is_some_and(|kind| !kind.eq_ignore_ascii_case("bearer"))
    {
        return Err(format!(
            "no token for the service account: {token_url} gives no bearer token"
        ));
    }
    let life = granted.expires_in.map_or(UNKNOWN_LIFE, Duration::from_secs);
    Token::new("Bearer", &granted.access_token, life)
        .map_err(|reason| format!("no token for the service account: {token_url}: {reason}"))
}

/// The code of an OAuth error (RFC 6749, 5.2), if it is one: text from outside is not repeated.
fn error_code(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Refused {
        error: String,
    }
    let refused: Refused = serde_json::from_slice(body).ok()?;
    let plain = |b: u8| b.is_ascii_lowercase() || b == b'_';
    ((1..=40).contains(&refused.error.len()) && refused.error.bytes().all(plain)).then_some(refused.error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_rsa_key_signs_and_no_error_shows_the_key() {
        let key = |pem: &str| ServiceKey {
            id: "k".into(),
            issuer: "i".into(),
            subject: "s".into(),
            private_key: Secret::new(pem),
        };
        let curve = rcgen::KeyPair::generate().unwrap().serialize_pem();
        for (pem, expected) in [
            (curve.as_str(), "not an RSA key"),
            ("hunter2", "no PEM key"),
            (
                "-----BEGIN PRIVATE KEY-----\naHVudGVyMg==\n-----END PRIVATE KEY-----\n",
                "can't be used",
            ),
        ] {
            let error = assertion(&key(pem), None, UNIX_EPOCH).unwrap_err();
            assert!(error.contains(expected) && !error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn an_oauth_error_is_told_by_its_code_alone() {
        let code = |body: &str| error_code(body.as_bytes());
        assert_eq!(
            code(r#"{"error":"invalid_grant","error_description":"x"}"#).as_deref(),
            Some("invalid_grant")
        );
        assert_eq!(code(r#"{"error":"a\nb"}"#), None);
        assert_eq!(code("<html>"), None);
    }
}
