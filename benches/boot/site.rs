//! Images that differ in what shuts an instance, and instances of them.
//!
//! May not live here: what is measured.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use portcullis_figures::{Cell, Row, Side};
use portcullis_provision::local::{Image, LaunchRequest};
use portcullis_provision::progress::Quiet;

use crate::benches::recipe::recipe;
use crate::lab::{Lab, Machine, READY_TIME, Run, allow, host};

/// Where something listens, and no rule lets anybody in.
pub const CLOSED: u16 = 9000;

/// What shuts an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    Portcullis,
    /// ufw and `DOCKER-USER`, from a script of user-data.
    Recipe,
    /// firewalld, configured in the image.
    Firewalld,
    /// A table by hand, in the image.
    ByHand,
    /// cloud-init alone.
    Nothing,
}

impl Gate {
    pub const ALL: [Self; 5] = [
        Self::Portcullis,
        Self::Recipe,
        Self::Firewalld,
        Self::ByHand,
        Self::Nothing,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Portcullis => "portcullis",
            Self::Recipe => "ufw and `DOCKER-USER`, by user-data",
            Self::Firewalld => "firewalld, in the image",
            Self::ByHand => "nftables.service, a table in the image",
            Self::Nothing => "cloud-init alone",
        }
    }

    pub fn row(self, cells: Vec<Cell>) -> Row {
        let side = match self {
            Self::Portcullis => Side::Ours,
            Self::Recipe | Self::Firewalld | Self::ByHand => Side::Theirs,
            Self::Nothing => Side::Floor,
        };
        Row {
            name: self.name().to_owned(),
            side,
            beside: None,
            cells,
        }
    }

    /// Debian's packages that it needs.
    pub fn packages(self) -> &'static [&'static str] {
        match self {
            Self::Recipe => &["ufw", "iptables"],
            // It reads /etc/protocols.
            Self::Firewalld => &["firewalld", "netbase"],
            Self::Portcullis | Self::ByHand | Self::Nothing => &[],
        }
    }

    /// Applies it again, on an instance where it is.
    pub fn again(self) -> &'static str {
        match self {
            Self::Portcullis => "systemctl restart portcullis",
            Self::Recipe => "sh /etc/recipe.sh",
            Self::Firewalld => "firewall-cmd --reload",
            Self::ByHand => "systemctl restart nftables",
            Self::Nothing => "true",
        }
    }

    /// Adds to the image what an image builder, or user-data, would.
    fn bake(self, folder: &Path) {
        let put = |path: &str, text: &str, mode: u32| {
            let file = folder.join(path);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, text).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
        };
        put("etc/listener.py", LISTENER, 0o644);
        put("etc/systemd/system/listener.service", LISTENER_UNIT, 0o644);
        wanted(
            folder,
            "sysinit.target",
            "listener.service",
            "../listener.service",
        );
        // Agents of clouds are started when their memory is looked at: they would hold up a boot elsewhere.
        for unit in [
            "google-guest-agent",
            "google-startup-scripts",
            "google-shutdown-scripts",
            "walinuxagent",
        ] {
            let unit = folder.join(format!("etc/systemd/system/{unit}.service"));
            symlink("/dev/null", unit).unwrap();
        }
        if self != Self::Portcullis {
            // What the user-data starts.
            put(
                "etc/systemd/system/portcullis.service",
                "[Service]\nExecStart=true\n",
                0o644,
            );
        }
        match self {
            Self::Portcullis | Self::Nothing => {}
            Self::Recipe => {
                put("etc/recipe.sh", &recipe(&[22, 8080], &[8080]), 0o755);
                // At the same place of the boot as `runcmd`.
                put(
                    "var/lib/cloud/scripts/per-instance/recipe.sh",
                    "#!/bin/sh\nexec sh /etc/recipe.sh\n",
                    0o755,
                );
            }
            Self::Firewalld => {
                put(
                    "etc/firewalld/firewalld.conf",
                    "DefaultZone=closed\nFirewallBackend=nftables\n",
                    0o644,
                );
                put("etc/firewalld/zones/closed.xml", ZONE, 0o644);
                put("etc/systemd/system/firewalld.service", FIREWALLD_UNIT, 0o644);
            }
            Self::ByHand => {
                put("etc/nftables.conf", TABLE, 0o755);
                let unit = "/lib/systemd/system/nftables.service";
                wanted(folder, "sysinit.target", "nftables.service", unit);
            }
        }
    }
}

fn wanted(folder: &Path, target: &str, unit: &str, to: &str) {
    let wants = folder.join(format!("etc/systemd/system/{target}.wants"));
    fs::create_dir_all(&wants).unwrap();
    symlink(to, wants.join(unit)).unwrap();
}

