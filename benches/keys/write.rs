//! Keys of many users: put in place, one changed, none changed, looked at.
//!
//! May not live here: other programs (`others`, `google`), what sshd answers (`probe`).

use std::time::Duration;

use portcullis_figures::{Better, Cell, Column, Plot, Row, Samples, Table, Unit};

use crate::site::{KEYS_EACH, Moment, Site, USERS, key, keys};
use crate::{google, others};

const ROUNDS: usize = 7;

/// What each round gives.
#[derive(Default)]
struct Times {
    on_disk: Vec<Duration>,
    all: Vec<Duration>,
    one_on_disk: Vec<Duration>,
    one: Vec<Duration>,
    none: Vec<Duration>,
}

pub fn run(site: &mut Site) -> Table {
    let own = site.machine.spec.authorized_keys.clone();
    let many = keys(USERS, KEYS_EACH);
    let wanted = [&own[..], &many].concat();
    let mut taken = Times::default();
    for round in 0..ROUNDS {
        site.apply(&own);
        site.settle();
        taken.round(site, &wanted, round);
    }
    let mut rows = taken.rows();
    let own_file = "touch /home/u42/.ssh/authorized_keys";
    for (what, change) in [
        ("a look after one user's file changed", own_file),
        ("a look after sshd's files changed", "touch /etc/ssh/sshd_config"),
    ] {
        let looked = Samples::of(ROUNDS, |_| site.looked(change));
        rows.push(ours(what, looked, "sshd was asked"));
    }
    let checked = Samples::of(ROUNDS, |_| site.took("portcullis check; true"));
    rows.push(ours(
        "`portcullis check`, a process that knows nothing",
        checked,
        "sshd was asked",
    ));
    site.apply(&own);
    rows.extend(others::write(site, &many));
    rows.push(google::write(site, &many));
    let said = |name| Column::of(name, Unit::Count, Better::Neither);
    Table {
        title: format!("{USERS} users with {KEYS_EACH} keys each"),
        method: "From the command to the last file in its place. \"Until\" says what is known then. google-guest-agent gets \
                 its keys from a responder of ours at the metadata service's address, inside the instance; \
                 its time is from the change there to the last file, with all it does for users besides. What is left until sshd was asked is sshd: 100 connections, \
                 each a process of it."
            .to_owned(),
        columns: vec![Column::time("time"), said("until")],
        rows,
        plot: Plot::Bars {
            columns: vec![0],
            logarithmic: false,
        },
    }
}

fn ours(name: &str, times: Samples, until: &str) -> Row {
    Row::ours(name, vec![times.into(), Cell::Said(until.to_owned())])
}

impl Times {
    fn round(&mut self, site: &mut Site, wanted: &[portcullis_protocol::AuthorizedKey], round: usize) {
        let (start, end) = site.apply(wanted);
        self.on_disk.push(site.written(start, USERS) - start);
        self.all.push(end - start);
        site.settle();

        let mut one_new = wanted.to_vec();
        one_new[4242].key = key(1_000_000 + round).parse().unwrap();
        let (start, end): (Moment, Moment) = site.apply(&one_new);
        self.one_on_disk.push(site.written(start, 1) - start);
        self.one.push(end - start);
        site.settle();

        let before = site.key_files();
        assert_eq!(before.len(), USERS, "keys are in the homes");
        let (start, end) = site.apply(&one_new);
        self.none.push(end - start);
        site.settle();
        assert_eq!(
            site.key_files(),
            before,
            "a generation with the same keys touches no file"
        );
    }

    fn rows(self) -> Vec<Row> {
        let asked = "sshd was asked";
        [
            (
                "`portcullis apply`, all keys new",
                self.on_disk,
                "they are on disk, durable",
            ),
            ("the same", self.all, asked),
            (
                "`portcullis apply`, one key new",
                self.one_on_disk,
                "it is on disk, durable",
            ),
            ("the same, one key", self.one, asked),
            (
                "`portcullis apply`, no key new: no file is touched",
                self.none,
                asked,
            ),
        ]
        .map(|(name, times, until)| ours(name, Samples::new(times), until))
        .into()
    }
}
