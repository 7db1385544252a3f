//! Asking sshd whether it would let keys in, once for what did not change since it was asked.
//!
//! May not live here: of which keys it is asked (`policy::key_questions`), how (`system::ssh_probe`).

use std::collections::BTreeMap;
use std::net::SocketAddr;

use futures_util::StreamExt;
use futures_util::stream;
use portcullis_protocol::key::KeyLine;
use portcullis_protocol::{PublicKey, UserName};

use super::logins::{Login, line_of};
use crate::policy::key_questions::{Acceptance, asked_through, unaskable};
use crate::policy::key_sources::Grant;
use crate::policy::keys::holds;
use crate::policy::observation::{Handshake, KeyState, Observed, SshdConfig};
use crate::system::ssh_probe::{self, Probe};
use crate::system::stamp::Stamp;

/// How many connections are open at the same time: well below `MaxStartups` (sshd_config(5): 10).
const AT_ONCE: usize = 4;

/// What sshd answered, and of which state of a user's files.
#[derive(Default)]
pub struct Answers {
    handshake: Option<Handshake>,
    users: BTreeMap<UserName, (Stamp, Vec<(KeyLine, Acceptance)>)>,
}

impl Answers {
    /// sshd's answer about a line in a file that is as it was; probably the one at this place.
    fn recall(&self, user: &UserName, stamp: &Stamp, line: &KeyLine, place: usize) -> Option<Acceptance> {
        let (_, lines) = self.users.get(user).filter(|(then, _)| then == stamp)?;
        let answer = from(lines, place).find(|(known, _)| known == line);
        answer.map(|(_, acceptance)| acceptance.clone())
    }

    fn remember(&mut self, handshake: &Observed<Handshake>, logins: &[Login], states: &[KeyState]) {
        self.handshake = handshake.clone().ok();
        self.users.clear();
        let mut states = states.iter();
        for login in logins {
            let states: Vec<&KeyState> = states.by_ref().take(login.grants.len()).collect();
            let Ok(read) = &login.installed else { continue };
            let told = login.grants.iter().zip(states);
            // A no may have reasons that nothing tells of when they are gone: it is asked again each time.
            let told = told.filter(|(_, state)| {
                !matches!(
                    state.accepted,
                    Acceptance::Unknown(_) | Acceptance::Refused | Acceptance::Barred(_)
                )
            });
            let lines = told.map(|(grant, state)| (line_of(grant), state.accepted.clone()));
            let lines = lines.collect();
            self.users.insert(login.user.clone(), (read.stamp.clone(), lines));
        }
    }
}

/// A handshake, and for each login's keys, in order, where they are and whether sshd would let them in.
pub async fn ask(
    config: &Observed<SshdConfig>,
    logins: &[Login],
    answers: &mut Answers,
) -> (Observed<Handshake>, Vec<KeyState>) {
    let address = config.as_ref().map_err(Clone::clone).and_then(|config| {
        config
            .local_address()
            .ok_or_else(|| "sshd listens on no address".to_owned())
    });
    let mut states: Vec<KeyState> = logins.iter().flat_map(|login| states(login, answers)).collect();
    let handshake = match &address {
        Ok(address) => ask_all(*address, &mut states, answers.handshake.clone()).await,
        Err(reason) => {
            for state in states.iter_mut().filter(|state| is_open(state)) {
                state.accepted = Acceptance::Unknown(reason.clone());
            }
            Err(reason.clone())
        }
    };
    answers.remember(&handshake, logins, &states);
    (handshake, states)
}

const NOT_ASKED: &str = "not asked yet";

/// Whether sshd has to be asked about it.
fn is_open(state: &KeyState) -> bool {
    state.accepted == Acceptance::Unknown(NOT_ASKED.to_owned())
}

/// All of them, those from a place on first: where the order is the same, the first one is it, and thousands
/// of keys are not compared with each other.
fn from<T>(all: &[T], place: usize) -> impl Iterator<Item = &T> {
    let (before, after) = all.split_at(place.min(all.len()));
    after.iter().chain(before)
}

