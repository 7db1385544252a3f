//! When certificates end.
//!
//! May not live here: what follows from it.

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::parse_x509_certificate;

/// When a certificate ends: `notAfter` in seconds since 1970 (RFC 5280 section 4.1.2.5).
///
/// # Errors
/// When it is no certificate.
pub fn end_of(certificate: &CertificateDer<'_>) -> Result<i64, String> {
    let (_, parsed) = parse_x509_certificate(certificate).map_err(|e| e.to_string())?;
    Ok(parsed.validity().not_after.timestamp())
}

/// When the first of some certificates ends.
///
/// # Errors
/// When one of them is none, or there are none.
pub fn first_end(pem: &str) -> Result<i64, String> {
    let ends = CertificateDer::pem_slice_iter(pem.as_bytes())
        .map(|certificate| end_of(&certificate.map_err(|e| format!("{e:?}"))?))
        .collect::<Result<Vec<i64>, String>>()?;
    ends.into_iter()
        .min()
        .ok_or_else(|| "there is no PEM certificate in it".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pem(year: i32) -> String {
        let mut params = rcgen::CertificateParams::new(vec!["a".to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        let key = rcgen::KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().pem()
    }

    #[test]
    fn the_first_end_counts() {
        let [early, late] = [pem(2030), pem(4096)];
        assert_eq!(first_end(&early), Ok(1_893_456_000));
        assert_eq!(first_end(&late), Ok(67_090_118_400));
        assert_eq!(first_end(&format!("{late}{early}")), Ok(1_893_456_000));
        for nothing in [
            "",
            "x",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ] {
            assert!(first_end(nothing).is_err(), "{nothing:?}");
        }
    }
}
