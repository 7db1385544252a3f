//! Documents that somebody writes: the spec, the settings, messages of the control socket, requests over
//! HTTPS.
//!
//! May not live here: keys.

use http::{HeaderMap, HeaderValue, Uri, header};
use portcullis::config::Settings;
use portcullis::config::report::CREDENTIAL;
use portcullis::health::extract::read;
use portcullis_protocol::control::{Answer, Request};
use portcullis_protocol::{AuthorizedKey, FirewallRule, Spec};

use crate::parts;

/// What is accepted means the same once it is written and read again, and no secret is left where none may be.
pub fn spec(data: &[u8]) -> bool {
    let spec = match Spec::from_json(data) {
        Ok(spec) => spec,
        Err(error) => {
            assert!(!error.problems.is_empty());
            for problem in &error.problems {
                assert!(!problem.reason.is_empty(), "{error}");
            }
            return false;
        }
    };
    assert!(spec.generation.get() > 0);
    let written = spec.to_json();
    assert_eq!(Spec::from_json(&written).as_ref(), Ok(&spec));
    let bare = spec.without_secrets();
    if let Some(control) = &bare.control_plane {
        assert!(control.enrolment_token.is_none() && control.external_id.is_none());
    }
    assert_eq!(Spec::from_json(&bare.to_json()).as_ref(), Ok(&bare));
    let mut again = bare;
    again.keep_secrets_of(&spec);
    assert_eq!(again, spec);
    true
}

/// A file's settings hold whole or not at all, and hold the same when they are read once more.
pub fn settings(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else {
        return false;
    };
    let before = Settings::default();
    let mut settings = before.clone();
    if let Err(reason) = settings.apply(text) {
        assert!(!reason.is_empty());
        assert_eq!(settings, before);
        return false;
    }
    let once = settings.clone();
    assert_eq!(settings.apply(text), Ok(()));
    assert_eq!(settings, once);
    assert!(settings.state_dir.is_absolute() && settings.socket.is_absolute());
    let spec = settings.spec_file.to_str().unwrap();
    match spec.strip_prefix(CREDENTIAL) {
        Some(name) => assert!(!name.is_empty() && !name.contains('/'), "{name:?}"),
        None => assert!(settings.spec_file.is_absolute(), "{spec:?}"),
    }
    assert_ne!(settings.listen.port(), 0);
    assert!(settings.min_rsa_bits >= portcullis_protocol::key::MIN_RSA_BITS);
    assert!(settings.links.uplinks.is_disjoint(&settings.links.trusted));
    true
}

/// A message is the same after a way over the socket, and stays on its line.
pub fn control(data: &[u8]) -> bool {
    let request = serde_json::from_slice::<Request>(data).ok();
    if let Some(request) = &request {
        let line = serde_json::to_vec(request).unwrap();
        assert!(!line.contains(&b'\n'));
        assert_eq!(
            serde_json::from_slice::<Request>(&line).as_ref().ok(),
            Some(request)
        );
        if let Request::Apply { spec, .. } = request {
            assert!(spec.check().is_ok());
        }
    }
    let answer = serde_json::from_slice::<Answer>(data).ok();
    if let Some(answer) = &answer {
        let line = serde_json::to_vec(answer).unwrap();
        assert!(!line.contains(&b'\n'));
        assert_eq!(
            serde_json::from_slice::<Answer>(&line).as_ref().ok(),
            Some(answer)
        );
    }
    request.is_some() || answer.is_some()
}

/// `If-Match`, the query and the body of a request: read, or refused by a problem that names no byte of it
/// unescaped.
pub fn http(data: &[u8]) -> bool {
    let parts = parts(data);
    let [tag, query, body] = parts[..] else {
        return false;
    };
    let mut headers = HeaderMap::new();
    if let Ok(tag) = HeaderValue::from_bytes(tag) {
        headers.insert(header::IF_MATCH, tag);
    }
    let Ok(uri) = [b"/x?", query].concat().try_into() else {
        return false;
    };
    let uri: Uri = uri;
    let refused = [
        read::<Spec>(&headers, &uri, body).err(),
        read::<FirewallRule>(&headers, &uri, body).err(),
        read::<AuthorizedKey>(&headers, &uri, body).err(),
    ];
    for response in refused.iter().flatten() {
        assert!([400, 422].contains(&response.status().as_u16()), "{response:?}");
        let kind = response.headers().get(header::CONTENT_TYPE).unwrap();
        assert_eq!(kind, "application/problem+json");
    }
    refused.iter().any(Option::is_none)
}
