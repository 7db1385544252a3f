//! Protocols that usually say everything in the clear, by port and by program.
//!
//! From outside nobody can tell whether a database has TLS set up: so it says "usually", and of those that
//! can, "unless TLS is set up". What is not in the table is not known, and nothing is said of it.
//! May not live here: who reaches it.

use serde::Serialize;

use super::socket::Transport;

/// A protocol that is usually spoken in cleartext.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Cleartext {
    /// Its name, for people.
    pub protocol: &'static str,
    /// Whether the programs that speak it can have TLS set up on the same port.
    pub can_have_tls: bool,
}

impl Cleartext {
    /// In words.
    pub fn words(self) -> String {
        let Self {
            protocol,
            can_have_tls,
        } = self;
        if can_have_tls {
            format!("{protocol}: cleartext unless TLS is set up")
        } else {
            format!("{protocol}: usually cleartext")
        }
    }
}

use Transport::{Tcp, Udp};

/// Ports (IANA's registry, and the defaults of what is run on GPU machines), the protocol, and whether the
/// same port can have TLS.
const PORTS: &[(Transport, u16, &str, bool)] = &[
    (Tcp, 21, "FTP", true),
    (Tcp, 23, "Telnet", false),
    (Tcp, 80, "HTTP", false),
    (Tcp, 110, "POP3", true),
    (Tcp, 111, "RPC", false),
    (Tcp, 143, "IMAP", true),
    (Tcp, 389, "LDAP", true),
    (Tcp, 512, "rexec", false),
    (Tcp, 513, "rlogin", false),
    (Tcp, 514, "rsh", false),
    (Tcp, 873, "rsync", false),
    (Tcp, 1883, "MQTT", false),
    (Tcp, 2049, "NFS", false),
    (Tcp, 2375, "Docker API", false),
    (Tcp, 2379, "etcd", true),
    (Tcp, 3000, "HTTP", true),
    (Tcp, 3306, "MySQL", true),
    (Tcp, 5432, "PostgreSQL", true),
    (Tcp, 5672, "AMQP", true),
    (Tcp, 5900, "VNC", true),
    (Tcp, 6006, "TensorBoard", false),
    (Tcp, 6379, "Redis", true),
    (Tcp, 7860, "Gradio", true),
    (Tcp, 8000, "HTTP", true),
    (Tcp, 8080, "HTTP", true),
    (Tcp, 8265, "Ray dashboard", false),
    (Tcp, 8787, "Dask dashboard", true),
    (Tcp, 8888, "HTTP (Jupyter)", true),
    (Tcp, 9090, "HTTP (Prometheus)", true),
    (Tcp, 9092, "Kafka", true),
    (Tcp, 9100, "HTTP (node_exporter)", true),
    (Tcp, 9200, "Elasticsearch", true),
    (Tcp, 10001, "Ray client", true),
    (Tcp, 11211, "memcached", true),
    (Tcp, 11434, "HTTP (Ollama)", false),
    (Tcp, 27017, "MongoDB", true),
    (Udp, 53, "DNS", false),
    (Udp, 69, "TFTP", false),
    (Udp, 111, "RPC", false),
    (Udp, 161, "SNMP", true),
    (Udp, 514, "syslog", false),
    (Udp, 11211, "memcached", false),
];

/// Programs and units, by how their names begin, whatever the port.
const NAMES: &[(&str, &str, bool)] = &[
    ("in.telnetd", "Telnet", false),
    ("telnetd", "Telnet", false),
    ("in.rshd", "rsh", false),
    ("in.rlogind", "rlogin", false),
    ("in.tftpd", "TFTP", false),
    ("tftpd", "TFTP", false),
    ("vsftpd", "FTP", true),
    ("proftpd", "FTP", true),
    ("pure-ftpd", "FTP", true),
    ("redis", "Redis", true),
    ("memcached", "memcached", true),
    ("mysqld", "MySQL", true),
    ("mariadb", "MySQL", true),
    ("mongod", "MongoDB", true),
    ("rpcbind", "RPC", false),
    ("rsync", "rsync", false),
];

/// Names that say that it is something else, whatever the port: these encrypt.
const ENCRYPTED: &[&str] = &["ssh", "portcullis"];

/// What is usually spoken in cleartext there. `names` are the program and its unit.
pub fn usually(transport: Transport, port: u16, names: &[&str]) -> Option<Cleartext> {
    let begins = |with: &str| names.iter().any(|name| name.starts_with(with));
    if ENCRYPTED.iter().any(|name| begins(name)) {
        return None;
    }
    let by_name = NAMES.iter().find(|(name, ..)| begins(name));
    let by_port = || PORTS.iter().find(|(of, at, ..)| (*of, *at) == (transport, port));
    let (protocol, can_have_tls) = match by_name {
        Some((_, protocol, tls)) => (*protocol, *tls),
        None => by_port().map(|(_, _, protocol, tls)| (*protocol, *tls))?,
    };
    Some(Cleartext {
        protocol,
        can_have_tls,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_programs_name_a_protocol_and_what_encrypts_is_not_named() {
        let seen = |transport, port, names: &[&str]| usually(transport, port, names).map(Cleartext::words);
        assert_eq!(seen(Tcp, 23, &[]).unwrap(), "Telnet: usually cleartext");
        assert_eq!(
            seen(Tcp, 3306, &[]).unwrap(),
            "MySQL: cleartext unless TLS is set up"
        );
        // The program says more than the port.
        let redis = seen(Tcp, 80, &["redis-server", "redis.service"]).unwrap();
        assert_eq!(redis, "Redis: cleartext unless TLS is set up");
        for (transport, port, names) in [
            (Tcp, 443, &[][..]),
            (Tcp, 22, &[]),
            (Udp, 23, &[]),
            (Tcp, 23, &["sshd"]),
            (Tcp, 8080, &["portcullis.service"]),
        ] {
            assert_eq!(seen(transport, port, names), None, "{port} {names:?}");
        }
    }
}
