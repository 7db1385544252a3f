//! A cluster of 100 to 99,900 peers: letting all of them in, and one more.
//!
//! May not live here: what packets cost afterwards (`packets`).

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use portcullis::agent::gate::guard::Guard;
use portcullis::policy::ruleset::change::steps;
use portcullis::system::nftables::Nftables;
use portcullis_figures::{Column, Plot, Row, Samples, Side, Table, timed};

use crate::common::{Namespace, eventually};
use crate::contenders::bus;
use crate::raw::{self, Raw};
use crate::sandbox::{self, PATIENCE, Server, command, must};
use crate::specs::{peer, plan, settings, with_peers};

/// A spec takes 100,000 peers: there is room for more.
const SIZES: [usize; 4] = [100, 1_000, 10_000, 99_900];
/// How often one more peer is added.
const MORE: usize = 15;
/// What programs that add peers one by one get for all of them.
const BUDGET: Duration = Duration::from_secs(20);

/// What it took to load them all, and to add one; or why that was not measured.
struct Cost {
    load: Result<Samples, String>,
    one: Result<Samples, String>,
}

impl Cost {
    fn none(reason: &str) -> Self {
        Self {
            load: Err(reason.to_owned()),
            one: Err(reason.to_owned()),
        }
    }
}

/// Name, whose it is, and what measures it.
type Contender = (&'static str, Side, fn(usize) -> Cost);

const CONTENDERS: [Contender; 8] = [
    (
        "portcullis, daemon: plan, transaction, read back",
        Side::Ours,
        daemon,
    ),
    ("portcullis, transaction", Side::Ours, engine),
    ("portcullis, transaction, read back", Side::Ours, engine_read_back),
    (
        "the kernel alone: one send(2) of a ready batch",
        Side::Floor,
        kernel,
    ),
    ("`nft -f`, `nft add element`", Side::Theirs, nft),
    ("`iptables-restore`, `iptables -A`", Side::Theirs, iptables),
    ("`firewall-cmd --ipset`, from a file", Side::Theirs, firewalld),
    ("`ufw allow from`, one by one", Side::Theirs, ufw),
];

pub fn run() -> Vec<Table> {
    let rows = || {
        CONTENDERS.map(|(name, side, _)| Row {
            name: name.to_owned(),
            side,
            beside: None,
            cells: Vec::new(),
        })
    };
    let (mut all, mut one) = (rows(), rows());
    for size in SIZES {
        for (number, (.., cost)) in CONTENDERS.iter().enumerate() {
            let Cost { load, one: more } = cost(size);
            all[number]
                .cells
                .push(load.map_err(|reason| first_sentence(&reason)).into());
            one[number]
                .cells
                .push(more.map_err(|reason| first_sentence(&reason)).into());
        }
    }
    vec![
        table(
            "Peers: letting all of them in",
            all,
            "In a fresh namespace each time. The kernel's row is a floor for many peers only: it makes its sets with \
             room for 131,072 addresses, portcullis with room for 8,192 until there are more, and an empty hash table of \
             that size costs time too.",
        ),
        table(
            "Peers: one more",
            one,
            "To so many that are there. The daemon makes the plan anew, compares it, and reads rules back; nft(8) does none of that.",
        ),
    ]
}

fn table(title: &str, rows: [Row; CONTENDERS.len()], method: &str) -> Table {
    let names = ["100 peers", "1,000", "10,000", "99,900"];
    Table {
        title: title.to_owned(),
        method: method.to_owned(),
        columns: names.map(Column::time).into(),
        rows: rows.into(),
        plot: Plot::Lines {
            name: "peers".to_owned(),
            at: SIZES.map(|size| size as f64).into(),
        },
    }
}

/// Programs say more than a cell holds.
fn first_sentence(reason: &str) -> String {
    let reason = reason.rsplit("Error: ").next().unwrap_or(reason);
    reason.split(['.', '\n']).next().unwrap_or(reason).to_owned()
}

fn rounds(size: usize) -> usize {
    if size > 10_000 { 5 } else { 9 }
}

/// Once in each of some fresh namespaces, which end together, after all is measured.
fn in_fresh(size: usize, once: impl Fn(&Namespace) -> Duration) -> Samples {
    Samples::new(fresh(size).iter().map(once).collect())
}

fn fresh(size: usize) -> Vec<Namespace> {
    (0..rounds(size)).map(|_| Namespace::new("peers")).collect()
}

fn addresses(from: usize, count: usize) -> Vec<Ipv4Addr> {
    (from..from + count).map(|i| peer(i).parse().unwrap()).collect()
}

fn kernel(size: usize) -> Cost {
    let (all, mut next) = (raw::table_with(&addresses(0, size)), size);
    let load = in_fresh(size, |host| host.enter(|| Raw::open().time(&all)));
    let host = Namespace::new("kernel");
    let one = host.enter(|| {
        let raw = Raw::open();
        raw.send(&all);
        let one = Samples::of(MORE, |_| {
            next += 1;
            raw.time(&raw::more(&addresses(next, 1)))
        });
        let listing = sandbox::text("nft list set inet kernel peers").unwrap();
        let held = listing.matches(',').count() + 1;
        assert_eq!(held, size + MORE, "the kernel holds what it was sent");
        one
    });
    Cost {
        load: Ok(load),
        one: Ok(one),
    }
}

fn engine(size: usize) -> Cost {
    engine_with(size, false)
}

fn engine_read_back(size: usize) -> Cost {
    engine_with(size, true)
}

/// The engine without the daemon around it; plans are ready before the clock starts.
fn engine_with(size: usize, read_back: bool) -> Cost {
    let all = plan(&with_peers(size));
    let load = in_fresh(size, |host| {
        host.enter(|| {
            let mut nftables = Nftables::open().unwrap();
            let (time, held) = timed(|| {
                nftables.replace(&all).unwrap();
                read_back.then(|| nftables.read().unwrap().unwrap())
            });
            let held = held.unwrap_or_else(|| nftables.read().unwrap().unwrap());
            assert!(held.ruleset == all, "the kernel holds what was planned");
            time
        })
    });
    let host = Namespace::new("engine");
    let one = host.enter(|| {
        let mut nftables = Nftables::open().unwrap();
        nftables.replace(&all).unwrap();
        let mut held = nftables.read().unwrap().unwrap();
        Samples::of(MORE, |round| {
            let wanted = plan(&with_peers(size + round + 1));
            let (time, after) = timed(|| {
                let steps = steps(&held.ruleset, &wanted).unwrap();
                nftables.change(&held, &steps).unwrap();
                read_back.then(|| nftables.read_after(&held, &wanted).unwrap().unwrap())
            });
            held = after.unwrap_or_else(|| nftables.read().unwrap().unwrap());
            assert!(held.ruleset == wanted, "the kernel holds what was planned");
            time
        })
    });
    Cost {
        load: Ok(load),
        one: Ok(one),
    }
}

/// All that the daemon does between a parsed spec and an enforced one.
fn daemon(size: usize) -> Cost {
    let all = Arc::new(with_peers(size));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let enforce = |guard: &Guard, spec| {
        let (time, gate) = timed(|| runtime.block_on(guard.enforce(Some(spec))));
        let held = gate.held.as_ref().unwrap();
        assert!(
            held.as_ref() == Some(&gate.planned),
            "the kernel holds what was planned"
        );
        time
    };
    let start = |host: &Namespace| host.enter(|| Guard::start(&settings(true)).unwrap());
    let load = in_fresh(size, |host| enforce(&start(host), all.clone()));
    let host = Namespace::new("daemon");
    let guard = start(&host);
    enforce(&guard, all.clone());
    let one = Samples::of(MORE, |round| {
        enforce(&guard, Arc::new(with_peers(size + round + 1)))
    });
    Cost {
        load: Ok(load),
        one: Ok(one),
    }
}

/// Measures both in fresh hosts. What fails once is not tried again.
fn commands(
    size: usize,
    prepare: impl Fn() + Sync,
    load: impl Fn() -> Result<Duration, String> + Sync,
    one: impl Fn(usize) -> Result<Duration, String> + Sync,
) -> Cost {
    let (mut loads, mut reason) = (Vec::new(), None);
    let hosts = fresh(size);
    let started = Instant::now();
    for host in &hosts {
        if reason.is_some() || started.elapsed() > BUDGET {
            break;
        }
        match sandbox::enter(host, || {
            prepare();
            load()
        }) {
            Ok(time) => loads.push(time),
            Err(error) => reason = Some(error),
        }
    }
    if let Some(reason) = reason {
        return Cost::none(&reason);
    }
    let host = Namespace::new("peers");
    let started = Instant::now();
    let ones: Result<Vec<Duration>, String> = sandbox::enter(&host, || {
        prepare();
        load()?;
        let in_time = |_: &usize| started.elapsed() < BUDGET;
        (1..=MORE)
            .take_while(in_time)
            .map(|round| one(size + round))
            .collect()
    });
    Cost {
        load: Ok(Samples::new(loads)),
        one: ones.map(Samples::new),
    }
}

/// A file inside the sandbox.
const FILE: &str = "/run/peers";

fn lines(size: usize, line: impl Fn(&str) -> String) -> String {
    (0..size).fold(String::new(), |mut text, i| {
        let _ = writeln!(text, "{}", line(&peer(i)));
        text
    })
}

fn nft(size: usize) -> Cost {
    let elements = lines(size, |address| format!("{address},"));
    let file = format!(
        "table inet t {{ set peers {{ type ipv4_addr; elements = {{ {elements} }}; }}; \
         chain in {{ type filter hook input priority 0; policy drop; ip saddr @peers accept; }}; }}"
    );
    commands(
        size,
        || std::fs::write(FILE, &file).unwrap(),
        || command(&format!("nft -f {FILE}")),
        |i| command(&format!("nft add element inet t peers {{ {} }}", peer(i))),
    )
}

fn iptables(size: usize) -> Cost {
    let rules = lines(size, |address| format!("-A INPUT -s {address} -j ACCEPT"));
    let file =
        format!("*filter\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n{rules}COMMIT\n");
    commands(
        size,
        || std::fs::write(FILE, &file).unwrap(),
        || command(&format!("iptables-restore {FILE}")),
        |i| command(&format!("iptables -A INPUT -s {} -j ACCEPT", peer(i))),
    )
}

/// It has no way to load many: one after the other, as far as the budget goes.
fn ufw(size: usize) -> Cost {
    if size > SIZES[0] {
        return Cost::none("one by one only");
    }
    let allow = |i: usize| command(&format!("ufw allow from {}", peer(i)));
    let host = Namespace::new("ufw");
    sandbox::enter(&host, || {
        must("ufw --force enable");
        let started = Instant::now();
        let mut all = Duration::ZERO;
        for i in 0..size {
            if started.elapsed() > 2 * BUDGET {
                return Cost::none(&format!("{i} peers took {} s", started.elapsed().as_secs()));
            }
            match allow(i) {
                Ok(time) => all += time,
                Err(reason) => return Cost::none(&reason),
            }
        }
        let ones: Result<Vec<Duration>, String> = (size..size + 7).map(allow).collect();
        Cost {
            load: Ok(Samples::new(vec![all])),
            one: ones.map(Samples::new),
        }
    })
}

/// The service and its bus, in private. A set is declared for good, then filled at run time, as its
/// documentation has it.
fn firewalld(size: usize) -> Cost {
    let list = lines(size, str::to_owned);
    let host = Namespace::new("firewalld");
    sandbox::enter(&host, || {
        let _bus = bus();
        must("firewall-offline-cmd --new-ipset=peers --type=hash:ip --option=maxelem=262144");
        must("firewall-offline-cmd --zone=trusted --add-source=ipset:peers");
        let _service = Server::start("firewalld --nofork");
        eventually(PATIENCE, "firewalld runs", || command("firewall-cmd --state"));
        std::fs::write(FILE, &list).unwrap();
        let load = command(&format!(
            "firewall-cmd --ipset=peers --add-entries-from-file={FILE}"
        ));
        let ones: Result<Vec<Duration>, String> = match &load {
            Ok(_) => (size..size + 7)
                .map(|i| command(&format!("firewall-cmd --ipset=peers --add-entry={}", peer(i))))
                .collect(),
            Err(reason) => Err(reason.clone()),
        };
        Cost {
            load: load.map(|time| Samples::new(vec![time])),
            one: ones.map(Samples::new),
        }
    })
}
