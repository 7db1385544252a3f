//! Whatever is sent as a body, a header or a query is read or refused with a problem: tried with documents that
//! are almost right, and with noise.
//!
//! May not live here: what is refused with which words (`extract`).

use axum::extract::Query;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::IntoResponse as _;
use portcullis_protocol::{AuthorizedKey, FirewallRule, Spec};
use proptest::prelude::{Strategy, any, prop_oneof};
use proptest::sample::Index;
use serde::de::DeserializeOwned;

use super::changes::PeerBody;
use super::extract::{Conditions, ConditionsQuery, parse};
use super::routes::OPERATIONS;

/// What a document is damaged with, besides noise.
const PIECES: &[&str] = &[
    "null",
    "-1",
    "1e999",
    "0.5",
    "\"",
    "\\u0000",
    "\\ud800",
    "{",
    "[",
    "]",
    "}",
    ",",
    ":",
    "\"id\":1,",
    "[[[[[[[[",
    "true",
    "18446744073709551616",
    "\"0.0.0.0/33\"",
    "\u{feff}",
];

/// A document that is almost right, with a piece of it replaced.
fn damaged() -> impl Strategy<Value = Vec<u8>> {
    let bodies = OPERATIONS.iter().filter_map(|operation| operation.body);
    let bodies: Vec<&str> = bodies.map(|(_, example)| example).collect();
    let piece = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..20),
        proptest::sample::select(PIECES).prop_map(|piece| piece.as_bytes().to_vec()),
    ];
    (proptest::sample::select(bodies), any::<(Index, Index)>(), piece).prop_map(|(body, (at, to), piece)| {
        let (at, to) = (at.index(body.len() + 1), to.index(body.len() + 1));
        let (at, to) = (at.min(to), at.max(to));
        [&body.as_bytes()[..at], &piece, &body.as_bytes()[to..]].concat()
    })
}

fn is_read_or_refused<T: DeserializeOwned>(bytes: &[u8]) {
    if let Err(problem) = parse::<T>(bytes) {
        let response = problem.into_response();
        assert!([400, 422].contains(&response.status().as_u16()), "{response:?}");
    }
}

proptest::proptest! {
    #[test]
    fn whatever_is_sent_is_read_or_refused(bytes in prop_oneof![
        4 => damaged(),
        1 => proptest::collection::vec(any::<u8>(), 0..200),
    ]) {
        is_read_or_refused::<Spec>(&bytes);
        is_read_or_refused::<FirewallRule>(&bytes);
        is_read_or_refused::<AuthorizedKey>(&bytes);
        is_read_or_refused::<PeerBody>(&bytes);
    }

    #[test]
    fn whatever_the_header_and_query_say_is_read_or_refused(tag in r#"[ -~]{0,30}"#, query in "[!-~]{0,60}") {
        let mut headers = HeaderMap::new();
        headers.append(header::IF_MATCH, tag.parse().unwrap());
        if let Ok(uri) = format!("/x?{query}").parse()
            && let Ok(Query(query)) = Query::<ConditionsQuery>::try_from_uri(&uri)
            && let Err(problem) = Conditions::new(&headers, query)
        {
            assert_eq!(problem.into_response().status(), StatusCode::BAD_REQUEST);
        }
    }
}
