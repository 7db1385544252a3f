//! `portcullisctl demo`: the whole job on real local instances, measured and compared with what is
//! expected.
//!
//! May not live here: the measuring itself (`reach`).

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use portcullis_protocol::{PublicKey, Report, Status};
use serde::Serialize;

use super::{Context, output};
use crate::local::{ImageRequest, Instance, LaunchRequest, LocalProvider, Outsider, parse_allow};
use crate::progress::Progress;
use crate::reach::{Listener, Reached, Target, Transport, Vantage, listen_inside, measure};
use crate::userdata::UserDataOptions;
use crate::wait::DEFAULT_TIMEOUT;
use crate::{Error, Result};

const PLAN: &str = "\
This demonstration launches gpu-0 and gpu-1 (cluster c-1), gpu-2 (cluster c-2) and a stranger on a
network of their own, lets 22/tcp and 8080/tcp in from anywhere, starts listeners on 8080/tcp,
9000/tcp and 9001/udp in each, waits until the agents prove them ready, measures who reaches what
with real connections, and takes everything down again. Everything happens in namespaces; this
machine's own firewall, users, keys and network are never touched.
";

/// A public key whose private half does not exist any more: nobody can log in with it.
const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFkKc52EQpKAMBtUiDp/N8hykSeuzBRx5gN48WTPDhWS demo";

/// The columns: what is dialled, and whether a rule lets it in from anywhere.
const PORTS: [(Transport, u16, bool); 4] = [
    (Transport::Tcp, 22, true),
    (Transport::Tcp, 8080, true),
    (Transport::Tcp, 9000, false),
    (Transport::Udp, 9001, false),
];

/// The stranger's name.
const STRANGER: &str = "stranger";

/// Where the stranger listens.
const STRANGER_PORT: u16 = 8443;

#[derive(clap::Args)]
#[command(after_help = "Example:\n  sudo portcullisctl demo --deb target/debian/portcullis_0.1.0_amd64.deb")]
pub(super) struct Demo {
    /// The agent's package [default: the newest in target/debian, or next to this program]
    #[arg(long, value_name = "FILE")]
    deb: Option<PathBuf>,
    /// Leave the instances running
    #[arg(long)]
    keep: bool,
}

/// One measured cell.
#[derive(Serialize)]
struct Cell {
    from: String,
    to: String,
    what: String,
    expected_open: bool,
    measured: Reached,
    as_expected: bool,
}

#[derive(Serialize)]
struct Outcome {
    reports: Vec<Report>,
    reachability: Vec<Cell>,
    as_expected: bool,
}

/// Takes the demonstration down, once, however it ends.
struct TakeDown {
    provider: LocalProvider,
    keep: bool,
    interrupted: AtomicBool,
}

impl TakeDown {
    fn run(&self) -> Result<()> {
        if self.keep || !self.provider.state_dir().exists() {
            return Ok(());
        }
        self.provider.terminate_all()?;
        let folder = self.provider.state_dir();
        match std::fs::remove_dir_all(folder) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::file("remove", folder)(e)),
            _ => Ok(()),
        }
    }
}

impl Demo {
    pub(super) fn run(&self, context: &Context) -> Result<u8> {
        eprint!("{PLAN}");
        // A state of its own, so that no other instance is in the way or in danger.
        let images = context.provider()?.state_dir().to_owned();
        let folder = images.join(format!("demo-{}", std::process::id()));
        let provider = LocalProvider::open(&folder)?.with_images(images);
        let interrupted = AtomicBool::new(false);
        let take_down = Arc::new(TakeDown {
            provider: provider.clone(),
            keep: self.keep,
            interrupted,
        });
        on_interrupt(Arc::clone(&take_down))?;
        let outcome = self.show(context, &provider);
        while take_down.interrupted.load(Ordering::SeqCst) {
            // What failed now failed because of the interruption, whose thread ends the process.
            std::thread::park();
        }
        let taken_down = take_down.run();
        if self.keep {
            eprintln!(
                "The instances run on. To end them: portcullisctl --state-dir {} terminate --all",
                folder.display()
            );
        }
        let outcome = outcome?;
        taken_down?;
        if context.json() {
            output::print_json(&outcome)?;
        } else {
            let all = if outcome.as_expected {
                "Everything is as expected."
            } else {
                "Not all is as expected."
            };
            output::print(&format!("{all}\n"));
        }
        Ok(u8::from(!outcome.as_expected))
    }