/// Echoes on the closed port as soon as there are processes.
const LISTENER: &str = r#"
import selectors, socket
selector = selectors.DefaultSelector()
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    s = socket.socket(socket.AF_INET6, kind)
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    s.bind(("::", 9000))
    if kind == socket.SOCK_STREAM:
        s.listen(512)
    selector.register(s, selectors.EVENT_READ, kind)
while True:
    for key, _ in selector.select():
        if key.data == socket.SOCK_STREAM:
            key.fileobj.accept()[0].close()
        else:
            try:
                data, peer = key.fileobj.recvfrom(2048)
                key.fileobj.sendto(data, peer)
            except OSError:
                pass
"#;

const LISTENER_UNIT: &str = "[Unit]\nDefaultDependencies=no\nBefore=network-pre.target\n[Service]\nExecStart=python3 /etc/listener.py\n";

const ZONE: &str = r#"<?xml version="1.0" encoding="utf-8"?>
<zone target="DROP"><short>Closed</short>
<port port="22" protocol="tcp"/><port port="8080" protocol="tcp"/><port port="8080" protocol="udp"/>
</zone>
"#;

/// Debian's, but not before network-pre.target: cloud-init is before sysinit.target and after the network, and this
/// one is after sysinit.target (firewalld#414), so that one of the two would not be started.
const FIREWALLD_UNIT: &str = "[Unit]
Before=network.target
After=dbus.service
[Service]
ExecStart=/usr/sbin/firewalld --nofork --nopid
Type=dbus
BusName=org.fedoraproject.FirewallD1
[Install]
WantedBy=multi-user.target
";

/// As the gate's: before DNAT, so that it covers containers too.
const TABLE: &str = "#!/usr/sbin/nft -f
flush ruleset
table inet own {
    chain in {
        type filter hook prerouting priority mangle; policy drop;
        iifname != \"eth0\" accept
        ct state established,related accept
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert } accept
        tcp dport { 22, 8080 } accept
        udp dport 8080 accept
    }
}
";

pub struct Site {
    pub lab: Lab,
}

impl Site {
    pub fn new() -> Self {
        let site = Self { lab: Lab::new() };
        for gate in Gate::ALL {
            gate.bake(&site.overlay(gate));
            // Making it takes longer than anybody wants to be timed.
            site.image(gate, &[]);
        }
        site
    }

    fn overlay(&self, gate: Gate) -> std::path::PathBuf {
        self.lab.path(&format!("{gate:?}").to_lowercase())
    }

    /// An instance with this gate, and packages besides.
    pub fn request(&self, gate: Gate, packages: &[&str]) -> LaunchRequest {
        let mut request = self.lab.request("one", "c-1");
        request.rules = vec![allow("22/tcp"), allow("8080/tcp"), allow("8080/udp")];
        if gate != Gate::Portcullis {
            request.image.deb = None;
            request.image.allow_without_agent = true;
        }
        let all = gate.packages().iter().chain(packages);
        request.image.packages = all.map(|name| (*name).to_owned()).collect();
        request.image.overlay = Some(self.overlay(gate));
        request
    }

    pub fn image(&self, gate: Gate, packages: &[&str]) -> Image {
        let request = self.request(gate, packages);
        self.lab.provider.ensure_image(&request.image, &Quiet).unwrap()
    }

    /// Boots one, and waits until all of its boot is over.
    pub fn launch(&self, gate: Gate, packages: &[&str]) -> Machine {
        self.lab
            .provider
            .launch(&self.request(gate, packages), &Quiet)
            .unwrap();
        self.booted(gate)
    }

    /// The instance, once it is ready and its boot is over.
    pub fn booted(&self, gate: Gate) -> Machine {
        if gate == Gate::Portcullis {
            portcullis_provision::wait::wait(&self.lab.provider, "one", READY_TIME, &Quiet).unwrap();
        }
        let machine = self.lab.machine("one");
        // A script of user-data may fail; that is for the table to show.
        machine.run("systemctl is-system-running --wait");
        machine.ok("test -e /run/cloud-init/result.json");
        machine
    }

    pub fn end(&self) {
        self.lab.provider.terminate(&["one"]).unwrap();
    }

    /// What it is compared with: the packages of the images, which are those of this machine's Debian.
    pub fn versions(&self) -> Vec<String> {
        let machine = self.launch(Gate::Nothing, &[]);
        let inside = |name: &str| machine.ok(&format!("dpkg-query -W -f '${{Package}} ${{Version}}' {name}"));
        let mut versions: Vec<String> = ["cloud-init", "nftables", "systemd"].map(inside).into();
        self.end();
        for package in ["ufw", "firewalld"] {
            let shown = host("apt-cache")
                .args(["show", "--no-all-versions", package])
                .succeed();
            let version = shown.lines().find_map(|line| line.strip_prefix("Version: "));
            versions.push(format!("{package} {}", version.unwrap_or_default()));
        }
        versions
    }
}
