//! `portcullisctl list`, `wait` and `health`: how instances are.
//!
//! May not live here: launching and ending them.

use std::time::Duration;

use serde::Serialize;

use super::{Context, duration, output};
use crate::ca::ClientCertificate;
use crate::local::{Instance, State};
use crate::{Error, Result};

/// A row of `list`, and what `launch` and `list` print as JSON.
#[derive(Serialize)]
pub(super) struct Row {
    name: String,
    id: String,
    cluster: Option<String>,
    addresses: [std::net::IpAddr; 2],
    state: State,
    /// None: it could not be asked.
    ready: Option<bool>,
}

impl Row {
    pub(super) fn new(instance: &mut Instance, certificate: &ClientCertificate) -> Self {
        let asked = instance.has_agent() && instance.state() == State::Running;
        let report = if asked {
            instance.health(certificate).ok()
        } else {
            None
        };
        Self {
            name: instance.name().to_owned(),
            id: instance.id().to_owned(),
            cluster: instance.cluster().map(str::to_owned),
            addresses: instance.addresses(),
            state: instance.state(),
            ready: report.map(|report| report.ready),
        }
    }
}

/// Prints instances.
pub(super) fn print_rows(context: &Context, rows: &[Row]) -> Result<()> {
    if context.json() {
        return output::print_json(&rows);
    }
    let lines = rows.iter().map(|row| {
        let ready = match row.ready {
            Some(true) => "yes",
            Some(false) => "no",
            None => "unknown",
        };
        let addresses = format!("{}, {}", row.addresses[0], row.addresses[1]);
        let cluster = row.cluster.clone().unwrap_or_else(|| "-".into());
        vec![
            row.name.clone(),
            row.id.clone(),
            cluster,
            addresses,
            row.state.to_string(),
            ready.into(),
        ]
    });
    let header = ["NAME", "ID", "CLUSTER", "ADDRESSES", "STATE", "READY"];
    output::print(&output::table(&header, lines.collect()));
    Ok(())
}

/// `list`.
pub(super) fn list(context: &Context) -> Result<u8> {
    let provider = context.provider()?;
    let certificate = provider.client_certificate()?;
    let mut instances = provider.list()?;
    let rows: Vec<Row> = instances
        .iter_mut()
        .map(|instance| Row::new(instance, &certificate))
        .collect();
    print_rows(context, &rows)?;
    Ok(0)
}

#[derive(clap::Args)]
#[command(after_help = "Example:\n  portcullisctl wait gpu-0 --timeout 5m")]
pub(super) struct Wait {
    /// The instance
    name: String,
    /// How long to wait
    #[arg(long, default_value = "120s", value_parser = duration)]
    timeout: Duration,
}

impl Wait {
    pub(super) fn run(&self, context: &Context) -> Result<u8> {
        let provider = context.provider()?;
        let progress = context.progress();
        let report = crate::wait::wait(&provider, &self.name, self.timeout, progress.as_ref())?;
        drop(progress);
        if context.json() {
            output::print_json(&report)?;
        } else {
            let generation = report.generation.unwrap_or(0);
            output::print(&format!("{} is ready, generation {generation}\n", self.name));
        }
        Ok(0)
    }
}

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  portcullisctl health gpu-0\n  portcullisctl health --format json")]
pub(super) struct Health {
    /// The instance; all that run when left out
    name: Option<String>,
    /// Show it again every two seconds, until Ctrl-C
    #[arg(long)]
    watch: bool,
}

impl Health {
    pub(super) fn run(&self, context: &Context) -> Result<u8> {
        if self.watch && context.json() {
            return Err(Error::BadInput(
                "--watch: with --format json there is one document only".into(),
            ));
        }
        loop {
            let code = self.show(context)?;
            if !self.watch {
                return Ok(code);
            }
            output::print("\n");
            std::thread::sleep(Duration::from_secs(2));
        }
    }

    fn show(&self, context: &Context) -> Result<u8> {
        let provider = context.provider()?;
        let certificate = provider.client_certificate()?;
        if let Some(name) = &self.name {
            let report = provider.get(name)?.health(&certificate)?;
            if context.json() {
                output::print_json(&report)?;
            } else {
                output::print(&output::report(name, &report));
            }
            return Ok(u8::from(!report.ready));
        }
        let mut instances = provider.list()?;
        instances.retain(|instance| instance.state() == State::Running);
        let (mut reports, mut code) = (Vec::new(), 0);
        for instance in &mut instances {
            match instance.health(&certificate) {
                Ok(report) => {
                    code |= u8::from(!report.ready);
                    if !context.json() {
                        output::print(&output::report(instance.name(), &report));
                    }
                    reports.push(report);
                }
                // One that does not answer must not hide the others.
                Err(error) => {
                    eprintln!("portcullisctl: {error}");
                    code = 1;
                }
            }
        }
        if context.json() {
            output::print_json(&reports)?;
        }
        Ok(code)
    }
}
