//! `portcullis check`: look at everything, here and now, with or without the daemon.

use std::sync::Arc;

use super::{Failure, Global, SettingsChoice, report, require_root, runtime};
use crate::agent::exposure;
use crate::agent::gate;
use crate::agent::logins;
use crate::agent::neighbours;
use crate::agent::report::write;
use crate::agent::state::Store;
use crate::identity::TlsIdentity;
use crate::log;
use crate::policy::observation::Observations;
use crate::system::secret_files::{TLS_KEY, credential};
use crate::system::{endpoint, storage, systemd};

pub fn run(global: &Global, choice: &SettingsChoice) -> Result<(), Failure> {
    require_root("a check")?;
    log::start(global.verbose, false);
    let settings = global.chosen(choice)?;
    let store = Store::new(&settings.state_dir);
    let (spec, refused) = match store.spec() {
        Ok(spec) => (spec, None),
        Err(error) => (None, Some(error.to_string())),
    };
    let report = runtime()?.block_on(async {
        let (logins, systemd) = tokio::join!(
            logins::observe(spec.as_ref(), &store, &settings, settings.sshd.keys),
            systemd::observe()
        );
        let identity = credential(TLS_KEY).and_then(|given| {
            TlsIdentity::load(&settings.state_dir, given.as_ref()).map_err(|e| e.to_string())
        });
        let tls = match identity {
            Ok(Some(identity)) => endpoint::observe(settings.listen, identity.certificates()).await,
            Ok(None) => Err("the daemon has not run yet".to_owned()),
            Err(reason) => Err(reason),
        };
        let gate = Arc::new(gate::observe(&settings, spec.as_ref()));
        let conflicts = neighbours::look(&gate.planned, &settings.links).await;
        let exposure = exposure::look(&gate, &conflicts, &settings.links, false).await;
        let seen = Observations {
            durable: Ok(0),
            gate,
            trial_until: None,
            systemd,
            sshd: logins.sshd,
            host_keys: store.host_keys(),
            keys: logins.keys,
            unfit: logins.unfit,
            tls,
            conflicts,
            exposure,
            storage: storage::observe().await,
        };
        write(spec.as_ref(), refused.as_deref(), &seen, None)
    });
    report::print(&report, global.format)?;
    if report.ready {
        Ok(())
    } else {
        Err(Failure::NotReady)
    }
}
