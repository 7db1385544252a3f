//! What a cipher of dm-crypt is worth: its specification and the length of its key, as the kernel tells them.
//!
//! Source: Documentation/admin-guide/device-mapper/dm-crypt.rst of the kernel, and drivers/md/dm-crypt.c.
//! May not live here: where the specification comes from.

/// What a cipher does for what is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Worth {
    /// Encrypts with an algorithm of 256 bits.
    Strong,
    /// Encrypts, and somebody should know how.
    Lesser(String),
    /// Protects nothing.
    Nothing(String),
    /// Not known here.
    Unknown(String),
}

/// A cipher, named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Algorithm {
    /// For people and auditors, for example `AES-256-XTS`.
    pub name: String,
    /// What it is worth.
    pub worth: Worth,
}

/// Block ciphers with 128-bit blocks that nobody has broken, and how they are written.
const BLOCK_CIPHERS: [(&str, &str); 6] = [
    ("aes", "AES"),
    ("serpent", "Serpent"),
    ("twofish", "Twofish"),
    ("camellia", "Camellia"),
    ("aria", "ARIA"),
    ("sm4", "SM4"),
];

/// Broken, or with blocks of 64 bits.
const BROKEN: [&str; 10] = [
    "des",
    "des3_ede",
    "blowfish",
    "cast5",
    "tea",
    "xtea",
    "anubis",
    "khazad",
    "arc4",
    "ecb(arc4)",
];

/// A specification, taken apart.
struct Parts {
    cipher: String,
    mode: String,
    /// How the initialisation vector is made.
    iv: String,
    /// How many keys take turns.
    keys: u32,
    /// Bits of the key that are not for encryption.
    other_bits: u32,
}

/// Judges a specification (`aes-xts-plain64`, `capi:xts(aes)-plain64`) with a key of so many bits.
pub fn algorithm(specification: &str, key_bits: u32) -> Algorithm {
    algorithm_with(specification, key_bits, None)
}

/// The same, where so many bits of the key are for a checksum instead of what is usual for it.
pub fn algorithm_with(specification: &str, key_bits: u32, checksum_bits: Option<u32>) -> Algorithm {
    let parts = match specification.strip_prefix("capi:") {
        Some(capi) => crypto_api(capi),
        None => classic(specification),
    };
    let Some(parts) = parts else {
        return Algorithm {
            name: specification.to_owned(),
            worth: Worth::Unknown(format!("the cipher {specification} is not known here")),
        };
    };
    let other_bits = match parts.other_bits {
        0 => 0,
        usual => checksum_bits.unwrap_or(usual),
    };
    let mut bits = key_bits.saturating_sub(other_bits) / parts.keys;
    if parts.mode == "xts" {
        // Two keys of the same length: one for the data, one for the tweak.
        bits /= 2;
    }
    let known = BLOCK_CIPHERS.iter().find(|(name, _)| *name == parts.cipher);
    let name = match (known, parts.mode.as_str()) {
        (Some((_, name)), "") => format!("{name}-{bits}"),
        (Some((_, name)), mode) => format!("{name}-{bits}-{}", mode.to_uppercase()),
        (None, _) => specification.to_owned(),
    };
    Algorithm {
        worth: worth(&parts, known.is_some(), bits, specification),
        name,
    }
}

fn worth(parts: &Parts, is_known: bool, bits: u32, specification: &str) -> Worth {
    let (cipher, mode) = (parts.cipher.as_str(), parts.mode.as_str());
    if cipher == "cipher_null" {
        return Worth::Nothing(format!("the cipher {specification} encrypts nothing"));
    }
    if BROKEN.contains(&cipher) {
        return Worth::Nothing(format!("the cipher {specification} is broken"));
    }
    if mode == "ecb" {
        return Worth::Nothing(format!("{specification}: ECB shows which blocks are alike"));
    }
    // Wide-block modes of stream ciphers, and ChaCha20-Poly1305 (RFC 7539): always with 256 bits.
    let is_stream = matches!(cipher, "xchacha12" | "xchacha20" | "chacha20");
    let is_mode = match mode {
        "xts" | "cbc" | "gcm" | "ccm" | "hctr2" => is_known,
        "adiantum" | "poly1305" => is_stream,
        _ => false,
    };
    if !is_mode {
        return Worth::Unknown(format!("the cipher {specification} is not known here"));
    }
    if let Some(worth) = worth_of_vectors(mode, &parts.iv, specification) {
        return worth;
    }
    if is_stream {
        return match bits {
            256 => Worth::Strong,
            _ => Worth::Unknown(format!(
                "{specification} with a key of {bits} bits is not known here"
            )),
        };
    }
    match bits {
        ..128 => Worth::Nothing(format!("{specification}: a key of {bits} bits can be guessed")),
        128..256 => Worth::Lesser(format!("a key of {bits} bits, not of 256")),
        256 if mode == "cbc" && matches!(parts.iv.as_str(), "plain" | "plain64" | "plain64be") => {
            Worth::Lesser(
                "CBC with vectors that can be foretold shows marks that somebody planted".to_owned(),
            )
        }
        256 => Worth::Strong,
        _ => Worth::Unknown(format!(
            "{specification} with a key of {bits} bits is not known here"
        )),
    }
}

