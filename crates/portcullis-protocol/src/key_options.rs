//! The options that may stand before an authorized key (sshd(8), AUTHORIZED_KEYS FILE FORMAT).
//!
//! Only those on a list: what narrows a login, or names the authority of certificates. What would run a
//! command, set an environment or open a tunnel comes from nobody but the user.
//!
//! May not live here: the key behind them, what sshd makes of them.

use std::fmt;
use std::str::FromStr;

use ssh_key::authorized_keys::ConfigOptsIter;

/// Options without a value.
const FLAGS: [&str; 14] = [
    "agent-forwarding",
    "cert-authority",
    "no-agent-forwarding",
    "no-port-forwarding",
    "no-pty",
    "no-touch-required",
    "no-user-rc",
    "no-x11-forwarding",
    "port-forwarding",
    "pty",
    "restrict",
    "user-rc",
    "verify-required",
    "x11-forwarding",
];

/// Options with a value in double quotes; those of the second kind may be repeated.
const VALUES: [&str; 2] = ["from", "principals"];
const LISTS: [&str; 2] = ["permitlisten", "permitopen"];

/// The authority option: the key signs certificates, and lets nobody in by itself.
const CERT_AUTHORITY: &str = "cert-authority";

/// Options of an authorized key, each from a documented list, none twice (but for `permitopen` and
/// `permitlisten`); empty if there are none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyOptions(String);

impl KeyOptions {
    /// Names of all options that are accepted, for messages and documents.
    pub fn known() -> impl Iterator<Item = &'static str> {
        FLAGS.into_iter().chain(VALUES).chain(LISTS)
    }

    /// The options as sshd reads them, comma-separated; empty if there are none.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the key is an authority that signs users' certificates, instead of a key of a user.
    pub fn is_authority(&self) -> bool {
        self.names().any(|name| name == CERT_AUTHORITY)
    }

    /// Whether the key is for callers at certain addresses or host names only.
    pub fn restricts_source(&self) -> bool {
        self.names().any(|name| name == "from")
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        // What was checked once can be split again.
        ConfigOptsIter::new(&self.0)
            .ok()
            .into_iter()
            .flatten()
            .map(|option| option.split_once('=').map_or(option, |(name, _)| name))
    }
}

impl FromStr for KeyOptions {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.ends_with(',') {
            return Err(format!("options of a key: {} ends in a comma", short(text)));
        }
        let options = ConfigOptsIter::new(text).map_err(|_| {
            let first = text.split(['=', ',']).next().unwrap_or_default();
            match Self::known().any(|name| name == first) {
                true => format!(
                    "options of a key: {} is not a list like no-pty,from=\"10.0.0.0/8\"",
                    short(text)
                ),
                false => unknown(first),
            }
        })?;
        let mut seen: Vec<&str> = Vec::new();
        for option in options {
            let name = check_one(option)?;
            if seen.contains(&name) && !LISTS.contains(&name) {
                return Err(format!("option {name} of a key stands twice"));
            }
            seen.push(name);
        }
        if seen.contains(&"principals") && !seen.contains(&CERT_AUTHORITY) {
            return Err("option principals of a key goes with cert-authority".to_owned());
        }
        Ok(Self(text.to_owned()))
    }
}

/// Checks an option, and gives its name.
fn check_one(option: &str) -> Result<&str, String> {
    let (name, value) = match option.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (option, None),
    };
    let quoted = || {
        let inner = value?.strip_prefix('"')?.strip_suffix('"')?;
        let plain = |b: u8| b.is_ascii_graphic() && !matches!(b, b'"' | b'\\');
        (!inner.is_empty() && inner.bytes().all(plain)).then_some(())
    };
    match name {
        "expiry-time" => Err("option expiry-time of a key: say `expires` instead".to_owned()),
        _ if FLAGS.contains(&name) && value.is_none() => Ok(name),
        _ if FLAGS.contains(&name) => Err(format!("option {name} of a key takes no value")),
        _ if VALUES.contains(&name) || LISTS.contains(&name) => match quoted() {
            Some(()) => Ok(name),
            None => Err(format!(
                "option {name} of a key takes a value in double quotes, without blanks, quotes and backslashes"
            )),
        },
        _ => Err(unknown(name)),
    }
}

fn unknown(name: &str) -> String {
    let known: Vec<&str> = KeyOptions::known().collect();
    let known = known.join(", ");
    let name = short(name);
    format!("option {name} of a key is not accepted; these are: {known}")
}

/// What a stranger wrote, fit for a message.
fn short(text: &str) -> String {
    let start: String = text.chars().take(40).collect();
    let more = if start.len() < text.len() { "…" } else { "" };
    format!("{start:?}{more}")
}

impl fmt::Display for KeyOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_narrows_a_login_is_accepted() {
        for good in [
            "",
            "restrict",
            "no-pty,no-port-forwarding",
            "from=\"10.0.0.0/8,!10.0.0.7\"",
            "cert-authority,principals=\"alice,bob\"",
            "restrict,permitopen=\"localhost:80\",permitopen=\"localhost:81\"",
            "verify-required",
        ] {
            assert_eq!(good.parse::<KeyOptions>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn what_runs_sets_or_hides_something_is_refused() {
        for (bad, expected) in [
            ("command=\"sh\"", "option \"command\""),
            ("COMMAND=\"sh\"", "option \"COMMAND\""),
            ("restrict,command=\"sh\"", "option \"command\""),
            ("environment=\"A=b\"", "option \"environment\""),
            ("tunnel=\"0\"", "option \"tunnel\""),
            ("expiry-time=\"20300101\"", "say `expires` instead"),
            ("from=\"a\",from=\"b\"", "from of a key stands twice"),
            ("principals=\"a\"", "goes with cert-authority"),
            ("from=10.0.0.0/8", "double quotes"),
            ("from=\"\"", "double quotes"),
            ("from=\"a\\\"b\"", "double quotes"),
            ("from=\"a\"b\"", "double quotes"),
            ("no-pty=\"x\"", "takes no value"),
            ("no-pty,", "ends in a comma"),
            (",no-pty", "option \"\""),
            ("no-pty,,restrict", "option \"\""),
            ("from=\"a b\"", "is not a list"),
            ("no-pty\nrestrict", "not accepted"),
            ("from=\"ü\"", "is not a list"),
        ] {
            let error = bad.parse::<KeyOptions>().unwrap_err();
            assert!(error.contains(expected), "{bad:?}: {error}");
        }
    }

    #[test]
    fn authorities_and_sources_are_known() {
        let options = |text: &str| text.parse::<KeyOptions>().unwrap();
        assert!(options("no-pty,cert-authority").is_authority());
        assert!(!options("restrict").is_authority());
        assert!(options("from=\"cert-authority\"").restricts_source());
        assert!(!options("from=\"cert-authority\"").is_authority());
    }

    proptest::proptest! {
        #[test]
        fn what_is_accepted_has_nothing_that_ends_a_word_or_a_line(text in "[a-z,=\"\\\\ \n-]{0,60}") {
            if let Ok(options) = text.parse::<KeyOptions>() {
                let words = !options.as_str().chars().any(|c| c.is_control() || c == ' ' || c == '\\');
                proptest::prop_assert!(words, "{:?}", text);
            }
        }
    }
}
