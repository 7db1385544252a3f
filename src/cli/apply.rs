//! `portcullis apply`: a new spec, through the daemon.

use std::path::Path;

use portcullis_protocol::control::{Answer, Request};
use serde_json::json;

use super::status::{ask, unexpected};
use super::{Failure, Format, Global, print, print_json, read_spec, require_root, runtime};

pub fn run(global: &Global, spec: &Path) -> Result<(), Failure> {
    let spec = Box::new(read_spec(spec)?);
    require_root("applying a spec")?;
    for warning in spec.warnings() {
        eprintln!("portcullis: warning: {warning}");
    }
    let socket = global.settings()?.socket;
    let answer = runtime()?.block_on(ask(&socket, &Request::Apply { spec }))?;
    let Answer::Applied {
        generation,
        changed,
        report,
    } = answer
    else {
        return Err(unexpected(&answer));
    };
    match global.format {
        Format::Json => {
            print_json(&json!({"generation": generation, "changed": changed, "ready": report.ready}))
        }
        Format::Table => {
            let what = if changed {
                "is accepted, durable and enforced"
            } else {
                "was accepted already"
            };
            let ready = if report.ready {
                "ready"
            } else {
                "not ready: see `portcullis status`"
            };
            print(&format!("Generation {generation} {what}; {ready}."))
        }
    }
}
