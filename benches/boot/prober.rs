//! A stranger who tries a port all the time, and asks sshd for its banner.
//!
//! May not live here: instances.

use std::collections::HashSet;
use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::site::CLOSED;

/// Time between two packets to each address.
const INTERVAL: Duration = Duration::from_millis(1);
/// Time between two questions for a banner.
const KNOCK: Duration = Duration::from_millis(20);
/// How long a banner is waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// A prober ends by itself.
const LONGEST: Duration = Duration::from_secs(90);

/// What a stranger saw of an instance.
#[derive(Clone, Debug)]
pub struct Seen {
    /// For how long the closed port answered, over IPv4 and IPv6.
    pub open: [Duration; 2],
    /// How often it was tried.
    pub tries: u64,
    /// When sshd's banner came, as times since 1970.
    pub banners: Vec<Duration>,
}

/// Probes from the calling thread's namespace until told to stop.
pub fn probe(at: [IpAddr; 2], stop: &AtomicBool) -> Seen {
    std::thread::scope(|scope| {
        let knocking = scope.spawn(|| banners(at[0], stop));
        let (open, tries) = echoes(at, stop);
        Seen {
            open,
            tries,
            banners: knocking.join().unwrap(),
        }
    })
}

/// Each packet has a number, and is due at its time: an answer says that the port was open then.
fn echoes(at: [IpAddr; 2], stop: &AtomicBool) -> ([Duration; 2], u64) {
    let sockets = at.map(|address| {
        let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    });
    let mut answered = [HashSet::new(), HashSet::new()];
    let (start, mut sent) = (Instant::now(), Vec::new());
    while !stop.load(Ordering::Relaxed) && start.elapsed() < LONGEST {
        let number = sent.len() as u64;
        sent.push(start.elapsed());
        for ((socket, address), answered) in sockets.iter().zip(at).zip(&mut answered) {
            // There may be no link yet.
            let _ = socket.send_to(&number.to_be_bytes(), (address, CLOSED));
            let mut answer = [0; 8];
            while let Ok((8, _)) = socket.recv_from(&mut answer) {
                answered.insert(u64::from_be_bytes(answer));
            }
        }
        let due = INTERVAL * u32::try_from(sent.len()).unwrap();
        std::thread::sleep(due.saturating_sub(start.elapsed()));
    }
    let lasted = |answered: &HashSet<u64>| {
        let pairs = sent.windows(2).enumerate();
        let open = pairs.filter(|(number, _)| answered.contains(&(*number as u64)));
        open.map(|(_, pair)| pair[1] - pair[0]).sum()
    };
    (answered.each_ref().map(lasted), sent.len() as u64)
}

/// Whenever sshd says who it is.
fn banners(at: IpAddr, stop: &AtomicBool) -> Vec<Duration> {
    let (start, mut banners) = (Instant::now(), Vec::new());
    while !stop.load(Ordering::Relaxed) && start.elapsed() < LONGEST {
        let tried = Instant::now();
        if let Ok(mut stream) = TcpStream::connect_timeout(&SocketAddr::new(at, 22), 5 * KNOCK) {
            let mut said = [0; 4];
            let _ = stream.set_read_timeout(Some(PATIENCE));
            if stream.read_exact(&mut said).is_ok() && &said == b"SSH-" {
                banners.extend(SystemTime::now().duration_since(UNIX_EPOCH));
            }
        }
        std::thread::sleep(KNOCK.saturating_sub(tried.elapsed()));
    }
    banners
}
