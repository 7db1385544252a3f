//! Enrolment: an instance asks the control plane for a certificate for the TLS key that it made, and later for
//! a new one.
//!
//! The first request is bound by the enrolment token, which is not sent: whoever answers in the control plane's
//! place learns nothing that he could use, and can't make the answer. Later ones come over mutual TLS with the
//! certificate that is to be renewed.
//! May not live here: the HMAC itself, certificates, HTTP.

use std::fmt::Write as _;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::identity::{framed, from_hex};
use crate::report::HostKey;

/// Version of these documents.
pub const ENROLMENT_VERSION: u32 = 1;

/// A certificate begins that long before it was issued, in seconds, so that clocks that are behind a little
/// take it. An instance takes its beginning plus this for the time when it was issued.
pub const BEGINS_BEFORE: u32 = 300;

/// What an instance posts to `control_plane.enrol_url`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EnrolmentRequest {
    /// [`ENROLMENT_VERSION`].
    pub version: u32,
    /// The instance's id.
    pub instance: String,
    /// 32 random bytes, hex. The certificate's serial number has to be made of it ([`serial`]): that proves
    /// that it is new.
    pub nonce: String,
    /// The signing request, PEM (PKCS #10, RFC 2986). Only its key and its signature matter.
    pub csr: String,
    /// sshd's public host keys.
    pub host_keys: Vec<HostKey>,
    /// HMAC-SHA256 by the enrolment token over [`EnrolmentRequest::message`], lower-case hex; none in a renewal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

/// What the control plane answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EnrolmentAnswer {
    /// The certificates, PEM: the instance's first, the authority's last.
    pub chain: String,
    /// HMAC-SHA256 by the enrolment token over [`EnrolmentRequest::answer_message`], lower-case hex; none in a
    /// renewal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

impl EnrolmentRequest {
    /// What the instance authenticates. Of a host key that is type and fingerprint, as in
    /// [`crate::identity::Identity::message`].
    pub fn message(&self) -> Vec<u8> {
        let keys = self.host_keys.iter();
        let keys = keys.flat_map(|key| [key.algorithm.as_str(), key.fingerprint.as_str()]);
        framed("portcullis enrolment v1", self.fields().into_iter().chain(keys))
    }

    /// What the control plane authenticates: this chain, as the answer to this request.
    pub fn answer_message(&self, chain: &str) -> Vec<u8> {
        let fields = self.fields().into_iter().chain([chain]);
        framed("portcullis enrolment answer v1", fields)
    }

    fn fields(&self) -> [&str; 3] {
        [&self.instance, &self.nonce, &self.csr]
    }
}

/// The serial number of the certificate that answers a request with this nonce: its first 16 bytes, as a
/// positive number without leading zeros (RFC 5280 section 4.1.2.2). `None` if it is no nonce.
pub fn serial(nonce: &str) -> Option<[u8; 16]> {
    let bytes = from_hex(nonce).filter(|bytes| bytes.len() == 32)?;
    let mut serial: [u8; 16] = *bytes.first_chunk()?;
    serial[0] = serial[0] & 0x3f | 0x40;
    Some(serial)
}

/// By which name a certificate says whose it is: a URI among its alternative names.
pub fn instance_uri(instance: &str) -> String {
    let mut uri = "urn:portcullis:instance:".to_owned();
    for byte in instance.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => uri.push(char::from(byte)),
            // A String takes all that is written to it.
            _ => drop(write!(uri, "%{byte:02X}")),
        }
    }
    uri
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(instance: &str, nonce: &str, csr: &str) -> EnrolmentRequest {
        EnrolmentRequest {
            version: ENROLMENT_VERSION,
            instance: instance.into(),
            nonce: nonce.into(),
            csr: csr.into(),
            host_keys: vec![],
            mac: None,
        }
    }

    proptest! {
        /// A MAC for one request, or for one answer, is none for another.
        #[test]
        fn messages_differ_where_the_documents_do(
            a in "[ab]{0,3}", b in "[ab]{0,3}", c in "[ab]{0,3}", d in "[ab]{0,3}",
            e in "[ab]{0,3}", f in "[ab]{0,3}", chain in "[ab]{0,3}",
        ) {
            let (one, other) = (request(&a, &b, &c), request(&d, &e, &f));
            prop_assert_eq!(one == other, one.message() == other.message());
            prop_assert_eq!(one == other, one.answer_message(&chain) == other.answer_message(&chain));
            prop_assert_ne!(one.message(), other.answer_message(&chain));
        }

        #[test]
        fn names_of_two_instances_differ(a in "[!-~]{1,6}", b in "[!-~]{1,6}") {
            prop_assert_eq!(a == b, instance_uri(&a) == instance_uri(&b));
        }

        #[test]
        fn a_serial_is_positive_and_of_its_nonce(bytes in proptest::array::uniform32(any::<u8>())) {
            let nonce = crate::identity::to_hex(&bytes);
            let serial = serial(&nonce).unwrap();
            prop_assert!((0x40..0x80).contains(&serial[0]));
            prop_assert_eq!(&serial[1..], &bytes[1..16]);
        }
    }

    #[test]
    fn what_is_no_nonce_has_no_serial() {
        for text in ["", "00", "zz", &"0".repeat(63), &"0".repeat(66)] {
            assert_eq!(serial(text), None, "{text}");
        }
        assert_eq!(instance_uri("i-0a1/é"), "urn:portcullis:instance:i-0a1%2F%C3%A9");
    }
}
