//! Which interfaces may talk to the instance unfiltered: those that only its own containers use.
//!
//! An interface is internal only if that can be shown from its kind, its ports and its routes. What
//! is unknown counts as an uplink and is filtered. Never decided by a name, except by names that the
//! owner wrote into the settings.

use std::collections::BTreeSet;

/// What the kernel says of a link, with what the routing table says of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// `IFLA_INFO_KIND`, for example `veth`; none for a physical device.
    pub kind: Option<String>,
    /// Index of the bridge or bond that it is a port of.
    pub controller: Option<u32>,
    /// Whether a default route of any table leads through it.
    pub has_default_route: bool,
    /// Whether it has an address beyond the link-local scope.
    pub has_address: bool,
    /// Whether a route to a single host leads through it.
    pub has_host_route: bool,
}

/// The owner's word on interfaces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkSettings {
    /// Always filtered, whatever they look like.
    pub uplinks: BTreeSet<String>,
    /// Never filtered: overlay networks whose members are all trusted.
    pub trusted: BTreeSet<String>,
}

/// Names of the interfaces whose packets the gate lets pass (besides loopback).
pub fn internal(links: &[Link], settings: &LinkSettings) -> BTreeSet<String> {
    let proven = links
        .iter()
        .filter(|link| !is_uplink(link, settings) && is_local(link, links, settings));
    proven
        .map(|link| link.name.clone())
        .chain(settings.trusted.iter().cloned())
        .collect()
}

fn is_uplink(link: &Link, settings: &LinkSettings) -> bool {
    link.has_default_route || settings.uplinks.contains(&link.name)
}

/// Only containers and virtual machines of this host can be behind the link.
fn is_local(link: &Link, links: &[Link], settings: &LinkSettings) -> bool {
    match link.kind.as_deref() {
        // A bridge is as local as its ports; one without ports reaches nobody.
        Some("bridge") => links
            .iter()
            .filter(|port| port.controller == Some(link.index))
            .all(|port| !is_uplink(port, settings) && matches!(port.kind.as_deref(), Some("veth" | "tun"))),
        // A pod's end, as routed container networks (Calico and its like) make it: no address of its
        // own, and a route to the one host behind it. An instance that is itself a container has an
        // address on its veth, and so is not taken for one.
        Some("veth") => link.controller.is_none() && !link.has_address && link.has_host_route,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, kind: &str) -> Link {
        let kind = (!kind.is_empty()).then(|| kind.to_owned());
        Link {
            index,
            name: name.to_owned(),
            kind,
            ..Link::default()
        }
    }

    fn names(links: &[Link], settings: &LinkSettings) -> Vec<String> {
        internal(links, settings).into_iter().collect()
    }

    #[test]
    fn unknown_and_physical_links_are_uplinks() {
        let links = [
            link(1, "eth0", ""),
            link(2, "wt0", "wireguard"),
            link(3, "eth1", "veth"),
            link(4, "vlan7", "vlan"),
            link(5, "bond0", "bond"),
            // What comes by a tunnel has an outer address that may be forged.
            link(6, "flannel.1", "vxlan"),
            link(7, "genev_sys_6081", "geneve"),
            link(8, "tunl0", "ipip"),
            link(9, "gre1", "gre"),
        ];
        assert!(names(&links, &LinkSettings::default()).is_empty());
    }

    #[test]
    fn a_bridge_is_as_local_as_its_ports() {
        let port = |index, kind: &str| Link {
            controller: Some(9),
            ..link(index, "p", kind)
        };
        let bridge = link(9, "any-name", "bridge");
        let settings = LinkSettings::default();
        assert_eq!(names(std::slice::from_ref(&bridge), &settings), ["any-name"]);
        assert_eq!(
            names(&[bridge.clone(), port(1, "veth"), port(2, "tun")], &settings),
            ["any-name"]
        );
        assert!(names(&[bridge.clone(), port(1, "veth"), port(2, "")], &settings).is_empty());
        assert!(names(&[bridge.clone(), port(1, "vxlan")], &settings).is_empty());
        assert!(
            names(
                &[Link {
                    has_default_route: true,
                    ..bridge
                }],
                &settings
            )
            .is_empty()
        );
    }

    #[test]
    fn a_routed_pod_is_local_and_a_container_instance_is_not() {
        let pod = Link {
            has_host_route: true,
            ..link(1, "x", "veth")
        };
        let uplink = Link {
            has_address: true,
            ..pod.clone()
        };
        let settings = LinkSettings::default();
        assert_eq!(names(std::slice::from_ref(&pod), &settings), ["x"]);
        assert!(names(&[uplink], &settings).is_empty());
        let forced = LinkSettings {
            uplinks: ["x".to_owned()].into(),
            ..LinkSettings::default()
        };
        assert!(names(&[pod], &forced).is_empty());
    }

    #[test]
    fn trusted_links_are_let_pass_before_they_exist() {
        let settings = LinkSettings {
            trusted: ["wt0".to_owned()].into(),
            ..LinkSettings::default()
        };
        assert_eq!(names(&[], &settings), ["wt0"]);
    }
}
