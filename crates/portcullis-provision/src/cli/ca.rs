//! `portcullisctl ca`: the control plane's authority.
//!
//! May not live here: certificates themselves (the library's `ca`).

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Context, duration, output};
use crate::ca::{Ca, certificate_path, write_private};
use crate::{Error, Result};

#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Make an authority, and print where its certificate is
    Init,
    /// Issue a short-lived client certificate, and its key
    #[command(after_help = "\
Example:
  portcullisctl ca client --lifetime 15m --out ./client
  curl --cert client.pem --key client.key --insecure https://10.77.0.2:7443/v1/health")]
    Client {
        /// The certificate's common name
        #[arg(long, default_value = "control-plane")]
        role: String,
        /// How long it is valid
        #[arg(long, default_value = "1h", value_parser = duration)]
        lifetime: Duration,
        /// Where to write it: OUT.pem and OUT.key (mode 0600)
        #[arg(long, value_name = "OUT", default_value = "client")]
        out: PathBuf,
    },
}

impl Arguments {
    pub(super) fn run(&self, context: &Context) -> Result<u8> {
        let folder = context.state_dir.join("ca");
        let paths = match &self.command {
            Command::Init => {
                Ca::init(&folder)?;
                vec![("certificate", certificate_path(&folder))]
            }
            Command::Client { role, lifetime, out } => {
                let issued = Ca::open(&folder)
                    .map_err(|e| Error::Failed(format!("{e}; `portcullisctl ca init` makes an authority")))?
                    .issue(role, *lifetime)?;
                let (certificate, key) = (with_suffix(out, ".pem"), with_suffix(out, ".key"));
                write_private(&key, &issued.key_pem)?;
                write_private(&certificate, &issued.certificate_pem)?;
                vec![("certificate", certificate), ("key", key)]
            }
        };
        if context.json() {
            let map: std::collections::BTreeMap<_, _> = paths.into_iter().collect();
            output::print_json(&map)?;
        } else {
            for (what, path) in paths {
                output::print(&format!("{what}: {}\n", path.display()));
            }
        }
        Ok(0)
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}
