//! Memory and wake-ups when idle, and memory with a thousand connections that stay.
//!
//! May not live here: the servers.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use portcullis_figures::{Better, Cell, Column, Plot, Table, Unit};
use portcullis_provision::local::in_namespace;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use socket2::{Domain, Socket, Type};

use crate::common::anybody::Anybody;
use crate::servers::{Server, Site};

const CONNECTIONS: usize = 1000;
/// How long a connection may wait for an answer before it is not served.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long nothing is asked of them.
const IDLE: Duration = Duration::from_secs(20);

pub fn run(site: &Site) -> Table {
    // What the questions at the start needed is given back first.
    sleep(Duration::from_secs(2));
    let before = Server::ALL.map(|server| site.usage(server));
    sleep(IDLE);
    let idle = Server::ALL.map(|server| site.usage(server));
    let kib = |kib: u64| Cell::one(kib as f64 * 1024.0);
    let cells = |at: usize| {
        let (held, served) = with_connections(site, Server::ALL[at]);
        let more = held.saturating_sub(idle[at].pss_kib) as f64 / served.max(1) as f64;
        // A thread takes its count with it.
        let wakes = idle[at].wakes.checked_sub(before[at].wakes);
        vec![
            kib(idle[at].pss_kib),
            kib(held),
            Cell::one(more * 1024.0),
            Cell::one(idle[at].processes as f64),
            wakes
                .map(|wakes| Cell::one(wakes as f64))
                .ok_or("a thread ended".to_owned())
                .into(),
            Cell::one(served as f64),
        ]
    };
    Table {
        title: "Memory (PSS, all processes)".to_owned(),
        method: format!(
            "What is idle was not busy before. Then {CONNECTIONS} connections that stay, from 250 addresses, with one request on \
             each. Wake-ups are voluntary switches in {} s in which nobody asks; portcullis' daemon looks after the \
             instance meanwhile.",
            IDLE.as_secs()
        ),
        columns: vec![
            Column::of("idle", Unit::Bytes, Better::Less),
            Column::of(
                format!("with {CONNECTIONS} connections"),
                Unit::Bytes,
                Better::Less,
            ),
            Column::of("a connection", Unit::Bytes, Better::Less),
            Column::of("processes", Unit::Count, Better::Neither),
            Column::of("wake-ups when idle", Unit::Count, Better::Less),
            Column::of("connections answered", Unit::Count, Better::More),
        ],
        rows: Server::rows((0..Server::ALL.len()).map(cells)),
        plot: Plot::Bars {
            columns: vec![0, 1],
            logarithmic: false,
        },
    }
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
