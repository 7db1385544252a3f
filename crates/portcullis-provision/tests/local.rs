//! The local provider with real instances. Needs root; without it the tests fail, they never skip.
//!
//! May not live here: tests of the agent. These images don't have it.

#![allow(clippy::unwrap_used, reason = "a test's helper may end the test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use portcullis_protocol::Spec;
use portcullis_provision::local::{
    ImageRequest, Instance, LaunchRequest, LocalProvider, State, in_namespace, parse_allow,
};
use portcullis_provision::progress::Quiet;
use portcullis_provision::reach::{Listener, Reached, Target, Transport, Vantage, listen_inside, measure};
use portcullis_provision::userdata::{UserDataOptions, render};

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFkKc52EQpKAMBtUiDp/N8hykSeuzBRx5gN48WTPDhWS alice";

/// A provider with a state of its own, and the image that all tests share.
struct Lab {
    provider: LocalProvider,
    folder: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        let shared = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/local");
        fs::create_dir_all(&shared).unwrap();
        let shared = fs::canonicalize(shared).unwrap();
        let folder = tempfile::Builder::new()
            .prefix("test-")
            .tempdir_in(&shared)
            .unwrap();
        let provider = LocalProvider::open(folder.path()).unwrap().with_images(shared);
        Self { provider, folder }
    }

    /// What of this lab is left in the system: namespaces, mounts, processes, cgroups.
    fn leftovers(&self) -> Vec<String> {
        let state = fs::canonicalize(self.folder.path()).unwrap();
        let state = state.to_str().unwrap();
        let tag = self.provider.network().name().replace("pcl-net-", "");
        let mut found: Vec<String> = fs::read_dir("/run/netns")
            .map(|entries| {
                entries
                    .flatten()
                    .map(|e| e.path().display().to_string())
                    .collect()
            })
            .unwrap_or_default();
        found.retain(|path| path.contains(&tag));
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        found.extend(
            mounts
                .lines()
                .filter(|line| line.contains(state) || line.contains(&tag))
                .map(str::to_owned),
        );
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let line = fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
            if line.contains(state) {
                found.push(line.replace('\0', " "));
            }
        }
        let groups = Command::new("find")
            .args(["/sys/fs/cgroup", "-type", "d", "-name", &format!("{tag}-*")])
            .output();
        found.extend(
            String::from_utf8(groups.unwrap().stdout)
                .unwrap()
                .lines()
                .map(str::to_owned),
        );
        found.extend(
            fs::read_dir(Path::new(state).join("instances"))
                .into_iter()
                .flatten()
                .flatten()
                .map(|e| e.path().display().to_string()),
        );
        found
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.provider.terminate_all();
    }
}

fn request(name: &str, cluster: &str) -> LaunchRequest {
    LaunchRequest {
        name: name.into(),
        cluster: Some(cluster.into()),
        user: "ubuntu".parse().unwrap(),
        keys: vec![KEY.parse().unwrap()],
        rules: vec![parse_allow("22/tcp").unwrap()],
        user_data: UserDataOptions::default(),
        image: ImageRequest {
            allow_without_agent: true,
            ..ImageRequest::default()
        },
    }
}

fn spec_inside(instance: &Instance) -> Spec {
    let text = instance.exec_ok(&["cat", "/etc/portcullis/spec.json"]).unwrap();
    Spec::from_json(text.as_bytes()).unwrap()
}

