//! A real sshd's answers: users, homes and keys are real too, in a mount namespace where `/etc`, `/home`
//! and `/run` are the test's own.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Instant;

use nix::mount::{MsFlags, mount};
use portcullis::policy::observation::{Handshake, PENALISED};
use portcullis::policy::ssh_algorithms::{post_quantum, weak};
use portcullis::system::accounts::{self, Account};
use portcullis::system::key_files::{install, read_back, remove_all};
use portcullis::system::ssh_probe::{Probe, handshake, offer_keys, probe};
use portcullis::system::sshd::{Sshd, host_keys};
use portcullis_protocol::{AuthorizedKey, PublicKey};

use super::home::*;

/// An instance of its own for this thread: `useradd` and sshd change nothing of the machine's.
pub fn instance() -> Homes {
    let homes = Homes::new();
    let (upper, work) = ("upper", "work");
    let scratch = homes.path().join("scratch");
    fs::create_dir(&scratch).unwrap();
    let tmpfs = |at: &str| {
        mount(
            Some("tmpfs"),
            at,
            Some("tmpfs"),
            MsFlags::empty(),
            Some("mode=0755"),
        )
        .unwrap();
    };
    tmpfs(scratch.to_str().unwrap());
    for name in [upper, work] {
        fs::create_dir(scratch.join(name)).unwrap();
    }
    let layers = format!(
        "lowerdir=/etc,upperdir={0}/{upper},workdir={0}/{work}",
        scratch.display()
    );
    mount(
        Some("overlay"),
        "/etc",
        Some("overlay"),
        MsFlags::empty(),
        Some(layers.as_str()),
    )
    .unwrap();
    tmpfs("/home");
    tmpfs("/run");
    homes
}

struct Server {
    child: Child,
    log: BufReader<ChildStderr>,
    address: SocketAddr,
    sshd: Sshd,
}

impl Server {
    fn start(homes: &Homes, options: &str) -> Self {
        fs::create_dir_all("/run/sshd").unwrap();
        let key = homes.path().join("host_key");
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        if !key.exists() {
            generate(&key, "ed25519");
        }
        let config = homes.path().join("sshd_config");
        let text = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nPidFile none\nLogLevel VERBOSE\n\
             UsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n{options}\n",
            key.display()
        );
        fs::write(&config, text).unwrap();
        let sshd = Sshd::find().unwrap().with_config(config.clone());
        let mut child = Command::new(sshd.program())
            .args(["-D", "-e", "-f", config.to_str().unwrap()])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("Server listening on") {
            line.clear();
            assert_ne!(
                log.read_line(&mut line).unwrap(),
                0,
                "sshd ended: run `sshd -D -e` to see why"
            );
        }
        Self {
            child,
            log,
            address: ([127, 0, 0, 1], port).into(),
            sshd,
        }
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Everything that sshd logged, once it has ended.
    fn stop(mut self) -> String {
        self.end();
        let mut log = String::new();
        self.log.read_to_string(&mut log).unwrap();
        log
    }
}

impl Drop for Server {
    /// A test that fails leaves no sshd behind either.
    fn drop(&mut self) {
        self.end();
    }
}

fn generate(file: &std::path::Path, kind: &str) -> PublicKey {
    let made = Command::new("ssh-keygen")
        .args(["-q", "-N", "", "-t", kind, "-f"])
        .arg(file)
        .status();
    assert!(made.unwrap().success());
    let public = PathBuf::from(format!("{}.pub", file.display()));
    fs::read_to_string(public).unwrap().trim_end().parse().unwrap()
}

fn user(name: &str) -> Account {
    accounts::create(&name.parse().unwrap()).unwrap()
}

fn authorized(user: &Account, key: &PublicKey, expires: Option<&str>) -> AuthorizedKey {
    let expires = expires.map(|end| end.parse().unwrap());
    AuthorizedKey {
        user: user.name.clone(),
        options: portcullis_protocol::KeyOptions::default(),
        key: key.clone(),
        expires,
    }
}

#[tokio::test]
async fn sshd_accepts_what_was_installed_and_nothing_else() {
    let homes = instance();
    let alice = user("alice");
    assert_eq!(alice.home, PathBuf::from("/home/alice"));
    let server = Server::start(&homes, "");
    let config = server.sshd.effective_config(Some(&alice.name)).await.unwrap();

    let kinds = ["ed25519", "ecdsa", "rsa"];
    let installed = kinds.map(|kind| generate(&homes.path().join(kind), kind));
    let stranger = generate(&homes.path().join("stranger"), "ed25519");
    let mut asked = installed.to_vec();
    asked.push(stranger);

    let before = probe(server.address, &alice.name, &asked).await;
    assert_eq!(before.accepted, vec![Ok(false); 4], "nothing is installed yet");

    let keys = installed.clone().map(|key| authorized(&alice, &key, None));
    install(&alice, &config, &keys).unwrap();
    let found = read_back(&alice, &config).unwrap().keys;
    assert!(found.iter().map(|line| &line.key).eq(&installed), "{found:?}");
    let Probe {
        handshake: seen,
        accepted,
    } = probe(server.address, &alice.name, &asked).await;
    assert_eq!(accepted, [Ok(true), Ok(true), Ok(true), Ok(false)]);
    let seen = seen.unwrap();
    assert!(
        seen.server_id.starts_with("SSH-2.0-OpenSSH_"),
        "{}",
        seen.server_id
    );
    assert_eq!(seen.port, server.address.port());
    assert_eq!(seen.methods, ["publickey"]);
    assert_eq!(host_keys(Some(&config)), [seen.host_key]);

    remove_all(&alice, &config).unwrap();
    assert_eq!(
        offer_keys(server.address, &alice.name, &asked).await,
        vec![Ok(false); 4]
    );

    let log = server.stop();
    assert!(
        log.contains("Postponed publickey for alice from 127.99."),
        "{log}"
    );
    assert!(!log.contains("Accepted publickey"), "a probe logged in: {log}");
}

