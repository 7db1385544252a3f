//! The requirements that checks answer for, by their ids; SECURITY.md lists them all.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

macro_rules! requirements {
    ($($variant:ident = $id:literal, $text:literal;)*) => {
        /// A requirement of the security model.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        pub enum Requirement {
            $(#[doc = $text] #[serde(rename = $id)] $variant,)*
        }

        impl Requirement {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The id, as documents cite it.
            pub fn id(self) -> &'static str {
                match self { $(Self::$variant => $id),* }
            }

            /// What it asks for.
            pub fn text(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
            }
        }
    };
}

requirements! {
    BrevSsh1 = "BREV-SSH-1", "An SSH server is installed, running and accessible.";
    BrevSsh2 = "BREV-SSH-2", "Key-based authentication works.";
    BrevSsh3 = "BREV-SSH-3", "Public keys are injected while the instance is provisioned.";
    BrevSsh4 = "BREV-SSH-4", "SSH is reachable through the configured firewall rules, and only so.";
    BrevSys1 = "BREV-SYS-1", "systemd runs and answers through systemctl.";
    BrevNet1 = "BREV-NET-1", "Inbound is denied by default: all ports, protocols, sources, IPv4 and IPv6, host and containers.";
    BrevNet2 = "BREV-NET-2", "Inbound is granted only by explicit firewall rules, which can be changed after launch.";
    BrevNet3 = "BREV-NET-3", "Outbound is unrestricted by default.";
    BrevClu1 = "BREV-CLU-1", "Instances of one cluster reach each other on all ports and protocols.";
    BrevClu2 = "BREV-CLU-2", "From outside the cluster, inbound stays denied.";
    BrevClu3 = "BREV-CLU-3", "Clusters are isolated from each other unless explicitly configured.";
    BrevData1 = "BREV-DATA-1", "Persistent storage is encrypted at rest.";
    BrevData2 = "BREV-DATA-2", "Every network communication of ours uses TLS 1.2 or newer.";
    BrevData3 = "BREV-DATA-3", "Industry-standard algorithms, reported by name.";
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.id())
    }
}
