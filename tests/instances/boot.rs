//! What gets in while an instance boots: a stranger knocks from before its link is up until it is ready.
//!
//! May not live here: what gets in afterwards.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::Path;

use portcullis_protocol::CheckId;
use portcullis_provision::local::{LaunchRequest, Outsider, in_namespace};
use portcullis_provision::progress::Quiet;
use serde_json::Value;

use crate::common::knock::{self, counters, witness};
use crate::lab::{Lab, Machine, Run, allow, inside};

/// Listens on both ports as soon as there are processes, echoes, and asks for something outside until
/// it is answered: a stranger's UDP port, as a name server would be.
const LISTENER: &str = r#"
import selectors, socket
selector = selectors.DefaultSelector()
for port in (9000, 8080):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        s = socket.socket(socket.AF_INET6, kind)
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        s.bind(("::", port))
        if kind == socket.SOCK_STREAM:
            s.listen(512)
        selector.register(s, selectors.EVENT_READ, kind)
outside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
selector.register(outside, selectors.EVENT_READ, None)
answered = False
while True:
    if not answered:
        try:
            outside.sendto(b"?", ("10.77.0.1", 53))
        except OSError:
            pass
    for key, _ in selector.select(None if answered else 0.02):
        try:
            if key.data == socket.SOCK_STREAM:
                key.fileobj.accept()[0].close()
            else:
                data, peer = key.fileobj.recvfrom(2048)
                if key.data is None:
                    answered = True
                    open("/run/answered", "w").close()
                else:
                    key.fileobj.sendto(data, peer)
        except OSError:
            pass
"#;

/// What comes back to the stranger: that somebody listens.
const ANSWERS: &str = "table inet witness {
    counter closed { }
    counter open { }
    chain in {
        type filter hook prerouting priority 0; policy accept;
        tcp sport 9000 tcp flags & (syn|ack) == syn|ack counter name closed
        udp sport 9000 counter name closed
        tcp sport 8080 tcp flags & (syn|ack) == syn|ack counter name open
        udp sport 8080 counter name open
    }
}
";

/// What an image builder would have put in: the witness before everything, the listener beside it.
fn bake(folder: &Path, agent: bool) {
    let units = folder.join("etc/systemd/system");
    fs::create_dir_all(units.join("sysinit.target.wants")).unwrap();
    fs::write(folder.join("etc/witness.nft"), witness()).unwrap();
    fs::write(folder.join("etc/listener.py"), LISTENER).unwrap();
    let early =
        "[Unit]\nDefaultDependencies=no\nBefore=portcullis-lockdown.service network-pre.target\n[Service]\n";
    for (name, service) in [
        (
            "witness.service",
            "Type=oneshot\nRemainAfterExit=yes\nExecStart=nft -f /etc/witness.nft\n",
        ),
        ("listener.service", "ExecStart=python3 /etc/listener.py\n"),
    ] {
        fs::write(units.join(name), format!("{early}{service}")).unwrap();
        symlink(
            format!("../{name}"),
            units.join("sysinit.target.wants").join(name),
        )
        .unwrap();
    }
    if !agent {
        for name in ["portcullis.service", "portcullis-lockdown.service"] {
            symlink("/dev/null", units.join(name)).unwrap();
        }
    }
}

/// Whether a link, as ip-link(8) shows it, was not brought up yet.
fn is_down(link: &Value) -> bool {
    let flags = link["flags"].as_array().unwrap();
    !flags.iter().any(|flag| flag == "UP")
}

/// A stranger who counts what comes back.
fn stranger(lab: &Lab) -> Outsider {
    let stranger = lab.stranger();
    let file = lab.path("answers.nft");
    fs::write(&file, ANSWERS).unwrap();
    inside(&stranger.path(), "nft").arg("-f").arg(file).succeed();
    stranger
}

fn answers(stranger: &Outsider) -> impl Fn(&str) -> u64 + use<> {
    counters(
        &inside(&stranger.path(), "nft")
            .args(["-j", "list", "counters", "table", "inet", "witness"])
            .succeed(),
    )
}

fn request(lab: &Lab, agent: bool) -> LaunchRequest {
    let overlay = lab.path("overlay");
    bake(&overlay, agent);
    let mut request = lab.request("one", "c-1");
    request.rules = vec![allow("22/tcp"), allow("8080/tcp"), allow("8080/udp")];
    request.image.overlay = Some(overlay);
    // Making it takes longer than anybody wants to knock.
    lab.provider.ensure_image(&request.image, &Quiet).unwrap();
    request
}

