//! `portcullisctl firewall`, `keys` and `cluster`: changes after launch, through the agents' API.
//!
//! May not live here: how an agent is asked (the library).

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use jiff::Timestamp;
use portcullis_protocol::key::KeyLine;
use portcullis_protocol::key_report::{Accepted, KeyReport};
use portcullis_protocol::{
    AuthorizedKey, CheckId, FirewallRule, PortRange, Protocol, RuleId, SourceRange, UserName,
};
use serde_json::json;

use super::{Context, duration, output};
use crate::client::{AgentClient, Changed, ClientError, Terms};
use crate::cluster::Member;
use crate::{Error, Result};

/// Most bytes of a file with one key.
const MAX_KEY_FILE: u64 = 64 << 10;

/// How a change is made that could cut somebody off.
#[derive(Args)]
pub(super) struct TermsArguments {
    /// Make it on trial and confirm it over a new connection; it is taken back after this time, should that
    /// not get through (5s to 24h)
    #[arg(long, value_name = "TIME", value_parser = duration)]
    confirm: Option<Duration>,
    /// Make it even if it could cut somebody off
    #[arg(long)]
    force: bool,
}

impl TermsArguments {
    fn terms(&self) -> Terms {
        Terms {
            confirm: self.confirm,
            force: self.force,
        }
    }
}

/// Asks for a change and prints what came of it.
fn change(
    context: &Context,
    name: &str,
    question: impl AsyncFnOnce(&AgentClient) -> Result<Changed, ClientError> + Send,
) -> Result<u8> {
    let provider = context.provider()?;
    let mut instance = provider.get(name)?;
    let changed = instance.change(&provider.client_certificate()?, question)?;
    if context.json() {
        output::print_json(&changed)?;
        return Ok(0);
    }
    let what = match changed.changed {
        true => "is accepted, durable and enforced",
        false => "held already",
    };
    let ready = if changed.ready { "ready" } else { "not ready" };
    let generation = changed.generation;
    output::print(&format!("{name}: generation {generation} {what}; {ready}\n"));
    Ok(0)
}

/// `portcullisctl firewall`.
#[derive(Subcommand)]
pub(super) enum Firewall {
    /// Show what is let in
    List {
        /// The instance
        name: String,
    },
    /// Let something in, in addition; it is durable and enforced when this returns
    #[command(
        after_help = "Example:\n  portcullisctl firewall add gpu-0 --id web --protocol tcp --port 8080-8090 --source 10.0.0.0/8"
    )]
    Add(AddRule),
    /// Let something in no longer; sessions that it let in end at once
    #[command(after_help = "Example:\n  portcullisctl firewall revoke gpu-0 web")]
    Revoke {
        /// The instance
        name: String,
        /// The rule's name
        id: String,
        #[command(flatten)]
        terms: TermsArguments,
    },
}

#[derive(Args)]
pub(super) struct AddRule {
    /// The instance
    name: String,
    /// The rule's name
    #[arg(long)]
    id: RuleId,
    /// tcp, udp, any (both), icmp (echo requests) or an IP protocol number
    #[arg(long, default_value = "any")]
    protocol: Protocol,
    /// The port, or the first and the last: 80 or 80-90
    #[arg(long, value_name = "PORT[-PORT]")]
    port: Option<PortRange>,
    /// An address or network that it is for; anybody, if left out. Can be repeated
    #[arg(long, value_name = "CIDR")]
    source: Vec<SourceRange>,
}

impl Firewall {
    pub(super) fn run(self, context: &Context) -> Result<u8> {
        match self {
            Self::List { name } => list_rules(context, &name),
            Self::Add(arguments) => {
                let rule = FirewallRule {
                    id: arguments.id,
                    protocol: arguments.protocol,
                    ports: arguments.port,
                    sources: arguments.source,
                };
                change(context, &arguments.name, async |client| {
                    client.add_rule(&rule).await
                })
            }
            Self::Revoke { name, id, terms } => {
                let terms = terms.terms();
                change(context, &name, async |client| {
                    client.revoke_rule(&id, terms).await
                })
            }
        }
    }
}

fn list_rules(context: &Context, name: &str) -> Result<u8> {
    let provider = context.provider()?;
    let certificate = provider.client_certificate()?;
    let spec = provider
        .get(name)?
        .ask(&certificate, async |client| client.spec().await)?;
    let rules = spec.firewall.ingress;
    if context.json() {
        output::print_json(&json!({"generation": spec.generation, "ingress": rules}))?;
        return Ok(0);
    }
    let rows = rules.iter().map(|rule| {
        let sources: Vec<String> = rule.sources.iter().map(ToString::to_string).collect();
        let sources = if sources.is_empty() {
            "anywhere".to_owned()
        } else {
            sources.join(", ")
        };
        let ports = rule
            .ports
            .map_or_else(|| "-".to_owned(), |ports| ports.to_string());
        vec![rule.id.to_string(), rule.protocol.to_string(), ports, sources]
    });
    let header = ["RULE", "PROTOCOL", "PORTS", "SOURCES"];
    output::print(&output::table(&header, rows.collect()));
    Ok(0)
}

