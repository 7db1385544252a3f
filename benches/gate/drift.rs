//! Another program flushes all rules: how long a host is open then.
//!
//! May not live here: applying what was asked for (`apply`).

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use portcullis::agent::gate::guard::Guard;
use portcullis::system::nftables::Nftables;

use crate::apply::recipe;
use crate::raw::{self, Raw, Watcher};
use crate::sandbox::{self, must};
use crate::specs::{settings, with_peers};
use crate::stats::{self, Samples, time};
use crate::world::World;

const SIZES: [usize; 2] = [100, 100_000];
const TRIES: usize = 1000;
/// For the watcher's tries of one size.
const BUDGET: Duration = Duration::from_secs(80);
/// How long the recipe is watched after a flush.
const WATCHED: Duration = Duration::from_secs(3);

pub fn run() -> String {
    let (mut rows, mut told) = (Vec::new(), Vec::new());
    for size in SIZES {
        let open = watcher(size);
        let (median, longest) = (time(open.median()), time(open.max()));
        told.push(format!("{median}, at most {longest}, with {size} peers"));
        rows.push(vec![
            format!("portcullis, a table that all may change, {size} peers"),
            time(open.median()),
            time(open.quantile(0.99)),
            time(open.max()),
            open.len().to_string(),
        ]);
    }
    for size in SIZES {
        exclusive(size);
        let mut row = vec![format!("portcullis, a table of its own, {size} peers")];
        row.extend(["never", "never", "never"].map(str::to_owned));
        row.push(TRIES.to_string());
        rows.push(row);
    }
    let status = incumbent();
    let mut row = vec![format!("ufw and DOCKER-USER; `ufw status` says {status:?}")];
    row.extend(["for good", "for good", "for good"].map(str::to_owned));
    row.push("1".to_owned());
    rows.push(row);
    let header = ["", "median", "p99", "longest", "tries"];
    stats::print("Open after `nft flush ruleset`", &header, rows);
    format!(
        "open after a foreign flush: never with a table of its own; else {}; ufw: for good",
        told.join(", ")
    )
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

/// Nobody watches: what ufw says afterwards.
fn incumbent() -> String {
    let world = World::new();
    let probe = world.probe();
    sandbox::enter(&world.host, || {
        std::fs::write("/run/recipe", recipe(&[22], &[])).unwrap();
        must("sh /run/recipe");
        assert!(!probe.is_open(), "the recipe shuts it");
        must("nft flush ruleset");
        let flushed = Instant::now();
        while flushed.elapsed() < WATCHED {
            assert!(probe.is_open(), "shut after {:?}", flushed.elapsed());
            thread::sleep(Duration::from_millis(5));
        }
        let status = sandbox::text("ufw status").unwrap();
        status.lines().next().unwrap_or_default().to_owned()
    })
}
