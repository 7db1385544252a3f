//! Another program flushes all rules: how long a host is open then.
//!
//! May not live here: applying what was asked for (`apply`).

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use portcullis::agent::gate::guard::Guard;
use portcullis::system::nftables::Nftables;
use portcullis_figures::{Cell, Column, Plot, Row, Samples, Table};

use crate::contenders::{ByHand, Contender, Firewalld, Recipe};
use crate::raw::{self, Raw, Watcher};
use crate::sandbox::{self, must};
use crate::specs::{settings, with_peers};
use crate::world::World;

const SIZES: [usize; 2] = [100, 100_000];
const TRIES: usize = 1000;
/// For the watcher's tries of one size.
const BUDGET: Duration = Duration::from_secs(80);
/// How long the recipe is watched after a flush.
const WATCHED: Duration = Duration::from_secs(3);

pub fn run() -> Table {
    let mut rows = Vec::new();
    for size in SIZES {
        exclusive(size);
        let never = || Cell::Never(TRIES as u64);
        rows.push(Row::ours(
            format!("portcullis, a table of its own, {} peers", thousands(size)),
            vec![never(), never()],
        ));
    }
    for size in SIZES {
        let open = watcher(size);
        let p99 = Cell::one(open.quantile(0.99).as_secs_f64());
        rows.push(Row::ours(
            format!(
                "portcullis, a table that all may change, {} peers",
                thousands(size)
            ),
            vec![open.into(), p99],
        ));
    }
    for other in [&Recipe as &dyn Contender, &Firewalld, &ByHand] {
        incumbent(other);
        let open = || Cell::ForGood(WATCHED.as_secs_f64());
        rows.push(Row::theirs(other.name(), vec![open(), open()]));
    }
    Table {
        title: "Open after a foreign flush".to_owned(),
        method: "`nft flush ruleset`, by another program. A table of its own (Linux 6.9, the default) is out of its \
                 reach. Where it is not, the time is from the return of the flush to the end of the transaction that \
                 shut the host again; a host is shut without large sets first, and peers follow in the next transaction. \
                 The others are watched for 3 s, and have to let every packet in."
            .to_owned(),
        columns: vec![Column::time("open"), Column::time("99th percentile")],
        rows,
        plot: Plot::Bars {
            columns: vec![0],
            logarithmic: true,
        },
    }
}

fn thousands(size: usize) -> String {
    if size < 1000 {
        size.to_string()
    } else {
        format!("{},000", size / 1000)
    }
}

/// From the return of the flush to the end of the transaction that shut the host again.
fn watcher(size: usize) -> Samples {
    let world = World::new();
    let probe = world.probe();
    assert!(probe.is_open(), "it is open before");
    world.host.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let guard = Guard::start(&settings(false)).unwrap();
        runtime.block_on(guard.enforce(Some(Arc::new(with_peers(size)))));
        let mut seen = guard.watch();
        let (raw, watcher, flush) = (Raw::open(), Watcher::open(), raw::flush());
        let (mut times, started) = (Vec::new(), Instant::now());
        while times.len() < TRIES && started.elapsed() < BUDGET {
            watcher.drain();
            let (_, flushed) = raw.send(&flush);
            // The first to end is the flush.
            watcher.next();
            let shut = watcher.next();
            assert!(!probe.is_open(), "it is shut again");
            times.push(shut.saturating_duration_since(flushed));
            let repaired = times.len() as u64;
            let is_whole = |gate: &Arc<portcullis::policy::observation::Gate>| {
                let is_planned = |held: &Option<_>| held.as_ref() == Some(&gate.planned);
                gate.repaired >= repaired && gate.held.as_ref().is_ok_and(is_planned)
            };
            runtime.block_on(seen.wait_for(is_whole)).unwrap();
        }
        Samples::new(times)
    })
}

/// Nobody else can take the table away.
fn exclusive(size: usize) {
    let world = World::new();
    let probe = world.probe();
    assert!(probe.is_open(), "it is open before");
    world.host.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let guard = Guard::start(&settings(true)).unwrap();
        let gate = runtime.block_on(guard.enforce(Some(Arc::new(with_peers(size)))));
        assert!(gate.owned, "this kernel knows tables of one's own");
        let (raw, flush, mut nftables) = (Raw::open(), raw::flush(), Nftables::open().unwrap());
        for number in 1..=TRIES {
            raw.send(&flush);
            assert!(!probe.is_open(), "flush {number} opened it");
            // A large one takes its time.
            if size < 1000 || number == TRIES {
                let held = nftables.read().unwrap().map(|held| held.ruleset);
                assert!(held.as_ref() == Some(&*gate.planned), "flush {number} changed it");
            }
        }
    });
}

/// Nobody watches: it is open as long as somebody looks.
fn incumbent(other: &dyn Contender) {
    let world = World::new();
    let probe = world.probe();
    assert!(probe.is_open(), "it is open before");
    sandbox::enter(&world.host, || {
        let mut running = other.stage();
        other.shut(&[22], &mut running);
        assert!(!probe.is_open(), "{} shuts it", other.name());
        must("nft flush ruleset");
        let flushed = Instant::now();
        while flushed.elapsed() < WATCHED {
            assert!(probe.is_open(), "shut after {:?}", flushed.elapsed());
            thread::sleep(Duration::from_millis(5));
        }
    });
}
