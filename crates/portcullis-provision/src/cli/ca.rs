//! `portcullisctl ca`: the control plane's authority.
//!
//! May not live here: certificates themselves (the library's `ca`).

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Context, duration, output};
use portcullis_protocol::Secret;
use portcullis_protocol::access::Role;

use crate::ca::{Ca, ClientName, certificate_path, write_private};
use crate::local::external_ids;
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
  curl --cert client.pem --key client.key --insecure https://10.77.0.2:7443/v1/health
  portcullisctl ca client --role observer --name grafana --lifetime 12h --out ./grafana")]
    Client {
        /// What its holder may do: observer reads, network and keys change those too, operator does all
        #[arg(long, default_value_t = Role::Operator)]
        role: Role,
        /// The certificate's common name, for logs
        #[arg(long, default_value = "control-plane")]
        name: String,
        /// An external id of instances that it is for; those of all instances here, if left out
        #[arg(long, value_name = "ID")]
        external_id: Vec<String>,
        /// How long it is valid; an instance refuses what is valid for more than 24 h in all, the 5 minutes
        /// before now included, unless its owner set another limit
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
            Command::Client {
                role,
                name,
                external_id,
                lifetime,
                out,
            } => {
                let external_ids = match external_id.is_empty() {
                    true => external_ids(&context.state_dir)?,
                    false => external_id.iter().map(Secret::new).collect(),
                };
                let issued = Ca::open(&folder)
                    .map_err(|e| Error::Failed(format!("{e}; `portcullisctl ca init` makes an authority")))?
                    .issue_for(&ClientName {
                        name: name.clone(),
                        role: *role,
                        external_ids,
                        lifetime: *lifetime,
                    })?;
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
