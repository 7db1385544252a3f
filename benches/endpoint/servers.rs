//! An instance, and two other servers in its network that speak TLS.
//!
//! May not live here: what is measured.

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use portcullis_figures::{Cell, Row};
use portcullis_provision::local::AGENT_PORT;

use crate::lab::{Lab, Machine, Run, SOON, eventually, inside};

const NGINX_PORT: u16 = 8443;
const EXPORTER_PORT: u16 = 9100;

/// One of the servers that are compared.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Server {
    Portcullis,
    Nginx,
    Exporter,
}

impl Server {
    pub const ALL: [Self; 3] = [Self::Portcullis, Self::Nginx, Self::Exporter];

    pub fn name(self) -> &'static str {
        match self {
            Self::Portcullis => "portcullis",
            Self::Nginx => "nginx",
            Self::Exporter => "prometheus-node-exporter",
        }
    }

    /// A row for each.
    pub fn rows(cells: impl IntoIterator<Item = Vec<Cell>>) -> Vec<Row> {
        let row = |(server, cells): (&Self, _)| match server {
            Self::Portcullis => Row::ours(server.name(), cells),
            Self::Nginx | Self::Exporter => Row::theirs(server.name(), cells),
        };
        Self::ALL.iter().zip(cells).map(row).collect()
    }

    pub fn path(self) -> &'static str {
        match self {
            Self::Portcullis => "/readyz",
            Self::Nginx => "/ok",
            Self::Exporter => "/",
        }
    }

    pub fn address(self) -> SocketAddrV4 {
        let port = match self {
            Self::Portcullis => AGENT_PORT,
            Self::Nginx => NGINX_PORT,
            Self::Exporter => EXPORTER_PORT,
        };
        SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)
    }

    pub fn url(self) -> String {
        format!("https://{}{}", self.address(), self.path())
    }
}

/// What the kernel counted for a server's processes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Time on a CPU.
    pub cpu: Duration,
    /// Memory, with what is shared counted by its share.
    pub pss_kib: u64,
    /// How often they were woken.
    pub wakes: u64,
    pub processes: usize,
}

pub struct Site {
    // First, so that they end before the network does.
    nginx: Child,
    exporter: Child,
    pub machine: Machine,
    folder: PathBuf,
    lab: Lab,
}

impl Site {
    pub fn new() -> Self {
        let lab = Lab::new();
        let machine = lab.launch();
        // How much it can, not how much a caller may.
        machine.ok("! grep -q '^.limits.' /etc/portcullis/portcullis.toml || {
            printf '[limits]\\nconnections = 4000\\nconnections_per_source = 4000\\nrequests = 0\\n' \\
                > /etc/portcullis/conf.d/bench.toml
            systemctl restart portcullis; }");
        let folder = lab.path("servers");
        fs::create_dir(&folder).unwrap();
        certificate(&folder);
        let namespace = machine.instance.network_namespace();
        let nginx = start(&namespace, "nginx", &nginx_arguments(&folder));
        let exporter = start(
            &namespace,
            "prometheus-node-exporter",
            &exporter_arguments(&folder),
        );
        let site = Self {
            nginx,
            exporter,
            machine,
            folder,
            lab,
        };
        for server in Server::ALL {
            eventually(SOON, server.name(), || {
                let answer = site
                    .inside("curl")
                    .args(["-sSkf", "--max-time", "5", &server.url()])
                    .output_text();
                if answer.success() { Ok(()) } else { Err(answer) }
            });
        }
        site
    }

    pub fn namespace(&self) -> PathBuf {
        self.machine.instance.network_namespace()
    }

    /// A program of this machine in the instance's network.
    pub fn inside(&self, program: &str) -> Command {
        inside(&self.namespace(), program)
    }

