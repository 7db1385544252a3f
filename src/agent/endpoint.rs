//! The HTTPS endpoint as the agent sees it: how it is to be, which the front is told, and how it is.
//!
//! May not live here: the channel to the front (`front`), TLS and HTTP (`identity`, `health`).

use std::sync::Arc;

use portcullis_protocol::Spec;

use super::front::FrontState;
use super::{Agent, known_time};
use crate::channel::Setup;
use crate::config::Settings;
use crate::identity::TlsIdentity;
use crate::policy::observation::{Observed, Tls};
use crate::system::endpoint;

impl Agent {
    /// What the endpoint negotiates; without one, why the front has none.
    pub(super) async fn look_at_endpoint(&self) -> Observed<Tls> {
        let seen = endpoint::observe(self.settings.listen, self.identity.certificates()).await;
        let front = self.front.borrow().clone();
        seen.map_err(|reason| match front {
            FrontState::Listening => reason,
            FrontState::Absent(why) => format!("{reason}; the front, which has the endpoint: {why}"),
            FrontState::Failed(why) => format!("{reason}; the front can't listen: {why}"),
        })
    }

    /// The front goes by the spec that holds, and by what is known of the time.
    pub(super) fn tell_front(&self) {
        let setup = setup(&self.settings, &self.identity, self.spec.as_deref());
        if self.published.borrow().setup.time != setup.time {
            known_time::keep(&self.store, self.identity.clock());
            self.tell_outbox();
        }
        self.published.send_if_modified(|published| {
            let is_new = *published.setup != setup;
            if is_new {
                published.setup = Arc::new(setup);
            }
            is_new
        });
    }
}

/// How the endpoint is to be under a spec.
pub(super) fn setup(settings: &Settings, identity: &TlsIdentity, spec: Option<&Spec>) -> Setup {
    Setup {
        listen: settings.listen,
        limits: settings.limits.clone(),
        key: identity.key_pem(),
        certificates: identity.shown_chain(spec.map(|spec| spec.instance.id.as_str())),
        client_ca: spec.and_then(Spec::client_ca).map(str::to_owned),
        time: identity.clock().what_is_known(),
    }
}
