//! What an operator looks at, and telling those who follow it.
//!
//! May not live here: judging, showing.

use std::sync::Arc;

use jiff::Timestamp;
use portcullis_protocol::situation::{Deliveries, LetIn, TrialState};
use portcullis_protocol::{Report, Situation};
use tokio::sync::watch;

use super::Agent;

/// Since when things are as they are, and who is told when they change.
#[derive(Default)]
pub struct Situations {
    /// When the first report was written.
    started: Option<Timestamp>,
    /// Since when the instance is ready, or is not.
    verdict: Option<(bool, Timestamp)>,
    news: watch::Sender<Option<Arc<Situation>>>,
}

impl Situations {
    fn note(&mut self, report: &Report) {
        self.started.get_or_insert(report.time);
        if self.verdict.is_none_or(|(ready, _)| ready != report.ready) {
            self.verdict = Some((report.ready, report.time));
        }
    }
}

impl Agent {
    /// Tells when an operator would see something else than before.
    pub fn watch_situation(&self) -> watch::Receiver<Option<Arc<Situation>>> {
        self.situations.news.subscribe()
    }

    /// What an operator sees now; none before the first report.
    pub(super) fn situation(&self) -> Option<Situation> {
        let report = self.report.as_deref()?.clone();
        let before = self.before_trial.as_ref();
        Some(Situation {
            started: self.situations.started.unwrap_or(report.time),
            verdict_since: self.situations.verdict.map_or(report.time, |(_, since)| since),
            trial: self.trial.as_ref().map(|trial| TrialState {
                until: trial.until,
                before: before.map(|spec| spec.generation.get()),
            }),
            let_in: self.spec.as_deref().map(LetIn::of),
            deliveries: self.deliveries(),
            report,
        })
    }

    /// How reports go out, as far as it is known.
    fn deliveries(&self) -> Option<Deliveries> {
        let state = self.outbox.state();
        let state = state.borrow();
        state.configured.then(|| Deliveries {
            last_success: state.last_success,
            last_error: state.last_error.clone(),
            queued: state.queued,
            oldest: state.oldest,
        })
    }

    /// After a report was written: those who follow are woken, if they would see something else.
    pub(super) fn tell_situation(&mut self) {
        if let Some(report) = self.report.clone() {
            self.situations.note(&report);
        }
        let Some(now) = self.situation() else { return };
        self.situations.news.send_if_modified(|told| {
            let is_news = told.as_deref().is_none_or(|before| now.is_news_after(before));
            if is_news {
                *told = Some(Arc::new(now));
            }
            is_news
        });
    }
}
