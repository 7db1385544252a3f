//! `portcullisctl userdata`: a spec as cloud-init user-data.
//!
//! May not live here: the rendering (the library's `userdata`).

use std::io::Read as _;
use std::path::PathBuf;

use portcullis_protocol::Spec;

use super::output;
use crate::userdata::{UserDataOptions, render};
use crate::{Error, Result};

#[derive(clap::Args)]
#[command(after_help = "Example:\n  portcullisctl userdata --spec spec.json > user-data")]
pub(super) struct Arguments {
    /// The spec; `-` reads standard input
    #[arg(long, value_name = "FILE")]
    spec: PathBuf,
    /// Don't make the users that the keys are for
    #[arg(long)]
    no_create_users: bool,
    /// Don't let those users become root
    #[arg(long)]
    no_sudo: bool,
}

impl Arguments {
    pub(super) fn run(&self) -> Result<u8> {
        let mut json = Vec::new();
        if self.spec.as_os_str() == "-" {
            std::io::stdin()
                .read_to_end(&mut json)
                .map_err(Error::file("read", &self.spec))?;
        } else {
            json = std::fs::read(&self.spec)
                .map_err(|e| Error::BadInput(format!("can't read {}: {e}", self.spec.display())))?;
        }
        let spec = Spec::from_json(&json).map_err(|error| {
            let lines = error
                .problems
                .iter()
                .map(|problem| format!("{}: {problem}", self.spec.display()));
            Error::BadInput(lines.collect::<Vec<_>>().join("\n"))
        })?;
        let options = UserDataOptions {
            create_users: !self.no_create_users,
            sudo: !self.no_sudo,
        };
        output::print(&render(&spec, &options));
        Ok(0)
    }
}
