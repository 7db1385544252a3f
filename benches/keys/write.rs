//! Keys of many users: put in place, one changed, none changed, looked at.
//!
//! May not live here: other programs (`others`), what sshd answers (`probe`).

use std::time::Duration;

use crate::others;
use crate::site::{KEYS_EACH, Moment, Site, USERS, key, keys};
use crate::stats::{self, Samples, times};

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

pub fn run(site: &mut Site) {
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
        rows.push((format!("portcullis, {what}"), looked));
    }
    let checked = Samples::of(ROUNDS, |_| site.took("portcullis check; true"));
    rows.push((
        "`portcullis check`, a process that knows nothing".to_owned(),
        checked,
    ));
    site.apply(&own);
    let first = rows[0].1.clone();
    rows.extend(others::write(site, &many));
    let row =
        |(name, samples): (String, Samples)| vec![name, samples.summary(), times(samples.ratio(&first))];
    let header = ["", "time", "to the first row"];
    let title = format!("{USERS} users with {KEYS_EACH} keys each");
    stats::print(&title, &header, rows.into_iter().map(row).collect());
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

    fn rows(self) -> Vec<(String, Samples)> {
        let named = [
            (
                "`portcullis apply`, all keys new: until they are on disk",
                self.on_disk,
            ),
            ("the same, until sshd was asked", self.all),
            (
                "`portcullis apply`, one key new: until it is on disk",
                self.one_on_disk,
            ),
            ("the same, until sshd was asked", self.one),
            ("`portcullis apply`, no key new: no file is touched", self.none),
        ];
        named
            .map(|(name, times)| (name.to_owned(), Samples::new(times)))
            .into()
    }
}
