//! What users would take instead: how each of them shuts a host, and shuts it again with one port more.
//!
//! May not live here: measuring.

use std::time::Duration;

use portcullis_figures::timed;

use crate::benches::recipe::recipe;
use crate::common::eventually;
use crate::sandbox::{self, PATIENCE, Server, must};

const SCRIPT: &str = "/run/recipe";
const FILE: &str = "/run/table.nft";

/// A table by hand, which takes the place of the one before in one transaction.
fn table(ports: &[u16]) -> String {
    let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
    format!(
        "table inet own\ndelete table inet own\ntable inet own {{ chain in {{\n\
         type filter hook prerouting priority mangle; policy drop;\n\
         iifname lo accept\nct state established,related accept\n\
         icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert }} accept\n\
         tcp dport {{ {} }} accept\n}}\n}}\n",
        ports.join(", ")
    )
}

/// A program that shuts a host. All of it happens in a sandbox of its own.
pub trait Contender: Sync {
    /// For the table.
    fn name(&self) -> &'static str;

    /// What runs as long as the sandbox is used, before anything is shut.
    fn stage(&self) -> Vec<Server> {
        Vec::new()
    }

    /// Shuts it, from nothing, with these ports open to anybody.
    fn shut(&self, ports: &[u16], _running: &mut Vec<Server>) -> Duration {
        self.prepare(ports);
        must(&self.again(ports))
    }

    /// The command that does it again.
    fn again(&self, ports: &[u16]) -> String;

    /// What has to be in place before [`Contender::again`] is timed.
    fn prepare(&self, _ports: &[u16]) {}
}

/// ufw and `DOCKER-USER`.
pub struct Recipe;

impl Contender for Recipe {
    fn name(&self) -> &'static str {
        "ufw and `DOCKER-USER`, a script"
    }

    fn again(&self, _: &[u16]) -> String {
        format!("sh {SCRIPT}")
    }

    fn prepare(&self, ports: &[u16]) {
        std::fs::write(SCRIPT, recipe(ports, &[])).unwrap();
    }
}

/// A file that somebody wrote, loaded with nft(8).
pub struct ByHand;

impl Contender for ByHand {
    fn name(&self) -> &'static str {
        "`nft -f`, a table by hand"
    }

    fn again(&self, _: &[u16]) -> String {
        format!("nft -f {FILE}")
    }

    fn prepare(&self, ports: &[u16]) {
        std::fs::write(FILE, table(ports)).unwrap();
    }
}

/// firewalld with its zone `drop`: the service and its bus, in private.
pub struct Firewalld;

/// The bus that it speaks over.
pub fn bus() -> Server {
    std::fs::create_dir_all("/run/dbus").unwrap();
    Server::start("dbus-daemon --system --nofork --nopidfile --nosyslog")
}

impl Contender for Firewalld {
    fn name(&self) -> &'static str {
        "firewalld, zone `drop`"
    }

    fn stage(&self) -> Vec<Server> {
        vec![bus()]
    }

    fn shut(&self, ports: &[u16], running: &mut Vec<Server>) -> Duration {
        must("firewall-offline-cmd --set-default-zone=drop");
        for port in ports {
            must(&format!("firewall-offline-cmd --zone=drop --add-port={port}/tcp"));
        }
        let (time, ()) = timed(|| {
            running.push(Server::start("firewalld --nofork"));
            let is_up = || sandbox::command("firewall-cmd --state");
            let _ = eventually(PATIENCE, "firewalld runs", is_up);
        });
        time
    }

    fn again(&self, _: &[u16]) -> String {
        format!("sh {SCRIPT}")
    }

    fn prepare(&self, ports: &[u16]) {
        let port = ports.last().unwrap();
        let lines =
            format!("firewall-cmd --permanent --zone=drop --add-port={port}/tcp && firewall-cmd --reload");
        std::fs::write(SCRIPT, lines).unwrap();
    }
}
