//! The bill of materials: CycloneDX 1.6 as JSON (ECMA-424). It names every package that is compiled into the
//! agent or that takes part in compiling it, with version, licence and hash, and who needs whom. The same sources
//! make the same bytes: no serial number, no path, and a time only from SOURCE_DATE_EPOCH.
//!
//! cargo-cyclonedx was weighed: minutes to compile on a fresh machine, and references that hold the path of the
//! build, so that two builds in two folders differ.
//! May not live here: asking Cargo (`cargo`).

use std::io;

use serde_json::{Value, json};

use crate::cargo::{Id, Package, Resolved, resolved};
use crate::changelog::epoch;

/// The document.
///
/// # Errors
/// As [`resolved`].
pub fn document() -> io::Result<String> {
    Ok(of(&resolved()?, epoch()?))
}

fn of(resolved: &Resolved, time: Option<i64>) -> String {
    let others = resolved.packages.iter().filter(|(id, _)| **id != resolved.root);
    let components: Vec<Value> = others
        .map(|(id, package)| component(id, package, "library"))
        .collect();
    let dependencies: Vec<Value> = resolved
        .packages
        .iter()
        .map(|(id, package)| json!({"ref": purl(id), "dependsOn": package.needs.iter().map(purl).collect::<Vec<_>>()}))
        .collect();
    let mut metadata = json!({
        "component": component(&resolved.root, &resolved.packages[&resolved.root], "application"),
        "tools": {"components": [{"type": "application", "name": "xtask", "version": env!("CARGO_PKG_VERSION")}]},
    });
    if let Some(time) = time.and_then(|time| jiff::Timestamp::from_second(time).ok()) {
        metadata["timestamp"] = time.to_string().into();
    }
    let document = json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": metadata,
        "components": components,
        "dependencies": dependencies,
    });
    format!("{document:#}\n")
}

/// A package's URL (ECMA-427), which is its name within the document too.
fn purl((name, version): &Id) -> String {
    // A `+` stands before a version's build data.
    format!("pkg:cargo/{name}@{}", version.replace('+', "%2B"))
}

fn component(id: &Id, package: &Package, kind: &str) -> Value {
    let mut component =
        json!({"type": kind, "bom-ref": purl(id), "name": id.0, "version": id.1, "purl": purl(id)});
    if let Some(license) = &package.license {
        component["licenses"] = json!([{"expression": license}]);
    }
    if let Some(checksum) = &package.checksum {
        component["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
    }
    component
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn it_says_what_was_resolved() {
        let id = |name: &str| (name.to_owned(), "1.0.0+x".to_owned());
        let packages = BTreeMap::from([
            (
                id("agent"),
                Package {
                    needs: [id("lib")].into(),
                    ..Package::default()
                },
            ),
            (
                id("lib"),
                Package {
                    license: Some("MIT".to_owned()),
                    checksum: Some("00ff".to_owned()),
                    ..Package::default()
                },
            ),
        ]);
        let resolved = Resolved {
            root: id("agent"),
            packages,
        };
        let document: Value = serde_json::from_str(&of(&resolved, Some(0))).unwrap();
        assert_eq!(document["metadata"]["timestamp"], "1970-01-01T00:00:00Z");
        assert_eq!(document["metadata"]["component"]["name"], "agent");
        let lib = &document["components"][0];
        assert_eq!(lib["purl"], "pkg:cargo/lib@1.0.0%2Bx");
        assert_eq!(lib["hashes"][0]["content"], "00ff");
        assert_eq!(lib["licenses"][0]["expression"], "MIT");
        assert_eq!(document["dependencies"][0]["dependsOn"][0], lib["bom-ref"]);
        assert!(!of(&resolved, None).contains("timestamp"));
    }
}