/// The pairs of kind and algorithm that the check would name.
fn weak_names(seen: &Handshake) -> Vec<String> {
    let offered = seen.algorithms.as_ref().unwrap();
    weak(offered).into_iter().map(|weak| weak.name).collect()
}

/// What `ssh -Q` does not know of a server: what this one offers, as `sshd -T` says it does.
#[tokio::test]
async fn the_algorithms_that_sshd_offers_are_seen_and_weak_ones_named() {
    let homes = instance();
    let options = "MACs hmac-sha2-256-etm@openssh.com\nKexAlgorithms sntrup761x25519-sha512@openssh.com,curve25519-sha256\n\
                   Ciphers aes256-gcm@openssh.com,aes256-ctr";
    let server = Server::start(&homes, options);
    let seen = handshake(server.address).await.unwrap();
    let offered = seen.algorithms.clone().unwrap();
    assert_eq!(
        offered.kex[..2],
        ["sntrup761x25519-sha512@openssh.com", "curve25519-sha256"]
    );
    assert_eq!(offered.ciphers, ["aes256-gcm@openssh.com", "aes256-ctr"]);
    assert_eq!(offered.macs, ["hmac-sha2-256-etm@openssh.com"]);
    assert_eq!(offered.host_keys, ["ssh-ed25519"]);
    assert_eq!(post_quantum(&offered), ["sntrup761x25519-sha512@openssh.com"]);
    assert_eq!(weak_names(&seen), [""; 0]);
    server.stop();

    let options = "Ciphers +aes128-cbc,3des-cbc\nMACs +hmac-md5\nKexAlgorithms diffie-hellman-group14-sha1,curve25519-sha256";
    let server = Server::start(&homes, options);
    let seen = handshake(server.address).await.unwrap();
    let named = weak_names(&seen);
    for name in [
        "aes128-cbc",
        "3des-cbc",
        "hmac-md5",
        "diffie-hellman-group14-sha1",
    ] {
        assert!(named.iter().any(|weak| weak == name), "{name}: {named:?}");
    }
    assert!(post_quantum(&seen.algorithms.unwrap()).is_empty());
}

/// Each probe comes from another address, so whatever sshd counts by source never adds up.
#[tokio::test]
async fn forty_probes_in_a_row_are_not_refused_and_each_comes_from_elsewhere() {
    let homes = instance();
    let alice = user("alice");
    let server = Server::start(&homes, "");
    let config = server.sshd.effective_config(Some(&alice.name)).await.unwrap();
    let keys = ["a", "b"].map(|name| generate(&homes.path().join(name), "ed25519"));
    let held = keys.clone().map(|key| authorized(&alice, &key, None));
    install(&alice, &config, &held).unwrap();
    for round in 0..40 {
        let seen = probe(server.address, &alice.name, &keys).await;
        assert_eq!(seen.accepted, [Ok(true), Ok(true)], "probe {round}");
    }
    let log = server.stop();
    let from = log
        .lines()
        .filter_map(|line| line.split_once("Connection from ")?.1.split_once(' '))
        .map(|(address, _)| address.parse().unwrap());
    let sources: BTreeSet<Ipv4Addr> = from.collect();
    // They are drawn: of 40 in 65,536, two are the same once in 80 runs.
    assert!(sources.len() >= 38, "{log}");
    assert!(
        sources
            .iter()
            .all(|source| source.octets().starts_with(&[127, 99])),
        "{sources:?}"
    );
    // Who reads sshd's log sees who it was, and no failed login, though it tells more than by default.
    assert_eq!(log.matches("portcullis login probe").count(), 40, "{log}");
    for failure in [
        "Failed publickey",
        "Invalid user",
        "maximum authentication attempts",
        "penalty",
    ] {
        assert!(!log.contains(failure), "{failure}: {log}");
    }
}