    /// A file of this run's own.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// What it is compared with, and who asks.
    pub fn versions(&self) -> Vec<String> {
        let version = |(program, option): (&str, &str)| {
            let said = Command::new(program).arg(option).output().unwrap();
            let text = [said.stdout, said.stderr].concat();
            let text = String::from_utf8_lossy(&text);
            let line = text.lines().next().unwrap_or_default();
            // What it was built with is no part of it.
            let line = line
                .trim_start_matches("nginx version: ")
                .replace(", version", "");
            line.split([',', '[', '('])
                .next()
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        let _ = &self.lab;
        [
            ("nginx", "-v"),
            ("prometheus-node-exporter", "--version"),
            ("wrk", "-v"),
            ("h2load", "--version"),
        ]
        .map(version)
        .into()
    }

    /// What a server has used until now.
    pub fn usage(&self, server: Server) -> Usage {
        let pids = match server {
            // Its process ids are the instance's own.
            Server::Portcullis => {
                let script = "for p in $(pgrep -x portcullis); do cd /proc/$p; echo \"$(cut -d')' -f2 stat)\"; \
                              cat smaps_rollup task/*/status; done";
                return usage(&self.machine.ok(script));
            }
            Server::Nginx => with_children(self.nginx.id()),
            Server::Exporter => with_children(self.exporter.id()),
        };
        let read = |pid: &u32| {
            let of = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
            let statuses =
                tasks.map(|task| fs::read_to_string(task.path().join("status")).unwrap_or_default());
            let stat = of("stat");
            let stat = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
            format!("{stat}{}{}", of("smaps_rollup"), statuses.collect::<String>())
        };
        usage(&pids.iter().map(read).collect::<String>())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for child in [&mut self.nginx, &mut self.exporter] {
            for pid in with_children(child.id()).into_iter().rev() {
                let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
            let _ = child.wait();
        }
    }
}

/// From the end of `/proc/PID/stat`, `smaps_rollup` and each thread's `status`, process after process (proc(5)).
fn usage(text: &str) -> Usage {
    // USER_HZ is 100 on every architecture that the agent is built for.
    const TICK: Duration = Duration::from_millis(10);
    let mut usage = Usage::default();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| {
            words
                .get(at)
                .and_then(|word| word.parse::<u64>().ok())
                .unwrap_or(0)
        };
        match words.first() {
            Some(&"Pss:") => usage.pss_kib += number(1),
            Some(&"voluntary_ctxt_switches:") => usage.wakes += number(1),
            // The third field of `stat` is the state, and comes first here.
            Some(state) if state.len() == 1 && words.len() > 40 => {
                usage.processes += 1;
                usage.cpu += TICK * u32::try_from(number(11) + number(12)).unwrap();
            }
            _ => {}
        }
    }
    usage
}

fn with_children(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children = children.split_whitespace().filter_map(|child| child.parse().ok());
    std::iter::once(pid)
        .chain(children.flat_map(with_children))
        .collect()
}

fn start(namespace: &Path, program: &str, arguments: &[String]) -> Child {
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", namespace.display()))
        .args(["--", program]);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}: run `packaging/setup bench`"))
}

/// As the agent makes its own: P-256, signed by itself.
fn certificate(folder: &Path) {
    let pair = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["localhost".to_owned()])
        .unwrap()
        .self_signed(&pair)
        .unwrap();
    fs::write(folder.join("tls.pem"), certificate.pem()).unwrap();
    fs::write(folder.join("tls.key"), pair.serialize_pem()).unwrap();
}

/// As Debian sets it up, but for the log of accesses, which the others do not have either, for connections
/// that go on, and for as many of them as are opened here.
fn nginx_arguments(folder: &Path) -> Vec<String> {
    let path = folder.display();
    fs::write(folder.join("ok"), "ok").unwrap();
    let configuration = format!(
        "daemon off; user root; worker_processes auto; pid {path}/pid; error_log {path}/error.log;\n\
         events {{ worker_connections 4096; }}\n\
         http {{ access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000000;\n\
         client_body_temp_path {path}; proxy_temp_path {path}; fastcgi_temp_path {path};\n\
         uwsgi_temp_path {path}; scgi_temp_path {path};\n\
         server {{ listen 127.0.0.1:{NGINX_PORT} ssl; root {path}; ssl_protocols TLSv1.2 TLSv1.3;\n\
         ssl_certificate {path}/tls.pem; ssl_certificate_key {path}/tls.key; }} }}\n"
    );
    fs::write(folder.join("nginx.conf"), configuration).unwrap();
    vec!["-c".to_owned(), format!("{path}/nginx.conf")]
}

fn exporter_arguments(folder: &Path) -> Vec<String> {
    let path = folder.display();
    let configuration =
        format!("tls_server_config: {{cert_file: {path}/tls.pem, key_file: {path}/tls.key}}\n");
    fs::write(folder.join("web.yml"), configuration).unwrap();
    vec![
        format!("--web.listen-address=127.0.0.1:{EXPORTER_PORT}"),
        format!("--web.config.file={path}/web.yml"),
    ]
}
