//! `portcullisctl launch`, `reboot` and `terminate`.
//!
//! May not live here: what a provider does to launch.

use std::path::PathBuf;
use std::time::Duration;

use portcullis_protocol::{FirewallRule, UserName};

use super::health::{Row, print_rows};
use super::{Context, duration, output};
use crate::local::{ImageRequest, LaunchRequest, default_suite, parse_allow, read_keys};
use crate::userdata::UserDataOptions;
use crate::{Error, Result};

#[derive(Clone, Copy, clap::ValueEnum)]
enum Provider {
    /// Instances in namespaces of this machine
    Local,
}

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  portcullisctl launch gpu-0 gpu-1 --cluster c-1 --key id.pub --allow 22/tcp --wait
  portcullisctl launch web --key id.pub --allow 22/tcp@10.77.0.0/24 --allow 8080/tcp --allow icmp")]
pub(super) struct Launch {
    /// Names: 1 to 32 of a-z, 0-9 and '-'
    #[arg(required = true)]
    names: Vec<String>,
    /// Where to launch
    #[arg(long, value_enum, default_value = "local")]
    provider: Provider,
    /// The cluster to join: its members reach each other on all ports
    #[arg(long, value_name = "ID")]
    cluster: Option<String>,
    /// Public keys that log in, one a line
    #[arg(long = "key", value_name = "FILE")]
    keys: Vec<PathBuf>,
    /// What is let in: PORT[-PORT]/PROTOCOL[@CIDR], or icmp
    #[arg(long, value_name = "RULE", value_parser = parse_allow)]
    allow: Vec<FirewallRule>,
    /// For whom the keys are
    #[arg(long, default_value = "ubuntu")]
    user: UserName,
    /// The agent's package [default: the newest in target/debian, or next to this program]
    #[arg(long, value_name = "FILE")]
    deb: Option<PathBuf>,
    /// Debian suite of the image, for example bookworm; this machine's own, if left out
    #[arg(long, value_name = "SUITE")]
    suite: Option<String>,
    /// Don't let the user become root
    #[arg(long)]
    no_sudo: bool,
    /// Wait until all are proven ready
    #[arg(long)]
    wait: bool,
    /// How long to wait for each
    #[arg(long, default_value = "120s", value_parser = duration, requires = "wait")]
    timeout: Duration,
}

impl Launch {
    pub(super) fn run(&self, context: &Context) -> Result<u8> {
        let Provider::Local = self.provider;
        let keys = self.keys.iter().map(|path| read_keys(path));
        let keys = keys.collect::<Result<Vec<_>>>()?.concat();
        let provider = context.provider()?;
        let requests: Vec<LaunchRequest> = self
            .names
            .iter()
            .map(|name| LaunchRequest {
                name: name.clone(),
                cluster: self.cluster.clone(),
                user: self.user.clone(),
                keys: keys.clone(),
                rules: self.allow.clone(),
                user_data: UserDataOptions {
                    sudo: !self.no_sudo,
                    ..UserDataOptions::default()
                },
                image: ImageRequest {
                    suite: self.suite.clone().unwrap_or_else(default_suite),
                    deb: self.deb.clone(),
                    ..ImageRequest::default()
                },
            })
            .collect();
        let progress = context.progress();
        let launched = provider.launch_many(&requests, progress.as_ref())?;
        if self.wait {
            for instance in &launched {
                crate::wait::wait(&provider, instance.name(), self.timeout, progress.as_ref())?;
            }
        }
        drop(progress);
        let certificate = provider.client_certificate()?;
        let mut rows = Vec::new();
        for instance in launched {
            rows.push(Row::new(&mut provider.get(instance.name())?, &certificate));
        }
        print_rows(context, &rows)?;
        Ok(0)
    }
}

#[derive(clap::Args)]
pub(super) struct Reboot {
    /// The instance
    name: String,
}

impl Reboot {
    pub(super) fn run(&self, context: &Context) -> Result<u8> {
        let provider = context.provider()?;
        let progress = context.progress();
        progress.step(&format!("rebooting {}", self.name));
        let mut instance = provider.reboot(&self.name)?;
        drop(progress);
        let row = Row::new(&mut instance, &provider.client_certificate()?);
        print_rows(context, &[row])?;
        Ok(0)
    }
}

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  portcullisctl terminate gpu-0\n  portcullisctl terminate --all")]
pub(super) struct Terminate {
    /// The instances; those that are not there are no error
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    names: Vec<String>,
    /// All instances of the state directory
    #[arg(long)]
    all: bool,
}

impl Terminate {
    pub(super) fn run(&self, context: &Context) -> Result<u8> {
        let provider = context.provider()?;
        let names: Vec<&str> = self.names.iter().map(String::as_str).collect();
        let ended = if self.all {
            provider.terminate_all()
        } else {
            provider.terminate(&names)
        };
        ended.map_err(|e| match e {
            Error::BadInput(_) => e,
            other => Error::Failed(format!("not all is removed: {other}; running it again is safe")),
        })?;
        if context.json() {
            output::print_json(&serde_json::json!({"terminated": self.names, "all": self.all}))?;
        }
        Ok(0)
    }
}
