//! Debian's changelog (deb-changelog(5)): one entry, which leads to ours.
//!
//! May not live here: what changed.

use std::io;

/// The time of what is built, in seconds since 1970 (reproducible-builds.org's SOURCE_DATE_EPOCH).
///
/// # Errors
/// When it is set and is no number.
pub fn epoch() -> io::Result<Option<i64>> {
    let Ok(text) = std::env::var("SOURCE_DATE_EPOCH") else {
        return Ok(None);
    };
    let number = text
        .parse()
        .map_err(|_| io::Error::other("SOURCE_DATE_EPOCH is no number"))?;
    Ok(Some(number))
}

/// The changelog of this version.
///
/// # Errors
/// As [`epoch`].
pub fn text() -> io::Result<String> {
    let time = jiff::Timestamp::from_second(epoch()?.unwrap_or_default()).map_err(io::Error::other)?;
    Ok(of(env!("CARGO_PKG_VERSION"), time))
}

fn of(version: &str, time: jiff::Timestamp) -> String {
    let time = time.strftime("%a, %d %b %Y %H:%M:%S +0000");
    format!(
        "portcullis ({version}) unstable; urgency=medium\n\n  \
         * What changed is in /usr/share/doc/portcullis/CHANGELOG.md.\n\n \
         -- The portcullis authors <portcullis@example.org>  {time}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_has_debians_form() {
        let text = of("0.1.0", jiff::Timestamp::UNIX_EPOCH);
        assert!(text.starts_with("portcullis (0.1.0) unstable; urgency=medium\n\n  * "));
        assert!(text.ends_with(
            "\n\n -- The portcullis authors <portcullis@example.org>  Thu, 01 Jan 1970 00:00:00 +0000\n"
        ));
    }
}
