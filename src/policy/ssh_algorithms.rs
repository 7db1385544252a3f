//! Which of the algorithms that sshd offers are weak, and which key exchanges hold against a quantum
//! computer; each with the reason and its source.
//!
//! May not live here: asking a server (`system::ssh_probe`).

use super::observation::Algorithms;

/// Why SHA-1 is not wanted.
const SHA1: &str =
    "SHA-1, which NIST retires (notice of 15 December 2022; RFC 9142 section 3.1 for key exchange)";
/// Why signatures with it are not.
const SHA1_SIGNATURE: &str =
    "a signature over SHA-1, for which collisions are made (RFC 8332; off in OpenSSH 8.8)";
/// Why short tags are not.
const SHORT_TAG: &str =
    "a tag of 64 bits, of which a long connection can spend too many (RFC 4418 section 6)";
/// Why MD5 is not.
const MD5: &str = "MD5, which is broken (RFC 6151)";
/// Why CBC is not.
const CBC: &str =
    "CBC as SSH uses it, which tells some of the plain text (CVE-2008-5161, RFC 4344 section 1)";
/// Why the prefix truncation attack matters.
const TERRAPIN: &str =
    "without strict key exchange a stranger on the way can leave packets out (CVE-2023-48795)";

/// A kind of algorithm, as sshd_config(5) names its option.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Key exchange.
    Kex,
    /// Signatures by the host key.
    HostKey,
    /// Encryption.
    Cipher,
    /// Message authentication.
    Mac,
}

impl Kind {
    /// The option of sshd_config(5) that chooses them.
    pub fn option(self) -> &'static str {
        match self {
            Self::Kex => "KexAlgorithms",
            Self::HostKey => "HostKeyAlgorithms",
            Self::Cipher => "Ciphers",
            Self::Mac => "MACs",
        }
    }
}

/// An algorithm that should not be offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weak {
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// Why, with the source.
    pub reason: &'static str,
}

/// The weak ones among what is offered, in the order of the offer.
pub fn weak(offered: &Algorithms) -> Vec<Weak> {
    let strict = offered
        .kex
        .iter()
        .any(|name| name == "kex-strict-s-v00@openssh.com");
    let judged = |kind, names: &[String], judge: &dyn Fn(&str) -> Option<&'static str>| {
        let weak = |name: &String| {
            judge(name).map(|reason| Weak {
                kind,
                name: name.clone(),
                reason,
            })
        };
        names.iter().filter_map(weak).collect::<Vec<_>>()
    };
    [
        judged(Kind::Kex, &offered.kex, &weak_kex),
        judged(Kind::HostKey, &offered.host_keys, &weak_host_key),
        judged(Kind::Cipher, &offered.ciphers, &|name| weak_cipher(name, strict)),
        judged(Kind::Mac, &offered.macs, &weak_mac),
    ]
    .concat()
}

/// The offered key exchanges that also hold if the attacker gets a quantum computer later: hybrids, which
/// are never weaker than their classical half (OpenSSH 9.0 and 9.9 release notes).
pub fn post_quantum(offered: &Algorithms) -> Vec<String> {
    let holds = |name: &&String| {
        matches!(
            name.as_str(),
            "mlkem768x25519-sha256"
                | "mlkem768nistp256-sha256"
                | "mlkem1024nistp384-sha384"
                | "sntrup761x25519-sha512"
                | "sntrup761x25519-sha512@openssh.com"
        )
    };
    offered.kex.iter().filter(holds).cloned().collect()
}

fn weak_kex(name: &str) -> Option<&'static str> {
    match name {
        "diffie-hellman-group1-sha1" => {
            Some("a group of 1024 bits, and SHA-1 (RFC 9142 section 3.4, CVE-2015-4000)")
        }
        "rsa1024-sha1" => Some("RSA of 1024 bits, and SHA-1 (RFC 9142 section 3.3)"),
        "diffie-hellman-group14-sha1" | "diffie-hellman-group-exchange-sha1" => Some(SHA1),
        name if name.starts_with("gss-") && name.contains("-sha1-") => Some(SHA1),
        _ => None,
    }
}

fn weak_host_key(name: &str) -> Option<&'static str> {
    match name {
        "ssh-rsa" | "ssh-rsa-cert-v01@openssh.com" => Some(SHA1_SIGNATURE),
        "ssh-dss" | "ssh-dss-cert-v01@openssh.com" => {
            Some("DSA of 1024 bits over SHA-1 (off since OpenSSH 7.0, gone in 10.0)")
        }
        _ => None,
    }
}