#[test]
fn an_instance_boots_reboots_and_is_gone() {
    let lab = Lab::new();
    let start = std::time::Instant::now();
    let instance = lab.provider.launch(&request("one", "c-1"), &Quiet).unwrap();
    println!("launched in {:?}", start.elapsed());

    // systemd is real and everything of cloud-init's part is done.
    let units = instance
        .exec(&["systemctl", "list-units", "--failed", "--plain", "--no-legend"])
        .unwrap();
    let state = instance
        .exec(&["systemctl", "is-system-running", "--wait"])
        .unwrap();
    assert_eq!(
        (state.stdout.trim(), units.stdout.trim()),
        ("running", ""),
        "{state:?}"
    );
    assert_eq!(
        instance
            .exec_ok(&["systemctl", "is-active", "ssh"])
            .unwrap()
            .trim(),
        "active"
    );
    assert_eq!(instance.exec_ok(&["hostname"]).unwrap().trim(), "one");
    let mode = instance
        .exec_ok(&["stat", "-c", "%a %U", "/etc/portcullis/spec.json"])
        .unwrap();
    assert_eq!(mode.trim(), "600 root");
    assert_eq!(spec_inside(&instance), *instance.spec());
    assert_eq!(
        instance
            .exec_ok(&["sudo", "-u", "ubuntu", "sudo", "-n", "id", "-u"])
            .unwrap()
            .trim(),
        "0"
    );

    // cloud-init itself accepts what render() makes.
    let user_data = render(instance.spec(), &UserDataOptions::default());
    let write = instance
        .exec_with_input(&["tee", "/run/user-data"], user_data.as_bytes())
        .unwrap();
    assert!(write.success());
    let schema = instance
        .exec_ok(&["cloud-init", "schema", "--config-file", "/run/user-data"])
        .unwrap();
    assert!(schema.contains("Valid"), "{schema}");

    // A reboot gives a machine whose kernel remembers nothing, and whose disk remembers all.
    let boot_id = |i: &Instance| i.exec_ok(&["journalctl", "--list-boots", "--no-pager"]).unwrap();
    let before = (boot_id(&instance), instance.pid());
    let keys = instance
        .exec_ok(&["cat", "/etc/ssh/ssh_host_ed25519_key.pub"])
        .unwrap();
    instance.exec_ok(&["nft", "add table inet canary"]).unwrap();
    assert!(
        instance
            .exec_ok(&["nft", "list", "tables"])
            .unwrap()
            .contains("canary")
    );
    let again = lab.provider.reboot("one").unwrap();
    assert_eq!(again.exec_ok(&["nft", "list", "ruleset"]).unwrap().trim(), "");
    assert_eq!(again.boots(), 2);
    assert_ne!((boot_id(&again), again.pid()), before);
    assert_eq!(
        again
            .exec_ok(&["cat", "/etc/ssh/ssh_host_ed25519_key.pub"])
            .unwrap(),
        keys
    );
    assert!(
        again
            .exec_ok(&["ip", "-4", "address"])
            .unwrap()
            .contains("10.77.0.2/24")
    );

    // A program that fails is no error of exec's.
    assert_eq!(again.exec(&["sh", "-c", "exit 7"]).unwrap().code, Some(7));

    assert!(!lab.leftovers().is_empty(), "the test would see leftovers");
    lab.provider.terminate(&["one"]).unwrap();
    lab.provider.terminate(&["one"]).unwrap();
    assert_eq!(lab.leftovers(), Vec::<String>::new());
    assert!(
        lab.provider
            .get("one")
            .unwrap_err()
            .to_string()
            .contains("there are none")
    );
}

/// systemd stops all processes for a moment when it shuts down. What started them out here must not stay stopped.
#[test]
fn programs_inside_end_with_a_boot_and_do_not_hold_it_up() {
    const PROGRAMS: usize = 8;
    let lab = Lab::new();
    let instance = lab.provider.launch(&request("one", "c-1"), &Quiet).unwrap();
    let again = std::thread::scope(|scope| {
        let programs = [(); PROGRAMS].map(|()| scope.spawn(|| instance.exec(&["sleep", "60"]).unwrap()));
        let count = "until [ $(pgrep -cx sleep) = $0 ]; do :; done";
        let all = instance.exec(&["timeout", "20", "sh", "-c", count, &PROGRAMS.to_string()]);
        assert!(all.unwrap().success(), "not all of them run");
        let again = lab.provider.reboot("one").unwrap();
        for program in programs {
            assert!(!program.join().unwrap().success(), "it came to its own end");
        }
        again
    });
    assert_eq!(again.boots(), 2);
}