    fn show(&self, context: &Context, provider: &LocalProvider) -> Result<Outcome> {
        let progress = context.progress();
        let instances = provider.launch_many(&self.requests()?, progress.as_ref())?;
        let stranger = provider.outsider(STRANGER)?;
        progress.step("starting listeners");
        for instance in &instances {
            let ports: Vec<_> = PORTS[1..]
                .iter()
                .map(|(transport, port, _)| (*transport, *port))
                .collect();
            listen_inside(instance, &ports)?;
        }
        let reports = wait_all(provider, &instances, progress.as_ref())?;
        progress.step("measuring who reaches what");
        let cells = reachability(&instances, &stranger)?;
        drop(progress);
        let as_expected = cells.iter().all(|cell| cell.as_expected);
        if !context.json() {
            for (instance, report) in instances.iter().zip(&reports) {
                output::print(&(output::report(instance.name(), report) + "\n"));
            }
            let (outbound, inbound): (Vec<&Cell>, Vec<&Cell>) =
                cells.iter().partition(|cell| cell.to == STRANGER);
            output::print(&format!("{}\n{}\n", table(&inbound), table(&outbound)));
            output::print("A cell with ! is not as expected.\n");
        }
        Ok(Outcome {
            reports,
            reachability: cells,
            as_expected,
        })
    }

    fn requests(&self) -> Result<Vec<LaunchRequest>> {
        let key: PublicKey = KEY.parse().map_err(Error::Failed)?;
        let rules = ["22/tcp", "8080/tcp"]
            .map(parse_allow)
            .into_iter()
            .collect::<Result<Vec<_>, _>>();
        let (rules, user) = (
            rules.map_err(Error::Failed)?,
            "ubuntu".parse().map_err(Error::Failed)?,
        );
        let request = |(name, cluster): (&str, &str)| LaunchRequest {
            name: name.into(),
            cluster: Some(cluster.into()),
            user: portcullis_protocol::UserName::clone(&user),
            keys: vec![key.clone()],
            rules: rules.clone(),
            user_data: UserDataOptions::default(),
            image: ImageRequest {
                deb: self.deb.clone(),
                ..ImageRequest::default()
            },
        };
        Ok([("gpu-0", "c-1"), ("gpu-1", "c-1"), ("gpu-2", "c-2")]
            .map(request)
            .into())
    }
}

fn wait_all(
    provider: &LocalProvider,
    instances: &[Instance],
    progress: &dyn Progress,
) -> Result<Vec<Report>> {
    let wait = |instance: &Instance| crate::wait::wait(provider, instance.name(), DEFAULT_TIMEOUT, progress);
    instances.iter().map(wait).collect()
}