/// What is known of a login's keys before sshd is asked.
fn states(login: &Login, answers: &Answers) -> Vec<KeyState> {
    let state = |(place, grant): (usize, &Grant)| {
        let (line, key) = (line_of(grant), &grant.key);
        let installed = match &login.installed {
            Ok(read) if from(&read.keys, place).any(|held| holds(held, &key.options, &key.key)) => Ok(read),
            Ok(read) => Err(format!("{} does not hold it", read.path.display())),
            Err(reason) => Err(reason.clone()),
        };
        let accepted = match &installed {
            Err(reason) => Acceptance::Unknown(reason.clone()),
            Ok(read) => match (&login.barred, unaskable(&key.options)) {
                (Some(reason), _) => Acceptance::Barred(reason.clone()),
                (None, Some(reason)) => Acceptance::Unaskable(reason),
                (None, None) => answers
                    .recall(&login.user, &read.stamp, &line, place)
                    .unwrap_or(Acceptance::Unknown(NOT_ASKED.to_owned())),
            },
        };
        KeyState {
            grant: grant.clone(),
            installed: installed.map(|read| read.path.clone()),
            accepted,
        }
    };
    login.grants.iter().enumerate().map(state).collect()
}

/// Asks sshd about all open keys, or about one of each kind if they are many.
async fn ask_all(
    address: SocketAddr,
    states: &mut [KeyState],
    known: Option<Handshake>,
) -> Observed<Handshake> {
    let mut open: Vec<&mut KeyState> = states.iter_mut().filter(|state| is_open(state)).collect();
    let keys: Vec<_> = open
        .iter()
        .map(|state| {
            let key = &state.grant.key;
            (&key.user, &key.options, &key.key)
        })
        .collect();
    let through = asked_through(&keys);
    let mut questions: BTreeMap<UserName, Vec<(usize, PublicKey)>> = BTreeMap::new();
    for (at, (user, _, key)) in keys.iter().enumerate().filter(|(at, _)| through[*at] == *at) {
        let asked = questions.entry((*user).clone()).or_default();
        asked.push((at, (*key).clone()));
    }
    // Each connection by itself: also one user's are open at the same time.
    let connections = questions.iter().flat_map(|(user, asked)| {
        let few = asked.chunks(ssh_probe::KEYS_PER_CONNECTION);
        few.map(move |few| (user, few))
    });
    let answered: Vec<(Vec<usize>, Probe)> = stream::iter(connections)
        .map(async |(user, asked)| {
            let (at, keys): (Vec<usize>, Vec<PublicKey>) = asked.iter().cloned().unzip();
            (at, ssh_probe::probe(address, user, &keys).await)
        })
        .buffered(AT_ONCE)
        .collect()
        .await;
    let mut handshake = None;
    let mut told: BTreeMap<usize, Acceptance> = BTreeMap::new();
    for (at, probe) in answered {
        handshake.get_or_insert(probe.handshake);
        told.extend(at.into_iter().zip(probe.accepted.into_iter().map(acceptance)));
    }
    for (at, state) in open.iter_mut().enumerate() {
        let answer = told.get(&through[at]).cloned();
        let answer = answer.unwrap_or(Acceptance::Unknown("sshd did not answer".to_owned()));
        state.accepted = match answer {
            Acceptance::Accepted if through[at] != at => Acceptance::Inferred,
            answer => answer,
        };
    }
    match (handshake, known) {
        (Some(handshake), _) => handshake,
        (None, Some(known)) => Ok(known),
        (None, None) => ssh_probe::handshake(address).await,
    }
}

fn acceptance(answer: Observed<bool>) -> Acceptance {
    match answer {
        Ok(true) => Acceptance::Accepted,
        Ok(false) => Acceptance::Refused,
        Err(reason) => Acceptance::Unknown(reason),
    }
}
