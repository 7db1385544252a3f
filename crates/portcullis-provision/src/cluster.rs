//! Who belongs to a cluster, changed after launch: each member is told of each other through its agent's
//! API (BREV-CLU-4).
//!
//! May not live here: how an agent is asked (`client`), what peers may do (the agent).

use portcullis_protocol::spec::Name;
use portcullis_protocol::{Cluster, Peer, Spec};
use serde::Serialize;

use crate::ca::ClientCertificate;
use crate::client::{Changed, ClientError, Terms};
use crate::local::{Instance, LocalProvider};
use crate::{Error, Result};

/// How often a spec is read again because somebody else changed it meanwhile.
const TRIES: usize = 5;

/// A member of a cluster, and who it lets in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: String,
    /// Its addresses.
    pub addresses: [std::net::IpAddr; 2],
    /// The instances that it lets in on all ports, as its agent says; none if that could not be asked.
    pub peers: Option<Vec<Peer>>,
}

impl LocalProvider {
    /// The members of a cluster by name, each with the peers that its agent names.
    ///
    /// # Errors
    /// When a record can't be read.
    pub fn cluster(&self, cluster: &str) -> Result<Vec<Member>> {
        let certificate = self.client_certificate()?;
        let mut members = self.list()?;
        members.retain(|member| member.cluster() == Some(cluster));
        let members = members.iter_mut().map(|member| {
            let spec = member.ask(&certificate, async |client| client.spec().await).ok();
            Member {
                name: member.name().to_owned(),
                id: member.id().to_owned(),
                addresses: member.addresses(),
                peers: spec.map(|spec| spec.cluster.map(|c| c.peers).unwrap_or_default()),
            }
        });
        Ok(members.collect())
    }

    /// Makes an instance a member: it lets all others in, and they let it in. Members that were told before
    /// are not told again, so it can be tried again.
    ///
    /// # Errors
    /// When it is in another cluster, or when a member can't be told: all others are told, and the message
    /// names those that were not.
    pub fn join(&self, cluster: &str, name: &str) -> Result<()> {
        let id: Name = cluster
            .parse()
            .map_err(|reason| Error::BadInput(format!("cluster: {reason}")))?;
        let certificate = self.client_certificate()?;
        let mut new = self.get(name)?;
        new.refresh(&certificate)?;
        if let Some(other) = new.cluster().filter(|other| *other != cluster) {
            return Err(Error::BadInput(format!(
                "{name} is in cluster {other}: `portcullisctl cluster leave {name}` first"
            )));
        }
        let mut others = self.list()?;
        others.retain(|other| other.cluster() == Some(cluster) && other.name() != name);
        let peers = others.iter().map(Instance::as_peer).collect::<Result<Vec<_>>>()?;
        // First the one that joins: nobody has to let in who does not take part.
        new.change_spec(&certificate, |spec| {
            let joined = spec.cluster.get_or_insert(Cluster {
                id: id.clone(),
                peers: Vec::new(),
            });
            joined
                .peers
                .retain(|old| !peers.iter().any(|peer| peer.instance == old.instance));
            joined.peers.extend(peers.iter().cloned());
        })?;
        let peer = new.as_peer()?;
        tell(&mut others, |other| {
            other
                .change(&certificate, async |client| client.add_peer(&peer).await)
                .map(drop)
        })
    }

    /// Takes an instance out of its cluster: nobody there lets it in any more, and it lets nobody of them in.
    ///
    /// # Errors
    /// When it is in none, or when a member can't be told: all others are told, and the message names those
    /// that were not.
    pub fn leave(&self, name: &str) -> Result<()> {
        let certificate = self.client_certificate()?;
        let mut gone = self.get(name)?;
        let id = gone.id().to_owned();
        let mut others = self.list()?;
        // Whoever still names it, so that a second try finds those that could not be told before.
        others.retain(|other| {
            let mut peers = other.spec().cluster.iter().flat_map(|c| &c.peers);
            other.name() != name && peers.any(|peer| peer.instance.as_str() == id)
        });
        if gone.cluster().is_none() && others.is_empty() {
            return Err(Error::BadInput(format!("{name} is in no cluster")));
        }
        // It was asked for by name: that the last peer goes is meant.
        let force = Terms {
            force: true,
            ..Terms::default()
        };
        let told = tell(&mut others, |other| {
            other.change(&certificate, async |client| {
                match client.revoke_peer(&id, force).await {
                    Err(ClientError::Status { status: 404, .. }) => Ok(()),
                    revoked => revoked.map(drop),
                }
            })
        });
        gone.change_spec(&certificate, |spec| spec.cluster = None)?;
        told
    }
}

impl Instance {
    /// Asks for a change of its accepted spec; tries again if somebody else changed it meanwhile. It is made
    /// even if it cuts somebody off. No change is none.
    ///
    /// # Errors
    /// When the agent does not answer, is not who was pinned, or refuses.
    fn change_spec(
        &mut self,
        certificate: &ClientCertificate,
        change: impl Fn(&mut Spec) + Sync,
    ) -> Result<()> {
        let force = Terms {
            force: true,
            ..Terms::default()
        };
        self.change(certificate, async |client| {
            let mut tries = 0..TRIES;
            loop {
                let before = client.spec().await?;
                let known = before.generation.get();
                let mut after = before.clone();
                change(&mut after);
                if after == before {
                    return Ok(None);
                }
                after.generation = after.generation.next();
                match client.replace_spec(&after, known, force).await {
                    Err(ClientError::Status { status: 412, .. }) if tries.next().is_some() => {}
                    result => return result.map(Some),
                }
            }
        })
        .map(|_: Option<Changed>| ())
    }
}

/// Tells all, and says who could not be told.
fn tell(members: &mut [Instance], mut tell: impl FnMut(&mut Instance) -> Result<()>) -> Result<()> {
    let failures: Vec<String> = members
        .iter_mut()
        .filter_map(|member| tell(member).err())
        .map(|error| error.to_string())
        .collect();
    if failures.is_empty() {
        return Ok(());
    }
    Err(Error::Failed(format!(
        "not all members were told; say it again when they can be reached: {}",
        failures.join("; ")
    )))
}