/// `portcullisctl keys`.
#[derive(Subcommand)]
pub(super) enum Keys {
    /// Show the keys of all sources, and whether sshd accepts them
    List {
        /// The instance
        name: String,
    },
    /// Let a key in, in addition; it is durable and in place when this returns
    #[command(after_help = "Example:\n  portcullisctl keys add gpu-0 --user ubuntu id_ed25519.pub")]
    Add {
        /// The instance
        name: String,
        /// Whose login it opens
        #[arg(long)]
        user: UserName,
        /// When it ends, as RFC 3339 says times; never, if left out
        #[arg(long, value_name = "TIME")]
        expires: Option<Timestamp>,
        /// The public key, one line; `-` reads standard input
        #[arg(value_name = "FILE|-")]
        file: PathBuf,
    },
    /// Let a key in no longer, whoever named it
    #[command(
        after_help = "Example:\n  portcullisctl keys revoke gpu-0 SHA256:ioWt1wgLzcFiKEMHeMRvL3kvGv4ijTlZ1FEXNNIlfyY"
    )]
    Revoke {
        /// The instance
        name: String,
        /// The key's fingerprint, as `list` and `ssh-keygen -l` show it
        fingerprint: String,
        #[command(flatten)]
        terms: TermsArguments,
    },
}

impl Keys {
    pub(super) fn run(self, context: &Context) -> Result<u8> {
        match self {
            Self::List { name } => list_keys(context, &name),
            Self::Add {
                name,
                user,
                expires,
                file,
            } => {
                let KeyLine { options, key } = read_key(&file)?;
                let key = AuthorizedKey {
                    user,
                    options,
                    key,
                    expires,
                };
                change(context, &name, async |client| client.add_key(&key).await)
            }
            Self::Revoke {
                name,
                fingerprint,
                terms,
            } => {
                let terms = terms.terms();
                change(context, &name, async |client| {
                    client.revoke_key(&fingerprint, terms).await
                })
            }
        }
    }
}

fn read_key(path: &Path) -> Result<KeyLine> {
    let mut text = String::new();
    let read = if path == Path::new("-") {
        std::io::stdin().take(MAX_KEY_FILE).read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(MAX_KEY_FILE).read_to_string(&mut text))
    };
    let bad = |reason: String| Error::BadInput(format!("{}: {reason}", path.display()));
    read.map_err(|e| bad(e.to_string()))?;
    text.trim_end_matches(['\r', '\n']).parse().map_err(bad)
}

fn list_keys(context: &Context, name: &str) -> Result<u8> {
    let provider = context.provider()?;
    let report = provider.get(name)?.health(&provider.client_certificate()?)?;
    let check = report.check(CheckId::KeysInstalled);
    let evidence = check.and_then(|check| check.evidence.get("keys")).cloned();
    let keys: Vec<KeyReport> = serde_json::from_value(evidence.unwrap_or_else(|| json!([])))
        .map_err(|e| Error::Failed(format!("{name}: its report is of another version: {e}")))?;
    if context.json() {
        output::print_json(&json!({"keys": keys}))?;
        return Ok(0);
    }
    let rows = keys.iter().map(|key| {
        let accepted = match key.accepted {
            Accepted::Yes | Accepted::Inferred => "yes",
            Accepted::No => "NO",
            Accepted::NotAsked => "not asked",
            Accepted::Unknown => "unknown",
        };
        let ends = key
            .expires
            .map_or_else(|| "never".to_owned(), |end| format!("{end:.0}"));
        let cells = [
            &key.user,
            &key.algorithm,
            &key.fingerprint,
            &key.comment,
            &key.source,
            &ends,
        ];
        let cells = cells.map(|cell| output::printable(cell)).into_iter();
        cells.chain([accepted.to_owned()]).collect()
    });
    let header = [
        "USER",
        "KEY",
        "FINGERPRINT",
        "COMMENT",
        "FROM",
        "ENDS",
        "ACCEPTED",
    ];
    output::print(&output::table(&header, rows.collect()));
    Ok(0)
}

/// `portcullisctl cluster`.
#[derive(Subcommand)]
pub(super) enum Cluster {
    /// Show the members of a cluster, and whom each lets in
    Show {
        /// The cluster
        id: String,
    },
    /// Make an instance a member: it and all others let each other in, on all ports
    #[command(after_help = "Example:\n  portcullisctl cluster join gpu-7 c-1")]
    Join {
        /// The instance
        name: String,
        /// The cluster
        id: String,
    },
    /// Take an instance out of its cluster: it and the others let each other in no longer
    #[command(after_help = "Example:\n  portcullisctl cluster leave gpu-7")]
    Leave {
        /// The instance
        name: String,
    },
}

impl Cluster {
    pub(super) fn run(self, context: &Context) -> Result<u8> {
        let provider = context.provider()?;
        let (id, done) = match self {
            Self::Show { id } => (id, None),
            Self::Join { name, id } => {
                provider.join(&id, &name)?;
                let done = format!("{name} is in {id}; all its members were told\n");
                (id, Some(done))
            }
            Self::Leave { name } => {
                let cluster = provider.get(&name)?.cluster().map(str::to_owned);
                provider.leave(&name)?;
                let cluster = cluster.unwrap_or_default();
                let done = format!("{name} is in no cluster any more; all members of {cluster} were told\n");
                (cluster, Some(done))
            }
        };
        match (done, context.json()) {
            (Some(done), false) => output::print(&done),
            (_, true) => output::print_json(&json!({"cluster": id, "members": provider.cluster(&id)?}))?,
            (None, false) => output::print(&members(&provider.cluster(&id)?)),
        }
        Ok(0)
    }
}

fn members(members: &[Member]) -> String {
    let rows = members.iter().map(|member| {
        let peers = match &member.peers {
            None => "unknown: it could not be asked".to_owned(),
            Some(peers) => {
                let peers: Vec<&str> = peers.iter().map(|peer| peer.instance.as_str()).collect();
                peers.join(", ")
            }
        };
        let [v4, v6] = member.addresses;
        vec![
            member.name.clone(),
            member.id.clone(),
            format!("{v4}, {v6}"),
            peers,
        ]
    });
    output::table(&["NAME", "ID", "ADDRESSES", "LETS IN"], rows.collect())
}