/// What the initialisation vectors make of a cipher, if that is bad: those that are always the same show which sectors
/// are alike, and in GCM, CCM and Poly1305 a vector used twice gives away more than that.
fn worth_of_vectors(mode: &str, iv: &str, specification: &str) -> Option<Worth> {
    match (mode, iv) {
        ("gcm" | "ccm" | "poly1305", "random") => None,
        ("gcm" | "ccm" | "poly1305", _) => Some(Worth::Nothing(format!(
            "{specification}: a sector written twice has the same vector, which {mode} must not"
        ))),
        (_, "null") => Some(Worth::Nothing(format!(
            "{specification}: all sectors have the same vector, which shows those that are alike"
        ))),
        (_, "plain" | "plain64" | "plain64be" | "essiv" | "eboiv" | "benbi" | "random") => None,
        (_, iv) => Some(Worth::Unknown(format!(
            "{specification}: the vectors {iv} are not known here"
        ))),
    }
}

/// `cipher[:keys]-mode-iv[:options]`; without a mode, it is CBC with plain vectors.
fn classic(specification: &str) -> Option<Parts> {
    let (mut iv, mut mode) = ("plain", "cbc");
    let mut parts = specification.splitn(3, '-');
    let cipher = parts.next()?;
    match (parts.next(), parts.next()) {
        (Some(only @ ("plain" | "plain64" | "plain64be")), None) => iv = only,
        (Some(found), vectors) => {
            mode = found;
            iv = vectors.unwrap_or("null").split(':').next()?;
        }
        _ => {}
    }
    let (cipher, keys) = match cipher.split_once(':') {
        Some((cipher, keys)) => (cipher, keys.parse().ok().filter(|keys| (1..=64).contains(keys))?),
        None => (cipher, 1),
    };
    // Adiantum names its stream cipher and its block cipher.
    let cipher = cipher.split(',').next()?;
    let parts = Parts {
        cipher: cipher.to_owned(),
        mode: mode.to_owned(),
        iv: iv.to_owned(),
        keys,
        other_bits: 0,
    };
    // loop-AES's and TrueCrypt's own vectors have key material of their own: how much of it is not known here.
    (!matches!(iv, "lmk" | "tcw" | "elephant")).then_some(parts)
}

