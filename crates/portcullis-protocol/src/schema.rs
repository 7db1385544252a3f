//! JSON Schema (draft 2020-12) of the public formats, made from the types themselves.

use crate::{Report, Spec};

/// Schema of the spec.
pub fn spec() -> serde_json::Value {
    schemars::schema_for!(Spec).to_value()
}

/// Schema of the health report.
pub fn report() -> serde_json::Value {
    schemars::schema_for!(Report).to_value()
}

#[cfg(test)]
mod tests {
    /// The files that ship are what the types say. Set `UPDATE_SCHEMA=1` to write them anew.
    #[test]
    fn shipped_schemas_are_current() {
        for (name, schema) in [("spec", super::spec()), ("report", super::report())] {
            let path = format!(
                "{}/../../docs/schema/{name}.schema.json",
                env!("CARGO_MANIFEST_DIR")
            );
            let text = serde_json::to_string_pretty(&schema).unwrap() + "\n";
            if std::env::var_os("UPDATE_SCHEMA").is_some() {
                std::fs::write(&path, &text).unwrap();
            }
            assert_eq!(
                std::fs::read_to_string(&path).unwrap(),
                text,
                "{path}: run `make schema`"
            );
        }
    }
}
