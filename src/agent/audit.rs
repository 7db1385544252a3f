//! What is recorded in the audit log: each call that changes something and each refusal, with the specs before
//! and after it.
//!
//! May not live here: deciding about calls (`answer`, `accept`), the log's files (`log`).

pub mod log;

use std::path::Path;
use std::sync::Arc;

use nix::unistd::{Uid, User};
use portcullis_protocol::Spec;
use portcullis_protocol::control::{Answer, Request};

use super::Agent;
use super::accept::Refused;
use super::control::Caller;
use crate::identity::caller::read;
use crate::policy::audit::asked::{Asked, Became};
use crate::policy::audit::changes::Changes;
use crate::policy::audit::who::Who;
use crate::policy::audit::{Event, Outcome};
use crate::system::callers;

impl Agent {
    /// Answers a caller. What it changed, or that it was refused, is in the audit log when this returns.
    pub async fn answer_recorded(&mut self, request: Request, caller: Caller) -> Answer {
        let asked = Asked::of(&request);
        // Only while it waits is a process sure to be there.
        let who = (!asked.reads).then(|| who(&caller));
        let before = self.spec.clone();
        let answer = self.answer(request, caller.clone()).await;
        if let Some(became) = Became::of(&asked, &answer) {
            let who = who.unwrap_or_else(|| self::who(&caller));
            let mut event = self.event(who, asked.action, before.as_ref());
            event.parameters = asked.parameters;
            event.result = became.result;
            event.confirm_until = became.confirm_until;
            (event.refusal, event.reason) = became.refused.unzip();
            self.audit.record(event);
        }
        answer
    }

    /// Records that the daemon is there, if that is worth a record.
    pub fn audit_start(&mut self) {
        self.audit.start(generation(self.spec.as_ref()));
    }

    /// When the audit log has something to write without a call.
    pub fn audit_due(&self) -> Option<tokio::time::Instant> {
        self.audit.due()
    }

    /// Writes it.
    pub fn tend_audit(&mut self) {
        self.audit.tend();
    }

    /// Writes what is only counted yet: the daemon ends.
    pub fn audit_stop(&mut self) {
        self.audit.stop();
    }

    /// Records what became of the spec file.
    pub(super) fn record_file(&mut self, path: &Path, before: Option<&Arc<Spec>>, refused: Option<Refused>) {
        let path = path.display().to_string();
        let mut event = self.event(Who::File { path }, "spec-file", before);
        event.result = match refused {
            Some(_) => Outcome::Refused,
            None => Outcome::Changed,
        };
        (event.refusal, event.reason) = refused.unzip();
        self.audit.record(event);
    }

    /// Records something that nobody asked for.
    pub(super) fn record_own(&mut self, action: &str, before: Option<&Arc<Spec>>, reason: Option<String>) {
        let mut event = self.event(Who::Agent, action, before);
        event.result = Outcome::Changed;
        event.reason = reason;
        self.audit.record(event);
    }

    fn event(&self, who: Who, action: &str, before: Option<&Arc<Spec>>) -> Event {
        let after = self.spec.as_ref();
        let mut event = Event::note(self.audit.moment(), action, generation(after));
        event.who = who;
        event.generation_before = generation(before);
        if before.map(Arc::as_ptr) != after.map(Arc::as_ptr) {
            event.changes = Changes::between(before.map(Arc::as_ref), after.map(Arc::as_ref));
        }
        event
    }
}

fn generation(spec: Option<&Arc<Spec>>) -> Option<u64> {
    spec.map(|spec| spec.generation.get())
}

fn who(caller: &Caller) -> Who {
    match caller {
        Caller::Local(pid) => {
            let seen = pid.map(callers::describe).unwrap_or_default();
            let name = |uid| {
                User::from_uid(Uid::from_raw(uid))
                    .ok()
                    .flatten()
                    .map(|user| user.name)
            };
            Who::Local {
                pid: *pid,
                uid: seen.uid,
                command: seen.command,
                login_user: seen
                    .login_uid
                    .map(|uid| name(uid).unwrap_or_else(|| uid.to_string())),
            }
        }
        Caller::Remote(remote) => {
            let shown = remote.chain.first().and_then(|der| read(der).ok());
            Who::remote(remote.address.to_string(), shown.as_ref())
        }
    }
}