/// Ends the demonstration on Ctrl-C, with nothing left behind.
fn on_interrupt(take_down: Arc<TakeDown>) -> Result<()> {
    let failed = |e: std::io::Error| Error::Failed(format!("can't listen for Ctrl-C: {e}"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?;
    std::thread::spawn(move || {
        if runtime.block_on(tokio::signal::ctrl_c()).is_ok() {
            take_down.interrupted.store(true, Ordering::SeqCst);
            eprintln!("interrupted: taking everything down");
            // A launch that was under way fails as its folder vanishes; the second pass takes what it
            // had just made.
            let _ = take_down.run();
            std::thread::sleep(std::time::Duration::from_millis(500));
            if let Err(error) = take_down.run() {
                eprintln!("portcullisctl: {error}");
            }
            std::process::exit(130);
        }
    });
    Ok(())
}

/// Measures every pair of hosts, and what the instances reach outside.
fn reachability(instances: &[Instance], stranger: &Outsider) -> Result<Vec<Cell>> {
    let failed = |e: std::io::Error| Error::Failed(format!("can't measure: {e}"));
    let _listener = Listener::new(stranger.path(), STRANGER_PORT).map_err(failed)?;
    let outside = Vantage {
        label: STRANGER.into(),
        namespace: stranger.path(),
    };
    let inside = |i: &Instance| Vantage {
        label: i.name().to_owned(),
        namespace: i.network_namespace(),
    };
    let (mut probes, mut names) = (Vec::new(), Vec::new());
    let mut add = |from: Vantage, to: &str, address, transport: Transport, port, expected| {
        let family = if std::net::IpAddr::is_ipv4(&address) {
            "v4"
        } else {
            "v6"
        };
        names.push((to.to_owned(), format!("{transport}/{port} {family}"), expected));
        probes.push((
            from,
            Target {
                transport,
                address: SocketAddr::new(address, port),
            },
        ));
    };
    for to in instances {
        // Each also dials itself: what is filtered elsewhere is proven to listen.
        let friends = instances
            .iter()
            .map(|from| (inside(from), from.cluster() == to.cluster()));
        for (from, member) in friends.chain([(outside.clone(), false)]) {
            for (transport, port, allowed) in PORTS {
                for address in to.addresses() {
                    add(
                        from.clone(),
                        to.name(),
                        address,
                        transport,
                        port,
                        allowed || member,
                    );
                }
            }
        }
    }
    for from in instances {
        for address in stranger.addresses() {
            add(
                inside(from),
                "stranger",
                address,
                Transport::Tcp,
                STRANGER_PORT,
                true,
            );
        }
    }
    let measured = measure(&probes).map_err(failed)?;
    let cells = probes.into_iter().zip(names).zip(measured).map(
        |(((from, _), (to, what, expected_open)), measured)| {
            // What is not let in must not even be refused: a refusal comes from behind the gate.
            let wanted = if expected_open {
                Reached::Open
            } else {
                Reached::Filtered
            };
            Cell {
                from: from.label,
                to,
                what,
                expected_open,
                measured,
                as_expected: measured == wanted,
            }
        },
    );
    Ok(cells.collect())
}

/// Rows: from → to; columns: what was dialled. What differs from what is expected says so.
fn table(cells: &[&Cell]) -> String {
    let mut columns: Vec<&str> = Vec::new();
    let mut rows: Vec<(String, Vec<&Cell>)> = Vec::new();
    for &cell in cells {
        if !columns.contains(&cell.what.as_str()) {
            columns.push(&cell.what);
        }
        let pair = format!("{} → {}", cell.from, cell.to);
        match rows.iter_mut().find(|(name, _)| *name == pair) {
            Some((_, row)) => row.push(cell),
            None => rows.push((pair, vec![cell])),
        }
    }
    let first = rows
        .iter()
        .map(|(name, _)| name.chars().count())
        .max()
        .unwrap_or(0)
        .max("FROM → TO".chars().count());
    let words = cells.iter().map(|cell| cell.measured.to_string().len() + 1);
    let word_width = words.max().unwrap_or(0);
    let width = |column: &str| column.len().max(word_width);
    let mut text = format!("{:first$}", "FROM → TO");
    for column in &columns {
        text += &format!("  {column:<0$}", width(column));
    }
    text = text.trim_end().to_owned() + "\n";
    for (name, row) in rows {
        text += &format!("{name:first$}");
        for column in &columns {
            let cell = row.iter().find(|cell| cell.what == *column);
            let word = cell.map_or(String::new(), |c| {
                format!("{}{}", c.measured, if c.as_expected { "" } else { "!" })
            });
            let word = format!("{word:<0$}", width(column));
            let status = if cell.is_none_or(|c| c.as_expected) {
                Status::Pass
            } else {
                Status::Fail
            };
            text += &format!("  {}", output::coloured(&word, status));
        }
        text += "\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_marked() {
        let cell = |what: &str, measured, as_expected| Cell {
            from: "a".into(),
            to: "b".into(),
            what: what.into(),
            expected_open: false,
            measured,
            as_expected,
        };
        let cells = [
            cell("tcp/1 v4", Reached::Filtered, true),
            cell("tcp/2 v4", Reached::Open, false),
        ];
        let text = anstream::adapter::strip_str(&table(&cells.iter().collect::<Vec<_>>())).to_string();
        assert!(
            text.lines()
                .nth(1)
                .unwrap()
                .starts_with("a → b      filtered   open!"),
            "{text}"
        );
    }
}