#[test]
fn members_know_and_reach_each_other() {
    let lab = Lab::new();
    let mut pair = lab
        .provider
        .launch_many(&[request("a", "c-1"), request("b", "c-1")], &Quiet)
        .unwrap();
    let (b, a) = (pair.pop().unwrap(), pair.pop().unwrap());
    for (from, to) in [(&a, &b), (&b, &a)] {
        for address in to.addresses() {
            from.exec_ok(&["ping", "-c", "1", "-W", "2", &address.to_string()])
                .unwrap();
        }
        assert!(from.spec().peer_addresses().eq(to.addresses()));
    }
    assert_eq!(a.spec().generation.get(), 1);

    // A third one of the cluster is told to the two; one of another cluster is not.
    let c = lab.provider.launch(&request("c", "c-1"), &Quiet).unwrap();
    lab.provider.launch(&request("d", "c-2"), &Quiet).unwrap();
    let spec = spec_inside(&a);
    assert_eq!((spec.generation.get(), spec.peer_addresses().count()), (2, 4));
    assert_eq!(c.spec().peer_addresses().count(), 4);
    // One that is ended is no peer any longer: its address may soon be a stranger's.
    lab.provider.terminate(&["c"]).unwrap();
    let spec = spec_inside(&a);
    assert_eq!((spec.generation.get(), spec.peer_addresses().count()), (3, 2));

    // A stranger has an address of its own, and a socket made inside stays inside.
    let stranger = lab.provider.outsider("stranger").unwrap();
    assert!(![&a, &b].iter().any(|i| i.addresses() == stranger.addresses()));
    let ssh = std::net::SocketAddr::new(a.addresses()[1], 22);
    let stream = in_namespace(&stranger.path(), || std::net::TcpStream::connect(ssh))
        .unwrap()
        .unwrap();
    assert_eq!(stream.local_addr().unwrap().ip(), stranger.addresses()[1]);
    drop(stranger);

    let names: Vec<_> = lab
        .provider
        .list()
        .unwrap()
        .iter()
        .map(|i| (i.name().to_owned(), i.state()))
        .collect();
    assert_eq!(
        names,
        ["a", "b", "d"].map(|name| (name.to_owned(), State::Running))
    );
    lab.provider.terminate_all().unwrap();
    assert_eq!(lab.leftovers(), Vec::<String>::new());
}

#[test]
fn a_failed_launch_leaves_nothing() {
    let lab = Lab::new();
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/local");
    // An image without an init: the first process ends at once. The second of two fails, so that
    // the first has to be taken back as well.
    let broken = tempfile::tempdir_in(&shared).unwrap();
    let provider = lab.provider.clone().with_images(broken.path());
    let image = lab
        .provider
        .ensure_image(&request("x", "c").image, &Quiet)
        .unwrap();
    let name = image.layers[0].parent().unwrap().file_name().unwrap();
    let root = broken.path().join("images").join(name);
    fs::create_dir_all(root.join("root")).unwrap();
    fs::write(root.join("complete"), "").unwrap();
    let error = provider
        .launch_many(&[request("x", "c-1"), request("y", "c-1")], &Quiet)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("did not boot") && error.contains("console") && error.contains("boot: "),
        "{error}"
    );
    assert_eq!(lab.leftovers(), Vec::<String>::new());
    // The names and addresses are free again.
    let instance = lab.provider.launch(&request("x", "c-1"), &Quiet).unwrap();
    assert!(instance.addresses()[0].to_string().ends_with(".2"));
    let taken = lab.provider.launch(&request("x", "c-1"), &Quiet).unwrap_err();
    assert_eq!((taken.exit_code(), instance.state()), (2, State::Running));
}

#[test]
fn reach_sees_what_a_firewall_does() {
    let lab = Lab::new();
    let instance = lab.provider.launch(&request("r", "c-1"), &Quiet).unwrap();
    let stranger = lab.provider.outsider("stranger").unwrap();
    listen_inside(&instance, &[(Transport::Tcp, 9000), (Transport::Udp, 9001)]).unwrap();
    let from = Vantage {
        label: "stranger".into(),
        namespace: stranger.path(),
    };
    let seen = || {
        let ports = [
            (Transport::Tcp, 9000),
            (Transport::Udp, 9001),
            (Transport::Tcp, 1),
        ];
        let targets = ports.iter().flat_map(|(transport, port)| {
            instance.addresses().map(|ip| Target {
                transport: *transport,
                address: (ip, *port).into(),
            })
        });
        let probes: Vec<_> = targets.map(|target| (from.clone(), target)).collect();
        measure(&probes).unwrap()
    };
    use Reached::{Closed, Filtered, Open};
    assert_eq!(seen(), [Open, Open, Open, Open, Closed, Closed]);
    let rules = "table inet gate { chain incoming { type filter hook input priority 0;
        meta l4proto { tcp, udp } ct state new iifname eth0 drop; }
 }";
    assert!(
        instance
            .exec_with_input(&["nft", "-f", "-"], rules.as_bytes())
            .unwrap()
            .success()
    );
    assert_eq!(seen(), [Filtered; 6]);

    // And outwards, to a listener of this process in the stranger's namespace.
    let listener = Listener::new(stranger.path(), 8443).unwrap();
    let inside = Vantage {
        label: "r".into(),
        namespace: instance.network_namespace(),
    };
    let out = stranger.addresses().map(|ip| {
        (
            inside.clone(),
            Target {
                transport: Transport::Tcp,
                address: (ip, 8443).into(),
            },
        )
    });
    assert_eq!(measure(&out).unwrap(), [Open, Open]);
    drop(listener);
    assert_eq!(measure(&out).unwrap(), [Closed, Closed]);
}
