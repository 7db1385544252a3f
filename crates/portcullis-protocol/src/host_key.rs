//! A public host key of sshd: its fingerprint, and the whole key, which is worth something only if it
//! hashes to that.
//!
//! May not live here: files, known_hosts, whether a key is the right one.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use ssh_key::HashAlg;

use crate::key::MAX_KEY_LINE;

/// A public host key of sshd.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct HostKey {
    /// Algorithm, for example `ssh-ed25519`.
    #[serde(rename = "type")]
    pub algorithm: String,
    /// `SHA256:…` as `ssh-keygen -l` prints it.
    pub fingerprint: String,
    /// The whole key as `type base64`, without a comment; older agents do not tell it. What is
    /// authenticated is the fingerprint: use it only as [`HostKey::verified_key`] gives it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

impl HostKey {
    /// The key on a line of a `.pub` file (sshd(8)): type, base64 and a comment, which is dropped.
    ///
    /// # Errors
    /// When it is none.
    pub fn from_line(line: &str) -> Result<Self, String> {
        let key = decode(line)?;
        Ok(Self {
            algorithm: key.algorithm().as_str().to_owned(),
            fingerprint: key.fingerprint(HashAlg::Sha256).to_string(),
            key: Some(encode(&key)?),
        })
    }

    /// The whole key as `type base64`, if it is of the type that is named and hashes to the fingerprint
    /// (SHA-256 over the decoded key, as RFC 4253 section 6.6 encodes it). It is written anew from what
    /// was decoded, so nothing else can be on the line.
    ///
    /// # Errors
    /// When it is missing, no key, or another key.
    pub fn verified_key(&self) -> Result<String, String> {
        let name = format!(
            "{} {}",
            self.algorithm.escape_debug(),
            self.fingerprint.escape_debug()
        );
        let Some(line) = &self.key else {
            return Err(format!(
                "host key {name} comes without the key itself: the agent is too old to tell it; upgrade it"
            ));
        };
        let key = decode(line).map_err(|reason| format!("host key {name}: {reason}"))?;
        let (algorithm, fingerprint) = (key.algorithm(), key.fingerprint(HashAlg::Sha256).to_string());
        if algorithm.as_str() != self.algorithm || fingerprint != self.fingerprint {
            return Err(format!(
                "host key {name} comes with another key, {} {fingerprint}: do not trust it",
                algorithm.as_str()
            ));
        }
        encode(&key)
    }

    /// Whether both are the same key. What hashes to the same fingerprint is.
    pub fn is_same(&self, other: &Self) -> bool {
        self.fingerprint == other.fingerprint
    }
}

fn decode(line: &str) -> Result<ssh_key::PublicKey, String> {
    let line = line.trim_end_matches(['\r', '\n', ' ', '\t']);
    if line.len() > MAX_KEY_LINE || line.chars().any(char::is_control) {
        return Err("a public key is one line of at most 8 kB".to_owned());
    }
    ssh_key::PublicKey::from_openssh(line).map_err(|e| format!("not an OpenSSH public key: {e}"))
}

fn encode(key: &ssh_key::PublicKey) -> Result<String, String> {
    let bare = ssh_key::PublicKey::new(key.key_data().clone(), "");
    let line = bare
        .to_openssh()
        .map_err(|e| format!("the key can't be written: {e}"))?;
    Ok(line.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFkKc52EQpKAMBtUiDp/N8hykSeuzBRx5gN48WTPDhWS";

    /// As `ssh-keygen -l` prints them.
    const FINGERPRINT: &str = "SHA256:vlSYy6IXLwpx4mGmwYv18D68OxYLs2g2p/jm/nAk30U";

    #[test]
    fn a_line_becomes_a_key_without_its_comment() {
        let key = HostKey::from_line(&format!("{LINE} root@image\n")).unwrap();
        assert_eq!(
            (key.algorithm.as_str(), key.fingerprint.as_str()),
            ("ssh-ed25519", FINGERPRINT)
        );
        assert_eq!(key.verified_key().unwrap(), LINE);
        for bad in ["", "x", "ssh-ed25519 AAAA", &format!("{LINE} a\n{LINE} b")] {
            assert!(HostKey::from_line(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_the_key_of_the_fingerprint_is_given_out() {
        let good = HostKey::from_line(LINE).unwrap();
        let other = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBmyqUQGxHHYKqmHp4WZVvAcW0vTDhrlWHFNqV9uYHCd";
        let with = |key: Option<&str>| HostKey {
            key: key.map(str::to_owned),
            ..good.clone()
        };
        assert!(with(None).verified_key().unwrap_err().contains("upgrade"));
        let error = with(Some(other)).verified_key().unwrap_err();
        assert!(error.contains("do not trust it"), "{error}");
        // A line of known_hosts could begin with any of these.
        for bad in [
            "",
            "@cert-authority * ssh-ed25519 AAAA",
            &format!("{LINE}\n* {other}"),
            &format!("* {LINE}"),
        ] {
            assert!(with(Some(bad)).verified_key().is_err(), "{bad}");
        }
        let typed = HostKey {
            algorithm: "ssh-rsa".into(),
            ..good.clone()
        };
        assert!(typed.verified_key().is_err());
        // What else is on the line does not come through.
        assert_eq!(with(Some(&format!("{LINE} evil"))).verified_key().unwrap(), LINE);
    }

    #[test]
    fn an_old_one_reads_and_writes_as_before() {
        let text = r#"{"type":"ssh-ed25519","fingerprint":"SHA256:abc"}"#;
        let key: HostKey = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&key).unwrap(), text);
    }
}
