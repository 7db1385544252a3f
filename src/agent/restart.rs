//! Starting an sshd that stopped: once, and then ever more rarely.
//!
//! May not live here: whether it is to be started, and as which unit (`policy::sshd_restart`).

use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use crate::log::id;
use crate::policy::observation::{Observed, SshdCare};
use crate::policy::sshd_restart::{Restart, decide};
use crate::system::systemd::{self, Job};

/// After the first time, until the second.
const SHORTEST: Duration = Duration::from_secs(30);
/// At most.
const LONGEST: Duration = Duration::from_secs(30 * 60);

/// When sshd may be started again.
#[derive(Debug, Default)]
struct Backoff {
    /// When it was started last, and how long after that it is left alone.
    last: Option<(Instant, Duration)>,
    /// Since when it is seen to run.
    runs_since: Option<Instant>,
}

impl Backoff {
    fn runs(&mut self, now: Instant) {
        self.runs_since.get_or_insert(now);
    }

    /// It does not run: the moment from which it may be started.
    fn earliest(&mut self, now: Instant) -> Instant {
        let ran = self
            .runs_since
            .take()
            .map(|since| now.saturating_duration_since(since));
        match self.last {
            // It ran for as long as it would have been left alone: that was no loop.
            Some((_, delay)) if ran.is_some_and(|ran| ran >= delay) => {
                self.last = None;
                now
            }
            Some((last, delay)) => last + delay,
            None => now,
        }
    }

    fn started(&mut self, now: Instant) {
        let delay = self.last.map_or(SHORTEST, |(_, delay)| (delay * 2).min(LONGEST));
        self.last = Some((now, delay));
    }
}

/// Starts sshd when none of its units is active.
pub struct Restarter {
    enabled: bool,
    backoff: Backoff,
    /// When to look again.
    due: Option<Instant>,
    count: u32,
    last: Option<Observed<String>>,
}

impl Restarter {
    /// One that does nothing unless it is enabled.
    pub fn new(enabled: bool) -> Self {
        Self {
            enabled,
            backoff: Backoff::default(),
            due: None,
            count: 0,
            last: None,
        }
    }

    /// When [`Self::tend`] is to be called, if nothing else happens.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// For the report.
    pub fn tell(&self, care: &mut SshdCare) {
        care.restarts = self.count;
        care.last_restart.clone_from(&self.last);
    }

    /// Looks at sshd's units and starts one, if it is time.
    pub async fn tend(&mut self) {
        if !self.enabled {
            return;
        }
        self.due = None;
        let (manager, units) = tokio::join!(systemd::manager_state(), systemd::sshd_unit_files());
        // Without an answer there is nobody to start it either; systemd's coming back is an event.
        let (Ok(manager), Ok(units)) = (manager, units) else {
            return;
        };
        let now = Instant::now();
        match decide(&manager, &units) {
            Restart::Runs => self.backoff.runs(now),
            Restart::Wait => {}
            Restart::Disabled => {
                self.last = Some(Err("no unit of sshd is enabled: none is started".to_owned()))
            }
            Restart::Start(unit) => match self.backoff.earliest(now) {
                earliest if earliest > now => self.due = Some(earliest),
                _ => self.start(&unit, now).await,
            },
        }
    }

    async fn start(&mut self, unit: &str, now: Instant) {
        self.backoff.started(now);
        self.count += 1;
        let count = self.count;
        let result = match systemd::run_job(Job::Start, unit).await {
            Ok(result) if result == "done" => Ok(format!("{unit} was started")),
            Ok(result) => Err(format!("{unit} could not be started: {result}")),
            Err(reason) => Err(reason),
        };
        match &result {
            Ok(_) => info!(
                MESSAGE_ID = id::SSHD_STARTED,
                UNIT = unit,
                COUNT = count,
                "sshd had stopped, and was started"
            ),
            Err(reason) => {
                warn!(
                    MESSAGE_ID = id::SSHD_STARTED,
                    UNIT = unit,
                    COUNT = count,
                    REASON = reason,
                    "sshd had stopped, and could not be started: {reason}"
                );
                // A unit that fails again is no change of state that would be told.
                self.due = self.backoff.last.map(|(last, delay)| last + delay);
            }
        }
        self.last = Some(result);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn once_and_then_ever_more_rarely() {
        let mut backoff = Backoff::default();
        let mut now = Instant::now();
        assert_eq!(backoff.earliest(now), now);
        for seconds in [30, 60, 120, 240, 480, 960, 1800, 1800] {
            backoff.started(now);
            // It came up and went down again at once.
            backoff.runs(now + Duration::from_secs(1));
            let delay = Duration::from_secs(seconds);
            assert_eq!(backoff.earliest(now + Duration::from_secs(2)), now + delay);
            assert_eq!(backoff.earliest(now + Duration::from_secs(3)), now + delay);
            now += delay;
        }
    }

    #[test]
    fn one_that_ran_for_long_is_started_at_once_again() {
        let mut backoff = Backoff::default();
        let now = Instant::now();
        backoff.started(now);
        backoff.runs(now);
        let later = now + SHORTEST;
        backoff.runs(later);
        assert_eq!(backoff.earliest(later), later);
        backoff.started(later);
        assert_eq!(backoff.earliest(later), later + SHORTEST, "from the beginning");
    }
}
