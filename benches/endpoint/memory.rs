//! Memory and wake-ups when idle, and memory with a thousand connections that stay.
//!
//! May not live here: the servers.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use portcullis_provision::local::in_namespace;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use socket2::{Domain, Socket, Type};

use crate::common::anybody::Anybody;
use crate::servers::{Server, Site};
use crate::stats;

const CONNECTIONS: usize = 1000;
/// How long a connection may wait for an answer before it is not served.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long nothing is asked of them.
const IDLE: Duration = Duration::from_secs(20);

pub fn run(site: &Site) {
    // What the questions at the start needed is given back first.
    sleep(Duration::from_secs(2));
    let before = Server::ALL.map(|server| site.usage(server));
    sleep(IDLE);
    let idle = Server::ALL.map(|server| site.usage(server));
    let rows = Server::ALL.iter().enumerate().map(|(at, server)| {
        let (held, served) = with_connections(site, *server);
        let kib = |kib: u64| format!("{:.1} MiB", kib as f64 / 1024.0);
        let more = held.saturating_sub(idle[at].pss_kib) as f64 / served.max(1) as f64;
        vec![
            server.name().to_owned(),
            idle[at].processes.to_string(),
            kib(idle[at].pss_kib),
            // A thread takes its count with it.
            idle[at]
                .wakes
                .checked_sub(before[at].wakes)
                .map_or("a thread ended".to_owned(), |wakes| wakes.to_string()),
            format!("{served} of {CONNECTIONS}"),
            kib(held),
            format!("{more:.1} KiB"),
        ]
    });
    let title = format!(
        "Memory (PSS), idle and with {CONNECTIONS} connections; wake-ups in {} s of idleness",
        IDLE.as_secs()
    );
    let header = [
        "",
        "processes",
        "idle",
        "wake-ups",
        "answered",
        "with them",
        "each",
    ];
    stats::print(&title, &header, rows.collect());
}

/// Opens connections, asks once on each, and keeps them: the server's memory then, and how many it answered.
fn with_connections(site: &Site, server: Server) -> (u64, usize) {
    let open = || {
        let config = Arc::new(config());
        let mut served = Vec::new();
        let mut waiting = Vec::new();
        for number in 0..CONNECTIONS {
            let Ok(socket) = connect(server.address(), number) else {
                continue;
            };
            // Once it answers no more, the others only wait at its door.
            if waiting.is_empty()
                && let Some(stream) = asked(socket.try_clone().unwrap(), &config, server)
            {
                served.push(stream);
            } else {
                waiting.push(socket);
            }
        }
        (site.usage(server).pss_kib, served.len())
    };
    in_namespace(&site.namespace(), open).unwrap()
}

/// From one of 250 addresses, as if many called.
fn connect(to: SocketAddrV4, number: usize) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    let last = u8::try_from(number % 250 + 1).unwrap();
    socket.bind(&SocketAddrV4::new(Ipv4Addr::new(127, 0, 1, last), 0).into())?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket.into())
}

fn asked(
    socket: TcpStream,
    config: &Arc<ClientConfig>,
    server: Server,
) -> Option<StreamOwned<ClientConnection, TcpStream>> {
    let name = ServerName::try_from("localhost").unwrap();
    let mut stream = StreamOwned::new(ClientConnection::new(config.clone(), name).unwrap(), socket);
    write!(
        stream,
        "GET {} HTTP/1.1\r\nHost: localhost\r\n\r\n",
        server.path()
    )
    .ok()?;
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).ok()?;
    (&answer == b"HTTP/1.1 200").then_some(stream)
}

fn config() -> ClientConfig {
    ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_no_client_auth()
}
