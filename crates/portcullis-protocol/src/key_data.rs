//! What the numbers of a public key must be, so that OpenSSH takes them for a key and nobody can forge what
//! they verify. The parser of `ssh-key` reads the encoding; it does not look at curves and numbers.
//!
//! May not live here: text, comments, options, which types of keys are allowed.

use ssh_key::public::{KeyData, RsaPublicKey};

/// Largest number that OpenSSH reads from a key, in bits (`SSHBUF_MAX_BIGNUM`).
const MAX_BITS: usize = 16384;

/// Refuses numbers that make no key.
pub(crate) fn check(key: &KeyData) -> Result<(), String> {
    match key {
        KeyData::Rsa(rsa) => check_rsa(rsa),
        KeyData::Ecdsa(point) => check_point(point.as_sec1_bytes()),
        KeyData::SkEcdsaSha2NistP256(key) => {
            check_point(key.ec_point().as_bytes())?;
            check_application(key.application())
        }
        KeyData::SkEd25519(key) => check_application(key.application()),
        _ => Ok(()),
    }
}

/// The length of the modulus in bits, as `ssh-keygen -l` counts it.
pub(crate) fn rsa_bits(key: &RsaPublicKey) -> usize {
    bits(key.n().as_bytes())
}

fn bits(number: &[u8]) -> usize {
    let zeros: usize = number.iter().take_while(|byte| **byte == 0).count();
    let first = number.get(zeros).map_or(8, |byte| byte.leading_zeros() as usize);
    ((number.len() - zeros) * 8).saturating_sub(first)
}

fn check_rsa(key: &RsaPublicKey) -> Result<(), String> {
    let (e, n) = (key.e().as_bytes(), key.n().as_bytes());
    if bits(e).max(bits(n)) > MAX_BITS {
        return Err(format!(
            "an RSA key of {} bits is too large: at most {MAX_BITS}",
            bits(e).max(bits(n))
        ));
    }
    let is_odd = |number: &[u8]| number.last().is_some_and(|byte| byte % 2 == 1);
    // With an exponent of 1, a signature is the message itself.
    if bits(e) < 2 || !is_odd(e) || !is_odd(n) {
        return Err("an RSA key's exponent must be odd and 3 or more, its modulus odd".to_owned());
    }
    Ok(())
}

/// As OpenSSH's `sshkey_ec_validate_public`: uncompressed, on the curve, and neither coordinate short or
/// beyond the group's order.
fn check_point(point: &[u8]) -> Result<(), String> {
    const UNCOMPRESSED: u8 = 4;
    let coordinates = match point.split_first() {
        Some((&UNCOMPRESSED, coordinates)) => coordinates,
        _ => return Err("an ECDSA key's point must be uncompressed".to_owned()),
    };
    let (x, y) = coordinates.split_at(coordinates.len() / 2);
    let (is_point, order_bits) = match x.len() {
        32 => (p256::PublicKey::from_sec1_bytes(point).is_ok(), 256),
        48 => (p384::PublicKey::from_sec1_bytes(point).is_ok(), 384),
        66 => (p521::PublicKey::from_sec1_bytes(point).is_ok(), 521),
        _ => (false, 0),
    };
    let is_usual = |coordinate: &[u8]| {
        bits(coordinate) > order_bits / 2
            && match coordinate.len() {
                32 => p256::NonZeroScalar::try_from(coordinate).is_ok(),
                48 => p384::NonZeroScalar::try_from(coordinate).is_ok(),
                _ => p521::NonZeroScalar::try_from(coordinate).is_ok(),
            }
    };
    if !is_point || !is_usual(x) || !is_usual(y) {
        return Err("an ECDSA key's point is not on its curve: copy the key once more".to_owned());
    }
    Ok(())
}

fn check_application(application: &str) -> Result<(), String> {
    if application.contains('\0') {
        return Err("a security key's application may hold no NUL".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ssh_key::Mpint;

    use super::*;

    fn rsa(e: &[u8], n: &[u8]) -> RsaPublicKey {
        RsaPublicKey::new(Mpint::from_positive_bytes(e), Mpint::from_positive_bytes(n)).unwrap()
    }

    fn odd(bits: usize) -> Vec<u8> {
        let mut number = vec![0xff; bits / 8];
        if !bits.is_multiple_of(8) {
            number.insert(0, 0xff >> (8 - bits % 8));
        }
        number
    }

    #[test]
    fn the_length_of_a_modulus_is_in_bits() {
        for length in [2041, 2047, 2048, 3072, 16384] {
            let key = rsa(&[1, 0, 1], &odd(length));
            assert_eq!(rsa_bits(&key), length);
            assert_eq!(check_rsa(&key), Ok(()), "{length}");
        }
        assert!(
            check_rsa(&rsa(&[1, 0, 1], &odd(16385)))
                .unwrap_err()
                .contains("too large")
        );
        assert!(
            check_rsa(&rsa(&odd(16385), &odd(3072)))
                .unwrap_err()
                .contains("too large")
        );
    }

    #[test]
    fn numbers_that_let_everybody_sign_are_refused() {
        assert_eq!(check_rsa(&rsa(&[3], &odd(2048))), Ok(()));
        let mut even = odd(2048);
        *even.last_mut().unwrap() = 0xfe;
        for (e, n) in [
            (&[1][..], odd(2048)),
            (&[2], odd(2048)),
            (&[1, 0, 0], odd(2048)),
            (&[3], even),
        ] {
            assert!(check_rsa(&rsa(e, &n)).is_err(), "{e:?}");
        }
    }

    #[test]
    fn points_off_the_curve_or_compressed_are_refused() {
        use p256::elliptic_curve::sec1::ToSec1Point;
        let good = p256::PublicKey::from_secret_scalar(&p256::NonZeroScalar::try_from(&[7; 32][..]).unwrap());
        let point = good.to_sec1_point(false);
        assert_eq!(check_point(point.as_bytes()), Ok(()));
        assert!(check_point(good.to_sec1_point(true).as_bytes()).is_err());
        for at in [1, 40, 64] {
            let mut bad = point.as_bytes().to_vec();
            bad[at] ^= 1;
            assert!(
                check_point(&bad).unwrap_err().contains("not on its curve"),
                "{at}"
            );
        }
        assert!(check_point(&[&[4][..], &[0; 64]].concat()).is_err());
        assert!(check_point(&[]).is_err());
        assert!(check_point(&[4]).is_err());
    }

    #[test]
    fn an_application_ends_at_its_end() {
        assert_eq!(check_application("ssh:"), Ok(()));
        assert!(check_application("ssh:\0").is_err());
    }
}