fn weak_cipher(name: &str, strict: bool) -> Option<&'static str> {
    match name {
        "none" => Some("no encryption at all"),
        "3des-cbc" | "blowfish-cbc" | "cast128-cbc" | "idea-cbc" => {
            Some("blocks of 64 bits, which repeat on a long connection (CVE-2016-2183)")
        }
        name if name.contains("-cbc") => Some(CBC),
        name if name.starts_with("arcfour") => Some("RC4, which is broken (RFC 8758)"),
        "chacha20-poly1305@openssh.com" if !strict => Some(TERRAPIN),
        _ => None,
    }
}

fn weak_mac(name: &str) -> Option<&'static str> {
    let plain = name.trim_end_matches("@openssh.com").trim_end_matches("-etm");
    match plain {
        "none" => Some("no authentication at all"),
        "umac-64" => Some(SHORT_TAG),
        plain if plain.starts_with("hmac-md5") => Some(MD5),
        plain if plain.starts_with("hmac-sha1") => Some(SHA1),
        plain if plain.starts_with("hmac-ripemd160") => {
            Some("RIPEMD-160, which nobody examines any more (gone in OpenSSH 7.6)")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &str) -> Vec<String> {
        list.split_whitespace().map(str::to_owned).collect()
    }

    /// What OpenSSH 9.2 offers as Debian ships it.
    fn debian() -> Algorithms {
        Algorithms {
            kex: names(
                "sntrup761x25519-sha512@openssh.com curve25519-sha256 curve25519-sha256@libssh.org \
                 ecdh-sha2-nistp256 diffie-hellman-group-exchange-sha256 diffie-hellman-group14-sha256 \
                 kex-strict-s-v00@openssh.com",
            ),
            host_keys: names("rsa-sha2-512 rsa-sha2-256 ecdsa-sha2-nistp256 ssh-ed25519"),
            ciphers: names("chacha20-poly1305@openssh.com aes128-ctr aes256-gcm@openssh.com"),
            macs: names(
                "umac-64-etm@openssh.com umac-128-etm@openssh.com hmac-sha2-256 hmac-sha1-etm@openssh.com \
                 umac-64@openssh.com umac-128@openssh.com hmac-sha1",
            ),
        }
    }

    fn weak_names(offered: &Algorithms) -> Vec<String> {
        weak(offered).into_iter().map(|weak| weak.name).collect()
    }

    #[test]
    fn weak_ones_are_named_and_no_others() {
        assert_eq!(
            weak_names(&debian()),
            [
                "umac-64-etm@openssh.com",
                "hmac-sha1-etm@openssh.com",
                "umac-64@openssh.com",
                "hmac-sha1"
            ]
        );
        let old = Algorithms {
            kex: names(
                "diffie-hellman-group1-sha1 diffie-hellman-group14-sha1 diffie-hellman-group-exchange-sha1 \
                 gss-group14-sha1-toWM5Slw5Ew8Mqkay+al2g== kex-strict-s-v00@openssh.com",
            ),
            host_keys: names("ssh-rsa ssh-dss"),
            ciphers: names("aes128-cbc 3des-cbc rijndael-cbc@lysator.liu.se arcfour256"),
            macs: names("hmac-md5 hmac-md5-96-etm@openssh.com hmac-sha1-96 hmac-ripemd160@openssh.com"),
        };
        let all = weak_names(&old);
        // Only the marker of strict key exchange is none.
        assert_eq!(all.len(), 4 + 2 + 4 + 4, "{all:?}");
    }

    #[test]
    fn chacha_needs_strict_key_exchange() {
        let mut offered = debian();
        offered.kex.pop();
        assert_eq!(weak_names(&offered)[0], "chacha20-poly1305@openssh.com");
    }

    #[test]
    fn hybrids_are_post_quantum() {
        assert_eq!(post_quantum(&debian()), ["sntrup761x25519-sha512@openssh.com"]);
        let mut offered = debian();
        offered.kex.insert(0, "mlkem768x25519-sha256".into());
        assert_eq!(post_quantum(&offered).len(), 2);
        offered.kex = names("curve25519-sha256");
        assert!(post_quantum(&offered).is_empty());
    }
}
