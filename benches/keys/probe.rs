//! Asking sshd about keys without having them, beside logging in with each.
//!
//! May not live here: putting keys in place (`write`).

use std::net::SocketAddr;

use portcullis::system::ssh_probe;
use portcullis_figures::{Column, Plot, Row, Samples, Table, timed};
use portcullis_protocol::PublicKey;
use portcullis_provision::local::in_namespace;

use crate::lab::USER;
use crate::site::{Site, keys};

const ROUNDS: usize = 15;
const KEYS: usize = 10;

pub fn run(site: &mut Site) -> Table {
    let own = site.machine.spec.authorized_keys.clone();
    let names: Vec<String> = (0..KEYS).map(|number| format!("probe-{number}")).collect();
    let public: Vec<PublicKey> = names.iter().map(|name| site.lab.new_key(name)).collect();
    let mut wanted = own.clone();
    wanted.extend(keys(1, KEYS).into_iter().zip(&public).map(|(mut key, public)| {
        key.user = USER.parse().unwrap();
        key.key = public.clone();
        key
    }));
    site.apply(&wanted);
    site.settle();
    let asked = Samples::of(ROUNDS, |_| probe(site, &public));
    let logins = logins(site, &names);
    site.apply(&own);
    Table {
        title: format!("Whether {KEYS} keys of one user log in"),
        method: "Asked over connections of two keys each, one after the other; the daemon has up to four open at a time."
            .to_owned(),
        columns: vec![Column::time("time")],
        rows: vec![
            Row::ours("portcullis asks sshd, without private keys", vec![asked.into()]),
            Row::theirs(format!("`ssh {USER}@127.0.0.1 true` with each"), vec![logins.into()]),
        ],
        plot: Plot::None,
    }
}

fn probe(site: &Site, keys: &[PublicKey]) -> std::time::Duration {
    let address = SocketAddr::from(([127, 0, 0, 1], 22));
    let user = USER.parse().unwrap();
    in_namespace(&site.machine.instance.network_namespace(), || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let (time, probe) = timed(|| runtime.block_on(ssh_probe::probe(address, &user, keys)));
        assert!(
            probe.accepted.iter().all(|answer| *answer == Ok(true)),
            "{probe:?}"
        );
        time
    })
    .unwrap()
}

fn logins(site: &Site, names: &[String]) -> Samples {
    for name in names {
        let private = std::fs::read(site.lab.path(name)).unwrap();
        let file = format!("umask 077; cat > /run/{name}");
        assert!(site.machine.run_with(&file, &private).success());
    }
    let options =
        "-o BatchMode=yes -o IdentitiesOnly=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null";
    let script = format!(
        "set -e; for key in {}; do ssh -q {options} -i /run/$key {USER}@127.0.0.1 true; done",
        names.join(" ")
    );
    Samples::of(5, |_| site.took(&script))
}
