//! A string that must not be seen: wiped when dropped, never printed.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, de};
use zeroize::Zeroizing;

/// A secret (enrolment token, external id). `Debug` and `Display` never show it; its memory is
/// wiped on drop (SRE-2).
#[derive(Clone, PartialEq, Eq, Serialize, schemars::JsonSchema)]
#[serde(transparent)]
pub struct Secret(#[schemars(with = "String")] Zeroizing<String>);

impl Secret {
    /// Wraps a secret.
    pub fn new(value: impl Into<String>) -> Self {
        Self(Zeroizing::new(value.into()))
    }

    /// The secret itself. The name is long so that each use stands out in a review.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<'de> Deserialize<'de> for Secret {
    /// An error would show the value that is not text, and errors are logged.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Zeroizing::<String>::deserialize(deserializer);
        text.map(Self)
            .map_err(|_| de::Error::custom("a text is expected"))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_does_not_show_it() {
        assert_eq!(format!("{:?}", Secret::new("hunter2")), "Secret(…)");
    }

    #[test]
    fn an_error_does_not_show_it() {
        for json in ["12345", "[12345]", "{\"12345\":1}", "\"12345"] {
            let error = serde_json::from_str::<Secret>(json).unwrap_err().to_string();
            assert!(
                error.contains("a text is expected") && !error.contains("12345"),
                "{error}"
            );
        }
        assert_eq!(serde_json::from_str::<Secret>("\"x\"").unwrap().expose(), "x");
    }
}