/// Does something with an instance while the stranger knocks.
fn while_knocking<T>(stranger: &Outsider, at: [IpAddr; 2], act: impl FnOnce() -> T) -> T {
    let enter = |knock: &(dyn Fn() -> u16 + Sync)| in_namespace(&stranger.path(), knock).unwrap();
    knock::while_knocking(enter, stranger.addresses(), at, act)
}

/// What passed the gate in this boot, and what came back.
fn nothing_got_in(machine: &Machine, stranger: &Outsider) -> u64 {
    let inside = counters(&machine.ok("nft -j list counters table inet witness"));
    let outside = answers(stranger);
    for family in ["ipv4", "ipv6"] {
        let count = |what: &str| inside(&format!("{what}_{family}"));
        println!(
            "{family}: closed {} of {} in, open {} of {}",
            count("passed_closed"),
            count("arrived_closed"),
            count("passed_open"),
            count("arrived_open"),
        );
        assert!(count("arrived_closed") > 100, "knocks have to arrive");
        assert_eq!(count("passed_closed"), 0);
        assert!(count("passed_open") > 0);
    }
    assert_eq!(outside("closed"), 0);
    assert!(outside("open") > 0);
    inside("arrived_open_ipv4") + inside("arrived_open_ipv6")
        - inside("passed_open_ipv4")
        - inside("passed_open_ipv6")
}

#[test]
fn nothing_gets_in_at_any_moment_of_a_boot() {
    let lab = Lab::new();
    let stranger = stranger(&lab);
    // What the instance asks for before anything else is there.
    let gateway = lab.provider.network().path();
    let server = in_namespace(&gateway, || std::net::UdpSocket::bind("10.77.0.1:53"))
        .unwrap()
        .unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((length, peer)) = server.recv_from(&mut buffer) {
            let _ = server.send_to(&buffer[..length], peer);
        }
    });
    let request = request(&lab, true);
    let machine = std::thread::scope(|scope| {
        let launching = scope.spawn(|| lab.launch_many(std::slice::from_ref(&request)).remove(0));
        let (instance, link) = lab.introduce(&stranger, "one");
        assert!(is_down(&link), "the prober came too late");
        while_knocking(&stranger, instance.addresses(), || launching.join().unwrap())
    });
    nothing_got_in(&machine, &stranger);
    // All that a boot needs worked meanwhile: static addresses and the spec by cloud-init, and answers.
    machine.ok("test -e /run/answered");
    assert_eq!(machine.ok("cloud-init status"), "status: done");
    assert!(machine.status().check(CheckId::FirewallDefaultDeny).is_some());

    // With an accepted spec, what is allowed gets in from the first packet.
    while_knocking(&stranger, machine.instance.addresses(), || {
        lab.provider.reboot("one").unwrap();
        machine.until_ready();
    });
    let lost = nothing_got_in(&machine, &stranger);
    assert_eq!(lost, 0, "knocks at the open port that were dropped");
    machine.ok("test -e /run/answered");

    // It is lockdown that does it: the daemon is as early, and could hide that lockdown did nothing.
    machine.ok("systemctl mask portcullis");
    while_knocking(&stranger, machine.instance.addresses(), || {
        lab.provider.reboot("one").unwrap();
    });
    assert_eq!(machine.unit("portcullis", "ActiveState"), "inactive");
    let lost = nothing_got_in(&machine, &stranger);
    assert_eq!(lost, 0, "knocks at the open port that were dropped");
}

/// The positive control: the same boot without the agent.
#[test]
fn without_the_agent_a_boot_is_open() {
    let lab = Lab::new();
    let stranger = stranger(&lab);
    let request = request(&lab, false);
    std::thread::scope(|scope| {
        let launching = scope.spawn(|| lab.provider.launch(&request, &Quiet).unwrap());
        let (instance, link) = lab.introduce(&stranger, "one");
        assert!(is_down(&link), "the prober came too late");
        while_knocking(&stranger, instance.addresses(), || launching.join().unwrap())
    });
    let machine = lab.machine("one");
    let inside = counters(&machine.ok("nft -j list counters table inet witness"));
    for family in ["ipv4", "ipv6"] {
        let (passed, arrived) = (
            inside(&format!("passed_closed_{family}")),
            inside(&format!("arrived_closed_{family}")),
        );
        println!("{family}: closed {passed} of {arrived} in");
        assert!(passed > 100 && passed == arrived, "{passed} of {arrived}");
    }
    assert!(answers(&stranger)("closed") > 100);
}