/// The probe sees what the file alone does not tell: the account, the folders' modes, the time.
#[tokio::test]
async fn the_probe_sees_what_keeps_a_key_from_working() {
    let homes = instance();
    let alice = user("alice");
    let server = Server::start(&homes, "");
    let config = server.sshd.effective_config(Some(&alice.name)).await.unwrap();
    let key = generate(&homes.path().join("key"), "ed25519");
    let ask = async || offer_keys(server.address, &alice.name, std::slice::from_ref(&key)).await[0].clone();

    for (end, expected) in [("2001-01-01T00:00:00Z", false), ("2037-01-01T00:00:00Z", true)] {
        install(&alice, &config, &[authorized(&alice, &key, Some(end))]).unwrap();
        assert_eq!(ask().await, Ok(expected), "until {end}");
    }

    mode(&alice.home, 0o757);
    assert!(read_back(&alice, &config).is_err());
    assert_eq!(ask().await, Ok(false), "the home is writable by others");
    mode(&alice.home, 0o755);
    assert_eq!(ask().await, Ok(true));

    // Without PAM, `!` is a locked account to sshd: that is why users are created with `*`.
    for (password, expected) in [("!", false), ("*", true)] {
        let set = Command::new("/usr/sbin/usermod")
            .args(["-p", password, "alice"])
            .status()
            .unwrap();
        assert!(set.success());
        assert_eq!(ask().await, Ok(expected), "password {password}");
    }
    assert!(!server.stop().contains("Accepted publickey"));
}

#[tokio::test]
async fn the_effective_configuration_is_the_users() {
    let homes = instance();
    let alice = user("alice");
    let text = "PubkeyAuthentication no\nMatch User alice\n PubkeyAuthentication yes\n \
                AuthorizedKeysFile %h/.keys/mine\n PasswordAuthentication yes";
    let server = Server::start(&homes, text);

    let config = server.sshd.effective_config(None).await.unwrap();
    assert!(!config.pubkey && !config.password && !config.keyboard_interactive);
    assert_eq!(config.local_address(), Some(server.address));
    assert!(config.version >= Some((7, 0)), "{:?}", config.version);

    let config = server.sshd.effective_config(Some(&alice.name)).await.unwrap();
    assert!(config.pubkey && config.password);
    let key = generate(&homes.path().join("key"), "ed25519");
    let outcome = install(&alice, &config, &[authorized(&alice, &key, None)]).unwrap();
    assert_eq!(outcome.path, PathBuf::from("/home/alice/.keys/mine"));
    let seen = probe(server.address, &alice.name, &[key]).await;
    assert_eq!(seen.accepted, [Ok(true)]);
    let mut methods = seen.handshake.unwrap().methods;
    methods.sort();
    assert_eq!(methods, ["password", "publickey"]);

    fs::remove_dir("/run/sshd").unwrap();
    let error = server.sshd.effective_config(None).await.unwrap_err();
    assert!(error.contains("start ssh.service once"), "{error}");
}

#[tokio::test]
async fn no_answer_is_a_reason_and_not_a_no() {
    let homes = instance();
    let alice = user("alice");
    let key = generate(&homes.path().join("key"), "ed25519");
    // MaxAuthTries 1: the first failure ends the connection.
    let server = Server::start(&homes, "MaxAuthTries 1");
    let address = server.address;
    for answer in offer_keys(address, &alice.name, &[key.clone(), key.clone()]).await {
        assert!(
            answer
                .as_ref()
                .is_err_and(|reason| reason.contains("closed the connection")),
            "{answer:?}"
        );
    }
    server.stop();

    let seen = probe(address, &alice.name, std::slice::from_ref(&key)).await;
    assert!(seen.handshake.unwrap_err().contains("can't connect"));
    assert!(
        seen.accepted[0]
            .as_ref()
            .is_err_and(|reason| reason.contains("can't connect"))
    );

    // Somebody else listens there, or an sshd that does not want to hear of us for a while.
    for (said, expected) in [
        ("220 mail\r\n", "without saying who it is"),
        ("Not allowed at this time\r\n", PENALISED),
    ] {
        let other = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = other.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = other.accept().await.unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut stream, said.as_bytes())
                .await
                .unwrap();
        });
        let error = handshake(address).await.unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

/// Not a benchmark: tells in the log what an observation costs, and fails if it is out of all proportion.
#[tokio::test]
async fn an_observation_is_quick() {
    let homes = instance();
    let alice = user("alice");
    let server = Server::start(&homes, "");
    let keys = ["a", "b"].map(|name| generate(&homes.path().join(name), "ed25519"));
    let config = server.sshd.effective_config(Some(&alice.name)).await.unwrap();
    install(
        &alice,
        &config,
        &keys.clone().map(|key| authorized(&alice, &key, None)),
    )
    .unwrap();

    let (mut probes, mut configs) = (Vec::new(), Vec::new());
    for _ in 0..9 {
        let start = Instant::now();
        let seen = probe(server.address, &alice.name, &keys).await;
        probes.push(start.elapsed());
        assert_eq!(seen.accepted, [Ok(true), Ok(true)]);

        let start = Instant::now();
        server.sshd.effective_config(Some(&alice.name)).await.unwrap();
        configs.push(start.elapsed());
    }
    probes.sort();
    configs.sort();
    println!(
        "medians: handshake and two keys {:?}, sshd -T {:?}",
        probes[4], configs[4]
    );
    assert!(probes[4].as_secs() == 0 && configs[4].as_secs() == 0);
}
