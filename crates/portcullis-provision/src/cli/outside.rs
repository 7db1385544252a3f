//! `portcullisctl outside`: a program of this machine, run where the control plane of local instances is.
//!
//! May not live here: how it is told what to do.

use std::ffi::OsString;
use std::process::Command;

use super::Context;
use super::known_hosts::run_to_its_end;
use crate::local::require;
use crate::{Error, Result};

#[derive(clap::Args)]
#[command(after_help = "\
The program is in the local instances' network and outside of all of them: their control plane, and to
everything but their API a stranger. The exit code is the program's.

Example:
  portcullisctl outside -- curl -sk https://10.77.0.2:7443/readyz")]
pub(super) struct Arguments {
    /// The program and its arguments
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

impl Arguments {
    pub(super) fn run(&self, context: &Context) -> Result<u8> {
        require("nsenter")?;
        let network = context.provider()?.network().path();
        if !network.exists() {
            let text = "there is no network: it comes with the first instance, `portcullisctl launch`";
            return Err(Error::BadInput(text.to_owned()));
        }
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", network.display())).arg("--");
        run_to_its_end(command.args(&self.command))
    }
}