/// The kernel's own notation: `xts(aes)-plain64`, `authenc(hmac(sha256),xts(aes))-random`.
fn crypto_api(specification: &str) -> Option<Parts> {
    // The vectors stand after the last bracket; what is in the brackets may have the same sign.
    let end = specification.rfind(')')?;
    let (name, iv) = specification.split_at(end + 1);
    let iv = iv.strip_prefix('-').unwrap_or("null").split(':').next()?;
    let mut other_bits = 0;
    let mut name = name;
    if let Some(inner) = name.strip_prefix("authenc(").and_then(|n| n.strip_suffix(')')) {
        let (mac, cipher) = inner.split_once("),")?;
        // What cryptsetup takes for them: as long as the digest.
        other_bits = match mac {
            "hmac(sha256" => 256,
            "hmac(sha512" => 512,
            _ => return None,
        };
        name = cipher;
    }
    let (mode, inner) = name.split_once('(')?;
    let inner = inner.strip_suffix(')')?;
    let (mode, cipher) = match (mode, inner.split_once(',')) {
        ("rfc7539", Some((cipher, "poly1305"))) => ("poly1305", cipher),
        ("adiantum", Some((cipher, _))) => ("adiantum", cipher),
        (_, None) => (mode, inner),
        _ => return None,
    };
    (!cipher.contains('(') && !matches!(iv, "lmk" | "tcw" | "elephant")).then(|| Parts {
        cipher: cipher.to_owned(),
        mode: mode.to_owned(),
        iv: iv.to_owned(),
        keys: 1,
        other_bits,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn is(specification: &str, bits: u32, name: &str) -> Worth {
        let found = algorithm(specification, bits);
        assert_eq!(found.name, name, "{specification}");
        found.worth
    }

    #[test]
    fn algorithms_are_named_and_judged() {
        for (specification, bits, name) in [
            ("aes-xts-plain64", 512, "AES-256-XTS"),
            ("aes-cbc-essiv:sha256", 256, "AES-256-CBC"),
            ("serpent-xts-plain64", 512, "Serpent-256-XTS"),
            ("capi:xts(aes)-plain64", 512, "AES-256-XTS"),
            ("capi:authenc(hmac(sha256),xts(aes))-random", 768, "AES-256-XTS"),
            ("capi:gcm(aes)-random", 256, "AES-256-GCM"),
            (
                "capi:rfc7539(chacha20,poly1305)-random",
                256,
                "capi:rfc7539(chacha20,poly1305)-random",
            ),
            (
                "capi:adiantum(xchacha12,aes)-plain64",
                256,
                "capi:adiantum(xchacha12,aes)-plain64",
            ),
            (
                "xchacha12,aes-adiantum-plain64",
                256,
                "xchacha12,aes-adiantum-plain64",
            ),
        ] {
            assert_eq!(is(specification, bits, name), Worth::Strong, "{specification}");
        }
        for (specification, bits, name) in [
            ("aes-xts-plain64", 256, "AES-128-XTS"),
            ("aes-xts-plain64", 384, "AES-192-XTS"),
            ("aes-cbc-essiv:sha256", 128, "AES-128-CBC"),
            ("aes-cbc-plain64", 256, "AES-256-CBC"),
            ("aes-plain", 256, "AES-256-CBC"),
            ("aes", 256, "AES-256-CBC"),
        ] {
            let worth = is(specification, bits, name);
            assert!(matches!(worth, Worth::Lesser(_)), "{specification}: {worth:?}");
        }
        for (specification, bits, name) in [
            ("cipher_null-ecb", 0, "cipher_null-ecb"),
            ("capi:ecb(cipher_null)-null", 0, "capi:ecb(cipher_null)-null"),
            ("des3_ede-cbc-essiv:sha256", 192, "des3_ede-cbc-essiv:sha256"),
            ("aes-ecb", 256, "AES-256-ECB"),
            ("capi:ecb(aes)-null", 256, "AES-256-ECB"),
            ("aes-xts-null", 512, "AES-256-XTS"),
            ("aes-xts", 512, "AES-256-XTS"),
            ("capi:xts(aes)-null", 512, "AES-256-XTS"),
            ("aes-cbc-null", 256, "AES-256-CBC"),
            ("capi:gcm(aes)-plain64", 256, "AES-256-GCM"),
            ("xchacha12,aes-adiantum-null", 256, "xchacha12,aes-adiantum-null"),
            ("aes-xts-plain64", 0, "AES-0-XTS"),
            ("aes-xts-plain64", 64, "AES-32-XTS"),
        ] {
            let worth = is(specification, bits, name);
            assert!(matches!(worth, Worth::Nothing(_)), "{specification}: {worth:?}");
        }
        for (specification, bits) in [
            ("", 512),
            ("rot13-xts-plain64", 512),
            ("aes:64-cbc-lmk", 16640),
            ("aes-cbc-tcw", 512),
            ("aes-cbc-elephant", 512),
            ("aes-xts-plain64", 1024),
            ("capi:authenc(hmac(sha1),xts(aes))-random", 672),
            ("capi:xts(ecb(aes-generic))-plain64", 512),
            ("aes-adiantum-plain64", 256),
            ("aes-xts-rot13", 512),
            ("aes-ctr-plain64", 256),
        ] {
            let found = algorithm(specification, bits);
            assert!(
                matches!(found.worth, Worth::Unknown(_)),
                "{specification}: {found:?}"
            );
        }
    }

    /// `integrity_key_size` of dm-crypt (Linux 6.11): 768 bits may be 512 for the checksum and two of 128.
    #[test]
    fn a_longer_key_of_the_checksum_leaves_less_for_the_cipher() {
        let specification = "capi:authenc(hmac(sha256),xts(aes))-random";
        let found = algorithm_with(specification, 768, Some(512));
        assert_eq!(found.name, "AES-128-XTS");
        assert!(matches!(found.worth, Worth::Lesser(_)), "{found:?}");
        // What has no checksum has no key for it.
        assert_eq!(
            algorithm_with("aes-xts-plain64", 512, Some(256)).name,
            "AES-256-XTS"
        );
    }

    proptest! {
        /// Nothing that has less than two keys of 256 bits is strong.
        #[test]
        fn short_keys_are_never_strong(
            mode in "(xts|cbc|gcm|ecb)", iv in "(plain64|essiv:sha256|random|null)", bits in 0u32..256
        ) {
            prop_assert_ne!(algorithm(&format!("aes-{mode}-{iv}"), bits).worth, Worth::Strong);
            prop_assert_ne!(algorithm(&format!("capi:{mode}(aes)-{iv}"), bits).worth, Worth::Strong);
            prop_assert_ne!(algorithm(&format!("capi:authenc(hmac(sha256),{mode}(aes))-{iv}"), bits + 256).worth, Worth::Strong);
        }

        #[test]
        fn nothing_panics(text in "(capi:)?[a-z0-9:(),-]{0,40}", bits in any::<u32>()) {
            let _ = algorithm(&text, bits);
        }
    }
}
